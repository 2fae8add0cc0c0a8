"""What is printed reaches a stream of any encoding: nothing that a command prints ends it."""

from __future__ import annotations

import io
import sys

import pytest

from rlhf_t2i.utils.streams import survive_lost_readers
from rlhf_t2i.utils.terminal import PlainConsole


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_characters_that_an_encoding_lacks_are_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LC_ALL=en_US.ISO-8859-1, or PYTHONIOENCODING=ascii, ended a finished run at its table."""
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, buffer in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, encoding=encoding))
    survive_lost_readers()
    print("diversity kept 91% ± 2%, prompt 'ein Fuchs im Café, 猫'", flush=True)
    PlainConsole().print("─ 猫 ±")
    print("猫", file=sys.stderr, flush=True)
    sys.stdout.flush()
    text = written["stdout"].getvalue().decode(encoding)
    assert "diversity kept 91%" in text
    assert text.count("猫" if encoding == "utf-8" else "\\u732b") == 2
    assert written["stderr"].getvalue().decode(encoding).strip() == ("猫" if encoding == "utf-8" else "\\u732b")


def test_a_plugin_that_closes_the_streams_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, buffer in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, encoding="utf-8"))
    survive_lost_readers()
    sys.stdout.close()
    sys.stderr.close()
    PlainConsole().print("a table")
    print("a line", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    assert written["stdout"].getvalue() == b"a table\n"
    assert written["stderr"].getvalue() == b"a line\n"
