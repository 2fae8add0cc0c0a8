"""The functions of the public API: train, load, evaluate, plan, reward and divergence.

They take what a notebook has: recipes as files or dictionaries, prompts as lists, images as PIL images or tensors.
Torch is imported when a function needs it, so that a wrong recipe is refused at once.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_t2i.errors import UsageError, given_in
from rlhf_t2i.recipe import mistakes, reading
from rlhf_t2i.recipe.reading import Override
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.utils import files, versions

if TYPE_CHECKING:
    import torch

    from rlhf_t2i.evaluation.compare import Comparison
    from rlhf_t2i.evaluation.models import ImageModel
    from rlhf_t2i.evaluation.results import Results
    from rlhf_t2i.evaluation.run import Progress
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
    changes = [_override(key, value, f"overrides[{key!r}]={{}}") for key, value in (overrides or {}).items()]
    changes += [_override(key.replace("__", "."), value, f"{key}={{}}") for key, value in (keys or {}).items()]
    if isinstance(recipe, str | Path):
        return reading.load(recipe, changes)
    if isinstance(recipe, Recipe):
        return reading.build(recipe.model_dump(), changes) if changes else recipe
    return reading.build(json.loads(_json(recipe)), changes)


def train(
    recipe: RecipeSource,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    allow_recipe_change: bool = False,
    address: str | None = None,
    callback: TrainCallback | None = None,
    progress: bool = True,
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
        callback: Receives the progress, in place of what is printed.
        progress: Print the progress on standard error: a bar in a terminal or a notebook, every ten seconds a line
            elsewhere.
        overrides: Values by dotted key.
        **keys: The same with ``__`` for dots, e.g. ``steps=20, algorithm__divergence__name="kl"``.

    Raises:
        UsageError: The recipe or a file is wrong, or ``out`` is taken; nothing was started.
        RunError: Something failed while running.
        Stopped: A signal arrived; if the run was training, a checkpoint was written.
    """
    with _python_call():
        loaded = read_recipe(recipe, overrides, keys)
        if out is None and not isinstance(recipe, str | Path):
            raise UsageError("a recipe that is no file has no name: give the run's folder, out=...")
        folder = files.given(out) if out is not None else Path("runs") / Path(str(recipe)).stem
        from rlhf_t2i.tools import progress as printed
        from rlhf_t2i.tools import train as training
        from rlhf_t2i.training.callbacks import TrainCallback

        quiet = callback is not None or not progress
        with nullcontext(callback or TrainCallback()) if quiet else printed.TrainProgress(loaded.steps) as shown:
            result = training.train(
                loaded, folder, resume=resume, allow_recipe_change=allow_recipe_change, address=address, callback=shown
            )
    from rlhf_t2i.evaluation import compare

    return TrainResult(result.out, compare.of_run(result.out / "evaluation").rows)


def load(model: str | Path) -> ImageModel:
    """Load a model to draw with: ``load("runs/quickstart").sample(["a red owl"], seed=0)`` gives PIL images.

    Args:
        model: A run's folder, a diffusers folder or a hub id.

    Raises:
        UsageError: The model is missing, damaged or of an unknown family.
    """
    from rlhf_t2i.evaluation import models

    with _python_call():
        return models.load(str(model))


def evaluate(
    model: str | Path,
    prompts: str | Path | Sequence[str],
    *,
    metrics: Sequence[str] = ("clip",),
    out: str | Path | None = None,
    progress: bool | Progress = True,
    **settings: object,
) -> Results:
    """Draw with fixed seeds, score, and write images and tables. Called again after a kill, it continues.

    Args:
        model: A run's folder, a diffusers folder or a hub id.
        prompts: A file, a benchmark's name (``parti``, ``hpsv2``, ``coco``) or a list of prompts.
        metrics: Rewards (``NAME`` or ``LABEL=NAME``), ``diversity``, ``fid``, ``frechet_clip``, ``class_entropy``.
        out: The evaluation's folder; ``evaluations/MODEL`` when None.
        progress: Print the progress on standard error; or a function that is called with the phase, and how many of
            how many images are done.
        **settings: More fields of :class:`rlhf_t2i.evaluation.settings.Settings`: ``images_per_prompt=4``,
            ``options={"pickscore": {"model": "./dir"}}``, ``seed``, ``batch_size`` ...

    Raises:
        UsageError: Bad settings, or ``out`` holds another evaluation.
        RunError: A reward failed, an image is not finite, or the disk is full.
    """
    from rlhf_t2i.evaluation import run as evaluation
    from rlhf_t2i.evaluation import settings as evaluation_settings
    from rlhf_t2i.tools import progress as printed

    # Resolved: of ".." the name is "..", and evaluations/.. is the working folder.
    name = files.expanded(str(model)).resolve().name or "model"
    folder = files.given(out) if out is not None else Path("evaluations") / name
    with _python_call(), tempfile.TemporaryDirectory() as temporary:
        values = {"model": str(model), "metrics": [metrics] if isinstance(metrics, str) else metrics, **settings}
        if isinstance(prompts, str | Path):
            values["prompts"] = str(prompts)
        else:
            values |= {"prompts": str(_prompt_file(prompts, Path(temporary))), "column": "prompt"}
        built = evaluation_settings.build(values, "evaluate", "argument")
        if not isinstance(progress, bool):
            return evaluation.evaluate(built, folder, progress)
        with printed.phases(shown=progress) as show:
            return evaluation.evaluate(built, folder, show)


def plan(recipe: RecipeSource, overrides: Mapping[str, object] | None = None, **keys: object) -> Plan:
    """Plan a run without starting it: parameters, memory per process, traffic. Needs no GPU.

    Args:
        recipe: See :func:`read_recipe`.
        overrides: Values by dotted key.
        **keys: The same with ``__`` for dots.

    Raises:
        UsageError: The recipe, its placement, a plugin or a model is wrong, as :func:`train` would say.
    """
    from rlhf_t2i.tools.planning import plan as planning

    with _python_call():
        loaded = read_recipe(recipe, overrides, keys)
        planning.check(loaded)
        return planning.make(loaded)


def reward(name: str, /, *, device: str | torch.device | None = None, **options: object) -> Scorer:
    """Build a reward: ``reward("pickscore").score(images, prompts)`` takes PIL images or tensors.

    Args:
        name: A registered reward, or ``path/to/file.py:Class``.
        device: Where it runs; the GPU if there is one.
        **options: The reward's own options.

    Raises:
        UsageError: Unknown name or option, a model that cannot be loaded, a reward of latents, or a torchvision of
            another release than torch.
    """
    versions.check_torchvision()
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


@contextmanager
def _python_call() -> Iterator[None]:
    """Check the installation, and let errors in the block name arguments of Python functions."""
    versions.check_torchvision()
    with given_in("python"):
        yield


def _override(key: str, value: object, place: str) -> Override:
    if not isinstance(key, str) or not key.removesuffix("+") or not all(key.removesuffix("+").split(".")):
        raise UsageError(
            f"{mistakes.shown(str(key))!r} is no key: write it as 'key.subkey', or 'key+' to add to a list"
        )
    return Override(key, json.loads(_json(value)), place.format(mistakes.kind(value)))


def _prompt_file(prompts: Sequence[str], folder: Path) -> Path:
    """A prompt file of a list."""
    if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise UsageError("prompts are a file, the name of a benchmark, or a list of strings that are not empty")
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), "utf-8")
    return file


def _json(value: object) -> str:
    """A value in JSON, which is YAML, too; paths as strings, tuples as lists."""
    return json.dumps(value, default=str, ensure_ascii=False)
