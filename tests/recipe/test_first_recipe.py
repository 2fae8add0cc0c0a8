"""``rlhf-t2i init``: the recipe it writes is read back as meant, and a mistake leaves no file."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_t2i.cli import app
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.export import StudentFile
from rlhf_t2i.recipe import placement, reading
from rlhf_t2i.tools import first_recipe
from rlhf_t2i.tools.first_recipe import Wanted


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with prompts."""
    (tmp_path / "my prompts.txt").write_text("a cat\na dog\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wanted(reference: str, **changes: object) -> Wanted:
    values = {"generator": None, "prompts": "./my prompts.txt", "held_out": None, "rewards": ("pickscore",), "steps": 1}
    return Wanted(reference=reference, **(values | changes))  # type: ignore[arg-type]


def test_of_the_small_models(folder: Path) -> None:
    arguments = [
        "init", "sub/my first.yaml", "--reference", "emoji64:reference", "--generator", "emoji64:generator",
        "--reward", "pickscore=emoji64:pickscore", "--prompts", "my prompts.txt",
        "--held-out", "emoji64:prompts/held_out.txt",
    ]  # fmt: skip
    (folder / "sub").mkdir()
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "rlhf-t2i run 'sub/my first.yaml'" in shown.stdout
    text = (folder / "sub/my first.yaml").read_text("utf-8")
    assert "prompts: ../my prompts.txt" in text  # relative to the recipe, not to where the command ran
    recipe = reading.load(folder / "sub/my first.yaml")
    assert recipe.data.prompts == str(folder / "my prompts.txt")
    assert recipe.models.generator.endswith("emoji64/generator")
    assert recipe.algorithm.rewards[0].scale == 100  # the paper's, for a cosine
    assert recipe.optimization.precision == "fp32"  # 6 M parameters
    assert text.count("#") > 15
    assert [path.name for path in (folder / "sub").iterdir()] == ["my first.yaml"]


@pytest.mark.parametrize(
    ("reference", "steps", "guidance", "convention", "adapters"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", 1, 5.0, "omega", False),
        ("stabilityai/stable-diffusion-3.5-medium", 4, 7.0, "omega", False),
        ("Tongyi-MAI/Z-Image", 4, 5.0, "one_plus", True),
        ("black-forest-labs/FLUX.1-dev", 1, 1.0, "omega", True),
    ],
)
def test_defaults_by_family_and_size(
    reference: str, steps: int, guidance: float, convention: str, adapters: bool, folder: Path
) -> None:
    first_recipe.write(Path("r.yaml"), wanted(reference, steps=steps))
    recipe = reading.load("r.yaml")
    placement.check_placement(recipe)
    assert recipe.student.steps == steps
    assert (recipe.algorithm.cfg.guidance_scale, recipe.algorithm.cfg.convention) == (guidance, convention)
    assert (recipe.optimization.generator.lora is not None) is adapters
    assert recipe.optimization.precision == "bf16"


def test_the_steps_of_an_exported_generator(folder: Path, tiny_sdxl: Path) -> None:
    shutil.copytree(tiny_sdxl, folder / "student")
    exported = StudentFile(timesteps=[999, 499], transition="deterministic", input="unit", height=64, width=64)
    (folder / "student/student.json").write_text(exported.model_dump_json())
    first_recipe.write(Path("r.yaml"), wanted(str(tiny_sdxl), generator="student", steps=None))
    student = reading.load("r.yaml").student
    assert (student.timesteps, student.transition) == ([999, 499], "deterministic")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": "./nowhere"}, "no such model"),
        ({"reference": "emoji64:generator"}, "model_index.json"),
        ({"generator": "emoji64:judge"}, "models.generator"),
        ({"rewards": ("pickscor",)}, "did you mean 'pickscore'"),
        ({"rewards": ("http=x",)}, "http"),
        ({"prompts": "none.txt"}, "no such prompt file"),
        ({"held_out": "none.txt"}, "no such prompt file"),
        ({"held_out": "my prompts.txt"}, "data.held_out: 2 of its prompts are in data.prompts, too"),
        ({"reference": ""}, "--reference is empty"),
        ({"reference": "org/\x1b[2Jname"}, "reference: must hold no control characters"),
        ({"generator": ""}, "--generator is empty"),
        ({"held_out": ""}, "--held-out is empty"),
        ({"rewards": ("clip", "clip")}, r"^r\.yaml, line \d+: .*two rewards are called 'clip'"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_file(changes: dict[str, object], words: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        first_recipe.write(Path("r.yaml"), wanted(**({"reference": "emoji64:reference"} | changes)))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["my prompts.txt"]


def test_nothing_but_its_own_lines_is_printed(folder: Path) -> None:
    """Imported in a process of its own, transformers advises packages that no recipe needs."""
    asked = ["init", "r.yaml", "--reference", "emoji64:reference", "--prompts", "my prompts.txt"]
    command = [sys.executable, "-c", "from rlhf_t2i.cli import app; app()", *asked]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("wrote r.yaml")


def test_a_recipe_is_never_overwritten(folder: Path) -> None:
    (folder / "r.yaml").write_text("mine")
    with pytest.raises(UsageError, match=r"r\.yaml exists"):
        first_recipe.write(Path("r.yaml"), wanted("emoji64:reference"))
    assert (folder / "r.yaml").read_text() == "mine"


@pytest.mark.parametrize("text", ["./a b", "emoji64:judge", "1e5", "a: b", "öl, 'q' #x", "[x", "yes", "null", "a{b}"])
def test_quoting_reads_back(text: str) -> None:
    assert reading.parse_value(f"{{name: {reading.quoted(text)}, scale: 1}}", "here") == {"name": text, "scale": 1}
    assert reading.parse_value(f"name: {reading.quoted(text)}  # note", "here") == {"name": text}
