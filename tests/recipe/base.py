"""A recipe that sets every key, as text, and ways to spoil it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import yaml

from rlhf_t2i.recipe import schema

BASE = """\
seed: 1
steps: 10
models:
  reference: ./reference
  generator: org/generator@abc
  assistant: ./assistant
  vae: ./vae
  height: 64
  width: 64
data:
  prompts: ./prompts.txt
  column: prompt
  held_out: ./held_out.txt
algorithm:
  divergence: {name: pseudo_huber, options: {c_rel: 1.0e-3}}
  weighting: unit_x0
  rewards:
    - {name: pickscore, scale: 100.0, label: pick, micro_batch: 4, timeout_s: 10.0, options: {model: ./pickscore}}
  eval_rewards:
    - {name: clip, options: {model: ./clip}}
  cfg: {mode: inner, guidance_scale: 7.5, convention: omega}
  assistant_steps: 2
  assistant_warmup: 3
  timesteps: {generator: [20, 979], assistant: [0, 999]}
optimization:
  batch_size: 8
  micro_batch: 2
  precision: bf16
  zero_stage: 2
  offload_optimizer: false
  gradient_checkpointing: true
  generator: {lr: 1e-6, betas: [0.0, 0.999], eps: 1e-8, weight_decay: 0.0, warmup_steps: 5, max_grad_norm: 10.0}
  assistant: {lr: 2e-6}
  ema: {half_life_kimg: 50.0, rampup: 0.05}
placement:
  mode: ray
  groups:
    train: {devices: 2, roles: [learner, generator], threads: 1}
    score: {devices: 1, roles: [assistant, reference]}
    judge: {devices: 2, roles: ["reward:pick", "reward:clip"]}
logging: {samples_every: 5, sample_count: 4, trackers: [tensorboard]}
checkpoints: {every: 5, keep: 2}
evaluation: {images: 8, images_per_prompt: 2, batch_size: 4}
"""

Path = tuple[str | int, ...]

# Wrong for every scalar key of that kind. 1e400 is infinity; 10**40 overflows any counter.
WRONG: dict[type, list[Any]] = {
    int: ["many", -7, 2.5, True, None, [], {}, float("inf"), float("nan"), 10**40],
    float: ["fast", None, [], {}, float("inf"), float("nan"), 10**40, True],
    str: [5, 1.5, True, [], {}, "", "x" * 5000],
    bool: ["maybe", 1, None, [], {}],
    list: ["text", 5, {}, None],
    dict: ["text", 5, [], [1, 2]],
}
NULL_IS_FINE = {"height", "width", "assistant", "vae", "held_out", "label", "micro_batch", "ema", "threads"}
NEGATIVE_IS_FINE = {"scale"}


_CLASSES = [name for name, _ in inspect.getmembers(schema, inspect.isclass) if name.endswith(("Settings", "Choice"))]
JARGON = re.compile(
    r"input should|valid (dict|list|string|integer|number|boolean)|instance of|validation|_type|_error|constrained|"
    rf"(list|dict|literal|function)[-\[]|{'|'.join(_CLASSES)}",
    re.IGNORECASE,
)
"""Words of pydantic and names of its types and of the schema's classes: not for a user."""


def parsed() -> dict[str, Any]:
    return yaml.safe_load(BASE.replace("1e-6", "1.0e-6").replace("1e-8", "1.0e-8").replace("2e-6", "2.0e-6"))


def leaves(value: Any, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value of the recipe but plugin options, which plugins validate."""
    if at and at[-1] == "options":
        return
    if at:
        yield at, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from leaves(child, (*at, key))


def put(data: Any, at: Path, value: Any) -> Any:
    """The recipe with one value replaced."""
    if not at:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[at[0]] = put(data[at[0]], at[1:], value)
    return copy


def rename(data: Any, at: Path, key: str) -> Any:
    """The recipe with one key misspelled."""
    if len(at) == 1:
        return {(key if k == at[0] else k): v for k, v in data.items()}
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[at[0]] = rename(data[at[0]], at[1:], key)
    return copy


def wrong_values() -> Iterator[tuple[Path, Any]]:
    """(key, value) pairs that no recipe may hold."""
    for at, value in leaves(parsed()):
        key = next(part for part in reversed(at) if isinstance(part, str))
        for bad in WRONG[type(value)]:
            if bad is None and key in NULL_IS_FINE:
                continue
            # The range of timesteps may be absent, and its ends need not be whole.
            if at[:2] == ("algorithm", "timesteps") and (bad is None if len(at) == 3 else bad == 2.5):
                continue
            if isinstance(bad, int) and bad < 0 and key in NEGATIVE_IS_FINE:
                continue
            if key == "zero_stage" and bad is True:  # equal to 1
                continue
            if key == "placement" and bad == "text":
                continue
            if bad == [] and key in ("rewards", "eval_rewards", "trackers"):
                continue
            if bad == {} and (
                key in ("algorithm", "optimization", "placement", "logging", "checkpoints", "evaluation")
            ):
                continue
            if isinstance(value, float) and isinstance(bad, float) and bad == value:
                continue
            yield at, bad


def misspellings() -> Iterator[tuple[Path, str]]:
    """Every key with a letter doubled, where a dictionary of fixed keys is meant."""
    for at, _ in leaves(parsed()):
        last = at[-1]
        if isinstance(last, str) and at[:-1] != ("placement", "groups"):
            yield at, last[:-1] + last[-2:]
