"""A reward cannot take the name of another measure: one would silently replace the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import settings
from rlhf_t2i.evaluation.held_out import Samples
from rlhf_t2i.evaluation.settings import SPECIAL
from rlhf_t2i.recipe import labels, reading
from rlhf_t2i.training.hacking import DIVERSITY, Measurement


@pytest.mark.parametrize("label", ["latent_distance", "diversity", "reward", "true pickscore"])
@pytest.mark.parametrize("kind", ["rewards", "eval_rewards"])
def test_the_runs_own_measures_are_no_labels(kind: str, label: str, recipe: Path) -> None:
    """Before, the table had the latents' distance in place of the reward's values, and the watch lost the scorer."""
    with pytest.raises(UsageError, match=rf"no reward can be called '{label}', which is a measure of the run"):
        reading.load(recipe, [f"algorithm.{kind}+={{name: clip, label: {label}}}"])


def test_a_file_class_goes_by_its_name(recipe: Path) -> None:
    with pytest.raises(UsageError, match="no reward can be called 'reward'"):
        reading.load(recipe, ["algorithm.eval_rewards+={name: './mine.py:reward'}"])
    assert reading.load(recipe, ["algorithm.eval_rewards+={name: './mine.py:reward', label: mine}"])


def test_the_reserved_names_are_those_that_a_run_writes() -> None:
    assert {DIVERSITY, *(key.removeprefix("watch/") for key in Measurement(1, [0.0], {}).metrics())} < {
        *labels.RUN_MEASURES
    }
    assert "latent_distance" in Samples.metrics.__code__.co_consts


@pytest.mark.parametrize("label", [*SPECIAL, *(key for keys in SPECIAL.values() for key in keys)])
def test_the_keys_of_other_metrics_are_no_labels(label: str, tmp_path: Path) -> None:
    values = {"model": "org/name", "prompts": "p.txt", "metrics": ["diversity", f"{label}=clip"]}
    with pytest.raises(UsageError, match=rf"metrics {label}=clip: {label} is another metric's name|two have one label"):
        settings.build(values | {"images_per_prompt": 2})
