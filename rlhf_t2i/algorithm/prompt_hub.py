"""Prompts from a dataset of the hub: ``hf://datasets/org/name[@revision][:split]``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from rlhf_t2i.errors import UsageError, first_line, option

PREFIX: Final = "hf://"
_PART: Final = r"\w(?:[\w.-]*\w)?"
_FORM: Final = re.compile(rf"hf://datasets/({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*))?(?::(.+))?", re.ASCII)
_BATCH: Final = 2**12


@dataclass(frozen=True)
class DatasetRef:
    """A dataset of the hub.

    Attributes:
        repository: ``org/name``.
        revision: A branch, tag or commit; the main branch when None.
        split: As ``datasets`` takes it: ``train``, ``train[:1000]``.
    """

    repository: str
    revision: str | None
    split: str

    @classmethod
    def parse(cls, text: str, place: str = "data: ") -> DatasetRef:
        """Read ``hf://datasets/org/name[@revision][:split]``.

        Raises:
            UsageError: It is of another form.
        """
        match = _FORM.fullmatch(text)
        if match is None or ".." in text:
            raise UsageError(f"{place}{text}: write a dataset of the hub as hf://datasets/org/name[@revision][:split]")
        return cls(match[1], match[2], match[3] or "train")

    @property
    def key(self) -> str:
        """Its key in the recipe's ``revisions``."""
        return f"datasets/{self.repository}" + (f"@{self.revision}" if self.revision else "")

    def pinned(self, revisions: Mapping[str, str]) -> str | None:
        """The commit that ``revisions`` has for it, else its own revision."""
        return revisions.get(self.key, self.revision)


def prompts(text: str, column: str, revisions: Mapping[str, str], place: str) -> Iterator[str]:
    """The prompts of a dataset, which is downloaded once into the cache of ``datasets``, as they are.

    Args:
        text: ``hf://datasets/org/name[@revision][:split]``.
        column: The column that holds the prompt.
        revisions: The recipe's, with the commit of the dataset.
        place: Prefix of the error message.

    Raises:
        UsageError: ``datasets`` is missing, or the dataset cannot be read, or has no such column of strings.
    """
    source = DatasetRef.parse(text, place)
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{place}{text}: reading it needs datasets: pip install 'rlhf-t2i[datasets]', or give a file of prompts"
        ) from None
    try:
        table = datasets.load_dataset(source.repository, split=source.split, revision=source.pinned(revisions))
    except Exception as error:  # its client, its formats and its cache raise dozens of kinds
        raise UsageError(
            f"{place}{text} cannot be read ({type(error).__name__}: {first_line(error)}); download its files and give "
            "their folder instead"
        ) from None
    if column not in table.column_names:
        raise UsageError(
            f"{place}{text} has no column {column!r} (it has: {', '.join(table.column_names)[:200]}); data.column or "
            f"{option('column')} names it"
        )
    # The other columns may be images: they are neither read nor decoded.
    for batch in table.select_columns([column]).iter(_BATCH):
        for value in batch[column]:
            if value is not None and not isinstance(value, str):
                raise UsageError(f"{place}{text}: the column {column!r} holds {type(value).__name__}, not strings")
            yield value or ""
