"""Ray's own errors, many lines long, become one sentence, and those of a dead process a restart."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from rlhf_t2i.cluster import clients
from rlhf_t2i.errors import ProcessLost, RunError

EXCEPTIONS = ray.exceptions


@pytest.mark.parametrize(
    ("raised", "expected", "sentence"),
    [
        (EXCEPTIONS.OutOfMemoryError("1 worker(s) were killed\nConsidered workers: [\n..."), ProcessLost,
         "a process of the learner died: 1 worker(s) were killed"),
        (EXCEPTIONS.OutOfDiskError("Local disk is full\nThe object cannot be created\n"), RunError,
         "Ray's object store is full, and so is the disk it spills to, while the learner worked (Local disk is full)"),
        (EXCEPTIONS.GetTimeoutError("Get timed out\nmore"), clients.NoAnswer, "the learner did not answer within 5 s"),
    ],
)  # fmt: skip
def test_one_sentence(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception], sentence: str
) -> None:
    def get(_references: Any, timeout: float) -> None:
        raise raised

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(expected) as caught:
        clients.get([], 5.0, "learner")
    assert type(caught.value) is expected
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
