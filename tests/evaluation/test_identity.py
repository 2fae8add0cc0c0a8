"""The digests of what results depend on."""

from __future__ import annotations

import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import identity
from rlhf_t2i.plugins import registry
from rlhf_t2i.utils import fingerprints


@pytest.fixture
def switching():
    """Every garbage collection, also one inside the parser, lets another thread run."""

    def callback(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    before = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(50)
    yield
    gc.set_threshold(*before)
    gc.callbacks.remove(callback)


def test_threads_may_parse_at_once(switching):
    """Python's parser before 3.11.8 and 3.12.2 fails where two threads use it; the ablation digests in threads."""
    sources = [f"import a{number}\n".encode() + b"x = [1, (2, 3)]\n" * 200 for number in range(64)]
    identity._imports.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(identity._imports, sources)) == [(f"a{number}",) for number in range(64)]


def test_imports_are_found_at_any_depth():
    source = b"import a, b.c\ndef f():\n    from .d import e\n    from g import h\n"
    assert identity._imports(source) == ("a", "b.c", "d", "d.e", "g", "g.h")
    assert identity._imports(b"not python") == ()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", ["pipe", "/dev/zero"])
def test_what_never_ends_is_not_read(place: str, tmp_path: Path) -> None:
    """Cases G.8: a reward's option that names a pipe or a device hung the run before it had begun."""
    os.mkfifo(tmp_path / "pipe")
    path = str(tmp_path / place)
    for read in (fingerprints.of_path, identity._of_value):
        with pytest.raises(UsageError, match="is a pipe or a device: name a file or folder"):
            read(path)


def test_the_code_of_a_scorer_inside_a_surrogate_counts(tmp_path: Path) -> None:
    scorer = tmp_path / "scorer.py"
    code = "from rlhf_t2i.plugins import Reward\n\nclass Mine(Reward):\n    differentiable = False\n"
    scorer.write_text(code, "utf-8")
    options = {"of": {"name": f"{scorer}:Mine"}}
    before = identity.of_plugin(registry.REWARDS, "surrogate", options)
    assert identity.of_plugin(registry.REWARDS, "surrogate", options) == before
    scorer.write_text(code + "    unit = 'points'\n", "utf-8")
    assert identity.of_plugin(registry.REWARDS, "surrogate", options) != before
