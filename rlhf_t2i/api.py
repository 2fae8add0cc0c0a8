"""The functions of the public API: train, load, evaluate, plan, reward and divergence.

They take what a notebook has: recipes as files or dictionaries, prompts as lists, images as PIL images or tensors.
Torch is imported when a function needs it, so that a wrong recipe is refused at once.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch

    from rlhf_t2i.evaluation.compare import Comparison
    from rlhf_t2i.evaluation.models import ImageModel
    from rlhf_t2i.evaluation.results import Results
    from rlhf_t2i.evaluation.scorer import Scorer
    from rlhf_t2i.plugins.base import Divergence
    from rlhf_t2i.tools.planning.plan import Plan
    from rlhf_t2i.training.callbacks import TrainCallback

RecipeSource = str | Path | Mapping[str, object] | Recipe
"""A recipe's file, its keys as a dictionary, or one that was read already."""


@dataclass(frozen=True)
class TrainResult:
    """Result of :func:`train`.

    Attributes:
        out: The run's folder, absolute.
        table: Trained rewards, unseen scorers and diversity before and after, on the same prompts and noise.
    """

    out: Path
    table: list[Comparison]

    @property
    def model(self) -> Path:
        """The exported diffusers pipeline."""
        return self.out / "model"

    @property
    def report(self) -> Path:
        """The page with curves, images and the table."""
        return self.out / "report.html"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.out / "metrics.jsonl"

    def load(self) -> ImageModel:
        """The aligned generator, as :func:`load` gives it."""
        return load(self.out)


def read_recipe(
    recipe: RecipeSource, overrides: Mapping[str, object] | None = None, keys: Mapping[str, object] | None = None
) -> Recipe:
    """Read and validate a recipe.

    Args:
        recipe: A file, a dictionary or a recipe. Relative paths in a file are relative to its folder, all others to
            the working directory.
        overrides: Values by dotted key, e.g. ``{"algorithm.divergence.name": "kl"}``.
        keys: The same with ``__`` for dots, as keyword arguments need it.

    Raises:
        UsageError: Names the key, its place and the nearest valid key.
    """
    if not isinstance(recipe, str | Path | Mapping | Recipe):
        raise UsageError(f"a recipe is a file, a dictionary or a Recipe, not {type(recipe).__name__}")
    if not isinstance(overrides or {}, Mapping):
        raise UsageError(f"overrides are a dictionary by dotted key, not {type(overrides).__name__}")
    changes = dict(overrides or {}) | {key.replace("__", "."): value for key, value in (keys or {}).items()}
    texts = [f"{key}={_json(value)}" for key, value in changes.items()]
    if isinstance(recipe, str | Path):
        return reading.load(recipe, texts)
    data = recipe.model_dump() if isinstance(recipe, Recipe) else recipe
    return reading.build(json.loads(_json(data)), texts)


def train(
    recipe: RecipeSource,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    allow_recipe_change: bool = False,
    address: str | None = None,
    callback: TrainCallback | None = None,
    command: str = "",
    overrides: Mapping[str, object] | None = None,
    **keys: object,
) -> TrainResult:
    """Align a generator as a recipe says, and write the report.

    Args:
        recipe: See :func:`read_recipe`.
        out: The run's folder; ``runs/RECIPE`` when None. It must not hold a run, unless ``resume``.
        resume: Continue from the newest whole checkpoint in ``out``.
        allow_recipe_change: Resume although the recipe's meaning has changed.
        address: An existing Ray cluster to join.
        callback: Receives the progress; nothing is printed without one.
        command: What started the run, for ``run.json``.
        overrides: Values by dotted key.
        **keys: The same with ``__`` for dots, e.g. ``steps=20, algorithm__divergence__name="kl"``.

    Raises:
        UsageError: The recipe or a file is wrong, or ``out`` is taken; nothing was started.
        RunError: Something failed while running.
        Stopped: A signal arrived; if the run was training, a checkpoint was written.
    """
    loaded = read_recipe(recipe, overrides, keys)
    check_placement(loaded)
    if out is None and not isinstance(recipe, str | Path):
        raise UsageError("a recipe that is no file has no name: give the run's folder, out=...")
    folder = Path(out) if out is not None else Path("runs") / Path(str(recipe)).stem
    _check_free(folder, resume)
    from rlhf_t2i.evaluation import compare
    from rlhf_t2i.tools import report
    from rlhf_t2i.training import run as training
    from rlhf_t2i.training.callbacks import TrainCallback
    from rlhf_t2i.utils import files

    callback = callback or TrainCallback()
    result = training.run(
        loaded, folder, resume=resume, allow_recipe_change=allow_recipe_change, address=address, callback=callback,
        command=command,
    )  # fmt: skip
    callback.on_phase("writing the report")
    with files.disk_errors(result.out):
        report.write_report(result.out)
    return TrainResult(result.out, compare.of_run(result.out))


def _check_free(out: Path, resume: bool) -> None:
    """Refuse a run's folder that holds another run, before torch is imported."""
    try:
        taken = (out / "recipe.yaml").exists()
    except OSError as error:
        raise UsageError(f"--out {out} cannot be used: {error.strerror}") from None
    if taken and not resume:
        raise UsageError(f"{out} already holds a run: continue it with --resume, or choose another --out")


def load(model: str | Path) -> ImageModel:
    """Load a model to draw with: ``load("runs/quickstart").sample(["a red owl"], seed=0)`` gives PIL images.

    Args:
        model: A run's folder, a diffusers folder or a hub id.

    Raises:
        UsageError: The model is missing, damaged or of an unknown family.
    """
    from rlhf_t2i.evaluation import models

    return models.load(str(model))


def evaluate(
    model: str | Path,
    prompts: str | Path | Sequence[str],
    *,
    metrics: Sequence[str] = ("clip",),
    out: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **settings: object,
) -> Results:
    """Draw with fixed seeds, score, and write images and tables. Called again after a kill, it continues.

    Args:
        model: A run's folder, a diffusers folder or a hub id.
        prompts: A file, a benchmark's name (``parti``, ``hpsv2``, ``coco``) or a list of prompts.
        metrics: Rewards (``NAME`` or ``LABEL=NAME``), ``diversity``, ``fid``, ``frechet_clip``, ``class_entropy``.
        out: The evaluation's folder; ``evaluations/MODEL`` when None.
        progress: Called with the phase, and how many of how many images are done.
        **settings: More fields of :class:`rlhf_t2i.evaluation.settings.Settings`: ``images_per_prompt=4``,
            ``options={"pickscore": {"model": "./dir"}}``, ``seed``, ``batch_size`` ...

    Raises:
        UsageError: Bad settings, or ``out`` holds another evaluation.
        RunError: A reward failed, an image is not finite, or the disk is full.
    """
    from rlhf_t2i.evaluation import run as evaluation
    from rlhf_t2i.evaluation import settings as evaluation_settings

    folder = Path(out) if out is not None else Path("evaluations") / (Path(model).name or "model")
    with tempfile.TemporaryDirectory() as temporary:
        if not isinstance(prompts, str | Path):
            file = Path(temporary) / "prompts.jsonl"
            file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), "utf-8")
            prompts, settings = file, {**settings, "column": "prompt"}
        values = {"model": str(model), "prompts": str(prompts), "metrics": list(metrics), **settings}
        built = evaluation_settings.build(values)
        return evaluation.evaluate(built, folder, progress or (lambda phase, done, total: None))


def plan(recipe: RecipeSource, overrides: Mapping[str, object] | None = None, **keys: object) -> Plan:
    """Plan a run without starting it: parameters, memory per process, traffic. Needs no GPU.

    Args:
        recipe: See :func:`read_recipe`.
        overrides: Values by dotted key.
        **keys: The same with ``__`` for dots.

    Raises:
        UsageError: The recipe, its placement or a model is wrong.
    """
    from rlhf_t2i.tools.planning import plan as planning

    return planning.make(read_recipe(recipe, overrides, keys))


def reward(name: str, /, *, device: str | torch.device | None = None, **options: object) -> Scorer:
    """Build a reward: ``reward("pickscore").score(images, prompts)`` takes PIL images or tensors.

    Args:
        name: A registered reward, or ``path/to/file.py:Class``.
        device: Where it runs; the GPU if there is one.
        **options: The reward's own options.

    Raises:
        UsageError: Unknown name or option, a model that cannot be loaded, or a reward of latents.
    """
    from rlhf_t2i.evaluation import scorer

    return scorer.build(name, device, options)


def divergence(name: str, /, **options: object) -> Divergence:
    """Build a divergence: ``divergence("pseudo_huber", c=0.1)``.

    Args:
        name: A registered divergence, or ``path/to/file.py:Class``.
        **options: The divergence's own options.

    Raises:
        UsageError: Unknown name or option.
    """
    from rlhf_t2i.plugins import registry

    return registry.divergence(name, **options)


def _json(value: object) -> str:
    """A value in JSON, which is YAML, too; paths as strings, tuples as lists."""
    return json.dumps(value, default=str, ensure_ascii=False)
