"""The tiers of tests: listed files exist, and a test is in the tier that its file and marks say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiers


@pytest.mark.parametrize("name", tiers.FAST)
def test_listed_files_exist(name: str) -> None:
    assert (Path(__file__).parent / name).exists()


def test_marks_take_a_test_out_of_the_fast_tier() -> None:
    assert tiers.tier("math/test_forms.py", set()) == "fast"
    assert tiers.tier("math/test_forms.py", {"slow"}) == "all"
    assert tiers.tier("training/test_run.py", {"parametrize"}) == "local"
    assert tiers.tier("training/test_new.py", {"ray"}) == "all"


def test_this_test_is_fast(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("fast") is not None
