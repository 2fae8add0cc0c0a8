"""The training loop of the zoo's models: AdamW or Muon, EMA, data-parallel under torchrun, resumable at any time.

Under ``torchrun --nproc-per-node N`` the gradients are averaged over the processes. On a CPU two processes of one
thread each beat one of two threads: they meet once a step, not in every operator.

Budgets are minutes of CPU time of a process, not of the clock: a training at the lowest priority on a busy machine may
stand still for an hour, and its learning rate should not fall meanwhile. Logs tell both. On a GPU, where the host only
waits, they are minutes of the clock; there the loop reads no number back except for the log, every 25 steps.

Two schedules of the learning rate: a cosine to the end of a budget, or constant, which may be continued for as many
sessions as there are; ``finish`` then lowers it to zero in a checkpoint of its own and leaves the constant one as it
is.
"""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo import device
from zoo.data import WORK

State = dict[str, Any]
LOG_STEPS = 25


class Diverged(RuntimeError):
    """The loss or its gradient is no longer a number; ``average`` holds the last average that was sound."""

    def __init__(self, name: str, step: int, average: nn.ModuleDict) -> None:
        super().__init__(f"{name} diverged before step {step}: use a lower learning rate")
        self.average = average


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024), also for convolutions; each rank does a share.

    An update has the root mean square of AdamW's, 0.2 (arXiv 2502.16982), so one learning rate serves both.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        rank, ranks = join()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in params if p.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param]["momentum"] = torch.zeros_like(param)
            momenta = [self.state[param]["momentum"] for param in params]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
            mine = slice(rank, None, ranks)
            updates = [torch.zeros_like(p) for p in params] if ranks > 1 else list(params)
            updates[mine] = [
                found.reshape(param.shape)
                for found, param in zip(_updates(directions[mine]), params[mine], strict=True)
            ]
            if ranks > 1:
                flat = torch.cat([u.flatten() for u in updates])
                dist.all_reduce(flat)
                parts = flat.split([u.numel() for u in updates])
                updates = [part.view_as(u) for part, u in zip(parts, updates, strict=True)]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])


def _updates(directions: list[Tensor]) -> list[Tensor]:
    """Orthogonal matrices of the directions: on a GPU, where launches cost most, all of a shape at once."""
    if not device.on_cuda():
        return [_orthogonal(direction.flatten(1)) for direction in directions]
    alike: dict[torch.Size, list[int]] = {}
    for index, direction in enumerate(directions):
        alike.setdefault(direction.flatten(1).shape, []).append(index)
    found = list(directions)
    for indices in alike.values():
        stacked = _orthogonal(torch.stack([directions[i].flatten(1) for i in indices])).contiguous()
        for index, update in zip(indices, stacked, strict=True):
            found[index] = update
    return found


def _orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices [..., M, N], roughly, times 0.2 sqrt(larger side)."""
    x = matrix.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).contiguous()
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x if wide else x.mT).float() * (0.2 * max(matrix.shape[-2:]) ** 0.5)


def optimizers(modules: nn.Module, lr: float, weight_decay: float, muon: bool) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices and AdamW for the rest, or AdamW alone."""
    outer = ("conv_in", "conv_out", "embed_tokens", "token_embedding", "position_embedding", "pos_embed", "proj_out")
    named = [(name, p) for name, p in modules.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if muon and p.ndim > 1 and not any(part in name for part in outer)]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in chosen]
    decay = 0.0 if muon else weight_decay
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=decay, fused=device.on_cuda() or None)
    return [adam, Muon(hidden, lr, weight_decay=weight_decay)] if hidden else [adam]


def train(
    name: str,
    modules: nn.ModuleDict,
    loss_fn: Callable[[int], Tensor],
    *,
    lr: float,
    steps: int = 10**7,
    minutes: float = math.inf,
    finish: float | None = None,
    constant: bool = False,
    muon: bool = False,
    warmup: int = 200,
    ema_decay: float = 0.999,
    weight_decay: float = 0.0,
    save_seconds: float = 80,
    batch: int = 0,
    make: Callable[[nn.ModuleDict], list[torch.optim.Optimizer]] | None = None,
    evaluate: Callable[[nn.ModuleDict], dict[str, Any]] | None = None,
    evaluate_seconds: float = 1200,
) -> nn.ModuleDict:
    """Train ``modules`` and return their moving average.

    Args:
        name: The checkpoint's name in the work folder; an interrupted training continues from it. ``NAME.jsonl``
            beside it keeps the losses, seconds and samples.
        modules: What is trained: parameters that require a gradient. Moved to the device.
        loss_fn: Batch number to loss; draws its own batch, seeded by that number.
        lr: The peak learning rate.
        steps: Updates in all; with a cosine the learning rate falls to zero over them.
        minutes: A budget of CPU time (on a GPU, of the clock) that ends the training, and the cosine with it, if it is
            spent before.
        finish: Lower a constant learning rate to zero in so many of these minutes, in a checkpoint ``NAME_finished``
            that starts as a copy of ``NAME``.
        constant: No cosine.
        muon: Muon for the hidden matrices.
        warmup: Steps in which the learning rate rises to its peak.
        ema_decay: Of the returned average.
        weight_decay: Of the optimizer.
        save_seconds: Between checkpoints.
        batch: Samples of a step in all processes, for the log.
        make: Makes the optimizers instead; a parameter group's ``scale`` multiplies the learning rate.
        evaluate: Called with the average on rank 0 every so many seconds of the budget; what it returns is logged.
        evaluate_seconds: How many.

    Raises:
        ValueError: Several processes on a GPU.
        Diverged: The loss or its gradient is no longer a number.
    """
    _stay_polite()
    rank, ranks = join()
    if device.on_cuda() and ranks > 1:
        raise ValueError("on a GPU the zoo trains in one process: start it without torchrun")
    target = f"{name}_finished" if finish else name
    checkpoint, log = WORK / f"{target}.pt", WORK / f"{target}.jsonl"
    modules.to(device.DEVICE)
    opts = make(modules) if make else optimizers(modules, lr, weight_decay, muon)
    average = copy.deepcopy(modules).requires_grad_(False)
    state: State = {"step": 0, "seconds": 0.0, "wall": 0.0, "samples": 0, "evaluated": 0.0, "finish_began": None}
    source = checkpoint if checkpoint.is_file() else WORK / f"{name}.pt"
    if source.is_file():
        state |= torch.load(source, weights_only=True, map_location="cpu")
        modules.load_state_dict(state.pop("modules"))
        average.load_state_dict(state.pop("average"))
        kept = state.pop("optimizer")
        if isinstance(kept, list) and len(kept) == len(opts):  # else it comes from another optimizer
            for opt, old in zip(opts, kept, strict=True):
                opt.load_state_dict(old)
    if finish and state["finish_began"] is None:
        state["finish_began"] = state["seconds"]
    if rank == 0:
        _log(log, {"event": "start", "at": time.strftime("%F %T"), "step": state["step"], "processes": ranks,
                   "command": " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]]), "hardware": _hardware()})  # fmt: skip
    before, wall_before = state["seconds"], state["wall"]
    smooth: float | Tensor | None = None
    clock = time.monotonic if device.on_cuda() else time.process_time
    began, last_save, wall_began = clock(), time.monotonic(), time.monotonic()
    sound = copy.deepcopy(average)
    progress = state["step"] / steps
    while state["step"] < steps:
        step = state["step"]
        rate = lr * min(1.0, (step + 1) / warmup)
        if finish:
            rate *= max(0.0, 1 - (state["seconds"] - state["finish_began"]) / (60 * finish))
        elif not constant:
            rate *= 0.5 * (1 + math.cos(math.pi * progress))
        for group in (g for opt in opts for g in opt.param_groups):
            group["lr"] = rate * group.get("scale", 1.0)
        loss = loss_fn(step * ranks + rank)
        modules.zero_grad(set_to_none=True)
        loss.backward()
        passed = before + clock() - began
        shown, passed = _average_gradients(modules, loss.detach(), passed, ranks)
        norm = torch.nn.utils.clip_grad_norm_([p for p in modules.parameters() if p.requires_grad], 1.0)
        for opt in opts:
            opt.step()
        _follow(average, modules, min(ema_decay, (step + 1) / (step + 10)))
        smooth = shown if smooth is None else 0.98 * smooth + 0.02 * shown
        wall = wall_before + time.monotonic() - wall_began
        state |= {"step": step + 1, "seconds": passed, "wall": wall, "samples": state["samples"] + batch}
        if finish:
            progress = (passed - state["finish_began"]) / (60 * finish)
        else:
            progress = max((step + 1) / steps, passed / (60 * minutes))
        save = rank == 0 and (progress >= 1 or time.monotonic() - last_save > save_seconds)
        if save or step % LOG_STEPS == 0:
            if not (math.isfinite(smooth) and math.isfinite(norm)):
                raise Diverged(target, step, sound)
            sound.load_state_dict(average.state_dict())
        if rank == 0 and step % LOG_STEPS == 0:
            _log(log, {"step": step, "cpu_seconds": round(passed, 1), "seconds": round(wall, 1),
                       "samples": state["samples"], "lr": round(rate, 7),
                       "loss": round(float(smooth), 5), "norm": round(float(norm), 4)})  # fmt: skip
        if save:
            last_save = time.monotonic()
            _save(checkpoint, modules, average, opts, state)
        if rank == 0 and evaluate and passed - state["evaluated"] > evaluate_seconds:
            state["evaluated"] = passed
            found = evaluate(average)
            _log(log, {"step": step, "cpu_seconds": round(passed, 1), "samples": state["samples"], **found})
        if progress >= 1:
            break
    return average


def _stay_polite() -> None:
    """Keep the lowest priority: Linux gives sessions, as torchrun's workers are, a share of their own."""
    group = Path("/proc/self/autogroup")
    if group.is_file() and os.getpriority(os.PRIO_PROCESS, 0) == 19:
        group.write_text("19", "utf-8")


def _log(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(path.stem, json.dumps(line), flush=True)


def _hardware() -> str:
    if device.on_cuda():
        return torch.cuda.get_device_name(device.DEVICE)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), socket.gethostname())
    return f"{os.cpu_count()} cores of {model}, {torch.get_num_threads()} thread a process, shared with other work"


def join() -> tuple[int, int]:
    """This process's rank and their number; joins torchrun's process group if there is one."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


@torch.no_grad()
def _follow(average: nn.Module, modules: nn.Module, decay: float) -> None:
    """Move the average towards the modules."""
    torch._foreach_lerp_(list(average.parameters()), list(modules.parameters()), 1 - decay)
    for mean, new in zip(average.buffers(), modules.buffers(), strict=True):
        mean.copy_(mean.lerp(new, 1 - decay) if new.is_floating_point() else new)


def _average_gradients(modules: nn.Module, loss: Tensor, passed: float, ranks: int) -> tuple[float | Tensor, float]:
    """Average gradients over the processes, in place; the loss and the time travel along and are returned."""
    if device.on_cuda() and ranks == 1:
        return loss, passed  # reading the loss would wait for the GPU
    extra = torch.stack([loss.cpu(), torch.tensor(passed)])
    if ranks > 1:
        gradients = [p.grad for p in modules.parameters() if p.grad is not None]
        flat = torch.cat([extra.float(), *(g.flatten() for g in gradients)])
        dist.all_reduce(flat)
        flat /= ranks
        extra, *parts = flat.split([len(extra), *(g.numel() for g in gradients)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    shown, seconds = extra.tolist()
    return shown, seconds


def _save(path: Path, modules: nn.Module, average: nn.Module, opts: list[torch.optim.Optimizer],
          state: State) -> None:  # fmt: skip
    aside = path.with_suffix(".tmp")
    kept = [opt.state_dict() for opt in opts]
    torch.save({"modules": modules.state_dict(), "average": average.state_dict(), "optimizer": kept, **state}, aside)
    aside.replace(path)


def load_average(name: str, modules: nn.ModuleDict) -> nn.ModuleDict:
    """The moving average of a checkpoint, finished or not."""
    state = torch.load(WORK / f"{name}.pt", weights_only=True, mmap=True, map_location="cpu")
    modules.load_state_dict(state["average"])
    return modules.to(device.DEVICE).eval().requires_grad_(False)
