"""Pin the revisions of hub models: a run, and its resumption, must not change because a branch has moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_t2i.algorithm.prompt_hub import PREFIX, DatasetRef
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.schema import Recipe


def pin(recipe: Recipe, recorded: Mapping[str, str] | None = None) -> Recipe:
    """The recipe with the commit of every hub model and dataset it may load in ``revisions``, and this process set so.

    What is not known to the hub or its cache stays without one: loading it fails with its own sentence.

    Args:
        recipe: With valid plugins.
        recorded: The revisions a resumed run has used so far; the recipe's own win.
    """
    sources.use_revisions({})  # an earlier run of this process may have set its own
    revisions = {**(recorded or {}), **recipe.revisions}
    for text in _models(recipe):
        source = _movable(text)
        if source is None:
            continue
        key = f"{source.location}@{source.revision}" if source.revision else source.location
        found = revisions.get(key) or sources.commit(source.location, source.revision)
        if found is not None:
            revisions[key] = found
    for dataset in _datasets(recipe):
        found = revisions.get(dataset.key) or sources.commit(dataset.repository, dataset.revision, "dataset")
        if found is not None:
            revisions[dataset.key] = found
    sources.use_revisions(revisions)
    return recipe.model_copy(update={"revisions": revisions})


def _models(recipe: Recipe) -> Iterator[str]:
    models = recipe.models
    yield from filter(None, (models.reference, models.generator, models.assistant, models.vae))
    for reward in traits.resolve(recipe).rewards:
        yield from reward.hub_models()


def _datasets(recipe: Recipe) -> Iterator[DatasetRef]:
    """The datasets of the hub that prompts come from, but for those that are named by hash."""
    for text in (recipe.data.prompts, recipe.data.held_out):
        if text is not None and text.startswith(PREFIX):
            source = DatasetRef.parse(text)
            if source.revision is None or not sources.is_hash(source.revision):
                yield source


def _movable(text: str) -> sources.ModelRef | None:
    """A hub model that is not named by hash; None for paths, and for text that names no model."""
    try:
        source = sources.parse(text)
    except UsageError:
        return None
    fixed = source.is_local or (source.revision is not None and sources.is_hash(source.revision))
    return None if fixed else source
