"""What a run tells of its progress where there is no terminal."""

from __future__ import annotations

import pytest

from rlhf_t2i.tools import progress
from rlhf_t2i.training.state import TrainState


def test_the_time_left_does_not_count_the_warm_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is part of the first step's seconds."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    with progress.TrainProgress(10) as shown:
        for step, seconds in enumerate((100.0, 2.0, 3.0), 1):
            shown.on_step(TrainState(step=step), {"step": step, "timing": {"step": seconds}})
    first, second, third = capsys.readouterr().err.splitlines()
    assert "step 1/10, 100.00 s/step" in first
    assert "step 2/10, 2.00 s/step, 16 s left" in second
    assert "step 3/10, 2.10 s/step, 15 s left" in third
