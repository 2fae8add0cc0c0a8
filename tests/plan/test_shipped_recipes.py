"""``rlhf-t2i plan`` on every shipped recipe, as text and as JSON, offline, and on variants of two of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rlhf_t2i.commands import plan as command
from rlhf_t2i.recipe import header
from tests import tiny

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = sorted(p for p in RECIPES.rglob("*.yaml") if not p.name.startswith(("ablation", "table")))
FOR_A_CPU = ("quickstart.yaml", "quickstart_flow.yaml", "black_box.yaml", "distill.yaml", "distill_flow.yaml")
WITH_PROMPTS = (*FOR_A_CPU, "ocr.yaml")
"""Recipes whose prompts ship; others get some."""
LORA = "{rank: 4}"
VARIANTS = {
    "recomputed": ["optimization.gradient_checkpointing=true"],
    "adapters": [f"optimization.generator.lora={LORA}", f"optimization.assistant.lora={LORA}"],
    "kl": ["algorithm.divergence.name=kl"],
    "outer guidance": ["algorithm.cfg.mode=outer"],
    "four steps": ["student={steps: 4}"],
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of prompts, beside one of held-out ones."""
    folder = tmp_path_factory.mktemp("prompts")
    tiny.make_prompts(folder, "held_out.txt", start=24, count=8)
    return str(tiny.make_prompts(folder))


def plan(path: Path, prompts: str | None, *arguments: str) -> str:
    app = typer.Typer()
    app.command()(command.plan_command)
    given = []
    if prompts and path.name not in WITH_PROMPTS:
        given = [f"--set=data.prompts={prompts}", f"--set=data.held_out={Path(prompts).with_name('held_out.txt')}"]
    ran = CliRunner().invoke(app, [str(path), *given, *arguments])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def name(path: Path) -> str:
    return str(path.relative_to(RECIPES))


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_every_shipped_recipe_is_planned_as_its_header_says(path: Path, prompts: str) -> None:
    said = header.read(path)
    device = said.planned["device"] if said.planned else "h100"
    text = plan(path, prompts, "--device", device)
    assert text.startswith("Whole run, ")
    assert "GPU-hours" in text.splitlines()[0]
    assert "note:" not in text, "a network was not counted"
    data = json.loads(plan(path, prompts, "--device", device, "--json"))
    assert all(data["parts"].values())
    assert data["run"].get("result") == said.result
    assert (said.planned is None) == (path.name in FOR_A_CPU)
    if said.planned is None:
        return
    assert said.result, "what to expect, and whose result that is"
    figures = {
        "devices": data["devices"],
        "hours": data["run"]["hours"],
        "gpu_hours": data["run"]["gpu_hours"],
        "memory": max(group["memory"]["device"] for group in data["groups"]) / 1e9,
        "disk": data["run"]["disk"]["total"] / 1e9,
    }
    for key, value in figures.items():
        assert float(said.planned[key]) == pytest.approx(value, rel=0.1), key


def test_a_recipe_says_what_to_expect(prompts: str) -> None:
    text = plan(RECIPES / "sd15/sim.yaml", prompts)
    assert "  result, as the recipe says: nobody's yet: no paper publishes this setting" in text


def test_headers_are_read_as_far_as_the_comment_goes(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("# A title.\n# Result: ours,\n#   over two lines.\nsteps: 1\n# Result: not this\n", "utf-8")
    assert header.read(file) == header.Header(None, "ours, over two lines.")
    file.write_text("steps: 1\n", "utf-8")
    assert header.read(file) == header.Header()


@pytest.mark.parametrize("path", [RECIPES / "quickstart.yaml", RECIPES / "sd15/di_star_pickscore.yaml"], ids=name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_planned(path: Path, variant: str, prompts: str) -> None:
    plain = json.loads(plan(path, prompts, "--device", "h100", "--json"))
    sets = [f"--set={value}" for value in VARIANTS[variant]]
    text = plan(path, prompts, "--device", "h100", *sets)
    assert text.startswith("Whole run, ")
    found = json.loads(plan(path, prompts, "--device", "h100", "--json", *sets))

    def peak(data: dict) -> int:
        return max(group["memory"]["device"] for group in data["groups"])

    step, before = found["seconds"]["step"], plain["seconds"]["step"]
    if variant == "recomputed":
        assert peak(found) < peak(plain)
        assert step > before
    elif variant == "adapters":
        assert peak(found) < peak(plain)
        assert found["run"]["disk"]["checkpoint"] < 0.2 * plain["run"]["disk"]["checkpoint"]
    else:
        assert (step > before) == (variant == "four steps")
