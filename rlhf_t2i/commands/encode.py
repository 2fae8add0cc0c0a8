"""``rlhf-t2i encode``: a recipe's prompts through its text encoders, once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from rlhf_t2i.commands.output import SetOption, given_path


def encode_command(
    recipe: Annotated[
        Path,
        typer.Argument(parser=given_path, metavar="FILE", help="The recipe; models.embeddings names the folder."),
    ],
    set_: SetOption = None,
) -> None:
    """Encode a recipe's prompts once, for models.embeddings.

    Only what the folder lacks is encoded; a run with it loads no text encoders.
    """
    from rlhf_t2i.recipe import reading

    loaded = reading.load(recipe, set_ or [])
    from rlhf_t2i.families.pins import pin
    from rlhf_t2i.tools.progress import phases
    from rlhf_t2i.training.callbacks import TrainCallback
    from rlhf_t2i.training.encoding import encode_prompts
    from rlhf_t2i.training.interrupts import SignalHandler

    with phases() as progress, SignalHandler(TrainCallback(), lambda: False):
        count, folder = encode_prompts(pin(loaded), partial(progress, "encoding prompts"))
    typer.echo(f"encoded {count} prompts, wrote {folder}" if count else f"nothing to do: {folder} has every prompt")
