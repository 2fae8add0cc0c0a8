"""A finished run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.fake_run import make_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    out = tmp_path / "quickstart"
    out.mkdir()
    return make_run(out)
