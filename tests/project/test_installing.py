"""Installing: torch and torchvision that do not match are refused, and what the files say about versions agrees."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

import pytest
import yaml
from typer.testing import CliRunner

import rlhf_t2i
from rlhf_t2i.cli import app
from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import versions
from tests.project.pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    versions.check_torchvision.cache_clear()
    yield
    versions.check_torchvision.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, torch: str, torchvision: str, needs: list[str] | None) -> None:
    """These versions are installed."""
    monkeypatch.setattr(versions, "version", {"torch": torch, "torchvision": torchvision}.__getitem__)
    monkeypatch.setattr(versions, "requires", lambda name: needs)


@pytest.mark.parametrize(
    ("torch", "torchvision", "needs"),
    [
        ("2.13.0", "0.28.0", ["numpy", "torch==2.13.0", "pillow!=8.3.*"]),
        ("2.13.0+cpu", "0.28.0+cpu", ["torch==2.13.0"]),
        ("2.13.0+cpu", "0.28.0", ["torch==2.13.0"]),
        ("2.15.0.dev20261101+cu130", "0.30.0.dev20261101+cu130", ["torch==2.15.0.dev20261101"]),
        ("2.13.0a0+git12", "0.28.0a0", ["torch"]),  # built from source: pins nothing
        ("2.13.0", "0.28.0", None),
    ],
)
def test_what_matches(torch: str, torchvision: str, needs: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch, torchvision, needs)
    versions.check_torchvision()


@pytest.mark.parametrize(
    ("torch", "torchvision", "words"),
    [
        (
            "2.13.0+cpu",
            "0.29.1",
            r"torchvision 0\.29\.1 is for torch==2\.14\.1, but torch 2\.13\.0\+cpu is installed: pip",
        ),
        ("2.14.1+cpu", "0.29.1+cu130", "are of different builds: pip install 'torch==2.14.1.cpu' torchvision"),
    ],
)
def test_what_does_not_is_one_sentence(
    torch: str, torchvision: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, torch, torchvision, ["torch==2.14.1"])
    for call in (lambda: rlhf_t2i.train("x.yaml"), lambda: rlhf_t2i.load("x"), lambda: rlhf_t2i.reward("pickscore")):
        with pytest.raises(UsageError, match=words):
            call()
    ended = CliRunner().invoke(app, ["run", "x.yaml"]).exception
    assert isinstance(ended, UsageError)  # which the command line prints, with exit code 2
    assert re.search(words, str(ended))
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0
    assert CliRunner().invoke(app, ["--version"]).exit_code == 0


def test_the_weekly_job_has_the_lowest_torch() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/torch.yml").read_text("utf-8"))["jobs"]["test"]
    (lowest,) = (text.removeprefix("torch>=") for text in PROJECT["dependencies"] if text.startswith("torch>="))
    assert job["strategy"]["matrix"]["torch"] == [f"torch=={lowest}.*", "torch"]
    assert 'make "TORCH=${{ matrix.torch }}" test' in [step.get("run") for step in job["steps"]]


def test_the_page_names_every_extra_and_the_lowest_torch() -> None:
    page = (ROOT / "docs/install.md").read_text("utf-8")
    named = {
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall("`([^`]+)`", line.split("|")[1])
    }
    assert named == set(PROJECT["optional-dependencies"])
    assert "torch 2.11 is the lowest" in page
    assert "torch>=2.11" in PROJECT["dependencies"]
