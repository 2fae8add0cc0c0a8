"""Files of a checkpoint that a thread writes while training goes on."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map

T = TypeVar("T")
Store = Callable[[object], None]
"""Writes a value into its file."""


class Writer:
    """Copies what a file is to hold to host memory, and writes the copies in order in a thread.

    The thread ends with the process: a second signal does not wait for it.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[tuple[object, Store]] = queue.Queue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def write(self, value: object, store: Store) -> None:
        """Copy a value now and store the copy later.

        Args:
            value: Tensors, in containers or not, and what else can be copied.
            store: Called in the thread.
        """
        self._jobs.put((snapshot(value), store))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until all is written; raises the first error since the last call."""
        self._jobs.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            value, store = self._jobs.get()
            try:
                if self._error is None:  # the checkpoint is lost: no more of it is written
                    store(value)
            except BaseException as error:  # raised where it is waited for
                self._error = error
            del value
            self._jobs.task_done()


def snapshot(value: T) -> T:
    """A copy in host memory that shares nothing with the value."""
    copied: T = tree_map(_copy, value)
    return copied


def _copy(leaf: object) -> object:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)
