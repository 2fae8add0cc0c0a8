"""Mistakes in plain words that name where they were made: in a file, in ``--set``, or in an argument from Python."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import rlhf_t2i
from rlhf_t2i import api
from rlhf_t2i.commands.evaluate import eval_command
from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import settings
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe import reading
from rlhf_t2i.tools.ablation import schema
from tests.recipe.base import BASE, JARGON, misspellings, parsed, rename, wrong_values

WRONG = list(wrong_values())


def sentence(error: UsageError) -> str:
    text = str(error)
    assert not JARGON.search(text), text
    assert "\n" not in text
    return text


def test_wrong_values_of_every_key_from_the_command_line(recipe: Path) -> None:
    data, source = reading.read(recipe)
    for at, bad in WRONG:
        override = f"{'.'.join(map(str, at))}={json.dumps(bad)}"
        with pytest.raises(UsageError) as caught:
            reading.build(data, [override], copy.deepcopy(source))
        assert sentence(caught.value).startswith("--set "), override
        assert "line" not in str(caught.value).replace("pipeline", "")


def test_wrong_values_of_every_key_from_python() -> None:
    data = parsed()
    for at, bad in WRONG:
        key = ".".join(map(str, at))
        with pytest.raises(UsageError) as caught:
            api.read_recipe(data, {key: bad})
        assert sentence(caught.value).startswith(f"overrides['{key}']=")
        assert "--" not in str(caught.value)


def test_misspelled_keys_from_the_command_line_and_from_python(recipe: Path) -> None:
    data, source = reading.read(recipe)
    for at, typo in misspellings():
        wrong = rename(parsed(), at, typo)
        key = at[0] if len(at) > 1 else typo
        text = f"{key}={json.dumps(wrong[key])}"
        with pytest.raises(UsageError, match=f"^--set .*did you mean {at[-1]!r}"):
            reading.build(data, [text], copy.deepcopy(source))
        with pytest.raises(UsageError, match=rf"^overrides\[.*did you mean {at[-1]!r}"):
            api.read_recipe(parsed(), {key: wrong[key]})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["student=4"], "--set student=4: student: must be a mapping of keys to values, not 4"),
        (["student.timesteps=[]"], "--set student.timesteps=[]: student.timesteps: must not be empty"),
        (
            ["student.steps=3", "student.timesteps=[999, 499]"],
            "--set student.timesteps=[999, 499]: student: steps is 3 but timesteps has 2: leave steps out",
        ),
        (
            ["algorithm.timesteps.generator=[20]"],
            "algorithm.timesteps.generator: must have 2 or more entries, not 1",
        ),
        (
            ["optimization.gradient_checkpointing=5"],
            "--set optimization.gradient_checkpointing=5: optimization.gradient_checkpointing: "
            "must be true or false or a list, not 5",
        ),
        (
            ["optimization.gradient_checkpointing=[rewards]"],
            "--set optimization.gradient_checkpointing=[rewards]: optimization.gradient_checkpointing.0: "
            "must be 'learner', 'assistant', 'reference' or 'reward', not 'rewards'",
        ),
        (["studentt.steps=3"], "--set studentt.steps=3: unknown key 'studentt'; did you mean 'student'?"),
        (["optimization.ema={rampup: 0.1}"], "the key 'optimization.ema.half_life_kimg' is missing"),
        (["revisions={org/name: main}"], "must be a commit hash, 40 digits of 0-9 and a-f"),
        (["optimization.max_bad_steps=2000000"], "must be at most 1000000, not 2000000"),
    ],
)  # fmt: skip
def test_sentences(overrides: list[str], words: str, recipe: Path) -> None:
    with pytest.raises(UsageError) as caught:
        reading.load(recipe, overrides)
    assert sentence(caught.value).endswith(words)
    assert str(caught.value).startswith("--set ")


def test_a_file_is_named_for_what_it_gives_and_an_override_for_what_that_gives(recipe: Path) -> None:
    recipe.write_text(BASE + "student: {steps: 2}\n")
    with pytest.raises(UsageError) as caught:
        reading.load(recipe, ["student.timesteps=[399]"])
    assert str(caught.value).startswith("--set student.timesteps=[399]: student: steps is 2")
    recipe.write_text(BASE.replace("steps: 10\n", ""))
    with pytest.raises(UsageError) as caught:
        reading.load(recipe, ["seed=3"])
    assert str(caught.value) == f"{recipe}: the key 'steps' is missing"


def test_python_arguments_are_named_as_they_were_written(recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"^algorithm__divergence__nme='kl': unknown key 'algorithm.divergence.nme'"):
        rlhf_t2i.train(recipe, algorithm__divergence__nme="kl")
    with pytest.raises(UsageError, match=r"^steps='many': steps: must be a whole number"):
        rlhf_t2i.plan(recipe, steps="many")
    with pytest.raises(UsageError, match=r"^recipe: steps: must be a whole number"):
        rlhf_t2i.plan(parsed() | {"steps": "many"})
    with pytest.raises(UsageError, match=r"'a..b' is no key"):
        rlhf_t2i.plan(recipe, {"a..b": 1})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metrics": ["nothing"]}, "metrics: unknown metric 'nothing'"),
        ({"metrics": "nothing"}, "metrics: unknown metric 'nothing'"),
        ({"metrics": ["diversity"]}, "metrics diversity compares images of one prompt: give images_per_prompt 2"),
        ({"metrics": ["fid"]}, "metrics fid compares with real images: give their folder with real"),
        ({"options": {"clap": {}}}, "options clap.…: 'clap' is not among the metrics"),
        ({"student": {"timesteps": [399]}, "steps": 3}, "steps is for a many-step model, student={'timesteps': "),
        ({"student": 4}, "evaluate: student: must be a mapping of keys to values, not 4"),
        ({"student": {"timesteps": []}}, "evaluate: student.timesteps: must not be empty"),
        ({"limit": 0}, "evaluate: limit: must be at least 1, not 0"),
        ({"seeed": 1}, "evaluate: unknown argument 'seeed'; did you mean 'seed'?"),
        ({"prompts": "nowhere.txt"}, "prompts: no such prompt file: nowhere.txt"),
        ({"prompts": [1]}, "prompts are a file, the name of a benchmark, or a list of strings"),
        ({"prompts": [""]}, "prompts are a file, the name of a benchmark, or a list of strings"),
        ({"prompts": 5}, "prompts are a file, the name of a benchmark, or a list of strings"),
    ],
)  # fmt: skip
def test_arguments_of_an_evaluation_from_python(arguments: dict[str, Any], words: str, tiny_sdxl: Path) -> None:
    with pytest.raises(UsageError) as caught:
        rlhf_t2i.evaluate(tiny_sdxl, **{"prompts": ["a red cat"], **arguments})
    assert sentence(caught.value).startswith(words)
    assert "--" not in str(caught.value)


PLUGINS = """\
seed: 1
steps: 10
models: {reference: org/a, generator: org/b}
data: {prompts: ./prompts.txt}
algorithm:
  divergence:
    name: pseudo_huber
    options:
      c: -1
  rewards:
    - name: clip
      options:
        model: org/clip
        modle: org/clip
"""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "recipe.yaml, line 9: algorithm.divergence: divergence 'pseudo_huber': c: must be greater than 0, not -1"),
        (
            ["algorithm.divergence={name: kl}"],
            "recipe.yaml, line 14: algorithm.rewards.0: reward 'clip': unknown option 'modle'; did you mean 'model'?",
        ),
        (["algorithm.divergence.name=kll"],
         "--set algorithm.divergence.name=kll: unknown divergence 'kll'; did you mean 'kl'?"),
        (
            ["algorithm.divergence={name: kl}", "algorithm.rewards={name: clip, options: {modle: x}}"],
            "--set algorithm.rewards={name: clip, options: {modle: x}}: algorithm.rewards: "
            "must be a list, not a mapping",
        ),
        (
            ["algorithm.divergence={name: kl}", "algorithm.rewards=[{name: clip, options: {modle: x}}]"],
            "--set algorithm.rewards=[{name: clip, options: {modle: x}}]: algorithm.rewards.0: reward 'clip': "
            "unknown option 'modle'; did you mean 'model'?",
        ),
    ],
)  # fmt: skip
def test_a_plugin_s_mistakes_name_the_line_of_the_recipe(overrides: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(PLUGINS)
    with pytest.raises(UsageError) as caught:
        traits.resolve(reading.load(tmp_path / "recipe.yaml", overrides))
    assert sentence(caught.value).removeprefix(f"{tmp_path}/") == words


def message(call: Callable[[], object]) -> str:
    """The sentence of a call that may be refused."""
    try:
        call()
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "0"], "--limit: limit: must be at least 1, not 0"),
        (["--images-per-prompt", "0"], "--images-per-prompt: images_per_prompt: must be at least 1, not 0"),
        (["--timesteps", "x"], "--timesteps: student.timesteps.0: must be a number, not 'x'"),
        (["--timesteps", ""], "--timesteps: student.timesteps: must not be empty"),
        (["--precision", "fp8"], "--precision: precision: must be 'fp32' or 'bf16', not 'fp8'"),
        (["--set", "clip=3"], "--set clip=3: write it as metric.option=value"),
    ],
)
def test_options_of_an_evaluation_from_the_command_line(arguments: list[str], words: str) -> None:
    app = typer.Typer()
    app.command()(eval_command)
    ran = CliRunner().invoke(app, ["org/model", "--prompts", "x.txt", *arguments])
    assert str(ran.exception) == words


@pytest.mark.parametrize("bad", ["text", -7, 2.5, True, [], {}, [5], {"a": 1}, float("nan")], ids=repr)
def test_wrong_values_of_every_setting_of_an_evaluation(bad: object) -> None:
    for name in settings.Settings.model_fields:
        values = {"model": "x", "prompts": "y", name: bad}
        assert not JARGON.search(message(lambda values=values: settings.build(values, "evaluate", "argument")))


@pytest.mark.parametrize("bad", ["text", -7, 2.5, True, None, [], {}, [5], {"a": 1}], ids=repr)
def test_wrong_values_of_every_key_of_an_ablation(bad: object, tmp_path: Path) -> None:
    whole = {"title": "x", "base": "./b.yaml", "evaluation": {}, "initial": "a", "rows": [{"name": "a", "label": "A"}]}
    file = tmp_path / "ablation.yaml"
    changes = [whole | {name: bad} for name in schema.Ablation.model_fields]
    changes += [whole | {"rows": [{"name": "a", "label": "A", name: bad}]} for name in schema.Variant.model_fields]
    for data in changes:
        file.write_text(json.dumps(data))
        assert not JARGON.search(message(lambda: schema.load(file)))
