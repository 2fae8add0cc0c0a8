"""What the comment at the start of a recipe says about its run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf_t2i.utils.files import expanded

_PLANNED = re.compile(
    r"Planned for (?P<devices>\d+) x (?P<device>\S+), not measured: (?P<hours>[\d.]+) hours, "
    r"(?P<gpu_hours>[\d.]+) GPU-hours, (?P<memory>[\d.]+) GB of each, (?P<disk>[\d.]+) GB of disk"
)


@dataclass(frozen=True)
class Header:
    """The statements of a header.

    Attributes:
        planned: ``devices``, ``device``, ``hours``, ``gpu_hours``, ``memory`` and ``disk`` (in GB) as it plans them.
        result: What to expect, and whose result that is.
    """

    planned: dict[str, str] | None = None
    result: str | None = None


def read(path: Path) -> Header:
    """The header of a recipe that was read already; an empty one where it says nothing."""
    statements: list[str] = []
    for line in _comment(expanded(str(path))):
        if line.startswith("  ") and statements:
            statements[-1] += f" {line.strip()}"
        else:
            statements.append(line.strip())
    planned = next((match for text in statements if (match := _PLANNED.match(text))), None)
    result = next((text.partition(": ")[2] for text in statements if text.startswith("Result: ")), None)
    return Header(planned.groupdict() if planned else None, result)


def _comment(path: Path) -> Iterator[str]:
    """The lines of the comment that a file starts with, without their marks."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                return
            yield line[1:].rstrip("\n").removeprefix(" ")
