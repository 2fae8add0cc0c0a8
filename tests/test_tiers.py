"""The tiers of tests: listed files exist, and a test is in the tier that its file and marks say."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests import conftest, tiers


@pytest.mark.parametrize("name", tiers.FAST)
def test_listed_files_exist(name: str) -> None:
    assert (Path(__file__).parent / name).exists()


def test_marks_take_a_test_out_of_the_fast_tier() -> None:
    assert tiers.tier("math/test_forms.py", set()) == "fast"
    assert tiers.tier("math/test_forms.py", {"slow"}) == "all"
    assert tiers.tier("training/test_run.py", {"parametrize"}) == "local"
    assert tiers.tier("training/test_new.py", {"ray"}) == "all"


class Node:
    """A worker of pytest-xdist that only notes which tests it is given."""

    def __init__(self, tests: list[str]) -> None:
        self.tests, self.given = tests, list[str]()
        self.gateway, self.shutting_down = argparse.Namespace(id="a worker"), False

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += [self.tests[index] for index in indices]

    def shutdown(self) -> None:
        """Nothing more comes."""


def test_the_two_streams_of_ray_start_first(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the longest work: one that starts late ends when all else has ended."""
    loadscope = pytest.importorskip("xdist.scheduler.loadscope")
    monkeypatch.setattr(loadscope, "parse_tx_spec_config", lambda config: [None] * 3)
    first, second = "tests/training/test_distributed.py::test_a", "tests/training/test_restore.py::test_b"
    tests = [*(f"tests/math/test_forms.py::test_{number}" for number in range(99)), "tests/x.py::test_c", first, second]
    option = argparse.Namespace(loadscopereorder=True)
    config = argparse.Namespace(rootpath=request.config.rootpath, option=option)
    monkeypatch.setattr(conftest, "_starts_ray", lambda file, test: file.parent.name == "training")
    log = pytest.importorskip("xdist.remote").Producer("test", enabled=False)
    scheduler = conftest.pytest_xdist_make_scheduler(config, log)
    nodes = [Node(tests) for _ in range(3)]
    for node in nodes:
        scheduler.add_node(node)
    for node in nodes:
        scheduler.add_node_collection(node, tests)
    scheduler.schedule()
    assert [node.given[0] for node in nodes] == [first, second, tests[0]]


def test_this_test_is_fast(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("fast") is not None
