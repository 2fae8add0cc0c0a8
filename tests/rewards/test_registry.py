"""Finding plugins: entry points, files, broken ones, two with one name, options, and what plugins may import."""

from __future__ import annotations

import ast
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_t2i.algorithm import losses
from rlhf_t2i.algorithm.schedules import VPSchedule
from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import listing, registry

ROOT = Path(__file__).parents[2]


class Distribution:
    def __init__(self, name: str) -> None:
        self.name, self.version = name, "1.0"


def entry(name: str, value: str, package: str, group: str = registry.REWARDS) -> EntryPoint:
    return EntryPoint(name, value, group)._for(Distribution(package))  # type: ignore[arg-type]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that more packages are installed."""

    def add(*entries: EntryPoint) -> None:
        real = registry.entry_points

        def found(group: str) -> list[EntryPoint]:
            return [*real(group=group), *(e for e in entries if e.group == group)]

        monkeypatch.setattr(registry, "entry_points", found)

    return add


def test_the_shipped_plugins_are_registered_like_anyones() -> None:
    rewards, divergences = registry.registered(registry.REWARDS), registry.registered(registry.DIVERGENCES)
    assert {"pickscore", "image_reward", "clip", "hpsv2", "aesthetic", "cfg_implicit", "http"} <= set(rewards)
    assert {"pseudo_huber", "l2", "kl"} <= set(divergences)
    assert {p.package for name in ("pickscore", "http") for p in rewards[name]} == {"rlhf-t2i"}


def test_every_shipped_reward_says_what_it_is() -> None:
    for name in ("pickscore", "image_reward", "clip", "hpsv2", "aesthetic", "cfg_implicit"):
        cls = registry.load_class(registry.REWARDS, name)
        assert cls.unit, name
        assert cls.license, name
        assert "icense" in (cls.__doc__ or "") or name == "cfg_implicit", name
        assert all(field.description for field in cls.Options.model_fields.values()), name


def test_a_reward_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from rlhf_t2i.plugins import Reward\n"
        "class Mine(Reward):\n    def score(self, images, prompts):\n        return images.mean((1, 2, 3))\n"
        "class NotOne:\n    pass\n"
    )
    assert registry.reward(f"{file}:Mine").score(torch.ones(2, 3, 4, 4), ["", ""]).tolist() == [1.0, 1.0]
    for name, message in [
        (f"{file}:Other", "mine.py defines no 'Other'"),
        (f"{file}:NotOne", "is not a subclass of rlhf_t2i.plugins.Reward"),
        (f"{tmp_path}/none.py:Mine", "no such file"),
    ]:
        with pytest.raises(UsageError, match=message):
            registry.reward(name)


def test_a_plugin_that_does_not_import_stops_only_those_who_use_it(install: Any) -> None:
    install(entry("broken", "a_module_that_is_not_there:Reward", "some-package"))
    assert registry.reward("cfg_implicit") is not None
    message = r"'broken' of package some-package cannot be imported: ModuleNotFoundError: No module named 'a_module"
    with pytest.raises(UsageError, match=message):
        registry.reward("broken")


def test_the_list_shows_a_broken_plugin_with_its_reason(install: Any, capsys: pytest.CaptureFixture[str]) -> None:
    install(entry("broken", "a_module_that_is_not_there:Reward", "some-package"))
    found = {row.name: row for row in listing.rows(registry.REWARDS)}
    assert found["broken"].cls is None
    assert found["broken"].problem == "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    assert found["pickscore"].cls is not None
    listing.print_rewards()
    shown = capsys.readouterr().out
    assert "broken" in shown
    assert "pickscore" in shown


def test_two_plugins_with_one_name_name_both_packages(install: Any) -> None:
    value = "rlhf_t2i_plugins.rewards.cfg_implicit:CFGImplicit"
    install(entry("mine", value, "package-a"), entry("mine", value, "package-b"))
    with pytest.raises(UsageError, match=r"'mine' is registered by package-a and package-b"):
        registry.reward("mine")
    row = next(row for row in listing.rows(registry.REWARDS) if row.name == "mine")
    assert row.cls is None
    assert "package-a" in row.package
    assert "package-b" in row.package


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown reward 'pikscore'; did you mean 'pickscore'"):
        registry.reward("pikscore")
    with pytest.raises(UsageError, match=r"unknown divergence 'zzz'; known: .*pseudo_huber"):
        registry.divergence("zzz")


def test_options_are_typed() -> None:
    with pytest.raises(UsageError, match=r"divergence 'pseudo_huber': c: .*greater than 0"):
        registry.divergence("pseudo_huber", c=-1)
    with pytest.raises(UsageError, match=r"reward 'http': retries: must be at most 100"):
        registry.reward("http", url="http://x", retries=1000)


def test_kl_costs_no_vector_jacobian_product() -> None:
    """The denoisers' backward passes are counted: none for kl, both for the others."""
    schedule = VPSchedule(torch.linspace(0.99, 0.01, 50))

    def count(name: str) -> int:
        calls = []

        def denoiser(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            prediction = torch.tanh(x_t) * 0.7
            if prediction.requires_grad:
                prediction.register_hook(calls.append)
            return prediction

        x0 = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        t = torch.tensor([5, 30])
        loss = losses.divergence_loss(name, x0, t, torch.ones(2, 4), denoiser, lambda x, t: 0.2 * x, schedule)
        loss.sum().backward()
        assert x0.grad is not None
        return len(calls)

    assert count("kl") == 0
    assert count("pseudo_huber") == count("l2") == 1


def test_plugins_do_not_touch_the_distributed_side() -> None:
    """What plugins/ imports, at any depth of any function: of the core, only what a stranger's plugin may use."""
    allowed = {
        "rlhf_t2i.plugins",
        "rlhf_t2i.errors",
        "rlhf_t2i.plugins.precision",
        "rlhf_t2i.plugins.preprocessing",
        "rlhf_t2i.plugins.consent",
        "rlhf_t2i.families.clip",
        "rlhf_t2i.families.sources",
        "rlhf_t2i.utils.device",
        "rlhf_t2i.utils.files",
        "rlhf_t2i.utils.images",
        "rlhf_t2i.utils.inputs",
        "rlhf_t2i.utils.quiet",
        "rlhf_t2i.utils.stats",
        "rlhf_t2i.utils.targets",
    }
    files = sorted((ROOT / "plugins").rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for module in imported(file):
            top = module.split(".")[0]
            assert top not in ("ray", "deepspeed"), f"{file} imports {module}"
            assert top != "rlhf_t2i" or module in allowed, f"{file} imports {module}"


def test_the_import_scan_sees_every_form(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import ray.util\nfrom rlhf_t2i import cluster\ndef f():\n    from deepspeed import zero\n")
    assert imported(file) == {"ray.util", "rlhf_t2i.cluster", "deepspeed"}


def imported(file: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in ("rlhf_t2i", "rlhf_t2i.families", "rlhf_t2i.utils"):
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return modules


def test_a_plugin_file_that_is_no_source_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Cases G.8: Python itself would read a file of any size."""
    with (tmp_path / "large.py").open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(UsageError, match=r"large.py has 10,000,000,000 bytes: a plugin file has at most 10,000,000"):
        registry.load_class(registry.REWARDS, f"{tmp_path}/large.py:R")
