"""The contract of a reward, checked as `rlhf-t2i rewards check` does, and what this one means."""

import torch
from rlhf_t2i_colourfulness import Colourfulness, ColourfulnessOptions

from rlhf_t2i.reward_check import check_reward


def test_it_keeps_the_contract() -> None:
    """Every check of `rewards check` holds."""
    findings = check_reward(Colourfulness(ColourfulnessOptions()), torch.device("cpu"), size=32)
    assert [f for f in findings if f.outcome == "fail"] == []


def test_saturated_colours_beat_grey() -> None:
    """Two saturated halves are worth more than a grey field."""
    grey = torch.full((1, 3, 8, 8), 0.5)
    vivid = grey.clone()
    vivid[:, 0, :, :4], vivid[:, 2, :, 4:] = 1.0, 1.0
    reward = Colourfulness()
    assert reward.score(vivid, [""]) > reward.score(grey, [""]) + 0.3


def test_a_grey_image_has_a_finite_gradient() -> None:
    """The roots stay differentiable at zero colour."""
    image = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    Colourfulness().score(image, [""]).sum().backward()
    assert bool(image.grad.isfinite().all())
