"""Training and evaluation compute what they computed when golden.json was recorded (before the package was moved)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import golden
from tests.golden.cases import CASES, Inputs

KEPT = {name: case for name, case in CASES.items() if not case.by_hand}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    made = Inputs(tmp_path_factory.mktemp("golden")).make()
    assert golden.inputs_digest(made) == golden.read()["inputs"], "the tiny models are others than those recorded"
    return made


def check(name: str, inputs: Inputs, out: Path) -> None:
    comparison = golden.compare(golden.read(), name, CASES[name].run(inputs, out))
    print(comparison)
    assert not comparison.faults, str(comparison)


@pytest.mark.parametrize("name", [name for name, case in KEPT.items() if not case.ray])
def test_in_one_process(name: str, inputs: Inputs, tmp_path: Path) -> None:
    check(name, inputs, tmp_path / name)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in KEPT.items() if case.ray])
def test_over_two_ranks(ray_instance: None, name: str, inputs: Inputs, tmp_path: Path) -> None:
    check(name, inputs, tmp_path / name)
