"""Checkpoints of a run: whole or absent, verified by a manifest, pruned but for the newest and the best by reward."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.schema import Checkpoints
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.utils import files, manifest

TRAINED_ROLES = ("learner", "assistant")
_NAME = re.compile(r"step_(\d+)(?:_round_(\d+))?")


def folder_of(out: Path, state: TrainState) -> Path:
    """``checkpoints/step_000123``, with the round appended in the middle of a cycle."""
    suffix = f"_round_{state.round:03d}" if state.round else ""
    return out / "checkpoints" / f"step_{state.step:06d}{suffix}"


def save(cluster: Cluster, out: Path, state: TrainState, policy: Checkpoints) -> Path:
    """Write a checkpoint and prune old ones.

    Raises:
        RunError: The disk is full or the folder cannot be written; the last whole checkpoint is intact.
    """
    target = folder_of(out, state)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        files.sync_folder(out)
        files.remove_unfinished(target.parent)
        with files.atomic_dir(target) as folder:
            for role in TRAINED_ROLES:
                (folder / role).mkdir()
                cluster.call_all(role, "save", str(folder / role))
            manifest.write(folder, state=state.to_json(), reward=state.mean_reward())
        _prune(out, target, policy)
    except OSError as error:
        raise files.not_written(Path(error.filename or target.parent), error.strerror) from error
    return target


def _prune(out: Path, target: Path, policy: Checkpoints) -> None:
    """Remove all but the newest and the best; what is newer than ``target`` was passed over, being damaged."""
    present = _newest_first(out)
    older = present[present.index(target) :]
    kept = {*older[: policy.keep]}
    if policy.keep_best:
        kept |= {*best(older)}
    for folder in present:
        if folder not in kept:
            files.remove(folder)


def best(folders: Sequence[Path]) -> list[Path]:
    """The checkpoint with the highest reward, of equals the newest; none where none has a reward.

    Args:
        folders: Checkpoints, the newest first.
    """
    rewards = {folder: _reward(folder) for folder in folders}
    known = {folder: reward for folder, reward in rewards.items() if reward is not None and math.isfinite(reward)}
    return [max(known, key=lambda folder: known[folder])] if known else []


def _reward(folder: Path) -> float | None:
    try:
        reward = manifest.read(folder).get("reward")
    except (OSError, ValueError):
        return None
    return reward if isinstance(reward, int | float) else None


def _newest_first(out: Path) -> list[Path]:
    """What :func:`folder_of` names; a copy under another name is neither read nor pruned."""
    found = {folder: _NAME.fullmatch(folder.name) for folder in (out / "checkpoints").glob("step_*")}
    # As numbers: as text a millionth step would sort before the second.
    when = {folder: (int(name[1]), int(name[2] or 0)) for folder, name in found.items() if name}
    return sorted(when, key=lambda folder: when[folder], reverse=True)


def find(out: Path) -> tuple[Path | None, TrainState, list[str]]:
    """The newest whole checkpoint of a run, and a sentence about each damaged one passed over.

    Before the first one it is None, and the progress the beginning: every draw is a function of seed and step, so that
    starting again loses time and nothing else.

    Raises:
        UsageError: All are damaged.
    """
    warnings: list[str] = []
    files.recover(out / "checkpoints")
    for folder in _newest_first(out):
        damage = _damage(folder)
        if damage is None:
            return folder, TrainState.from_json(manifest.read(folder).get("state")), warnings
        warnings.append(f"checkpoint {folder.name} is damaged ({damage}); using an older one")
    if not warnings:
        return None, TrainState(), []
    raise UsageError(f"--resume: {out} holds no whole checkpoint; " + "; ".join(warnings))


def _damage(folder: Path) -> str | None:
    found = manifest.damage(folder)
    if found is None:
        try:
            TrainState.from_json(manifest.read(folder).get("state"))
        except ValueError:
            return f"{manifest.NAME} cannot be read"
    return found


def restore(cluster: Cluster, folder: Path) -> list[str]:
    """Load a checkpoint into the trained roles; returns a sentence for each that had another layout of ranks."""
    said = [cluster.call_all(role, "load", str(folder / role))[0] for role in TRAINED_ROLES]
    return [sentence for sentence in said if sentence]
