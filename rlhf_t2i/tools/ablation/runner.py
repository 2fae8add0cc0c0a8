"""Run an ablation: its rows, then the tables and the page."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.evaluation.results import dumps
from rlhf_t2i.tools.ablation import execute, page, schema
from rlhf_t2i.tools.ablation.execute import EVALUATE, TRAIN, Executor, Task
from rlhf_t2i.tools.ablation.schema import Ablation, Variant
from rlhf_t2i.tools.ablation.tables import Table
from rlhf_t2i.tools.report import training_plots
from rlhf_t2i.tools.report.training_plots import Rows
from rlhf_t2i.utils import files, targets
from rlhf_t2i.utils.jsonl import read_json

FORCE_RATIO = 0.3
"""Ratio of the reward's to the regularizer's force at x0 for the paper's alpha_r = 100 (docs/ablation.md)."""


def ablate(
    recipe: Path,
    out: Path,
    *,
    more: Sequence[str] = (),
    only: Sequence[str] = (),
    seeds: str = "",
    parallel: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    train: Sequence[str] = TRAIN,
    measure: Sequence[str] = EVALUATE,
) -> str:
    """Run what is not finished yet, and write the table after every row.

    Args:
        recipe: The ablation's YAML file.
        out: Its folder.
        more: ``key=value`` overrides of every training recipe.
        only: Rows to run; all when empty.
        seeds: Comma-separated seeds in place of the recipe's.
        parallel: How many rows run at once, in place of the recipe's.
        say: Called with one line per event.
        train: The training command.
        measure: The evaluation command.

    Returns:
        The table in Markdown.

    Raises:
        UsageError: A bad recipe, or ``out`` holds rows of another one.
        RunError: Rows failed; the table of the others is written.
    """
    ablation = _with_seeds(schema.load(recipe), seeds)
    targets.check_folder(out, "--out")
    execute.tasks(ablation, out, list(more), only)  # refuses a bad row before anything is started
    with files.exclusive(out, "ablation"), files.disk_errors(out), _terminable():
        ablation = _with_unit(ablation, out, more, say, train)
        tasks = execute.tasks(ablation, out, list(more), only)
        for task in tasks:
            task.claim()
        todo = [task for task in tasks if not task.finished]
        for row, key in schema.overridden(ablation, list(more), only):
            say(f"--set {key} replaces what row {row} sets itself")
        say(f"{len(tasks) - len(todo)} of {len(tasks)} rows are finished")

        def finished(task: Task) -> None:
            Table(ablation, tasks).write(out)
            say(f"{task.name}: finished, {sum(t.finished for t in tasks)} of {len(tasks)}")

        slots = execute.slots(parallel or ablation.parallel, tasks)
        failures = Executor(ablation, slots, say, train, measure).run(todo, finished)
        table = Table(ablation, tasks)
        table.write(out)
        page.write(table, out)
    if failures:
        raise RunError(f"{len(failures)} of {len(tasks)} rows failed, the first: {failures[0]}")
    return table.markdown()


def calibrate(ablation: Ablation, out: Path, more: Sequence[str], train: Sequence[str] = TRAIN) -> tuple[float, str]:
    """Measure both forces at x0 in a short run with scale 1.

    Returns:
        The ``scale_unit``, see :func:`scale_unit`, and the measurement in words.

    Raises:
        RunError: The training run failed, or logged no gradient norms.
    """
    run = out / "calibration"
    shutil.rmtree(run, ignore_errors=True)
    texts = [*more, f"{ablation.scale_key}=1.0", f"steps={ablation.calibration_steps}"]
    rows = [row for row in ablation.rows if row.train and row.paper_scale]
    if not rows:
        raise UsageError("no row has a paper_scale, so there is nothing to calibrate")
    command = [*train, ablation.base]
    for text in schema.overrides(ablation, Variant(name="calibration", label="calibration"), 0, texts):
        command += ["--set", text]
    done = subprocess.run([*command, "--out", str(run)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"the calibration run failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return scale_unit(training_plots.read(run))


def _with_unit(
    ablation: Ablation, out: Path, more: Sequence[str], say: Callable[[str], None], train: Sequence[str]
) -> Ablation:
    """The ablation with its ``scale_unit: auto`` measured, once per folder."""
    if ablation.scale_unit != "auto":
        return ablation
    path = out / "scale_unit.json"
    if not path.is_file():
        say("calibration: measuring the forces at x0 with scale 1")
        unit, words = calibrate(ablation, out, more, train)
        files.write_atomic(path, dumps({"scale_unit": float(f"{unit:.3g}"), "measured": words}))
    found = read_json(path)
    if not isinstance(found.get("scale_unit"), float):
        raise UsageError(f"{path} is damaged: remove it to measure again")
    say(f"scale_unit {found['scale_unit']:g}: {found.get('measured', '')}")
    return ablation.model_copy(update={"scale_unit": found["scale_unit"]})


def scale_unit(rows: Rows) -> tuple[float, str]:
    """One unit of the paper's alpha_r with these models, from steps trained with scale 1.

    With it, alpha_r = 100 makes the reward's gradient :data:`FORCE_RATIO` times the regularizer's at x0.

    Raises:
        RunError: The steps hold no gradient norms.
    """
    pushes = [row["grad_norm/reward"] for row in rows if row.get("grad_norm/reward")]
    pulls = [row["grad_norm/divergence"] for row in rows if row.get("grad_norm/divergence")]
    if not pushes or not pulls:
        raise RunError("the calibration run logged no gradient norms at x0")
    push, pull = sum(pushes) / len(pushes), sum(pulls) / len(pulls)
    unit = FORCE_RATIO * pull / push / 100
    words = (
        f"over {len(pushes)} steps: reward gradient {push:.4g} at scale 1, regularizer {pull:.4g}; "
        f"scale {100 * unit:.4g} gives the ratio {FORCE_RATIO}"
    )
    return unit, words


def _with_seeds(ablation: Ablation, seeds: str) -> Ablation:
    if not seeds.strip():
        return ablation
    try:
        chosen = [int(text) for text in seeds.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {seeds}: write whole numbers with commas between them") from None
    if len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise UsageError(f"--seeds {seeds}: seeds are different numbers from 0 up")
    rows = [row.model_copy(update={"seeds": None}) for row in ablation.rows]
    return ablation.model_copy(update={"seeds": chosen, "rows": rows})


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that running rows are stopped and write a checkpoint."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
