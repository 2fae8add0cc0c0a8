"""``rlhf-t2i run``: align a generator as a recipe says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf_t2i.commands.output import RecipePath, SetOption, given_path


def run_command(
    recipe: RecipePath,
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(parser=given_path, metavar="DIR", help="The run's folder [default: runs/RECIPE].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")] = False,
    allow_recipe_change: Annotated[
        bool, typer.Option("--allow-recipe-change", help="Resume with a recipe that changes what is trained.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Join this Ray cluster instead of starting one.")
    ] = None,
) -> None:
    """Align a generator as a recipe says. Writes report.html, model/ and checkpoints."""
    from rlhf_t2i.recipe import reading

    loaded, folder = reading.load(recipe, set_ or []), out or Path("runs") / recipe.stem
    from rlhf_t2i.tools.progress import TrainProgress
    from rlhf_t2i.tools.train import train
    from rlhf_t2i.training.interrupts import SignalHandler

    command = " ".join(["rlhf-t2i", *sys.argv[1:]])
    with TrainProgress(loaded.steps) as progress, SignalHandler(progress):
        train(
            loaded, folder, resume=resume, allow_recipe_change=allow_recipe_change, address=address,
            callback=progress, command=command,
        )  # fmt: skip
    _summary(folder, "Held-out" if loaded.data.held_out else "Training")


def _summary(folder: Path, kind: str) -> None:
    """The before/after table, and the files to look at."""
    from rich.table import Table

    from rlhf_t2i.evaluation import compare
    from rlhf_t2i.utils.terminal import PlainConsole

    console = PlainConsole()
    rows = compare.of_run(folder / "evaluation").rows
    table = Table(title=f"{kind} prompts, same noise", title_justify="left")
    for name in ("measure", "before", "after", "change", "std. errors"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for row in rows:
        # A ratio's distance from 0.8 in standard errors would be read as a change.
        changed = (
            (f"x {row.ratio:.2f}", "") if row.kind == "diversity" else (f"{row.difference:+.4f}", f"{row.errors:+.1f}")
        )
        table.add_row(f"{row.key} ({row.kind})", f"{row.before:.4f}", f"{row.after:.4f}", *changed)
    console.print(table if rows else "No table: before and after were not measured on the same prompts.")
    for row in rows:
        console.print(f"- {row.key}: {row.verdict}")
    console.print("\nLook at:")
    for path, what in (
        ("report.html", "curves, before and after"),
        ("samples/", "the same prompts over time"),
        ("model/", "loads with diffusers, or: rlhf-t2i sample"),
        ("adapter/", "the LoRA alone, for load_lora_weights"),
    ):
        if not (folder / path).exists():
            continue
        console.print(f"  {folder / path}  {what}", soft_wrap=True)
