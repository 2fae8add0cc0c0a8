"""``placement: local``: a call that hangs ends the run, which names it and keeps its last checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_t2i.errors import RunError
from rlhf_t2i.plugins import time_limit
from rlhf_t2i.plugins.time_limit import limited
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import checkpoints, run
from tests.limits import HANG_S
from tests.training.test_run import metrics, model_bytes

MakeRecipe = Callable[..., Recipe]
# Its third call hangs, as a scoring service that stops answering does, for as long as the file is there. It says so in
# another file, with which the limits' time begins.
SLOW = """
import time
from pathlib import Path
from rlhf_t2i.plugins import {base}

def wait():
    while Path({file!r}).exists():
        Path({file!r} + "s").touch()
        try:
            time.sleep(30)
        except Exception:
            pass  # a retry that takes every error for one of the network

class Slow({base}):
    calls = 0

    def {method}:
        self.calls += 1
        if self.calls > 2:
            wait()
        return {value}
"""
REWARD = {"base": "Reward", "method": "score(self, images, prompts)", "value": "images.mean((1, 2, 3))"}
LATENT = {
    "base": "LatentReward",
    "method": "score_latents(self, latents, prompts, context)",
    "value": "latents.mean((1, 2, 3))",
}


def write(folder: Path, **parts: str) -> tuple[Path, Path]:
    """The plugin, and the file that makes it hang."""
    plugin, switch = folder / "slow.py", folder / "hang"
    plugin.write_text(SLOW.format(file=str(switch), **parts), "utf-8")
    switch.touch()
    return plugin, switch


@pytest.fixture(autouse=True)
def limits_begin_with_the_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a call that does not hang may take longer than a limit of half a second."""

    class Timer(threading.Timer):
        def run(self) -> None:
            while not (self.finished.is_set() or (tmp_path / "hangs").exists()):
                self.finished.wait(0.02)
            super().run()

    monkeypatch.setattr(threading, "Timer", Timer)


@pytest.mark.parametrize("parts", [REWARD, LATENT], ids=["images", "latents"])
def test_a_reward_that_hangs_is_named_and_the_run_goes_on_from_its_checkpoint(
    make_recipe: MakeRecipe, tmp_path: Path, parts: dict[str, str]
) -> None:
    plugin, switch = write(tmp_path, **parts)
    settings = f"[{{name: '{plugin}:Slow', label: slow, timeout_s: 0.5}}]"
    recipe = make_recipe(algorithm__rewards=settings, checkpoints__every=1, evaluation__images=2)
    with pytest.raises(RunError) as error:
        run.run(recipe, tmp_path / "out")
    assert str(error.value).startswith(
        "reward 'slow' did not return within 0.5 s (timeout_s of slow); it was at slow.py:"
    )
    newest = checkpoints.find(tmp_path / "out")[0]
    assert newest is not None
    switch.unlink()
    (tmp_path / "hangs").unlink()
    run.run(recipe, tmp_path / "out", resume=True)
    run.run(recipe, tmp_path / "whole")
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")


def test_a_step_that_hangs_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    plugin, _ = write(tmp_path, **REWARD)
    recipe = make_recipe(
        algorithm__rewards=f"[{{name: '{plugin}:Slow'}}]",
        placement="{mode: local, step_timeout_s: 0.5}",
        evaluation__images=2,
    )
    sentence = r"learner\.step did not return within 0\.5 s \(placement\.step_timeout_s\); it was at slow\.py:"
    with pytest.raises(RunError, match=sentence):
        run.run(recipe, tmp_path / "out")


def test_a_call_that_no_signal_interrupts_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, codes = threading.Event(), list[int]()

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(time_limit, "_GRACE_S", 0.05)
    monkeypatch.setattr("os._exit", leave)

    def wait_in_native_code() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG})
        (tmp_path / "hangs").touch()
        try:
            assert ended.wait(HANG_S)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGURG})

    with pytest.raises(RunError, match="the call did not return"), limited("the call", 0.05, "key"):
        wait_in_native_code()
    assert codes == [1]
    assert "the call did not return within 0.05 s (key)" in capsys.readouterr().err


def test_the_innermost_limit_that_is_exceeded_is_named_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "hangs").touch()
    with limited("outer", HANG_S, "a"), pytest.raises(RunError, match=r"inner .* \(b\)"), limited("inner", 0.02, "b"):
        threading.Event().wait(HANG_S)
    with pytest.raises(RunError, match="outer"), limited("outer", 0.02, "a"), limited("inner", HANG_S, "b"):
        threading.Event().wait(HANG_S)
    assert time_limit._limits == []


def test_a_limit_that_is_exceeded_after_its_call_interrupts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    exceeded = list[Callable[[], None]]()

    class Late(threading.Timer):
        def start(self) -> None:
            exceeded.append(self.function)

    monkeypatch.setattr(threading, "Timer", Late)
    with limited("quick", 0.02, "a"):
        pass
    (exceed,) = exceeded
    exceed()
    threading.Event().wait(0.05)
    assert time_limit._limits == []


def test_ctrl_c_in_a_limited_call_is_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), limited("the call", HANG_S, "key"):
        raise KeyboardInterrupt
