"""``rlhf-t2i plan``: what goes where, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_t2i.errors import UsageError

if TYPE_CHECKING:
    from rlhf_t2i.recipe.schema import Recipe
    from rlhf_t2i.tools.planning import Device, Fit, Memory, Plan, Rates, StepTime


def plan_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Compare with what this Ray cluster has.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Fit and seconds on this GPU (h100-80gb, h200-141gb, a100-80gb, ...), or here: measure this machine."
        ),
    ] = None,
    device_memory: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="GIB", help="Memory of a device [default: --device's, or the GPU's]."),
    ] = None,
) -> None:
    """Show what goes where, memory, traffic and fit. Needs no GPU and starts no Ray.

    Exit code 1 means that it does not fit the device.
    """
    from rlhf_t2i.recipe import placement as geometry
    from rlhf_t2i.recipe import reading

    loaded = reading.load(recipe, set_ or [])
    geometry.check_placement(loaded)
    from rlhf_t2i.tools import planning

    profile = None if device in (None, planning.HERE) else planning.named(device)
    plan = planning.make(loaded)
    fit = _fit(loaded, plan, device_memory or (profile.memory if profile else None))
    rates = _rates(loaded, plan, device, profile)
    seconds = _seconds(loaded, rates)
    cluster = None
    if address is not None:
        from rlhf_t2i.cluster.connect import cluster_resources

        cluster = cluster_resources(address)
    if json_:
        import json

        typer.echo(json.dumps(as_json(plan, cluster, fit, rates, seconds), indent=2))
    else:
        show(plan, cluster)
        if device is not None:
            show_seconds(device, rates, seconds)
        if fit is not None:
            typer.echo(fit.sentence())
    if cluster is not None:
        _compare(plan, cluster)
    if fit is not None and fit.group is not None:
        raise typer.Exit(1)


def _fit(recipe: Recipe, plan: Plan, memory: float | None) -> Fit | None:
    """Against the memory given, or a GPU of this machine; None where neither is."""
    from rlhf_t2i.tools import planning

    if memory is None:
        import torch

        if not torch.cuda.is_available():
            return None
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return planning.check(recipe, plan, memory)


def _rates(recipe: Recipe, plan: Plan, device: str | None, profile: Device | None) -> Rates | None:
    """Measured on this machine, or assumed from a data sheet; None without a device."""
    from rlhf_t2i.tools import planning

    if device == planning.HERE:
        from rlhf_t2i.tools.planning import calibration

        typer.echo("measuring the rates of this machine ...", err=True)
        return calibration.rates(recipe, plan.batch["learner"]["micro"])
    return None if profile is None else profile.rates(recipe)


def _seconds(recipe: Recipe, rates: Rates | None) -> StepTime | None:
    if rates is None:
        return None
    from rlhf_t2i.families import flops
    from rlhf_t2i.recipe import placement as geometry
    from rlhf_t2i.tools import planning

    return planning.step_time(recipe, geometry.check_placement(recipe), flops.of_recipe(recipe), rates)


def show_seconds(device: str, rates: Rates | None, seconds: StepTime | None) -> None:
    """Print the estimate by role and phase."""
    from rich.console import Console
    from rich.table import Table

    from rlhf_t2i.tools.planning import ACHIEVED, HERE

    console = Console(width=80, highlight=False)
    if rates is None or seconds is None:
        console.print(
            f"seconds a step on {device}: no estimate; it needs precision bf16 (or --device {HERE}) and the UNet's "
            "configuration"
        )
        return
    source = "as measured" if device == HERE else f"at an assumed {ACHIEVED:.0%} of its peak"
    console.print(f"Seconds a step on {device}, {source}", style="italic")
    table = Table(box=None, padding=(0, 0, 0, 1))
    for name in ("role", "generator step", "assistant updates"):
        table.add_column(name, justify="left" if name == "role" else "right")
    for role in {**seconds.generator_roles, **seconds.assistant_roles}:
        cells = (phase.get(role) for phase in (seconds.generator_roles, seconds.assistant_roles))
        table.add_row(role, *("-" if cell is None else f"{cell:.3g}" for cell in cells))
    table.add_row("in all", f"{seconds.generator:.3g}", f"{seconds.assistant:.3g}", style="bold")
    console.print(table)
    console.print(
        f"{seconds.step:.3g} seconds a step; rates: UNets {rates.unet / 1e12:.3g} TFLOP/s, decoder "
        f"{rates.decoder / 1e12:.3g}"
    )


def _compare(plan: Plan, cluster: dict[str, float]) -> None:
    kind = "GPU" if cluster["GPU"] else "CPU"
    needed = 1 if plan.share_devices and kind == "GPU" else plan.devices
    if plan.mode == "ray" and cluster[kind] < needed:
        sizes = ", ".join(f"{group.name}: {group.devices}" for group in plan.groups)
        raise UsageError(
            f"placement needs {plan.devices} {kind}s ({sizes}) but the cluster has {cluster[kind]:g}: "
            "use fewer devices or let roles share a group"
        )


def as_json(
    plan: Plan,
    cluster: dict[str, float] | None = None,
    fit: Fit | None = None,
    rates: Rates | None = None,
    seconds: StepTime | None = None,
) -> dict[str, Any]:
    """The plan as plain data; sizes in bytes, rates in FLOP/s."""
    from dataclasses import asdict

    data = asdict(plan)
    for group, item in zip(data["groups"], plan.groups, strict=True):
        group["memory"] = {**asdict(item.memory), "device": item.memory.device}
    data["devices"] = plan.devices
    if cluster is not None:
        data["cluster"] = cluster
    if fit is not None:
        data["fit"] = asdict(fit)
    if rates is not None and seconds is not None:
        data["seconds"] = {**asdict(seconds), "step": seconds.step}
        data["rates"] = asdict(rates)
    return data


def show(plan: Plan, cluster: dict[str, float] | None = None) -> None:
    """Print the plan at 80 columns."""
    from rich.console import Console

    console = Console(width=80, highlight=False)
    stage = f"ZeRO-{plan.zero_stage}" if plan.mode == "ray" else "one process, no Ray"
    offload = ", optimizer states in host memory" if plan.offload else ""
    console.print(f"{plan.devices} device{'s' * (plan.devices > 1)}, {stage}, {plan.precision}{offload}")
    for role, sizes in plan.batch.items():
        console.print(
            f"batch of the {role}: {sizes['global']} = {sizes['ranks']} ranks x {sizes['micro']} images "
            f"x {sizes['accumulation']} accumulation"
        )
    console.print(_memory_table(plan))
    _print_traffic(console, plan)
    if cluster is not None:
        console.print(f"cluster: {cluster['GPU']:g} GPUs, {cluster['CPU']:g} CPUs")
    for note in plan.notes:
        console.print(f"note: {note}")


def _memory_table(plan: Plan) -> Any:
    from rich.table import Table

    title = "Memory of a process (work: activations, updates; without CUDA context)"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 0, 0, 1))
    for name in ("group", "role", "params", "weights", "grads", "optim.", "work", "total"):
        left = name in ("group", "role")
        table.add_column(name, justify="left" if left else "right", no_wrap=True, max_width=14 if left else None)
    for group in plan.groups:
        title = f"{group.name} x{group.devices}"
        for item in group.roles:
            count = "shared" if item.parameters == 0 else "?" if item.parameters is None else _count(item.parameters)
            table.add_row(title, item.role, count, *_cells(item.memory))
            title = ""
        table.add_row("", "each process", "", *_cells(group.memory), style="bold", end_section=True)
        if group.memory.host:
            table.add_row("", "host memory", *[""] * 5, _bytes(group.memory.host))
    return table


def _cells(memory: Memory) -> list[str]:
    work = memory.activations + memory.buffers
    return [_bytes(n) for n in (memory.weights, memory.gradients, memory.optimizer, work, memory.device)]


def _print_traffic(console: Any, plan: Plan) -> None:
    if not plan.traffic and not plan.weights_sync:
        console.print("traffic between processes: none")
    for when in dict.fromkeys(item.when for item in plan.traffic):
        console.print(f"traffic of an image, {when}:")
        for item in plan.traffic:
            if item.when == when:
                route = f"{item.source} -> {item.target}"
                console.print(f"  {route:<40} {_bytes(item.sent):>8}, back {_bytes(item.returned):>8}")
    if plan.weights_sync:
        console.print(f"traffic of an update: weights, learner -> generator {_bytes(plan.weights_sync)}")


def _bytes(number: int) -> str:
    """Bytes in decimal units: 12.3 GB."""
    if not number:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:.0f} {unit}"
    return f"{number} B"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
