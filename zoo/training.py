"""The training loop of the zoo's models: AdamW with a cosine schedule by wall clock or steps, EMA, resumable.

Under ``torchrun --nproc-per-node N`` the gradients are averaged over the processes. On a CPU two processes of one
thread each beat one of two threads: they meet once a step, not in every operator.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
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
    minutes: float = math.inf,
    warmup: int = 200,
    ema_decay: float = 0.999,
    weight_decay: float = 0.0,
    save_seconds: float = 90,
) -> nn.ModuleDict:
    """Train ``modules`` and return their moving average.

    Args:
        name: The checkpoint's name in ``zoo/work``; an interrupted training continues from it.
        modules: What is trained.
        loss_fn: Batch number to loss; draws its own batch, seeded by that number.
        steps: Updates in all; the learning rate falls to zero on a cosine over them.
        minutes: A budget of wall clock that ends the training, and the cosine with it, if it is spent before.
        lr: The peak learning rate.
        warmup: Steps in which the learning rate rises to it.
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
    rank, ranks = join()
    last_save = began = time.monotonic()
    progress = start / steps
    for step in track(range(start, steps), description=name, disable=rank > 0):
        rate = lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_fn(step * ranks + rank)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        passed = seconds + time.monotonic() - began
        shown, passed = _average_gradients(modules, torch.stack([loss.detach(), torch.tensor(passed)]), ranks)
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(modules.parameters()), 1 - decay)
        smooth = shown if step == start else 0.98 * smooth + 0.02 * shown
        progress = max((step + 1) / steps, passed / (60 * minutes))
        if rank == 0 and step % 100 == 0:
            print(f"{name} step {step}/{steps} loss {smooth:.5f} {passed:.0f} s", flush=True)
        if rank == 0 and (progress >= 1 or time.monotonic() - last_save > save_seconds):
            last_save = time.monotonic()
            _save(checkpoint, modules, average, optimizer, step + 1, passed)
        if progress >= 1:
            break
    return average


def join() -> tuple[int, int]:
    """This process's rank and their number; joins torchrun's process group if there is one."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def _average_gradients(modules: nn.Module, extra: Tensor, ranks: int) -> tuple[float, float]:
    """Average gradients over the processes, in place; the two ``extra`` numbers travel along and are returned."""
    if ranks > 1:
        gradients = [p.grad for p in modules.parameters() if p.grad is not None]
        flat = torch.cat([extra.float(), *(g.flatten() for g in gradients)])
        dist.all_reduce(flat)
        flat /= ranks
        extra, *parts = flat.split([len(extra), *(g.numel() for g in gradients)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    loss, passed = extra.tolist()
    return loss, passed


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
