"""``rlhf-t2i eval``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_t2i.commands.output import given_path
from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.mistakes import KeyPath
from rlhf_t2i.utils.inputs import JsonObject


def eval_command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Run folder, diffusers folder, hub id, network (with --base), or a table's YAML file.")
    ],
    prompts: Annotated[str | None, typer.Option(help="FILE, parti, hpsv2, coco (or NAME:PATH), or emoji64.")] = None,
    metrics: Annotated[
        str, typer.Option(help="Rewards (NAME or LABEL=NAME), diversity, fid, frechet_clip, class_entropy.")
    ] = "clip",
    out: Annotated[
        Path | None,
        typer.Option(
            parser=given_path, metavar="DIR", help="Folder for images and tables [default: evaluations/MODEL]."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METRIC.OPTION=VALUE", help="A reward's own option, e.g. pickscore.model=./dir."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Pipeline that lends a network its text encoders and VAE.")] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE for decoding.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps of a many-step model [default: 50].")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale of a many-step model.")] = 7.5,
    timesteps: Annotated[
        str | None, typer.Option(metavar="T,...", help="A few-step generator's timesteps [default: the model's own].")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels [default: the model's own].")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels [default: the model's own].")] = None,
    seed: Annotated[int, typer.Option(help="Image i depends on the seed and i alone.")] = 0,
    images_per_prompt: Annotated[int, typer.Option(help="2 or more for diversity.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.")] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    features: Annotated[
        str | None, typer.Option(help="CLIP for diversity and frechet_clip [default: CLIP ViT-B/32], or 'vae'.")
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="DIR", help="Folder of real images for fid and frechet_clip."),
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="FILE", help="torch-fidelity's Inception weights for fid."),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="'label a|label b' or a probe's JSON, for class_entropy.")] = None,
    column: Annotated[str, typer.Option(help="Key or column of a jsonl, csv or tsv prompt file.")] = "prompt",
) -> None:
    """Draw with fixed seeds, score, and print means with intervals. Run it again to continue after a kill."""
    if model.lower().endswith((".yaml", ".yml")):
        given = (name for name in context.params if _is_given(context, name))
        _table(Path(model), out, limit, [name for name in given if name not in ("model", "out", "limit")])
        return
    if prompts is None:
        raise UsageError("--prompts is missing: a file, parti, hpsv2, coco or emoji64")
    from rlhf_t2i.evaluation import settings as settings_module
    from rlhf_t2i.recipe import reading
    from rlhf_t2i.utils import files

    fields = settings_module.Settings.model_fields
    values: dict[str, object] = {
        **{name: value for name, value in context.params.items() if name in fields and value is not None},
        "metrics": [name.strip() for name in metrics.split(",") if name.strip()], "options": metric_options(set_ or []),
        "real": str(real) if real else None, "inception": str(inception) if inception else None,
    }  # fmt: skip
    if timesteps is not None:
        values["student"] = {"timesteps": reading.parse_value(f"[{timesteps}]", "--timesteps")}
    settings = settings_module.build(values, _option)
    # Resolved: of ".." the name is "..", and evaluations/.. is the working folder.
    folder = out or Path("evaluations") / (files.expanded(settings.model).resolve().name or "model")

    from rlhf_t2i.evaluation.run import evaluate
    from rlhf_t2i.tools.progress import phases
    from rlhf_t2i.utils.terminal import printable

    with phases() as progress:
        results = evaluate(settings, folder, progress)
    for note in results.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(printable(results.markdown()))
    typer.echo(f"Images and per-image scores: {folder / 'results.json'}")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _table(file: Path, out: Path | None, limit: int | None, others: list[str]) -> None:
    """Measure every model of a table."""
    from rlhf_t2i.tools import model_table
    from rlhf_t2i.tools.progress import phases

    if others:
        option = others[0].rstrip("_").replace("_", "-")
        raise UsageError(f"--{option} is for one model; of a table, change {file} (--out and --limit are taken)")
    table, settings = model_table.load(file, limit)
    folder = out or Path("evaluations") / (file.stem if limit is None else f"{file.stem}-{limit}")
    with phases() as progress:
        text = model_table.run(table, settings, folder, progress)
    typer.echo(text)
    typer.echo(f"Images and scores of every row: {folder}")


def _option(key: KeyPath) -> str:
    """The option that sets a field."""
    return "--timesteps" if key[:1] == ("student",) else f"--{str(key[0]).replace('_', '-')}"


def metric_options(texts: list[str]) -> dict[str, JsonObject]:
    """Settings ``metric.option=value``, values in YAML.

    Raises:
        UsageError: Not of that form.
    """
    from rlhf_t2i.recipe.reading import Override

    options: dict[str, JsonObject] = {}
    for text in texts:
        given = Override.parse(text, form=(form := "metric.option=value"))
        metric, _, option = given.key.rpartition(".")
        if not metric:
            raise UsageError(f"{given.place}: write it as {form}")
        options.setdefault(metric, {})[option] = given.value
    return options
