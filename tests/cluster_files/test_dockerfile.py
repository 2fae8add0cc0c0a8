"""The Dockerfile: what hadolint says, and whether it copies and pins what the repository has."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text("utf-8")
INSTRUCTIONS = [
    re.split(r"\s+", line, maxsplit=1)
    for line in re.sub(r"^\s*#.*\n", "", TEXT.replace("\\\n", " "), flags=re.MULTILINE).splitlines()
    if line.strip()
]


def of(name: str) -> list[str]:
    """The arguments of every instruction of a name."""
    return [arguments for instruction, arguments in INSTRUCTIONS if instruction == name]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed: the extra dev")
    done = subprocess.run([hadolint, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_it_copies_is_there_and_not_ignored() -> None:
    copied = [source for arguments in of("COPY") for source in arguments.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == kept
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    # All that the wheel is built from.
    assert {*project["tool"]["setuptools"]["package-dir"].values(), *project["project"]["license-files"]} <= kept


def test_versions_agree_with_the_rest() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"--tag rlhf-t2i:{version} ." in TEXT
    job = yaml.safe_load((ROOT / "examples/cluster/kuberay.yaml").read_text())["spec"]["rayClusterSpec"]
    pods = [job["headGroupSpec"], *job["workerGroupSpecs"]]
    assert {pod["template"]["spec"]["containers"][0]["image"] for pod in pods} == {f"rlhf-t2i:{version}"}
    assert f"docker-daemon:rlhf-t2i:{version})" in (ROOT / "examples/cluster/slurm.sbatch").read_text()
    (torch,) = (argument.removeprefix("TORCH=") for argument in of("ARG"))
    assert torch in (ROOT / "Makefile").read_text()  # the release that the tests run on
    assert all("-c constraints.txt" in run for run in of("RUN") if "pip install" in run)


def test_it_runs_without_root_and_torch_is_never_replaced() -> None:
    assert of("USER") == ["10001"]
    installs = [run for run in of("RUN") if "pip install" in run]
    assert "/opt/torch.txt" in installs[0].split(">")[-1]
    assert all("-c /opt/torch.txt" in run for run in installs[1:])
    assert len(of("FROM")) == 1
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-devel-ubuntu[\d.]+", of("FROM")[0])
