"""``rlhf-t2i ablate``: parse, call, print."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from rlhf_t2i.commands.output import given_path


def ablate_command(
    recipe: Annotated[Path, typer.Argument(parser=given_path, metavar="FILE", help="The ablation's YAML file.")],
    out: Annotated[
        Path | None, typer.Option(parser=given_path, metavar="DIR", help="Its folder [default: runs/RECIPE].")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of every row's recipe.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Only these rows, comma-separated; the initial one is always there.")] = "",
    seeds: Annotated[str, typer.Option(help="Other seeds for every row, comma-separated.")] = "",
    parallel: Annotated[int | None, typer.Option(min=1, help="How many rows run at once.")] = None,
) -> None:
    """Train and measure a grid of runs, and tabulate them. Run it again to continue after a kill."""
    from rlhf_t2i.tools.ablation import runner

    folder, say = out or Path("runs") / recipe.stem, partial(typer.echo, err=True)
    only = [name.strip() for name in rows.split(",") if name.strip()]
    markdown = runner.ablate(recipe, folder, more=set_ or [], only=only, seeds=seeds, parallel=parallel, say=say)
    typer.echo(markdown)
    typer.echo(f"Look at {folder / 'report.html'} and {folder / 'table.md'}")
