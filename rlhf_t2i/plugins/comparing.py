"""Rewards that compare the images of a prompt: refuse what would give one of their calls an image alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.recipe.schema import Recipe


def check(recipe: Recipe) -> None:
    """Refuse an evaluation or placement that splits the images of a prompt.

    Raises:
        UsageError: Names the reward, the keys and the fix.
    """
    settings, algorithm = recipe.evaluation, recipe.algorithm
    micro = [reward.micro_batch for reward in [*algorithm.rewards, *algorithm.eval_rewards] if reward.micro_batch]
    for reward in traits.resolve(recipe).rewards:
        if not reward.compares:
            continue
        if one_alone(settings.images, settings.images_per_prompt, [settings.batch_size, *sorted(micro)[:1]]):
            raise UsageError(
                f"evaluation: reward {reward.key!r} compares the images of a prompt, and some call would hold one "
                f"alone: let images_per_prompt ({settings.images_per_prompt}), 2 or more, divide images "
                f"({settings.images}), batch_size ({settings.batch_size}) and every reward's micro_batch"
            )
        if recipe.placement.mode == "ray":
            group, devices = check_placement(recipe)[f"reward:{reward.key}"]
            if devices > 1:
                raise UsageError(
                    f"placement.groups.{group}.devices: {devices}, but reward {reward.key!r} compares the images of a "
                    f"prompt and needs a group of one device: add a group with the role reward:{reward.key}"
                )


def one_alone(images: int, per_prompt: int, sizes: Sequence[int]) -> bool:
    """Whether a call would hold one image alone of a prompt.

    Args:
        images: In all, ``per_prompt`` of one prompt after the other.
        per_prompt: Of one prompt.
        sizes: They are split into parts of the first size, those into parts of the next.
    """
    for first, last in _parts(0, images, sizes):
        after, before = (first // per_prompt + 1) * per_prompt, (last - 1) // per_prompt * per_prompt
        if min(last, after) - first == 1 or last - max(first, before) == 1:
            return True
    return False


def _parts(first: int, last: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    if not sizes:
        yield first, last
        return
    for start in range(first, last, sizes[0]):
        yield from _parts(start, min(start + sizes[0], last), sizes[1:])
