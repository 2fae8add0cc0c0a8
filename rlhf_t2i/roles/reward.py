"""The reward role: one stateless value-and-gradient call on latents, for any number of rewards. No Ray in here.

Latents are decoded once for all rewards. Each reward's gradient is taken at the decoded images first, so that its own
activations are gone before the decoder's backward pass starts, and then pulled back to the latents. Every call can be
repeated: nothing is kept between calls but cached text features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.recomputing import checkpoint_layers
from rlhf_t2i.plugins import guard
from rlhf_t2i.plugins.base import LatentContext, LatentReward, Reward
from rlhf_t2i.roles.dispatch import batched
from rlhf_t2i.roles.reward_failure import RewardFailure, save_sample
from rlhf_t2i.utils.images import to_8_bits

ValueAndGrad = tuple[Tensor, Tensor]


class Decoder(Protocol):
    """The VAE: latents [B, C, h, w] to images [B, 3, H, W] in [0, 1], clamped; gradients flow."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1]."""


class RewardRole:
    """Rewards and the decoder of one process.

    Args:
        rewards: By label. They are frozen, put into eval mode and moved to ``device`` and ``dtype`` here.
        vae: None where all rewards are latent ones.
        device: Where the rewards live; results return to the device of the request.
        dtype: Of the rewards' weights and activations; values and gradients come back in float32 or better.
        micro_batch: Images a call of ``score`` sees; the whole request when None. Or one number a label.
        failures_dir: Where a failing sample is saved; nothing is saved when None.
        activation_checkpointing: Recompute the layers of rewards and decoder in the backward pass: less memory, about
            a third more time.
        trained: Labels of the rewards that train; all when None. The others are only measured.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        vae: Decoder | None,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        micro_batch: int | Mapping[str, int | None] | None = None,
        failures_dir: Path | None = None,
        activation_checkpointing: bool = False,
        trained: Sequence[str] | None = None,
    ) -> None:
        self._trained = list(rewards if trained is None else trained)
        self.rewards = {label: freeze(reward, device, dtype) for label, reward in rewards.items()}
        self.device, self.dtype, self.failures_dir = device, dtype, failures_dir
        self._vae, self._micro_batch = vae, micro_batch
        if activation_checkpointing:
            for module in [*self.rewards.values(), *([vae] if isinstance(vae, nn.Module) else [])]:
                checkpoint_layers(module)

    @batched("latents", "prompts", concurrent=True, timeout="reward")
    def value_and_grad(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        names: Sequence[str] | None = None,
        context: LatentContext | None = None,
    ) -> dict[str, ValueAndGrad]:
        """Each reward and its gradient with respect to every sample's latents.

        Args:
            latents: [B, C, h, w].
            prompts: B strings.
            names: Labels of the rewards to compute; those that train when None.
            context: What a latent reward needs: the reference denoiser and this call's noise.

        Returns:
            By label, the values [B] and ``d value_b / d latents_b`` shaped like the latents.

        Raises:
            RewardFailure: An exception, a wrong shape, or a value or gradient that is not finite.
            UsageError: An unknown label, or a reward that has no gradient.
        """
        return self._run(latents, prompts, self._trained if names is None else names, context, gradient=True)

    @batched("latents", "prompts", timeout="reward")
    def score(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        names: Sequence[str] | None = None,
        context: LatentContext | None = None,
    ) -> dict[str, Tensor]:
        """Values [B] of all rewards, float32, without gradient; arguments and errors as :meth:`value_and_grad`."""
        results = self._run(latents, prompts, names, context, gradient=False)
        return {label: values for label, (values, _) in results.items()}

    def score_images(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Values [B] of all rewards on images [B, 3, H, W] in [0, 1], float32, without gradient.

        Raises:
            RewardFailure: An exception, a wrong shape, or a value that is not finite.
        """
        moved = self._to_device(images)
        return {label: self._image_reward(label, moved, prompts, None)[0].to(images.device) for label in self.rewards}

    @batched("latents")
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32, without gradient."""
        if self._vae is None:
            raise UsageError("this reward group has no VAE: it can only score latents")
        parts = [self._decode(latents[part]).float() for part in self._parts(len(latents), list(self.rewards))]
        return torch.cat(parts).to(latents.device)

    def _run(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        names: Sequence[str] | None,
        context: LatentContext | None,
        gradient: bool,
    ) -> dict[str, ValueAndGrad]:
        labels = self._labels(names)
        if gradient:
            for label in labels:
                if not self.rewards[label].differentiable:
                    raise UsageError(f"reward {label!r} has no gradient: it can measure (eval_rewards) but not train")
        if len(prompts) != len(latents):
            raise UsageError(f"{len(latents)} samples but {len(prompts)} prompts")
        moved = self._to_device(latents)
        results = {}
        on_images = [label for label in labels if not isinstance(self.rewards[label], LatentReward)]
        if on_images:
            parts = [
                self._decoded_rewards(on_images, moved[part], prompts[part], gradient)
                for part in self._parts(len(latents), on_images)
            ]
            for label in on_images:
                values, grads = zip(*(part[label] for part in parts), strict=True)
                results[label] = (torch.cat(values), torch.cat(grads))
        for label in labels:
            if label not in results:
                # Not micro-batched: the noise of a call belongs to the whole request, and the reference batches itself.
                results[label] = self._latent_reward(label, moved, prompts, context, gradient)
        dtype = torch.promote_types(latents.dtype, torch.float32)
        return {
            label: (results[label][0].to(latents.device), results[label][1].to(latents.device, dtype))
            for label in labels
        }

    def _decoded_rewards(
        self, labels: Sequence[str], latents: Tensor, prompts: Sequence[str], gradient: bool
    ) -> dict[str, ValueAndGrad]:
        """Rewards on images of one micro-batch: decode once, score, pull each gradient back to the latents."""
        if self._vae is None:
            raise UsageError("this reward group has no VAE: it can only score latents")
        leaf = latents.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            images = self._decode(leaf)
        self._check_finite(images, "decoder", "the decoded image", prompts, None, latents)
        if not gradient:  # measured is the picture as it is saved, with 8 bits (docs/evaluation.md)
            images = to_8_bits(images).to(images.dtype) / 255
        results = {}
        for position, label in enumerate(labels):
            detached = images.detach().requires_grad_(gradient)
            values, pixel_grad = self._image_reward(label, detached, prompts, latents)
            if not gradient:
                results[label] = (values, torch.zeros(len(values), 0))
                continue
            assert pixel_grad is not None
            (grad,) = torch.autograd.grad(
                images, leaf, pixel_grad.to(images.dtype), retain_graph=position + 1 < len(labels)
            )
            self._check_finite(grad, label, "its gradient at the latents", prompts, images, latents)
            results[label] = (values, grad)
        return results

    def _image_reward(
        self, label: str, images: Tensor, prompts: Sequence[str], latents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Values [B] and, where ``images`` want it, the gradient at the images."""
        reward, values, grads = self.rewards[label], [], []
        # Images of a float64 reward (gradient checks) are float64, whatever the decoder gives.
        images = images.to(torch.promote_types(images.dtype, self.dtype))
        for part in self._parts(len(images), [label]):
            some, texts = images[part], prompts[part]
            some_latents = None if latents is None else latents[part]
            # A copy of its own: a reward that writes into its images changes what no other reward sees.
            some = some.detach().clone().requires_grad_(images.requires_grad)
            with torch.set_grad_enabled(images.requires_grad):
                value = self._call(label, partial(reward.score, some, list(texts)), texts, images[part], some_latents)
            if images.requires_grad:
                grad = self._gradient(label, value, some, texts, some, some_latents)
                self._check_finite(grad, label, "its gradient at the image", texts, some, some_latents)
                grads.append(grad)
            values.append(self._result(value))
        return torch.cat(values), torch.cat(grads) if grads else None

    def _latent_reward(
        self, label: str, latents: Tensor, prompts: Sequence[str], context: LatentContext | None, gradient: bool
    ) -> ValueAndGrad:
        reward = self.rewards[label]
        assert isinstance(reward, LatentReward)
        if context is None:
            raise UsageError(f"reward {label!r} scores latents and needs the reference denoiser, which is not here")
        leaf = latents.detach().clone().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            call = partial(reward.score_latents, leaf, list(prompts), context)
            value = self._call(label, call, prompts, None, latents)
        grad = torch.zeros(len(latents), 0)
        if gradient:
            grad = self._gradient(label, value, leaf, prompts, None, leaf)
            self._check_finite(grad, label, "its gradient", prompts, None, leaf)
        return self._result(value), grad

    def _call(
        self, label: str, call: partial[Tensor], prompts: Sequence[str], images: Tensor | None, latents: Tensor | None
    ) -> Tensor:
        """One call of the plugin's code, and every check of its answer."""
        try:
            with self._autocast():
                value: Any = call()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin's sys.exit() would end the run with exit code 0
            index, reason = 0, guard.describe(error, type(self.rewards[label]))
            if isinstance(error, torch.OutOfMemoryError):
                reason += " (a smaller micro_batch needs less memory)"
            elif images is not None and len(prompts) > 1:
                index = self._find_culprit(label, images, prompts)
            self._fail(label, reason, index, prompts, images, latents, error)
        if not isinstance(value, Tensor) or tuple(value.shape) != (len(prompts),):
            shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            self._fail(label, f"score returned {shape}, not a tensor [{len(prompts)}]", 0, prompts, images, latents)
        self._check_finite(value, label, "its value", prompts, images, latents)
        return value

    def _find_culprit(self, label: str, images: Tensor, prompts: Sequence[str]) -> int:
        """The first sample that fails by itself, or 0."""
        for index in range(len(prompts)):
            try:
                with torch.no_grad(), self._autocast():
                    some = images[index : index + 1].detach().clone()
                    self.rewards[label].score(some, list(prompts[index : index + 1]))
            except KeyboardInterrupt:
                raise
            except BaseException:
                return index
        return 0

    def _gradient(
        self,
        label: str,
        value: Tensor,
        at: Tensor,
        prompts: Sequence[str],
        images: Tensor | None,
        latents: Tensor | None,
    ) -> Tensor:
        """``d sum(value) / d at``: each row is its own sample's gradient, since samples do not mix."""
        reason = (
            "no gradient reaches its input: score must use torch operations alone, no detach, numpy, PIL or processor "
            "(rlhf_t2i.plugins.preprocessing resizes, crops and normalizes so that the gradient passes)"
        )
        if not value.requires_grad:
            self._fail(label, reason, 0, prompts, images, latents)
        try:
            (grad,) = torch.autograd.grad(value.sum(), at, allow_unused=True)
        except Exception as error:
            reason = f"backward: {guard.describe(error, type(self.rewards[label]))}"
            self._fail(label, reason, 0, prompts, images, latents, error)
        if grad is None:
            self._fail(label, reason, 0, prompts, images, latents)
        return grad

    def _check_finite(
        self,
        tensor: Tensor,
        label: str,
        what: str,
        prompts: Sequence[str],
        images: Tensor | None,
        latents: Tensor | None,
    ) -> None:
        finite = tensor.detach().isfinite().flatten(1).all(1) if tensor.ndim > 1 else tensor.detach().isfinite()
        if not bool(finite.all()):
            index = int((~finite).nonzero()[0])
            self._fail(label, f"{what} is not finite", index, prompts, images, latents)

    def _fail(
        self,
        label: str,
        reason: str,
        index: int,
        prompts: Sequence[str],
        images: Tensor | None,
        latents: Tensor | None,
        cause: BaseException | None = None,
    ) -> Any:
        saved = None
        if self.failures_dir is not None:
            image = None if images is None else images[index]
            latent = None if latents is None else latents[index]
            if image is None and latents is not None and self._vae is not None and label != "decoder":
                image = self.decode(latents[index : index + 1].detach())[0]
            try:
                saved = save_sample(self.failures_dir, label, prompts[index], reason, image, latent, cause)
            except OSError as error:
                # The reward's failure is the news; a full disk must not hide it.
                reason += f" (and the sample could not be saved: {error})"
        raise RewardFailure(label, prompts[index], reason, None if saved is None else str(saved)) from cause

    def _labels(self, names: Sequence[str] | None) -> list[str]:
        labels = list(self.rewards) if names is None else list(names)
        for label in labels:
            if label not in self.rewards:
                raise UsageError(f"no reward {label!r} here; there are: {', '.join(self.rewards) or 'none'}")
        return labels

    def _decode(self, latents: Tensor) -> Tensor:
        assert self._vae is not None
        return self._vae.decode(latents)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, torch.promote_types(tensor.dtype, self.dtype))

    def _result(self, value: Tensor) -> Tensor:
        return value.detach().to(torch.promote_types(value.dtype, torch.float32))

    def _autocast(self) -> AbstractContextManager[Any]:
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype) if half else nullcontext()

    def _parts(self, total: int, labels: Sequence[str]) -> Iterator[slice]:
        """Micro-batches: the smallest that one of the rewards asks for, since one decode serves them all."""
        wanted = self._micro_batch
        sizes = [wanted.get(label) for label in labels] if isinstance(wanted, Mapping) else [wanted]
        size = min((size for size in sizes if size), default=max(total, 1))
        return (slice(start, start + size) for start in range(0, total, size))


def freeze(reward: Reward, device: torch.device, dtype: torch.dtype) -> Reward:
    """Eval mode, no trainable parameters, on the device in the dtype: what every reward runs as."""
    return reward.eval().requires_grad_(False).to(device, dtype)
