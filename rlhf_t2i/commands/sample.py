"""``rlhf-t2i sample``: images from an aligned generator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_t2i.commands.output import given_path


def sample_command(
    model: Annotated[str, typer.Argument(help="A run's folder, its model/ folder, or a hub id.")],
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="What to draw; repeatable.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", parser=given_path, metavar="FILE", help="A PNG; several prompts make a grid."),
    ] = Path("out.png"),
    seed: Annotated[int, typer.Option(min=0, max=2**62, metavar="N", help="Image i uses seed + i.")] = 0,
) -> None:
    """Draw an image for each prompt."""
    from rlhf_t2i.errors import UsageError

    if output.suffix.lower() != ".png" or output.is_dir():
        raise UsageError(f"-o {output}: name a .png file")
    from rlhf_t2i.utils import files, images, targets

    targets.check_file(output, "-o")
    from rlhf_t2i.evaluation import models

    drawn = models.load(model).sample(prompt, seed)
    with files.disk_errors(output):
        files.write_atomic(output, images.png(images.grid(drawn)))
    typer.echo(f"wrote {output}")
