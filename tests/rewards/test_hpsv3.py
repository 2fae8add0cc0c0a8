"""HPSv3 against the original package (fixtures/README.md), and everything that can be wrong with its files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rlhf_t2i_plugins.rewards import hpsv3, hpsv3_prompt
from rlhf_t2i_plugins.rewards.qwen_vl import AFTER_IMAGE, ANSWER, BEFORE_IMAGE, QwenVL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.plugins import registry
from rlhf_t2i.plugins.preprocessing import CLIP_STD
from rlhf_t2i.roles.reward import freeze
from tests.rewards import builders, qwen_builders
from tests.rewards.fixtures import formula, tiny_qwen

CPU = torch.device("cpu")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_builders.write_hpsv3(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> Any:
    return freeze(registry.reward("hpsv3", **qwen_builders.hpsv3_options(folder)), CPU, torch.float32)


@pytest.fixture(scope="module")
def oracle() -> dict[str, Tensor]:
    return builders.fixture_tensors("hpsv3")


def squares(patches: Tensor) -> Tensor:
    """Sums over both frames and squares of 14 pixels, as the oracle exports them."""
    return patches.flatten(0, 1).unflatten(1, (3, 2, 4, 14, 4, 14)).sum((2, 4, 6))


def test_scores_and_gradients_are_the_originals(reward: Any, oracle: dict[str, Tensor]) -> None:
    images = qwen_builders.pictures(3, 448, 448).requires_grad_()
    scores = reward.score(images, formula.PROMPTS)
    assert (scores - oracle["output"][:, 0]).abs().max() < TOLERANCE
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    # Each pixel is in both frames.
    found = squares(reward.vlm.preprocess.patches(gradient * torch.tensor(CLIP_STD).reshape(1, 3, 1, 1))) / 2
    assert oracle["patch_gradient"].abs().max() > 100 * TOLERANCE, "a fixture without a gradient proves nothing"
    assert (found - oracle["patch_gradient"]).abs().max() < TOLERANCE / 10
    assert (squares(reward.vlm.preprocess(images)) / 14**2 / 2 - oracle["pixel_values"]).abs().max() < TOLERANCE


def test_the_fixture_tells_other_positions_apart(
    reward: Any, oracle: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original numbers image tokens like text, with frequencies that it rounded to bf16 before training."""
    images, expected = qwen_builders.pictures(3, 448, 448), oracle["output"][:, 0]
    monkeypatch.setattr(reward.vlm, "sequential", False)
    assert (reward.score(images, formula.PROMPTS) - expected).abs().max() > 100 * TOLERANCE
    monkeypatch.undo()
    rope = reward.vlm.model.language_model.rotary_emb.rope
    rounded = rope.inv_freq.clone()
    rope.inv_freq.copy_(type(rope)(rope.config).inv_freq)
    try:
        assert (reward.score(images, formula.PROMPTS) - expected).abs().max() > 100 * TOLERANCE
    finally:
        rope.inv_freq.copy_(rounded)


def test_the_vision_towers_positions_are_the_originals(oracle: dict[str, Tensor]) -> None:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding

    rope = hpsv3.VisionRope(Qwen2VLVisionRotaryEmbedding(Qwen2VLVisionConfig())).bfloat16()
    rows = torch.arange(32)
    cosines, sines = rope(torch.empty(0), torch.stack([rows, rows.flip(0)], 1))
    for found, expected in ((cosines, oracle["rope_cosines"]), (sines, oracle["rope_sines"])):
        assert torch.equal(found, torch.cat([expected, expected.flip(0)] * 2, 1))


def test_bfloat16_scores_are_near_the_originals(folder: Path, oracle: dict[str, Tensor]) -> None:
    """The original's own bf16 scores are up to 0.14 from its float32 ones."""
    options = qwen_builders.hpsv3_options(folder) | {"dtype": "bfloat16"}
    reward = freeze(registry.reward("hpsv3", **options), CPU, torch.float32)
    assert {p.dtype for p in reward.vlm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}
    with torch.no_grad():
        scores = reward.score(qwen_builders.pictures(3, 448, 448), formula.PROMPTS)
    assert scores.dtype == torch.float32
    for name in ("output", "bfloat16_output"):
        assert (scores - oracle[name][:, 0]).abs().max() < 0.15


def test_texts_are_the_originals(reward: Any, oracle: dict[str, Tensor]) -> None:
    """Token for token up to the reward token; what follows it is never seen."""
    image = tiny_qwen.SPECIAL[-2]
    whole = BEFORE_IMAGE + image + AFTER_IMAGE + hpsv3_prompt.question(formula.PROMPTS[0]) + "\n\nEND\n" + ANSWER
    assert whole == builders.fixture_json("hpsv3")["text"]
    for prompt, expected in zip(formula.PROMPTS, oracle["input_ids"].tolist(), strict=True):
        ids = reward.text.ids(BEFORE_IMAGE + image * 16 + AFTER_IMAGE + hpsv3_prompt.question(prompt))
        assert ids == expected[: len(ids)]


def test_images_are_resized_as_by_the_original() -> None:
    preprocess = hpsv3.preprocess_of(Qwen2VLVisionConfig())
    for size, expected in builders.fixture_json("hpsv3")["sizes"]:
        assert list(preprocess.size(*size)) == expected


def test_the_published_checkpoint_fits_name_by_name() -> None:
    """736 weights of the original class at full size; the language model's head is in the file, and is not used."""
    names = builders.fixture_json("hpsv3_names")
    assert len(names) == 736
    weights, rest = hpsv3.rename_weights({name: torch.empty(shape, device="meta") for name, shape in names.items()})
    base = sources.parse("Qwen/Qwen2-VL-7B-Instruct")
    model = hpsv3.empty_model(sources.read_json(base, "config.json"), 151_658, "base")
    assert {n: list(p.shape) for n, p in model.named_parameters()} == {n: list(t.shape) for n, t in weights.items()}
    assert rest.pop("lm_head.weight").shape == (151_658, 3584)
    with torch.device("meta"):
        head = hpsv3.PreferenceHead(3584)
    assert {n: p.shape for n, p in head.named_parameters()} == {n: t.shape for n, t in rest.items()}
    assert sum(p.numel() for m in (model, head) for p in m.parameters()) == 7_748_610_610
    assert sum(math.prod(shape) for shape in names.values()) == 7_748_610_610 + 151_658 * 3584


def test_prompts_of_several_lengths_score_alone_as_in_a_batch(reward: Any) -> None:
    prompts = ["x", "a castle on a hill at night, oil painting", ""]
    images = qwen_builders.pictures(3, 64, 96)
    with torch.no_grad():
        together = reward.score(images, prompts)
        alone = torch.cat([reward.score(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    assert (together - alone).abs().max() < TOLERANCE
    assert together.unique().numel() == 3


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>", "<|im_end|>"])
def test_a_prompt_with_a_control_token_is_refused(reward: Any, token: str) -> None:
    with pytest.raises(ValueError, match=r"holds '<\|\w+\|>', a control token"):
        reward.score(qwen_builders.pictures(1, 64, 64), [f"a fox {token}"])


def test_wrong_files_are_one_sentence(tmp_path: Path) -> None:
    folder = qwen_builders.write_hpsv3(tmp_path)
    options, file = qwen_builders.hpsv3_options(folder), folder / "HPSv3.safetensors"
    state = load_file(file)
    head, norm = "rm_head.5.bias", "visual.blocks.1.norm2.weight"
    for changes, words in [
        ({head: None}, r"lacks 1 weights for PreferenceHead, e.g. rm_head.5.bias"),
        ({norm: None}, r"lacks 1 weights for Qwen2VLModel, e.g. visual.blocks.1.norm2.weight"),
        ({norm: torch.zeros(3)}, r"visual.blocks.1.norm2.weight is \[3\], not \[32\]"),
        ({"model.extra": torch.zeros(3)}, r"has unknown 1 weights for Qwen2VLModel, e.g. language_model.extra"),
        ({"extra": torch.zeros(3)}, r"has unknown 1 weights for PreferenceHead, e.g. extra"),
        ({"lm_head.weight": None}, r"its lm_head.weight is not \[\d+, 64\]"),
        ({"model.embed_tokens.weight": None}, r"is not an HPSv3 checkpoint: it has no model.embed_tokens.weight"),
    ]:
        changed = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
        save_file(changed, file)
        with pytest.raises(UsageError, match=words) as caught:
            registry.reward("hpsv3", **options)
        assert "\n" not in str(caught.value)


def test_a_base_of_another_model_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(UsageError, match=words):
            registry.reward("hpsv3", model=str(folder), base=str(tmp_path))

    tiny_qwen.write_base(tmp_path, "another text")
    refused(r"the tokenizer of .* has \d+ tokens with <\|Reward\|>; .*HPSv3.safetensors knows \d+")
    qwen_builders.change_json(tmp_path / "config.json", model_type="qwen2_5_vl")
    refused(r"config.json is not Qwen2-VL's: its model_type is 'qwen2_5_vl'")
    qwen_builders.change_json(tmp_path / "config.json", model_type="qwen2_vl", num_attention_heads="many")
    refused(r"config.json cannot be read as Qwen2-VL's: ")
    with pytest.raises(UsageError, match=r"holds none of: HPSv3.safetensors"):
        registry.reward("hpsv3", model=str(tmp_path), base=str(tmp_path))


def test_another_patch_size_than_the_models_is_refused(reward: Any) -> None:
    from rlhf_t2i_plugins.rewards.qwen_images import QwenPreprocess

    with pytest.raises(UsageError, match=r"makes patches of \(14, 2, 2\), but the model reads \(56, 2, 2\)"):
        QwenVL(reward.vlm.model, QwenPreprocess())


def test_its_hub_models_and_options() -> None:
    cls = registry.load_class(registry.REWARDS, "hpsv3")
    assert cls.hub_models(cls.Options(dtype="bfloat16")) == ["MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"]
    with pytest.raises(UsageError, match=r"reward 'hpsv3'.*dtype: must be 'bfloat16', 'float16' or 'float32'"):
        registry.reward("hpsv3", dtype="int8")
