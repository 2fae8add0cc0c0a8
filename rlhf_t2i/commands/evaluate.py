"""``rlhf-t2i eval``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_t2i.errors import UsageError


def eval_command(
    model: Annotated[str, typer.Argument(help="Run folder, diffusers folder, hub id, or a UNet (with --base).")],
    prompts: Annotated[str, typer.Option(help="FILE, parti, hpsv2, coco (or NAME:PATH), or a zoo's name: emoji64.")],
    metrics: Annotated[
        str, typer.Option(help="Rewards (NAME or LABEL=NAME), diversity, fid, frechet_clip, class_entropy.")
    ] = "clip",
    out: Annotated[Path | None, typer.Option(help="Folder for images and tables [default: evaluations/MODEL].")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METRIC.OPTION=VALUE", help="A reward's own option, e.g. pickscore.model=./dir."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Pipeline that lends a UNet its text encoders and VAE.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps of a many-step model [default: 50].")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale of a many-step model.")] = 7.5,
    timestep: Annotated[int | None, typer.Option(help="Sample in one step at this timestep.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels; the model's own when absent.")] = None,
    seed: Annotated[int, typer.Option(help="Image i depends on the seed and i alone.")] = 0,
    images_per_prompt: Annotated[int, typer.Option(help="2 or more for diversity.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.")] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    features: Annotated[
        str | None, typer.Option(help="CLIP for diversity and frechet_clip [default: CLIP ViT-B/32], or 'vae'.")
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Folder of real images for fid and frechet_clip.")] = None,
    inception: Annotated[Path | None, typer.Option(help="torch-fidelity's Inception weights for fid.")] = None,
    classes: Annotated[str | None, typer.Option(help="'label a|label b' or a probe's JSON, for class_entropy.")] = None,
    column: Annotated[str, typer.Option(help="Key or column of a jsonl, csv or tsv prompt file.")] = "prompt",
) -> None:
    """Draw with fixed seeds, score, and print means with intervals. Run it again to go on after a kill."""
    from rlhf_t2i.evaluation import settings as settings_module

    values: dict[str, Any] = {
        "model": model, "base": base, "prompts": prompts, "column": column, "limit": limit, "seed": seed,
        "images_per_prompt": images_per_prompt, "steps": steps, "guidance": guidance, "timestep": timestep,
        "resolution": resolution, "batch_size": batch_size, "precision": precision,
        "metrics": [name.strip() for name in metrics.split(",") if name.strip()], "options": metric_options(set_ or []),
        "real": str(real) if real else None, "inception": str(inception) if inception else None, "classes": classes,
    }  # fmt: skip
    if features is not None:
        values["features"] = features
    settings = settings_module.build(values)
    folder = out or Path("evaluations") / (Path(model).name or "model")

    from rlhf_t2i.evaluation.progress import bar
    from rlhf_t2i.evaluation.run import evaluate

    with bar() as progress:
        found = evaluate(settings, folder, progress)
    typer.echo(found.markdown)
    typer.echo(f"Images and per-image scores: {found.path}")


def metric_options(texts: list[str]) -> dict[str, dict[str, Any]]:
    """``metric.option=value`` settings, values in YAML.

    Raises:
        UsageError: Not of that form.
    """
    from rlhf_t2i.recipe import mistakes, reading

    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        metric, dot, option = name.rpartition(".")
        if not equals or not dot or not metric or not option:
            raise UsageError(f"--set {mistakes.shown(text)}: write it as metric.option=value")
        options.setdefault(metric, {})[option] = reading.parse_value(value, f"--set {mistakes.shown(text)}")
    return options
