"""Settings of the process that a plugin's code must leave as they are: other plugins, and the run, share them."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

Setting = tuple[Callable[[], Any], Callable[[Any], object]]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_observer: ContextVar[list[str] | None] = ContextVar("receives the names of settings that were restored", default=None)


@contextmanager
def restored() -> Iterator[None]:
    """Run a plugin's code in this block; what it changed of the process is undone at its end.

    Draws from torch's global generator are no change, a new seed is.
    """
    settings = _settings()
    before = {name: read() for name, (read, _) in settings.items()}
    try:
        yield
    finally:
        for name, (read, write) in settings.items():
            if read() != before[name]:
                write(before[name])
                _report(name)


@contextmanager
def observed() -> Iterator[list[str]]:
    """Yield a list that receives the names of the settings that :func:`restored` undoes in this block."""
    seen: list[str] = []
    token = _observer.set(seen)
    try:
        yield seen
    finally:
        _observer.reset(token)


def _report(name: str) -> None:
    seen = _observer.get()
    if seen is not None and name not in seen:
        seen.append(name)


def _settings() -> dict[str, Setting]:
    """How each setting is read and written, by the function that changes it."""
    import torch

    generator = torch.get_rng_state()
    cudnn = torch.backends.cudnn
    settings: dict[str, Setting] = {
        "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "torch.set_default_device": (_default_device, torch.set_default_device),
        "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
        "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
        "torch.set_float32_matmul_precision": (_matmul_precision, torch.set_float32_matmul_precision),
        "torch.use_deterministic_algorithms": (
            torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms,
        ),
        "torch.manual_seed": (torch.initial_seed, lambda _: torch.set_rng_state(generator)),
        "torch.backends.cudnn.benchmark": (lambda: cudnn.benchmark, lambda value: setattr(cudnn, "benchmark", value)),
        "torch.backends.cudnn.deterministic": (
            lambda: cudnn.deterministic, lambda value: setattr(cudnn, "deterministic", value),
        ),
        "os.chdir": (_working_folder, _enter),
        "socket.setdefaulttimeout": (socket.getdefaulttimeout, socket.setdefaulttimeout),
    }  # fmt: skip
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            settings[f"signal.signal({number.name})"] = _handler(number)
    return settings


def _default_device() -> object:
    """Torch's default device; None for the CPU, whose context would slow every call down."""
    import torch

    device = torch.get_default_device()
    return None if device.type == "cpu" else device


def _matmul_precision() -> str:
    """Torch's name for it; that of its newer setting, which a plugin may have used and the older one cannot read."""
    import torch

    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return str(torch.backends.cuda.matmul.fp32_precision)


def _handler(number: signal.Signals) -> Setting:
    return lambda: signal.getsignal(number), lambda handler: signal.signal(number, handler)


def _working_folder() -> str | None:
    """The working folder; None where it was removed."""
    with suppress(OSError):
        return os.getcwd()  # noqa: PTH109 - a text to compare
    return None


def _enter(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)
