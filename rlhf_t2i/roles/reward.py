"""The reward role: one value-and-gradient call on latents, for any number of rewards. No Ray in here.

Latents are decoded once for all rewards. Each reward's gradient is taken at the decoded images first, so that its own
activations are gone before the decoder's backward pass starts, and then pulled back to the latents. Every call can be
repeated: nothing is kept between calls but cached text features, and what a reward that learns has learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

from rlhf_t2i.engines import pickles
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.recomputing import checkpoint_layers
from rlhf_t2i.plugins import guard, process_state
from rlhf_t2i.plugins.base import LatentContext, LatentReward, Reward
from rlhf_t2i.plugins.online import Lesson, OnlineReward, predicted
from rlhf_t2i.plugins.time_limit import limited
from rlhf_t2i.roles.dispatch import batched
from rlhf_t2i.roles.reward_failure import RewardFailure, save_sample
from rlhf_t2i.utils.device import send
from rlhf_t2i.utils.images import to_8_bits

ValueAndGrad = tuple[Tensor, Tensor]
Score = Callable[[Tensor, Sequence[str]], Tensor]


class Decoder(Protocol):
    """The VAE: latents [B, C, h, w] to images [B, 3, H, W] in [0, 1], clamped; gradients flow."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1]."""


@dataclass(frozen=True)
class _Samples:
    """The samples of a call: what a failure is shown with."""

    prompts: Sequence[str]
    images: Tensor | None
    latents: Tensor | None

    def __getitem__(self, part: slice) -> _Samples:
        images, latents = (None if tensor is None else tensor[part] for tensor in (self.images, self.latents))
        return _Samples(self.prompts[part], images, latents)


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
        timeouts: Seconds that a call of ``score`` and its gradient may take, by label; without a limit when absent.
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
        timeouts: Mapping[str, float] | None = None,
    ) -> None:
        self._trained = list(rewards if trained is None else trained)
        self.rewards = {label: freeze(reward, device, dtype) for label, reward in rewards.items()}
        self.device, self.dtype, self.failures_dir = device, dtype, failures_dir
        self._vae, self._micro_batch, self._timeouts = vae, micro_batch, timeouts or {}
        self._checks: list[tuple[Tensor, str, str, _Samples]] = []
        if activation_checkpointing:
            for module in [*self.rewards.values(), *([vae] if isinstance(vae, nn.Module) else [])]:
                checkpoint_layers(module)

    @batched("latents", "prompts", concurrent=True, timeout="reward")
    def value_and_grad(
        self, latents: Tensor, prompts: Sequence[str], context: LatentContext | None = None
    ) -> dict[str, ValueAndGrad]:
        """Each reward that trains and its gradient with respect to every sample's latents.

        Args:
            latents: [B, C, h, w].
            prompts: B strings.
            context: What a latent reward needs: the reference denoiser and this call's noise.

        Returns:
            By label, the values [B] and ``d value_b / d latents_b`` shaped like the latents.

        Raises:
            RewardFailure: An exception, a wrong shape, or a value or gradient that is not finite.
            UsageError: A reward that has no gradient.
        """
        for label in self._trained:
            if not self.rewards[label].differentiable:
                raise UsageError(f"reward {label!r} has no gradient: it can measure (eval_rewards) but not train")
        return self._run(latents, prompts, self._trained, context, gradient=True)

    @batched("latents", "prompts", timeout="reward")
    def score(self, latents: Tensor, prompts: Sequence[str], context: LatentContext | None = None) -> dict[str, Tensor]:
        """Values [B] of all rewards, float32, without gradient; arguments and errors as :meth:`value_and_grad`.

        The value of a reward that learns is its scorer's; its own is there as ``LABEL (predicted)``.
        """
        results = self._run(latents, prompts, list(self.rewards), context, gradient=False)
        return {label: values for label, (values, _) in results.items()}

    def score_images(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Values [B] of all rewards on images [B, 3, H, W] in [0, 1], float32, without gradient.

        Raises:
            RewardFailure: An exception, a wrong shape, or a value that is not finite.
        """
        samples = _Samples(prompts, self._to_device(images), None)
        measured = {k: v for label in self.rewards for k, v in self._measure(label, samples).items()}
        self._read_checks()
        return {name: values.to(images.device) for name, values in measured.items()}

    def learn(self, label: str, lesson: int, latents: Tensor, prompts: Sequence[str], seed: int) -> Lesson:
        """One lesson of a reward that learns; arguments as :meth:`OnlineReward.learn`, but latents [B, C, h, w].

        Raises:
            RewardFailure: It raised.
        """
        images = to_8_bits(self.decode(latents)).float().to(self.device) / 255
        reward = self._online(label)
        try:
            with process_state.restored(), torch.enable_grad():
                return reward.learn(lesson, images, prompts, seed)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also a scorer's sys.exit()
            self._fail(label, guard.describe(error, type(reward)), _Samples(prompts, images, latents), cause=error)

    def save(self, label: str, file: str) -> None:
        """Write what a reward has learned into a new file."""
        torch.save(self._online(label).training_state(), file)

    def load(self, label: str, file: str) -> None:
        """Continue from :meth:`save`, bit for bit.

        Raises:
            RunError: The file holds more than tensors and plain values; nothing of it was run.
        """
        with pickles.explained(Path(file)):
            self._online(label).load_training_state(torch.load(file, map_location=self.device, weights_only=True))

    def _online(self, label: str) -> OnlineReward:
        reward = self.rewards[label]
        assert isinstance(reward, OnlineReward)
        return reward

    @batched("latents")
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32, without gradient."""
        parts = [self._decode(latents[part]).float() for part in self._parts(len(latents), list(self.rewards))]
        return torch.cat(parts).to(latents.device)

    def _run(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        labels: Sequence[str],
        context: LatentContext | None,
        gradient: bool,
    ) -> dict[str, ValueAndGrad]:
        if len(prompts) != len(latents):
            raise UsageError(f"{len(latents)} samples but {len(prompts)} prompts")
        samples, results = _Samples(prompts, None, self._to_device(latents)), {}
        on_images = [label for label in labels if not isinstance(self.rewards[label], LatentReward)]
        if on_images:
            micro_batches = [samples[part] for part in self._parts(len(latents), on_images)]
            parts = [self._decoded_rewards(on_images, micro, gradient) for micro in micro_batches]
            for name in parts[0]:
                values, grads = zip(*(part[name] for part in parts), strict=True)
                results[name] = (torch.cat(values), torch.cat(grads))
        for label in labels:
            if label not in results:
                # Not micro-batched: the noise of a call belongs to the whole request, and the reference batches itself.
                results[label] = self._latent_reward(label, samples, context, gradient)
        device, dtype = latents.device, torch.promote_types(latents.dtype, torch.float32)
        names = [*labels, *(name for name in results if name not in labels)]
        return {name: (results[name][0].to(device), results[name][1].to(device, dtype)) for name in names}

    def _decoded_rewards(self, labels: Sequence[str], samples: _Samples, gradient: bool) -> dict[str, ValueAndGrad]:
        """Rewards on images of one micro-batch: decode once, score, pull each gradient back to the latents."""
        assert samples.latents is not None
        leaf = samples.latents.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            images = self._decode(leaf)
        self._check_finite(images, "decoder", "the decoded image", samples)
        if not gradient:  # measured is the picture as it is saved, with 8 bits (docs/evaluation.md)
            decoded = _Samples(samples.prompts, to_8_bits(images).to(images.dtype) / 255, samples.latents)
            measured = {k: v for label in labels for k, v in self._measure(label, decoded).items()}
            self._read_checks()
            return {name: (values, torch.zeros(len(values), 0)) for name, values in measured.items()}
        decoded, results = _Samples(samples.prompts, images.detach(), samples.latents), {}
        for position, label in enumerate(labels):
            values, pixel_grad = self._image_reward(label, decoded, gradient)
            assert pixel_grad is not None
            (grad,) = torch.autograd.grad(
                images, leaf, pixel_grad.to(images.dtype), retain_graph=position + 1 < len(labels)
            )
            self._check_finite(grad, label, "its gradient at the latents", decoded)
            results[label] = (values, grad)
        self._read_checks()
        return results

    def _measure(self, label: str, samples: _Samples) -> dict[str, Tensor]:
        """Values [B] of a reward on images; of one that learns its scorer's, and what it predicts."""
        reward = self.rewards[label]
        if not isinstance(reward, OnlineReward):
            return {label: self._image_reward(label, samples, False)[0]}
        true = self._image_reward(label, samples, False, reward.true_score)[0]
        if not reward.ready:
            return {label: true}
        return {label: true, predicted(label): self._image_reward(label, samples, False)[0]}

    def _image_reward(
        self, label: str, samples: _Samples, gradient: bool, score: Score | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Values [B] and, if wanted, the gradient at the images."""
        values, grads, score = [], [], score or self.rewards[label].score
        for part in self._parts(len(samples.prompts), [label]):
            some = samples[part]
            assert some.images is not None
            # Images of a float64 reward (gradient checks) are float64, whatever the decoder gives. A copy of its own: a
            # reward that writes into its images changes what no other reward sees.
            images = some.images.to(torch.promote_types(some.images.dtype, self.dtype), copy=True)
            images.requires_grad_(gradient)
            with self._limited(label), torch.set_grad_enabled(gradient):
                value = self._call(label, partial(score, images, list(some.prompts)), some)
                if gradient:
                    grads.append(self._gradient(label, value, images, some, "its gradient at the image"))
            values.append(self._result(value))
        return torch.cat(values), torch.cat(grads) if grads else None

    def _latent_reward(
        self, label: str, samples: _Samples, context: LatentContext | None, gradient: bool
    ) -> ValueAndGrad:
        reward = self.rewards[label]
        assert isinstance(reward, LatentReward)
        assert samples.latents is not None
        if context is None:
            raise UsageError(f"reward {label!r} scores latents and needs the reference denoiser, which is not here")
        leaf = samples.latents.detach().clone().requires_grad_(gradient)
        with self._limited(label), torch.set_grad_enabled(gradient):
            value = self._call(label, partial(reward.score_latents, leaf, list(samples.prompts), context), samples)
            grad = (
                self._gradient(label, value, leaf, samples, "its gradient") if gradient else torch.zeros(len(leaf), 0)
            )
        self._read_checks()
        return self._result(value), grad

    def _limited(self, label: str) -> AbstractContextManager[None]:
        seconds = self._timeouts.get(label)
        return nullcontext() if seconds is None else limited(f"reward {label!r}", seconds, f"timeout_s of {label}")

    def _call(self, label: str, call: Callable[[], Tensor], samples: _Samples) -> Tensor:
        """One call of the plugin's code, and every check of its answer."""
        try:
            with process_state.restored(), self._autocast():
                value: object = call()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin's sys.exit() would end the run with exit code 0
            self._read_checks()  # it may have stumbled over what was not finite before
            index, reason = 0, guard.describe(error, type(self.rewards[label]))
            if isinstance(error, torch.OutOfMemoryError):
                reason += " (a smaller micro_batch needs less memory)"
            elif samples.images is not None and len(samples.prompts) > 1:
                index = self._find_culprit(label, samples.images, samples.prompts)
            self._fail(label, reason, samples, index, error)
        count = len(samples.prompts)
        if not isinstance(value, Tensor) or tuple(value.shape) != (count,):
            shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            self._fail(label, f"score returned {shape}, not a tensor [{count}]", samples)
        if value.is_complex() or value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = f"{value.dtype}, {value.layout} on {value.device}".replace("torch.", "")
            self._fail(
                label, f"score returned a tensor without plain numbers ({kind}); return real, dense ones", samples
            )
        self._check_finite(value, label, "its value", samples)
        return value

    def _find_culprit(self, label: str, images: Tensor, prompts: Sequence[str]) -> int:
        """The first sample that fails by itself, or 0."""
        for index in range(len(prompts)):
            try:
                with process_state.restored(), torch.no_grad(), self._autocast():
                    some = images[index : index + 1].detach().clone()
                    self.rewards[label].score(some, list(prompts[index : index + 1]))
            except KeyboardInterrupt:
                raise
            except BaseException:
                return index
        return 0

    def _gradient(self, label: str, value: Tensor, at: Tensor, samples: _Samples, what: str) -> Tensor:
        """``d sum(value) / d at``: each row is its own sample's gradient, since samples do not mix."""
        grad = None
        if value.requires_grad:
            try:
                (grad,) = torch.autograd.grad(value.sum(), at, allow_unused=True)
            except Exception as error:
                self._read_checks()
                reason = f"backward: {guard.describe(error, type(self.rewards[label]))}"
                self._fail(label, reason, samples, cause=error)
        if grad is None:
            self._fail(
                label,
                "no gradient reaches its input: score must use torch operations alone, no detach, numpy, PIL or "
                "processor (rlhf_t2i.plugins.preprocessing resizes, crops and normalizes so that the gradient passes)",
                samples,
            )
        self._check_finite(grad, label, what, samples)
        return grad

    def _check_finite(self, tensor: Tensor, label: str, what: str, samples: _Samples) -> None:
        """Note whether each sample's numbers are finite; :meth:`_read_checks` looks, once for all notes."""
        finite = tensor.detach().isfinite().flatten(1).all(1) if tensor.ndim > 1 else tensor.detach().isfinite()
        self._checks.append((send(finite, self.device), label, what, samples))

    def _read_checks(self) -> None:
        """Fail with the first number that was not finite. One read for a micro-batch: each waits for the device."""
        checks, self._checks = self._checks, []
        fine = torch.cat([finite for finite, *_ in checks]).cpu().tolist() if checks else []
        for finite, label, what, samples in checks:
            mine, fine = fine[: len(finite)], fine[len(finite) :]
            if not all(mine):
                self._fail(label, f"{what} is not finite", samples, mine.index(False))

    def _fail(
        self, label: str, reason: str, samples: _Samples, index: int = 0, cause: BaseException | None = None
    ) -> NoReturn:
        prompt, saved = samples.prompts[index], None
        if self.failures_dir is not None:
            image, latent = (None if tensor is None else tensor[index] for tensor in (samples.images, samples.latents))
            if image is None and latent is not None and self._vae is not None and label != "decoder":
                image = self.decode(latent[None].detach())[0]
            try:
                saved = save_sample(self.failures_dir, label, prompt, reason, image, latent, cause)
            except OSError as error:
                # The reward's failure is the news; a full disk must not hide it.
                reason += f" (and the sample could not be saved: {error})"
        raise RewardFailure(label, prompt, reason, None if saved is None else str(saved)) from cause

    def _decode(self, latents: Tensor) -> Tensor:
        if self._vae is None:
            raise UsageError("this reward group has no VAE: it can only score latents")
        return self._vae.decode(latents)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return send(tensor.detach(), self.device).to(torch.promote_types(tensor.dtype, self.dtype))

    def _result(self, value: Tensor) -> Tensor:
        return value.detach().to(torch.promote_types(value.dtype, torch.float32))

    def _autocast(self) -> AbstractContextManager[object]:
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
