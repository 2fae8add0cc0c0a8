"""A local run listens on loopback alone."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import HANG_S


def is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@pytest.mark.ray
@pytest.mark.slow
def test_every_socket_of_a_local_run_is_bound_to_loopback(tmp_path: Path) -> None:
    """A process of its own: tests/conftest.py sets variables that a user's shell does not have."""
    ours = ("RAY_", "GLOO_", "NCCL_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.sockets"],
        env=clean | {"HOME": str(tmp_path), "RAY_ADDRESS": "192.0.2.1:6379"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sums"] == [2.0, 2.0]
    assert {"gcs_server", "raylet"} <= {name for name, *_ in found["sockets"]}
    assert found["master"] in [[address, port] for _, address, port in found["sockets"]]
    assert [socket for socket in found["sockets"] if not is_loopback(socket[1])] == []
    assert found["dashboard"] == ""
    assert found["usage_stats"] is False
    assert found["token"] is True
