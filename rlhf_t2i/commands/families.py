"""``rlhf-t2i families list|check``: which models are supported, and does a family read one as diffusers does?"""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_t2i.commands.output import DeviceOption, PixelsOption, print_findings, torch_device
from rlhf_t2i.errors import UsageError

families_app = typer.Typer(help="List model families, and check one on a model.", no_args_is_help=True)


@families_app.command("list")
def list_families() -> None:
    """Show every installed model family and the pipelines that it reads."""
    from rich.table import Table

    from rlhf_t2i.families import registry
    from rlhf_t2i.utils.terminal import PlainConsole

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("family", "pipelines", "network folder"):
        table.add_column(column, overflow="fold")
    for row in registry.installed():
        if row.cls is None:
            table.add_row(row.name, f"{row.problem} (package {row.package})", "")
        else:
            table.add_row(row.name, ", ".join(row.cls.pipelines), row.cls.network_part)
    PlainConsole().print(table)


@families_app.command("check")
def check(
    model: Annotated[str, typer.Argument(help="A diffusers folder or a hub id.")],
    device: DeviceOption = "auto",
    height: PixelsOption = None,
    width: PixelsOption = None,
) -> None:
    """Compare a family with diffusers' own pipeline on a model, in float32. Exit code 1 if a check fails."""
    from rlhf_t2i.tools.family_check import check_family

    if not model.strip():
        raise UsageError("MODEL is empty: give a diffusers folder or a hub id")
    print_findings(f"families check {model}", check_family(model, torch_device(device), height, width))
