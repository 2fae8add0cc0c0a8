"""Upload an exported model to the hub, as it is: the folder must be whole by its own manifest."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_t2i.errors import RunError, UsageError, first_line
from rlhf_t2i.utils import files, manifest


def push(run: Path, repository: str, *, private: bool = False) -> str:
    """Upload ``RUN/model``, and ``RUN/adapter`` as the folder ``adapter``, in one commit each.

    The token is the hub client's own: ``HF_TOKEN``, or what ``hf auth login`` stored.

    Args:
        run: A run's folder, or its ``model`` folder.
        repository: ``org/name``; created if it does not exist.
        private: Create it as a private one; an existing repository stays as it is.

    Returns:
        The address of the repository.

    Raises:
        UsageError: No finished export, a damaged one, no such name, or no token; nothing was sent.
        RunError: The hub refused, or was out of reach.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    parts = _exports(files.given(run))
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"{repository!r} is no name for a repository on the hub: {first_line(error)}") from None
    if repository.count("/") != 1:
        raise UsageError(f"{repository!r} is no name for a repository on the hub: write it as org/name")
    if get_token() is None:
        raise UsageError("the hub needs a token: run `hf auth login`, or set HF_TOKEN to one that can write")
    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        for name, folder in parts.items():
            api.upload_folder(
                repo_id=repository, folder_path=folder, path_in_repo=name, commit_message="Upload with rlhf-t2i push"
            )
    except Exception as error:  # the client's HTTP library, and so its errors, differ by version
        raise RunError(f"{repository} could not be uploaded: {first_line(error)}") from error
    return str(address)


def _exports(run: Path) -> dict[str | None, Path]:
    """The folders to upload by their place in the repository; None is its root."""
    model = run if (run / "model_index.json").is_file() else run / "model"
    if not (model / "model_index.json").is_file():
        raise UsageError(f"{run} holds no exported model: give the folder of a finished run, or its model/ folder")
    parts: dict[str | None, Path] = {None: model}
    if model.name == "model" and os.path.lexists(model.parent / "adapter"):
        parts["adapter"] = model.parent / "adapter"
    for folder in parts.values():
        damage = manifest.damage(folder)
        if damage is not None:
            raise UsageError(f"{folder} is not as the run wrote it ({damage}): resume the run to write it again")
        link = next((path for path in folder.rglob("*") if path.is_symlink()), None)
        if link is not None:
            raise UsageError(f"{link} is a link, possibly to a file of yours: replace it by the file before uploading")
        stray = next((path for path in _found(folder) if path not in manifest.covered(folder)), None)
        if stray is not None:
            raise UsageError(f"{stray} is not of the run, and an upload is public for good: move it elsewhere first")
    return parts


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
