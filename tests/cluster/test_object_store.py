"""A full /dev/shm is seen before a process writes to Ray's object store there, and named after one did."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from rlhf_t2i.cluster import clients, control, object_store
from rlhf_t2i.cluster.control import RayMonitor
from rlhf_t2i.cluster.object_store import ObjectStore
from rlhf_t2i.errors import ProcessLost
from tests.training.test_ray_errors import EXCEPTIONS

MIB = 2**20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    """The store of a pretended raylet, this process: a sparse file of 80 MiB without a name, of which 2 are written."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("looks at Linux's /proc")
    with (tmp_path / "plasmaAbc").open("wb") as file:
        file.truncate(80 * MIB)
        file.write(b"x" * 2 * MIB)
        file.flush()
        os.fsync(file.fileno())
        (tmp_path / "plasmaAbc").unlink()
        found = ObjectStore.of(os.getpid())
        assert found is not None
        yield found


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Bytes free in the store's folder: assign ``return_value.free``."""
    usage = MagicMock()
    monkeypatch.setattr(object_store.shutil, "disk_usage", usage)
    return usage


def test_the_store_is_found_though_its_file_has_no_name(store: ObjectStore, tmp_path: Path) -> None:
    assert (store.folder, store.size) == (tmp_path, 80 * MIB)


def test_a_raylet_without_a_store_has_none() -> None:
    assert ObjectStore.of(os.getpid()) is None


def test_room_is_short_when_the_unwritten_pages_do_not_fit(store: ObjectStore, free: MagicMock) -> None:
    free.return_value.free = 65 * MIB
    assert store.shortage() is None
    free.return_value.free = 63 * MIB
    assert store.shortage() == (
        f"{store.folder} has 63 MiB left, and Ray's object store there may take 78 MiB more: remove what other "
        "programs keep there, or enlarge it (docker run --shm-size)"
    )


def test_a_store_that_has_all_its_pages_needs_no_room(tmp_path: Path, free: MagicMock) -> None:
    file = tmp_path / "whole"
    file.write_bytes(b"x" * MIB)
    free.return_value.free = 0
    assert ObjectStore(file, tmp_path, MIB).shortage() is None


def test_a_dead_raylet_has_given_its_pages_back(tmp_path: Path, free: MagicMock) -> None:
    gone = ObjectStore(tmp_path / "gone", tmp_path, 80 * MIB)
    free.return_value.free = 79 * MIB
    assert gone.shortage() is not None
    free.return_value.free = 81 * MIB
    assert gone.shortage() is None


def test_a_call_is_not_made_into_a_full_store(store: ObjectStore, free: MagicMock) -> None:
    """The driver itself would end with the raylet, without a message."""
    free.return_value.free = 0
    server = MagicMock()
    client = clients.RemoteClient("learner", [server], check=RayMonitor(own=True, store=store).check)
    with pytest.raises(ProcessLost, match=f"^{store.folder} has 0 MiB left"):
        client.submit_all(MagicMock(__name__="load"), [torch.zeros(2**14)])
    assert not server.mock_calls
    client.submit_all(MagicMock(__name__="step"), [["a cat"]])  # a few bytes need no room there
    assert len(server.mock_calls) == 1


@pytest.mark.parametrize(
    "raised",
    [
        EXCEPTIONS.ActorUnavailableError("The actor is temporarily unavailable: RpcError: ...", b"0" * 16),
        EXCEPTIONS.ActorDiedError(),
    ],
)
def test_what_ended_a_process_is_said_once(
    store: ObjectStore, free: MagicMock, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    """Ray knows no signal, and lists a dozen lines of what it may have been."""
    monkeypatch.setattr(control, "oom_kills", kills := MagicMock(return_value=3))
    free.return_value.free = 100 * MIB
    monitor = RayMonitor(store=store)
    with pytest.raises(ProcessLost) as caught, clients.translate_ray_errors("learner"):
        raise raised
    lost = caught.value
    killed = (
        "a process of the learner died: killed from outside, most often by the kernel for lack of memory, or crashed"
    )
    assert str(lost).startswith(killed)
    assert str(monitor.explain(lost)) == str(lost)
    kills.return_value = 4
    explained = monitor.explain(monitor.explain(lost))
    assert str(explained).startswith(f"{lost}; since the roles started, the kernel has killed a process")
    assert str(explained).count("oom_kill") == 1
    free.return_value.free = 0
    assert str(monitor.explain(monitor.explain(lost))).count(f"{store.folder} has 0 MiB left") == 1


def test_the_kernels_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 7\nswap_ra 0\n", "ascii")
    monkeypatch.setattr(control, "_KERNEL_COUNTERS", tmp_path / "vmstat")
    assert control.oom_kills() == 7
    monkeypatch.setattr(control, "_KERNEL_COUNTERS", tmp_path / "absent")
    assert control.oom_kills() is None
