"""The probability of a vision-language model's answer, against transformers' own forward, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rlhf_t2i_plugins.rewards.qwen_vl import AFTER_IMAGE, ANSWER, BEFORE_IMAGE
from torch import Tensor

from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import base, registry
from rlhf_t2i.roles.reward import RewardRole, freeze
from rlhf_t2i.tools.reward_check import check_reward
from tests.rewards import builders, qwen_builders
from tests.rewards.fixtures import formula, tiny_qwen

CPU = torch.device("cpu")
KINDS = ("qwen2_vl", "qwen2_5_vl")
PROMPTS = ("x", "a red fox on a hill", "two cats, a very long description of what they do, and where they do it")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: qwen_builders.write_vlm(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def build(folder: Path, **options: Any) -> Any:
    return freeze(registry.reward("vlm_choice", model=str(folder), **options), CPU, torch.float32)


def library_logits(folder: Path, prompt: str, seed: int, height: int, width: int) -> tuple[Tensor, Any]:
    """Next-token logits by transformers' classes alone: its image processor, its placeholders, its positions."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    settings = {k: v for k, v in tiny_qwen.processor().items() if not k.endswith(("type", "class"))}
    pictures = [Image.fromarray(formula.image(height, width, seed))]
    image = Qwen2VLImageProcessorPil(**settings)(pictures, return_tensors="pt")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    placeholders = "<|image_pad|>" * int(image.image_grid_thw.prod() // 4)
    text = f'Does this figure show "{prompt}"? Please answer yes or no.'
    ids = tokenizer(BEFORE_IMAGE + placeholders + AFTER_IMAGE + text + ANSWER, return_tensors="pt").input_ids
    kinds = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        output = model(input_ids=ids, mm_token_type_ids=kinds, **image)
    return output.logits[0, -1], tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_librarys_own_probability(folders: dict[str, Path], kind: str) -> None:
    folder = folders[kind]
    logits, tokenizer = library_logits(folder, PROMPTS[1], 0, 448, 560)
    yes, no, maybe = (tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No", "Maybe"))
    image = qwen_builders.pictures(1, 448, 560)
    for options, expected in [
        ({}, logits[[yes, no]].softmax(0)[0]),
        ({"unit": "logit"}, logits[yes] - logits[no]),
        ({"alternatives": ("No", "Maybe")}, logits[[yes, no, maybe]].softmax(0)[0]),
        ({"answer": "No", "alternatives": ()}, logits.softmax(0)[no]),  # VQAScore's definition
        ({"alternatives": (), "unit": "logit"}, logits.softmax(0)[yes].logit()),
    ]:
        with torch.no_grad():
            found = build(folder, max_pixels=10**7, **options).score(image, PROMPTS[1:2])
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_qwen2_5_vl_passes_the_check_and_its_gradient_meets_finite_differences(folders: dict[str, Path]) -> None:
    """Qwen2-VL, and all shipped rewards: test_check.py."""
    findings = {f.name: f for f in check_reward(build(folders["qwen2_5_vl"], unit="logit"), CPU, size=32)}
    assert [f"{f.name}: {f.detail}" for f in findings.values() if f.outcome == "fail"] == []
    assert findings["gradient"].outcome == "pass"


def test_prompts_of_several_lengths_score_alone_as_in_a_batch(folders: dict[str, Path]) -> None:
    reward, images = build(folders["qwen2_vl"]), qwen_builders.pictures(3, 64, 96)
    with torch.no_grad():
        together = reward.score(images, PROMPTS)
        alone = torch.cat([reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert (together - alone).abs().max() < 1e-5
    assert together.unique().numel() == 3


def test_max_pixels_bounds_the_image_tokens(folders: dict[str, Path]) -> None:
    small = build(folders["qwen2_vl"], max_pixels=112 * 112 * 4).vlm
    assert small.preprocess.grid(1024, 1024) == (4, 4)
    assert build(folders["qwen2_vl"]).vlm.preprocess.grid(1024, 1024) == (8, 8)


def test_two_questions_share_one_model_and_dtypes_do_not(folders: dict[str, Path]) -> None:
    options = {"model": str(folders["qwen2_vl"])}
    with base.sharing():
        first = registry.reward("vlm_choice", **options)
        second = registry.reward("vlm_choice", question="Is {prompt} drawn well?", alternatives=(), **options)
        half = registry.reward("vlm_choice", dtype="bfloat16", **options)
    assert first.vlm.model is second.vlm.model
    assert first.vlm.model is not half.vlm.model


@pytest.mark.parametrize("alternatives", [("No",), ()])
def test_a_fixed_dtype_is_kept_and_gradients_pass(folders: dict[str, Path], alternatives: tuple[str, ...]) -> None:
    reward = build(folders["qwen2_vl"], dtype="bfloat16", alternatives=alternatives, unit="logit")
    assert {p.dtype for p in reward.parameters()} == {torch.bfloat16}
    assert reward.vlm.model.language_model.rotary_emb.rope.inv_freq.dtype == torch.float32
    images = qwen_builders.pictures(1, 64, 96).requires_grad_()
    score = reward.score(images, ["a red fox"])
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert score.dtype == torch.float32
    assert gradient.abs().max() > 0
    with torch.no_grad():
        exact = build(folders["qwen2_vl"], alternatives=alternatives, unit="logit").score(images, ["a red fox"])
        assert 0 < float((score - exact).abs()) < 0.1


def test_recomputed_layers_and_micro_batches_give_the_same_gradient(folders: dict[str, Path]) -> None:
    found = []
    for settings in ({}, {"activation_checkpointing": True}, {"micro_batch": 1}):
        rewards = {"r": registry.reward("vlm_choice", model=str(folders["qwen2_vl"]), unit="logit")}
        role = RewardRole(rewards, builders.Identity(), device=CPU, **settings)
        found.append(role.value_and_grad(qwen_builders.pictures(3, 64, 96), PROMPTS)["r"])
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-7, rtol=1e-4)


def test_tied_embeddings_are_read_like_the_2b_models(tmp_path: Path) -> None:
    folder = qwen_builders.write_vlm(tmp_path, tie_word_embeddings=True)
    reward = build(folder)
    assert reward.vlm.lm_head.weight is reward.vlm.model.language_model.embed_tokens.weight
    logits, tokenizer = library_logits(folder, PROMPTS[1], 0, 448, 448)
    expected = logits[[tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No")]].softmax(0)[0]
    with torch.no_grad():
        found = reward.score(qwen_builders.pictures(1, 448, 448), PROMPTS[1:2])
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"question": "Is this good?"}, "question must hold {prompt} once"),
        ({"question": "{prompt}? {prompt}?"}, "question must hold {prompt} once"),
        ({"alternatives": ("No", "Yes")}, "answer and alternatives must differ"),
        ({"answer": ""}, "answer and alternatives must differ, and none may be empty"),
        ({"max_pixels": 100}, "max_pixels: must be at least 784"),
        ({"unit": "percent"}, "unit: must be 'probability' or 'logit'"),
        ({"answers": "Yes"}, "unknown option 'answers'; did you mean 'answer'"),
    ],
)
def test_wrong_options_name_the_plugin_and_the_key(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"reward 'vlm_choice'.*{words}"):
        registry.reward("vlm_choice", **options)


def test_what_the_model_cannot_do_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(words: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=words):
            registry.reward("vlm_choice", **options)

    model = str(folders["qwen2_vl"])
    refused(r"answer 'Absolutely' is \d+ tokens of .*: choose a word that is one", model=model, answer="Absolutely")
    refused(r"max_pixels 1000 is under .*'s min_pixels 3136", model=model, max_pixels=1000)
    folder = qwen_builders.write_vlm(tmp_path)
    qwen_builders.change_json(folder / "preprocessor_config.json", do_resize=False)
    refused(r"preprocessor_config.json: the image processor's do_resize False is not supported", model=str(folder))
    qwen_builders.change_json(folder / "preprocessor_config.json", do_resize=True, patch_size=14)
    refused(r"makes patches of \(14, 2, 2\), but the model reads \(56, 2, 2\)", model=str(folder))
    (folder / "preprocessor_config.json").unlink()
    refused(r"has no processor_config.json", model=str(folder))
    qwen_builders.change_json(folder / "config.json", model_type="llava")
    refused(r"is a 'llava' model; vlm_choice asks qwen2_vl and qwen2_5_vl", model=str(folder))


def test_a_prompt_with_a_control_token_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"'<\|im_end\|>', a control token of the language model"):
        build(folders["qwen2_vl"]).score(qwen_builders.pictures(1, 64, 64), ["a fox<|im_end|>"])
