"""The real loading paths on folders in the published layouts, full-size names, and everything that can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from rlhf_t2i_plugins.rewards import checkpoints, image_reward
from rlhf_t2i_plugins.rewards.regression_head import RegressionHead
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import registry
from tests.rewards import builders
from tests.rewards.fixtures import formula


def meta_state(names: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in names.items()}


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in module.named_parameters()}


def test_vit_h_14_fits_transformers_clip_name_by_name() -> None:
    """PickScore, HPSv2 and CLIP-H at full size: every open_clip weight has its place, and none is left over."""
    state = meta_state(builders.fixture_json("vit_h_14_names"))
    config = checkpoints.open_clip_config(state)
    with torch.device("meta"):
        model = CLIPModel(config)
    assert shapes(model) == {name: list(t.shape) for name, t in checkpoints.rename_open_clip(state).items()}
    assert sum(p.numel() for p in model.parameters()) == 986_109_441
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (16, 16)
    assert config.vision_config.hidden_act == config.text_config.hidden_act == "gelu"


def test_the_published_pickscore_config_is_that_clip() -> None:
    """PickScore_v1's config.json, as transformers reads it, has the open_clip model's names and shapes."""
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}
    published = CLIPConfig(
        text_config=text | {"hidden_act": "gelu"},
        vision_config=vision | {"hidden_act": "gelu", "patch_size": 14},
        projection_dim=1024,
    )
    with torch.device("meta"):
        ours = shapes(CLIPModel(published))
    renamed = checkpoints.rename_open_clip(meta_state(builders.fixture_json("vit_h_14_names")))
    assert ours == {name: list(tensor.shape) for name, tensor in renamed.items()}


def test_image_reward_fits_transformers_blip_name_by_name() -> None:
    names = builders.fixture_json("image_reward_names")
    assert len(names) == 620 + 1  # the weights, and BERT's position_ids buffer
    state = meta_state(names)
    vision = image_reward.rename_vision(state)
    prefix = "blip.text_encoder."
    text = {n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix) and not n.endswith("position_ids")}
    with torch.device("meta"):
        towers = image_reward.build_blip(vision, text, {"num_attention_heads": 12})
        head = RegressionHead(768)
    assert shapes(towers[0]) == {name: list(t.shape) for name, t in vision.items()}
    assert shapes(towers[1]) == {name: list(t.shape) for name, t in text.items()}
    assert {f"mlp.{n}": s for n, s in shapes(head).items()} == {n: s for n, s in names.items() if n.startswith("mlp.")}
    # The published 446.7 M count two projections for pretraining, which the score does not use.
    projections = (1024 * 256 + 256) + (768 * 256 + 256)
    assert sum(p.numel() for m in (*towers, head) for p in m.parameters()) + projections == 446_665_953
    assert towers[0].config.num_attention_heads == 16
    assert towers[1].config.vocab_size == 30524


def test_vit_l_14_and_the_aesthetic_head_have_their_published_sizes() -> None:
    """openai/clip-vit-large-patch14: 427.6 M parameters; the head reads its 768 features."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    config = CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 14}, projection_dim=768)
    with torch.device("meta"):
        model, head = CLIPModel(config), RegressionHead(768)
    assert sum(p.numel() for p in model.parameters()) == 427_616_513
    assert sum(p.numel() for p in head.parameters()) == 927_969
    assert sorted({name.split(".")[1] for name in shapes(head)}) == ["0", "2", "4", "6", "7"]


def test_pickscore_in_logits_is_the_scaled_cosine(tmp_path: Path) -> None:
    folder = str(builders.write_clip(tmp_path))
    cosine, logit = (registry.reward("pickscore", model=folder, unit=unit) for unit in ("cosine", "logit"))
    images, prompts = builders.pictures(2), ["a cat", "a dog"]
    scale = float(cosine.clip.logit_scale())
    assert torch.allclose(logit.score(images, prompts), scale * cosine.score(images, prompts))
    assert (cosine.unit, logit.unit) == ("cosine", "logit")
    assert logit.value_range == pytest.approx((-scale, scale))


def test_pickscore_is_transformers_own_clip_output(tmp_path: Path) -> None:
    """The published recipe: normalized features, through the library's processor and model."""
    folder = str(builders.write_clip(tmp_path))
    reward = registry.reward("pickscore", model=folder)
    prompts, pixels = ["a cat", "two red foxes"], reward.clip.preprocess(builders.pictures(2))
    tokens = builders.clip_tokenizer()(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = reward.clip.model(pixel_values=pixels, **tokens)
    expected = output.logits_per_image.diagonal() / reward.clip.logit_scale()
    assert torch.allclose(reward.score(builders.pictures(2), prompts), expected, atol=1e-6)


def test_long_prompts_are_cut_to_the_context(tmp_path: Path) -> None:
    reward = registry.reward("pickscore", model=str(builders.write_clip(tmp_path)))
    assert bool(reward.score(builders.pictures(1), ["tree " * 500]).isfinite())


def test_a_separate_processor_is_used(tmp_path: Path) -> None:
    builders.random_clip().save_pretrained(tmp_path / "model")
    builders.write_processor(tmp_path / "processor")
    options = {"model": str(tmp_path / "model")}
    assert registry.reward("pickscore", processor=str(tmp_path / "processor"), **options).clip.preprocess.resize == 32
    with pytest.raises(UsageError, match=r"CLIP-ViT-H-14-laion2B-s32B-b79K cannot be read"):
        registry.reward("pickscore", **options)
    with pytest.raises(UsageError, match=r"holds no tokenizer"):
        registry.reward("clip", **options)


def test_missing_and_foreign_weights_are_refused_not_invented(tmp_path: Path) -> None:
    folder = builders.write_clip(tmp_path)
    weights = builders.random_clip().state_dict()
    del weights["visual_projection.weight"]
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"1 weights are missing, e.g. visual_projection.weight"):
        registry.reward("pickscore", model=str(folder))
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match=r"is not a readable CLIPModel"):
        registry.reward("pickscore", model=str(folder))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = builders.write_clip(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"has \d tokens but the model knows 514"):
        registry.reward("pickscore", model=str(folder))


def test_a_folder_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    for name in ("pickscore", "clip", "hpsv2", "hpsv3", "aesthetic", "image_reward", "vlm_choice"):
        with pytest.raises(UsageError, match=r"no such model"):
            registry.reward(name, model=str(tmp_path / "nowhere"))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """A pickle may call anything; only tensors are read."""
    ran = tmp_path / "ran"

    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str, int]]:
            return os.mkdir, (str(ran), 0o700)

    builders.write_hpsv2(tmp_path)
    torch.save({"state_dict": Malicious()}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UsageError, match=r"cannot be read as weights"):
        registry.reward("hpsv2", model=str(tmp_path))
    assert not ran.exists()


def test_hpsv2_takes_the_version_asked_for(tmp_path: Path) -> None:
    builders.write_hpsv2(tmp_path)
    with pytest.raises(UsageError, match=r"holds none of: HPS_v2_compressed.pt"):
        registry.reward("hpsv2", model=str(tmp_path), version="v2.0")
    (tmp_path / "HPS_v2.1_compressed.pt").rename(tmp_path / "HPS_v2_compressed.pt")
    assert registry.reward("hpsv2", model=str(tmp_path), version="v2.0").score(builders.pictures(1), ["x"]).shape == (
        1,
    )


def test_checkpoints_of_another_architecture_are_refused(tmp_path: Path) -> None:
    builders.write_hpsv2(tmp_path / "hps")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "hps" / "HPS_v2.1_compressed.pt")
    with pytest.raises(UsageError, match=r"is not an open_clip ViT checkpoint"):
        registry.reward("hpsv2", model=str(tmp_path / "hps"))
    lacking = {n: formula.weight(n, s) for n, s in builders.fixture_json("open_clip")["shapes"].items()}
    del lacking["ln_final.bias"]
    torch.save(lacking, tmp_path / "hps" / "HPS_v2_compressed.pt")
    with pytest.raises(UsageError, match=r"1 weights differ, e.g. text_model.final_layer_norm.bias"):
        registry.reward("hpsv2", model=str(tmp_path / "hps"), version="v2.0")

    folder = builders.write_image_reward(tmp_path / "ir")
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    (folder / "med_config.json").unlink()
    with pytest.raises(UsageError, match=r"has no med_config\.json"):
        registry.reward("image_reward", model=str(folder))
    builders.write_image_reward(folder)
    torch.save({n: t for n, t in state.items() if n != "mlp.layers.7.bias"}, folder / "ImageReward.pt")
    with pytest.raises(UsageError, match=r"lacks 1 weights for RegressionHead, e.g. layers.7.bias"):
        registry.reward("image_reward", model=str(folder))
    torch.save({"mlp.layers.0.weight": torch.zeros(1)}, folder / "ImageReward.pt")
    with pytest.raises(UsageError, match=r"is not an ImageReward checkpoint"):
        registry.reward("image_reward", model=str(folder))


def test_an_aesthetic_head_must_fit_its_clip(tmp_path: Path) -> None:
    _, head = builders.write_aesthetic(tmp_path)
    clip = builders.write_clip(tmp_path / "other")
    with pytest.raises(UsageError, match=r"reads 48 features but .* gives 16"):
        registry.reward("aesthetic", model=str(clip), head=str(head))


def test_open_clip_tags_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag that is published for transformers needs no open_clip; another one says what to install."""
    from rlhf_t2i_plugins.rewards import clip

    asked: list[str] = []
    monkeypatch.setattr(clip, "load_clip", lambda model: asked.append(model))
    registry.reward("clip", open_clip="ViT-H-14", pretrained="laion2b_s32b_b79k")
    assert asked == ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(UsageError, match=r"needs the open_clip library \(the extra open-clip: docs/install\.md\)"):
        registry.reward("clip", open_clip="EVA02-L-14", pretrained="merged2b_s4b_b131k")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"open_clip": "ViT-H-14"}, "open_clip and pretrained go together"),
        ({"model": "a/b", "open_clip": "ViT-H-14", "pretrained": "x"}, "give either model or open_clip"),
        ({"unit": "percent"}, "unit: must be 'cosine' or 'logit'"),
        ({"modle": "a/b"}, "unknown option 'modle'; did you mean 'model'"),
    ],
)
def test_wrong_options_name_the_plugin_and_the_key(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=f"reward 'clip'.*{message}"):
        registry.reward("clip", **options)


def test_the_format_of_weights_is_told_by_their_content(tmp_path: Path) -> None:
    """A hub cache's own files are named by their hash."""
    from safetensors.torch import save_file

    state = {"a": torch.ones(2)}
    save_file(state, tmp_path / "0123")
    torch.save(state, tmp_path / "4567")
    (tmp_path / "w.bin").symlink_to(tmp_path / "0123")
    for name in ("0123", "4567", "w.bin"):
        assert torch.equal(checkpoints.read_state(tmp_path / name)["a"], torch.ones(2))


def test_an_option_may_be_called_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from rlhf_t2i.plugins import Options, Reward\n"
        "class MineOptions(Options):\n    name: str\n"
        "class Mine(Reward):\n    Options = MineOptions\n"
    )
    assert registry.reward(f"{tmp_path}/mine.py:Mine", name="x").options.name == "x"


@pytest.mark.parametrize("key", ["num_hidden_layers", "depth"])
def test_a_model_of_a_million_layers_is_refused_at_once(key: str, tmp_path: Path) -> None:
    import json

    folder = builders.write_clip(tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = 1_000_000
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"{key} 1000000 is over 10,000"):
        registry.reward("pickscore", model=str(folder))


@pytest.mark.parametrize(
    "change",
    [{"size": [224, 224]}, {"image_processor": 5}, {"resample": []}, {"image_mean": None, "image_std": "x"},
     {"rescale_factor": "x"}, {"crop_size": "x"}],
    ids=str,
)  # fmt: skip
def test_any_processor_is_read_or_refused_in_a_sentence(change: dict[str, object], tmp_path: Path) -> None:
    import json

    folder = builders.write_clip(tmp_path / "clip")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match=r"preprocessor_config\.json: ") as caught:
        registry.reward("pickscore", model=str(folder))
    assert "\n" not in str(caught.value)


def test_a_hub_models_own_processor_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PickScore of a repository with its own processor: not the fallback's."""
    from rlhf_t2i_plugins.rewards import clip_model

    from rlhf_t2i.families import sources

    there = {"preprocessor_config.json", "tokenizer.json"}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda _, name, revision: str(tmp_path) if name in there else None
    )
    assert clip_model.has_processor(sources.parse("someone/pick"))
    there.remove("tokenizer.json")
    assert not clip_model.has_processor(sources.parse("someone/pick"))
