"""``rlhf-t2i plan``: hours, disk, memory and traffic of a run, before anything starts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_t2i.commands.output import RecipePath, SetOption
from rlhf_t2i.errors import UsageError

if TYPE_CHECKING:
    from rlhf_t2i.cluster.node_check import ClusterState
    from rlhf_t2i.commands.plan_report import Report
    from rlhf_t2i.recipe.schema import Recipe
    from rlhf_t2i.tools.planning.devices import Device
    from rlhf_t2i.tools.planning.fit import Fit
    from rlhf_t2i.tools.planning.plan import Plan
    from rlhf_t2i.tools.planning.speed import Speed


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
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare placements on the recipe's devices, or on --gpus N.")
    ] = False,
    network_gbps: Annotated[
        float | None,
        typer.Option(
            min=0.001, metavar="GBPS", help="Network of one machine of 8 GPUs, in Gb/s [default: not counted]."
        ),
    ] = None,
) -> None:
    """Show hours, disk, memory and traffic of a run. Needs no GPU and starts no Ray.

    What `run` would refuse is refused here, but a missing prompt file is a warning: a plan needs none. Exit code 1
    means that it does not fit the device, 2 that it cannot start.
    """
    from rlhf_t2i.recipe import header, placement, reading
    from rlhf_t2i.tools.planning import devices

    name, profile = (None, None) if device is None else devices.find(device)
    loaded = reading.load(recipe, set_ or [])
    for option, given in (("--gpus", gpus), ("--compare", compare), ("--network-gbps", network_gbps)):
        if given and profile is None:
            raise UsageError(f"{option}: name the devices with --device, e.g. --device h100")
    if gpus is None:
        placement.check_placement(loaded)
    from rlhf_t2i.commands.plan_report import Report
    from rlhf_t2i.tools.planning import cluster as clusters
    from rlhf_t2i.tools.planning import plan as planning

    planning.check(loaded)
    typer.echo("counting the networks on the meta device ...", err=True)
    if profile is not None and (compare or gpus is not None):
        comparison = Comparison(loaded, device or "", profile, device_memory, network_gbps, gpus)
        loaded = comparison.show(json_ and compare, quiet=json_ and not compare)
        if compare:
            raise typer.Exit(0 if comparison.options[0].fits else 1)
    plan, cluster = planning.make(loaded), None
    if address is not None:
        typer.echo("asking the nodes of the cluster ...", err=True)
        cluster = clusters.inspect(loaded, address)
    speed = _speed(loaded, plan, name, profile, network_gbps)
    report = Report(
        loaded,
        plan,
        device=name,
        speed=speed,
        seconds=None if speed is None else planning.step_time(loaded, speed),
        fit=_fit(loaded, plan, device_memory or (profile.memory if profile else None)),
        cluster=None if cluster is None else cluster.resources,
        result=header.read(recipe).result,
    )
    if json_:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        report.show()
    _check(report, cluster)


class Comparison:
    """Placements of a recipe beside each other; arguments as of the command."""

    def __init__(
        self, recipe: Recipe, name: str, profile: Device, memory: float | None, network: float | None, gpus: int | None
    ) -> None:
        from rlhf_t2i.tools.planning import plan as planning
        from rlhf_t2i.tools.planning.options import Search
        from rlhf_t2i.tools.planning.speed import Roofline

        networks = planning.networks_of(recipe)
        speed = Roofline(profile, networks, profile.links(network))
        search = Search(recipe, networks, speed, memory or profile.memory)
        own = 1 if recipe.placement.mode == "local" else sum(g.devices for g in recipe.placement.groups.values())
        self.name, self.devices = name, gpus or own
        self.options = search.options(self.devices, _progress)
        self.before = search.as_it_is() if self.devices == own else None

    def show(self, as_json: bool, quiet: bool) -> Recipe:
        """Print them, and return the recipe in the fastest that fits."""
        from rlhf_t2i.commands import plan_options

        if as_json:
            rows = [*([self.before] if self.before else []), *self.options]
            data = {"devices": self.devices, "options": [option.as_json() for option in rows]}
            typer.echo(json.dumps(data, indent=2))
        elif not quiet:
            plan_options.show(self.options, self.before, f"{self.devices} x {self.name}")
        return self.options[0].recipe


def _progress(done: int, total: int) -> None:
    """One line on stderr that is written over, on a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        typer.echo(f"\rcomparing placements: {done} of {total}{end}", err=True, nl=False)
    elif not done:
        typer.echo(f"comparing {total} placements ...", err=True)


def _fit(recipe: Recipe, plan: Plan, memory: float | None) -> Fit | None:
    """Against the memory given, or a GPU of this machine; None if there is neither."""
    from rlhf_t2i.tools.planning import fit

    if memory is None:
        import torch

        if not torch.cuda.is_available():
            return None
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return fit.check(recipe, plan, memory)


def _speed(
    recipe: Recipe, plan: Plan, name: str | None, profile: Device | None, network_gbps: float | None
) -> Speed | None:
    """Measured on this machine, or assumed from a data sheet; None without a device."""
    if name is None:
        return None
    if profile is not None:
        from rlhf_t2i.tools.planning.plan import networks_of
        from rlhf_t2i.tools.planning.speed import Roofline

        return Roofline(profile, networks_of(recipe), profile.links(network_gbps))
    from rlhf_t2i.tools.planning import calibration

    typer.echo("measuring this machine ...", err=True)
    return calibration.measure(recipe, plan.batch["learner"]["micro"])


def _check(report: Report, cluster: ClusterState | None) -> None:
    """Warn of missing prompt files, and end with an exit code where the run cannot start, or does not fit."""
    from rlhf_t2i.algorithm import prompt_hub, prompts
    from rlhf_t2i.tools.planning import cluster as clusters
    from rlhf_t2i.training import run_prompts

    data = report.recipe.data
    named = {key: file for key, file in (("prompts", data.prompts), ("held_out", data.held_out)) if file is not None}
    missing = [key for key, file in named.items() if not prompts.exists(file)]
    for key in missing:
        typer.echo(f"warning: data.{key}: no such prompt file: {named[key]}; `rlhf-t2i run` will refuse this", err=True)
    if not missing and not any(file.startswith(prompt_hub.PREFIX) for file in named.values()):
        typer.echo("checking the prompts ...", err=True)
        run_prompts.check(report.recipe)
    if cluster is not None:
        for sentence in cluster.lost:
            typer.echo(f"warning: {sentence}", err=True)
        clusters.check(report.plan, cluster)
    if report.fit is not None and report.fit.group is not None:
        raise typer.Exit(1)
