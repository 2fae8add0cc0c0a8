"""A run pins the commits of its hub models, and goes on with them when a branch has moved."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import pins, sources
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import run
from rlhf_t2i.training.folder import RunFolder

MakeRecipe = Callable[..., Recipe]
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_sdxl: Path, tiny_clip: Path) -> Iterator[Path]:
    """The cache of a hub that cannot be reached, with a pipeline and a scorer at one commit."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, folder in (("sdxl", tiny_sdxl), ("scorer", tiny_clip)):
        repository = cache / f"models--tiny--{name}"
        shutil.copytree(folder, repository / "snapshots" / OLD)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(OLD, "utf-8")
    yield cache
    sources.use_revisions({})


def recipe_of(make_recipe: MakeRecipe, **more: object) -> Recipe:
    scorer = "[{name: pickscore, scale: 100, options: {model: tiny/scorer, processor: tiny/scorer}}]"
    return make_recipe(models__reference="tiny/sdxl", algorithm__rewards=scorer, steps=1, **more)


def test_a_run_pins_what_it_loads_and_a_moved_branch_changes_nothing(
    hub: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = recipe_of(make_recipe)
    run.run(recipe, out)
    pinned = reading.load(out / "recipe.yaml").revisions
    assert pinned == {"tiny/sdxl": OLD, "tiny/scorer": OLD}

    for repository in hub.iterdir():  # the branch now names a commit that is broken
        (repository / "refs" / "main").write_text(NEW, "utf-8")
        (repository / "snapshots" / NEW).mkdir()
    with pytest.raises(UsageError):
        run.run(recipe, tmp_path / "fresh")
    run.run(recipe.model_copy(update={"steps": 2}), out, resume=True)
    assert reading.load(out / "recipe.yaml").revisions == pinned

    with pytest.raises(UsageError, match=r"revisions.tiny/sdxl \(a+ -> b+\)"):
        RunFolder(out).compare_recipe(recipe_of(make_recipe, revisions=f"{{tiny/sdxl: {NEW}}}"))


def test_what_is_pinned(hub: Path, make_recipe: MakeRecipe) -> None:
    plain = make_recipe()
    assert pins.pin(plain).revisions == {}
    branch = make_recipe(models__reference="tiny/sdxl@main")
    assert pins.pin(branch).revisions == {"tiny/sdxl@main": OLD}
    assert sources.parse("tiny/sdxl@main").revision == OLD
    assert sources.parse("tiny/sdxl").revision is None
    exact = make_recipe(models__reference=f"tiny/sdxl@{OLD}")
    assert pins.pin(exact).revisions == {}
    assert sources.parse(exact.models.reference).revision == OLD


def test_a_revision_is_a_full_hash(make_recipe: MakeRecipe) -> None:
    with pytest.raises(UsageError, match="revisions"):
        make_recipe(revisions="{tiny/sdxl: main}")


def test_a_run_of_local_models_never_asks_the_hub(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "commit", lambda source: pytest.fail(f"asked for {source.location}"))
    assert pins.pin(make_recipe()).revisions == {}
    shipped = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    assert pins.pin(reading.load(shipped)).revisions == {}


def test_a_hub_that_cannot_be_reached_pins_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert sources.commit("tiny/sdxl", None) is None
