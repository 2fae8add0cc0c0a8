"""SIGTERM in every phase of a run, and two runs at once in one folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray

from rlhf_t2i.cluster import connect
from rlhf_t2i.errors import RunError, Stopped, UsageError
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import checkpoints, run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.interrupts import SIGNALS, SignalHandler
from tests.training.test_run import metrics, model_bytes

MakeRecipe = Callable[..., Recipe]


class At(TrainCallback):
    """Does something once when a phase begins."""

    def __init__(self, phase: str, act: Callable[[], Any]) -> None:
        self._phase, self._act = phase, act
        self.acted = False

    def on_phase(self, text: str) -> None:
        if not self.acted and text.startswith(self._phase):
            self.acted = True
            self._act()


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_any_phase_loses_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(steps=1)
    run.run(recipe, tmp_path / "whole")
    phases: dict[str, tuple[signal.Signals, str | None]] = {
        "starting the roles": (signal.SIGTERM, None),
        "measuring before training: 4 of 8": (signal.SIGXCPU, "step_000000"),  # ulimit -t
        "measuring after training: 4 of 8": (signal.SIGTERM, "step_000001"),
        "writing the model": (signal.SIGUSR1, "step_000001"),  # sbatch --signal=USR1@120
    }
    for phase, (number, newest) in phases.items():
        handler = signal.getsignal(number)
        out, callback = tmp_path / phase, At(phase, partial(signal.raise_signal, number))
        told = "continue with --resume" if newest else "nothing was written"
        with pytest.raises(Stopped, match=f"stopped by {number.name}; .*{told}") as stopped:
            run.run(recipe, out, callback=callback)
        assert stopped.value.exit_code == 128 + number
        assert signal.getsignal(number) is handler
        if newest is None:
            assert not out.exists()  # as if the command had never been given
            run.run(recipe, out)
        else:
            assert checkpoints.find(out)[0] == out / "checkpoints" / newest, phase
            assert not list(out.glob(".writing-*"))
            run.run(recipe, out, resume=True)
        assert model_bytes(out) == model_bytes(tmp_path / "whole"), phase
        assert metrics(out) == metrics(tmp_path / "whole"), phase
        for name in ("evaluation/before/results.json", "evaluation/after/results.json"):
            assert (out / name).is_file(), (phase, name)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_inner_of_two_handlers_waits_for_its_block(number: signal.Signals) -> None:
    """The command has one around the run's own."""
    with SignalHandler(TrainCallback()), SignalHandler(TrainCallback()) as inner, inner.deferred():
        signal.raise_signal(number)
    assert inner.requested == number


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_a_signal_that_is_ignored_or_anothers_stays_so(number: signal.Signals) -> None:
    heard = list[int]()
    for handler in (signal.SIG_IGN, lambda number, _: heard.append(number)):
        before = signal.signal(number, handler)
        try:
            with SignalHandler(TrainCallback()) as signals, signals.deferred():
                signal.raise_signal(number)
            assert signals.requested is None
        finally:
            signal.signal(number, before)
    assert heard == [number]


def test_a_second_signal_ends_a_run_at_once(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def twice() -> None:
        terminate()
        terminate()

    with pytest.raises(Stopped) as stopped:
        run.run(make_recipe(), tmp_path / "out", callback=At("measuring after", twice))
    assert (stopped.value.exit_code, stopped.value.repeated) == (143, True)
    assert checkpoints.find(tmp_path / "out")[1].step == 3


EXITS = """
from rlhf_t2i_plugins.divergences.l2 import L2

class Exits(L2):
    def derivative(self, delta):
        raise {what}
"""


@pytest.mark.parametrize(
    ("what", "says"),
    [("SystemExit(0)", r"exits\.py:6 called sys\.exit\(0\)"), ("GeneratorExit", "raised GeneratorExit")],
)
def test_a_plugin_cannot_end_a_run_as_if_it_had_succeeded(
    make_recipe: MakeRecipe, tmp_path: Path, what: str, says: str
) -> None:
    plugin = tmp_path / "exits.py"
    plugin.write_text(EXITS.format(what=what), "utf-8")
    with pytest.raises(RunError, match=f"{says} during the run"):
        run.run(make_recipe(algorithm__divergence=f"{{name: '{plugin}:Exits'}}"), tmp_path / "out")


def test_a_plugin_cannot_end_a_process_of_ray(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Ray takes SystemExit in an actor for a wish of its own, and the run would start again three times."""
    from rlhf_t2i.cluster.actor import WorkerActor
    from rlhf_t2i.roles.learner import LearnerRole

    class Exits:
        roles: ClassVar = {"learner": LearnerRole.__new__(LearnerRole)}

        def call(self, role: str, method: str, *args: Any) -> Any:
            sys.exit(0)

    actor = WorkerActor.__new__(WorkerActor)
    actor._built = Exits()
    with pytest.raises(RunError, match=r"called sys\.exit\(0\) during the run"):
        actor.call("learner", "step")


def test_signals_are_left_alone_under_nohup_and_outside_the_main_thread(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hang_up = At("measuring after", lambda: signal.raise_signal(signal.SIGHUP))
        with ThreadPoolExecutor() as pool:
            pool.submit(run.run, make_recipe(steps=1), tmp_path / "thread", callback=hang_up).result()
        assert hang_up.acted
        hang_up = At("measuring after", lambda: signal.raise_signal(signal.SIGHUP))
        run.run(make_recipe(steps=1), tmp_path / "main", callback=hang_up)
        assert hang_up.acted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_holds_one_run_at_a_time(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, out = make_recipe(steps=1), tmp_path / "out"

    def again() -> None:
        for resume in (True, False):
            with pytest.raises(UsageError, match="another run works in this folder"):
                run.run(recipe, out, resume=resume)

    callback = At("measuring after", again)
    run.run(recipe, out, callback=callback)
    assert callback.acted
    run.run(recipe, out, resume=True)  # the lock ended with the run


@pytest.mark.parametrize("stop", ["", "while Ray starts"])
def test_ray_leaves_sigterm_to_the_run(monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    """Its own handler exits with code 15, and nothing is written."""
    heard = list[int]()
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    ours = signal.getsignal(signal.SIGTERM)

    def init(*args: Any, **more: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        if stop:
            terminate()

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    try:
        if stop:
            with pytest.raises(SystemExit):
                connect.start_local_ray(1)
        else:
            connect.start_local_ray(1)
        assert signal.getsignal(signal.SIGTERM) is ours
        assert heard == ([signal.SIGTERM] if stop else [])
    finally:
        signal.signal(signal.SIGTERM, before)
