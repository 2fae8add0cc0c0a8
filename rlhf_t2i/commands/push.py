"""``rlhf-t2i push``: an exported model to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_t2i.commands.output import given_path


def push_command(
    run: Annotated[
        Path, typer.Argument(parser=given_path, metavar="RUN", help="The run's folder, or its model/ folder.")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="The repository on the hub; created if absent.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
) -> None:
    """Upload a run's model, model card and adapter to the hub. Nothing else in this program uploads."""
    from rlhf_t2i.tools.push import push

    typer.echo(f"uploading {run}", err=True)
    typer.echo(push(run, repository, private=private))
