"""Twelve first rewards with one mistake each; the comment ``# here`` marks the line that the user must be shown."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import torch
from PIL import Image

from rlhf_t2i.plugins import LatentReward, Options, Reward


class Typo(Reward):
    def score(self, images, prompts):
        return images.maen((1, 2, 3))  # here


class NoReturn(Reward):
    def score(self, images, prompts):
        images.mean((1, 2, 3))


class OneNumber(Reward):
    def score(self, images, prompts):
        return images.mean()


class Processor(Reward):
    """Calls a processor of its own on the way."""

    def score(self, images, prompts):
        pictures = [Image.fromarray((i.permute(1, 2, 0).numpy() * 255).astype(np.uint8)) for i in images]  # here
        return torch.stack([torch.from_numpy(np.asarray(p) / 255.0).float().mean() for p in pictures])


class Detached(Reward):
    def score(self, images, prompts):
        return torch.from_numpy(images.detach().numpy()).mean((1, 2, 3)) * torch.tensor([len(p) / 9 for p in prompts])


class InPlace(Reward):
    def score(self, images, prompts):
        images.mul_(0.5)
        return images.mean((1, 2, 3)) * torch.tensor([len(p) / 9 for p in prompts], dtype=images.dtype)


class NoInit(Reward):
    def __init__(self, options=None):
        self.weight = 2.0

    def score(self, images, prompts):
        return images.mean((1, 2, 3)) * self.weight


class ModuleBeforeInit(Reward):
    def __init__(self, options=None):
        self.layer = torch.nn.Linear(1, 1)  # here

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


class NoOptions(Reward):
    def __init__(self):
        super().__init__()

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


class WrongOptions(Reward):
    Options = 5

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


class NeedsPackage(Reward):
    requires = ("a_package_that_is_not_there",)

    def score(self, images, prompts):
        import a_package_that_is_not_there

        return a_package_that_is_not_there.score(images)


class Exits(Reward):
    def score(self, images, prompts):
        sys.exit()  # here


class ExitsWhenBuilt(Reward):
    def __init__(self, options=None):
        super().__init__(options)
        sys.exit(0)  # here


class BadOptions(Options):
    target: float = 0.5

    def model_post_init(self, context):
        raise OSError("the disk is gone")  # here


class OptionsRaise(Reward):
    Options = BadOptions


class Latents(LatentReward):
    """Takes images for what they are not."""

    def score_latents(self, latents, prompts, context):
        return latents[:, 7].mean((1, 2))  # here


class RequiresText(Reward):
    requires = "cv2"

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


class RangeBackwards(Reward):
    value_range = (1, 0)

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


class RangeOfOne(Reward):
    value_range = 5

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


class Unbatched(Reward):
    """Returns what a metric for one picture returns."""

    def score(self, images, prompts):
        return [float(image.mean()) for image in images]


class Late(Reward):
    async def score(self, images, prompts):
        return images.mean((1, 2, 3))


class Exhausted(Reward):
    def score(self, images, prompts):
        return self.score(images, prompts)  # here


class Foreign(Reward):
    def score(self, images, prompts):
        raise GeneratorExit  # here


class Column(Reward):
    def score(self, images, prompts):
        return images.mean((2, 3))[:, :1]


class Global(Reward):
    """Changes its whole process: what runs beside it, too."""

    def score(self, images, prompts):
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.manual_seed(len(prompts) + 1000)
        os.chdir("/")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return images.mean((1, 2, 3)) * torch.tensor([len(p) / 9 for p in prompts], dtype=images.dtype)


class GradientOff(Reward):
    def score(self, images, prompts):
        torch.set_grad_enabled(False)
        return images.mean((1, 2, 3)) * torch.tensor([len(p) / 9 for p in prompts], dtype=images.dtype)


class GlobalWhenBuilt(Reward):
    def __init__(self, options=None):
        super().__init__(options)
        torch.set_grad_enabled(False)
        torch.set_default_device("meta")

    def score(self, images, prompts):
        return images.mean((1, 2, 3)) * torch.tensor([len(p) / 9 for p in prompts], dtype=images.dtype)
