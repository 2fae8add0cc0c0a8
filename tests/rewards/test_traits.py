"""No module asks for a plugin's name: a copy under another name is planned, counted and logged like the original."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import flops
from rlhf_t2i.plugins import registry, traits
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import plan as planning
from rlhf_t2i.tools.planning.speed import Measured, Passes
from tests import tiny

ROOT = Path(__file__).parents[2]


def copy(folder: Path, original: str, cls: str) -> str:
    """A shipped plugin's file under another name, as a recipe names it."""
    file = folder / "mine.py"
    text = (ROOT / "plugins" / original).read_text("utf-8")
    file.write_text(text.replace(f"class {cls}(", "class Mine("), "utf-8")
    return f"{file}:Mine"


def build(pipeline: Path, **algorithm: Any) -> Recipe:
    placement = {"mode": "ray", "groups": {"a": {"roles": ["learner", "generator", "reward"]},
                                           "b": {"roles": ["assistant", "reference"]}}}  # fmt: skip
    settings = {"gradient_checkpointing": True}
    data = tiny.recipe_dict(pipeline, Path("/nowhere"), algorithm=algorithm, placement=placement, optimization=settings)
    return Recipe.model_validate(data)


PARTS = ("network", "decoder", "reward:guide", "reward:pick")
SPEED = Measured(dict.fromkeys(PARTS, Passes(1.0, 1.0, 1.0)))


def everything(recipe: Recipe) -> tuple[Any, ...]:
    """All that planning and the FLOPs of metrics.jsonl say about a recipe."""
    work = [*flops.generator_step(recipe), *flops.assistant_step(recipe)]
    return work, planning.make(recipe), planning.step_time(recipe, SPEED)


def test_a_copy_of_kl_is_planned_and_counted_like_kl(tiny_sdxl: Path, tmp_path: Path) -> None:
    name = copy(tmp_path, "divergences/kl.py", "KL")
    original = everything(build(tiny_sdxl, divergence={"name": "kl"}, rewards=[]))
    assert everything(build(tiny_sdxl, divergence={"name": name}, rewards=[])) == original
    assert everything(build(tiny_sdxl, divergence={"name": "l2"}, rewards=[])) != original


def test_a_copy_of_cfg_implicit_is_planned_and_counted_like_it(tiny_sdxl: Path, tmp_path: Path) -> None:
    name = copy(tmp_path, "rewards/cfg_implicit.py", "CFGImplicit")
    rewards = [[{"name": n, "label": "guide", "scale": 2.0}] for n in ("cfg_implicit", name)]
    first, second = (everything(build(tiny_sdxl, rewards=chosen)) for chosen in rewards)
    assert first == second
    assert everything(build(tiny_sdxl, rewards=[])) != first


def test_a_copy_of_pickscore_is_planned_like_it(tiny_sdxl: Path, tiny_clip: Path, tmp_path: Path) -> None:
    name = copy(tmp_path, "rewards/pickscore.py", "PickScore")
    rewards = [
        [{"name": n, "label": "pick", "options": {"model": str(tiny_clip)}}] for n in ("pickscore", name)
    ]  # fmt: skip
    first, second = (everything(build(tiny_sdxl, rewards=chosen)) for chosen in rewards)
    assert first == second


def test_traits_of_a_recipe(tiny_sdxl: Path) -> None:
    algorithm = {
        "divergence": {"name": "kl"},
        "rewards": [{"name": "pickscore", "options": {"unit": "logit"}}, {"name": "cfg_implicit"}],
        "eval_rewards": [{"name": "http", "options": {"url": "http://127.0.0.1:1", "unit": "stars"}}],
    }
    found = traits.resolve(build(tiny_sdxl, **algorithm))
    assert (found.divergence.name, found.divergence.needs_vjp, found.divergence.order) == ("kl", False, 1)
    assert [(r.key, r.unit, r.trains, r.on_latents, r.plugin.differentiable) for r in found.rewards] == [
        ("pickscore", "logit", True, False, True),
        ("cfg_implicit", "x0 units^2", True, True, True),
        ("http", "stars", False, False, False),
    ]
    assert [r.key for r in found.trained_on_images] == ["pickscore"]
    assert found.reference_calls == 1
    assert found is traits.resolve(build(tiny_sdxl, **algorithm)), "resolved once"


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            {"rewards": [{"name": "http", "options": {"url": "http://127.0.0.1:1"}}]},
            "has no gradient: put it into eval_rewards, or let a surrogate learn it",
        ),
        ({"eval_rewards": [{"name": "cfg_implicit"}]}, "computed on latents beside the learner"),
        (
            {"divergence": {"name": "kl", "options": {"c": 1}}},
            "algorithm.divergence: divergence 'kl': unknown option 'c'; valid",
        ),
    ],
)
def test_what_cannot_be_resolved(algorithm: dict[str, Any], message: str, tiny_sdxl: Path) -> None:
    with pytest.raises(UsageError, match=message):
        traits.resolve(build(tiny_sdxl, **algorithm))


def names() -> set[str]:
    return {*registry.registered(registry.REWARDS), *registry.registered(registry.DIVERGENCES)}


def comparisons(text: str, known: set[str]) -> list[str]:
    """Comparisons with a plugin's name: ``x == "kl"``, ``x in ("kl", ...)``, ``case "kl"``, ``{"kl": ...}[x]``."""
    found = []
    for node in ast.walk(ast.parse(text)):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            parts = [key for key in node.value.keys if key]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            parts = list(node.args)
        constants = [c.value for part in parts for c in ast.walk(part) if isinstance(c, ast.Constant)]
        found += [f"line {node.lineno}: {c}" for c in constants if c in known]  # type: ignore[attr-defined]
    return found


def test_nobody_compares_with_a_plugins_name() -> None:
    known = names()
    assert {"kl", "cfg_implicit", "pickscore", "hpsv2"} <= known
    for file in sorted((ROOT / "rlhf_t2i").rglob("*.py")):
        assert comparisons(file.read_text("utf-8"), known) == [], file


def test_the_scan_sees_every_form() -> None:
    text = 'a == "kl"\nb in ("x", "kl")\n{"kl": 1}[c]\nmatch d:\n    case "kl":\n        pass\ne.startswith("kl")\n'
    lines = [int(re.findall(r"\d+", found)[0]) for found in comparisons(text, {"kl"})]
    assert sorted(lines) == [1, 2, 3, 5, 7]


def test_a_plugin_whose_traits_cannot_be_told_is_one_sentence(tiny_sdxl: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\nfrom rlhf_t2i.plugins import Reward\n"
        "class Mine(Reward):\n"
        "    @classmethod\n    def footprint(cls, options):\n        raise KeyError('size')\n"
        "    @classmethod\n    def hub_models(cls, options):\n        sys.exit(0)\n"
    )
    (reward,) = traits.resolve(build(tiny_sdxl, rewards=[{"name": f"{tmp_path}/mine.py:Mine"}])).rewards
    assert reward.key == "Mine"
    with pytest.raises(UsageError, match=r"its footprint cannot be told: mine.py:6: KeyError: 'size'"):
        _ = reward.footprint
    with pytest.raises(UsageError, match=r"its hub_models cannot be told: mine.py:9: called sys.exit\(0\)"):
        reward.hub_models()
