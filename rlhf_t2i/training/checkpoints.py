"""Checkpoints of a run: whole or absent, verified by a manifest; the newest and the best by reward are retained."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.errors import UsageError, option
from rlhf_t2i.recipe.schema import Checkpoints
from rlhf_t2i.roles.trained import TrainedRole
from rlhf_t2i.training.state import TRAINED_ROLES, TrainState
from rlhf_t2i.utils import files, manifest

_NAME = re.compile(r"step_(\d+)(?:_round_(\d+))?")


def name_of(state: TrainState) -> str:
    """``step_000123``, in the middle of a cycle ``step_000123_round_004``."""
    return f"step_{state.step:06d}" + (f"_round_{state.round:03d}" if state.round else "")


class Writing:
    """A checkpoint that a thread completes while training goes on.

    Args:
        path: The checkpoint.
        complete: What is left to do.

    Attributes:
        seconds: How long that took; None until it is done.
    """

    def __init__(self, path: Path, complete: Callable[[], None]) -> None:
        self.path, self._complete = path, complete
        self.seconds: float | None = None
        self._error: BaseException | None = None
        # It ends with the process: a second signal does not wait for it.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            self._complete()
        except BaseException as error:  # raised where it is waited for
            self._error = error
        self.seconds = time.perf_counter() - began

    def wait(self) -> Path:
        """Wait until it is whole.

        Raises:
            RunError: The disk is full or the folder cannot be written; the last whole checkpoint is intact.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.path

    def check(self) -> float | None:
        """Raise what :meth:`wait` would, if it has ended; returns :attr:`seconds`."""
        if self.seconds is not None:
            self.wait()
        return self.seconds


def begin(
    cluster: Cluster,
    out: Path,
    state: TrainState,
    policy: Checkpoints,
    also: Callable[[Path], None] = lambda folder: None,
) -> Writing:
    """Copy the state of a run to memory and start to write a checkpoint; older ones are pruned when it is whole.

    Args:
        cluster: The roles.
        out: The run's folder; no other checkpoint is being written in it.
        state: Of the run.
        policy: Which checkpoints are kept.
        also: Writes more into the checkpoint's folder, at once.

    Raises:
        RunError: The disk is full or the folder cannot be written; the last whole checkpoint is intact.
    """
    target = out / "checkpoints" / name_of(state)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        files.sync_folder(out)
        files.remove_unfinished(target.parent)
        with ExitStack() as unfinished:
            folder = unfinished.enter_context(files.atomic_dir(target))
            for role in TRAINED_ROLES.values():
                (folder / role).mkdir()
                cluster.call_all(role, TrainedRole.save, str(folder / role))
            also(folder)
            rest = unfinished.pop_all()
    content = {"state": state.to_json(), "reward": state.mean_reward()}

    def complete() -> None:
        with _explained(target):
            with rest:
                for role in TRAINED_ROLES.values():
                    cluster.finish_saving(role)
                manifest.write(folder, **content)
            _prune(out, target, policy)

    return Writing(target, complete)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise files.not_written(Path(error.filename or target.parent), error.strerror) from error


def _prune(out: Path, target: Path, policy: Checkpoints) -> None:
    """Remove all but the newest and the best. Those newer than ``target`` are damaged: the run resumed before them."""
    present = _newest_first(out)
    older = present[present.index(target) :]
    retained = {*older[: policy.keep]}
    if policy.keep_best:
        retained |= {*best(older)}
    for folder in present:
        if folder not in retained:
            files.remove(folder)


def best(folders: Sequence[Path]) -> list[Path]:
    """The checkpoint with the highest reward, of equals the newest; [] if none has a reward.

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
    """The folders that :func:`name_of` can name; a copy under another name is neither read nor pruned."""
    found = {folder: _NAME.fullmatch(folder.name) for folder in (out / "checkpoints").glob("step_*")}
    # As numbers: as text a millionth step would sort before the second.
    when = {folder: (int(name[1]), int(name[2] or 0)) for folder, name in found.items() if name}
    return sorted(when, key=lambda folder: when[folder], reverse=True)


def find(out: Path) -> tuple[Path | None, TrainState, list[str]]:
    """The newest whole checkpoint of a run with its state, and a warning about each damaged one that is newer.

    Before the first checkpoint the path is None and the state is the initial one: every draw is a function of seed and
    step, so starting again loses only time.

    Raises:
        UsageError: All are damaged.
    """
    warnings: list[str] = []
    files.recover(out / "checkpoints")
    for folder in _newest_first(out):
        try:
            return folder, _verified(folder), [f"{warning}; using an older one" for warning in warnings]
        except ValueError as damage:
            warnings.append(f"checkpoint {folder.name} is damaged ({damage})")
    if not warnings:
        return None, TrainState(), []
    raise UsageError(f"{option('resume')}: {out} holds no whole checkpoint; " + "; ".join(warnings))


def _verified(folder: Path) -> TrainState:
    """The state in a checkpoint.

    Raises:
        ValueError: A file of it is missing or has changed, or the folder bears another checkpoint's name.
    """
    damage = manifest.damage(folder)
    if damage is not None:
        raise ValueError(damage)
    state = TrainState.from_json(manifest.read(folder).get("state"))
    if folder.name != name_of(state):
        raise ValueError(f"it holds {name_of(state)}")
    return state


def restore(cluster: Cluster, folder: Path) -> list[str]:
    """Load a checkpoint into the trained roles; returns a message for each saved with another layout of ranks."""
    messages = [cluster.call_all(role, TrainedRole.load, str(folder / role))[0] for role in TRAINED_ROLES.values()]
    return [message for message in messages if message]
