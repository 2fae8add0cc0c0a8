"""Tables of ``rlhf-t2i rewards list`` and ``divergences list``; a broken plugin is a row, not an error."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_t2i.errors import UsageError, printable
from rlhf_t2i.plugins import registry
from rlhf_t2i.plugins.base import Divergence, LatentReward, Reward
from rlhf_t2i.plugins.online import OnlineReward
from rlhf_t2i.utils.terminal import PlainConsole

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True)
class PluginRow:
    """A plugin: its class, or the reason why it cannot be imported."""

    name: str
    package: str
    cls: type[Reward] | type[Divergence] | None
    problem: str = ""


def rows(group: str) -> Iterator[PluginRow]:
    """Every registered plugin of a group, imported."""
    for name, plugins in registry.registered(group).items():
        packages = ", ".join(f"{plugin.package} {plugin.version}".strip() for plugin in plugins)
        try:
            yield PluginRow(name, packages, registry.load_class(group, name))
        except UsageError as error:
            reason = error.__cause__ if error.__cause__ is not None else error
            yield PluginRow(
                name, packages, None, f"{type(reason).__name__}: {reason}" if reason is not error else str(error)
            )


def gradient(cls: type[Reward]) -> str:
    """Source of a reward's gradient: ``yes`` (its score), ``learned``, ``reference`` or ``no``."""
    if issubclass(cls, OnlineReward):
        return "learned"
    if not cls.differentiable:
        return "no"
    return "reference" if issubclass(cls, LatentReward) else "yes"


def needs(cls: type[Reward]) -> str:
    """Models and packages that a reward needs beyond the core's, or an empty text."""
    return ", ".join([*_models(cls), *cls.requires, *(f"own env: {spec}" for spec in cls.pip)])


def runs_here(cls: type[Reward]) -> str:
    """``yes``, or what is missing. Models that are not in the hub's cache can be given as a local folder."""
    missing = [name for name in cls.requires if importlib.util.find_spec(name) is None]
    if missing:
        return f"no: pip install {' '.join(missing)}"
    required = [name for name, field in cls.Options.model_fields.items() if field.is_required()]
    if required:
        return f"yes, with {', '.join(required)}"
    absent = [model for model in _models(cls) if not _is_cached(model)]
    if not absent:
        return "yes"
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    return "with a local model (offline)" if offline else "yes, after a download"


def _models(cls: type[Reward]) -> list[str]:
    """Hub ids among the defaults of the options ``model``, ``head`` and ``base``."""
    fields = cls.Options.model_fields
    defaults = [fields[key].default for key in ("model", "head", "base") if key in fields]
    return [value for value in defaults if isinstance(value, str) and value.count("/") == 1]


def _is_cached(model: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{model.replace('/', '--')}").is_dir()


def print_rewards() -> None:
    """Print the table of rewards and, below it, what they need: hub ids are too long for a column at 80 characters."""
    table = _table("name", "package", "gradient", "unit", "runs here")
    needed = _table("name", "needs")
    for row in rows(registry.REWARDS):
        if row.cls is None or not issubclass(row.cls, Reward):
            table.add_row(row.name, row.package, "?", "?", _no(row.problem))
            continue
        table.add_row(row.name, row.package, gradient(row.cls), row.cls.unit or "-", runs_here(row.cls))
        if needs(row.cls):
            needed.add_row(row.name, needs(row.cls))
    PlainConsole().print(table)
    if needed.row_count:
        PlainConsole().print("", needed, sep="\n")


def print_divergences() -> None:
    """Print the table of divergences."""
    table = _table("name", "package", "needs VJPs", "options", "runs here")
    for row in rows(registry.DIVERGENCES):
        if row.cls is None or not issubclass(row.cls, Divergence):
            table.add_row(row.name, row.package, "?", "?", _no(row.problem))
            continue
        options = ", ".join(row.cls.Options.model_fields) or "-"
        table.add_row(row.name, row.package, "yes" if row.cls.needs_vjp else "no", options, "yes")
    PlainConsole().print(table)


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    return table


def _no(problem: str) -> Text:
    from rich.text import Text

    return Text.assemble(("no: ", "red"), printable(problem))
