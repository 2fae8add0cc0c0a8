"""Checkpoints of a run: whole or absent, verified by a manifest, the oldest pruned."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlhf_t2i import files
from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.errors import RunError, UsageError

MANIFEST = "manifest.json"
TRAINED_ROLES = ("learner", "assistant")


@dataclass
class Progress:
    """Where a run stands; with the recipe's seed it determines every random draw to come.

    Attributes:
        step: Generator updates done.
        round: Assistant updates done in the current cycle (or warm-up).
        rounds: Assistant updates done in all.
        reports: What the rounds of the current cycle measured, for the next line of metrics.
        bad_steps: Updates of generator or assistant skipped in all, their gradients not being finite.
        bad_in_a_row: Those since the last good update.
    """

    step: int = 0
    round: int = 0
    rounds: int = 0
    reports: list[dict[str, float]] = field(default_factory=list)
    bad_steps: int = 0
    bad_in_a_row: int = 0


def folder_of(out: Path, progress: Progress) -> Path:
    """``checkpoints/step_000123``, with the round appended in the middle of a cycle."""
    suffix = f"_round_{progress.round:03d}" if progress.round else ""
    return out / "checkpoints" / f"step_{progress.step:06d}{suffix}"


def save(cluster: Cluster, out: Path, progress: Progress, keep: int) -> Path:
    """Write a checkpoint and prune old ones.

    Raises:
        RunError: The disk is full or the folder cannot be written; the last whole checkpoint is intact.
    """
    target = folder_of(out, progress)
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        with files.whole_folder(target) as folder:
            for role in TRAINED_ROLES:
                (folder / role).mkdir()
                cluster.call_all(role, "save", str(folder / role))
            entries = {
                str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            }
            files.write_json(folder / MANIFEST, {"progress": asdict(progress), "files": entries})
    except OSError as error:
        raise RunError(
            f"the checkpoint {target} could not be written: {error.strerror or error}; earlier ones are intact"
        ) from error
    for old in _newest_first(out)[keep:]:
        shutil.rmtree(old)
    return target


def _newest_first(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step_*"), reverse=True)


def find(out: Path) -> tuple[Path | None, Progress, list[str]]:
    """The newest whole checkpoint of a run, and a sentence about each damaged one passed over.

    Before the first one it is None, and the progress the beginning: every draw is a function of seed and step, so that
    starting again loses time and nothing else.

    Raises:
        UsageError: All are damaged.
    """
    warnings: list[str] = []
    for folder in _newest_first(out):
        damage = _damage(folder)
        if damage is None:
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
            return folder, Progress(**manifest["progress"]), warnings
        warnings.append(f"checkpoint {folder.name} is damaged ({damage}); using an older one")
    if not warnings:
        return None, Progress(), []
    raise UsageError(f"--resume: {out} holds no whole checkpoint; " + "; ".join(warnings))


def _damage(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        for name, entry in manifest["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"] or files.sha256(file) != entry["sha256"]:
                return f"{name} has changed"
        Progress(**manifest["progress"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


def restore(cluster: Cluster, folder: Path) -> None:
    """Load a checkpoint into the trained roles."""
    for role in TRAINED_ROLES:
        cluster.call_all(role, "load", str(folder / role))
