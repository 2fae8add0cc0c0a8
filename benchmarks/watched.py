"""Runs in processes of their own, whose phases another process follows in their output.

A driver is forked from a server that has imported the packages, so that a kill costs no seconds of imports. It is a
process like any other: nothing of the server's state but imported modules is in it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

PHASES = ("start-up", "evaluation before", "training", "evaluation after", "export", "report", "ended")
MARK = "RLHF_T2I_CHAOS"
"""Environment variable of every process of a watched run."""
_LINES = {
    "checking the inputs": "start-up",
    "starting the roles": "start-up",
    "measuring before": "evaluation before",
    "resuming from": "training",
    "measuring after": "evaluation after",
    "writing the model": "export",
    "writing the report": "report",
}
_IMPORTED = [
    "rlhf_t2i.cli", "rlhf_t2i.commands.run", "rlhf_t2i.tools.train", "rlhf_t2i.tools.report", "rlhf_t2i.tools.progress",
    "rlhf_t2i.training.run", "rlhf_t2i.evaluation.compare", "rlhf_t2i.cluster.local", "rlhf_t2i.families.export",
    "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip",
]  # fmt: skip


def _drive(arguments: Sequence[str], log: str) -> None:
    """The driver: the command line, with its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {MARK: log, "COLUMNS": "300"}  # one line per message
    sys.argv = ["rlhf-t2i", *arguments]
    from rlhf_t2i.cli import main

    main()


class Watched:
    """A run that is started, killed and started again in one folder.

    Args:
        out: The run's folder; its log is beside it.
        arguments: Of ``rlhf-t2i run``, without ``--out`` and ``--resume``.
    """

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(_IMPORTED)

    def __init__(self, out: Path, arguments: Sequence[str]) -> None:
        self.out, self.log = out, out.parent / f"{out.name}.log"
        self._arguments = ["run", *arguments, "--out", str(out)]
        self._seen = 0  # bytes of the log before this start
        self.start()

    def start(self) -> None:
        """Start the run, or continue it where there is one."""
        resume = ["--resume"] if (self.out / "recipe.yaml").is_file() else []
        self._seen = self.log.stat().st_size if self.log.is_file() else 0
        self.process = self._context.Process(target=_drive, args=([*self._arguments, *resume], str(self.log)))
        self.process.start()

    @property
    def pid(self) -> int:
        """Of the driver."""
        return self.process.pid or 0

    def ended(self) -> bool:
        """Whether the driver has ended, in whatever way."""
        return not self.process.is_alive()

    def steps(self) -> int:
        """Lines of metrics."""
        file = self.out / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.is_file() else 0

    def phase(self) -> str:
        """What the driver does, by its latest lines."""
        if self.ended() and self.process.exitcode == 0:
            return "ended"
        phase = PHASES[0]
        for line in self.said():
            phase = next((p for start, p in _LINES.items() if f" s] {start}" in line), phase)
            if "; starting again from" in line:
                phase = PHASES[0]
        return "training" if phase == "evaluation before" and self.steps() else phase

    def position(self) -> tuple[int, int]:
        """How far the run is: phase and step."""
        return PHASES.index(self.phase()), self.steps()

    def said(self) -> list[str]:
        """The driver's lines since it was last started."""
        if not self.log.is_file():
            return []
        with self.log.open("rb") as file:
            file.seek(self._seen)
            return file.read().decode("utf-8", "replace").splitlines()

    def time_phases(self) -> dict[str, float]:
        """Wait for the end; seconds of each phase, of training per step."""
        began, seconds = time.monotonic(), dict.fromkeys(PHASES, 0.0)
        while not self.ended():
            now, phase = time.monotonic(), self.phase()
            seconds[phase] += now - began
            began = now
            time.sleep(0.02)
        if self.process.exitcode:
            raise SystemExit(f"{self.out.name} failed without a kill: see {self.log}")
        seconds["training"] /= self.steps()
        return seconds

    def fingerprint(self) -> dict[str, object]:
        """What must be equal bit for bit: model, scores, and metrics without times and memory."""
        rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text("utf-8").splitlines()]
        files = [*(self.out / "model").rglob("*"), *(self.out / "evaluation").rglob("results.json")]
        return {
            "metrics": [{k: v for k, v in row.items() if k not in ("timing", "memory")} for row in rows],
            "report": (self.out / "report.html").is_file(),
            **{
                file.relative_to(self.out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
                for file in sorted(files)
                if file.is_file()
            },
        }


def marked() -> list[psutil.Process]:
    """Processes started by watched runs that are still there, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if MARK in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def shared_memory(before: set[Path]) -> list[str]:
    """New files in shared memory that no process has mapped: nobody will remove them."""
    new = {str(path) for path in Path("/dev/shm").iterdir()} - {str(path) for path in before}
    for maps in Path("/proc").glob("[0-9]*/maps") if new else ():
        try:
            text = maps.read_text("utf-8", "replace")
        except OSError:
            continue
        new = {path for path in new if path not in text}
    return sorted(new)
