"""A reward whose packages clash with the core's: its own process in its own environment, reached through Ray.

The reward group's process holds an :class:`IsolatedReward`, which looks like any other reward. Its actor runs with
``runtime_env={"py_executable": ...}`` in an overlay that holds the reward's package versions (``Reward.pip``). Between
them go only bytes, shapes and strings: pickled arrays or exceptions would need the same versions on both sides.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor

from rlhf_t2i.cluster.connect import same_node
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.plugins import guard, registry
from rlhf_t2i.plugins.base import Reward
from rlhf_t2i.plugins.environments import overlay_python
from rlhf_t2i.recipe.schema import RewardChoice
from rlhf_t2i.utils.device import default_device


def start_isolated(choice: RewardChoice, dtype: torch.dtype) -> IsolatedReward:
    """Start a recipe's reward in an environment of its own; see :class:`IsolatedReward`."""
    return IsolatedReward(choice.name, choice.options, dtype, choice.timeout_s)


@dataclass(frozen=True)
class Wire:
    """A tensor as bytes."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def pack(cls, tensor: Tensor) -> Wire:
        """Copy a tensor's values."""
        cpu = tensor.detach().cpu().contiguous()
        # A byte view, because numpy has no bfloat16.
        return cls(cpu.view(torch.uint8).numpy().tobytes(), tuple(cpu.shape), str(cpu.dtype).removeprefix("torch."))

    def unpack(self, device: torch.device) -> Tensor:
        """The tensor on a device."""
        flat = torch.frombuffer(bytearray(self.data), dtype=getattr(torch, self.dtype))
        return flat.reshape(self.shape).to(device)


class IsolatedActor:
    """The real reward, in its own environment. It keeps nothing between calls, so Ray may restart it."""

    def __init__(self, name: str, options: dict[str, Any], dtype: str, revisions: dict[str, str]) -> None:
        sources.use_revisions(revisions)
        self._arguments = (name, options, dtype)
        self._reward: Any = None

    def describe(self) -> dict[str, Any]:
        """Load the reward; what its class and options say about it."""
        reward = self._loaded()
        return {"unit": reward.unit, "value_range": reward.value_range}

    def call(self, images: Wire, prompts: list[str], gradient: bool) -> tuple[Wire | None, Wire | None, str]:
        """Values [B], the gradient at the images, and an error's text where there are none."""
        reward = self._loaded()
        device = default_device()
        pixels = images.unpack(device).requires_grad_(gradient)
        half = getattr(torch, self._arguments[2]) in (torch.bfloat16, torch.float16)
        try:
            with (
                torch.set_grad_enabled(gradient),
                torch.autocast(device.type, getattr(torch, self._arguments[2]), enabled=half),
            ):
                value = reward.score(pixels, prompts)
            if not gradient:
                return Wire.pack(value), None, ""
            (grad,) = torch.autograd.grad(value.sum(), pixels)
            return Wire.pack(value), Wire.pack(grad), ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() would end this process
            return None, None, guard.describe(error, type(reward))

    def _loaded(self) -> Any:
        if self._reward is None:
            name, options, dtype = self._arguments
            device = default_device()
            reward = registry.reward(name, **options)
            self._reward = reward.eval().requires_grad_(False).to(device, getattr(torch, dtype))
        return self._reward


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
        options: dict[str, Any],
        dtype: torch.dtype = torch.float32,
        timeout_s: float = 600.0,
    ) -> None:
        super().__init__()
        cls: Any = registry.load_class(registry.REWARDS, name)
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
        told = self._get(self._actor.describe.remote())
        self.unit, self.value_range = told["unit"], told["value_range"]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The real reward's scores [B] of images [B, 3, H, W]; gradients flow."""
        return _Remote.apply(images, self, list(prompts))

    def call(self, images: Tensor, prompts: list[str], gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Values and, if asked, the gradient; safe to repeat."""
        values, grad, problem = self._get(self._actor.call.remote(Wire.pack(images), prompts, gradient))
        if values is None:
            raise RunError(problem)
        return values.unpack(images.device), None if grad is None else grad.unpack(images.device)

    def close(self) -> None:
        """End the reward's process."""
        ray.kill(self._actor)

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise RunError(f"reward {self._name!r} did not answer within {self._timeout_s:g} s") from None
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            kind = UsageError if isinstance(cause, UsageError) else RunError
            raise kind(f"reward {self._name!r}, in its own environment: {cause}") from error
        except ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"reward {self._name!r}: its process ended: {reason}") from error


class _Remote(torch.autograd.Function):
    """Value and gradient come in one call; the backward pass only scales the gradient by each sample's cotangent."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, reward: IsolatedReward, prompts: list[str]) -> Tensor:
        wanted = bool(ctx.needs_input_grad[0])
        values, grad = reward.call(images, prompts, wanted)
        if wanted:
            ctx.save_for_backward(grad)
        return values

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return cotangents[0].to(grad.dtype).reshape(-1, 1, 1, 1) * grad, None, None
