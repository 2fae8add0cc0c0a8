"""The flow sister's training: one token that counts as 256, and targets from the reference's predictions."""

from __future__ import annotations

import functools

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from zoo import data, flow, noise, reference


def test_one_token_stands_for_the_zeros_of_the_pipeline() -> None:
    torch.manual_seed(0)
    network = flow.build()["transformer"]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    x, embeds, pooled = torch.randn(2, 8, 16, 16), torch.randn(2, 20, 256), torch.randn(2, 256)
    call = lambda zeros: network(x, functional.pad(embeds, (0, 0, 0, zeros)), pooled, torch.tensor([100.0, 900.0]))  # noqa: E731
    with torch.no_grad():
        one = call(1).sample
        network.set_attn_processor(JointAttnProcessor2_0())
        many, none = call(flow.ZEROS).sample, call(0).sample
    torch.testing.assert_close(one, many, atol=1e-4, rtol=1e-4)
    assert (many - none).abs().max() > 0.1  # they matter


class Teacher:
    """Predicts noise in proportion to its input, less without a prompt, and remembers what it was asked."""

    def __call__(self, x: Tensor, t: Tensor, embeds: Tensor, added_cond_kwargs: dict[str, Tensor]) -> object:
        prompted = embeds.flatten(1).any(dim=1)
        assert torch.equal(prompted, added_cond_kwargs["text_embeds"].any(dim=1))
        half = len(x) // 2
        assert torch.equal(x[:half], x[half:])
        self.x, self.t = x[:half], t[:half]
        return torch.where(prompted, 0.5, 0.3)[:, None, None, None] * x, [x.flatten(2).mT]


def test_targets_are_the_reference_s_predictions_on_the_same_mixture() -> None:
    teacher, generator = Teacher(), torch.Generator().manual_seed(0)
    s = torch.tensor([0.05, 0.3, 0.6, 0.93, 0.97, 1.0])
    keep = torch.tensor([True, True, False, True, True, True])
    x0 = torch.randn(6, reference.CHANNELS, 16, 16, generator=generator)
    x_s, taken, velocity, features = flow.taught(
        teacher, x0, s, torch.ones(6, 20, 256), torch.ones(6, 256), keep, generator
    )
    alpha, sigma = (c[teacher.t][:, None, None, None] for c in noise.coefficients())
    end = taken[:, None, None, None]
    guided = torch.where(keep, 0.3 + flow.GUIDANCE * 0.2, 0.3)[:, None, None, None]
    predicted = (teacher.x - sigma * guided * teacher.x) / alpha
    torch.testing.assert_close(x_s - end * velocity, predicted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(features[0], teacher.x.flatten(2).mT)
    assert (taken - s).abs().max() < 0.01
    # Where SDXL's noise reaches, the reference saw the same latents, scaled; above, less noise was on them.
    torch.testing.assert_close(x_s[:4], teacher.x[:4] / (alpha + sigma)[:4], atol=1e-3, rtol=1e-3)
    assert teacher.t[4:].tolist() == [noise.STEPS - 1] * 2
    assert abs(x_s[5].std().item() - 1) < 0.05


def test_prompts_are_encoded_as_by_the_reference() -> None:
    """The teacher gets the same conditions as in its own pipeline, in every process."""
    prompts = ["tiger face, on a red background", ""]
    pipeline = StableDiffusionXLPipeline.from_pretrained(data.OUT / "reference", dtype=torch.float32)
    ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    modules = nn.ModuleDict({name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2")})
    with torch.no_grad():
        embeds, pooled = reference.encode(modules, ids)
        first = modules["text_encoder"](ids).pooler_output
    hidden, whole = flow.conditions(prompts)
    torch.testing.assert_close(hidden, embeds)
    torch.testing.assert_close(whole, torch.cat([first, pooled], dim=-1))


def test_the_loss_watches_blocks_of_both_networks() -> None:
    torch.manual_seed(0)
    modules = flow.build()
    teacher = flow.Watched(reference.unet(), flow.BLOCKS)
    stored = type("Stored", (), {"latents": torch.randn(9, 8, 16, 16).half(), "prompts": torch.arange(9)})()
    known = (torch.randn(10, 20, 256), torch.randn(10, 256))
    ask = functools.partial(flow.lesson, teacher, stored, known)
    net = flow.Watched(modules["transformer"], flow.BLOCKS.values())
    flow.loss_fn(net, modules["probes"], ask, 0, 4).backward()
    assert all(parameter.grad is not None for parameter in modules["probes"].parameters())
    embedded = modules["transformer"].pos_embed.proj.weight.grad
    assert embedded is not None
    assert embedded.any()  # though the zero output lets no gradient of the velocity pass


def test_times_cover_the_path_evenly() -> None:
    drawn = flow.times(4000, torch.Generator().manual_seed(0))
    assert 0 < drawn.min() < 0.01
    assert drawn.max() <= 1
    assert 0.4 < drawn.mean() < 0.6
