"""The reward colorfulness: how colorful people find an image (Hasler and Suesstrunk 2003)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from rlhf_t2i import plugins


class ColorfulnessOptions(plugins.Options):
    """What a recipe may set under `options:`."""

    sign: float = Field(1.0, ge=-1, le=1, description="1 rewards color, -1 rewards grey")


class Colorfulness(plugins.Reward):
    """Spread and strength of the red-green and yellow-blue differences; 0 is grey, 0.4 is very colorful.

    The published scale is 255 times this. It does not read the prompt.
    """

    Options = ColorfulnessOptions
    options: ColorfulnessOptions
    unit = "M3 / 255"
    uses_prompt = False
    license = "Apache-2.0"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Colorfulness [B] of images [B, 3, H, W] in [0, 1]."""
        red, green, blue = images.flatten(2).unbind(1)
        red_green, yellow_blue = red - green, (red + green) / 2 - blue
        # The small constant keeps the root's gradient finite on a grey image.
        spread = (red_green.var(1) + yellow_blue.var(1) + 1e-6).sqrt()
        strength = (red_green.mean(1).square() + yellow_blue.mean(1).square() + 1e-6).sqrt()
        return self.options.sign * (spread + 0.3 * strength)
