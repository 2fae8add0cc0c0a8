"""Train the VAE, the reference and the reader on one GPU in minutes. ``python -m zoo.on_gpu --seconds 270 --out OUT``.

One process under one deadline, for a machine that is lent for so long: first every stage with two steps, so that what
does not work there ends it at once; then the VAE, latents, the reference, the reader, and what the reader finds in the
reference's pictures. What is finished lies in OUT at once, written atomically: ``vae.tar`` and ``reference.tar`` (the
folders of ZOO_OUT, the second without the VAE), ``reader.pt`` and ``reference_latest.pt`` (averages, as checkpoints of
ZOO_WORK; the second every 30 s until ``reference.tar`` is there), ``logs.jsonl``, ``vae.png``, ``reference.png`` and
``summary.json``.

The learning rates follow the batch by the square root at most (zoo.vae and zoo.reference: 32 and 96 on two processes).
The seconds count from the start of the process and hold for the whole.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()  # before the imports: on a fresh machine they take a while

# ruff: noqa: E402
import argparse
import faulthandler
import json
import os
import shutil
import sys
import tarfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from zoo import data, device, latents, reader, reference, vae
from zoo.training import Diverged, train

SNAPSHOT_SECONDS = 30.0
FILES = ("vae.tar", "vae.png", "reference.tar", "reference_latest.pt", "reader.pt", "logs.jsonl", "reference.png",
         "summary.json")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Seconds of the stages (the reference has what the others leave), batches, learning rates, most steps."""

    vae: float
    latents: float
    reader: float
    evaluation: float
    batches: tuple[int, int, int]  # VAE, reference, reader
    rates: tuple[float, float, float]
    steps: int = 10**7
    shards: int = 240
    pictures: int = 200

    @classmethod
    def of(cls, seconds: float) -> Plan:
        """Shares that suit 270 seconds."""
        sizes = (128, 768, 512) if device.on_cuda() else (vae.BATCH, reference.BATCH, reader.BATCH)
        rates = (2.5e-3, 2e-3, 3e-3) if device.on_cuda() else (1.5e-3, 8e-4, 2e-3)
        return cls(0.19 * seconds, 0.03 * seconds, 0.1 * seconds, 0.05 * seconds, sizes, rates)


class Run:
    """The stages in order; what they made, how long they took, and what failed."""

    def __init__(self, plan: Plan, until: float, out: Path) -> None:
        self.plan, self.until, self.out = plan, until, out
        self.world = data.load()
        self.summary: dict[str, Any] = {"hardware": device.DEVICE.type, "seconds": {}, "failed": {}}
        if device.on_cuda():
            self.summary["hardware"] = torch.cuda.get_device_name(device.DEVICE)

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> bool:
        """Whether it ended well. Its time, findings or failure go into the summary, and the logs so far to OUT."""
        say(f"{name} begins")
        began = time.monotonic()
        try:
            self.summary[name] = work()
        except Exception as error:
            traceback.print_exc()
            self.summary["failed"][name] = f"{type(error).__name__}: {error}"
        self.summary["seconds"][name] = round(time.monotonic() - began, 1)
        say(f"{name} ended after {self.summary['seconds'][name]} s: {self.summary.get(name, 'FAILED')}")
        self.write("summary.json", lambda path: path.write_text(json.dumps(self.summary, indent=1) + "\n", "utf-8"))
        self.write("logs.jsonl", _logs)
        return name not in self.summary["failed"]

    def write(self, name: str, save: Callable[[Path], object]) -> None:
        """Atomically."""
        aside = self.out / f".{name}"
        save(aside)
        aside.replace(self.out / name)

    def all(self) -> bool:
        """Every stage. Without a VAE, latents or reference the rest is worth nothing; the others only measure."""
        stages = [("vae", self.train_vae), ("latents", self.encode), ("reference", self.train_reference)]
        if not all(self.stage(name, work) for name, work in stages):
            return False
        for name, work in [("pictures", self.draw), ("reader", self.train_reader), ("evaluation", self.evaluate)]:
            self.stage(name, work)
        return not self.summary["failed"]

    def train_vae(self) -> dict[str, Any]:
        """The VAE, balanced and exported."""
        size, rate = self.plan.batches[0], self.plan.rates[0]
        modules = nn.ModuleDict({"vae": vae.build()})
        average = self.sound("vae", lambda: train(
            "vae", modules, lambda step: vae.loss_fn(modules["vae"], vae.batch(self.world, step, size)),
            steps=self.plan.steps, minutes=self.plan.vae / 60, lr=rate, muon=True, ema_decay=0.995, batch=size,
        ))  # fmt: skip
        vae.export(average["vae"].eval(), self.world)
        self.write("vae.tar", lambda path: _pack(data.OUT / "reference", ["vae"], path))
        self.write("vae.png", lambda path: shutil.copy(data.WORK / "vae.png", path))
        return {"batch": size, "lr": rate, "psnr": vae.psnr(_vae(), self.world)}

    def encode(self) -> dict[str, Any]:
        """Shards of latents until the time is over, and the held-out pairs."""
        coder, began = _vae(), time.monotonic()
        parts: list[dict[str, torch.Tensor]] = []
        self.held_out = latents.Latents(parts=[latents.shard(self.world, coder, 2, held_out=True)])
        while not parts or (time.monotonic() - began < self.plan.latents and len(parts) < self.plan.shards):
            parts.append(latents.shard(self.world, coder, 100 + len(parts), held_out=False))
        self.stored = latents.Latents(parts=parts)
        return {"shards": len(parts), "latents": len(self.stored.latents)}

    def train_reference(self) -> dict[str, Any]:
        """The reference and its text encoders: a cosine over what the later stages leave."""
        size, rate = self.plan.batches[1], self.plan.rates[1]
        torch.manual_seed(0)
        modules = reference.build()
        if not device.on_cuda():
            modules["unet"].set_attn_processor(AttnProcessor())
        seconds = self.until - time.monotonic() - self.plan.reader - self.plan.evaluation - 0.03 * self.until_span()
        if seconds <= 0:
            raise RuntimeError("no time is left for the reference")

        def snapshot(average: nn.ModuleDict) -> dict[str, Any]:
            self.write("reference_latest.pt", lambda path: _save_average(average, path))
            with torch.no_grad():
                losses = [reference.loss_fn(average, self.held_out, 10**6 + i, size, 0.0, False) for i in range(2)]
            return {"held_out_pairs": round(float(sum(losses)) / 2, 5)}

        average = self.sound("reference", lambda: train(
            "reference", modules, lambda number: reference.loss_fn(modules, self.stored, number, size), lr=rate,
            steps=self.plan.steps, minutes=seconds / 60, muon=True, ema_decay=0.998, weight_decay=0.05, batch=size,
            save_seconds=10**6, evaluate=snapshot, evaluate_seconds=SNAPSHOT_SECONDS,
        ))  # fmt: skip
        self.write("reference_latest.pt", lambda path: _save_average(average, path))
        self.modules = average.eval()
        found = {"batch": size, "lr": rate, **snapshot(self.modules)}
        whole = reference.build()
        whole.load_state_dict(average.state_dict())
        reference.export(whole)
        folder = data.OUT / "reference"
        parts = sorted({path.name for path in folder.iterdir()} - {"vae"})  # each file within 16 MiB
        self.write("reference.tar", lambda path: _pack(folder, parts, path))
        (self.out / "reference_latest.pt").unlink()
        return found

    def until_span(self) -> float:
        """Seconds of the whole run."""
        return self.until - BEGAN

    def draw(self) -> dict[str, Any]:
        """A grid of the reference's pictures, two rows a split."""
        count = min(24, self.plan.pictures)
        prompts = [line for split in reference.SPLITS for line in reference.lines(split)[:count]]
        pictures = reference.decode(_vae(), reference.sample(self.modules, prompts, guidance=3.5, steps=14))
        grid = data.grid(pictures, 12)
        self.write("reference.png", lambda path: grid.resize((grid.width * 2, grid.height * 2), 0).save(path, "png"))
        return {"prompts": prompts}

    def train_reader(self) -> dict[str, Any]:
        """The reader, and what it finds in true drawings."""
        size, rate = self.plan.batches[2], self.plan.rates[2]
        seconds = min(self.plan.reader, self.until - time.monotonic() - self.plan.evaluation)
        if seconds <= 0:
            raise RuntimeError("no time is left for the reader")
        torch.manual_seed(0)
        modules = nn.ModuleDict({"reader": reader.Reader(len(self.world.names))}).to(memory_format=torch.channels_last)
        average = self.sound("reader", lambda: train(
            "reader", modules, lambda step: reader.loss_fn(modules["reader"], self.world, step, size),
            steps=self.plan.steps, minutes=seconds / 60, lr=rate, ema_decay=0.995, weight_decay=0.02, batch=size,
        ))  # fmt: skip
        self.write("reader.pt", lambda path: torch.save({"average": _on_cpu(average)}, path))
        judge = average["reader"].eval()
        count = 17 * self.plan.pictures
        return {"batch": size, "lr": rate, "true drawings": reader.check(judge, self.world, count=count),
                "through the vae": reader.check(judge, self.world, _vae(), count=count)}  # fmt: skip

    def evaluate(self) -> dict[str, Any]:
        """What the reader finds in pictures of the reference."""
        return reference.evaluate(self.modules, "reference", self.plan.pictures)

    def sound(self, name: str, work: Callable[[], nn.ModuleDict]) -> nn.ModuleDict:
        """What a training returns, or the last sound average of one that diverged, which the summary tells."""
        try:
            return work()
        except Diverged as error:
            self.summary["failed"][f"{name}, went on with its last sound average"] = str(error)
            torch.save({"average": error.average.state_dict()}, data.WORK / f"{name}.pt")
            return error.average


def _vae() -> AutoencoderKL:
    made = AutoencoderKL.from_pretrained(data.OUT / "reference/vae", torch_dtype=torch.float32)
    return made.eval().to(device.DEVICE)


def _on_cpu(modules: nn.Module, kind: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {
        key: value.to("cpu", kind if value.is_floating_point() else None) for key, value in modules.state_dict().items()
    }


def _save_average(modules: nn.Module, path: Path) -> None:
    torch.save({"average": _on_cpu(modules, torch.float16)}, path)


def _pack(folder: Path, parts: list[str], path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for part in parts:
            tar.add(folder / part, arcname=f"{folder.name}/{part}")


def _logs(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for log in sorted(data.WORK.glob("*.jsonl")):
            for line in log.read_text("utf-8").splitlines():
                file.write(json.dumps({"training": log.stem, **json.loads(line)}) + "\n")


def say(text: str) -> None:
    """A line with the seconds since the start."""
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def _tell_time() -> None:
    while True:
        time.sleep(5)
        say("...")


def main() -> None:
    """Try every stage, then run them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=270.0, help="for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is made")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for folder in (data.WORK, data.OUT):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty: name new folders with ZOO_WORK and ZOO_OUT")
    say(f"{device.DEVICE}, torch {torch.__version__}, {os.cpu_count()} cores")
    threading.Thread(target=_tell_time, daemon=True).start()
    faulthandler.dump_traceback_later(args.seconds + 60 - (time.monotonic() - BEGAN), exit=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    plan = Plan.of(args.seconds)
    if not device.on_cuda():
        torch.set_num_threads(1)
    tiny = Plan(60.0, 0.0, 60.0, 0.0, plan.batches, plan.rates, steps=2, pictures=3)
    if not Run(tiny, time.monotonic() + 3600, args.out).all():
        sys.exit("a stage does not work on this machine: see above")
    for folder in (data.WORK, data.OUT):
        shutil.rmtree(folder, ignore_errors=True)  # one may lie in the other
    for folder in (data.WORK, data.OUT):
        folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (args.out / name).unlink(missing_ok=True)
    say("every stage works; now in earnest")
    if not Run(plan, BEGAN + args.seconds, args.out).all():
        sys.exit("a stage failed: see summary.json")
    say("done")


if __name__ == "__main__":
    main()
