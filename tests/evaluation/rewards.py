"""Rewards for tests, named by their file."""

from __future__ import annotations

from rlhf_t2i import plugins


class Brightness(plugins.Reward):
    """The mean of an image's pixels, and a hint of its prompt's length."""

    unit = "mean pixel"

    def score(self, images, prompts):
        lengths = images.new_tensor([len(prompt) for prompt in prompts])
        return images.mean((1, 2, 3)) + 0.001 * lengths


class Counting(Brightness):
    """Brightness that counts the images it scored."""

    scored = 0

    def score(self, images, prompts):
        Counting.scored += len(prompts)
        return super().score(images, prompts)


class Broken(plugins.Reward):
    def score(self, images, prompts):
        return images.mean((1, 2, 3))[:1]


class Columns(plugins.Reward):
    def score(self, images, prompts):
        return images.mean((2, 3))[:, :2]


class Unbounded(plugins.Reward):
    def score(self, images, prompts):
        return images.mean((1, 2, 3)) / 0
