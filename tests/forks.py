"""Ray's processes of tests, forked from one that has imported everything; a role takes 7 to 8 CPU seconds for that.

With ``RLHF_T2I_TESTS_FORK=1`` tests/conftest.py sets ``RAY_RUNTIME_ENV_HOOK``, which makes Ray start its Python
processes as ``python tests/forks.py WORKER``. That process asks the server for a fork, hands over its streams,
arguments, folder and environment, and ends when the fork ends, with its exit code; a fork ends with the process that
asked for it, as if they were one. The server starts with the first Ray of a test session and ends with the session.

What differs from real processes: /proc shows the server's environment and command for a fork, and what reads the
environment while it is imported has read the server's. Tests for which this matters use the fixture ``real_processes``.

Nothing but the standard library is imported at the top: what asks shall start in 20 ms.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path

SESSION = "RLHF_T2I_TESTS_SESSION"  # the number of the process whose end is the session's
_ROOT = str(Path(__file__).resolve().parents[1])


def hook(runtime_env: dict[str, object] | None) -> dict[str, object]:
    """Ray's hook: this job's Python processes are forks."""
    session = os.environ[SESSION]
    if not _answers(session):
        import subprocess

        from tests.limits import HANG_S

        code = f"import sys; sys.path.insert(0, {_ROOT!r}); from tests.forks import serve; serve({session})"
        # Nothing of its streams: whoever reads this process's to their end would wait for the server's.
        nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        server = subprocess.Popen([sys.executable, "-P", "-c", code], start_new_session=True, cwd=_ROOT, **nothing)
        end = time.monotonic() + HANG_S
        while not _answers(session):
            if server.poll() or time.monotonic() > end:
                raise RuntimeError("the server of tests/forks.py does not start")
            time.sleep(0.05)
    return {**(runtime_env or {}), "py_executable": f"{sys.executable} -I -S {Path(__file__).resolve()}"}


def _answers(session: str) -> bool:
    with socket.socket(socket.AF_UNIX) as found:
        return found.connect_ex(_address(session)) == 0


def _address(session: str) -> str:
    return f"\0rlhf-t2i-tests-{session}"  # abstract: no file to remove


def ask(arguments: list[str]) -> int:
    """Have a fork run a Python file with its arguments, and wait for its exit code."""
    request = json.dumps({"argv": arguments, "folder": str(Path.cwd()), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(_address(os.environ[SESSION]))
        socket.send_fds(connection, [struct.pack("!I", len(request))], [0, 1, 2])
        connection.sendall(request)
        code = connection.recv(1)
    return code[0] if code else 1


def serve(session: int) -> None:
    """Fork for everyone of this user who asks, until the session's process ends."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(_address(str(session)))
    except OSError:
        return  # another one was first
    _import()
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    import select

    ended = os.pidfd_open(session)
    while True:
        ready, _, _ = select.select([listener, ended], [], [])
        if ended in ready:
            return
        connection, _ = listener.accept()
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.getuid() and not os.fork():
            listener.close()
            os.close(ended)
            _become(connection)
        connection.close()


def _import() -> None:
    """What a role's process imports, except Ray, which reads the environment for good when it is imported."""
    import deepspeed  # noqa: F401
    import diffusers
    import transformers

    import rlhf_t2i.engines.deepspeed
    import rlhf_t2i.roles.worker  # noqa: F401

    _ = diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusion3Pipeline, diffusers.StableDiffusionPipeline
    _ = transformers.CLIPModel, transformers.CLIPTextModelWithProjection, transformers.CLIPTokenizer
    assert "ray" not in sys.modules


def _become(connection: socket.socket) -> None:
    """Run what was asked for, in the fork."""
    code = 1
    try:
        code = _run(connection, *_request(connection))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            connection.send(bytes([code & 255]))
        finally:
            os._exit(code)


def _request(connection: socket.socket) -> tuple[list[str], str, dict[str, str]]:
    """The arguments, folder and environment that were sent; the streams that came along become this process's."""
    header, streams, _, _ = socket.recv_fds(connection, 4, 3)
    if not header:
        os._exit(0)  # somebody asked whether the server answers
    for stream, number in zip(streams, (0, 1, 2), strict=True):
        os.dup2(stream, number)
        os.close(stream)
    body, size = b"", struct.unpack("!I", header)[0]
    while len(body) < size:
        body += connection.recv(size - len(body))
    request = json.loads(body)
    return request["argv"], request["folder"], request["environment"]


def _run(connection: socket.socket, arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    """Run a Python file as ``python FILE ARGUMENTS`` does in that folder and environment; returns its exit code."""
    import random
    import runpy
    import threading

    import torch

    os.setsid()
    threading.Thread(target=_end_with, args=[connection], daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    random.seed()
    own = {_ROOT, *_python_path(os.environ)}
    sys.path = [str(Path(arguments[0]).parent), *_python_path(environment), *(p for p in sys.path if p not in own)]
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _python_path(environment: Mapping[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def _end_with(connection: socket.socket) -> None:
    """End when the process that asked for this one is gone."""
    connection.recv(1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1:]))
