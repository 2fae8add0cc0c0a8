"""Record what the package computes, or compare it with the recording.

``python -m tests.golden.record [--compare] [--exact] [CASE ...]``; without a case all of them, quickstart as well. Ends
with 1 if a case lies outside the rule of :mod:`tests.golden.golden`, with ``--exact`` if one is not bit-equal.
Recording again replaces what was to be kept: it is for a change of results that is meant.
"""

from __future__ import annotations

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
    GLOO_SOCKET_IFNAME="lo",
)

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.golden import golden
from tests.golden.cases import CASES, Inputs


def main() -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description="Record results, or compare them with the recording.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--compare", action="store_true", help="compare; write nothing")
    parser.add_argument("--exact", action="store_true", help="with --compare: bit for bit")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder) / "inputs").make()
        recording = golden.read() if golden.FILE.exists() else {"layouts": {}, "cases": {}}
        here: dict[str, Any] = {"machine": golden.machine(), "inputs": golden.inputs_digest(inputs)}
        if not arguments.compare:
            old = {key: recording.get(key, value) for key, value in here.items()}
            if old != here and arguments.cases:
                parser.error(f"recorded on {old}, this is {here}: record all cases together")
            recording |= here
        elif recording["inputs"] != here["inputs"]:
            print("the tiny models are others than those recorded: only quickstart says something", file=sys.stderr)
            worst = 1
        if arguments.compare:
            same = "the same kind of" if recording["machine"] == here["machine"] else "another kind of"
            print(f"recorded on {recording['machine']}; this is {same} machine: {here['machine']}")
        for name in arguments.cases or CASES:
            began = time.perf_counter()
            result = CASES[name].run(inputs, Path(folder) / name)
            seconds = time.perf_counter() - began
            if arguments.compare:
                comparison = golden.compare(recording, name, result)
                print(f"[{seconds:5.1f} s] {comparison}", flush=True)
                worst = max(worst, int(bool(comparison.faults or (arguments.exact and comparison.different))))
            else:
                golden.add(recording, name, result)
                golden.write(recording)
                print(f"[{seconds:5.1f} s] {name}: recorded", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
