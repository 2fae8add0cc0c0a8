"""The command line as a user meets it: exit codes, sentences, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_t2i.cli import main
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from tests.limits import HANG_S

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def recipe_file(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(reading.dump(make_recipe()), "utf-8")
    return path


def cli(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlhf_t2i.cli", *map(str, args)],
        capture_output=True, text=True, timeout=HANG_S, cwd=cwd, check=False,
    )  # fmt: skip


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command in this process: its exit code, and what it wrote on stderr. A process of its own costs imports."""

    def command(*args: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf-t2i", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert isinstance(stop.value.code, int)
        return stop.value.code, capsys.readouterr().err

    return command


def test_help_and_a_refused_recipe_answer_without_torch(recipe_file: Path) -> None:
    code = (
        "import sys, time; began = time.perf_counter(); sys.argv = {argv!r}\n"
        "from rlhf_t2i import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules, 'ray' in sys.modules)\n"
    )
    for argv, expected in ((["x", "--help"], "0"), (["x", "run", str(recipe_file), "--set", "stepz=3"], "2")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argv=argv)], capture_output=True, text=True, timeout=HANG_S, check=False
        )
        assert done.stdout.strip().splitlines()[-1] == f"{expected} False False", done.stderr


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stepz=3", "did you mean 'steps'"),
        ("algorithm.divergence.name=pseudo_hubber", "did you mean 'pseudo_huber'"),
        ("algorithm.divergence.options.c_real=1", "did you mean 'c_rel'"),
        ("optimization.micro_batch=3", "batch_size"),
        ("data.prompts=/nowhere.txt", "no such prompt file"),
        ("models.reference=/nowhere", "no such model"),
        ("algorithm.rewards=[{name: http, options: {url: 'http://127.0.0.1:1'}}]", "no gradient"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    recipe_file: Path, override: str, sentence: str, here: Callable[..., tuple[int, str]]
) -> None:
    out = recipe_file.parent / "out"
    code, errors = here("run", recipe_file, "--set", override, "--out", out)
    assert code == 2, errors
    assert sentence in errors
    assert "Traceback" not in errors
    assert not out.exists()


def test_run_then_sample(recipe_file: Path, here: Callable[..., tuple[int, str]]) -> None:
    out = recipe_file.parent / "out"
    done = cli("run", recipe_file, "--out", out, "--set", "steps=1")
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout.replace("\n", "")
    assert "report.html" in done.stdout
    picture = recipe_file.parent / "cat.png"
    done = cli("sample", out, "--prompt", "a red cat", "-o", picture)
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 0
    assert here("sample", out, "--prompt", "a cat", "-o", "picture.jpg")[0] == 2
    assert here("sample", recipe_file.parent, "--prompt", "a cat")[0] == 2
    code, errors = here("run", recipe_file, "--out", out)
    assert code == 2
    assert "--resume" in errors


@pytest.fixture
def long_run(recipe_file: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_t2i.cli", "run", str(recipe_file), "--out", str(recipe_file.parent / "out"),
         "--set", "steps=100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_writes_a_checkpoint(
    long_run: subprocess.Popen[str], recipe_file: Path, number: signal.Signals, code: int
) -> None:
    out = recipe_file.parent / "out"
    deadline = time.monotonic() + HANG_S
    while not (out / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        assert long_run.poll() is None, long_run.communicate()[1]
        time.sleep(0.2)
    os.kill(long_run.pid, number)
    _, errors = long_run.communicate(timeout=HANG_S)
    assert long_run.returncode == code, errors
    assert "--resume" in errors.replace("\n", " ")
    from rlhf_t2i.training import checkpoints

    assert checkpoints.find(out)[1].step >= 1


def test_a_signal_during_the_report_keeps_its_exit_code(recipe_file: Path) -> None:
    out = recipe_file.parent / "out"
    code = (
        "import signal, sys; from rlhf_t2i import cli; from rlhf_t2i.tools import report\n"
        "report.write_report = lambda out: signal.raise_signal(signal.SIGTERM)\n"
        f"sys.argv = ['x', 'run', {str(recipe_file)!r}, '--out', {str(out)!r}, '--set', 'steps=1']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM; continue with --resume" in done.stderr.replace("\n", " ")
    assert (out / "model/model_index.json").is_file()


@pytest.mark.parametrize("reader", ["gone", "full", "closed"])
def test_a_lost_reader_does_not_end_a_run(recipe_file: Path, reader: str) -> None:
    """``run | true``, ``run > /dev/full`` and ``run >&-``: the exit code is that of the run."""
    out = recipe_file.parent / "out"
    command = [sys.executable, "-m", "rlhf_t2i.cli", "run", str(recipe_file), "--out", str(out), "--set", "steps=1"]
    if reader == "closed":
        done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], timeout=HANG_S, check=False)
    else:
        read, write = os.pipe() if reader == "gone" else (os.open(os.devnull, 0), os.open("/dev/full", os.O_WRONLY))
        os.close(read)
        done = subprocess.run(command, stdout=write, stderr=write, timeout=HANG_S, check=False)
        os.close(write)
    assert done.returncode == 0
    assert (out / "report.html").is_file()
