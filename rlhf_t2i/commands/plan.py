"""``rlhf-t2i plan``: hours, disk, memory and traffic of a run, before anything starts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_t2i.commands.output import RecipePath, SetOption
from rlhf_t2i.errors import UsageError

if TYPE_CHECKING:
    from rlhf_t2i.cluster.node_check import ClusterState
    from rlhf_t2i.commands.plan_report import Report
    from rlhf_t2i.recipe.schema import Recipe
    from rlhf_t2i.tools.planning.devices import Device, Rates
    from rlhf_t2i.tools.planning.fit import Fit
    from rlhf_t2i.tools.planning.plan import Plan


def plan_command(
    recipe: RecipePath,
    set_: SetOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Check this Ray cluster: devices, packages, files.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Hours and fit on this GPU (h100, h200, a100, a100-40gb, l40s), or here: this machine."),
    ] = None,
    device_memory: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="GIB", help="Memory of a device [default: --device's, or the GPU's]."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, max=4096, metavar="N", help="Place the roles on N devices, as fast as fits.")
    ] = None,
) -> None:
    """Show hours, disk, memory and traffic of a run. Needs no GPU and starts no Ray.

    What `run` would refuse is refused here, but a missing prompt file is a warning: a plan needs none. Exit code 1
    means that it does not fit the device, 2 that it cannot start.
    """
    from rlhf_t2i.recipe import placement, reading
    from rlhf_t2i.tools.planning import devices

    name, profile = (None, None) if device is None else devices.find(device)
    loaded = reading.load(recipe, set_ or [])
    if gpus is not None and profile is None:
        raise UsageError("--gpus: name the devices with --device, e.g. --device h100")
    if gpus is None:
        placement.check_placement(loaded)
    from rlhf_t2i.commands.plan_report import Report
    from rlhf_t2i.tools.planning import cluster as clusters
    from rlhf_t2i.tools.planning import plan as planning

    planning.check(loaded)
    typer.echo("counting the networks on the meta device ...", err=True)
    if gpus is not None and profile is not None:
        loaded = _place(loaded, gpus, profile, device_memory, json_)
    plan, cluster = planning.make(loaded), None
    if address is not None:
        typer.echo("asking the nodes of the cluster ...", err=True)
        cluster = clusters.inspect(loaded, address)
    rates = _rates(loaded, plan, name, profile)
    report = Report(
        loaded,
        plan,
        device=name,
        rates=rates,
        seconds=None if rates is None else planning.step_time(loaded, rates),
        fit=_fit(loaded, plan, device_memory or (profile.memory if profile else None)),
        cluster=None if cluster is None else cluster.resources,
    )
    if json_:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        report.show()
    _check(report, cluster)


def _place(recipe: Recipe, gpus: int, profile: Device, memory: float | None, quiet: bool) -> Recipe:
    """The recipe in the fastest placement that fits; prints it beside the others that were tried."""
    from rlhf_t2i.commands.plan_report import show_options
    from rlhf_t2i.tools.planning.options import options

    found = options(recipe, gpus, profile.rates(recipe), memory or profile.memory)
    if not quiet:
        show_options(found)
    return found[0].recipe


def _fit(recipe: Recipe, plan: Plan, memory: float | None) -> Fit | None:
    """Against the memory given, or a GPU of this machine; None if there is neither."""
    from rlhf_t2i.tools.planning import fit

    if memory is None:
        import torch

        if not torch.cuda.is_available():
            return None
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return fit.check(recipe, plan, memory)


def _rates(recipe: Recipe, plan: Plan, name: str | None, profile: Device | None) -> Rates | None:
    """Measured on this machine, or assumed from a data sheet; None without a device."""
    if name is None:
        return None
    if profile is not None:
        return profile.rates(recipe)
    from rlhf_t2i.tools.planning import calibration

    typer.echo("measuring the rates of this machine ...", err=True)
    return calibration.rates(recipe, plan.batch["learner"]["micro"])


def _check(report: Report, cluster: ClusterState | None) -> None:
    """Warn of missing prompt files, and end with an exit code where the run cannot start, or does not fit."""
    from rlhf_t2i.algorithm import prompt_hub, prompts
    from rlhf_t2i.tools.planning import cluster as clusters
    from rlhf_t2i.training.loop import RunPrompts

    data = report.recipe.data
    named = {key: file for key, file in (("prompts", data.prompts), ("held_out", data.held_out)) if file is not None}
    missing = [key for key, file in named.items() if not prompts.exists(file)]
    for key in missing:
        typer.echo(f"warning: data.{key}: no such prompt file: {named[key]}; `rlhf-t2i run` will refuse this", err=True)
    if not missing and not any(file.startswith(prompt_hub.PREFIX) for file in named.values()):
        RunPrompts.read(report.recipe)
    if cluster is not None:
        for sentence in cluster.lost:
            typer.echo(f"warning: {sentence}", err=True)
        clusters.check(report.plan, cluster)
    if report.fit is not None and report.fit.group is not None:
        raise typer.Exit(1)
