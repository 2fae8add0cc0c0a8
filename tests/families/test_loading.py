"""Published layouts load; damaged, truncated and foreign ones are refused with the file's name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from tests import tiny, tiny_families
from tests.families.test_sampling import store

UNET = "unet/diffusion_pytorch_model.safetensors"


def same_weights(one: nn.Module, other: nn.Module, atol: float = 0.0) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name].float(), right[name].float(), rtol=0, atol=atol)


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target


@pytest.mark.parametrize("make", [tiny.make_sdxl, tiny.make_sd15])
def test_every_part_loads(make: Callable[..., Path], tmp_path: Path) -> None:
    models = store(make(tmp_path))
    assert models.latent_shape == tiny.LATENTS
    assert len(models.schedule) == 1000
    reference, assistant, generator = models.reference_network(), models.assistant_network(), models.generator_network()
    same_weights(reference, assistant)
    same_weights(reference, generator)
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for net in (assistant, generator) for p in net.parameters())
    assert assistant is not generator
    assert {p.data_ptr() for p in assistant.parameters()}.isdisjoint(p.data_ptr() for p in reference.parameters())


@pytest.mark.parametrize("make", [tiny.make_sdxl, tiny.make_sd15])
def test_fp16_variant_alone(make: Callable[..., Path], tmp_path: Path) -> None:
    full, half = store(make(tmp_path / "full")), store(make(tmp_path / "half", variant="fp16"))
    assert not list((tmp_path / "half").rglob("diffusion_pytorch_model.safetensors"))
    same_weights(full.generator_network(), half.generator_network(), atol=1e-3)
    same_weights(full.decoder, half.decoder, atol=1e-3)
    same_weights(full.conditioner, half.conditioner, atol=1e-3)
    # Trained in float32 whatever the file holds.
    assert {p.dtype for p in half.generator_network().parameters()} == {torch.float32}


def test_sharded_safetensors(tmp_path: Path) -> None:
    whole, shards = tiny.make_sdxl(tmp_path / "one"), tiny.make_sdxl(tmp_path / "many", max_shard_size="100KB")
    assert len(list((shards / "unet").glob("*.safetensors"))) > 2
    same_weights(store(whole).generator_network(), store(shards).generator_network())
    fp16 = tiny.make_sdxl(tmp_path / "fp16", variant="fp16", max_shard_size="60KB")
    assert len(list((fp16 / "unet").glob("*.fp16*.safetensors"))) > 2
    same_weights(store(whole).generator_network(), store(fp16).generator_network(), atol=1e-3)


def test_dmd2_bin_loads_strictly(tiny_sdxl: Path, tmp_path: Path) -> None:
    """A bare half-precision state dict with diffusers' key names and no configuration."""
    file = tiny.make_generator_bin(tiny_sdxl, tmp_path / "dmd2_sdxl_1step_unet_fp16.bin", seed=5)
    unet = store(tiny_sdxl, generator=str(file)).generator_network()
    state = torch.load(file, weights_only=True)
    assert set(unet.state_dict()) == set(state)
    torch.testing.assert_close(unet.state_dict()["conv_in.weight"], state["conv_in.weight"].float())
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert not any(p.is_meta for p in unet.parameters())
    old = tmp_path / "old_format.bin"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    same_weights(store(tiny_sdxl, generator=str(old)).generator_network(), unet)
    safe = tmp_path / "unet.safetensors"
    save_file(state, safe)
    same_weights(store(tiny_sdxl, generator=str(safe)).generator_network(), unet)


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/rlhf_t2i_payload"),))


def test_bad_bins_are_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    state = torch.load(tiny.make_generator_bin(tiny_sdxl, tmp_path / "good.bin"), weights_only=True)
    missing = {k: v for k, v in state.items() if k != "conv_in.weight"}
    extra = {**state, "cls_pred_branch.0.weight": torch.zeros(1)}
    reshaped = {**state, "conv_in.weight": torch.zeros(3, 3)}
    for name, content, reason in [
        ("missing", missing, "conv_in.weight"),
        ("extra", extra, "cls_pred_branch"),
        ("reshaped", reshaped, "conv_in.weight"),
        ("wrapped", {"state_dict": state}, "holds no state dict"),
        ("list", [1, 2], "holds no state dict"),
        ("lora", {"unet.down.lora_A.weight": torch.zeros(2, 2)}, "fuse it into its base"),
        ("single", {"model.diffusion_model.out.0.weight": torch.zeros(2)}, "from_single_file"),
        ("pickle", {"x": Payload()}, "damaged or not a file of weights"),
    ]:
        file = tmp_path / f"{name}.bin"
        torch.save(content, file)
        with pytest.raises(UsageError, match=reason) as caught:
            store(tiny_sdxl, generator=str(file)).generator_network()
        assert file.name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not Path("/tmp/rlhf_t2i_payload").exists()
    cut = tmp_path / "cut.bin"
    cut.write_bytes((tmp_path / "good.bin").read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"cut\.bin is damaged"):
        store(tiny_sdxl, generator=str(cut)).generator_network()


def test_published_tokenizer_layout(tiny_sdxl: Path, tmp_path: Path) -> None:
    """SDXL's repository has vocab.json and merges.txt, not tokenizer.json."""
    folder = copy(tiny_sdxl, tmp_path / "m")
    for name in ("tokenizer", "tokenizer_2"):
        data = json.loads((folder / name / "tokenizer.json").read_text("utf-8"))["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in data["merges"]]
        (folder / name / "vocab.json").write_text(json.dumps(data["vocab"]), "utf-8")
        (folder / name / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
        (folder / name / "tokenizer.json").unlink()
    ours, theirs = store(folder).conditioner, store(tiny_sdxl).conditioner
    prompts = ["a red cat, smiling", "Ünïcode ✓"]
    torch.testing.assert_close(
        ours.encode(prompts).tensors["prompt_embeds"], theirs.encode(prompts).tensors["prompt_embeds"]
    )


PARTS = {
    "unet": lambda models: models.generator_network(),
    "vae": lambda models: models.decoder,
    "text_encoder": lambda models: models.conditioner,
    "text_encoder_2": lambda models: models.conditioner,
    "tokenizer": lambda models: models.conditioner,
    "tokenizer_2": lambda models: models.conditioner,
    "scheduler": lambda models: models.schedule,
}


def refuse(folder: Path, part: str, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        PARTS[part](store(folder))
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(part: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = copy(tiny_sdxl, tmp_path / "m")
    shutil.rmtree(folder / part)
    refuse(folder, part, part)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_damaged_files_are_named(part: str, damage: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    """Every file of a part in turn; a file whose loss does not matter may load."""
    folder = copy(tiny_sdxl, tmp_path / "m")
    weights = sorted((folder / part).glob("*.safetensors"))
    file = (weights or sorted((folder / part).glob("*.json")))[0]
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "garbage": b"\x93NUMPY\xff" * 50}[damage])
    refuse(folder, part, part, *([file.name] if weights else []))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_missing_tensor_is_not_replaced_by_noise(part: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    """diffusers and transformers would fill it with random numbers and go on."""
    folder = copy(tiny_sdxl, tmp_path / "m")
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    victim = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != victim}, file, metadata={"format": "pt"})
    refuse(folder, part, part, "lacks 1 weights", victim.removeprefix("text_model."))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tiny.make_sdxl(tmp_path, max_shard_size="100KB")
    shard = sorted((folder / "unet").glob("*.safetensors"))[1]
    shard.unlink()
    refuse(folder, "unet", shard.name, "missing")


def test_foreign_folders_are_refused(tiny_sdxl: Path, tiny_sd15: Path, tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no unet/config\.json|no vae/config\.json|model_index\.json"):
        _ = store(tiny_clip).conditioner
    with pytest.raises(UsageError, match=r"cannot be loaded|is missing"):
        store(tiny_sdxl, generator=str(tiny_clip)).generator_network()
    with pytest.raises(UsageError, match="not of one structure"):
        store(tiny_sdxl, generator=str(tiny_sd15)).check()
    with pytest.raises(UsageError, match=r"model_index\.json"):
        _ = store(tmp_path).family
    (tmp_path / "model_index.json").write_text("[1, 2]")
    with pytest.raises(UsageError, match="not a JSON object"):
        _ = store(tmp_path).family
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline\x1b[31m"}))
    with pytest.raises(UsageError, match=r"'KandinskyPipeline\\x1b\[31m' is no pipeline.*; known: .*sd15 .*, sdxl"):
        _ = store(tmp_path).family


@pytest.mark.parametrize("key", ["attention_head_dim", "layers_per_block", "transformer_layers_per_block"])
def test_a_generator_of_another_structure_is_refused(key: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    """Also where its weights have the reference's shapes: it would be exported with the wrong configuration."""
    folder = copy(tiny_sdxl / "unet", tmp_path / "unet")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    changed = {"attention_head_dim": 2, "layers_per_block": 3, "transformer_layers_per_block": 4}[key]
    (folder / "config.json").write_text(json.dumps({**config, key: changed}), "utf-8")
    for role in ("generator", "assistant"):
        with pytest.raises(UsageError, match=rf"models\.{role}: .* has {key} {changed}, the reference's"):
            store(tiny_sdxl, **{role: str(folder)}).check()


def test_a_decoder_for_other_latents_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = copy(tiny_sdxl, tmp_path / "m")
    config = json.loads((folder / "vae" / "config.json").read_text("utf-8"))
    for change, words in (({"latent_channels": 16}, "16 channels"), ({"scaling_factor": "x"}, "scaling_factor")):
        (folder / "vae" / "config.json").write_text(json.dumps({**config, **change}), "utf-8")
        with pytest.raises(UsageError, match=words):
            store(folder).check()


@pytest.mark.parametrize("kind", ["a text encoder", "a network", "a pipeline", "nothing", "a configuration alone"])
def test_a_folder_of_models_vae_that_is_no_vae_is_refused_by_the_check(
    kind: str, tiny_sdxl: Path, tmp_path: Path
) -> None:
    (tmp_path / "vae").mkdir()
    shutil.copy(tiny_sdxl / "vae/config.json", tmp_path / "vae")
    folders = {"a text encoder": "text_encoder", "a network": "unet", "a pipeline": "."}
    empty = tmp_path / "empty"
    empty.mkdir()
    folder = {"nothing": empty, "a configuration alone": tmp_path / "vae"}.get(kind, tiny_sdxl / folders.get(kind, ""))
    with pytest.raises(UsageError, match=rf"^models\.vae: {re.escape(str(folder))}") as caught:
        store(tiny_sdxl, vae=str(folder)).check()
    assert "\n" not in str(caught.value)


def test_a_decoder_that_makes_images_of_another_size_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = copy(tiny_sdxl / "vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    widths = [*config["block_out_channels"], config["block_out_channels"][-1]]
    (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": widths}), "utf-8")
    with pytest.raises(UsageError, match=r"^models\.vae: .* makes 4 pixels of a latent, the reference's makes 2"):
        store(tiny_sdxl, vae=str(folder)).check()


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("FluxPipeline", "'SD3Transformer2DModel', but model_index.json names FluxPipeline"),
        ("StableDiffusionXLPipeline", "no unet/config.json.*model_index.json names StableDiffusionXLPipeline"),
    ],
)
def test_an_index_of_another_pipeline_than_its_network_is_refused(
    named: str, words: str, tiny_sd3: Path, tmp_path: Path
) -> None:
    folder = copy(tiny_sd3, tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": named}), "utf-8")
    with pytest.raises(UsageError, match=words) as caught:
        store(folder).check()
    assert "\n" not in str(caught.value)


def test_an_incomplete_pipeline_is_refused_before_training(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = copy(tiny_sdxl, tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(UsageError, match="names feature_extractor, but that folder is missing"):
        store(folder).check()


def test_a_foreign_tokenizer_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = copy(tiny_sdxl, tmp_path / "m")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    refuse(folder, "tokenizer", "tokenizer")


def test_resolution_must_fit_the_vae(tiny_sdxl: Path) -> None:
    with pytest.raises(UsageError, match="17 is not a multiple of 2"):
        _ = store(tiny_sdxl, height=17).latent_shape


def test_unsupported_schedulers_name_the_file(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = copy(tiny_sdxl, tmp_path / "m")
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text("utf-8"))
    for change, word in [
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"prediction_type": "flow"}, "flow"),
        ({"beta_start": "low"}, "scheduler_config.json"),
    ]:
        file.write_text(json.dumps({**config, **change}), "utf-8")
        refuse(folder, "scheduler", "scheduler_config.json", word)
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "beta_end"}), "utf-8")
    refuse(folder, "scheduler", "beta_end")


@pytest.mark.parametrize(
    ("text", "location", "revision", "file"),
    [
        ("stabilityai/sdxl", "stabilityai/sdxl", None, None),
        ("org/name@abc123", "org/name", "abc123", None),
        ("tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin", "tianweiy/DMD2", None, "dmd2_sdxl_1step_unet_fp16.bin"),
        ("org/name/sub/w.safetensors@v1", "org/name", "v1", "sub/w.safetensors"),
    ],
)
def test_hub_ids(text: str, location: str, revision: str | None, file: str | None) -> None:
    source = sources.parse(text)
    assert (source.location, source.revision, source.file) == (location, revision, file)
    assert not source.is_local


@pytest.mark.parametrize(
    "text", ["name", "a/b/c", "a/", "/b", "a b/c", "./nowhere", "~nobody/x/y", "a//b", "a/b/../c.bin", "a/b//c.bin"]
)
def test_bad_sources(text: str) -> None:
    with pytest.raises(UsageError):
        sources.parse(text)


def test_local_folders_never_reach_for_the_network(tiny_sdxl: Path) -> None:
    assert sources.parse(str(tiny_sdxl)).kwargs == {"local_files_only": True}


def test_sizes_beyond_the_networks_positions_are_refused(tmp_path: Path) -> None:
    folder = tiny.make_sd3(tmp_path)
    with pytest.raises(UsageError, match=r"models\.height, models\.width: 64 is more than 32"):
        _ = store(folder, height=64).latent_shape


def test_weights_without_a_place_are_refused(tmp_path: Path) -> None:
    """A damaged number of layers would otherwise train, and export, a shorter network."""
    folder = tiny_families.make_z_image(tmp_path / "model")
    config = folder / "transformer/config.json"
    keys = json.loads(config.read_text())
    config.write_text(json.dumps(keys | {"n_layers": keys["n_layers"] - 1}))
    with pytest.raises(
        UsageError, match=r"transformer holds \d+ weights for which its config\.json has no place, e\.g\."
    ):
        store(folder).reference_network()


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("text_encoder", {"num_hidden_layers": 2}),  # of 3; another picture, without a word
        ("text_encoder_2", {"num_hidden_layers": 0}),
        ("vae", {"up_block_types": []}),
    ],
)
def test_further_layers_of_any_part_are_refused(
    part: str, changes: dict[str, object], tiny_sdxl: Path, tmp_path: Path
) -> None:
    folder = copy(tiny_sdxl, tmp_path / "m")
    config = folder / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | changes), "utf-8")
    refuse(folder, part, f"{part} holds", "weights for which its config.json has no place")


@pytest.mark.parametrize("length", [-1, 0, "77", [77]])
def test_a_tokenizer_of_no_length_is_refused(length: object, tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = copy(tiny_sdxl, tmp_path / "m")
    config = folder / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"model_max_length": length}), "utf-8")
    refuse(folder, "tokenizer", "tokenizer: model_max_length is", "not a positive number")


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"latents_mean": [0.1] * 3, "latents_std": [1.0] * 4}, "latents_mean is not one number per channel"),
        ({"latents_mean": [0.1] * 4, "latents_std": "1.0"}, "latents_std is not one number per channel"),
        ({"latents_mean": [float("nan")] * 4}, "latents_mean is not one number per channel"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std holds numbers that are not positive"),
        ({"scaling_factor": float("inf")}, "scaling_factor is inf, not a positive number"),
        ({"shift_factor": "x"}, "shift_factor is 'x', not a number"),
    ],
)
def test_what_scales_the_latents_is_checked_before_anything_is_built(
    numbers: dict[str, object], sentence: str, tiny_sdxl: Path, tmp_path: Path
) -> None:
    folder = copy(tiny_sdxl / "vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | numbers), "utf-8")
    with pytest.raises(UsageError, match=f"config.json: {sentence}"):
        store(tiny_sdxl).family.check_decoder(sources.parse(str(folder)))


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("vae", {"norm_num_groups": 7}, "vae describes no decoder: num_channels"),
        ("vae", {"block_out_channels": [0, 0]}, "vae describes no decoder: "),
        ("text_encoder", {"num_attention_heads": 5}, "text_encoder describes no text encoder: "),
        ("text_encoder", {"hidden_size": "x"}, "text_encoder describes no text encoder: "),
    ],
)
def test_parts_that_cannot_be_built_for_a_plan(
    part: str, values: dict[str, object], words: str, tiny_sdxl: Path, tmp_path: Path
) -> None:
    """``plan`` builds all parts on the meta device, before any weights are read."""
    folder = copy(tiny_sdxl, tmp_path / "model")
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")
    family = store(folder).family
    with pytest.raises(UsageError, match=words):
        family.build_decoder() if part == "vae" else family.build_text_encoders()
