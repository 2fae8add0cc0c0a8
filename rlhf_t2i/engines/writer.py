"""Files of a checkpoint that a thread writes while training goes on."""

from __future__ import annotations

import copy
import queue
import threading
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Store = Callable[[object], None]
"""Writes a value into its file."""


class Writer:
    """Copies what a file is to hold to host memory, and writes the copies in order in a thread.

    The memory is kept for the next checkpoint: the first touch of new pages takes longer than the copy. The thread ends
    with the process: a second signal does not wait for it.
    """

    def __init__(self) -> None:
        self._spare: defaultdict[object, list[Tensor]] = defaultdict(list)  # by shape and dtype
        self._jobs: queue.Queue[tuple[object, Store]] = queue.Queue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def write(self, value: object, store: Store) -> None:
        """Copy a value now and store the copy later.

        Args:
            value: Tensors, in containers or not, and what else can be copied.
            store: Called in the thread.
        """
        self._jobs.put((tree_map(self._copy, value), store))
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
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor):
                    self._spare[leaf.shape, leaf.dtype].append(leaf)
            del value
            self._jobs.task_done()

    def _copy(self, leaf: object) -> object:
        """What shares nothing with a leaf; of a tensor in host memory."""
        if not isinstance(leaf, Tensor):
            return copy.deepcopy(leaf)
        spare = self._spare[leaf.shape, leaf.dtype]
        held = spare.pop() if spare else torch.empty(leaf.shape, dtype=leaf.dtype)
        return held.copy_(leaf.detach())
