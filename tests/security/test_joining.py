"""``--address``: a cluster with a token refuses who lacks it, in one sentence, and nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.schema import Recipe

# As every run on one machine starts Ray: with a token of its own, which it makes.
HEAD = """
import sys
import ray
from rlhf_t2i.cluster.connect import start_local_ray
start_local_ray(2)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
GROUPS = "{all: {roles: [learner, generator, assistant, reference, reward], threads: 1}}"


def clean(home: Path, **more: str) -> dict[str, str]:
    """The environment of a user who has set nothing about tokens."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return kept | {"HOME": str(home), **more}


@pytest.fixture
def head(tmp_path: Path) -> Iterator[str]:
    home = tmp_path / "head"
    home.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", HEAD], env=clean(home), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        yield next(line for line in child.stdout if line.startswith("address ")).split()[1]
    finally:
        child.communicate()


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_refuses_who_has_not_its_token(head: str, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    make_recipe()
    (tmp_path / "wrong").write_text("0" * 64, "utf-8")
    right, wrong, nothing = tmp_path / "head/.ray/auth_token", tmp_path / "wrong", tmp_path / "nothing"

    def cli(command: str, *more: str, **environment: str) -> subprocess.Popen[str]:
        sets = ["--set", f"placement={{mode: ray, groups: {GROUPS}}}", "--address", head]
        return subprocess.Popen(
            [sys.executable, "-m", "rlhf_t2i.cli", command, str(tmp_path / "recipe.yaml"), *sets, *more],
            env=clean(tmp_path, **environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    welcome = cli("plan", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(right))
    out = ("--out", str(tmp_path / "out"))
    refused = {
        "missing or incorrect; RAY_AUTH_MODE is token": cli(
            "run", *out, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong)
        ),
        "missing or incorrect; RAY_AUTH_MODE is not set": cli("plan"),
        "cannot be opened or is empty": cli("plan", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(nothing)),
    }
    for sentence, child in refused.items():
        _, error = child.communicate()
        assert child.returncode == 2, error
        assert f"--address {head}: Ray refuses (" in error
        assert sentence in error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    _, error = welcome.communicate()
    assert welcome.returncode == 0, error


@pytest.mark.parametrize("address", ["", "local", "ray://127.0.0.1:10001", "nohost", "127.0.0.1:1", "nohost.invalid:1"])
def test_what_is_no_cluster_is_said_at_once(address: str) -> None:
    """And none is started: ``ray.init`` would, for some of these."""
    import ray

    from rlhf_t2i.cluster.connect import join

    began = ray.is_initialized()
    with pytest.raises(UsageError, match=r"--address .*: no Ray cluster answers there \("):
        join(address)
    assert ray.is_initialized() == began
