"""``rlhf-t2i init``: a commented recipe for given models, with defaults by their family and size."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.families.export import StudentFile
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.plugins import registry, traits
from rlhf_t2i.recipe import placement, reading
from rlhf_t2i.recipe.schema import Guidance, StudentSettings
from rlhf_t2i.utils import files, targets
from rlhf_t2i.utils.quiet import quietly

_RELATIVE = ("/", "./", "../", "~")


@dataclass(frozen=True)
class Wanted:
    """What the user named.

    Attributes:
        reference: A diffusers folder or a hub id.
        generator: The network to align; the reference when None.
        prompts: The prompts to train on.
        held_out: The prompts of the before/after table, if any.
        rewards: ``NAME`` or ``NAME=MODEL`` each.
        steps: Of the generator; an exported model's own, or 1, when None.
    """

    reference: str
    generator: str | None
    prompts: str
    held_out: str | None
    rewards: tuple[str, ...]
    steps: int | None


@dataclass(frozen=True)
class _Scale:
    """Settings by the size of the network; those of the shipped recipes for networks of that size."""

    parameters: float
    steps: int
    batch: int
    lines: tuple[str, ...]


_SCALES = (
    _Scale(2e8, 140, 16, (
        "  generator: {lr: 5.0e-5, warmup_steps: 10}",
        "  assistant: {lr: 2.0e-4, warmup_steps: 10}",
    )),
    _Scale(3e9, 2000, 128, (
        "  micro_batch: 1                          # images per GPU at once; more are faster where memory allows",
        "  precision: bf16                         # of the computation; trained weights stay in float32",
        "  zero_stage: 2                           # gradients and optimizer states are split over the GPUs",
        "  gradient_checkpointing: true            # false: faster, with several times the memory",
        "  generator: {lr: 1.0e-6, warmup_steps: 500}",
        "  assistant: {lr: 1.0e-6, warmup_steps: 500}",
    )),
    _Scale(float("inf"), 2000, 128, (
        "  micro_batch: 1                          # images per GPU at once; more are faster where memory allows",
        "  precision: bf16                         # of the computation; trained weights stay in float32",
        "  zero_stage: 2                           # gradients and optimizer states are split over the GPUs",
        "  gradient_checkpointing: true            # false: faster, with several times the memory",
        "  # Adapters instead of the whole network: one copy of the base serves all three roles.",
        "  generator: {lr: 1.0e-5, warmup_steps: 100, lora: {rank: 64}}",
        "  assistant: {lr: 1.0e-5, warmup_steps: 100, lora: {rank: 64}}",
    )),
)  # fmt: skip


def write(file: Path, wanted: Wanted) -> None:
    """Write a recipe, after it passed the checks of ``rlhf-t2i run`` that need neither weights nor a network.

    Args:
        file: The recipe; it must not exist.
        wanted: What it is for.

    Raises:
        UsageError: A model, reward or prompt file is wrong, or ``file`` exists.
    """
    empty = next((key for key in ("reference", "generator", "prompts", "held_out") if getattr(wanted, key) == ""), None)
    if empty is not None:
        raise UsageError(f"--{empty.replace('_', '-')} is empty: is a variable not set?")
    if os.path.lexists(file):
        raise UsageError(f"{file} exists: name another FILE")
    targets.check_file(file, "FILE")
    with quietly():
        text = "\n".join(_lines(wanted, file.parent)) + "\n"
    aside = file.with_name(f".checking-{file.name}")
    with files.disk_errors(file):
        try:
            aside.write_text(text, "utf-8")
            _check(aside)
            aside.replace(file)
        except UsageError as error:
            raise UsageError(str(error).replace(aside.name, file.name)) from None
        finally:
            aside.unlink(missing_ok=True)


def _check(file: Path) -> None:
    from rlhf_t2i.training import run_prompts

    recipe = reading.load(file)
    placement.check_placement(recipe)
    traits.resolve(recipe)
    if sources.parse(recipe.models.reference).is_local:
        ModelStore(recipe.models, recipe.student, torch.device("cpu")).check()
    run_prompts.check(recipe)


def _lines(wanted: Wanted, folder: Path) -> Iterator[str]:
    generator = wanted.generator or wanted.reference
    models = reading.models("init", reference=_absolute(wanted.reference), generator=_absolute(generator))
    student = _student(generator, wanted.steps)
    store = ModelStore(models, student, torch.device("cpu"))
    count = sum(weight.numel() for weight in store.family.build_network().parameters())
    scale = next(scale for scale in _SCALES if count < scale.parameters)
    devices = max(torch.cuda.device_count(), 1)
    height, width = store.size
    yield f"# Diff-Instruct* on a model of the family {store.family.name}: {count / 1e6:,.0f} M parameters, {width} x "\
        f"{height} pixels."  # fmt: skip
    yield "# Written by `rlhf-t2i init`. docs/recipes.md has every key; a key that is left out has its default."
    yield "seed: 0"
    yield _noted(f"steps: {scale.steps}", "updates of the generator")
    yield "\nmodels:"
    yield _noted(f"  reference: {_shown(wanted.reference, folder)}", "frozen: the generator is kept near it")
    yield _noted(f"  generator: {_shown(generator, folder)}", "the network to align")
    if wanted.generator is None:
        yield "  # The reference itself is distilled and aligned in one run, which takes far more updates:"
        yield "  # a few-step model distilled from it starts ahead."
    yield from _student_lines(store, student)
    yield "\ndata:"
    yield f"  prompts: {_shown(wanted.prompts, folder)}"
    if wanted.held_out is None:
        yield "  # held_out: ./held_out.txt              # prompts that are not in it, for the table before and after"
    else:
        yield _noted(f"  held_out: {_shown(wanted.held_out, folder)}", "not trained on: for the table before and after")
    yield "\nalgorithm:"
    yield "  divergence: {name: pseudo_huber}        # DI*; kl makes it DI++"
    yield "  rewards:                                # scale: more pulls harder, and at some point spoils the images"
    for reward in wanted.rewards:
        yield f"    - {_reward(reward, folder)}"
    yield "  # eval_rewards:                         # measured, never trained on: they catch reward hacking"
    yield "  #   - {name: clip}"
    yield from _guidance_lines(store)
    yield "\noptimization:"
    batch = scale.batch + -scale.batch % devices
    yield _noted(f"  batch_size: {batch}", "images per update, over all GPUs")
    yield from scale.lines
    yield "\nplacement:"
    yield "  groups:                                 # `rlhf-t2i plan FILE --device h100 --gpus N` finds the fastest"
    yield f"    all: {{devices: {devices}, roles: [learner, generator, assistant, reference, reward]}}"
    yield f"\nlogging: {{samples_every: {max(scale.steps // 8, 10)}, sample_count: 16}}"
    yield f"checkpoints: {{every: {max(scale.steps // 8, 10)}, keep: 1}}"
    yield "evaluation: {images: 256, images_per_prompt: 4, batch_size: 8}"


def _student(generator: str, steps: int | None) -> StudentSettings:
    """The steps that were asked for, or those of an exported model, or one."""
    source = sources.parse(_absolute(generator))
    exported = StudentFile.read(Path(source.location)) if source.is_local and steps is None else None
    if exported is None:
        return StudentSettings(steps=steps or 1)
    return StudentSettings(
        steps=len(exported.timesteps),
        timesteps=list(exported.timesteps),
        transition=exported.transition,
        input=exported.input,
    )


def _student_lines(store: ModelStore, student: StudentSettings) -> Iterator[str]:
    taus = ", ".join(f"{tau:g}" for tau in store.student.timesteps)
    yield "student:                                  # must be what the generator was distilled for"
    if student.timesteps is None:
        yield _noted(f"  steps: {student.steps}", f"called at {taus}, the family's own")
        return
    yield _noted(f"  timesteps: [{taus}]", "as the model was exported")
    yield f"  transition: {student.transition}"
    yield f"  input: {student.input}"


def _guidance_lines(store: ModelStore) -> Iterator[str]:
    """The pipeline's own default; a pipeline without classifier-free guidance has a scale of 1, no guidance."""
    import diffusers

    family, scale, note = store.family, Guidance().guidance_scale, "raise it for sharper images that vary less"
    pipeline = getattr(diffusers, str(family.index.get("_class_name")), None)
    if pipeline is not None:
        parameters = inspect.signature(pipeline.__call__).parameters
        own = parameters.get("true_cfg_scale", parameters.get("guidance_scale"))
        if own is not None and own.default is not None:
            scale, note = float(own.default), f"{pipeline.__name__}'s own"
    if not family.guides:
        scale, note = 1.0, "none: the pipeline has no classifier-free guidance"
    convention = "" if family.convention == "omega" else f", convention: {family.convention}"
    yield _noted(f"  cfg: {{mode: inner, guidance_scale: {scale}{convention}}}", note)


def _reward(text: str, folder: Path) -> str:
    """``NAME=MODEL`` as an entry of ``algorithm.rewards``.

    The scale is 200 over the width of the reward's range: 100 for a cosine, as the paper has it, and as much pull of
    the whole range for another unit; 1 where the range has no end.
    """
    name, _, model = text.partition("=")
    options = {"model": _absolute(model)} if model else {}
    cls = registry.load_class(registry.REWARDS, name)
    registry.parse_options(cls, f"--reward {name}", options)
    low, high = cls.value_range
    scale = float(f"{200 / (high - low):.1g}") if 0 < high - low < float("inf") else 1.0
    shown = f", options: {{model: {_shown(model, folder)}}}" if model else ""
    return f"{{name: {_shown(name, folder)}, scale: {scale:g}{shown}}}"


def _noted(line: str, note: str) -> str:
    """A line with its comment in the recipe's column."""
    return f"{line:<40}  # {note}"


def _absolute(text: str) -> str:
    """A path relative to the working directory as an absolute one; a hub id or ``emoji64:NAME`` as it is."""
    return str(files.absolute(text)) if text.startswith(_RELATIVE) or files.expanded(text).exists() else text


def _shown(text: str, folder: Path) -> str:
    """A path as the recipe in ``folder`` writes it, quoted where YAML needs it."""
    absolute = _absolute(text)
    if Path(absolute).is_absolute() and not text.startswith(("/", "~")):
        relative = os.path.relpath(absolute, folder.resolve())
        text = relative if relative.startswith("../") else f"./{relative}"
    return reading.quoted(text)
