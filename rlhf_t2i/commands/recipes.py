"""``rlhf-t2i recipes list|show|copy``: the recipes that ship with the package."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from rlhf_t2i.commands.output import given_path

recipes_app = typer.Typer(help="List, print and copy the shipped recipes.", invoke_without_command=True)
Name = Annotated[str, typer.Argument(help="As `recipes` lists it, e.g. quickstart or sd15/sim.")]


@recipes_app.callback()
def _list_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list")
def list_recipes() -> None:
    """Show every shipped recipe with its first line. The default."""
    from rlhf_t2i.tools import starting

    rows = starting.shipped_recipes()
    width = max(len(row.name) for row in rows)
    for row in rows:
        typer.echo(f"{row.name:<{width}}  {row.summary}")
    typer.echo("\nNext: rlhf-t2i recipes copy NAME")


@recipes_app.command("show")
def show(name: Name) -> None:
    """Print a recipe."""
    from rlhf_t2i.recipe import shipped

    typer.echo(shipped.recipe_path(name).read_text("utf-8"), nl=False)


@recipes_app.command("copy")
def copy(
    name: Name,
    destination: Annotated[
        Path, typer.Argument(parser=given_path, metavar="[DEST]", help="A file or a folder.")
    ] = Path(),
) -> None:
    """Copy a recipe to change it; an ablation brings the recipe that it is based on."""
    from rlhf_t2i.tools import starting

    command, written, missing = starting.copy_recipe(name, destination)
    for path in written:
        typer.echo(f"wrote {path}")
    for sentence in missing:
        typer.echo(f"Before it runs: {sentence}")
    typer.echo(f"Next: rlhf-t2i {command} {shlex.quote(str(written[0]))}")
