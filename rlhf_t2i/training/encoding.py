"""Prompts of a run to embeddings on disk, before its roles start or by ``rlhf-t2i encode``."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import embeddings
from rlhf_t2i.families.embeddings import Progress
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training.run_prompts import RunPrompts
from rlhf_t2i.utils.device import default_device
from rlhf_t2i.utils.quiet import quietly


def encode_prompts(recipe: Recipe, progress: Progress, texts: RunPrompts | None = None) -> tuple[int, Path]:
    """Encode what ``models.embeddings`` lacks of a run's prompts; the text encoders are freed afterwards.

    Args:
        recipe: With pinned hub models.
        progress: Called after each prompt.
        texts: The run's prompts, if they are read already.

    Returns:
        How many were encoded, and the folder.

    Raises:
        UsageError: The recipe names no folder, or a prompt file or text encoder is wrong.
        RunError: The folder cannot be written.
    """
    store = ModelStore(recipe.models, recipe.student, default_device(), recipe.optimization.precision)
    folder = store.embeddings
    if folder is None:
        raise UsageError("models.embeddings: names no folder for prompt embeddings; set it, e.g. to ./embeddings")
    embeddings.check(folder.root)
    store.verify()
    store.family.check()
    texts = texts or RunPrompts.read(recipe)
    own = () if texts.held_out is texts.train else texts.held_out
    missing = folder.missing(chain(texts.train, own))
    if missing:
        with quietly():
            store.encode_missing(missing, progress)
    return len(missing), folder.folder
