"""Prompt embeddings on disk: text encoders of billions of parameters run once per prompt, and in no role's process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rlhf_t2i.errors import RunError
from rlhf_t2i.families.base import Conditioner
from rlhf_t2i.utils import files, targets
from rlhf_t2i.utils.device import send

_PLACE = "models.embeddings:"
UNCONDITIONAL = None
"""Stands for the unconditional branch among prompts: SDXL's is not the empty prompt's."""
_SHAPE, _PROMPT, _DIGEST = "shape.", "prompt", "blake2b"

Entry = str | None
Progress = Callable[[int, int], None]
"""``(done, total)`` prompts, after each."""


class EmbeddingFolder:
    """One safetensors file per prompt, in a folder named after everything that embeddings depend on.

    Args:
        root: ``models.embeddings``; several models and precisions may share it.
        identity: What embeddings depend on besides the prompt: encoders, tokenizers, dtype, image size, versions.
    """

    def __init__(self, root: Path, identity: str) -> None:
        self.root, self.folder = root, root / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def missing(self, prompts: Iterable[str]) -> list[Entry]:
        """The distinct entries that a run with these prompts needs and the folder lacks."""
        wanted: dict[Entry, None] = dict.fromkeys([UNCONDITIONAL, *prompts])
        return [entry for entry in wanted if not (file := self._file(entry)).is_file() or not file.stat().st_size]

    def prepare(self) -> None:
        """Create the folder.

        Raises:
            UsageError: It cannot be created or written into.
        """
        targets.check_folder(self.folder, _PLACE)
        with files.disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, entry: Entry, row: Mapping[str, Tensor]) -> None:
        """Store one prompt's row; whole or not at all."""
        tensors, notes = {}, {_PROMPT: _text(entry)}
        for name, tensor in row.items():
            tensors[name] = _compact(tensor.detach().cpu())
            notes[_SHAPE + name] = f"{len(tensor) if tensor.ndim else 0} {str(tensor.dtype).removeprefix('torch.')}"
        notes[_DIGEST] = _digest(tensors, notes)
        files.write_atomic(self._file(entry), safetensors.torch.save(tensors, notes))

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """One prompt's row, bit for bit as the encoders gave it; on the CPU.

        Raises:
            RunError: It is missing here, or has changed since it was written.
        """
        file = self._file(entry)
        try:
            with safetensors.safe_open(file, "pt") as stored:
                notes = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if notes.pop(_DIGEST) != _digest(tensors, notes) or notes[_PROMPT] != _text(entry):
                raise ValueError("another content")
            return {name: _whole(tensor, notes[_SHAPE + name]) for name, tensor in tensors.items()}
        except FileNotFoundError:
            raise RunError(
                f"models.embeddings: {self.folder} has no embedding of {_text(entry)!r}: encode the prompts with "
                "`rlhf-t2i encode`, in a folder that every node sees"
            ) from None
        except (OSError, KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise RunError(
                f"models.embeddings: {file} is damaged: delete it and run `rlhf-t2i encode` again"
            ) from error

    def _file(self, entry: Entry) -> Path:
        name = "unconditional" if entry is UNCONDITIONAL else hashlib.sha256(entry.encode()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"


class StoredConditioner(Conditioner):
    """Conditioning from an :class:`EmbeddingFolder`; loads no text encoder.

    Args:
        folder: Holds the prompts that will be asked for.
        device: Where conditioning is wanted.
    """

    def __init__(self, folder: EmbeddingFolder, device: torch.device) -> None:
        super().__init__()
        self._folder, self._device = folder, device
        self._unconditional = self._read(UNCONDITIONAL)  # now: a folder that this node does not see ends the start

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """See :meth:`Conditioner.encode_one`."""
        return self._read(prompt)

    def unconditional_row(self) -> dict[str, Tensor]:
        """See :meth:`Conditioner.unconditional_row`."""
        return self._unconditional

    def _read(self, entry: Entry) -> dict[str, Tensor]:
        return {name: send(tensor, self._device) for name, tensor in self._folder.read(entry).items()}


def encode(folder: EmbeddingFolder, entries: list[Entry], encoder: Conditioner, progress: Progress) -> None:
    """Encode prompts into a folder, one at a time; what is stored stays when it is interrupted.

    Args:
        folder: Where to.
        entries: Of :meth:`EmbeddingFolder.missing`.
        encoder: The model's own text encoders.
        progress: Called after each prompt.
    """
    for done, entry in enumerate(entries, 1):
        with torch.no_grad():
            row = encoder.unconditional_row() if entry is UNCONDITIONAL else encoder.encode_one(entry)
        try:
            folder.write(entry, row)
        except OSError as error:
            raise files.not_written(folder.folder, error.strerror) from error
        progress(done, len(entries))


def check(root: Path) -> None:
    """Refuse a place where no folder can be.

    Raises:
        UsageError: It is a file, or below one, or behind a link to nothing.
    """
    targets.nearest_folder(root, _PLACE)


def _text(entry: Entry) -> str:
    return "the unconditional branch" if entry is UNCONDITIONAL else entry


def _compact(tensor: Tensor) -> Tensor:
    """Without the zeros at its end (padding), and in bfloat16 where that loses nothing."""
    if tensor.ndim:
        used = tensor.reshape(len(tensor), -1).ne(0).any(dim=1).nonzero()
        tensor = tensor[: int(used[-1]) + 1 if len(used) else 0]
    half = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
    return (half if torch.equal(half.to(tensor.dtype), tensor) else tensor).contiguous()


def _whole(tensor: Tensor, shape: str) -> Tensor:
    """The inverse of :func:`_compact`."""
    length, dtype = shape.split()
    tensor = tensor.to(getattr(torch, dtype))
    if not tensor.ndim:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(int(length) - len(tensor), *tensor.shape[1:])])


def _digest(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(repr(sorted(notes.items())).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
