"""``rlhf-t2i encode``: a recipe's prompts through its text encoders, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_t2i.commands.output import SetOption


def encode_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe; models.embeddings names the folder.")],
    set_: SetOption = None,
) -> None:
    """Encode the prompts of a recipe that models.embeddings lacks, so that no role loads text encoders."""
    from rlhf_t2i.recipe import reading

    loaded = reading.load(recipe, set_ or [])
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from rlhf_t2i.families.pins import pin
    from rlhf_t2i.training.encoding import encode_prompts
    from rlhf_t2i.utils.terminal import PlainConsole

    console = PlainConsole(stderr=True)
    columns = (TextColumn("encoding prompts"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and (done == total or done % 100 == 0):
                console.print(f"encoding prompts, {done} of {total}")

        count, folder = encode_prompts(pin(loaded), progress)
    typer.echo(f"encoded {count} prompts, wrote {folder}" if count else f"nothing to do: {folder} has every prompt")
