"""The two wheels: built, installed into an empty environment outside the repository, and used from an empty folder."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.project.pages import ROOT

SOURCES = ("rlhf_t2i", "plugins", "recipes", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
pytestmark = pytest.mark.slow


def build(source: Path, out: Path) -> Path:
    """A wheel of a folder, with the build tools of the running environment; no network."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--wheel-dir", str(out), str(source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheels of ``make release``, or of copies of the sources: building writes beside them."""
    if folder := os.environ.get("RLHF_T2I_WHEELS"):
        core, models = sorted(Path(folder).resolve().glob("*.whl"))
        return core, models
    copy = tmp_path_factory.mktemp("sources")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "zoo" / "emoji64", copy / "emoji64", ignore=ignore)
    out = tmp_path_factory.mktemp("wheels")
    return build(copy, out), build(copy / "emoji64", out)


class Installed:
    """An environment that holds the wheels and borrows the running one's other packages, and an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir()
        venv.EnvBuilder(with_pip=False, symlinks=True).create(folder / "venv")
        self.bin = folder / "venv" / "bin"
        self.packages = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
        # Plain paths: of the running environment's own .pth files none is read, so no editable install is seen.
        (self.packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")

    def install(self, wheel: Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet", "--no-deps",
                   "--ignore-installed", "--no-index", str(wheel)]  # fmt: skip
        subprocess.run(command, check=True, env=self._environment)

    @property
    def _environment(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(self, *arguments: str, code: int = 0) -> str:
        """What a command of the installed package prints, run in the empty folder."""
        command = [self.bin / "rlhf-t2i", *arguments]
        done = subprocess.run(command, cwd=self.work, env=self._environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    made = Installed(tmp_path_factory.mktemp("installed"))
    made.install(wheels[0])
    return made


def test_from_pip_to_a_picture(installed: Installed, wheels: tuple[Path, Path]) -> None:
    refused = installed.run("demo", code=2)
    assert refused.count("\n") == 1
    assert "pip install 'rlhf-t2i[demo]'" in refused
    assert list(installed.work.iterdir()) == []
    installed.install(wheels[1])

    few = ["steps=2", "placement=local", "optimization.batch_size=2", "logging.sample_count=2",
           "evaluation={images: 4, images_per_prompt: 2}"]  # fmt: skip
    printed = installed.run("demo", *(part for value in few for part in ("--set", value)))
    (run,) = (installed.work / "runs").iterdir()
    assert f"The run is in runs/{run.name}" in printed
    assert "pickscore (train)" in printed  # the table
    assert str(installed.packages) in (run / "recipe.yaml").read_text()
    assert str(ROOT) not in (run / "recipe.yaml").read_text()

    arguments = ["--prompts", "emoji64", "--limit", "2", "--metrics", "pickscore"]
    printed = installed.run("eval", f"runs/{run.name}", *arguments, "--set", "pickscore.model=emoji64:pickscore")
    assert "pickscore" in printed
    assert len(list((installed.work / "evaluations" / run.name / "images").iterdir())) == 2


def test_recipes_and_init(installed: Installed, wheels: tuple[Path, Path]) -> None:
    installed.install(wheels[1])
    listed = installed.run("recipes")
    names = {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in ROOT.glob("recipes/**/*.yaml")}
    assert {line.split()[0] for line in listed.split("\n\n")[0].splitlines()} == names
    installed.run("recipes", "copy", "emoji64/ablation_table2", "mine.yaml")
    assert (installed.work / "quickstart.yaml").read_bytes() == (ROOT / "recipes/quickstart.yaml").read_bytes()
    printed = installed.run(
        "init", "first.yaml", "--reference", "emoji64:reference", "--generator", "emoji64:generator",
        "--reward", "pickscore=emoji64:pickscore", "--prompts", "emoji64:prompts/train.txt",
    )  # fmt: skip
    assert "wrote first.yaml" in printed
    assert "reference: emoji64:reference" in (installed.work / "first.yaml").read_text()


def files(folder: Path, package: str) -> set[str]:
    """The files below a folder, as a wheel names them."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {
        f"{package}/{path.as_posix()}"
        for path in found
        if not any(part == "__pycache__" or part.endswith(".egg-info") for part in path.parts)
    }


def test_the_wheels_hold_what_they_should(wheels: tuple[Path, Path]) -> None:
    core, models = (
        {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} for wheel in wheels
    )
    folders = {"rlhf_t2i": "rlhf_t2i", "plugins": "rlhf_t2i_plugins", "recipes": "rlhf_t2i/recipes"}
    assert core == {name for folder, package in folders.items() for name in files(ROOT / folder, package)}
    about = {"rlhf_t2i_emoji64/LICENSE", "rlhf_t2i_emoji64/pyproject.toml"}  # the license is among the metadata
    assert models == files(ROOT / "zoo/emoji64", "rlhf_t2i_emoji64") - about


def test_metadata_agrees() -> None:
    core = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    models = tomllib.loads((ROOT / "zoo/emoji64/pyproject.toml").read_text("utf-8"))["project"]
    assert core["optional-dependencies"]["demo"] == [f"{models['name']}=={models['version']}"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"version: {core['version']}" in citation
    assert all(url in citation for url in core["urls"].values())
