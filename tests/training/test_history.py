"""What a resumed run goes on from beside its checkpoint: whole, cut short by a kill, or damaged. No training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.training import history
from rlhf_t2i.training.folder import RunFolder
from rlhf_t2i.training.state import TrainState

DONE = TrainState(step=3)


def rows(*steps: int) -> list[str]:
    return [json.dumps({"step": step, "reward/r": 0.5, "timing": {"step": 1.0}, "mfu": None}) for step in steps]


def metrics(tmp_path: Path, *lines: str | bytes, end: bytes = b"\n") -> history.History:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + end)
    return history.metrics(path, DONE)


@pytest.mark.parametrize("rest", [[], rows(4), rows(4, 6), ['{"step": 4, "rew'], [bytes(40)], [*rows(4), b"\xff\xfe"]])
def test_rows_after_the_checkpoint_are_dropped(rest: list[str | bytes], tmp_path: Path) -> None:
    found = metrics(tmp_path, *rows(1, 2, 3), *rest, end=b"" if rest else b"\n")
    assert [row["step"] for row in found.rows] == [1, 2, 3]
    damaged = bool(rest) and rest != rows(4) and rest != rows(4, 6)
    assert bool(found.messages) == damaged
    if damaged:
        assert f"(from line {3 + len(rest)})" in found.messages[0]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([*rows(1, 2)], "has no row of step 3"),
        ([*rows(1, 3)], "has no row of step 2"),
        ([""], "has no row of step 3"),
        (['{"step": 1, "rew', *rows(2, 3)], "line 1 is damaged"),
        ([*rows(1), bytes(40), *rows(2, 3)], "line 2 is damaged"),
        ([*rows(1, 2), '{"step": 3, "reward/r": "0.5"}'], "has no row of step 3"),
        ([*rows(1, 2), '{"step": "3"}', *rows(3)], "line 3 is damaged"),
        ([*rows(1), '{"step": 2, "timing": {"step": [1]}}', *rows(3)], "line 2 is damaged"),
        ([*rows(1), '{"step": true}', *rows(3)], "line 2 is damaged"),
        ([*rows(2, 1, 3)], r"line 2 \(step 1\) is out of order"),
        ([*rows(1, 2, 2, 3)], r"line 3 \(step 2\) is out of order"),
        ([*rows(1, 2, 4, 3)], r"line 4 \(step 3\) is out of order"),
    ],
)
def test_damage_before_the_checkpoint_is_refused(lines: list[str | bytes], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"^--resume: \S+metrics\.jsonl {words}.*remove it to go on without"):
        metrics(tmp_path, *lines)


def test_a_removed_file_begins_again_and_says_so(tmp_path: Path) -> None:
    assert "begins again with step 4" in history.metrics(tmp_path / "metrics.jsonl", DONE).messages[0]
    assert history.metrics(tmp_path / "metrics.jsonl", TrainState()) == history.History()
    assert [row["step"] for row in metrics(tmp_path, *rows(2, 3)).rows] == [2, 3]  # the next resume after that


EVENT = '{"step": 2, "after": [1, 1], "text": "t"}'
WATCHED = '{"step": 0, "reward": [0.5, null], "signals": {"diversity": [1.0]}}'


@pytest.mark.parametrize(
    ("file", "whole", "damaged"),
    [
        ("events.jsonl", EVENT, EVENT.replace("[1, 1]", "[1]")),
        ("events.jsonl", EVENT, EVENT.replace('"t"', "5")),
        ("evaluation/watch.jsonl", WATCHED, WATCHED.replace("0.5", '"0.5"')),
        ("evaluation/watch.jsonl", WATCHED, WATCHED.replace("0.5", "0.5, {}")),
    ],
)
def test_damaged_rows_of_other_logs_are_refused(file: str, whole: str, damaged: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.evaluation.mkdir()
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows(1, 2, 3)) + "\n")
    (tmp_path / file).write_text(f"{whole}\n{damaged}\n")
    (told,) = [text for text in history.check(folder, DONE) if "removed" in text]  # of a step after the checkpoint?
    assert "(from line 2)" in told
    (tmp_path / file).write_text(f"{damaged}\n{whole}\n")
    with pytest.raises(UsageError, match=rf"{file} line 1 is damaged"):
        history.check(folder, DONE)


def test_a_damaged_record_or_evaluation_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.evaluation.mkdir()
    folder.run.write_text('{"seconds": "long"}')
    with pytest.raises(UsageError, match=r"run\.json is damaged \(seconds\): remove it"):
        history.check(folder, TrainState())
    folder.run.write_bytes(bytes(100))
    with pytest.raises(UsageError, match=r"run\.json is damaged \(not valid JSON\)"):
        history.check(folder, TrainState())
    folder.run.unlink()
    (folder.evaluation / "before").mkdir()
    (folder.evaluation / "before/results.json").write_text("{")
    assert history.check(folder, TrainState()) == []  # measured again
    with pytest.raises(UsageError, match=r"before/results\.json is damaged"):
        history.check(folder, DONE)
