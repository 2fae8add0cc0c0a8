"""The recording (golden.json), and how far a result lies from it.

The rule. On the same kind of machine (the release of torch, its instruction set, the CPU's maker) every number and
every summary of a tensor agrees to 1e-6: relative to the recorded value, or absolute where that is below one; a
tensor's three numbers relative to its norm, or absolute where that is below one. Counters and learning rates, which no
float32 touches, agree to 1e-12. On another kind of machine sums run in another order, and Adam's first steps, which
divide each gradient by its own size, magnify that: 1e-3 (with AVX2 in place of AVX-512 the small cases moved by 2e-5 at
most, quickstart by 3e-4). Numbers measured on 8-bit pictures agree to 1e-6 where the pictures are the same, and to 1e-4
where rounding has moved pixels by one grey level. Scores of single images inside a run agree to 2e-3: the recording
scored decoded tensors, a run now scores the 8-bit picture, as eval always did.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.golden.cases import Inputs
from tests.golden.reading import Result, of_numbers, of_tensors

FILE = Path(__file__).with_name("golden.json")
SAME, OTHER, PIXELS, EIGHT_BITS, EXACT = 1e-6, 1e-3, 1e-4, 2e-3, 1e-12
MEASURED = {"after/": 1.0, "metrics/watch/reward": 100.0, "metrics/watch/": 1.0}
"""Scores measured inside a run, and the scale of the reward in them; diversity is of latents, and so exact."""
COUNTED = ("metrics/step", "metrics/images", "metrics/bad_steps", "metrics/lr/")


@dataclass
class Comparison:
    """A result beside its recording.

    Attributes:
        case: Its name.
        numbers: The largest deviation of a number, and where.
        weights: The largest deviation of a tensor's summary, and where.
        different: Parts that are not the same bit for bit.
        faults: A sentence for everything outside the rule.
    """

    case: str
    numbers: tuple[float, str]
    weights: tuple[float, str]
    different: list[str]
    faults: list[str]

    def __str__(self) -> str:
        parts = [f"{self.case}: {'not bit-equal: ' + ', '.join(self.different) if self.different else 'bit-equal'}"]
        for what, (deviation, where) in (("numbers", self.numbers), ("weights", self.weights)):
            parts.append(f"largest deviation of {what} {deviation:.1e} ({where})" if deviation else f"{what} equal")
        return "; ".join(parts) + "".join(f"\n  {fault}" for fault in self.faults[:10])


def machine() -> dict[str, str]:
    """What rounding depends on."""
    return {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "cpu": _maker()}


def _maker() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), platform.machine())


def inputs_digest(inputs: Inputs) -> str:
    """SHA-256 of the tiny models' weights: another result from other inputs says nothing."""
    from safetensors.torch import load_file

    files = sorted(inputs.folder.rglob("*.safetensors"))
    return of_tensors({f"{f.relative_to(inputs.folder)}/{n}": t for f in files for n, t in load_file(f).items()})


def read() -> dict[str, Any]:
    """The recording."""
    return json.loads(FILE.read_text("utf-8"))


def add(recording: dict[str, Any], case: str, result: Result) -> None:
    """Put a result into the recording; names of tensors are kept once for all cases."""
    summaries = result.summaries()
    names = list(summaries)
    layout = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    recording["layouts"][layout] = names
    recording["cases"][case] = {
        "sha256": result.digests(), "numbers": result.numbers, "layout": layout, "weights": list(summaries.values())
    }  # fmt: skip


def write(recording: dict[str, Any]) -> None:
    """Write golden.json, a case's part on lines of its own."""
    used = {case["layout"] for case in recording["cases"].values()}
    recording["layouts"] = {key: names for key, names in recording["layouts"].items() if key in used}
    lines = ["{"]
    for key in ("machine", "inputs"):
        lines.append(f"{json.dumps(key)}: {json.dumps(recording[key])},")
    for section in ("layouts", "cases"):
        lines.append(f"{json.dumps(section)}: {{")
        entries = []
        for name, value in recording[section].items():
            if section == "layouts":
                entries.append(f"{json.dumps(name)}: {_short(value)}")
                continue
            parts = ",\n".join(f"  {json.dumps(key)}: {_short(part)}" for key, part in value.items())
            entries.append(f"{json.dumps(name)}: {{\n{parts}\n}}")
        lines.append(",\n".join(entries) + ("\n}" if section == "cases" else "\n},"))
    FILE.write_text("\n".join([*lines, "}"]) + "\n", "utf-8")


def _short(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def compare(recording: dict[str, Any], case: str, result: Result) -> Comparison:
    """Measure a result by the rule above."""
    golden, result = recording["cases"][case], result.recorded_names()
    known = {name: result.numbers[name] for name in golden["numbers"] if name in result.numbers}
    digests = result.digests() | {"numbers": of_numbers(known)}
    different = [part for part, digest in golden["sha256"].items() if digests.get(part) != digest]
    tolerance = SAME if machine() == recording["machine"] else OTHER
    of_pictures = max(tolerance, PIXELS) if "pictures" in different else tolerance

    faults: list[str] = []
    numbers = weights = (0.0, "")
    for name, expected in golden["numbers"].items():
        found = known.get(name)
        if found is None or [v is None for v in found] != [v is None for v in expected]:
            faults.append(f"{name}: recorded {expected}, found {found}")
            continue
        pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
        counted = name.startswith(COUNTED)
        score = None if "diversity" in name or "distance" in name else _score_scale(name)
        floor = 0.0 if counted else score or 1.0
        deviation = max((_deviation(a, b, max(floor, abs(b))) for a, b in pairs), default=0.0)
        numbers = max(numbers, (deviation, name))
        if not deviation <= (EXACT if counted else EIGHT_BITS if score else of_pictures):
            faults.append(f"{name}: recorded {expected}, found {found}, deviation {deviation:.1e}")
    recorded = dict(zip(recording["layouts"][golden["layout"]], golden["weights"], strict=True))
    summaries = result.summaries()
    if summaries.keys() != recorded.keys():
        faults.append(f"tensors are missing or new: {sorted(summaries.keys() ^ recorded.keys())[:6]}")
    for name in summaries.keys() & recorded.keys():
        scale = max(1.0, recorded[name][1])
        deviation = max(_deviation(a, b, scale) for a, b in zip(summaries[name], recorded[name], strict=True))
        weights = max(weights, (deviation, name))
        if not deviation <= tolerance:
            faults.append(f"{name}: recorded {recorded[name]}, found {summaries[name]}, deviation {deviation:.1e}")
    if "other tensors" in different:
        faults.append("tensors of the export that no step trains have changed")
    return Comparison(case, numbers, weights, different, faults)


def _score_scale(name: str) -> float | None:
    return next((scale for prefix, scale in MEASURED.items() if name.startswith(prefix)), None)


def _deviation(found: float, expected: float, scale: float) -> float:
    if found == expected:
        return 0.0
    deviation = abs(found - expected) / scale if scale else math.inf
    return deviation if math.isfinite(deviation) else math.inf
