"""Prompt lists of the published benchmarks, from a path or the hub; none is copied into this repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from rlhf_t2i.algorithm import prompt_formats
from rlhf_t2i.algorithm import prompts as prompt_files
from rlhf_t2i.errors import UsageError, first_line, option
from rlhf_t2i.recipe import shipped
from rlhf_t2i.utils import inputs

T = TypeVar("T")
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
COCO_IMAGES = 30_000


class _Caption(BaseModel):
    id: int
    image_id: int
    caption: str


class _Captions(BaseModel):
    annotations: list[_Caption]


@dataclass(frozen=True)
class PromptList:
    """Prompts in order, each with the group that a table reports beside the whole; no groups for a list without.

    A long list is not in memory: see :class:`rlhf_t2i.algorithm.prompt_store.StoredPrompts`.
    """

    prompts: Sequence[str]
    groups: Sequence[str] = ()

    def first(self, count: int | None) -> tuple[list[str], list[str]]:
        """The first prompts, or all, and the group of each, "" for none."""
        prompts = list(self.prompts[:count])
        return prompts, list(self.groups[:count]) or [""] * len(prompts)


def load(name: str, column: str = "prompt") -> PromptList:
    """Read a list of prompts.

    Args:
        name: ``parti``, ``hpsv2`` or ``coco`` (from the hub, coco excepted), ``parti:PATH`` and so on, what
            :func:`rlhf_t2i.algorithm.prompts.read` takes, or ``emoji64``: the held-out prompts of the shipped models.
        column: The key or column of a file.

    Raises:
        UsageError: No such list, or it is damaged.
    """
    benchmark, colon, path = name.partition(":")
    if benchmark in _READERS and (colon or not Path(name).exists()):
        return _READERS[benchmark](path)
    if name == shipped.WORLD and not Path(name).exists():
        name = shipped.resolve(f"{name}:prompts/held_out.txt", f"{option('prompts')}: ")
    return PromptList(prompt_files.read(name, column, f"{option('prompts')}: "))


def _parti(path: str) -> PromptList:
    """PartiPrompts (P2): 1,632 prompts; the column Prompt, grouped by Category."""
    file = Path(path or _hub("nateraw/parti-prompts", "PartiPrompts.tsv", "parti"))
    found = prompt_formats.rows(file, "Prompt", f"{option('prompts')} parti: ", tabs=True)
    rows = [row for row in found if (row["Prompt"] or "").strip()]
    return PromptList([row["Prompt"].strip() for row in rows], [row.get("Category") or "" for row in rows])


def _hpsv2(path: str) -> PromptList:
    """HPSv2's benchmark: 800 prompts in each of four styles, one JSON list a style."""
    prompts: list[str] = []
    groups: list[str] = []
    for style in HPSV2_STYLES:
        file = Path(path) / f"{style}.json" if path else _hub("zhwang/HPDv2", f"benchmark/{style}.json", "hpsv2")
        found = _parsed(list[str], file, "hpsv2", "is not a JSON list of prompts")
        prompts += found
        groups += [style] * len(found)
    return PromptList(prompts, groups)


def _coco(path: str) -> PromptList:
    """COCO 2014 captions: the annotations' JSON (one caption an image), or a text file as it is.

    Of each image the caption with the smallest id is taken, images in order of their id, 30,000 at most.
    """
    if not path:
        raise UsageError(
            f"{option('prompts')} coco needs a file: coco:PATH with captions_val2014.json of the COCO 2014 "
            "annotations, or a "
            "text file with one caption a line"
        )
    if not path.endswith(".json"):
        return PromptList(prompt_files.read(path, place=f"{option('prompts')} coco: "))
    captions: dict[int, tuple[int, str]] = {}
    for row in _parsed(_Captions, path, "coco", "is no COCO captions file").annotations:
        entry = (row.id, row.caption.strip())
        captions[row.image_id] = min(entry, captions.get(row.image_id, entry))
    return PromptList([captions[image][1] for image in sorted(captions)][:COCO_IMAGES])


_READERS = {"parti": _parti, "hpsv2": _hpsv2, "coco": _coco}


def _parsed(kind: type[T], path: str | Path, benchmark: str, otherwise: str) -> T:
    """The value of a JSON file, if it is of a kind."""
    data = inputs.read_json(Path(path), "prompt file", inputs.BENCHMARK, f"{option('prompts')} {benchmark}: ")
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError:
        raise UsageError(f"{option('prompts')} {benchmark}: {path} {otherwise}") from None


def _hub(repository: str, file: str, benchmark: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, file, repo_type="dataset")
    except Exception as error:  # the hub's client raises a dozen kinds; each means the list is not there
        raise UsageError(
            f"{option('prompts')} {benchmark}: {repository} cannot be read from the hub ({first_line(error)}); "
            "give a copy as "
            f"{benchmark}:PATH"
        ) from None
