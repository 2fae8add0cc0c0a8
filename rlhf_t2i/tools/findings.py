"""The rows of ``rewards check`` and ``families check``: what was measured, or what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["pass", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: Of the check.
        outcome: ``pass``, ``fail`` or ``skip``.
        detail: One sentence with the measurement, or with what is wrong and what to do.
    """

    name: str
    outcome: Outcome
    detail: str


class CheckFailed(Exception):
    """A check that does not hold; its text is the finding's detail."""


class CheckSkipped(Exception):
    """A check that does not apply; its text says why."""


def run_checks(checks: Sequence[tuple[str, Callable[[], str]]]) -> list[Finding]:
    """Run every check; one that raises fails with the error's text."""
    return [_run(name, check) for name, check in checks]


def _run(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "pass", check())
    except CheckFailed as failure:
        return Finding(name, "fail", str(failure))
    except CheckSkipped as skipped:
        return Finding(name, "skip", str(skipped))
    except Exception as error:
        return Finding(name, "fail", f"{type(error).__name__}: {error}")
