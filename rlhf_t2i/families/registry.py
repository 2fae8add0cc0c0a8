"""Finding the family of a model: entry points ``rlhf_t2i.families``, chosen by model_index.json's ``_class_name``."""

from __future__ import annotations

from importlib.metadata import entry_points

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Family
from rlhf_t2i.families.sources import ModelRef

GROUP = "rlhf_t2i.families"


def registered() -> dict[str, type[Family]]:
    """All installed families by name.

    Raises:
        UsageError: A package's family cannot be imported, or is no :class:`Family`.
    """
    families: dict[str, type[Family]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            cls = entry.load()
        except Exception as error:
            raise UsageError(f"model family {entry.name!r} cannot be imported: {error}") from error
        if not (isinstance(cls, type) and issubclass(cls, Family)):
            raise UsageError(f"model family {entry.name!r} is not a subclass of rlhf_t2i.families.base.Family")
        families[entry.name] = cls
    return families


def find(reference: ModelRef) -> Family:
    """The family of a pipeline folder or hub id.

    Raises:
        UsageError: Not a pipeline, or one of a family that is not known; the sentence lists the known ones.
    """
    index = sources.pipeline_index(reference)
    name = index.get("_class_name")
    families = registered()
    for cls in families.values():
        if isinstance(name, str) and name in cls.pipelines:
            return cls(reference, index)
    known = ", ".join(f"{family} ({', '.join(cls.pipelines)})" for family, cls in families.items())
    raise UsageError(
        f"{reference.location}/model_index.json: {sources.printable(name)} is no pipeline of a known model family; "
        f"known: {known}"
    )
