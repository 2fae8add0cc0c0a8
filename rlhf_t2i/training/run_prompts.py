"""The prompts of a run, read once, and the check that none is both trained on and held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from rlhf_t2i.algorithm import prompts
from rlhf_t2i.algorithm.prompt_store import StoredPrompts
from rlhf_t2i.algorithm.prompts import PromptStream
from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.schema import Recipe


@dataclass(frozen=True)
class RunPrompts:
    """The prompts of a run, read once: a restart does not read a long list again.

    Attributes:
        train: To train on.
        held_out: For previews and evaluations; those to train on where the recipe names no others.
    """

    train: Sequence[str]
    held_out: Sequence[str]

    @classmethod
    def read(cls, recipe: Recipe) -> RunPrompts:
        """The prompts that a recipe names.

        Raises:
            UsageError: A file is missing or malformed, or a held-out prompt is trained on: tables, reports and model
                cards call them unseen.
        """
        held_out = _held_out(recipe)
        train = StoredPrompts(_train(recipe, held_out))
        return cls(train, train if held_out is None else held_out)


def check(recipe: Recipe) -> None:
    """Raise what :meth:`RunPrompts.read` and :func:`check_rewards` raise.

    Nothing of the list to train on is kept, unless a reward does not score all prompts.
    """
    if all(reward.scores_any_prompt for reward in traits.resolve(recipe).rewards):
        for _ in _train(recipe, _held_out(recipe)):
            pass
    else:
        check_rewards(recipe, RunPrompts.read(recipe))


def check_rewards(recipe: Recipe, texts: RunPrompts) -> None:
    """Refuse prompts that a reward cannot score: those that are measured, and for one that trains, those to train on.

    Raises:
        UsageError: Names the reward and the prompt.
    """
    settings = recipe.evaluation
    measured = PromptStream(texts.held_out, 0, "held out").batch(0, -(-settings.images // settings.images_per_prompt))
    for reward in traits.resolve(recipe).rewards:
        reason = reward.refuse_prompts(chain(measured, texts.train) if reward.trains else measured)
        if reason is not None:
            key = "data.prompts" if recipe.data.held_out is None else "data.prompts, data.held_out"
            raise UsageError(f"{key}: reward {reward.key!r} cannot score them: {reason}")


def _held_out(recipe: Recipe) -> StoredPrompts | None:
    data = recipe.data
    return prompts.read(data.held_out, data.column, revisions=recipe.revisions) if data.held_out else None


def _train(recipe: Recipe, held_out: StoredPrompts | None) -> Iterator[str]:
    """The prompts to train on, compared with the others while they are read."""
    unseen, seen = set(held_out or ()), set[str]()
    for prompt in prompts.stream(recipe.data.prompts, recipe.data.column, revisions=recipe.revisions):
        if prompt in unseen:
            seen.add(prompt)
        yield prompt
    if seen:
        raise UsageError(
            f"data.held_out: {len(seen):,} of its prompts are in data.prompts, too (such as {min(seen)[:60]!r}): "
            "remove them from one of the files, or leave data.held_out out"
        )
