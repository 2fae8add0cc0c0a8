"""``rlhf-t2i app``: models side by side in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_t2i.commands.output import DeviceOption, torch_device
from rlhf_t2i.errors import UsageError


def app_command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="RUN_OR_MODEL...", help="Runs (before and after), diffusers folders or hub ids."),
    ],
    metrics: Annotated[
        str, typer.Option(help="Rewards besides those of the runs: NAME or LABEL=NAME, comma-separated.")
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METRIC.OPTION=VALUE", help="A reward's own option, e.g. pickscore.model=./dir."),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The first free one from 7860.")] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
) -> None:
    """Draw any prompt with several models side by side, in a browser on this machine. Nothing leaves it."""
    from rlhf_t2i.tools import app

    app.check()
    from rlhf_t2i.commands.evaluate import metric_options
    from rlhf_t2i.evaluation.settings import names_by_label
    from rlhf_t2i.tools.side_by_side import RewardSpec, open_models

    if precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision {precision!r}: fp32 or bf16")
    options = metric_options(set_ or [])
    names = names_by_label([name.strip() for name in metrics.split(",") if name.strip()])
    stray = next((label for label in options if label not in names), None)
    if stray is not None:
        raise UsageError(f"--set {stray}.…: {stray!r} is not among --metrics")
    rewards = {label: RewardSpec(name, options.get(label, {})) for label, name in names.items()}
    app.serve(open_models(models, rewards, torch_device(device), precision), port)
