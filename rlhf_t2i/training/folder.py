"""The folder a run writes: where everything is, and what is recorded about the run itself."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.utils import files
from rlhf_t2i.utils.jsonl import read_json

_PACKAGES = ("rlhf-t2i", "torch", "deepspeed", "ray", "diffusers", "transformers")


class RunFolder:
    """Paths of a run's outputs.

    Args:
        path: The run's folder.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.path = path.resolve()
        except (OSError, RuntimeError) as error:  # a loop of links
            raise UsageError(f"--out {path} cannot be used: {first_line(error)}") from None
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.evaluation = self.path / "evaluation"
        self.model = self.path / "model"
        self.failures = self.path / "failures"
        self.run = self.path / "run.json"
        self.inputs = self.path / "inputs.json"

    def create(self, recipe: Recipe) -> None:
        """Make the folder and write the resolved recipe.

        Raises:
            UsageError: The folder holds another run, or cannot be written.
        """
        if self.recipe.exists():
            raise UsageError(f"{self.path} already holds a run: continue it with --resume, or choose another --out")
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.evaluation.mkdir(exist_ok=True)
            files.write_json(self.inputs, _inputs(recipe))
            files.write_text(self.recipe, reading.dump(recipe))
        except OSError as error:
            self.discard()
            raise UsageError(f"--out {self.path} cannot be written: {error.strerror}") from None

    def discard(self) -> None:
        """Take back what :meth:`create` wrote for a run that never started; anything else in the folder stays."""
        for file in (self.recipe, self.inputs, self.path / files.LOCK):
            file.unlink(missing_ok=True)
        for folder in (self.samples, self.evaluation, self.path):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def revisions(self) -> dict[str, str]:
        """The commits of hub models that the run here has used so far.

        Raises:
            UsageError: There is no run here.
        """
        if not self.recipe.is_file():
            raise UsageError(f"--resume: {self.path} holds no run")
        return reading.load(self.recipe).revisions

    def compare_recipe(self, recipe: Recipe, allow_change: bool = False) -> list[str]:
        """Compare the recipe of a run that is resumed, and its prompts, with those it began with.

        Args:
            recipe: The recipe given now.
            allow_change: Accept changes that make the rest of the run another one than its beginning.

        Returns:
            Every difference, as ``key (old -> new)``, or ``key (the file's content)``.

        Raises:
            UsageError: A change means another run; the differences are listed.
        """
        changed = self._changes(recipe)
        refused = [name for name in changed if not _harmless(name)]
        if refused and not allow_change:
            raise UsageError(
                f"--resume: the recipe has changed since the run began: {', '.join(refused)}; "
                "undo the change, or accept it with --allow-recipe-change"
            )
        return changed

    def update_recipe(self, recipe: Recipe, step: int) -> None:
        """Make a changed recipe the run's own; ``recipe_changes.jsonl`` keeps what changed at which step."""
        changed = self._changes(recipe)
        if not changed:
            return
        files.append_line(self.path / "recipe_changes.jsonl", {"step": step, "changed": changed})
        files.write_json(self.inputs, _inputs(recipe))
        files.write_text(self.recipe, reading.dump(recipe))

    def _changes(self, recipe: Recipe) -> list[str]:
        changed = _differences(reading.load(self.recipe).model_dump(), recipe.model_dump())
        before = read_json(self.inputs)
        edited = [key for key, digest in _inputs(recipe).items() if before.get(key, digest) != digest]
        return changed + [f"{key} (the file's content)" for key in edited]

    @contextmanager
    def record(self, recipe: Recipe, command: str) -> Iterator[None]:
        """Write run.json when the block ends well: versions, git revision, seed, times and cost."""
        began, clock = datetime.now(UTC), time.monotonic()
        yield
        placement = recipe.placement
        groups = [[name, g.devices, g.roles] for name, g in placement.groups.items()]
        files.write_json(
            self.run,
            {
                "versions": {package: version(package) for package in _PACKAGES}
                | {"python": platform.python_version()},
                "git": _git_revision(),
                "seed": recipe.seed,
                "started": began.isoformat(timespec="seconds"),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 1),
                "device": _device(),
                "placement": groups if placement.mode == "ray" else [["local", 1, ["all"]]],
                "command": command,
            },
        )


_HARMLESS = ("logging.", "checkpoints.", "steps", "placement.max_restarts", "placement.step_timeout_s")
"""Changing these does not change what the steps already done mean."""


def _harmless(difference: str) -> bool:
    """A revision that was not known before takes nothing back."""
    return difference.startswith(_HARMLESS) or (difference.startswith("revisions.") and "(None ->" in difference)


def _inputs(recipe: Recipe) -> dict[str, str]:
    """Digests of the prompt files: their order makes every draw, and the recipe only says where they are."""
    paths = {"data.prompts": recipe.data.prompts, "data.held_out": recipe.data.held_out}
    return {key: files.sha256(Path(path)) for key, path in paths.items() if path}


def _differences(old: object, new: object, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in {**old, **new}:
            found += _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return found
    return [] if old == new else [f"{name} ({old} -> {new})"]


def _git_revision() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _device() -> str:
    import os

    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {os.cpu_count()} cores"
