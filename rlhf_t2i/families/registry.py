"""Finding the family of a model: entry points ``rlhf_t2i.families``, chosen by model_index.json's ``_class_name``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Family
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.plugins import guard
from rlhf_t2i.plugins.registry import registered

GROUP = "rlhf_t2i.families"


@dataclass(frozen=True)
class InstalledFamily:
    """A registered family: its class, or the reason why there is none.

    Attributes:
        name: Of its entry point.
        package: That registers it.
        cls: None if it cannot be used.
        problem: Why not.
    """

    name: str
    package: str
    cls: type[Family] | None
    problem: str = ""


def installed() -> Iterator[InstalledFamily]:
    """Every registered family; one that cannot be imported stops only those who use it."""
    for name, plugins in registered(GROUP).items():
        packages = " and ".join(plugin.package for plugin in plugins)
        try:
            if len(plugins) > 1:
                raise UsageError("is registered twice: uninstall one")
            with guard.building("cannot be imported"):
                cls = plugins[0].entry_point.load()
            problem = _problem(cls)
        except UsageError as error:
            cls, problem = None, str(error)
        yield InstalledFamily(name, packages, None if problem else cls, problem)


def _problem(cls: object) -> str:
    """What keeps a class from being used as a family; empty if nothing does."""
    if not (isinstance(cls, type) and issubclass(cls, Family)):
        return "is not a subclass of rlhf_t2i.families.base.Family"
    missing = [*(n for n in ("name", "pipelines", "network_part") if not hasattr(cls, n)), *cls.__abstractmethods__]
    if missing:
        return f"does not define {', '.join(sorted(missing))}"
    return "" if isinstance(cls.pipelines, tuple) else 'pipelines must be a tuple, ("MyPipeline",)'


def find(reference: ModelRef) -> Family:
    """The family of a pipeline folder or hub id.

    Raises:
        UsageError: Not a pipeline, or one of no family or of two; the message lists the known ones.
    """
    index = sources.pipeline_index(reference)
    rows, name = list(installed()), index.get("_class_name")
    usable = [(row, row.cls) for row in rows if row.cls is not None]
    matches = [(row, cls) for row, cls in usable if name in cls.pipelines]
    place = f"{reference.location}/model_index.json: {sources.printable(name)}"
    if len(matches) > 1:
        both = " and ".join(f"{row.name!r} of package {row.package}" for row, _ in matches)
        raise UsageError(f"{place} is read by the model families {both}: uninstall one")
    if matches:
        return matches[0][1](reference, index)
    known = ", ".join(f"{row.name} ({', '.join(cls.pipelines)})" for row, cls in usable)
    broken = "".join(f"; {row.name!r} of package {row.package} {row.problem}" for row in rows if row.cls is None)
    raise UsageError(f"{place} is no pipeline of a known model family; known: {known}{broken}")
