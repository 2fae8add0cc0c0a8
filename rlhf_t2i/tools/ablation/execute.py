"""Train and evaluate the rows of an ablation, each in a process of its own; finished rows are skipped."""

from __future__ import annotations

import fcntl
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.evaluation import identity, journal, results
from rlhf_t2i.evaluation.results import dumps
from rlhf_t2i.evaluation.settings import Settings
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.ablation import schema
from rlhf_t2i.tools.ablation.schema import Ablation, Variant
from rlhf_t2i.utils import files
from rlhf_t2i.utils.jsonl import read_json

TRAIN = (sys.executable, "-P", "-m", "rlhf_t2i.cli", "run")
EVALUATE = (sys.executable, "-P", "-m", "rlhf_t2i.evaluation")


@dataclass(frozen=True)
class Task:
    """One row with one seed."""

    variant: Variant
    seed: int
    recipe: Recipe
    settings: Settings
    overrides: tuple[str, ...]
    out: Path

    @property
    def name(self) -> str:
        """For messages and folders."""
        return f"{self.variant.name}/seed_{self.seed}" if self.variant.train else self.variant.name

    @property
    def run(self) -> Path:
        """The training run's folder."""
        return self.out / "rows" / self.name

    @property
    def evaluated(self) -> Path:
        """The evaluation's folder."""
        return self.out / "evaluations" / self.name

    @property
    def finished(self) -> bool:
        """Whether its results are there, measured as the recipe asks now, of the model and rewards as they are now."""
        return self.settings_file.is_file() and results.exist(self.evaluated) and read_json(
            self.settings_file) == self.asked()  # fmt: skip

    @property
    def settings_file(self) -> Path:
        """What was evaluated; written when the evaluation is finished."""
        return self.evaluated.with_name(f"{self.evaluated.name}.settings.json")

    def asked(self) -> dict[str, object]:
        """The evaluation's settings, and digests of what they name."""
        settings = self.settings.model_dump(mode="json")
        return {"settings": settings, "content": identity.of_evaluation(self.settings)}

    def claim(self) -> None:
        """Refuse a folder whose row was trained with another recipe, other prompts, models or rewards.

        Raises:
            UsageError: Names the first key that differs.
        """
        if self.variant.train:
            content = _flat(self.recipe.model_dump()) | identity.of_recipe(self.recipe)
            journal.claim(self.run.parent, f"{self.run.name}.recipe.json", content)


def tasks(ablation: Ablation, out: Path, more: list[str], only: Sequence[str] = ()) -> list[Task]:
    """All rows and seeds, validated; the first seed of every row comes first, so that there is a table early.

    Raises:
        UsageError: An unknown row in ``only``, or a row that makes no valid recipe.
    """
    unknown = next((name for name in only if name not in [row.name for row in ablation.rows]), None)
    if unknown:
        raise UsageError(f"--rows: no row is called {unknown!r}: {', '.join(row.name for row in ablation.rows)}")
    found = []
    for row in ablation.rows:
        if only and row.name not in only and row.name != ablation.initial:
            continue
        for order, seed in enumerate((row.seeds or ablation.seeds) if row.train else [0]):
            recipe = schema.training_recipe(ablation, row, seed, more)
            run = out / "rows" / row.name / f"seed_{seed}"
            settings = schema.evaluation(ablation, row, recipe, run)
            texts = tuple(schema.overrides(ablation, row, seed, more))
            found.append((order, Task(row, seed, recipe, settings, texts, out)))
    return [task for _, task in sorted(found, key=lambda pair: pair[0])]


class Executor:
    """Run tasks in parallel, one per slot, each slot on devices of its own.

    Args:
        ablation: Names the base recipe.
        devices: The CUDA devices visible in each slot; one entry per slot, "" for a CPU.
        say: Called with one line per event.
        train: The training command, before ``RECIPE --set ... --out OUT``.
        measure: The evaluation command, before ``SETTINGS OUT``.
    """

    def __init__(
        self,
        ablation: Ablation,
        devices: Sequence[str],
        say: Callable[[str], None],
        train: Sequence[str] = TRAIN,
        measure: Sequence[str] = EVALUATE,
    ) -> None:
        self.ablation, self.say, self.train, self.measure = ablation, say, list(train), list(measure)
        self._slots: queue.Queue[str] = queue.Queue()
        for slot in devices:
            self._slots.put(slot)
        self._parallel = len(devices)
        self._children: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._stopping = False

    def run(self, todo: Sequence[Task], finished: Callable[[Task], None]) -> list[str]:
        """Run the tasks; a failed one is reported and the others continue.

        Returns:
            A sentence for each failed task.

        Raises:
            UsageError: A task's recipe or folder is refused; no further task starts.
        """
        failures: list[str] = []
        pool = ThreadPoolExecutor(self._parallel)
        futures = {pool.submit(self._one, task): task for task in todo}
        try:
            pending: set[Future[None]] = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    error = future.exception()
                    if isinstance(error, RunError):
                        failures.append(str(error))
                        self.say(str(error))
                    elif error is not None:
                        raise error
                    else:
                        finished(futures[future])
        finally:
            self._stop()
            pool.shutdown(cancel_futures=True)
        return failures

    def _one(self, task: Task) -> None:
        slot = self._slots.get()
        try:
            with _held(task) as lock:
                if task.variant.train:
                    self._train(task, slot, lock)
                self._evaluate(task, slot, lock)
        finally:
            self._slots.put(slot)

    def _train(self, task: Task, slot: str, lock: int) -> None:
        marker = task.run.with_name(f"{task.run.name}.finished.json")
        if not marker.is_file():
            command = [*self.train, self.ablation.base]
            for text in task.overrides:
                command += ["--set", text]
            command += ["--out", str(task.run)]
            if any((task.run / "checkpoints").glob("step_*")):
                command.append("--resume")
                self.say(f"{task.name}: training goes on")
            else:
                # A run killed before its first checkpoint cannot be resumed.
                shutil.rmtree(task.run, ignore_errors=True)
                self.say(f"{task.name}: training starts")
            self._call(task, command, slot, "training", lock)
            files.write_atomic(marker, dumps({"finished": True}))
        if self.ablation.discard_checkpoints:
            shutil.rmtree(task.run / "checkpoints", ignore_errors=True)

    def _evaluate(self, task: Task, slot: str, lock: int) -> None:
        asked = task.asked()
        draft = task.settings_file.with_suffix(".asked.json")
        files.write_atomic(draft, dumps(asked["settings"]))
        self.say(f"{task.name}: evaluating")
        self._call(task, [*self.measure, str(draft), str(task.evaluated)], slot, "evaluation", lock)
        files.write_atomic(task.settings_file, dumps(asked))

    def _call(self, task: Task, command: list[str], slot: str, what: str, lock: int) -> None:
        log = task.run.with_name(f"{task.run.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": slot} if slot else {})
        launcher = [sys.executable, "-P", "-m", "rlhf_t2i.tools.ablation.child", str(os.getpid()), *command]
        with log.open("ab") as stream:
            with self._guard:
                if self._stopping:
                    raise RunError(f"{task.name}: not started")
                # The child inherits the row's lock: if this process is killed, the next one waits for the child.
                child = subprocess.Popen(
                    launcher,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    pass_fds=[lock],
                )
                self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        if code != 0:
            raise _failure(task, what, code, log)

    def _stop(self) -> None:
        """Terminate the children; a training run writes a checkpoint on SIGTERM."""
        with self._guard:
            self._stopping = True
            children = list(self._children)
        for child in children:
            child.terminate()


@contextmanager
def _held(task: Task) -> Iterator[int]:
    """Hold a row's lock and yield its descriptor; waits for a process left by a killed ablation."""
    path = task.run.with_name(f"{task.run.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.fileno()


def slots(parallel: int | str, tasks: Sequence[Task]) -> list[str]:
    """The CUDA devices of each slot: as many slots as fit, or ``parallel``; on a CPU "" for each."""
    gpus = _visible_gpus()
    if not gpus:
        return [""] * (1 if parallel == "auto" else int(parallel))
    need = max((_devices(task.recipe) for task in tasks), default=1)
    fit = max(1, len(gpus) // need)
    count = fit if parallel == "auto" else int(parallel)
    if count > fit:
        raise UsageError(
            f"parallel: {count} rows of {need} devices need {count * need} GPUs, and {len(gpus)} are there"
        )
    return [",".join(gpus[i * need : (i + 1) * need]) for i in range(count)]


def _devices(recipe: Recipe) -> int:
    if recipe.placement.mode == "local":
        return 1
    return sum(group.devices for group in recipe.placement.groups.values())


def _visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU")]


def _failure(task: Task, what: str, code: int, log: Path) -> Exception:
    tail = log.read_text("utf-8", errors="replace").strip().splitlines()[-1:] or [""]
    if code == 2:
        return UsageError(f"row {task.name}: {tail[0]}")
    return RunError(f"row {task.name}: {what} failed with exit code {code}: {tail[0]} (see {log})")


def _flat(data: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(data, dict):
        return {prefix[:-1]: data}
    return {key: value for name, child in data.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
