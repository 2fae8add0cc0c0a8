"""Several models on the same prompt and noise, with scores: what ``rlhf-t2i app`` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import models, scorer
from rlhf_t2i.evaluation.models import ImageModel, StudentModel
from rlhf_t2i.evaluation.scorer import Scorer
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.plugins import registry, traits
from rlhf_t2i.plugins.base import LatentReward
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.mistakes import hint
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.utils import files


@dataclass(frozen=True)
class RewardSpec:
    """A reward that can be computed.

    Attributes:
        name: Registered name, or ``file.py:Class``.
        options: Its own options.
    """

    name: str
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A drawn image and its scores by label."""

    image: Image.Image
    scores: dict[str, float]


@dataclass
class SideBySide:
    """Models and rewards; both are loaded when they are used first, and kept.

    Attributes:
        models: By the name shown. Of a run, the initial generator and the aligned one.
        rewards: By label.
        device: Where everything runs.
        prompts: Of the runs, for a start.
    """

    models: dict[str, ImageModel]
    rewards: dict[str, RewardSpec]
    device: torch.device
    prompts: list[str] = field(default_factory=list)
    _scorers: dict[str, Scorer] = field(default_factory=dict)

    def draw(self, prompt: str, seed: int, rewards: Sequence[str]) -> dict[str, Picture]:
        """One image of each model, all from the same noise.

        Args:
            prompt: Not empty.
            seed: From 0 to 2^62.
            rewards: Labels of :attr:`rewards`.

        Raises:
            UsageError: No prompt, no such seed, an unknown reward, or one that cannot be built.
            RunError: An image is not finite, or a reward failed.
        """
        if not prompt.strip():
            raise UsageError("write a prompt first")
        drawn = {name: model.sample(prompt, seed)[0] for name, model in self.models.items()}
        scores = {label: self._scorer(label).score(list(drawn.values()), prompt).tolist() for label in rewards}
        return {
            name: Picture(image, {label: values[index] for label, values in scores.items()})
            for index, (name, image) in enumerate(drawn.items())
        }

    def _scorer(self, label: str) -> Scorer:
        if label not in self.rewards:
            raise UsageError(f"no such reward: {label!r}; {hint(label, list(self.rewards))}")
        if label not in self._scorers:
            spec = self.rewards[label]
            self._scorers[label] = scorer.build(spec.name, self.device, spec.options)
        return self._scorers[label]


def open_models(
    given: Sequence[str], rewards: Mapping[str, RewardSpec], device: torch.device, precision: str = "fp32"
) -> SideBySide:
    """Find the models; their weights are read when they draw first.

    Args:
        given: Runs' folders, diffusers folders or hub ids.
        rewards: In addition to those of the runs' recipes, by label.
        device: Where everything runs.
        precision: ``fp32`` or ``bf16``, of the models.

    Raises:
        UsageError: A model is missing, damaged or of an unknown family, or a reward is unknown or scores latents.
    """
    found = SideBySide({}, {}, device)
    for text in given:
        folder = files.expanded(text)
        recipe = _recipe(folder)
        name = _free_name(folder.resolve().name if folder.exists() else text, found.models)
        if recipe is None:
            found.models[name] = models.load(text, device, precision)
            continue
        found.models[f"{name}, before"] = StudentModel(ModelStore(recipe.models, recipe.student, device, precision))
        found.models[f"{name}, after"] = models.load(text, device, precision)
        found.rewards |= {label: spec for label, spec in _rewards(recipe).items() if label not in found.rewards}
        found.prompts += _prompts(recipe)
    for label, spec in rewards.items():
        if issubclass(registry.load_class(registry.REWARDS, spec.name), LatentReward):
            raise UsageError(f"--metrics {label}: {spec.name!r} scores latents beside a trained generator, not images")
        found.rewards[label] = spec
    return found


def _recipe(folder: Path) -> Recipe | None:
    """The recipe of a finished run's folder; None of another model."""
    path = folder / "recipe.yaml"
    return reading.load(path) if path.is_file() and not (folder / "model_index.json").is_file() else None


def _rewards(recipe: Recipe) -> dict[str, RewardSpec]:
    choices = {choice.key: choice for choice in [*recipe.algorithm.rewards, *recipe.algorithm.eval_rewards]}
    usable = (reward.key for reward in traits.resolve(recipe).rewards if not reward.on_latents)
    return {key: RewardSpec(choices[key].name, choices[key].options) for key in usable}


def _prompts(recipe: Recipe, count: int = 4) -> list[str]:
    """A few prompts of a run; none where their file is gone."""
    from rlhf_t2i.algorithm import prompts
    from rlhf_t2i.utils.numbers import evenly_spaced

    try:
        every = prompts.read(recipe.data.held_out or recipe.data.prompts, recipe.data.column)
    except UsageError:
        return []
    return [every[position] for position in evenly_spaced(len(every), count)]


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    """The name, with a number if another model has it."""
    names, number = {key.removesuffix(", before").removesuffix(", after") for key in taken}, 2
    while name in names:
        name, number = f"{name.removesuffix(f' {number - 1}')} {number}", number + 1
    return name
