"""``rlhf-t2i init``: a first recipe for the models at hand."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from rlhf_t2i.commands.output import given_path


def init_command(
    reference: Annotated[str, typer.Option(help="The frozen reference: a diffusers folder or a hub id.")],
    prompts: Annotated[str, typer.Option(help="The prompts to train on: any file that docs/recipes.md lists.")],
    file: Annotated[Path, typer.Argument(parser=given_path, metavar="[FILE]", help="The recipe to write.")] = Path(
        "recipe.yaml"
    ),
    generator: Annotated[
        str | None, typer.Option(help="The network to align [default: the reference, which is distilled as it trains].")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=MODEL]", help="A reward, with its model; repeatable [default: pickscore]."),
    ] = None,
    held_out: Annotated[str | None, typer.Option(help="Prompts that are not trained on, for the table.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=64, help="Steps of the generator [default: an exported model's own, or 1].")
    ] = None,
) -> None:
    """Write a commented recipe for your models. It is checked as `run` would check it, and nothing is downloaded.

    A hub id is read from the hub's cache, or from its configuration files alone.
    """
    from rlhf_t2i.tools import first_recipe

    wanted = first_recipe.Wanted(reference, generator, prompts, held_out, tuple(reward or ["pickscore"]), steps)
    first_recipe.write(file, wanted)
    typer.echo(f"wrote {file}")
    typer.echo("Next, what it needs and how long it takes, and the run:")
    typer.echo(f"  rlhf-t2i plan {shlex.quote(str(file))} --device h100")
    typer.echo(f"  rlhf-t2i run {shlex.quote(str(file))}")
