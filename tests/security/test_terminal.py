"""Text of users and of foreign files is printed as it is: no markup of rich, nothing that a terminal obeys."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.table import Table

import rlhf_t2i
from rlhf_t2i import cli
from rlhf_t2i.errors import printable
from rlhf_t2i.tools import progress
from rlhf_t2i.utils.terminal import PlainConsole

TEXTS = ["runs/[/exp] x", "[bold]a[/bold]", "[link=x]", ":smile:", "a\x1b[31mb\x07", "a\x9bb"]


def shown(console: PlainConsole, *values: object) -> str:
    console.file = io.StringIO()
    console.print(*values, soft_wrap=True)
    return console.file.getvalue()


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_printed_as_it_is(text: str) -> None:
    plain = printable(text)
    assert shown(PlainConsole(), text) == f"{plain}\n"
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    page = shown(PlainConsole(), table)
    assert page.count(plain) >= 2
    assert "\x1b" not in page
    assert "\x9b" not in page


@pytest.mark.parametrize("text", TEXTS)
def test_the_progress_of_a_run(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.TrainProgress(3) as bar:
        bar.on_phase(text)
        bar.on_message(text)
    assert printable(text) in capsys.readouterr().err


@pytest.mark.parametrize("text", TEXTS)
def test_error_messages(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf-t2i", "run", text])
    with pytest.raises(SystemExit):
        cli.main()
    err = capsys.readouterr().err
    assert printable(text) in err
    assert "\x1b" not in err


def test_nobody_else_makes_a_console() -> None:
    package = Path(rlhf_t2i.__file__).parent
    makers = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if re.search(r"rich\.console|rich import print|[^n]Console\(", file.read_text("utf-8"))
    }
    assert makers == {"utils/terminal.py"}
