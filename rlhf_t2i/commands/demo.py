"""``rlhf-t2i demo``: the quickstart, wherever the package is installed."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from rlhf_t2i.commands.output import SetOption, given_path
from rlhf_t2i.commands.run import run_command


def demo_command(
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="DIR", help="The run's folder [default: runs/quickstart-DATE]."),
    ] = None,
) -> None:
    """Train a one-step generator on the shipped small models: a few minutes on two CPU cores.

    The same as `run` with the recipe that `recipes show quickstart` prints. Needs the extra demo, or a checkout.
    """
    from rlhf_t2i.recipe import shipped

    folder = out or Path("runs") / f"quickstart-{datetime.now():%Y%m%d-%H%M%S}"
    run_command(shipped.recipe_path("quickstart"), set_, folder)
    typer.echo(f"\nThe run is in {folder}. Draw with it:")
    typer.echo(f'  rlhf-t2i sample {shlex.quote(str(folder))} --prompt "owl, on a blue background" -o owl.png')
