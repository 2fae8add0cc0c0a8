"""Start Ray on this machine, or join a cluster that runs already."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import cast

import psutil
import ray
from ray._private import ray_constants, services, worker
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_t2i.cluster.ray_folder import RayFolder
from rlhf_t2i.errors import RunError, Stopped, UsageError, first_line, option

_ANSWER_TIMEOUT_S = 10.0  # of a port; Ray itself would wait for minutes
_own: list[RayFolder] = []  # of the Ray that this process started


def start_local_ray(processes: int) -> None:
    """Start Ray on this machine, on loopback, without dashboard and usage statistics.

    Args:
        processes: Room for this many. They may outnumber the cores: they share them, each with its own threads.

    Raises:
        RunError: Ray does not start (it wants a share of the machine's memory free), or is open to the network.
    """
    _environment()
    # Oddly named, but these two make Ray use 127.0.0.1 alone. Ray read the first when it was imported, so a variable
    # set now reaches its child processes only and the value itself has to change, too.
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    cpus = max(os.cpu_count() or 1, processes)
    try:
        _own.append(RayFolder())
        with _own_sigterm(), _out_of_reach():
            ray.init(
                "local",  # a RAY_ADDRESS in the environment is not --address
                num_cpus=cpus, include_dashboard=False, log_to_driver=False, configure_logging=False,
                job_config=_JobConfig(), _temp_dir=str(_own[-1].ray), object_spilling_directory=str(_own[-1].spill),
            )  # fmt: skip
    except Stopped:
        raise
    except Exception as error:  # a node that does not come up is a bare Exception
        raise RunError(f"Ray does not start on this machine: {first_line(error)}") from error
    bound = ray.util.get_node_ip_address()
    if not bound.startswith("127."):
        stop()
        raise RunError(f"Ray {ray.__version__} listens on {bound} instead of 127.0.0.1: use the version we test with")


def keep_messages(file: Path) -> None:
    """Write what Ray reports of its own processes, 20 lines for a dead raylet, to a file instead of standard output."""

    def keep(data: dict[str, object], ignore_prefix: bool) -> None:
        with suppress(OSError), file.open("a", encoding="utf-8") as log:  # a full disk ends no run for these
            log.writelines(f"({data['pid']}) {line}\n" for line in cast(list[str], data["lines"]))

    worker.print_to_stdstream = keep


@atexit.register
def stop() -> None:
    """Leave Ray; one that this process started ends with all its processes, and its folder is removed."""
    agents = _agents() if _own else []
    ray.shutdown()
    for agent in agents:
        # Where the control store died, they would try to reach it for a minute.
        with suppress(psutil.NoSuchProcess):
            agent.kill()
    while _own:
        _own.pop().remove()


def _agents() -> list[psutil.Process]:
    """The processes below the raylets that this process started."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                found += process.children(recursive=True)
    return found


class _JobConfig(JobConfig):
    """Keeps the working folder off the import path of Ray's workers.

    Ray would put it first: a file named ``statistics.py`` in it ends every worker, and its code runs there.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True


@contextmanager
def _out_of_reach() -> Iterator[None]:
    """Start Ray's own processes in sessions of their own.

    A signal for the run's process group, or a terminal that closes, would end them before a checkpoint is written. They
    end with this process all the same, by ``PR_SET_PDEATHSIG``.
    """
    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def join(address: str) -> str:
    """Join the Ray cluster of ``--address``; returns HOST:PORT of its head.

    Raises:
        UsageError: None answers there, or it refuses this process: its token or certificates are others.
    """
    _environment()
    try:
        place = _place(address)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{option('address')} {address}: no Ray cluster answers there ({first_line(error)})") from None
    try:
        _introduce(place, address)
        with _own_sigterm():
            ray.init(address=address, log_to_driver=False, configure_logging=False, job_config=_JobConfig())
        return place
    except ray.exceptions.AuthenticationError as error:
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        raise UsageError(
            f"{option('address')} {address}: Ray refuses ({error.message}; RAY_AUTH_MODE is {mode}): set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token (docs/security.md)"
        ) from None
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if "No node info found" in str(error):
            raise UsageError(
                f"{option('address')} {address}: the cluster answers, but this machine is no node of it: run "
                f"`ray start --address={place}` here first, or this command on one of its nodes"
            ) from None
        tls = os.environ.get("RAY_USE_TLS", "not set")
        raise UsageError(
            f"{option('address')} {address}: something listens there, but no Ray cluster that answers this process "
            f"({first_line(error)}): compare the versions of Ray and the TLS settings (RAY_USE_TLS is {tls})"
        ) from None


def same_node() -> NodeAffinitySchedulingStrategy:
    """Place an actor on the node of this process, and nowhere else."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _place(address: str) -> str:
    """HOST:PORT of a cluster's head, where something listens; Ray itself would try for a minute and more.

    Raises:
        OSError: Nothing does.
        ValueError: Not an address; ``ray.init`` takes some words that start a Ray of one's own.
    """
    place = None if address in ("", "local") or "://" in address else canonicalize_bootstrap_address(address)
    if place is None:
        raise ValueError("give HOST:PORT of its head node")
    host, _, port = place.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _ANSWER_TIMEOUT_S).close()
    return place


def _introduce(place: str, address: str) -> None:
    """Ask the cluster who it is: a wrong token is refused at once, where ``ray.init`` tries on and blames nothing."""
    if address == "auto":
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    ensure_token_if_auth_enabled(create_token_if_missing=False)  # without a token the next line would end the process
    GcsClient(address=place)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray replaces it by its own, which exits with code 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as stop:
        if stop.code == signal.SIGTERM and callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _environment() -> None:
    """Quiet, private Ray: no usage statistics, and no advice on tokens (docs/security.md has ours)."""
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray would start one idle Python process per core, which no role can use: each has an environment of its own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "false")
