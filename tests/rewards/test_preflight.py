"""Shipped rewards refuse by configuration files, before a run starts, what their weights could not mend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import features
from rlhf_t2i.plugins import registry
from tests.rewards import builders

Write = Callable[[Path], None]
OF = {"name": "pickscore"}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """The files of a CLIPModel beside its weights."""
    folder = tmp_path / "clip"
    builders.write_processor(folder)
    builders.clip_config().save_pretrained(folder)
    return folder


def edit(file: str, **keys: object) -> Write:
    def write(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys), "utf-8")

    return write


def refuse(name: str, **options: Any) -> str:
    cls = registry.load_class(registry.REWARDS, name)
    with pytest.raises(UsageError) as caught:
        cls.preflight(registry.parse_options(cls, name, options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def options(name: str, clip: Path) -> dict[str, Any]:
    if name == "surrogate":
        return {"of": {"name": "clip", "options": {"model": str(clip)}}, "features": str(clip)}
    return {"model": str(clip)}


DAMAGE: list[tuple[Write, str]] = [
    (edit("config.json", model_type="siglip"), "is no CLIPModel: its config.json has the model_type 'siglip'"),
    (edit("config.json", vision_config=[1]), "config.json is damaged"),
    (edit("preprocessor_config.json", crop_size={"height": 30, "width": 30}), "makes 30 x 30 pixels, but the model"),
    (edit("preprocessor_config.json", do_pad=True), "do_pad is not supported"),
    (lambda folder: (folder / "preprocessor_config.json").unlink(), "holds no image processor"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
]


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic", "surrogate"])
@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=[words for _, words in DAMAGE])
def test_a_damaged_clip_is_refused_by_every_reward_on_one(name: str, damage: Write, words: str, clip: Path) -> None:
    chosen = options(name, clip)
    if name == "pickscore":  # with its own processor: what lacks one gets the published one
        chosen["processor"] = str(clip)
    damage(clip)
    assert words in refuse(name, **chosen)


def test_a_whole_clip_passes(clip: Path) -> None:
    for name in ("clip", "pickscore"):
        cls = registry.load_class(registry.REWARDS, name)
        cls.preflight(registry.parse_options(cls, name, options(name, clip)))
    features.check(str(clip))
    edit("preprocessor_config.json", crop_size=30)(clip)
    with pytest.raises(UsageError, match=r"^--features: .*makes 30 x 30 pixels"):
        features.check(str(clip))


def test_the_features_of_a_surrogate_are_checked_beside_its_scorer(clip: Path, tmp_path: Path) -> None:
    builders.write_processor(tmp_path / "other")
    (tmp_path / "other/config.json").write_text('{"model_type": "vit"}')
    of = {"name": "clip", "options": {"model": str(clip)}}
    assert "other is no CLIPModel" in refuse("surrogate", of=of, features=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hpsv2", "holds none of: HPS_v2.1_compressed.pt"), ("image_reward", "holds none of: ImageReward.pt"),
        ("hpsv3", "holds none of: HPSv3.safetensors"), ("vlm_choice", "has no config.json"),
    ],
)  # fmt: skip
def test_an_empty_folder_is_refused(name: str, words: str, tmp_path: Path) -> None:
    assert words in refuse(name, model=str(tmp_path))


def test_a_cache_of_scores_that_cannot_be_is_refused(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {**options("surrogate", clip), "cache": True}
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1/cache")
    assert "reward 'surrogate': its cache /proc/1/cache/rlhf-t2i cannot be written" in refuse("surrogate", **chosen)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "rlhf-t2i").mkdir()
    (tmp_path / "rlhf-t2i/scores.sqlite").write_text("no database" * 100)
    assert "scores.sqlite is no file of scores (file is not a database): remove it" in refuse("surrogate", **chosen)
