"""Small files that hold too much: packed ones, and lists of nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rlhf_t2i.algorithm import prompts
from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import inputs


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "EMPTY_LINES", 100)
    monkeypatch.setattr(inputs, "_SMALL", 10_000)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat\n" + "\n" * 200),
        ("p.txt", " \r\n" * 200 + "a cat\n"),
        ("p.jsonl", '{"prompt": "a cat"}\n' + "\n" * 200),
        ("p.jsonl", '{"prompt": ""}\n' * 200),
        ("p.json", json.dumps([" "] * 200)),
        ("p.csv", "prompt\n" + "\n" * 200 + "a cat\n"),
        ("p.csv", "prompt,more\n" + ",x\n" * 200),
        ("p.tsv", "prompt\tmore\n" + "\tx\n" * 200),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_list_of_nothing_is_refused(name: str, text: str, packed: bool, tmp_path: Path) -> None:
    file = tmp_path / (f"{name}.gz" if packed else name)
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(UsageError, match=r"holds over 100 empty lines in a row"):
        prompts.read(file)


def test_empty_parquet_rows_are_refused(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": [None, ""] * 100}), tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="holds over 100 empty lines in a row"):
        prompts.read(tmp_path / "p.parquet")


def test_some_empty_lines_are_fine(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(("a cat\n" + "\n" * 90) * 3)
    assert list(prompts.read(tmp_path / "p.txt")) == ["a cat"] * 3


@pytest.mark.parametrize("name", ["p.txt.gz", "p.jsonl.gz", "p.json.gz", "p.csv.gz", "p.parquet.gz"])
def test_a_packed_file_has_a_limit_by_its_own_size(name: str, tmp_path: Path) -> None:
    line = '{"prompt": "a cat"}\n' if "jsonl" in name else "prompt\n"
    text = "[" + " " * 10**6 + "]" if name == "p.json.gz" else line * 10**5
    (tmp_path / name).write_bytes(gzip.compress(text.encode(), 9))
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    with pytest.raises(UsageError, match=r"unpacks to over [\d,]+ bytes: is it a packed list"):
        prompts.read(tmp_path / name)


def test_text_that_packs_well_is_read(tmp_path: Path) -> None:
    listed = [f"{animal} number {number}, on a blue background" for number in range(2000) for animal in ("cat", "dog")]
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress("\n".join(listed).encode(), 9))
    assert len(prompts.read(tmp_path / "p.txt.gz")) == 4000
