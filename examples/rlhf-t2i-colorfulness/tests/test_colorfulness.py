"""The contract of a reward, checked as `rlhf-t2i rewards check` does, and what this one means."""

import torch
from rlhf_t2i_colorfulness import Colorfulness, ColorfulnessOptions

from rlhf_t2i.tools.reward_check import check_reward


def test_it_keeps_the_contract() -> None:
    """Every check of `rewards check` holds."""
    findings = check_reward(Colorfulness(ColorfulnessOptions()), torch.device("cpu"), size=32)
    assert [f for f in findings if f.outcome == "fail"] == []


def test_saturated_colors_beat_grey() -> None:
    """Two saturated halves are worth more than a grey field."""
    grey = torch.full((1, 3, 8, 8), 0.5)
    vivid = grey.clone()
    vivid[:, 0, :, :4], vivid[:, 2, :, 4:] = 1.0, 1.0
    reward = Colorfulness()
    assert reward.score(vivid, [""]) > reward.score(grey, [""]) + 0.3


def test_a_grey_image_has_a_finite_gradient() -> None:
    """The roots stay differentiable at zero color."""
    image = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    Colorfulness().score(image, [""]).sum().backward()
    assert bool(image.grad.isfinite().all())
