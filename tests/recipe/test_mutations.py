"""Spoilt recipes: each one sentence naming place and key, exit code 2, nothing written (at least 200 of them)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_t2i import cli
from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import placement as geometry
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from tests.recipe.base import BASE, JARGON, misspellings, parsed, put, rename, wrong_values

WRONG = list(wrong_values())
MISSPELLED = list(misspellings())


def name(at: tuple[str | int, ...]) -> str:
    return ".".join(map(str, at))


def refuse(text: str | bytes, folder: Path, *words: str) -> str:
    """Load a recipe that must be refused; the sentence."""
    file = folder / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        geometry.check_placement(reading.load(file))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 1000
    assert not JARGON.search(sentence), sentence
    for word in words:
        assert word in sentence, sentence
    assert sorted(folder.iterdir()) == [file], "something was written"
    return sentence


def test_the_unspoilt_recipe_is_valid(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(BASE)
    recipe = reading.load(tmp_path / "recipe.yaml")
    assert recipe == Recipe.model_validate(put(recipe.model_dump(), ("seed",), 1))
    assert recipe.models.reference == str(tmp_path / "reference")
    assert recipe.models.generator == "org/generator@abc"
    assert recipe.optimization.generator.lr == 1e-6
    assert len(geometry.check_placement(recipe)) == 6


def test_there_are_at_least_two_hundred_mutations() -> None:
    assert len(WRONG) + len(MISSPELLED) >= 200
    assert len({(name(at), repr(bad)) for at, bad in WRONG}) == len(WRONG)


@pytest.mark.parametrize(("at", "bad"), WRONG, ids=[f"{name(at)}={str(bad)[:12]!r}" for at, bad in WRONG])
def test_wrong_values(at: tuple[str | int, ...], bad: Any, tmp_path: Path) -> None:
    text = yaml.safe_dump(put(parsed(), at, bad), sort_keys=False)
    keys = [str(part) for part in at if isinstance(part, str)]
    sentence = refuse(text, tmp_path, "recipe.yaml, line ")
    assert keys[-1] in sentence, sentence


@pytest.mark.parametrize(("at", "typo"), MISSPELLED, ids=[name((*at[:-1], typo)) for at, typo in MISSPELLED])
def test_misspelled_keys_name_the_nearest(at: tuple[str | int, ...], typo: str, tmp_path: Path) -> None:
    text = yaml.safe_dump(rename(parsed(), at, typo), sort_keys=False)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if row.strip().startswith((f"{typo}:", f"- {typo}:")))
    refuse(text, tmp_path, f"recipe.yaml, line {line}: unknown key", f"{typo}'; did you mean {at[-1]!r}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["a mapping", "nothing"]),
        ("just words", ["a mapping", "just words"]),
        ("- 1\n- 2\n", ["a mapping", "a list"]),
        ("steps: [", ["line", "YAML"]),
        ("steps: 1\n\tmodels: 2\n", ["line 2", "YAML"]),
        ("a: &x {b: *x}\n", ["itself"]),
        ("a: &x\n  - *x\n", ["itself"]),
        ("steps: *nowhere\n", ["line 1", "YAML"]),
        ("steps: 1\nsteps: 2\n", ["line 2", "steps", "twice"]),
        ("models:\n  height: 1\n  height: 2\n", ["line 3", "height", "twice"]),
        ("!!python/object/apply:os.system ['true']\n", ["YAML"]),
        ("steps: !!python/name:os.system\n", ["YAML"]),
        ("? [1, 2]\n: 3\n", ["plain words"]),
        ("? {a: 1}\n: 3\n", ["plain words"]),
        ("1: 2\n", ["1"]),
        ("null: 2\n", ["unknown key"]),
        ("true: 2\n", ["unknown key"]),
        ("1.5: 2\n", ["unknown key"]),
        ("2020-01-01: 2\n", ["unknown key"]),
        ("steps: 2020-01-01\n", ["steps"]),
        ("steps: 2020-99-99\n", ["steps"]),
        ("steps: " + "9" * 5000 + "\n", ["recipe.yaml"]),
        ("steps: 0x" + "f" * 5000 + "\n", ["steps"]),
        ("steps: 1e999\n", ["steps"]),
        ("[" * 3000, ["YAML"]),
        ("{a: " * 3000, ["YAML"]),
        ("a: " * 5, ["line 1"]),
        ("--- 1\n--- 2\n", ["YAML"]),
        ("%YAML 9.9\n---\nsteps: 1\n", ["recipe.yaml"]),
        ("steps: 1\n\x00models: 2", ["YAML"]),
        ("\x1b[31m: 1", ["YAML"]),
        ("<<: 5\nsteps: 1\n", ["recipe.yaml"]),
        ("x" * 2_000_000, ["bytes"]),
    ],
)
def test_spoilt_files(text: str, words: list[str], tmp_path: Path) -> None:
    refuse(text, tmp_path, "recipe.yaml", *words)


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe\x00s", b"steps: \xe9\n", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), b"\x80\x04\x95", bytes(200)],
    ids=["utf-16", "latin-1", "png", "pickle", "zeros"],
)
def test_binary_files(data: bytes, tmp_path: Path) -> None:
    refuse(data, tmp_path, "recipe.yaml")


def test_a_bomb_of_anchors_is_refused_quickly(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    refuse("\n".join(rows), tmp_path, "100,000")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        reading.load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="is a directory"):
        reading.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((("algorithm", "timesteps", "generator"), [979, 20]), ["first <= last"]),
        ((("algorithm", "timesteps", "generator"), [0, 5000]), ["timesteps", "1000"]),
        ((("algorithm", "timesteps", "assistant"), [-1, 20]), ["timesteps"]),
        ((("algorithm", "timesteps", "assistant"), [1, 2, 3]), ["timesteps"]),
        ((("algorithm", "weighting"), "unitx0"), ["weighting", "unit_x0"]),
        ((("algorithm", "cfg", "mode"), "iner"), ["mode", "inner"]),
        ((("optimization", "precision"), "fp8"), ["precision", "bf16"]),
        ((("optimization", "zero_stage"), 4), ["zero_stage"]),
        ((("optimization", "generator", "betas"), [0.9, 1.0]), ["betas"]),
        ((("optimization", "generator", "lr"), 0), ["lr"]),
        ((("placement", "mode"), "cloud"), ["mode"]),
        ((("placement",), "cloud"), ["placement"]),
        ((("placement", "groups"), {}), ["learner"]),
        ((("placement", "groups", "train", "devices"), 0), ["devices", "1"]),
        ((("placement", "groups", "train", "roles"), []), ["roles"]),
        ((("placement", "groups", "train", "roles"), ["learner", "learner"]), ["learner", "twice"]),
        ((("placement", "groups", "train", "roles"), ["leaner"]), ["leaner", "did you mean 'learner'"]),
        ((("placement", "groups", "judge", "roles"), ["reward:pik", "reward:clip"]), ["did you mean 'reward:pick'"]),
        ((("placement", "groups", "judge", "roles"), ["reward:pick"]), ["reward:clip"]),
        ((("placement", "groups", "judge", "devices"), 3), ["judge", "3", "2", "divide"]),
        ((("placement", "groups", "score", "roles"), ["assistant", "reference", "learner"]), ["learner", "too"]),
        ((("optimization", "batch_size"), 9), ["batch_size 9", "ranks 2", "micro_batch 2"]),
        ((("algorithm", "rewards", 0, "label"), "clip"), ["two rewards", "clip"]),
    ],
    ids=lambda value: name(value[0]) if isinstance(value, tuple) else "",
)
def test_impossible_values(change: tuple[Any, Any], words: list[str], tmp_path: Path) -> None:
    refuse(yaml.safe_dump(put(parsed(), *change), sort_keys=False), tmp_path, *words)


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(index=st.integers(0, 10**6), value=YAML_VALUES)
def test_any_value_anywhere_is_accepted_or_refused_in_a_sentence(index: int, value: Any, tmp_path: Path) -> None:
    at = WRONG[index % len(WRONG)][0]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(put(parsed(), at, value), sort_keys=False, allow_unicode=True), "utf-8")
    try:
        recipe = reading.load(file)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is legal
        return
    file.write_text(reading.dump(recipe), "utf-8")
    assert reading.load(file) == recipe


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_refused_in_a_sentence(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        reading.load(file)
    assert "\n" not in str(caught.value)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(start=st.integers(0, len(BASE)), length=st.integers(0, 30), insert=st.text(max_size=5))
def test_any_edit_of_a_valid_recipe(start: int, length: int, insert: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(BASE[:start] + insert + BASE[start + length :], "utf-8")
    try:
        geometry.check_placement(reading.load(file))
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is legal


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ((("steps",), "many"), "steps"),
        ((("models", "height"), -1), "height"),
        ((("data",), {}), "data.prompts"),
    ],
)
def test_the_command_line_ends_with_two_and_one_sentence(
    change: tuple[Any, Any],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(put(parsed(), *change), sort_keys=False))
    monkeypatch.setattr("sys.argv", ["rlhf-t2i", "run", str(file), "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert word in printed.err
    assert "Traceback" not in printed.err
    assert not out.exists()
