"""Base classes of plugins: the whole API for authors of rewards and divergences.

A plugin is a class registered under the entry-point group ``rlhf_t2i.rewards`` or ``rlhf_t2i.divergences`` (or named
in a recipe as ``path/to/file.py:Class``). Its ``Options`` are a pydantic model: an unknown option or a wrong type in a
recipe fails before anything starts, with the names of the plugin and the option.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, ParamSpec, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")


class Options(BaseModel):
    """Base class of a plugin's options: immutable; unknown options are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


@dataclass(frozen=True)
class Footprint:
    """A reward's network without weights, for ``rlhf-t2i plan``.

    Attributes:
        weights: Names the weights; rewards of one process with the same ones share them.
        build: Builds, on torch's default device, a module that is called with images [B, 3, H, W] in [0, 1] and gives a
            tensor with a gradient in them. ``plan`` runs it on the meta device, where nothing is computed.
    """

    weights: str
    build: Callable[[], nn.Module]


class Reward(nn.Module):
    """Base class of rewards: scores of images for prompts. Subclass it and define :meth:`score`.

    The framework does the rest: device and dtype, freezing, micro-batching, decoding latents to images, activation
    checkpointing, the gradient with respect to the latents, retries and timeouts. Build the model in ``__init__``
    after ``super().__init__(options)``; submodules are moved to the right device.

    Each sample's score must depend on that sample alone (no batch statistics): then the gradient of the sum is the
    gradient of every score, and one stateless call serves any weighting.
    """

    Options: ClassVar[type[Options]] = Options
    differentiable: bool = True
    """False: the reward can be in ``eval_rewards``, but not in ``rewards``."""
    unit: str = ""
    """Unit of the score for tables and plots, e.g. ``cosine``. See :meth:`unit_of`."""
    value_range: tuple[float, float] = (float("-inf"), float("inf"))
    """Smallest and largest possible score."""
    higher_is_better: ClassVar[bool] = True
    uses_prompt: bool = True
    """False: the score does not depend on the prompt (an aesthetic score)."""
    license: ClassVar[str] = ""
    """License of the published weights."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Import names of packages that the reward needs beyond the core's."""
    pip: ClassVar[tuple[str, ...]] = ()
    """Requirements that conflict with the core's; the reward then runs in an environment of its own."""

    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.options = options if options is not None else self.Options()
        self.unit = self.unit_of(self.options)
        self._text_cache: dict[str, Tensor] = {}

    @classmethod
    def hub_models(cls, options: Any) -> list[str]:
        """Hub ids that the reward may load, whose revisions a run pins; by default all options that are text."""
        return [value for _, value in options if isinstance(value, str)]

    @classmethod
    def preflight(cls, options: Any) -> None:
        """Refuse, before anything heavy starts, what cannot work; by default nothing.

        Raises:
            UsageError: One sentence naming what is missing.
        """

    @classmethod
    def unit_of(cls, options: Any) -> str:
        """The unit of a reward with these options; by default its option ``unit``, else :attr:`unit`."""
        return getattr(options, "unit", "") or cls.unit

    @classmethod
    def compares(cls, options: Any) -> bool:
        """Whether :meth:`score` compares images of a prompt and needs two of each in a call; by default it does not."""
        return False

    @classmethod
    def refuse_prompts(cls, options: Any, prompts: Iterable[str]) -> str | None:
        """Why the first prompt that cannot be scored cannot be; by default every one can.

        A run asks before it starts, with the prompts that it will measure, and train on if the reward trains.
        """
        return None

    @classmethod
    def footprint(cls, options: Any) -> Footprint | None:
        """The network without weights, for ``rlhf-t2i plan``; None if unknown: the plan reports that."""
        return None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images for their prompts.

        Args:
            images: Float [B, 3, H, W] in [0, 1]; gradients flow.
            prompts: B strings.

        Returns:
            Tensor [B], in :attr:`unit`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(images, prompts)")

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Features [B, ...] of prompts. Define it and call :meth:`text_features` in ``score``."""
        raise NotImplementedError(f"{type(self).__name__} must define encode_text(prompts) to use text_features")

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Cached features [B, ...]: :meth:`encode_text`, called once per prompt, without gradient."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._text_cache]
        if self._text_cache and len(self._text_cache) + len(missing) > 65536:
            self._text_cache.clear()
            missing = list(dict.fromkeys(prompts))
        with torch.no_grad():
            for prompt in missing:
                # One at a time: the last bits must not depend on which prompts happened to be cached.
                self._text_cache[prompt] = self.encode_text([prompt])[0]
        return torch.stack([self._text_cache[p] for p in prompts])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Reward:
        # A move to another device or dtype makes cached features stale.
        self._text_cache.clear()
        return super()._apply(fn, recurse)


class LatentContext(Protocol):
    """What a :class:`LatentReward` may use: the frozen reference and the noise of a call.

    A call has one timestep and one noise per sample; repeated requests, and other latent rewards, get the same.
    """

    def sample_timesteps(self, batch: int) -> Tensor:
        """Integer timesteps [B], uniform over the recipe's range, reproducible from the run's seed."""

    def sample_noise(self, like: Tensor) -> Tensor:
        """Standard normal noise with the shape of the latents, reproducible from the run's seed."""

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = a_t x_0 + g_t eps``."""

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(a_t, g_t)``, broadcastable over ``like``."""

    def reference(self, x_t: Tensor, t: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The reference's x0-predictions with and without the prompt, without gradient."""


class LatentReward(Reward):
    """Base class of rewards on latents that may call the reference denoiser (implicit rewards)."""

    reference_calls: ClassVar[int] = 1
    """Calls of :meth:`LatentContext.reference` per :meth:`score_latents`; each makes two predictions."""

    def score_latents(self, latents: Tensor, prompts: Sequence[str], context: LatentContext) -> Tensor:
        """Scores [B] of latents [B, C, h, w]; their gradient in the latents is the reward's gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define score_latents(latents, prompts, context)")


class Divergence:
    """Base class of divergences: a distance ``d(y)`` between two denoisers, and its derivative.

    Both methods get ``delta = D_assistant - D_reference``, x0-predictions [B, ...] in float32 or better, and must
    treat samples independently (algorithm.md 1.6).
    """

    Options: ClassVar[type[Options]] = Options
    needs_vjp: ClassVar[bool] = True
    """True: equation (3.4), differentiated through both denoisers. False: a force like KL's (section 3.1), which needs
    their values alone, so that no vector-Jacobian product is computed."""
    order: ClassVar[int] = 1
    """The homogeneity degree of ``d``: powers of ``a_t / g_t^2`` between x0 space and score space."""
    path_weight: float = 0.0
    """How much of ``d`` itself is added to the loss of (3.4), with its gradient along x_t; set it in ``__init__``.

    0: the gradient of the divergence with the distribution of x_t held fixed (DI*, SIM). 1: the gradient of the whole
    expectation ``E[d(delta)]``, x_t included (algorithm.md 1.4). Only read if :attr:`needs_vjp`; ``value`` must then
    be differentiable."""

    def __init__(self, options: Any = None) -> None:
        self.options = options if options is not None else self.Options()

    def value(self, delta: Tensor) -> Tensor:
        """``d(delta)`` [B], not negative; logged as ``divergence``."""
        raise NotImplementedError(f"{type(self).__name__} must define value(delta)")

    def derivative(self, delta: Tensor) -> Tensor:
        """``d'(delta)``, with the shape of delta; it must be differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define derivative(delta)")


_loaded: ContextVar[dict[object, Any] | None] = ContextVar("models that the rewards built now share", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Share models among the rewards built in this block, those of one role.

    Not among all rewards of a process: another role may have another dtype, which would round the shared weights.
    """
    token = _loaded.set({})
    try:
        yield
    finally:
        _loaded.reset(token)


def shared(loader: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Load a model once per role: rewards that call ``shared(load, path)`` in ``__init__`` get the same object."""
    loaded = _loaded.get()
    if loaded is None:
        return loader(*args, **kwargs)
    key = (loader, args, tuple(kwargs.items()))
    if key not in loaded:
        loaded[key] = loader(*args, **kwargs)
    return loaded[key]
