"""The example package outside the source tree: pip installs it, it is listed, checked, trained with, and removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_t2i.plugins.environments import create_overlay

EXAMPLE = Path(__file__).parents[2] / "examples" / "rlhf-t2i-colorfulness"


class Environment:
    """An environment on top of this one, so that installing leaves the developer's own alone."""

    def __init__(self, folder: Path) -> None:
        self.python = create_overlay(folder / "overlay")
        self.folder = folder

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [str(self.python), *command], cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "rlhf_t2i.cli", *arguments)

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("example")
    made = Environment(folder)
    # A copy, so that the build leaves nothing in the checkout.
    subprocess.run(["cp", "-r", str(EXAMPLE), str(folder / "source")], check=True)
    made.pip("install", "--no-deps", "--no-build-isolation", "--no-index", str(folder / "source"))
    return made


@pytest.mark.slow
def test_it_is_listed_and_passes_the_check_and_its_own_tests(environment: Environment) -> None:
    listed = environment.cli("rewards", "list")
    assert listed.returncode == 0, listed.stderr
    rows = [line.split() for line in listed.stdout.splitlines()]
    # The name is shown whole; the package's own name folds in its column.
    assert any(row and row[0] == "colorfulness" and row[2] == "yes" for row in rows)
    checked = environment.cli("rewards", "check", "colorfulness", "-o", "sign=-1", "--size", "32")
    assert checked.returncode == 0, checked.stdout
    assert " 0 failed" in checked.stdout
    tests = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(environment.folder / "source"))
    assert tests.returncode == 0, tests.stdout


@pytest.mark.slow
def test_it_trains_in_a_recipe(environment: Environment, tiny_sdxl: Path, tiny_prompts: Path) -> None:
    recipe = environment.folder / "recipe.yaml"
    recipe.write_text(
        f"""
steps: 2
models: {{reference: {tiny_sdxl}, generator: {tiny_sdxl}, height: 16, width: 16}}
data: {{prompts: {tiny_prompts}}}
algorithm:
  rewards: [{{name: colorfulness, scale: 50, options: {{sign: -1}}}}]
optimization: {{batch_size: 2}}
placement: local
logging: {{sample_count: 2}}
evaluation: {{images: 4, images_per_prompt: 2, batch_size: 4}}
"""
    )
    run = environment.cli("run", str(recipe), "--out", str(environment.folder / "out"))
    assert run.returncode == 0, run.stdout + run.stderr
    steps = [json.loads(line) for line in (environment.folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) >= 2
    assert "colorfulness" in json.dumps(steps[-1])
    wrong = environment.cli("run", str(recipe), "--set", "algorithm.rewards.0.options.sing=1")
    assert wrong.returncode == 2
    assert "colorfulness" in wrong.stderr + wrong.stdout


@pytest.mark.slow
def test_it_uninstalls_cleanly(environment: Environment) -> None:
    environment.pip("uninstall", "--yes", "rlhf-t2i-colorfulness")
    listed = environment.cli("rewards", "list")
    assert listed.returncode == 0
    assert "colorfulness" not in listed.stdout
    assert not list(environment.folder.glob("overlay/lib/python*/site-packages/*colorfulness*"))
    used = environment.cli("rewards", "check", "colorfulness")
    assert used.returncode == 2
    assert "unknown reward 'colorfulness'" in used.stderr + used.stdout
