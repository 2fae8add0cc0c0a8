"""The folder of a run: its paths, its recipe, and the record of the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_t2i.errors import UsageError, first_line, option
from rlhf_t2i.evaluation import identity
from rlhf_t2i.recipe import mistakes, reading
from rlhf_t2i.recipe.mistakes import shown
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import provenance
from rlhf_t2i.utils import files, inputs, versions
from rlhf_t2i.utils.jsonl import read_json


class RunRecord(BaseModel):
    """``run.json``: where a run's result comes from, and what it took.

    Attributes:
        versions: Of packages.
        git: The commit of the checkout; "" outside one.
        seed: Of the recipe.
        started: UTC, ISO 8601.
        finished: The same.
        seconds: In between, of the last resume alone.
        device: For a person.
        placement: Name, devices and roles of each group.
        command: The command line.
    """

    model_config = ConfigDict(strict=True)

    versions: dict[str, str] = {}
    git: str | None = None
    seed: int | None = None
    started: str = ""
    finished: str = ""
    seconds: float | None = None
    device: str = "cpu"
    placement: list[tuple[str, int, list[str]]] = []
    command: str = ""

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """The record of a finished run; an empty one where there is none.

        Raises:
            UsageError: It is damaged.
        """
        if not path.exists():
            return cls()
        try:
            return cls.model_validate_json(inputs.read_bytes(path, "record of a run", inputs.CONFIG))
        except ValidationError as error:
            place = mistakes.place(error) or "not valid JSON"
            raise UsageError(f"{path} is damaged ({place}): remove it; the run writes it again at its end") from None


class RunFolder:
    """Paths of a run's outputs.

    Args:
        path: The run's folder.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.path = path.resolve()
        except (OSError, RuntimeError) as error:  # a loop of links
            raise UsageError(f"{option('out')} {path} cannot be used: {first_line(error)}") from None
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.evaluation = self.path / "evaluation"
        self.model = self.path / "model"
        self.failures = self.path / "failures"
        self.run = self.path / "run.json"
        self.inputs = self.path / "inputs.json"
        self.events = self.path / "events.jsonl"
        self.adapter = self.path / "adapter"

    def create(self, recipe: Recipe) -> None:
        """Create the folder and write the resolved recipe.

        Raises:
            UsageError: The folder holds another run, or cannot be written.
        """
        if self.recipe.exists():
            raise UsageError(
                f"{self.path} already holds a run: continue it with {option('resume')}, or choose another "
                f"{option('out')}"
            )
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.evaluation.mkdir(exist_ok=True)
            files.write_json(self.inputs, _inputs(recipe))
            files.write_text(self.recipe, reading.dump(recipe))
        except OSError as error:
            self.discard()
            raise UsageError(f"{option('out')} {self.path} cannot be written: {error.strerror}") from None

    def discard(self) -> None:
        """Remove what :meth:`create` wrote for a run that never started; other files in the folder stay."""
        for file in (self.recipe, self.inputs, self.path / files.LOCK):
            file.unlink(missing_ok=True)
        for folder in (self.samples, self.evaluation, self.path):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def revisions(self) -> dict[str, str]:
        """The commits of hub models that the run has used so far.

        Raises:
            UsageError: There is no run here.
        """
        if not self.recipe.is_file():
            raise UsageError(f"{option('resume')}: {self.path} holds no run")
        return reading.load(self.recipe).revisions

    def compare_recipe(self, recipe: Recipe, allow_change: bool = False) -> list[str]:
        """Compare a resumed run's recipe, files, plugins and packages with those it began with.

        Args:
            recipe: The recipe given now.
            allow_change: Accept changes of what is trained.

        Returns:
            Every difference, as ``key (old -> new)``, or ``key (content)`` of a file, model or plugin.

        Raises:
            UsageError: A change of what is trained; the message lists the differences.
        """
        changed = self._changes(recipe)
        refused = [name for name in changed if not _is_accepted(name)]
        if refused and not allow_change:
            raise UsageError(
                f"{option('resume')}: the recipe has changed since the run began: {', '.join(refused)}; "
                f"undo the change, or accept it with {option('allow-recipe-change')}"
            )
        return changed

    def update_recipe(self, recipe: Recipe, step: int) -> None:
        """Record a changed recipe as the run's; ``recipe_changes.jsonl`` records what changed at which step."""
        changed = self._changes(recipe)
        if not changed:
            return
        files.append_line(self.path / "recipe_changes.jsonl", {"step": step, "changed": changed})
        files.write_json(self.inputs, _inputs(recipe))
        files.write_text(self.recipe, reading.dump(recipe))

    def _changes(self, recipe: Recipe) -> list[str]:
        changed = _differences(reading.load(self.recipe).model_dump(), recipe.model_dump())
        before, now = self._recorded_inputs(), _inputs(recipe)
        if not all(isinstance(before.get(key), dict) for key in now):
            return [*changed, f"{self.inputs.name} (missing or damaged)"]
        changed += [key for key, digest in now["content"].items() if before["content"].get(key, digest) != digest]
        return changed + _differences(before["versions"], now["versions"], _VERSIONS)

    def _recorded_inputs(self) -> dict[str, Any]:
        """What :func:`_inputs` gave when the run began; {} where that is missing or damaged."""
        try:
            return read_json(self.inputs)
        except UsageError:
            return {}

    @contextmanager
    def record(self, recipe: Recipe, command: str) -> Iterator[None]:
        """Write run.json when the block succeeds: versions, git revision, seed, times and devices."""
        began, clock = datetime.now(UTC), time.monotonic()
        yield
        placement = recipe.placement
        groups = [(name, g.devices, [*g.roles]) for name, g in placement.groups.items()]
        record = RunRecord(
            versions=versions.computing(),
            git=provenance.git_revision(),
            seed=recipe.seed,
            started=began.isoformat(timespec="seconds"),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 1),
            device=provenance.device(),
            placement=groups if placement.mode == "ray" else [("local", 1, ["all"])],
            command=command,
        )
        files.write_json(self.run, record.model_dump())


def _inputs(recipe: Recipe) -> dict[str, dict[str, str]]:
    return {"content": identity.of_recipe(recipe), "versions": versions.computing()}


_VERSIONS = "versions"
_ACCEPTED = (
    f"{_VERSIONS}.", "logging.", "checkpoints.", "steps", "placement.max_restarts", "placement.step_timeout_s",
    "models.embeddings",
)  # fmt: skip
"""A change of these leaves the meaning of the steps already done as it is; versions are reported, not refused."""


def _is_accepted(difference: str) -> bool:
    """A revision that was unknown before changes nothing that was done."""
    return difference.startswith(_ACCEPTED) or (difference.startswith("revisions.") and "(None ->" in difference)


def _differences(old: object, new: object, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in {**old, **new}:
            found += _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [found for index, pair in pairs for found in _differences(*pair, f"{name}.{index}")]
    return [] if old == new else [f"{name} ({shown(str(old))} -> {shown(str(new))})"]
