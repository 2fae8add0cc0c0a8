"""Finding a model's family: broken packages stop only those who use them, two families for one pipeline are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import registry, sources
from rlhf_t2i.families.base import Family
from rlhf_t2i.families.unet import SDXLFamily
from rlhf_t2i.plugins import registry as plugins
from tests.toy.toy_family import ToyFamily


class Distribution:
    def __init__(self, name: str) -> None:
        self.name, self.version = name, "1.0"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that packages are installed; each registers a family of its own name."""
    real, entries = plugins.entry_points, []
    module = ModuleType("a_strangers_module")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [*real(group=group), *(entries if "fam" in group else [])]
    )

    def add(name: str, value: Any, package: str = "toy-family") -> None:
        setattr(module, f"{name}_{len(entries)}", value)
        entry = EntryPoint(name, f"{module.__name__}:{name}_{len(entries)}", registry.GROUP)
        entries.append(entry._for(Distribution(package)))  # type: ignore[arg-type]

    return add


def model(folder: Path, name: Any) -> sources.ModelRef:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}), "utf-8")
    return sources.parse(str(folder))


def test_an_installed_family_is_found(install: Callable[..., None], tmp_path: Path) -> None:
    install("toy", ToyFamily)
    assert type(registry.find(model(tmp_path, "ToyPipeline"))) is ToyFamily
    assert type(registry.find(model(tmp_path, "StableDiffusionXLPipeline"))) is SDXLFamily


class Part(Family):
    name = "part"
    pipelines = ("ToyPipeline",)


class NoTuple(ToyFamily):
    pipelines = "ToyPipeline"  # type: ignore[assignment]


BROKEN = {
    "is not a subclass of rlhf_t2i.families.base.Family": 5,
    'pipelines must be a tuple, ("MyPipeline",)': NoTuple,
    "does not define build_decoder, build_network, build_text_encoders, check, ": Part,
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_family_stops_only_those_who_use_it(
    problem: str, install: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf_t2i.commands.families import list_families

    install("toy", BROKEN[problem])
    assert type(registry.find(model(tmp_path, "StableDiffusionXLPipeline"))) is SDXLFamily
    with pytest.raises(UsageError) as refused:
        registry.find(model(tmp_path, "ToyPipeline"))
    assert "'ToyPipeline' is no pipeline of a known model family; known: " in str(refused.value)
    assert f"'toy' of package toy-family {problem}" in str(refused.value)
    list_families()
    assert problem.split("(")[0] in " ".join(capsys.readouterr().out.split())


def test_a_family_whose_import_fails_or_exits_is_named(
    install: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exits_at_once.py").write_text("import sys\nsys.exit(0)\n", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    install("toy", ToyFamily)
    entry = EntryPoint("gone", "exits_at_once:Family", registry.GROUP)._for(Distribution("p"))  # type: ignore[arg-type]
    inner = plugins.entry_points
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*inner(group=group), entry])
    assert type(registry.find(model(tmp_path, "ToyPipeline"))) is ToyFamily
    with pytest.raises(UsageError, match="'gone' of package p cannot be imported"):
        registry.find(model(tmp_path, "OtherPipeline"))


def test_two_families_for_one_pipeline_are_refused(install: Callable[..., None], tmp_path: Path) -> None:
    install("toy", ToyFamily, "package-a")
    install("other", ToyFamily, "package-b")
    with pytest.raises(UsageError, match=r"'other' of package package-b and 'toy' of package package-a: uninstall"):
        registry.find(model(tmp_path, "ToyPipeline"))
    install("toy", ToyFamily, "package-c")
    with pytest.raises(UsageError, match="'toy' of package package-a and package-c is registered twice"):
        registry.find(model(tmp_path, "AnotherPipeline"))


@pytest.mark.parametrize("name", [None, 5, ["ToyPipeline"], {"a": 1}, "toypipeline"])
def test_names_of_other_kinds_are_refused(name: Any, install: Callable[..., None], tmp_path: Path) -> None:
    install("toy", ToyFamily)
    with pytest.raises(UsageError, match="known: "):
        registry.find(model(tmp_path, name))
