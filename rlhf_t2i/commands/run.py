"""``rlhf-t2i run``: align a generator as a recipe says."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.state import TrainState


def run_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder [default: runs/RECIPE].")] = None,
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
    from rlhf_t2i import api
    from rlhf_t2i.training.interrupts import SignalHandler

    command = " ".join(["rlhf-t2i", *sys.argv[1:]])
    with ProgressBar(loaded.steps) as progress, SignalHandler(progress):
        api.train(
            loaded, folder, resume=resume, allow_recipe_change=allow_recipe_change, address=address,
            callback=progress, command=command,
        )  # fmt: skip
    _summary(folder, "Held-out" if loaded.data.held_out else "Training")


class ProgressBar(TrainCallback):
    """A progress bar with reward, seconds per step and time left; plain lines where there is no terminal."""

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from rlhf_t2i.utils.terminal import PlainConsole

        self._console = PlainConsole(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[details]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=steps, details="")
        self._seconds: float | None = None
        self._began = self._spoke = time.monotonic()

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def on_phase(self, text: str) -> None:
        """Something long begins."""
        self._bar.update(self._task, description=text[:40])
        if not self._console.is_terminal:
            self._print(text)

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """A generator step is done."""
        seconds = metrics["timing"]["step"]
        self._seconds = seconds if self._seconds is None else 0.9 * self._seconds + 0.1 * seconds
        rewards = [f"{k.removeprefix('reward/')} {v:.4f}" for k, v in metrics.items() if k.startswith("reward/")]
        used = [f"MFU {metrics['mfu']:.0%}"] if "mfu" in metrics else []
        details = ", ".join([*rewards[:2], f"{self._seconds:.2f} s/step", *used])
        self._bar.update(self._task, description="training", completed=state.step, details=details)
        if not self._console.is_terminal and time.monotonic() - self._spoke > 10:
            total = self._bar.tasks[self._task].total or 0
            self._print(f"step {state.step}/{total:.0f}, {details}, {(total - state.step) * self._seconds:.0f} s left")

    def on_message(self, text: str) -> None:
        """A sentence for the user."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._spoke = time.monotonic()
        self._console.print(f"[{self._spoke - self._began:5.0f} s] {text}")


def _summary(folder: Path, kind: str) -> None:
    """The before/after table, and the files to look at."""
    from rich.table import Table

    from rlhf_t2i.evaluation import compare
    from rlhf_t2i.utils.terminal import PlainConsole

    console = PlainConsole()
    rows = compare.of_run(folder)
    table = Table(title=f"{kind} prompts, same noise", title_justify="left")
    for name in ("measure", "before", "after", "change", "std. errors"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for row in rows:
        # A ratio's distance from 0.8 in standard errors would be read as a change.
        changed = (
            (f"x {row.ratio:.2f}", "") if row.kind == "diversity" else (f"{row.difference:+.4f}", f"{row.errors:+.1f}")
        )
        table.add_row(f"{row.key} ({row.kind})", f"{row.before:.4f}", f"{row.after:.4f}", *changed)
    console.print(table)
    for row in rows:
        console.print(f"- {row.key}: {row.verdict}")
    console.print("\nLook at:")
    for path, what in (
        ("report.html", "curves, before and after"),
        ("samples/", "the same prompts over time"),
        ("model/", "loads with diffusers, or: rlhf-t2i sample"),
    ):
        console.print(f"  {folder / path}  {what}", soft_wrap=True)
