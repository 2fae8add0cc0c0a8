"""The training loop of the zoo's models: AdamW with a cosine schedule by wall clock or steps, EMA, resumable."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

from zoo.data import WORK


def train(
    name: str,
    modules: nn.ModuleDict,
    loss_fn: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    ema_decay: float = 0.999,
    weight_decay: float = 0.0,
    save_seconds: float = 90,
) -> nn.ModuleDict:
    """Train ``modules`` and return their moving average.

    Args:
        name: The checkpoint's name in ``zoo/work``; an interrupted training continues from it.
        modules: What is trained.
        loss_fn: Step number to loss; draws its own batch, seeded by the step.
        steps: Updates in all; the learning rate falls to zero on a cosine over them.
        lr: The peak learning rate, after 200 steps of warm-up.
        ema_decay: Of the returned average.
        weight_decay: AdamW's.
        save_seconds: Between checkpoints.
    """
    checkpoint = WORK / f"{name}.pt"
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = copy.deepcopy(modules).requires_grad_(False)
    start, seconds, smooth = 0, 0.0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        modules.load_state_dict(state["modules"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
    last_save = began = time.monotonic()
    for step in track(range(start, steps), description=name):
        rate = lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_fn(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(modules.parameters()), 1 - decay)
        smooth = float(loss) if step == start else 0.98 * smooth + 0.02 * float(loss)
        if step % 100 == 0:
            passed = seconds + time.monotonic() - began
            print(f"{name} step {step}/{steps} loss {smooth:.5f} {passed:.0f} s", flush=True)
        if time.monotonic() - last_save > save_seconds or step == steps - 1:
            last_save = time.monotonic()
            passed = seconds + last_save - began
            _save(checkpoint, modules, average, optimizer, step + 1, passed)
    return average


def _save(path: Path, modules: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int,
          seconds: float) -> None:  # fmt: skip
    aside = path.with_suffix(".tmp")
    torch.save(
        {
            "modules": modules.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
        },
        aside,
    )
    aside.replace(path)


def load_average(name: str, modules: nn.ModuleDict) -> nn.ModuleDict:
    """The moving average of a checkpoint, finished or not."""
    state = torch.load(WORK / f"{name}.pt", weights_only=True)
    modules.load_state_dict(state["average"])
    return modules.eval().requires_grad_(False)
