"""A plan as text at 80 columns, or as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.table import Table

from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import speed as speeds
from rlhf_t2i.tools.planning.cost import Duration, duration
from rlhf_t2i.tools.planning.fit import Fit
from rlhf_t2i.tools.planning.memory import Memory
from rlhf_t2i.tools.planning.plan import Plan
from rlhf_t2i.tools.planning.speed import Speed
from rlhf_t2i.tools.planning.time import StepTime
from rlhf_t2i.utils.terminal import PlainConsole


@dataclass(frozen=True)
class Report:
    """Everything that ``rlhf-t2i plan`` found.

    Attributes:
        recipe: The recipe.
        plan: Its plan.
        device: The name of the device that it is planned for.
        speed: Of that device.
        seconds: Of a step on it.
        fit: Whether it fits.
        cluster: What a Ray cluster has, by kind.
        result: What the recipe's header says to expect, and whose result that is.
    """

    recipe: Recipe
    plan: Plan
    device: str | None = None
    speed: Speed | None = None
    seconds: StepTime | None = None
    fit: Fit | None = None
    cluster: dict[str, float] | None = None
    result: str | None = None

    @property
    def duration(self) -> Duration | None:
        """Hours of the whole run on the device."""
        return None if self.seconds is None else duration(self.recipe, self.seconds, self.plan.devices)

    def as_json(self) -> dict[str, object]:
        """Plain data; sizes in bytes, rates in FLOP/s, times in seconds and hours."""
        plan, taken = self.plan, self.duration
        run: dict[str, object] = {"steps": self.recipe.steps, "disk": {**asdict(plan.disk), "total": plan.disk.total}}
        if self.result is not None:
            run["result"] = self.result
        if taken is not None:
            run |= {"hours": taken.hours, "gpu_hours": taken.gpu_hours, "parts": asdict(taken)}
        groups = [asdict(g) | {"memory": {**asdict(g.memory), "device": g.memory.device}} for g in plan.groups]
        data: dict[str, object] = {"run": run, **asdict(plan), "groups": groups, "devices": plan.devices}
        if self.seconds is not None and self.speed is not None:
            data["seconds"] = step_json(self.seconds)
            data["speed"] = speeds.as_json(self.speed)
        if self.cluster is not None:
            data["cluster"] = self.cluster
        if self.fit is not None:
            data["fit"] = asdict(self.fit)
        return data

    def show(self) -> None:
        """Print everything: the whole run first."""
        console = PlainConsole(width=80)
        for line in (*self._run(), *self._shape()):
            console.print(line)
        console.print(self._memory())
        for line in self._traffic():
            console.print(line)
        if self.seconds is not None and self.speed is not None:
            console.print(self._seconds(self.seconds))
            for line in self._waiting(self.seconds):
                console.print(line)
            console.print(f"rates {self.speed.describe()}")
        if self.cluster is not None:
            console.print(f"cluster: {self.cluster['GPU']:g} GPUs, {self.cluster['CPU']:g} CPUs")
        for note in self.plan.notes:
            console.print(f"note: {note}")
        if self.fit is not None:
            # Not wrapped: its --set options are copied.
            console.print(self.fit.describe(), soft_wrap=True)

    def _run(self) -> Iterator[str]:
        steps, disk, taken = self.recipe.steps, self.plan.disk, self.duration
        if taken is None:
            yield f"Whole run, {steps} steps (hours: --device h100, or here to measure this machine)"
        else:
            yield (
                f"Whole run, {steps} steps on {self.plan.devices} x {self.device}: {hours_text(taken.hours)}, "
                f"{taken.gpu_hours:.3g} GPU-hours"
            )
            parts = {"training": taken.training, "warm-up": taken.warmup, "measuring": taken.measuring}
            yield "  " + ", ".join(f"{name} {hours_text(hours)}" for name, hours in parts.items() if hours)
        count = disk.checkpoints // disk.checkpoint if disk.checkpoint else 0
        yield (
            f"  disk {bytes_text(disk.total)}: {count} checkpoint{'s' * (count != 1)} of "
            f"{bytes_text(disk.checkpoint)}, model {bytes_text(disk.model)}, samples {bytes_text(disk.samples)}"
        )
        if self.result is not None:
            yield f"  result, as the recipe says: {self.result}"

    def _shape(self) -> Iterator[str]:
        plan = self.plan
        stage = f"ZeRO-{plan.zero_stage}" if plan.mode == "ray" else "one process, no Ray"
        offload = ", optimizer states in host memory" if plan.offload else ""
        yield f"{plan.devices} device{'s' * (plan.devices > 1)}, {stage}, {plan.precision}{offload}"
        for role, sizes in plan.batch.items():
            yield (
                f"batch of the {role}: {sizes['global']} = {sizes['ranks']} ranks x {sizes['micro']} images "
                f"x {sizes['accumulation']} accumulation"
            )

    def _memory(self) -> Table:
        title = "Memory per process (work: activations, updates; without CUDA context)"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 0, 0, 1))
        for name in ("group", "role", "params", "weights", "grads", "optim.", "work", "total"):
            width = {"group": 11, "role": 17}.get(name)
            table.add_column(name, justify="left" if width else "right", no_wrap=True, max_width=width)
        for group in self.plan.groups:
            title = f"{group.name} x{group.devices}"
            for item in group.roles:
                count = "?" if item.parameters is None else _count(item.parameters) if item.parameters else "shared"
                table.add_row(title, item.role, count, *_cells(item.memory))
                title = ""
            table.add_row("", "each process", "", *_cells(group.memory), style="bold", end_section=True)
            if group.memory.host:
                table.add_row("", "host memory", *[""] * 5, bytes_text(group.memory.host))
        return table

    def _traffic(self) -> Iterator[str]:
        plan = self.plan
        if not plan.traffic and not plan.weights_sync:
            yield "traffic between roles: none"
        for when in dict.fromkeys(item.when for item in plan.traffic):
            yield f"traffic per image, {when}:"
            for item in plan.traffic:
                if item.when == when:
                    route = f"{item.source} -> {item.target}"
                    yield f"  {route:<40} {bytes_text(item.sent):>8}, back {bytes_text(item.returned):>8}"
        if plan.weights_sync:
            yield f"traffic per update: weights, learner -> generator {bytes_text(plan.weights_sync)}"

    def _seconds(self, seconds: StepTime) -> Table:
        table = Table(title="Seconds per step", title_justify="left", box=None, padding=(0, 0, 0, 1))
        for name in ("role", "generator update", "assistant updates"):
            table.add_column(name, justify="left" if name == "role" else "right")
        for kind in (seconds.roles, seconds.communication):
            phases = kind("generator"), kind("assistant")
            for name in {**phases[0], **phases[1]}:
                table.add_row(name, *(f"{phase[name]:.3g}" if name in phase else "-" for phase in phases))
        total = f"{seconds.generator:.3g}", f"{seconds.assistant:.3g}"
        table.add_row("in all, as the calls overlap", *total, style="bold")
        return table

    def _waiting(self, seconds: StepTime) -> Iterator[str]:
        images = self.recipe.optimization.batch_size / seconds.step
        yield f"step {seconds.step:.3g} s, {images:.3g} images/s; exposed communication {seconds.exposed:.2g} s"
        shares = ", ".join(f"{group} {max(0.0, share):.0%}" for group, share in seconds.idle.items())
        yield f"devices that wait for others: {shares} of the step"


def step_json(seconds: StepTime) -> dict[str, object]:
    """A step as plain data."""
    phases = ("generator", "assistant")
    return {
        "step": seconds.step,
        "generator": seconds.generator,
        "assistant": seconds.assistant,
        "assistant_update": seconds.assistant_update,
        "image": seconds.image,
        "exposed_communication": seconds.exposed,
        "idle": dict(seconds.idle),
        "roles": {phase: seconds.roles(phase) for phase in phases},
        "communication": {phase: seconds.communication(phase) for phase in phases},
    }


def _cells(memory: Memory) -> list[str]:
    work = memory.activations + memory.buffers
    return [bytes_text(n) for n in (memory.weights, memory.gradients, memory.optimizer, work, memory.device)]


def bytes_text(number: int) -> str:
    """Bytes in decimal units: 12.3 GB."""
    if not number:
        return "-"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:.0f} {unit}"
    return f"{number} B"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def hours_text(hours: float) -> str:
    """Hours, minutes or seconds."""
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{60 * hours:.2g} minutes" if hours >= 1 / 60 else f"{3600 * hours:.2g} seconds"
