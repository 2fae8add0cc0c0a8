"""A reward whose packages clash with the core's: its own process in its own environment, reached through Ray.

The reward group's process holds an :class:`IsolatedReward`, which looks like any other reward. Its actor runs with
``runtime_env={"py_executable": ...}`` in an overlay that holds the reward's package versions (``Reward.pip``). Between
them go only bytes, shapes and strings: pickled arrays or exceptions would need the same versions on both sides.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import ray
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.autograd.function import FunctionCtx

from rlhf_t2i.cluster.clients import how_it_died
from rlhf_t2i.cluster.connect import same_node
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.plugins import guard, registry
from rlhf_t2i.plugins.base import Reward
from rlhf_t2i.plugins.environments import overlay_python
from rlhf_t2i.recipe.schema import RewardChoice
from rlhf_t2i.roles.reward import freeze
from rlhf_t2i.utils.device import default_device


def start_isolated(choice: RewardChoice, dtype: torch.dtype) -> IsolatedReward:
    """Start a recipe's reward in an environment of its own; see :class:`IsolatedReward`."""
    return IsolatedReward(choice.name, choice.options, dtype, choice.timeout_s)


def pack(tensor: Tensor) -> bytes:
    """A tensor as bytes, which any version of safetensors reads."""
    return save({"tensor": tensor.detach().cpu().contiguous()})


def unpack(data: bytes, device: torch.device) -> Tensor:
    """The tensor of :func:`pack` on a device."""
    return load(data)["tensor"].to(device)


class IsolatedActor:
    """The real reward, in its own environment. It keeps nothing between calls, so Ray may restart it."""

    def __init__(self, name: str, options: dict[str, object], dtype: str, revisions: dict[str, str]) -> None:
        sources.use_revisions(revisions)
        self._name, self._options, self._dtype = name, options, getattr(torch, dtype)
        self._device = default_device()

    def describe(self) -> tuple[str, tuple[float, float]]:
        """Load the reward; its unit and its range of values."""
        return self._reward.unit, self._reward.value_range

    def call(self, images: bytes, prompts: list[str], gradient: bool) -> tuple[bytes | None, bytes | None, str]:
        """Values [B], the gradient at the images, and an error's text where there are none."""
        reward, half = self._reward, self._dtype in (torch.bfloat16, torch.float16)
        pixels = unpack(images, self._device).requires_grad_(gradient)
        autocast = torch.autocast(self._device.type, self._dtype, enabled=half)
        try:
            with torch.set_grad_enabled(gradient), autocast:
                value = reward.score(pixels, prompts)
            if not gradient:
                return pack(value), None, ""
            (grad,) = torch.autograd.grad(value.sum(), pixels)
            return pack(value), pack(grad), ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() would end this process
            return None, None, guard.describe(error, type(reward))

    @cached_property
    def _reward(self) -> Reward:
        return freeze(registry.reward(self._name, **self._options), self._device, self._dtype)


class IsolatedReward(Reward):
    """A reward that runs in another process; its score is differentiable.

    Args:
        name: The reward's name or ``path/to/file.py:Class``.
        options: Its options.
        dtype: Of its weights.
        timeout_s: How long one call may take.

    Raises:
        UsageError: The environment cannot be made, or the options are wrong.
        RunError: The reward cannot be loaded there.
    """

    def __init__(
        self,
        name: str,
        options: dict[str, object],
        dtype: torch.dtype = torch.float32,
        timeout_s: float = 600.0,
    ) -> None:
        super().__init__()
        cls = registry.load_class(registry.REWARDS, name)
        registry.parse_options(cls, f"reward {name!r}", options)
        self.differentiable = cls.differentiable
        self._name, self._timeout_s = name, timeout_s
        python = overlay_python(cls.pip)
        # Shared with this process: passed on instead of asked for from Ray, which would hide all devices.
        names = ("CUDA_VISIBLE_DEVICES", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "HF_HUB_OFFLINE", "HF_HOME")
        passed = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"} | {k: os.environ[k] for k in names if k in os.environ}
        self._actor = (
            ray.remote(IsolatedActor)
            .options(
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=3,
                scheduling_strategy=same_node(),
                runtime_env={"py_executable": str(python), "env_vars": passed},
            )
            .remote(name, options, str(dtype).removeprefix("torch."), sources.revisions())
        )
        with self._errors():
            self.unit, self.value_range = ray.get(self._actor.describe.remote(), timeout=timeout_s)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The real reward's scores [B] of images [B, 3, H, W]; gradients flow."""
        return _Remote.apply(images, self, list(prompts))

    def call(self, images: Tensor, prompts: list[str], gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Values and, if asked, the gradient; safe to repeat."""
        answer = self._actor.call.remote(pack(images), prompts, gradient)
        with self._errors():
            values, grad, problem = ray.get(answer, timeout=self._timeout_s)
        if values is None:
            raise RunError(problem)
        return unpack(values, images.device), None if grad is None else unpack(grad, images.device)

    def close(self) -> None:
        """End the reward's process."""
        ray.kill(self._actor)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what Ray raises while an answer is waited for into this project's own errors."""
        try:
            yield
        except ray.exceptions.GetTimeoutError:
            raise RunError(f"reward {self._name!r} did not answer within {self._timeout_s:g} s") from None
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            kind = UsageError if isinstance(cause, UsageError) else RunError
            raise kind(f"reward {self._name!r}, in its own environment: {cause}") from error
        except ray.exceptions.RayError as error:
            raise RunError(f"reward {self._name!r}: its process ended: {how_it_died(error)}") from error


class _Remote(torch.autograd.Function):
    """Value and gradient come in one call; the backward pass only scales the gradient by each sample's cotangent."""

    @staticmethod
    def forward(ctx: FunctionCtx, images: Tensor, reward: IsolatedReward, prompts: list[str]) -> Tensor:
        wanted = bool(ctx.needs_input_grad[0])
        values, grad = reward.call(images, prompts, wanted)
        if wanted:
            ctx.save_for_backward(grad)
        return values

    @staticmethod
    def backward(ctx: FunctionCtx, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return cotangents[0].to(grad.dtype).reshape(-1, 1, 1, 1) * grad, None, None
