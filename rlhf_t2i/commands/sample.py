"""``rlhf-t2i sample``: pictures from an aligned generator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sample_command(
    model: Annotated[str, typer.Argument(help="A run's folder, its model/ folder, or a hub id.")],
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="What to draw; repeatable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A PNG; several prompts make a grid.")] = Path(
        "out.png"
    ),
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the noise; picture i uses seed + i.")] = 0,
    timestep: Annotated[
        int | None, typer.Option(min=0, max=999, metavar="T", help="Of the one step [default: the model's, or 399].")
    ] = None,
) -> None:
    """Draw a picture for each prompt in one network call."""
    from rlhf_t2i.errors import UsageError

    if output.suffix.lower() != ".png" or output.is_dir():
        raise UsageError(f"-o {output}: name a .png file")
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: the folder {output.parent} does not exist")
    from rlhf_t2i.evaluation.measure import grid
    from rlhf_t2i.evaluation.sampling import sample

    images = sample(model, prompt, seed, timestep)
    grid(images, min(8, len(images))).save(output)
    typer.echo(f"wrote {output}")
