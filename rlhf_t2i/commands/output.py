"""What several commands print or parse alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_t2i.errors import UsageError

if TYPE_CHECKING:
    import torch

    from rlhf_t2i.tools.findings import Finding


def given_path(text: str | Path) -> Path:
    """The parser of arguments and options that are paths."""
    from rlhf_t2i.utils import files

    return files.given(text)


RecipePath = Annotated[Path, typer.Argument(parser=given_path, metavar="FILE", help="The recipe, a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
PixelsOption = Annotated[int | None, typer.Option(min=8, max=8192, metavar="PIXELS", help="The model's own.")]
_COLORS = {"pass": "green", "fail": "bold red", "skip": "dim"}


def torch_device(name: str) -> torch.device:
    """The device of a ``--device`` option: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.

    Raises:
        UsageError: Another word, or CUDA where torch finds none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r}: cpu, cuda or auto")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")
    return torch.device(name)


def print_findings(title: str, findings: Sequence[Finding]) -> None:
    """Print the rows of a check as a table, and how many passed; exit code 1 if one failed."""
    from rich.table import Table
    from rich.text import Text

    from rlhf_t2i.utils.terminal import PlainConsole

    table = Table(title=title, title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for finding in findings:
        table.add_row(finding.name, Text(finding.outcome, _COLORS[finding.outcome]), finding.detail)
    console = PlainConsole()
    console.print(table)
    counts = {outcome: sum(finding.outcome == outcome for finding in findings) for outcome in _COLORS}
    console.print(f"{counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped")
    if counts["fail"]:
        raise typer.Exit(1)
