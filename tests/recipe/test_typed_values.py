"""Values that are typed or come from a stranger: ``--set``, ``--options``, ``~user`` and a foreign run's recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_t2i import cli
from rlhf_t2i.commands.evaluate import metric_options
from rlhf_t2i.commands.rewards import parse_options
from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import models
from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe import placement as geometry
from rlhf_t2i.recipe import reading
from rlhf_t2i.tools.ablation import schema
from rlhf_t2i.tools.report.page import _recipe
from rlhf_t2i.utils import fingerprints
from tests.recipe.base import leaves, parsed, put

KEYS = sorted({".".join(map(str, at)) for at, _ in leaves(parsed())})
NOBODY = "~no-such-user/x"
# 10^29 pairs: a merge is expanded while the mapping is built, so that sharing anchors does not save the reader.
MERGES = (
    "{a0: &a0 {x: 1}, "
    + ", ".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 30))
    + "}"
)


def one_sentence(text: str) -> None:
    assert len(text.splitlines()) == 1, text
    assert text.isprintable(), repr(text)
    assert len(text) < 1000, text


KEY = st.sampled_from(KEYS)
LOOKS_LIKE_YAML = st.text("ab:{}[]&*!|>?-<,'\"#%@ \n\t01.e~\\\u2028", max_size=15)
OVERRIDES = st.text(max_size=30) | st.builds(
    lambda key, value: f"{key}={value}",
    KEY
    | st.text(max_size=10)
    | st.builds("{}.{}".format, KEY, st.text(max_size=5) | st.sampled_from(["0", "-1", "²", "٣"])),
    st.text(max_size=30) | LOOKS_LIKE_YAML,
)


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(override=OVERRIDES)
def test_any_override_is_taken_or_refused_in_a_sentence(override: str, recipe: Path) -> None:
    try:
        geometry.check_placement(reading.load(recipe, [override]))
    except UsageError as error:
        one_sentence(str(error))


@pytest.mark.parametrize(
    "override",
    ["²=1", "algorithm.rewards.²=1", "algorithm.rewards.٣=1", f"algorithm.rewards.{'9' * 5000}=1",
     "a\nb=1", "\n=1", "steps=\n\n- x\n", "\x1b[31m=1", "steps", "x" * 100_000, f"{'x' * 100_000}=1",
     f"steps={'x' * 100_000}", f"steps{'.a' * 5000}=1", f"algorithm={MERGES}", f"data.prompts={NOBODY}",
     f"models.reference={NOBODY}", "models.vae=~no-such-user"],
    ids=lambda text: repr(text[:24]),
)  # fmt: skip
def test_overrides_that_once_ended_in_a_traceback_or_a_page(
    override: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["rlhf-t2i", "run", str(recipe), "--out", str(out), "--set", override])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    one_sentence(printed.err.removesuffix("\n"))
    assert sorted(tmp_path.iterdir()) == [recipe]


READERS: dict[str, Callable[[str], Any]] = {
    "eval --set": lambda value: metric_options([f"clip.model={value}"]),
    "rewards check --options": lambda value: parse_options([f"model={value}"]),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("value", [MERGES, "&a [*a]", "[", "!!python/name:os.system"], ids=lambda v: v[:12])
def test_values_of_other_commands(reader: str, value: str) -> None:
    began = time.process_time()
    with pytest.raises(UsageError) as caught:
        READERS[reader](value)
    one_sentence(str(caught.value))
    assert reader.split()[-1] in str(caught.value)
    assert time.process_time() - began < 20


@pytest.mark.parametrize("reader", READERS)
def test_values_of_other_commands_mean_what_they_mean_in_a_recipe(reader: str) -> None:
    found = READERS[reader]("1e-6")
    assert found in ({"clip": {"model": 1e-6}}, {"model": 1e-6})


def test_the_report_of_a_run_whose_recipe_expands_without_bounds(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(MERGES, "utf-8")
    began = time.process_time()
    assert _recipe(file, [])[1] is None
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "at", [("data", "prompts"), ("models", "reference"), ("algorithm", "rewards", 0, "options", "model")]
)
def test_a_home_of_nobody_in_a_recipe(at: tuple[str | int, ...], recipe: Path) -> None:
    recipe.write_text(yaml.safe_dump(put(parsed(), at, NOBODY), sort_keys=False), "utf-8")
    with pytest.raises(UsageError, match="no-such-user") as caught:
        reading.load(recipe)
    one_sentence(str(caught.value))


def test_a_home_of_nobody_elsewhere() -> None:
    with pytest.raises(UsageError, match="no-such-user"):
        registry.load_class(registry.REWARDS, f"{NOBODY}.py:Reward")
    with pytest.raises(UsageError, match="no-such-user"):
        models.load(NOBODY)
    with pytest.raises(UsageError, match="no-such-user"):
        fingerprints.of_path(NOBODY)
    with pytest.raises(UsageError, match="no-such-user"):
        registry.reward("clip", open_clip="ViT-B-32", pretrained=NOBODY)


def test_a_home_that_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``~`` of a user without an entry, as containers run them: an ablation's paths end in a sentence too."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    file = tmp_path / "ablation.yaml"
    file.write_text("{title: t, base: ~/base.yaml, evaluation: {classes: ~/probe.json}}", "utf-8")
    with pytest.raises(UsageError, match="~/base") as caught:
        schema.load(file)
    one_sentence(str(caught.value))
