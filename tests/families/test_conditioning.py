"""Conditioning equals diffusers' encode_prompt for SDXL and SD1.5."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from rlhf_t2i.families.base import Conditioner
from tests import tiny
from tests.families.test_sampling import store

PROMPTS = ["a red cat, smiling", "", "dog " * 100, "Ünïcode ✓ 🦊"]


@pytest.fixture(scope="module")
def xl(tiny_sdxl: Path) -> tuple[StableDiffusionXLPipeline, Conditioner]:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True, add_watermarker=False)
    return pipeline, store(tiny_sdxl).conditioner


def test_sdxl_equals_encode_prompt(xl: tuple[StableDiffusionXLPipeline, Conditioner]) -> None:
    pipeline, conditioner = xl
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=True
        )
    cond, uncond = conditioner.encode(PROMPTS), conditioner.unconditional(len(PROMPTS))
    torch.testing.assert_close(cond.tensors["prompt_embeds"], embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(cond.tensors["pooled_prompt_embeds"], pooled, rtol=0, atol=1e-6)
    assert cond.tensors["prompt_embeds"].shape == (4, 77, 2 * tiny.WIDTH)
    # Prompts must matter, or the comparison shows nothing.
    assert (cond.tensors["prompt_embeds"][0] - cond.tensors["prompt_embeds"][1]).abs().max() > 0.01
    # The unconditional branch: zeros, and what diffusers' own is.
    assert not uncond.tensors["prompt_embeds"].any()
    assert not uncond.tensors["pooled_prompt_embeds"].any()
    torch.testing.assert_close(uncond.tensors["prompt_embeds"], negative)
    torch.testing.assert_close(uncond.tensors["pooled_prompt_embeds"], negative_pooled)


def test_sdxl_takes_penultimate_hidden_states_and_two_tokenizers(
    xl: tuple[StableDiffusionXLPipeline, Conditioner],
) -> None:
    """Concatenated in the encoders' order; the second tokenizer pads with id 0, the first with the end of text."""
    pipeline, conditioner = xl
    ids = [
        tokenizer("a red cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    assert ids[0][0, -1] == pipeline.tokenizer.eos_token_id
    assert ids[1][0, -1] == 0
    cond = conditioner.encode(["a red cat"])
    with torch.no_grad():
        first = pipeline.text_encoder(ids[0], output_hidden_states=True)
        second = pipeline.text_encoder_2(ids[1], output_hidden_states=True)
    torch.testing.assert_close(
        cond.tensors["prompt_embeds"][..., : tiny.WIDTH], first.hidden_states[-2], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        cond.tensors["prompt_embeds"][..., tiny.WIDTH :], second.hidden_states[-2], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(cond.tensors["pooled_prompt_embeds"], second.text_embeds, rtol=0, atol=1e-6)
    last = first.last_hidden_state
    assert (cond.tensors["prompt_embeds"][..., : tiny.WIDTH] - last).abs().max() > 0.01


def test_time_ids_are_size_crop_and_target(xl: tuple[StableDiffusionXLPipeline, Conditioner]) -> None:
    _, conditioner = xl
    row = torch.tensor([16.0, 16.0, 0.0, 0.0, 16.0, 16.0])
    for cond in (conditioner.encode(PROMPTS), conditioner.unconditional(4)):
        torch.testing.assert_close(cond.tensors["time_ids"], row.expand(4, -1))


def test_sd15_equals_encode_prompt(tiny_sd15: Path) -> None:
    """Last hidden state after the final layer norm; unconditional is the encoded empty prompt."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, local_files_only=True, safety_checker=None)
    conditioner = store(tiny_sd15).conditioner
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
        ids = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        hidden = pipeline.text_encoder(ids.input_ids, output_hidden_states=True).hidden_states
        norm = pipeline.text_encoder.final_layer_norm
        last, skipped = norm(hidden[-1]), norm(hidden[-2])
    cond, uncond = conditioner.encode(PROMPTS), conditioner.unconditional(len(PROMPTS))
    torch.testing.assert_close(cond.tensors["prompt_embeds"], embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(uncond.tensors["prompt_embeds"], negative, rtol=0, atol=1e-6)
    assert uncond.tensors["prompt_embeds"].any()
    # diffusers' clip_skip=None is the last layer behind the final norm; clip_skip=1, the penultimate, is not what
    # SD1.5 was trained with.
    torch.testing.assert_close(cond.tensors["prompt_embeds"], last, rtol=0, atol=1e-6)
    assert (cond.tensors["prompt_embeds"] - skipped).abs().max() > 0.01
    assert set(cond.tensors) == {"prompt_embeds"}


def test_threads_may_encode_at_once(tiny_sdxl: Path) -> None:
    """Tokenizers keep the padding of a call as state: two calls at once mixed them up."""
    conditioner, again = store(tiny_sdxl).conditioner, store(tiny_sdxl).conditioner
    prompts = [f"{word} {number}" for word in ("a", "a long cat on a") for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: conditioner.encode([prompt]), prompts))
    for prompt, cond in zip(prompts, found, strict=True):
        expected = again.encode([prompt]).tensors
        assert all(torch.equal(tensor, expected[name]) for name, tensor in cond.tensors.items())


def test_the_cache_changes_nothing(tiny_sdxl: Path) -> None:
    conditioner = store(tiny_sdxl).conditioner
    fresh = conditioner.encode(PROMPTS)
    again = conditioner.encode([PROMPTS[2], PROMPTS[0], PROMPTS[2]])
    torch.testing.assert_close(
        again.tensors["prompt_embeds"], fresh.tensors["prompt_embeds"][[2, 0, 2]], rtol=0, atol=0
    )
    torch.testing.assert_close(
        again.tensors["pooled_prompt_embeds"], fresh.tensors["pooled_prompt_embeds"][[2, 0, 2]], rtol=0, atol=0
    )
    small = store(tiny_sdxl).conditioner
    small._cache_size = 2
    for batch in (PROMPTS[:2], PROMPTS[1:], PROMPTS):
        expected = fresh.tensors["prompt_embeds"][[PROMPTS.index(p) for p in batch]]
        torch.testing.assert_close(small.encode(batch).tensors["prompt_embeds"], expected, rtol=0, atol=1e-6)


class _Counting(Conditioner):
    """Rows of 400 bytes; counts what it encodes."""

    def __init__(self, cache_bytes: int) -> None:
        super().__init__(cache_bytes)
        self.encoded: list[str] = []

    def encode_one(self, prompt: str) -> dict[str, torch.Tensor]:
        self.encoded.append(prompt)
        return {"prompt_embeds": torch.full((100,), float(prompt))}

    def unconditional_row(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.zeros(100)}


def test_kept_prompts_are_bounded_by_their_memory_and_the_last_used_stay() -> None:
    conditioner = _Counting(cache_bytes=1000)
    conditioner.encode(["1", "2"])
    conditioner.encode(["1"])
    conditioner.encode(["3"])  # 1 was used after 2
    assert conditioner.encode(["1", "3", "1"]).tensors["prompt_embeds"][:, 0].tolist() == [1, 3, 1]
    assert conditioner.encoded == ["1", "2", "3"]
    conditioner.encode(["4", "5", "6", "7"])  # a batch may be larger than the bound
    conditioner.encode(["4", "7"])
    conditioner.encode(["2"])
    assert conditioner.encoded == ["1", "2", "3", "4", "5", "6", "7", "2"]


def test_encoders_are_frozen(tiny_sdxl: Path) -> None:
    conditioner = store(tiny_sdxl).conditioner
    assert not any(p.requires_grad for p in conditioner.parameters())
    assert not conditioner.encode(PROMPTS).tensors["prompt_embeds"].requires_grad
