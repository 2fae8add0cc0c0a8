"""The model card of an export: ``README.md`` and a before/after picture, in the hub's format.

A card names hub models by id and local ones by their folder's name: it may be published, so it holds no path.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from PIL import Image

from rlhf_t2i import __version__
from rlhf_t2i.errors import UsageError, printable
from rlhf_t2i.evaluation import compare
from rlhf_t2i.evaluation.compare import Comparison
from rlhf_t2i.evaluation.results import Results, markdown_table
from rlhf_t2i.families import sources
from rlhf_t2i.families.pipeline import PipelineFamily
from rlhf_t2i.families.sources import INDEX, ModelRef
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.utils import images, inputs, numbers

README, PICTURE = "README.md", "before_after.png"
_PAIRS = 4
_PAPERS = "[Diff-Instruct*](https://arxiv.org/abs/2410.20898), [Diff-Instruct++](https://arxiv.org/abs/2410.18881)"
_HUB_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")


def fetch_licenses(store: ModelStore) -> None:
    """Download the model cards of a run's hub models into the hub's cache; one that is out of reach is left out."""
    for _, source in _parts(store):
        if not source.is_local and sources.cached(source, README) is None and _has_card(source):
            with contextlib.suppress(UsageError):
                sources.hub_file(source, README)


def write_card(recipe: Recipe, store: ModelStore, evaluation: Path, folder: Path) -> None:
    """Write ``README.md``, and ``before_after.png`` where there are images of both evaluations.

    Args:
        recipe: The run's.
        store: The run's models.
        evaluation: The folder of the run's ``before`` and ``after``.
        folder: The exported pipeline.
    """
    measured = compare.of_run(evaluation)
    rows, shown = measured.rows, list[str]()
    if measured.before and measured.after and not measured.problem:
        shown = _write_picture(measured.before, measured.after, folder / PICTURE)
    sections = [
        _introduction(recipe, store), _pictures(shown, held_out=recipe.data.held_out is not None), _table(recipe, rows),
        _snippet(store, shown[0] if shown else "a photo of a cat"), _training(recipe), _licenses(recipe, store),
    ]  # fmt: skip
    text = f"---\n{_metadata(recipe, store).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"
    (folder / README).write_text(text, "utf-8")


def stated_license(source: ModelRef) -> str | None:
    """The license that a model's own card states: of a local folder or of the hub's cache. None where none does."""
    if source.is_local:
        folder = Path(source.location)
        inner = not (folder / INDEX).is_file() and (folder.parent / INDEX).is_file()  # a pipeline's network folder
        path: Path | None = (folder.parent if inner else folder) / README
    else:
        path = sources.cached(source, README)
    if path is None:
        return None
    try:
        data = ModelCard(inputs.read_text(path, "model card", inputs.RECIPE), ignore_metadata_errors=True).data
    except Exception:  # absent, or damaged metadata of a foreign card: YAML's and the hub client's own errors
        return None
    license_, name = data.get("license"), data.get("license_name")
    stated = name if license_ == "other" and name else license_
    return stated if isinstance(stated, str) and stated else None


def _has_card(source: ModelRef) -> bool:
    """Whether the hub answers and the repository has a card: one request, while a download retries for 23 s offline."""
    try:
        files = HfApi().model_info(source.location, revision=source.revision, timeout=10).siblings or []
    except Exception:  # offline, unknown, refused: the client's HTTP library, and so the errors, differ by version
        return False
    return any(file.rfilename == README for file in files)


def _parts(store: ModelStore) -> Iterator[tuple[str, ModelRef]]:
    """The models whose weights are in the export."""
    yield "network (before alignment)", sources.parse(store.models.generator)
    yield "text encoders, decoder" if store.vae is None else "text encoders", sources.parse(store.models.reference)
    if store.vae is not None:
        yield "decoder", store.vae


def _metadata(recipe: Recipe, store: ModelStore) -> ModelCardData:
    stated = [stated_license(source) for _, source in _parts(store)]
    bases = [source.location for _, source in _parts(store) if not source.is_local]
    prompts = _HUB_DATASET.match(recipe.data.prompts)
    more: dict[str, Any] = {}
    if all(stated):
        alike = len(set(stated)) == 1
        more = {"license": stated[0]} if alike else {"license": "other", "license_name": "licenses-of-the-parts",
                                                     "license_link": f"{README}#licenses"}  # fmt: skip
    if bases:
        more |= {"base_model": list(dict.fromkeys(bases)), "base_model_relation": "finetune"}
    if prompts:
        more["datasets"] = [prompts[1]]
    tags = ["text-to-image", "rlhf", "diff-instruct-star", "one-step" if store.student.steps == 1 else "few-step"]
    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **more)


def _introduction(recipe: Recipe, store: ModelStore) -> str:
    algorithm = recipe.algorithm
    rewards = ", ".join(reward.key for reward in algorithm.rewards) or "no reward"
    steps, (height, width) = store.student.steps, store.size
    calls = "one network call" if steps == 1 else f"{steps} network calls"
    return (
        f"# An aligned text-to-image generator\n\nDraws {width} x {height} images in {calls}. Aligned with rlhf-t2i "
        f"({_PAPERS}): reward {_code(rewards)}, divergence {_code(_short(algorithm.divergence.name))}, reference "
        f"{_named(sources.parse(store.models.reference))}."
    )


def _pictures(prompts: list[str], held_out: bool) -> str:
    if not prompts:
        return ""
    kind = "not trained on" if held_out else "of the training list"
    listed = "\n".join(f"{number}. {_code(prompt)}" for number, prompt in enumerate(prompts, 1))
    return (
        f"![Before and after]({PICTURE})\n\nAbove before, below after: the same prompts and noise. The prompts are "
        f"{kind}, evenly spaced in their list; none is picked by hand.\n\n{listed}"
    )


def _table(recipe: Recipe, rows: list[Comparison]) -> str:
    if not rows:
        return ""
    lines = [["measure", "before", "after", "change", "standard errors"], ["---"] + 4 * ["---:"]]
    roles = {"train": "trained on", "eval": "never trained on", "diversity": "diversity"}
    for row in rows:
        change = [numbers.signed(row.difference), numbers.signed(row.errors)]
        lines.append([
            f"{row.key} ({', '.join(filter(None, [roles.get(row.kind, row.kind), row.unit]))})",
            numbers.number(row.before), numbers.number(row.after),
            *([f"x {numbers.number(row.ratio, 3)}", ""] if row.kind == "diversity" else change),
        ])  # fmt: skip
    prompts = "prompts that no step trained on" if recipe.data.held_out else "training prompts"
    return f"## Before and after\n\n{rows[0].prompts} {prompts}, the same noise.\n\n{markdown_table(lines)}".rstrip()


def _snippet(store: ModelStore, prompt: str) -> str:
    family, steps = store.generator_family, store.student.steps
    call, absent = family.plain_call(steps), ""
    if isinstance(family, PipelineFamily):
        call |= family.export_scheduler(store.student).arguments
        absent = "".join(f", {name}=None" for name in family.absent_parts)
    height, width = store.size
    if (height, width) != family.native_size():
        call |= {"height": height, "width": width}
    arguments = "".join(f", {name}={value!r}" for name, value in call.items())
    written = printable(json.dumps(prompt, ensure_ascii=False))  # its escapes are Python's, too
    return (
        "## Draw\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        'model = "."  # this folder, or its id on the hub: "org/name"\n'
        f"pipe = DiffusionPipeline.from_pretrained(model{absent})\n"
        f"image = pipe({written}, num_inference_steps={steps}{arguments}).images[0]\n```"
    )


def _training(recipe: Recipe) -> str:
    algorithm, optimizer = recipe.algorithm, recipe.optimization.generator
    weights = "all weights" if optimizer.lora is None else f"LoRA of rank {optimizer.lora.rank}, merged"
    rewards = ", ".join(f"{reward.scale:g} x {reward.key}" for reward in algorithm.rewards) or "none"
    facts = {
        "generator updates": f"{recipe.steps:,} of {recipe.optimization.batch_size} images",
        "rewards": rewards,
        "divergence": _short(algorithm.divergence.name),
        "guidance of the reference": f"{algorithm.cfg.mode}, {algorithm.cfg.guidance_scale:g}",
        "trained": f"{weights}, {recipe.optimization.precision}",
        "learning rate": f"{optimizer.lr:g}",
        "seed": str(recipe.seed),
        "rlhf-t2i": __version__,
    }
    lines = [["key", "value"], ["---", "---"], *([key, value] for key, value in facts.items())]
    return f"## Training\n\n{markdown_table(lines)}".rstrip()


def _licenses(recipe: Recipe, store: ModelStore) -> str:
    lines = [["part", "from", "license"], ["---"] * 3]
    lines += [[what, _named(source), stated_license(source) or "not stated"] for what, source in _parts(store)]
    for reward in traits.resolve(recipe).rewards:
        use = "trained with it" if reward.trains else "measured with it"
        lines.append([f"reward {reward.key}, {use}, not included", _code(_short(reward.name)),
                      reward.plugin.license or "not stated"])  # fmt: skip
    return (
        "## Licenses\n\nThe aligned weights derive from the parts below; use them under all of these licenses.\n\n"
        + markdown_table(lines).rstrip()
    )


def _write_picture(before: Results, after: Results, path: Path) -> list[str]:
    """Write evenly spaced images, before above after; returns their prompts, none where images are missing."""
    groups = [indices[0] for indices in before.members.values()]
    chosen = [groups[position] for position in numbers.evenly_spaced(len(groups), _PAIRS)]
    try:
        files = [[evaluation.folder / evaluation.images[i] for i in chosen] for evaluation in (before, after)]
        pictures = [Image.open(file).convert("RGB") for row in files for file in row]
    except (IndexError, OSError, SyntaxError, ValueError):  # missing or damaged: a picture must not cost the export
        return []
    path.write_bytes(images.png(images.grid(pictures, columns=len(chosen))))
    return [before.prompts[index] for index in chosen]


def _named(source: ModelRef) -> str:
    if source.is_local:
        return f"a local folder, {_code(Path(source.location).name)}"
    revision = f" at `{source.revision[:12]}`" if source.revision else ""
    return f"[{source.location}](https://huggingface.co/{source.location}){revision}"


def _short(name: str) -> str:
    """A plugin's name; of a file the file's name and class."""
    return Path(name).name if ".py:" in name else name


def _code(text: str) -> str:
    """Text that Markdown shows as it is; control characters, and those that turn the direction of text, are escaped."""
    text = printable(" ".join(text.split()))
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"
