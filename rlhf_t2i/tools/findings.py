"""The rows of ``rewards check`` and ``families check``: what was measured, or what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def run_checks(
    checks: Sequence[tuple[str, Callable[[], str]]],
    needs: Mapping[str, Sequence[str]] | None = None,
    describe: Callable[[BaseException], str] = lambda error: f"{type(error).__name__}: {error}",
) -> list[Finding]:
    """Run checks in order; one mistake fails one row.

    Args:
        checks: Names and functions that return the detail of a passed check.
        needs: Of a check, those without which it says nothing: it is skipped if one of them did not hold.
        describe: Words the error of a check that raises; an error seen before is not repeated.
    """
    findings: list[Finding] = []
    failed: dict[str, str] = {}  # name of a check: what its row says
    for name, check in checks:
        missing = next((other for other in (needs or {}).get(name, ()) if other in failed), None)
        if missing is not None:
            failed[name] = failed[missing]
            findings.append(Finding(name, "skip", f"not run, since {_first(failed, missing)!r} failed"))
            continue
        finding = _run(name, check, describe)
        if finding.outcome == "fail":
            known = next((other for other, detail in failed.items() if detail == finding.detail), None)
            failed[name] = finding.detail
            if known is not None:
                finding = Finding(name, "skip", f"fails as {_first(failed, known)!r} does")
        findings.append(finding)
    return findings


def _first(failed: Mapping[str, str], name: str) -> str:
    """The first check that failed for the reason of ``name``."""
    return next(other for other, detail in failed.items() if detail == failed[name])


def _run(name: str, check: Callable[[], str], describe: Callable[[BaseException], str]) -> Finding:
    try:
        return Finding(name, "pass", check())
    except CheckFailed as failure:
        return Finding(name, "fail", str(failure))
    except CheckSkipped as skipped:
        return Finding(name, "skip", str(skipped))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() in the code under test
        return Finding(name, "fail", describe(error))
