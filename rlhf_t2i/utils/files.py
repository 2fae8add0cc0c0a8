"""Atomic files and folders: written aside, then renamed. And folders that one process holds."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf_t2i.errors import ProcessLost, RunError, UsageError, first_line, option

ASIDE, _OLD = ".writing-", ".writing-old-"
"""Beginnings of the names of what is being written, and of what it replaces."""
_LONGEST = 240  # bytes of a new name: what is written aside has a longer one, and systems take 255
_FULL = 2**16  # free bytes of a disk that counts as full
LOCK = ".lock"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
"""Errors of the system that are the disk's, not the program's."""
_PLACE_ERRORS = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ENOTEMPTY,
)  # fmt: skip
"""Errors of a place that was changed meanwhile: removed, made read-only, or a file where a folder was."""


def expanded(path: str) -> Path:
    """A path with ``~`` or ``~user`` replaced by the home folder.

    Raises:
        UsageError: There is no such user, or no file can have that path: a name that is too long, a loop of links, a
            zero byte, or below a folder that must not be entered.
    """
    try:
        found = Path(path).expanduser()
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        return found
    except RuntimeError:
        why = "no user has that home folder"
    except OSError as error:
        why = error.strerror or "the system refuses it"
    except ValueError:
        why = "it holds a zero byte"
    else:
        return found
    shown = path if len(path) <= 200 else f"{path[:100]}...{path[-60:]}"
    raise UsageError(f"no file or folder can be {shown} ({why})")


def given(path: str | Path) -> Path:
    """A path on the command line or of a Python function. A shell leaves the ``~`` of ``--out=~/x`` as it is.

    Raises:
        UsageError: Empty, as of a variable that is not set; ``-``, since no command reads or writes a stream; or not a
            path that a file can have.
    """
    if not str(path):
        raise UsageError("the path of a file or folder is empty: is a variable not set? (the working folder is .)")
    if str(path) == "-":
        raise UsageError("'-' is not taken for standard input or output here: name a file (./- is one)")
    found = expanded(str(path))
    if len(os.fsencode(found.name)) > _LONGEST and not found.exists():
        raise UsageError(f"{found.name[:40]}... has a name of over {_LONGEST} bytes: choose a shorter one")
    return found


def absolute(path: str | Path, folder: Path | None = None) -> Path:
    """An absolute path without ``~`` and ``..``, relative to ``folder`` or the working directory.

    Links are kept: a file's format is told by the name that the user gave, not by what a link points to (the hub's
    cache links ``name.safetensors`` to a file named by its hash).

    Raises:
        UsageError: ``~user`` names nobody.
    """
    whole = (folder or Path.cwd()) / expanded(str(path))
    short = Path(os.path.normpath(whole))
    # "link/../x" is another file than "x" where link leads elsewhere.
    return short if os.path.realpath(short) == os.path.realpath(whole) else whole.absolute()


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically, and wait until it is on the disk."""
    write_atomic(path, text, durable=True)
    sync_folder(path.parent)


def write_atomic(path: Path, data: bytes | str, durable: bool = False) -> Path:
    """Replace a file's content atomically; its folder is made where it is missing.

    Args:
        path: The file.
        data: Its content; text is written as UTF-8.
        durable: Wait for the disk. What can be made again, an evaluation's picture, need not.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(ASIDE + path.name)
    try:
        with aside.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        return aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def append_line(path: Path, row: object) -> None:
    """Add a line of JSON to a file, and wait until it is on the disk: a checkpoint written next must not outlive it.

    A last line that a kill has cut short gets its line feed, so that it does not run into the new one.
    """
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(_line(row).encode())
        file.flush()
        os.fsync(file.fileno())


def rewrite_lines(path: Path, rows: Sequence[object]) -> None:
    """Replace a file of JSON lines atomically; without rows there is no file."""
    if rows:
        write_text(path, "".join(map(_line, rows)))
    else:
        path.unlink(missing_ok=True)


def _line(row: object) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` only if the block succeeds; an older ``path`` is replaced.

    Raises:
        RunError: It could not be written, and why; an older ``path`` is as it was.
    """
    aside, old = path.with_name(ASIDE + path.name), path.with_name(_OLD + path.name)
    try:
        remove(aside)
        aside.mkdir(parents=True)
        yield aside
        _sync_tree(aside)
        if os.path.lexists(path):  # out of the way in one step: a kill while it is being removed would leave half of it
            remove(old)
            path.rename(old)
        aside.rename(path)
        sync_folder(path.parent)
        remove(old)
    except BaseException as error:
        why = _why_not_written(error, path.parent)  # while the disk is still full
        shutil.rmtree(aside, ignore_errors=True)
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        if why is not None:
            raise not_written(path, why) from error
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or failing disk into an error message.

    Args:
        path: What is written in the block, for errors that name no file.

    Raises:
        RunError: A file could not be written, and why.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS and not _is_of(error, path):
            raise
        raise not_written(Path(error.filename or path), error.strerror) from error


def _is_of(error: OSError, path: Path) -> bool:
    """Whether an error is of the place that is written to: its folder was removed meanwhile, or is a file."""
    if error.errno not in _PLACE_ERRORS or not isinstance(error.filename, str):
        return False
    file = Path(error.filename)
    return file.parent == path.parent or file.is_relative_to(path)


def not_written(path: Path, why: str | None) -> RunError:
    """The error for a file or folder that could not be written."""
    path = path.with_name(path.name.removeprefix(ASIDE))  # the user knows the name that it was to get
    return RunError(f"{path} could not be written: {why}; what was written before is intact")


def _why_not_written(error: BaseException, folder: Path) -> str | None:
    """The disk's part in an error; None where it has none.

    Of a full disk torch's writer says "iostream error", and a process under Ray only that it failed.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, ProcessLost) or not isinstance(error, Exception):
        return None
    if shutil.disk_usage(folder).free < _FULL:
        return os.strerror(errno.ENOSPC)
    writers = "iostream" in str(error) or "inline_container" in str(error) or type(error).__name__ == "SafetensorError"
    return first_line(error) if writers else None


def recover(parent: Path) -> None:
    """Give a folder its name again that :func:`atomic_dir` had moved away when its process was killed."""
    for old in parent.glob(f"{_OLD}*"):
        path = parent / old.name.removeprefix(_OLD)
        if not os.path.lexists(path):
            old.rename(path)


def remove_unfinished(parent: Path) -> None:
    """Remove what :func:`atomic_dir` left in ``parent`` when its process was killed."""
    for folder in parent.glob(f"{ASIDE}*"):
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder and all in it, if it is there; of a link to one only the link."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _sync_tree(folder: Path) -> None:
    """Wait until all files in a folder, and their names, are on the disk."""
    for below, _, names in os.walk(folder):
        for name in names:
            with (Path(below) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(below))


def sync_folder(folder: Path) -> None:
    """Make new names in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(out: Path, what: str) -> Iterator[None]:
    """Hold OUT for one process; the lock ends with the process, even when it is killed.

    On a file system without locks (Lustre can be mounted so) nothing is held.

    Raises:
        UsageError: Another process holds it, or the folder cannot be written.
    """
    # No existence lock instead of flock: it would outlive a process that is killed.
    lock = FileLock(out / LOCK, blocking=False, fallback_to_soft=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(f"{option('out')} {out}: another {what} works in this folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise UsageError(f"{option('out')} {out} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(value: object) -> object:
    """The same with null for numbers that are not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
