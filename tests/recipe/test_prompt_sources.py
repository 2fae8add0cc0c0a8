"""Prompts from where people have them: packed files, parquet, folders, datasets of the hub; and lists beyond memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.algorithm import prompt_formats, prompt_store, prompts, rng
from rlhf_t2i.algorithm.prompt_hub import DatasetRef
from rlhf_t2i.algorithm.prompt_store import StoredPrompts
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.evaluation import benchmarks, identity
from rlhf_t2i.families import pins, sources
from rlhf_t2i.recipe import reading
from rlhf_t2i.utils import fingerprints

ANIMALS = ["a cat", "ein Bär 🐻", "say \u2028 hi"]


def parquet(file: Path, **columns: list[Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet")
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table(columns), file, row_group_size=2)
    return file


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "\n".join(ANIMALS)),
        ("p.csv", "n,prompt\n" + "".join(f'1,"{text}"\n' for text in ANIMALS)),
        ("p.tsv", "n\tprompt\n" + "".join(f"1\t{text}\n" for text in ANIMALS)),
        ("p.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in ANIMALS)),
        ("p.json", json.dumps(ANIMALS)),
    ],
)
def test_packed_files_hold_the_same_prompts(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert prompts.read(tmp_path / name) == prompts.read(tmp_path / f"{name}.gz") == ANIMALS


def test_parquet(tmp_path: Path) -> None:
    file = parquet(tmp_path / "p.parquet", prompt=[*ANIMALS, None, " "], caption=["x"] * 5, size=[1] * 5)
    assert prompts.read(file) == ANIMALS
    assert prompts.read(file, "caption") == ["x"] * 5
    (tmp_path / "q.parquet.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert prompts.read(tmp_path / "q.parquet.gz") == ANIMALS
    with pytest.raises(UsageError, match=r"no column 'text' \(it has: prompt, caption, size\); data.column"):
        prompts.read(file, "text")
    with pytest.raises(UsageError, match="'size' holds int64, not strings"):
        prompts.read(file, "size")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UsageError, match="not a whole parquet file") as caught:
        prompts.read(file)
    assert "\n" not in str(caught.value)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("third\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "first"}\n{"prompt": "second"}\n'))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.lock").write_text("no prompt")
    assert prompts.read(tmp_path) == ["first", "second", "third"]
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(
        UsageError, match=r"README\.md: the suffix '\.md' names no format of prompts: rename or convert"
    ):
        prompts.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.txt.gz", b"a cat\n", "no whole gzip file"),
        ("p.txt.gz", gzip.compress(b"a cat\n" * 1000)[:-9], "no whole gzip file"),
        ("p.txt.gz", gzip.compress(b"\0" * 10**7), "binary data"),
        ("p.txt", b"a cat\n" * 3000 + b"\xff\n", r"not UTF-8 text after line \d+"),
        ("p.json", b'["a cat", "\xff"]', "not UTF-8"),
        ("p.json", b'["a", "b"', "not valid JSON"),
        ("p.json", b'["a" "b"]', "not valid JSON"),
        ("p.json", b'["a"] x', "goes on after its array"),
        ("p.json", b'["a", ]', "not valid JSON"),
        ("p.json", b'["a", 12', "not valid JSON"),
        ("p.json", b"[" * 100_000, "not valid JSON"),
        ("p.json", b'["' + b"a" * 3_000_000, "not valid JSON"),
        ("p.csv", b'n,prompt\n1,a\n1,"open', r"p\.csv, line \d"),
        ("p.csv", b"prompt\na,b\na cat, red\n", r"p\.csv, line 2: has 2 fields, the header 1"),
        ("p.tsv", b"n\tprompt\n1\ta\tb\n", r"p\.tsv, line 2: has 3 fields, the header 2"),
        ("p.csv", b'prompt,n\na,1\n"a" cat,1\n', r"p\.csv, line 3: "),
        ("p.csv", b"prompt,n,prompt\na,1,b\n", "has 2 columns 'prompt'"),
        ("p.txt", "a cat".encode("utf-16"), r"p\.txt is not UTF-8 text: save"),
        ("p.txt.gz", gzip.compress(gzip.compress(b"a cat\n")), "is not UTF-8 text"),
        ("p.txt", b"a" * 3_000_000, "characters"),
        ("p.xlsx", b"PK", "rename or convert it to .txt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # not the data: megabytes, and gzip's hold the time
)
def test_damaged_files_are_one_sentence(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=words) as caught:
        prompts.read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 2, 7, 2**16])
def test_arrays_are_read_piece_by_piece(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_formats, "_CHUNK", chunk)
    items = [*ANIMALS, 'quote " and \\ and ]', "", "[1, 2]", "a, b"]
    mixed = [{"prompt": text, "more": [1, {"x": None}]} if number % 2 else text for number, text in enumerate(items)]
    (tmp_path / "p.json").write_text(f"\n {json.dumps(mixed, indent=1)} \n", "utf-8")
    assert prompts.read(tmp_path / "p.json") == [text for text in items if text]
    (tmp_path / "q.json").write_text("[]")
    with pytest.raises(UsageError, match="no prompts"):
        prompts.read(tmp_path / "q.json")


def test_marks_of_joined_files_and_long_columns(tmp_path: Path) -> None:
    """``cat a.txt b.txt`` leaves the byte order mark of the second file in its first line."""
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\r\n\ufeffa dog\r\n".encode())
    assert list(prompts.read(tmp_path / "p.txt")) == ["a cat", "a dog"]
    (tmp_path / "p.csv").write_text(f'\ufeffprompt,page\r\n"a cat, red",{"x" * 200_000}\r\n', "utf-8")
    assert list(prompts.read(tmp_path / "p.csv")) == ["a cat, red"]


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="has 2 columns 'prompt'"):
        prompts.read(tmp_path / "p.parquet")


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"pip install 'rlhf-t2i\[parquet\]', or convert it to \.jsonl"):
        prompts.read(tmp_path / "p.parquet")
    with pytest.raises(UsageError, match=r"pip install 'rlhf-t2i\[datasets\]', or give a file"):
        prompts.read("hf://datasets/org/name")


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A dataset org/name, read by the library itself from a folder; returns the calls."""
    datasets = pytest.importorskip("datasets", reason="the extra datasets")
    folder = tmp_path / "org--name"
    folder.mkdir()
    rows = [{"prompt": text, "size": 3} for text in [*ANIMALS, None]]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "test.jsonl").write_text('{"prompt": "held out", "size": 1}\n')
    calls: list[dict[str, Any]] = []
    load = datasets.load_dataset

    def from_folder(repository: str, **arguments: Any) -> Any:
        calls.append({"repository": repository, **arguments})
        return load(str(folder), split=arguments["split"], cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    return calls


def test_a_dataset_of_the_hub(hub: list[dict[str, Any]]) -> None:
    assert prompts.read("hf://datasets/org/name") == ANIMALS
    assert prompts.read("hf://datasets/org/name@main:test") == ["held out"]
    assert prompts.read("hf://datasets/org/name:train[:1]", revisions={"datasets/org/name": "a" * 40}) == ANIMALS[:1]
    assert [(call["repository"], call["split"], call["revision"]) for call in hub] == [
        ("org/name", "train", None),
        ("org/name", "test", "main"),
        ("org/name", "train[:1]", "a" * 40),
    ]
    assert benchmarks.load("hf://datasets/org/name:test").prompts == ["held out"]
    with pytest.raises(UsageError, match=r"no column 'text' \(it has: prompt, size\)"):
        prompts.read("hf://datasets/org/name", "text")
    with pytest.raises(UsageError, match="'size' holds int, not strings"):
        prompts.read("hf://datasets/org/name", "size")


def test_the_hub_out_of_reach_is_one_sentence() -> None:
    pytest.importorskip("datasets", reason="the extra datasets")
    with pytest.raises(UsageError, match=r"cannot be read \(.*download its files and give their folder") as caught:
        prompts.read("hf://datasets/org/absent")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["hf://org/name", "hf://datasets/name", "hf://datasets/a/../b", "hf://datasets/a/b@", "hf://"]
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write a dataset of the hub as"):
        prompts.read(text)


def test_a_run_pins_the_commit_of_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run, and its resumption, must not change because a dataset has."""
    asked = []

    def commit(repository: str, revision: str | None, kind: str = "model") -> str:
        asked.append((repository, revision, kind))
        return "b" * 40

    monkeypatch.setattr(sources, "commit", commit)
    recipe = reading.build(
        {
            "steps": 1,
            "models": {"reference": "emoji64:reference", "generator": "emoji64:generator"},
            "data": {"prompts": "hf://datasets/org/name:train", "held_out": f"hf://datasets/org/name@{'c' * 40}"},
        }
    )
    assert recipe.data.prompts == "hf://datasets/org/name:train"
    pinned = pins.pin(recipe)
    assert asked == [("org/name", None, "dataset")]
    assert pinned.revisions == {"datasets/org/name": "b" * 40}
    assert DatasetRef.parse(str(recipe.data.prompts)).pinned(pinned.revisions) == "b" * 40
    assert DatasetRef.parse(str(recipe.data.held_out)).pinned(pinned.revisions) == "c" * 40
    changed = pinned.model_copy(update={"revisions": {"datasets/org/name": "d" * 40}})
    key = "data.prompts (content)"
    assert identity.of_recipe(pinned)[key] != identity.of_recipe(changed)[key]


# -- beyond memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [2**24, 64])
def test_stored_prompts_are_a_list(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_store, "_IN_MEMORY", in_memory)
    monkeypatch.setattr(prompt_store, "_BLOCK", 4)
    items = [f"{number} {'ä' * (number % 5)}🐻" for number in range(23)]
    stored = StoredPrompts(iter(items))
    assert len(stored) == 23
    assert list(stored) == items
    assert stored == items
    assert stored != items[:-1]
    assert stored != [*items[:-1], "other"]
    assert [stored[number] for number in (22, 0, -1, 7)] == [items[number] for number in (22, 0, -1, 7)]
    assert (stored[3:9], stored[::7], stored[50:]) == (items[3:9], items[::7], [])
    for number in (23, -24):
        with pytest.raises(IndexError):
            stored[number]
    assert list(StoredPrompts([])) == []
    assert fingerprints.of_lines(stored) == fingerprints.of_text("\n".join(items))


def test_a_long_list_is_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_store, "_IN_MEMORY", 2**16)
    with (tmp_path / "p.txt").open("w") as file:
        file.writelines(f"prompt number {number} of a long list\n" for number in range(100_000))
    tracemalloc.start()
    stored = prompts.read(tmp_path / "p.txt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stored[99_999] == "prompt number 99999 of a long list"
    assert peak < 2e6  # the prompts alone have 3.6 MB, as strings 9 MB


def test_a_full_temporary_folder_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_store.tempfile.SpooledTemporaryFile, "write", full)
    with pytest.raises(RunError, match="could not be written: No space left"):
        StoredPrompts(["a cat"])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_a_computed_order_is_a_permutation(length: int) -> None:
    order = [rng.permuted(index, length, 7, "prompts", 0) for index in range(length)]
    assert sorted(order) == list(range(length))
    if length >= 100:
        assert order != [rng.permuted(index, length, 7, "prompts", 1) for index in range(length)]
        assert sum(a == b for a, b in enumerate(order)) < 8  # one fixed point is expected


def test_a_computed_order_has_no_preference() -> None:
    """Over many keys each place is as likely: chi-squared of 2,400 draws over 24 orders of 4, 23 degrees of freedom."""
    orders = Counter(tuple(rng.permuted(index, 4, key) for index in range(4)) for key in range(2400))
    assert sum((count - 100) ** 2 / 100 for count in (*orders.values(), *[0] * (24 - len(orders)))) < 60


def test_the_stream_of_a_long_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts.PromptStream, "SHUFFLED", 10)
    items = [f"p{number}" for number in range(50)]
    stream = prompts.PromptStream(items, 3, "generator")
    first, second = stream.batch(0, 50), stream.batch(50, 50)
    assert sorted(first) == sorted(second) == sorted(items)
    assert first != second
    again = prompts.PromptStream(items, 3, "generator")
    assert again.batch(60, 4) + again.batch(5, 4) == second[10:14] + first[5:9]
    assert prompts.PromptStream(items, 3, "assistant").batch(0, 50) != first
