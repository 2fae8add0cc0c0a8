"""A plan as text at 80 columns, or as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning.cost import Duration, duration
from rlhf_t2i.tools.planning.devices import ACHIEVED, ACHIEVED_LINK, HERE, Rates
from rlhf_t2i.tools.planning.fit import Fit
from rlhf_t2i.tools.planning.memory import Memory
from rlhf_t2i.tools.planning.options import Option
from rlhf_t2i.tools.planning.plan import Plan
from rlhf_t2i.tools.planning.time import StepTime
from rlhf_t2i.utils.terminal import PlainConsole

_SHOWN = 5
"""Placements in the table of ``--gpus``."""

_LAUNCH_BOUND = 0.5
"""Seconds per step below which a GPU is not kept busy by FLOPs."""


@dataclass(frozen=True)
class Report:
    """Everything that ``rlhf-t2i plan`` found.

    Attributes:
        recipe: The recipe.
        plan: Its plan.
        device: The name of the device that it is planned for.
        rates: Of that device.
        seconds: Of a step on it.
        fit: Whether it fits.
        cluster: What a Ray cluster has, by kind.
    """

    recipe: Recipe
    plan: Plan
    device: str | None = None
    rates: Rates | None = None
    seconds: StepTime | None = None
    fit: Fit | None = None
    cluster: dict[str, float] | None = None

    @property
    def duration(self) -> Duration | None:
        """Hours of the whole run on the device."""
        return None if self.seconds is None else duration(self.recipe, self.seconds, self.plan.devices)

    def as_json(self) -> dict[str, object]:
        """Plain data; sizes in bytes, rates in FLOP/s, times in seconds and hours."""
        plan, taken = self.plan, self.duration
        run: dict[str, object] = {"steps": self.recipe.steps, "disk": {**asdict(plan.disk), "total": plan.disk.total}}
        if taken is not None:
            run |= {"hours": taken.hours, "gpu_hours": taken.gpu_hours, "parts": asdict(taken)}
        groups = [asdict(g) | {"memory": {**asdict(g.memory), "device": g.memory.device}} for g in plan.groups]
        data: dict[str, object] = {"run": run, **asdict(plan), "groups": groups, "devices": plan.devices}
        if self.seconds is not None and self.rates is not None:
            data["seconds"] = {**asdict(self.seconds), "step": self.seconds.step}
            data["rates"] = asdict(self.rates)
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
        if self.seconds is not None and self.rates is not None:
            console.print(self._seconds(self.seconds))
            console.print(self._rates(self.rates))
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
                f"Whole run, {steps} steps on {self.plan.devices} x {self.device}: {_hours(taken.hours)}, "
                f"{taken.gpu_hours:.3g} GPU-hours"
            )
            parts = {"training": taken.training, "assistant's warm-up": taken.warmup, "measuring": taken.measuring}
            yield "  " + ", ".join(f"{name} {_hours(hours)}" for name, hours in parts.items() if hours)
            if self.seconds is not None and self.seconds.step < _LAUNCH_BOUND and self.device != HERE:
                yield "  a lower bound: networks this small wait for kernel launches, which are not counted"
        count = disk.checkpoints // disk.checkpoint if disk.checkpoint else 0
        yield (
            f"  disk {_bytes(disk.total)}: {count} checkpoint{'s' * (count != 1)} of {_bytes(disk.checkpoint)}, "
            f"model {_bytes(disk.model)}, samples {_bytes(disk.samples)}"
        )

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
                table.add_row("", "host memory", *[""] * 5, _bytes(group.memory.host))
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
                    yield f"  {route:<40} {_bytes(item.sent):>8}, back {_bytes(item.returned):>8}"
        if plan.weights_sync:
            yield f"traffic per update: weights, learner -> generator {_bytes(plan.weights_sync)}"

    def _seconds(self, seconds: StepTime) -> Table:
        table = Table(title="Seconds per step", title_justify="left", box=None, padding=(0, 0, 0, 1))
        for name in ("role", "generator update", "assistant updates"):
            table.add_column(name, justify="left" if name == "role" else "right")
        for role in {**seconds.generator_roles, **seconds.assistant_roles}:
            cells = (phase.get(role) for phase in (seconds.generator_roles, seconds.assistant_roles))
            table.add_row(role, *("-" if cell is None else f"{cell:.3g}" for cell in cells))
        for name, value in seconds.communication.items():
            row = ["-", f"{value:.3g}"] if name.endswith("assistant") else [f"{value:.3g}", "-"]
            table.add_row(name, *row)
        assistant = seconds.assistant + seconds.communication.get("reductions: assistant", 0.0)
        total = (f"{seconds.step - assistant:.3g}", f"{assistant:.3g}")
        table.add_row("in all, groups side by side", *total, style="bold")
        return table

    def _rates(self, rates: Rates) -> str:
        source = "as measured here"
        if self.device != HERE:
            source = f"assumed, {ACHIEVED:.0%} of the peak; links {ACHIEVED_LINK:.0%}"
        return f"rates ({source}): networks {rates.network / 1e12:.3g} TFLOP/s, decoder {rates.decoder / 1e12:.3g}"


def _cells(memory: Memory) -> list[str]:
    work = memory.activations + memory.buffers
    return [_bytes(n) for n in (memory.weights, memory.gradients, memory.optimizer, work, memory.device)]


def _bytes(number: int) -> str:
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


def show_options(options: Sequence[Option]) -> None:
    """Print placements, the fastest that fits first, and how to take it."""
    console = PlainConsole(width=80)
    table = Table(box=None, padding=(0, 2, 0, 0), title="Placements, the fastest first", title_justify="left")
    table.add_column("devices and roles", overflow="fold")
    for name in ("per process", "hours"):
        table.add_column(name, justify="right", no_wrap=True)
    for option in options[:_SHOWN]:
        hours = _hours(option.duration.hours) if option.fits else "does not fit"
        table.add_row(option.describe(), _bytes(option.memory), hours)
    console.print(table)
    if options[0].fits:  # not wrapped: it is copied
        console.print(f"the first one: --set 'placement.groups={options[0].yaml()}'", soft_wrap=True)


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{60 * hours:.2g} minutes" if hours >= 1 / 60 else f"{3600 * hours:.2g} seconds"
