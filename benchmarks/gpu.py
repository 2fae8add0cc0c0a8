"""Build, check and time everything on one GPU in under 10 minutes; ``--small`` does the same on a CPU in about two.

``python benchmarks/gpu.py --out FOLDER``

Full mode: SDXL's and PickScore's exact architectures with random weights, 1024 px, bf16, roles colocated. Each section
runs in a process of its own, so that one that fails, or runs out of memory or time, leaves the others alone; it is
written down as failed, and the exit code is then 1. Results: ``gpu.json`` and ``gpu.md`` in the folder, rewritten after
every section.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu_report import markdown
from gpu_sections import SECTIONS, Settings

ORDER = ("machine", "build", "flops", "steps", "plain", "remote", "variants")
_RESIDENT = "optimization.offload_optimizer=false"
VARIANTS = {
    "adapters of rank 64": [
        *(f"optimization.{role}.lora={{rank: 64}}" for role in ("generator", "assistant")), _RESIDENT,
    ],
    "micro-batch of 2": ["optimization.micro_batch=2"],
    "without activation checkpointing": ["optimization.gradient_checkpointing=false"],
    "all activations recomputed": ["optimization.gradient_checkpointing=true"],
    "blocks compiled": ["optimization.compile=true"],
    "decoder in bf16": ["models.vae_precision=bf16"],
    "8-bit AdamW": [*(f"optimization.{role}.kind=adamw_8bit" for role in ("generator", "assistant")), _RESIDENT],
}  # fmt: skip
"""What a recipe has a key for, each alone, beside the section ``steps``."""
_LEAST_S = 20.0


def main() -> int:
    """Run the sections; 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small networks in float32, for a CPU")
    parser.add_argument("--minutes", type=float, default=9.5, help="what is not done by then has failed")
    parser.add_argument("--steps", type=int, help="timed updates of each kind [default: 4; 2 with --small]")
    parser.add_argument("--batch", type=int, help="images an update [default: 4; 2 with --small]")
    parser.add_argument("--sections", default=",".join(ORDER), help="of these, comma-separated; build is always run")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="override of the recipe")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument("--child", nargs=3, metavar=("SECTION", "SETTINGS", "RESULT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _child(*args.child)
    chosen = [name.strip() for name in args.sections.split(",")]
    unknown = [name for name in chosen if name not in ORDER]
    if unknown:
        parser.error(f"--sections {unknown[0]}: unknown; known: {', '.join(ORDER)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rlhf-t2i-gpu-") as folder:
        usual = 2 if args.small else 4
        settings = Settings(args.small, folder, args.steps or usual, args.batch or usual, tuple(args.overrides))
        results = _run(settings, {*chosen, "build"}, args.out, time.monotonic() + 60 * args.minutes)
    print(markdown(results))
    failed = [name for name, result in results["sections"].items() if result["status"] != "done"]
    for name in failed:
        print(f"{name}: {results['sections'][name]['status']}", file=sys.stderr)
    return 1 if failed else 0


def _run(settings: Settings, chosen: set[str], out: Path, deadline: float) -> dict[str, Any]:
    """Every section in turn; the files are whole after each."""
    results: dict[str, Any] = {"settings": asdict(settings), "sections": {}}
    plan = [(name, name, settings) for name in ORDER if name in chosen and name != "variants"]
    if "variants" in chosen:
        plan += [
            (f"variant: {name}", "variant", replace(settings, overrides=(*settings.overrides, *overrides)))
            for name, overrides in VARIANTS.items()
            if not _missing(name, settings.small)
        ]
        results["left_out"] = {name: reason for name in VARIANTS if (reason := _missing(name, settings.small))}
    for title, section, given in plan:
        began = time.monotonic()
        result = _section(title, section, given, out, deadline - began)
        results["sections"][title] = {**result, "seconds_in_all": time.monotonic() - began}
        print(f"[{title}] {result['status']} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        (out / "gpu.json").write_text(json.dumps(results, indent=1), "utf-8")
        (out / "gpu.md").write_text(markdown(results), "utf-8")
    return results


def _missing(variant: str, small: bool) -> str:
    """Why a variant cannot run here; empty where it can."""
    if variant == "blocks compiled" and small:
        return "a CPU compiles for minutes"
    if variant != "8-bit AdamW":
        return ""
    import importlib.util

    import torch

    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    return "" if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"


def _section(title: str, section: str, settings: Settings, out: Path, seconds: float) -> dict[str, Any]:
    """One section in a process of its own; whatever happens to it comes back as its status."""
    if seconds < _LEAST_S:
        return {"status": "failed: no time was left for it"}
    log = out / f"{title.replace(': ', '-').replace(' ', '-')}.log"
    with tempfile.TemporaryDirectory() as place, log.open("w") as stream:
        given, answer = Path(place) / "settings.json", Path(place) / "result.json"
        given.write_text(json.dumps(asdict(settings)), "utf-8")
        command = [sys.executable, __file__, "--child", section, str(given), str(answer)]
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"status": f"failed: not done after {seconds:.0f} s; see {log.name}"}
        finally:
            # Ray's processes too, should the section have died without stopping them.
            _end(process.pid)
            process.wait()
        if not answer.is_file():
            return {"status": f"failed: its process ended with code {code}; see {log.name}"}
        return json.loads(answer.read_text("utf-8"))


def _end(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _child(section: str, given: str, answer: str) -> int:
    """Run one section here and write what came of it."""
    data = json.loads(Path(given).read_text("utf-8"))
    settings = Settings(**{**data, "overrides": tuple(data["overrides"])})
    if settings.small:
        # Random networks meet denormal numbers, on which a CPU is a hundred times slower.
        import torch

        torch.set_flush_denormal(True)
    try:
        result = {"status": "done", **SECTIONS[section](settings)}
    except BaseException as error:
        import traceback

        traceback.print_exc()
        result = {"status": f"failed: {type(error).__name__}: {str(error)[:500]}"}
    unfinished = Path(f"{answer}.part")
    unfinished.write_text(json.dumps(result), "utf-8")
    shutil.move(unfinished, answer)
    return 0 if result["status"] == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
