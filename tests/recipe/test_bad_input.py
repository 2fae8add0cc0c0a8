"""Bad input at the command line: exit code 2, one sentence, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_t2i import cli
from rlhf_t2i.recipe.schema import Recipe
from tests.recipe.base import misspellings, parsed, put, rename, wrong_values

Edit = Callable[[dict[str, Any], Path], None]


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder, files with the time of their last change."""
    return {str(p.relative_to(folder)): 0 if p.is_dir() else p.lstat().st_mtime_ns for p in folder.rglob("*")}


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must refuse what it is given; the sentence."""

    def run(*arguments: str | Path, out: Path | None = None) -> str:
        before = tree(tmp_path)
        place = ["--out", str(out or tmp_path / "runs" / "new")]
        monkeypatch.setattr("sys.argv", ["rlhf-t2i", "run", *map(str, arguments), *place])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        # A run that was refused while it loaded weights has shown its progress before.
        lines = [line for line in printed.err.splitlines() if line.startswith("rlhf-t2i: ")]
        assert stopped.value.code == 2, printed.err
        assert printed.out == ""
        assert lines == printed.err.splitlines()[-1:], printed.err
        assert "Traceback" not in printed.err
        assert len(lines[0]) < 1500
        assert tree(tmp_path) == before, "something was written"
        return lines[0]

    return run


def test_every_mutated_recipe_ends_with_two_and_one_sentence(refuse: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    spoilt = [put(parsed(), at, bad) for at, bad in wrong_values()]
    spoilt += [rename(parsed(), at, typo) for at, typo in misspellings()]
    chosen = spoilt[::2]  # test_mutations.py looks at the sentence of every one
    assert len(chosen) >= 200
    for data in chosen:
        file.write_text(yaml.safe_dump(data, sort_keys=False), "utf-8")
        assert "recipe.yaml" in refuse(file)


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Path]:
    """Write the tiny recipe with some keys changed; every file it names exists."""
    recipe = make_recipe().model_dump()
    (tmp_path / "runs").mkdir()

    def write(*changes: tuple[tuple[str | int, ...], Any]) -> Path:
        data = recipe
        for at, value in changes:
            data = put(data, at, value)
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump(data, sort_keys=False), "utf-8")
        return file

    return write


@pytest.mark.parametrize("key", ["prompts", "held_out"])
@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("empty.txt", b"", "no prompts"),
        ("spaces.txt", b" \n\t\n\r\n", "no prompts"),
        ("utf16.txt", "a cat\n".encode("utf-16"), "not UTF-8"),
        ("latin1.txt", "café\n".encode("latin-1"), "not UTF-8"),
        ("picture.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not UTF-8"),
        ("zeros.txt", bytes(100), "binary"),
        ("long.txt", b"a cat\n" + b"x" * 10_000, "10,000 characters"),
        ("long.jsonl", json.dumps({"prompt": "x" * 10_000}).encode(), "10,000 characters"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt": 1}\n', "line 2"),
        ("deep.jsonl", b"[" * 100_000, "line 1"),
        ("bad.csv", b"text\na\n", "no column 'prompt'"),
        ("folder.txt", None, "is a folder without files"),
    ],
)
def test_prompt_files(
    key: str, name: str, data: bytes | None, word: str, refuse: Callable[..., str],
    recipe_file: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    prompts = tmp_path / name
    if data is None:
        prompts.mkdir()
    else:
        prompts.write_bytes(data)
    sentence = refuse(recipe_file((("data", key), str(prompts))))
    assert word in sentence
    assert name in sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((("data", "prompts"), "./nowhere.txt"), ["nowhere.txt"]),
        ((("data", "prompts"), "x" * 300), ["data.prompts", "too long"]),
        ((("models", "reference"), "./nowhere"), ["nowhere"]),
        ((("models", "reference"), "."), ["model_index.json"]),
        ((("models", "reference"), "/dev/null"), ["/dev/null"]),
        ((("models", "generator"), "."), ["config.json"]),
        ((("models", "generator"), "/etc"), ["/etc"]),
        ((("models", "vae"), "./tiny.yaml"), ["tiny.yaml"]),
        ((("models", "generator"), "./folder.bin"), ["folder.bin"]),
        ((("student", "timesteps"), [999_999.0]), ["student.timesteps"]),
        ((("student", "timesteps"), [399.5]), ["student.timesteps", "399.5", "whole"]),
        ((("algorithm", "timesteps"), {"generator": [20.5, 900]}), ["timesteps.generator", "20.5", "whole"]),
        ((("algorithm", "timesteps"), {"law": "shifted"}), ["timesteps.shift", "law: uniform"]),
        ((("algorithm", "timesteps"), {"law": "logit_normal", "mean": -10.0, "std": 0.1}),
         ["logit_normal", "draws none", "20 to 979"]),
        ((("models", "height"), 17), ["height", "multiple"]),
        ((("algorithm", "rewards", 0, "options", "model"), "./nowhere"), ["nowhere"]),
        ((("algorithm", "rewards", 0, "options"), {"modle": "x"}), ["modle", "model"]),
        ((("algorithm", "rewards", 0, "options", "model"), 5), ["pickscore", "model"]),
        ((("algorithm", "rewards", 0, "name"), "./nowhere.py:Reward"), ["nowhere.py"]),
        ((("algorithm", "rewards", 0, "name"), "./folder.py:Reward"), ["folder.py"]),
        ((("algorithm", "rewards", 0, "name"), "pikscore"), ["pickscore"]),
        ((("algorithm", "divergence", "name"), "huber"), ["huber"]),
        ((("optimization", "zero_stage"), 10**30), ["zero_stage"]),
        ((("placement",), {"mode": "ray", "groups": {"all": {"devices": 0, "roles": ["learner"]}}}), ["devices"]),
        ((("placement",), {"mode": "ray", "groups": {"all": {"devices": 10**10, "roles": ["learner"]}}}), ["devices"]),
        (
            (("placement",), {"mode": "ray", "groups": {"a": {"roles": ["learner", "assistant", "reference", "reward"]},
                                                        "b": {"roles": ["learner"]}}}),
            ["learner"],
        ),
        ((("placement",), {"mode": "ray", "groups": {"a": {"roles": ["learner", "learner"]}}}), ["twice"]),
        ((("revisions",), {"org/name": "main"}), ["revisions"]),
    ],
    ids=lambda value: ".".join(map(str, value[0])) + "=" + str(value[1])[:30] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_values_that_only_the_files_disprove(
    change: tuple[Any, Any], words: list[str], refuse: Callable[..., str], recipe_file: Callable[..., Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "folder.py").mkdir()
    monkeypatch.chdir(tmp_path)
    sentence = refuse(recipe_file(change))
    for word in words:
        assert word in sentence, sentence


@pytest.mark.parametrize(
    ("name", "data"),
    [("nowhere.yaml", None), ("folder.yaml", b""), ("utf16.yaml", "steps: 1".encode("utf-16")),
     ("zeros.yaml", bytes(50)), ("empty.yaml", b""), ("cycle.yaml", b"a: &x {b: *x}\n"),
     ("merge.yaml", b"a: &x {<<: *x}\n")],
)  # fmt: skip
def test_recipe_files(name: str, data: bytes | None, refuse: Callable[..., str], tmp_path: Path) -> None:
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    elif data is not None:
        (tmp_path / name).write_bytes(data)
    assert name in refuse(tmp_path / name)


@pytest.mark.parametrize(
    ("place", "words"),
    [("tiny.yaml", "--out"), ("tiny.yaml/below", "--out"), ("/proc/nowhere", "--out"), ("x" * 300, "too long")],
)
def test_places_that_cannot_be_a_runs_folder(
    place: str, words: str, refuse: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    assert words in refuse(recipe_file(), out=tmp_path / place)


WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.fixture
def pipeline(tiny_sdxl: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that may be spoilt."""
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "pipeline"))


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign", "missing", "folder"])
def test_damaged_weights_name_their_file(
    part: str, damage: str, pipeline: Path, refuse: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    file = pipeline / part / WEIGHTS[part]
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        other = pipeline / ("vae" if part == "unet" else "unet") / WEIGHTS["unet"]
        cut, text, foreign = whole[: len(whole) // 2], b"version https://git-lfs\n" * 9, other.read_bytes()
        file.write_bytes({"cut": cut, "empty": b"", "text": text, "foreign": foreign}[damage])
    sentence = refuse(recipe_file((("models", "reference"), str(pipeline))))
    assert f"pipeline/{part}" in sentence
    if damage in ("cut", "empty", "text"):
        assert file.name in sentence


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize(
    "data", [b"version https://git-lfs\n" * 9, b"", b"PK\x03\x04" + bytes(99)], ids=["text", "empty", "zip"]
)
def test_a_generators_file_that_holds_no_weights_is_named(
    suffix: str, data: bytes, refuse: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / f"generator.{suffix}"
    file.write_bytes(data)
    assert f"generator.{suffix}" in refuse(recipe_file((("models", "generator"), str(file))))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "scheduler", "tokenizer", "index"])
@pytest.mark.parametrize("damage", ["cut", "empty", "binary", "list", "other class", "missing", "folder"])
def test_damaged_configurations_name_their_file(
    part: str, damage: str, pipeline: Path, refuse: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    names = {"scheduler": "scheduler/scheduler_config.json", "tokenizer": "tokenizer/tokenizer.json",
             "index": "model_index.json"}  # fmt: skip
    file = pipeline / names.get(part, f"{part}/config.json")
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "other class":
        foreign = {"_class_name": "FluxTransformer2DModel", "model_type": "bert", "architectures": ["BertModel"]}
        file.write_text(json.dumps(foreign), "utf-8")
    elif damage != "missing":
        data = {"cut": whole[: len(whole) // 2], "empty": b"", "binary": b"\xff\xfe\x00" * 9, "list": b"[1, 2]"}[damage]
        file.write_bytes(data)
    sentence = refuse(recipe_file((("models", "reference"), str(pipeline))))
    assert "pipeline" in sentence
    assert part in sentence or file.name in sentence


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "index"])
def test_any_value_in_a_configuration_is_taken_or_refused_in_a_sentence(
    part: str, tiny_sdxl: Path, tmp_path: Path
) -> None:
    """What a run reads before it starts anything."""
    import torch

    from rlhf_t2i.errors import UsageError
    from rlhf_t2i.families.store import ModelStore
    from rlhf_t2i.recipe.schema import Models, StudentSettings

    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "pipeline"))
    name = {"scheduler": "scheduler/scheduler_config.json", "index": "model_index.json"}.get(
        part, f"{part}/config.json"
    )
    file = folder / name
    config = json.loads(file.read_text("utf-8"))
    models = Models(reference=str(folder), generator=str(tiny_sdxl / "unet"), height=16, width=16)

    @settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(key=st.sampled_from(sorted(config)), value=VALUES, drop=st.booleans())
    def check(key: str, value: Any, drop: bool) -> None:
        changed = {k: v for k, v in config.items() if k != key} | ({} if drop else {key: value})
        file.write_text(json.dumps(changed), "utf-8")
        try:
            ModelStore(models, StudentSettings(), torch.device("cpu")).check()
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is legal

    check()
