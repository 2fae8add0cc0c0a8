"""Where a model comes from: a local folder or a hub id, checked before anything heavy is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.recipe import shipped
from rlhf_t2i.utils import files, fingerprints, inputs, manifest

Config = dict[str, Any]
"""The JSON object of a configuration file, as its library wrote it."""
INDEX, CONFIG = "model_index.json", "config.json"
"""The file of a pipeline that names its parts, and that of a network by itself."""
STUDENT = "student.json"
"""The file of an exported model that says how its generator is called."""
_DEEPEST = 10_000
_HASH = re.compile("[0-9a-f]{40}")
_FILES = (".bin", ".safetensors", ".pt", ".pth")
_revisions: dict[str, str] = {}


@dataclass(frozen=True)
class ModelRef:
    """A local path, or a hub repository with an optional revision and, for bare weights, a file in it."""

    location: str
    revision: str | None = None
    file: str | None = None

    @property
    def name(self) -> str:
        """The last name that the user gave: of a bare file its suffix says the format."""
        return (self.file or self.location).rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        """Whether the location is a path."""
        return Path(self.location).is_absolute()

    @property
    def kwargs(self) -> dict[str, object]:
        """Keyword arguments for ``from_pretrained``; a local folder never reaches for the network."""
        if self.is_local:
            return {"local_files_only": True}
        return {"revision": self.revision} if self.revision else {}


def parse(text: str) -> ModelRef:
    """Read a recipe's model.

    Args:
        text: A path (``./``, ``../``, ``~``, ``/``, or an existing folder), a repository ``org/name@revision``, one
            file of it, ``org/name/weights.bin@revision``, or a shipped model, ``emoji64:reference``.

    Raises:
        UsageError: The path does not exist, or the text is neither, or empty.
    """
    if not text.strip():
        raise UsageError("the name of a model is empty: is a variable not set? (the working folder is .)")
    text = shipped.resolve(text)
    path = files.expanded(text)
    if text.startswith(("/", "./", "../", "~")) or path.exists():
        if not path.exists():
            raise UsageError(f"no such model: {text}")
        # Not resolved: a hub cache's files are links to names without a suffix, which says the format.
        return ModelRef(os.path.abspath(path))  # noqa: PTH100 - resolve() follows links
    name, _, revision = text.partition("@")
    parts = name.split("/")
    is_file = len(parts) > 2 and name.endswith(_FILES) and ".." not in parts
    if not (len(parts) == 2 or is_file) or not all(parts) or any(c.isspace() for c in name):
        raise UsageError(f"{text!r} is neither a path (write ./folder) nor a hub id (org/name, or org/name/file.bin)")
    if not _is_safe(name) or "--" in name or (revision and not _is_safe(revision)):
        raise UsageError(f"{text!r} is no hub id: its parts hold letters, digits, '.', '_' and '-', no '..' or '--'")
    place = "/".join(parts[:2])
    pinned = _revisions.get(f"{place}@{revision}" if revision else place)
    return ModelRef(place, pinned or revision or None, "/".join(parts[2:]) or None)


def verify(source: ModelRef) -> None:
    """Compare a model that this package exported, or a part of one, with its manifest; other models have none.

    Raises:
        UsageError: A file is missing or has changed, if only by a bit.
    """
    folder = Path(source.location)
    for place in (folder, folder.parent) if source.is_local else ():
        if not (place / manifest.NAME).is_file() or not _is_exported(place):
            continue
        damage = manifest.damage(place, fingerprints.of_file)
        if damage is not None:
            raise UsageError(
                f"{place}: {damage}, says its {manifest.NAME}: take a whole copy, or remove that file if the change is "
                "yours"
            )


def _is_exported(folder: Path) -> bool:
    """Whether a folder's manifest is that of an export; others have files of that name, too."""
    if (folder / STUDENT).exists():
        return True
    try:
        listed = manifest.read(folder).get("files")
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(listed, dict) and STUDENT in listed


def use_revisions(revisions: Mapping[str, str]) -> None:
    """From here on in this process take these commits: hash by ``org/name`` or ``org/name@branch``."""
    _revisions.clear()
    _revisions.update(revisions)


def revisions() -> dict[str, str]:
    """What :func:`use_revisions` set."""
    return dict(_revisions)


def printable(value: object) -> str:
    """A value of a foreign file on one line of at most 80 characters, without control characters."""
    text = "".join(c if c.isprintable() else "?" for c in repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def is_hash(revision: str) -> bool:
    """Whether a revision is a full commit hash, which cannot move."""
    return _HASH.fullmatch(revision) is not None


def commit(repository: str, revision: str | None, kind: Literal["model", "dataset"] = "model") -> str | None:
    """The hash a hub repository's revision has, from the hub or else its cache; None where neither knows."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        return HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=10).sha
    except Exception:  # offline, unknown, refused: the client's HTTP library, and so the errors, differ by version
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)
        reference = folder / "refs" / (revision or "main")
        return reference.read_text("utf-8").strip() if reference.is_file() else None


def _is_safe(name: str) -> bool:
    """Whether a hub id or revision, which the hub's cache makes paths of, stays below the cache's folder."""
    return all(re.fullmatch(r"\w|\w[\w.-]*\w", part, re.ASCII) and ".." not in part for part in name.split("/"))


def pipeline_index(source: ModelRef) -> Config:
    """A pipeline's model_index.json, whose keys are names of folders.

    Raises:
        UsageError: Missing, damaged, or with a key that is a path out of the pipeline.
    """
    index = read_json(source, INDEX)
    stray = next((name for name in index if not re.fullmatch(r"\w+", name)), None)
    if stray is not None:
        raise UsageError(f"{source.location}/{INDEX} is damaged: {printable(stray)} is no name of a folder")
    return index


def read_json(source: ModelRef, file: str) -> Config:
    """A JSON file of a model: of a local folder, from the hub's cache, as shipped in ``configs/``, or from the hub.

    Raises:
        UsageError: Missing or damaged.
    """
    path = Path(source.location) / file if source.is_local else _hub_json(source, file)
    if not path.is_file():
        raise UsageError(f"{source.location} has no {file}: {_instead(Path(source.location))}")
    data = inputs.read_json(path, "configuration")
    if not isinstance(data, dict):
        raise UsageError(f"{path} is damaged: not a JSON object")
    _check_depths(data, path)
    return data


def _instead(folder: Path) -> str:
    """What a folder that is no model is."""
    if (folder / "model" / "model_index.json").is_file():
        return f"it is a run's folder: give {folder / 'model'}"
    if (folder / "recipe.yaml").is_file():
        return "it is a run that has not finished, so it has no model yet: resume it first"
    return "it is not the folder of a diffusers model"


def _check_depths(value: object, path: Path, key: str = "") -> None:
    """Refuse a configuration whose network would be built for ever."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_depths(item, path, str(name))
    elif isinstance(value, list):
        for item in value:
            _check_depths(item, path, key)
    elif isinstance(value, int) and value > _DEEPEST and re.search("layers|depth|blocks", key):
        raise UsageError(f"{path}: {key} {value} is over {_DEEPEST:,}, more than any model has")


def _hub_json(source: ModelRef, file: str) -> Path:
    """``rlhf-t2i plan`` needs no network for the published configurations that are shipped here."""
    shipped = Path(__file__).parent / "configs" / source.location.replace("/", "--") / file
    if source.revision is not None or not shipped.is_file():
        return cached(source, file) or Path(hub_file(source, file))
    return cached(source, file) or shipped


def cached(source: ModelRef, file: str) -> Path | None:
    """A file of a hub repository, if the hub's cache holds it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.location, file, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def find_json(source: ModelRef, file: str) -> Config | None:
    """A JSON file that a model may have; None where it has none."""
    if source.is_local and not (Path(source.location) / file).is_file():
        return None
    try:
        return read_json(source, file)
    except UsageError:
        if source.is_local:
            raise
        return None


def hub_file(source: ModelRef, file: str) -> str:
    """Fetch one file of a hub repository (from the cache where it is there)."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download(source.location, file, revision=source.revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(f"{source.location} cannot be read from the hub ({file}): {first_line(error)}") from None
