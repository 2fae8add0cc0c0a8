"""``rlhf-t2i families check``: does a model family call a model as diffusers' own pipeline does?

The pipeline's ``__call__`` is the oracle. It draws three guided steps while every call of the network is recorded; the
family must make the same calls, and its x0-prediction, its guidance and its decoder must lead to the same latents and
images. The exported generator is then drawn by a plain pipeline call in one and in four steps.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import FlowSchedule, VPSchedule
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Conditioning, Family
from rlhf_t2i.families.export import write_model
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import StudentSettings
from rlhf_t2i.tools.findings import CheckFailed, CheckSkipped, Finding, run_checks
from rlhf_t2i.utils.quiet import quietly

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

PROMPT = "a red apple on a wooden table"
_STEPS, _GUIDANCE, _SEED = 3, 3.0, 5
_TOLERANCE = 1e-5
_BRANCHES = (("with",), ("without",), ("without", "with"), ("with", "without"))
"""Pipelines call the network once with both branches of guidance, in either order, or once for each."""


def check_family(
    model: str, device: torch.device, height: int | None = None, width: int | None = None
) -> list[Finding]:
    """Run every check on a model in float32.

    Args:
        model: A diffusers folder or hub id.
        device: Where to run.
        height: Of the images; the model's own when None.
        width: Of the images; the model's own when None.

    Raises:
        UsageError: The model is of no known family, or damaged.
    """
    models = reading.models("MODEL", reference=model, generator=model, height=height, width=width)
    checker = _Checker(ModelStore(models, StudentSettings(), device))
    checker.store.check()
    checks: list[tuple[str, Callable[[], str]]] = [
        ("family", checker.family),
        ("prediction", checker.prediction),
        ("latents", checker.latents),
        ("network calls", checker.network_calls),
        ("guided x0", checker.guided_x0),
        ("decoded image", checker.decoded_image),
        ("one step, exported", lambda: checker.exported(1)),
        ("four steps, exported", lambda: checker.exported(4)),
        ("gradient", checker.gradient),
        ("adapters", checker.adapters),
        ("checkpointing", checker.checkpointing),
    ]
    with quietly():
        checker.load()
        return run_checks(checks)


@dataclass
class _Call:
    """One call of the network: its arguments by name, and its raw output."""

    arguments: Mapping[str, object]
    output: Tensor


@dataclass
class _Recording:
    """What the pipeline did: every network call, the final latents and the image."""

    calls: list[_Call] = field(default_factory=list)
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    image: Tensor = field(default_factory=lambda: torch.empty(0))


class _Recorder(nn.Module):
    """Stands in for a network: keeps the arguments it is called with and returns a given output."""

    def __init__(self, network: nn.Module, output: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self._signature, self._output = inspect.signature(network.forward), output
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype))
        self.arguments: Mapping[str, object] = {}

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor]:
        self.arguments = self._signature.bind(*args, **kwargs).arguments
        return (self._output,)


class _Checker:
    def __init__(self, store: ModelStore) -> None:
        self.store = store

    def load(self) -> None:
        """Read all weights: damaged ones are refused, instead of failing every check."""
        _ = self.own_network, self.store.decoder, self.store.conditioner
        with suppress(CheckSkipped):
            _ = self.pipeline

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline of the reference, with a scheduler whose last step lands on the guided x0."""
        import diffusers

        pipeline = self._load(self.store.family.reference)
        config, own = pipeline.scheduler.config, self.store.family.sampler_for_check()
        if own is not None:
            pipeline.scheduler = own
        elif isinstance(self.store.schedule, FlowSchedule):
            pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        else:  # other spacings visit timesteps between two whole ones
            pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
        return pipeline.to(self.store.device)

    def _load(self, source: ModelRef) -> DiffusionPipeline:
        family = self.store.family
        if type(family).load_pipeline is Family.load_pipeline:
            raise CheckSkipped(f"the family {family.name} has no pipeline to compare with")
        return family.load_pipeline(source, torch.float32)

    @cached_property
    def network(self) -> nn.Module:
        return getattr(self.pipeline, self.store.family.network_part)

    @cached_property
    def own_network(self) -> nn.Module:
        """The network as the family loads it."""
        return self.store.family.load_network().to(self.store.device)

    @cached_property
    def recording(self) -> _Recording:
        """Three guided steps of the pipeline."""
        found, signature = _Recording(), inspect.signature(self.network.forward)

        def record(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Sequence[Tensor]) -> None:
            found.calls.append(_Call(signature.bind(*args, **kwargs).arguments, output[0]))

        def record_step(result: Sequence[Tensor]) -> Sequence[Tensor]:
            found.latents = result[0]
            return result

        height, width = self.store.size
        hook = self.network.register_forward_hook(record, with_kwargs=True)
        with _stepping(self.pipeline.scheduler, record_step):
            found.image = self.pipeline(
                prompt=PROMPT, num_inference_steps=_STEPS, height=height, width=width, generator=_generator(),
                output_type="pt", **self.store.family.guided_call(_STEPS, _GUIDANCE),
            ).images  # fmt: skip
        hook.remove()
        return found

    def family(self) -> str:
        family, pipeline = self.store.family, self.store.family.index.get("_class_name")
        count = sum(p.numel() for p in family.build_network().parameters())
        return f"{family.name}: {pipeline}, network of {count:,} parameters"

    def prediction(self) -> str:
        schedule = self.store.schedule
        if isinstance(schedule, VPSchedule):
            return f"{schedule.prediction_type}, variance preserving, {len(schedule)} timesteps"
        if isinstance(schedule, FlowSchedule):
            value = "eps - x0" if schedule.sign == 1 else "x0 - eps"
            return f"{value}, flow matching, shift {schedule.shift:g}, time as {schedule.time}"
        return type(schedule).__name__

    def latents(self) -> str:
        height, width = self.store.size
        return f"{' x '.join(map(str, self.store.latent_shape))} for {height} x {width} pixels"

    def network_calls(self) -> str:
        """The family's call for the same x_t, time and prompts has the recorded arguments."""
        worst = max(self._match(call)[0] for call in self.recording.calls)
        if worst > _TOLERANCE:
            raise CheckFailed(f"the arguments differ by {worst:.1g}")
        return f"{len(self.recording.calls)} calls, arguments within {worst:.1g} of the pipeline's"

    def guided_x0(self) -> str:
        """The last step of an Euler sampler ends at the guided x0-prediction."""
        predictions: dict[str, Tensor] = {}
        per_step = len(self.recording.calls) // _STEPS
        for call in self.recording.calls[-per_step:]:
            _, branches = self._match(call)
            parts = self._replay(call, branches)[1].chunk(len(branches))
            predictions |= dict(zip(branches, parts, strict=True))
        x_t, t = (value[:1] for value in self._state(self.recording.calls[-1]))
        expected = self._unpacked(self.recording.latents)

        def error(raw: Tensor) -> float:
            return float((self.store.schedule.to_x0(raw, x_t, t) - expected).abs().max())

        family, conditional = self.store.family, predictions["with"]
        if family.guides:
            scales = {"guidance convention omega": _GUIDANCE, "guidance convention one_plus": 1 + _GUIDANCE}
            errors = {
                name: error(family.pipeline_guidance(conditional, predictions["without"], scale))
                for name, scale in scales.items()
            }
        else:
            errors = {"which is not guided": error(conditional)}
        convention = min(errors, key=lambda name: errors[name])
        if errors[convention] > _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise CheckFailed(f"{errors[convention]:.2g} away from the last step's latents")
        return f"within {errors[convention]:.1g} of the last step's latents, {convention}"

    def _match(self, call: _Call) -> tuple[float, tuple[str, ...]]:
        """How far the family's call is from a recorded one, and the branches of guidance that it holds, in order."""
        problems = []
        found: list[tuple[float, tuple[str, ...]]] = []
        for branches in _BRANCHES:
            if len(self._state(call)[0]) != len(branches):
                continue
            try:
                found.append((self._replay(call, branches)[0], branches))
            except CheckFailed as error:
                problems.append(error)
        if not found:
            raise problems[0]
        return min(found)

    def _replay(self, call: _Call, branches: tuple[str, ...]) -> tuple[float, Tensor]:
        """Make the family's call: its distance from the recorded arguments, and the raw output it reads."""
        encoder = self.store.conditioner
        parts = {"with": lambda: encoder.encode([PROMPT]), "without": lambda: encoder.unconditional(1)}
        x_t, t = self._state(call)
        recorder = _Recorder(self.network, call.output, x_t.dtype)
        raw = self.store.predict(recorder, x_t, t, Conditioning.cat([parts[name]() for name in branches]))
        return _difference(call.arguments, recorder.arguments, "the network's arguments"), raw

    def decoded_image(self) -> str:
        latents = self._unpacked(self.recording.latents)
        return _close(self.store.decoder.decode(latents), self.recording.image, "the pipeline's image")

    def exported(self, steps: int) -> str:
        """A plain pipeline call on the exported folder draws what the student draws."""
        store = ModelStore(self.store.models, StudentSettings(steps=steps), self.store.device)
        network = self.network.eval()
        with torch.no_grad():
            ours = self.store.decoder.decode(store.generate(network, [PROMPT], store.sequential_noise([_generator()])))
        with TemporaryDirectory() as folder:
            write_model(store, network.state_dict(), Path(folder) / "model")
            pipeline = self._load(sources.parse(str(Path(folder) / "model")))
            height, width = store.size
            generator = _generator()
            with _stepping(pipeline.scheduler, lambda result: result, generator):
                theirs = pipeline.to(store.device)(
                    prompt=PROMPT, num_inference_steps=steps, generator=generator, output_type="pt", height=height,
                    width=width, **store.family.plain_call(steps),
                ).images  # fmt: skip
        return _close(ours, theirs, "the plain pipeline's image", 10 * _TOLERANCE)

    def gradient(self) -> str:
        """The directional derivative of D in float64 against central differences."""
        store, network = self.store, self.store.family.load_network().to(self.store.device, torch.float64)
        generator = torch.Generator().manual_seed(1)
        x_t, direction = (
            torch.randn(1, *store.latent_shape, generator=generator, dtype=torch.float64).to(store.device)
            for _ in range(2)
        )
        t, cond = torch.tensor([500.0]), _double(store.conditioner.encode([PROMPT]))
        time = store.schedule.network_time(t).to(store.device)

        def predict(x: Tensor) -> Tensor:
            return (store.schedule.to_x0(store.family.predict(network, x, time, cond), x, t) * direction).sum()

        leaf = x_t.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(predict(leaf), leaf)
        expected = float((slope * direction).sum())
        with torch.no_grad():
            errors = [
                abs(float(predict(x_t + h * direction) - predict(x_t - h * direction)) / (2 * h) - expected)
                for h in (1e-3, 1e-4, 1e-5)
            ]
        if min(errors) > 1e-4 * abs(expected):
            raise CheckFailed(f"off by {min(errors) / abs(expected):.1g} of its size from finite differences")
        return f"agrees with finite differences to {min(errors) / abs(expected):.1g} of its size"

    def adapters(self) -> str:
        names = [name for name, module in self.own_network.named_modules() if isinstance(module, nn.Linear)]
        targets = self.store.family.adapter_targets
        counts = {t: sum(name == t or name.endswith(f".{t}") for name in names) for t in targets}
        missing = [target for target, count in counts.items() if not count]
        if missing:
            raise CheckFailed(f"the network has no linear layer {missing[0]!r}")
        return f"{sum(counts.values())} linear layers: {', '.join(counts)}"

    def checkpointing(self) -> str:
        names = self.store.family.block_names
        blocks = [m for m in self.own_network.modules() if type(m).__name__ in names]
        if not names:
            raise CheckSkipped("the family names no repeated blocks")
        if not blocks:
            raise CheckFailed(f"the network has no block called {' or '.join(names)}")
        self.store.family.enable_checkpointing(self.own_network)
        return f"{len(blocks)} repeated blocks"

    def _state(self, call: _Call) -> tuple[Tensor, Tensor]:
        """x_t [B, C, h, w] and t in thousandths of a recorded call."""
        first = next(iter(call.arguments.values()))
        x_t = torch.stack(list(first)).squeeze(2) if isinstance(first, list) else self._unpacked(first)
        given = call.arguments["timestep"] if "timestep" in call.arguments else call.arguments["t"]
        time = torch.as_tensor(given).double().cpu().reshape(-1)
        schedule = self.store.schedule
        if isinstance(schedule, FlowSchedule):
            time = {"thousandths": time, "sigma": 1000 * time, "one_minus_sigma": 1000 * (1 - time)}[schedule.time]
        elif isinstance(schedule, VPSchedule) and len(schedule) != 1000:
            time = 1000 * (time + 0.5) / len(schedule)
        return x_t, time.expand(len(x_t))

    def _unpacked(self, latents: Tensor) -> Tensor:
        """Latents of the scheduler's layout as [B, C, h, w]."""
        return self.store.family.from_scheduler(latents, *self.store.size)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


@contextmanager
def _stepping(
    scheduler: SchedulerMixin,
    after: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Show ``after`` what a scheduler's steps return, and give them the image's generator: not every pipeline does."""
    step = scheduler.step
    more = {"generator": generator} if generator and "generator" in inspect.signature(step).parameters else {}

    @functools.wraps(step)  # pipelines read its signature
    def replaced(*args: object, **kwargs: object) -> Sequence[Tensor]:
        return after(step(*args, **(kwargs | more)))

    scheduler.step = replaced
    try:
        yield
    finally:
        scheduler.step = step


def _double(cond: Conditioning) -> Conditioning:
    return Conditioning({k: v.double() if v.is_floating_point() else v for k, v in cond.tensors.items()})


def _close(found: Tensor, expected: Tensor, what: str, tolerance: float = _TOLERANCE) -> str:
    if found.shape != expected.shape:
        raise CheckFailed(f"shape {list(found.shape)}, but {what} has {list(expected.shape)}")
    difference = float((found.detach().double().cpu() - expected.detach().double().cpu()).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if not difference <= tolerance * scale:
        raise CheckFailed(f"{difference:.2g} away from {what}")
    return f"within {difference:.1g} of {what}"


def _difference(theirs: object, ours: object, place: str) -> float:
    """The largest difference between two sets of arguments; what one lacks must be None in the other.

    Raises:
        CheckFailed: They differ in structure.
    """
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        ignored = (
            "return_dict", "attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs", "timestep_cond",
        )  # fmt: skip
        keys = [key for key in {**theirs, **ours} if key not in ignored]
        return max((_difference(theirs.get(key), ours.get(key), f"{place}.{key}") for key in keys), default=0.0)
    if isinstance(theirs, list | tuple) and isinstance(ours, list | tuple) and len(theirs) == len(ours):
        return max((_difference(a, b, place) for a, b in zip(theirs, ours, strict=True)), default=0.0)
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        a, b = theirs.detach().double().cpu(), ours.detach().double().cpu()
        if a.numel() != b.numel() and 1 not in (a.numel(), b.numel()):
            raise CheckFailed(f"{place} has shape {list(ours.shape)}, the pipeline's {list(theirs.shape)}")
        return float((a - (b if 1 in (a.numel(), b.numel()) else b.reshape(a.shape))).abs().max())
    if theirs is None and ours is None:
        return 0.0
    if isinstance(theirs, int | float) and isinstance(ours, int | float):
        return abs(theirs - ours)
    raise CheckFailed(f"{place} is {type(ours).__name__}, the pipeline's {type(theirs).__name__}")
