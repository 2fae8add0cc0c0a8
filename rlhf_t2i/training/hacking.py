"""Detection of reward hacking: a trained reward rises while an unseen scorer or the diversity falls.

Every ``logging.watch_every`` steps the first ``logging.watch_images`` images of the evaluation are sampled again with
the same prompts and noise, and scored. A signal (an unseen scorer, or diversity within a prompt) is compared with its
highest measurement so far, prompt by prompt, so that differences between prompts cancel. The pull of pseudo-Huber
towards the reference is bounded: above some scale of the reward there is no finite optimum, and nothing else stops the
run (algorithm.md 1.6).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rlhf_t2i.evaluation.compare import KEPT
from rlhf_t2i.evaluation.held_out import Samples
from rlhf_t2i.plugins import traits
from rlhf_t2i.plugins.online import predicted
from rlhf_t2i.recipe import labels
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import history
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.utils import files, stats

RISEN, FALLEN = 3.0, 4.0
"""Standard errors by which the reward must have risen and the signal fallen. With 16 prompts, the reward climbing and
two signals of pure noise, about 1 in 100 runs of 60 measurements warns (simulated)."""
IN_A_ROW = 2
"""Measurements in a row that must agree: the highest of many measurements is partly high by chance."""
PROMPTS = 8
"""Prompts below which nothing is said: standard errors of fewer are too uncertain."""
DIVERSITY = "diversity"


@dataclass(frozen=True)
class Measurement:
    """One value per prompt of everything watched.

    Attributes:
        step: Generator updates done.
        reward: The reward term ``sum_i alpha_i r_i`` [P]; [] where no reward on images is trained.
        signals: By name [P], as they were measured.
    """

    step: int
    reward: list[float]
    signals: dict[str, list[float]]

    def metrics(self) -> dict[str, float]:
        """The means, for metrics.jsonl."""
        named = {f"watch/{name}": values for name, values in self.signals.items()}
        if self.reward:
            named["watch/reward"] = self.reward
        return {name: stats.mean(values).value for name, values in named.items()}

    def upright(self, lower: Collection[str]) -> Measurement:
        """With signals of which higher is better: those of ``lower`` change their sign."""
        signals = {n: [-value for value in values] if n in lower else values for n, values in self.signals.items()}
        return replace(self, signals=signals)


@dataclass
class HackingDetector:
    """Compares every measurement with the best one before it, signal by signal; warns once per occurrence.

    Attributes:
        lower: The signals of which lower is better.
    """

    lower: Collection[str] = ()
    _best: dict[str, Measurement] = field(default_factory=dict)
    _in_a_row: dict[str, int] = field(default_factory=dict)

    def update(self, now: Measurement) -> list[str]:
        """Add the next measurement; returns a warning for each occurrence that it confirms."""
        warnings, now = [], now.upright(self.lower)
        for name, values in now.signals.items():
            best = self._best.setdefault(name, now)
            warning = _fall(name, best, now, "rose" if name in self.lower else "fell")
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if warning else 0
            if warning and self._in_a_row[name] == IN_A_ROW:
                warnings.append(warning)
            height, highest = stats.mean(values).value, stats.mean(best.signals[name]).value
            if height > highest or not math.isfinite(highest):
                self._best[name] = now
        return warnings


def _fall(name: str, then: Measurement, now: Measurement, moved: str) -> str | None:
    """The warning if the reward rose and the signal fell between two measurements, both beyond noise.

    Args:
        name: Of the signal.
        then: The earlier measurement, upright.
        now: The later one.
        moved: What a fall of the upright signal is in its own unit.
    """
    if not now.reward:
        return None  # nothing that is trained can be hacked
    rise = stats.paired(then.reward, now.reward)
    if rise.prompts < PROMPTS or not rise.t_statistic > RISEN:
        return None
    if name == DIVERSITY:
        ratio = stats.ratio(then.signals[name], now.signals[name])
        if not stats.Mean(ratio.value - KEPT, ratio.error, ratio.prompts).t_statistic < -FALLEN:
            return None
        fell = f"diversity within a prompt fell to {ratio.value:.0%} ± {ratio.error:.0%}"
    else:
        change = stats.paired(then.signals[name], now.signals[name])
        if not change.t_statistic < -FALLEN:
            return None
        fell = f"{name}, which no step trains on, {moved} by {-change.value:.3g} ± {change.error:.2g}"
    return (
        f"reward hacking is likely: since step {then.step} the trained reward rose by "
        f"{rise.value:.3g} ± {rise.error:.2g} while {fell} (standard errors over {rise.prompts} prompts); look at "
        f"samples/, lower the rewards' scale or the learning rate, or go back to a checkpoint near step {then.step}"
    )


class HackingMonitor:
    """Measures one run and warns of reward hacking; a resumed run continues from ``evaluation/watch.jsonl``.

    Args:
        path: That file.
        recipe: The recipe: which scores train, and which are only measured.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self._path, self._recipe = path, recipe
        self._detector = self._new_detector()

    def _new_detector(self) -> HackingDetector:
        rewards = traits.resolve(self._recipe).rewards
        return HackingDetector([r.key for r in rewards if not r.trains and not r.higher_is_better])

    def resume(self, state: TrainState) -> None:
        """Load the measurements up to a state; later ones are dropped, because their steps will be repeated.

        Raises:
            UsageError: One of them is damaged.
        """
        self._detector = self._new_detector()
        rows = history.measurements(self._path, state).rows
        files.rewrite_lines(self._path, rows)
        for m in (Measurement(**row) for row in rows):
            self._detector.update(
                Measurement(m.step, _nan(m.reward), {name: _nan(values) for name, values in m.signals.items()})
            )

    def update(self, step: int, samples: Samples) -> tuple[dict[str, float], list[str]]:
        """Record a measurement.

        Returns:
            Its means for metrics.jsonl, and a warning for each occurrence of reward hacking that it confirms.
        """
        measurement = self._measurement(step, samples)
        if measurement is None:
            return {}, []
        files.append_line(self._path, vars(measurement))
        return measurement.metrics(), self._detector.update(measurement)

    def _measurement(self, step: int, samples: Samples) -> Measurement | None:
        """The measurement; None before the first lesson of a reward that learns, which predicts nothing yet.

        Such a reward counts with what it predicts, and its scorer is one of the signals.
        """
        metrics = samples.metrics(self._recipe)
        rewards = self._recipe.algorithm.rewards
        trained = {r.key: np.array(metrics[r.key].by_prompt) for r in rewards if r.key in metrics}
        online = traits.resolve(self._recipe).online
        if any(predicted(key) not in samples.scores for key in online):
            return None
        predictions = {key: samples.by_prompt(predicted(key)) for key in online}
        term = [r.scale * (trained | predictions)[r.key] for r in rewards if r.key in trained]
        signals = {m.key: m.by_prompt for m in metrics.values() if m.kind == "eval"}
        signals |= {f"{labels.SCORER}{key}": metrics[key].by_prompt for key in online}
        signals[DIVERSITY] = metrics["latent_distance"].by_prompt
        return Measurement(step, np.sum(term, axis=0).tolist() if term else [], signals)


def _nan(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
