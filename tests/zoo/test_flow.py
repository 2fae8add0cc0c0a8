"""The flow sister's training: one token that counts as 256, and targets from the reference's predictions."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor
from torch.nn import functional

from zoo import flow, noise, reference


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
    """Predicts noise in proportion to its input, and remembers what it was asked."""

    def __call__(self, x: Tensor, t: Tensor, embeds: Tensor, added_cond_kwargs: dict[str, Tensor]) -> object:
        self.x, self.t = x, t
        return type("Output", (), {"sample": 0.5 * x})


def test_targets_are_the_reference_s_predictions_on_the_same_mixture() -> None:
    teacher, generator = Teacher(), torch.Generator().manual_seed(0)
    s = torch.tensor([0.05, 0.3, 0.6, 0.93, 0.97, 1.0])
    x0 = torch.randn(6, reference.CHANNELS, 16, 16, generator=generator)
    x_s, taken, velocity = flow.taught(teacher, x0, s, torch.zeros(6, 20, 256), torch.zeros(6, 256), generator)
    alpha, sigma = (c[teacher.t][:, None, None, None] for c in noise.coefficients())
    end = taken[:, None, None, None]
    predicted = (teacher.x - sigma * 0.5 * teacher.x) / alpha
    torch.testing.assert_close(x_s - end * velocity, predicted, atol=1e-3, rtol=1e-3)
    assert (taken - s).abs().max() < 0.01
    # Where SDXL's noise reaches, the reference saw the same latents, scaled; above, less noise was on them.
    torch.testing.assert_close(x_s[:4], teacher.x[:4] / (alpha + sigma)[:4], atol=1e-3, rtol=1e-3)
    assert teacher.t[4:].tolist() == [noise.STEPS - 1] * 2
    assert abs(x_s[5].std().item() - 1) < 0.05


def test_times_cover_the_path_evenly() -> None:
    drawn = flow.times(4000, torch.Generator().manual_seed(0))
    assert 0 < drawn.min() < 0.01
    assert drawn.max() <= 1
    assert 0.4 < drawn.mean() < 0.6
