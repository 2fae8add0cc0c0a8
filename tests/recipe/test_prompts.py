"""Prompt files and the order in which a run consumes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_t2i.algorithm import prompts
from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import benchmarks


def write(folder: Path, name: str, data: bytes | str) -> Path:
    file = folder / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("p.txt", "a cat\n\n  a dog \r\nlast", ["a cat", "a dog", "last"]),
        ("p.txt", b"\xef\xbb\xbfa cat\n", ["a cat"]),
        ("p.txt", "コーヒー ☕\n", ["コーヒー ☕"]),
        ("p.jsonl", '{"prompt": "a cat"}\n\n{"prompt": "a\\ndog", "x": 1}\n', ["a cat", "a\ndog"]),
        ("p.csv", 'id,prompt\n1,"a cat, red"\n2,"say ""hi"""\n', ["a cat, red", 'say "hi"']),
        ("p.tsv", "prompt\tx\na cat\t1\n\t2\na dog\n", ["a cat", "a dog"]),
        # As PartiPrompts.tsv: quotes belong to the prompt, and need not be paired.
        ("p.tsv", 'x\tprompt\n1\t"G I G G L E"\n2\ta 6" pipe\n3\t"open\n', ['"G I G G L E"', 'a 6" pipe', '"open']),
        # Separators that str.splitlines knows and a text file does not.
        ("p.txt", "a\u2028b\nc\x85d\re\x0cf\x1cg\n", ["a\u2028b", "c\x85d", "e\x0cf\x1cg"]),
        ("p.jsonl", '{"prompt": "a\u2028b"}\n', ["a\u2028b"]),
        ("p.csv", 'prompt\n"two\nlines"\n', ["two\nlines"]),
        ("p.json", '["a cat", {"prompt": "a dog"}]', ["a cat", "a dog"]),
    ],
)
def test_formats(name: str, data: bytes | str, found: list[str], tmp_path: Path) -> None:
    assert prompts.read(write(tmp_path, name, data)) == found


def test_ten_thousand_characters_are_no_prompt(tmp_path: Path) -> None:
    """Long ones are legal (the tokenizer cuts them); a page, or a whole file in one line, is not."""
    assert prompts.read(write(tmp_path, "p.txt", "word " * 1000)) == [("word " * 1000).strip()]
    with pytest.raises(UsageError, match=r"10,000 characters \('aaa.*one prompt per line"):
        prompts.read(write(tmp_path, "p.txt", "a cat\n" + "a" * 10_000))


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("p.txt", "", "no prompts"),
        ("p.txt", " \n\t\n", "no prompts"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.txt", b"a\x00b", "binary"),
        ("p.txt", b"\x89PNG\r\n\x1a\n\x00", "not UTF-8"),
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": "a\\u0000b"}\n', "prompt 2: .* zero character"),
        ("p.jsonl", '{"prompt": "a\\ud800b"}\n', "prompt 1: .* surrogate"),
        ("p.json", '["\\udfff"]', "prompt 1: .* surrogate"),
        ("p.json", '{"prompt": "x"}', "not a JSON array"),
        ("p.json", "[1]", "entry 1"),
        ("p.json", "[", "not valid JSON"),
        ("p.yaml", "- a cat\n", "suffix '.yaml' names no format"),
        ("p", "a cat\n", "suffix '' names no format"),
        ("p.jsonl", "a cat\n", "line 1"),
        ("p.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "line 2"),
        ("p.jsonl", '{"prompt": 5}\n', "not a string"),
        ("p.jsonl", "[1]\n", "line 1"),
        ("p.jsonl", '"prompt"\n', "line 1"),
        ("p.jsonl", "", "no prompts"),
        ("p.jsonl", "[" * 100_000, "line 1"),
        ("p.csv", "text\nx\n", "no column"),
        ("p.csv", "", "no column"),
        ("p.csv", "prompt\n", "no prompts"),
        ("p.csv", 'prompt\n"open\n', "p.csv"),
    ],
)
def test_bad_files(name: str, data: bytes | str, word: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        prompts.read(write(tmp_path, name, data))
    assert "\n" not in str(caught.value)


def test_what_never_ends_or_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(100_000_000_000)
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    for name, words in [
        ("pipe.txt", "not a regular file"),
        ("zero.txt", "not a regular file"),
        ("sparse.txt", "100,000,000,000 bytes"),
        ("loop.txt", "Too many levels"),
        ("x" * 300, "File name too long"),
    ]:
        with pytest.raises(UsageError, match=words):
            prompts.read(tmp_path / name)
        with pytest.raises(UsageError, match=words):
            benchmarks.load(f"parti:{tmp_path / name}")


def test_the_format_is_told_by_the_name_not_by_what_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "0123abcd").write_text('{"prompt": "a cat"}\n')
    (tmp_path / "p.jsonl").symlink_to(tmp_path / "0123abcd")
    assert prompts.read(tmp_path / "p.jsonl") == ["a cat"]


def test_parti_prompts_keep_their_quotes(tmp_path: Path) -> None:
    file = write(tmp_path, "PartiPrompts.tsv", 'Prompt\tCategory\n"G I G G L E"\tArtifacts\na "b\tWorld\n')
    assert benchmarks.load(f"parti:{file}") == benchmarks.PromptList(['"G I G G L E"', 'a "b'], ["Artifacts", "World"])
    assert prompts.read(file, "Prompt") == ['"G I G G L E"', 'a "b']


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such prompt file"):
        prompts.read(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="is a folder without files"):
        prompts.read(tmp_path)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=80) | st.text(max_size=80).map(str.encode),
    suffix=st.sampled_from(["txt", "jsonl", "json", "csv", "tsv"]),
)
def test_any_bytes_are_prompts_or_a_sentence(data: bytes, suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path, f"p.{suffix}", data)
    try:
        found = prompts.read(file)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is legal
    else:
        assert found
        assert all(isinstance(prompt, str) and prompt.strip() == prompt and prompt for prompt in found)


def test_the_stream_permutes_each_epoch_and_depends_on_position_only() -> None:
    items = [f"p{i}" for i in range(10)]
    stream = prompts.PromptStream(items, seed=3, purpose="generator")
    first, second = stream.batch(0, 10), stream.batch(10, 10)
    assert sorted(first) == sorted(second) == sorted(items)
    assert first != second
    # Any order of calls gives the same prompts: resume and retries repeat exactly.
    again = prompts.PromptStream(items, seed=3, purpose="generator")
    assert again.batch(13, 4) + again.batch(5, 4) == second[3:7] + first[5:9]
    assert prompts.PromptStream(items, seed=4, purpose="generator").batch(0, 10) != first
    assert prompts.PromptStream(items, seed=3, purpose="assistant").batch(0, 10) != first
