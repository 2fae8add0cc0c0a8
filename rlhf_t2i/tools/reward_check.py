"""``rlhf-t2i rewards check``: tests a reward against the contract that training relies on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_t2i.plugins import guard, process_state
from rlhf_t2i.plugins.base import LatentReward, Reward
from rlhf_t2i.plugins.online import OnlineReward
from rlhf_t2i.roles.reward import RewardRole, freeze
from rlhf_t2i.roles.reward_failure import RewardFailure
from rlhf_t2i.tools.findings import CheckFailed, CheckSkipped, Finding, run_checks

PROMPTS = ("a red apple on a wooden table", "two dogs running along a beach", "a castle at night, oil painting")


class _Identity:
    """A decoder for rewards on images: the latents are the images."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class SyntheticContext:
    """A reference denoiser without weights: its predictions depend on the prompt alone, so gradients are known."""

    def sample_timesteps(self, batch: int) -> Tensor:
        """The same timesteps every call."""
        return torch.linspace(100, 900, batch).long()

    def sample_noise(self, like: Tensor) -> Tensor:
        """The same noise every call."""
        return _noise(tuple(like.shape), 1).to(like)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine schedule."""
        angle = (t.double() + 1) / 1002 * torch.pi / 2
        shape = (-1, *([1] * (like.ndim - 1)))
        return angle.cos().to(like).reshape(shape), angle.sin().to(like).reshape(shape)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``a x_0 + g eps``."""
        alpha, sigma = self.coefficients(t, latents)
        return alpha * latents + sigma * noise

    def reference(self, x_t: Tensor, t: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Predictions with and without the prompt."""
        shape = tuple(x_t.shape[1:])
        conditional = torch.stack([_noise(shape, 2 + sum(map(ord, prompt))) for prompt in prompts])
        return conditional.to(x_t), 0.1 * _noise(tuple(x_t.shape), 0).to(x_t)


def check_reward(
    reward: Reward,
    device: torch.device,
    size: int = 64,
    changed: Sequence[str] = (),
    prompts: Sequence[str] = PROMPTS,
) -> list[Finding]:
    """Run every check; one that raises fails with the author's file and line, and those that need it are skipped.

    Args:
        reward: Built, with its weights.
        device: Where to run.
        size: Height of the test images (a second batch is not square); latents have size/8.
        changed: What its import and construction changed of the process (:func:`process_state.observed`).
        prompts: Three, all different, that the reward understands.
    """
    checker = _Checker(reward, device, size, changed, prompts)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("shape", checker.shape),
        ("input unchanged", checker.input_unchanged),
        ("process unchanged", checker.process_unchanged),
        ("value range", checker.value_range),
        ("determinism", checker.determinism),
        ("batch invariance", checker.batch_invariance),
        ("dtype", checker.dtype),
        ("sees the image", checker.image_sensitivity),
        ("has a gradient", checker.has_gradient),
        ("gradient", checker.gradient),
        ("NaN behavior", checker.nan_behavior),
        ("sees the prompt", checker.prompt_sensitivity),
        ("time", checker.time),
        ("memory", checker.memory),
    ]
    if isinstance(reward, OnlineReward):
        checks.append(("training", checker.training))
    needs = {name: _NEEDS.get(name, ("shape",)) for name, _ in checks[1:]}

    def describe(error: BaseException) -> str:
        """The reason alone: the row has the reward's name already, and the prompts are the check's own."""
        return error.reason if isinstance(error, RewardFailure) else guard.describe(error, type(reward))

    return run_checks(checks, needs, describe)


_NEEDS = {
    "batch invariance": ("shape", "determinism"),
    "dtype": ("shape", "determinism"),
    "NaN behavior": ("shape", "determinism", "batch invariance", "gradient"),
    "sees the image": ("shape", "determinism"),
    "sees the prompt": ("shape", "determinism", "batch invariance"),
    "has a gradient": ("shape", "input unchanged"),
    "gradient": ("shape", "input unchanged", "determinism", "batch invariance", "sees the image", "has a gradient"),
    "time": ("shape", "input unchanged", "has a gradient"),
    "memory": ("shape", "input unchanged", "has a gradient"),
}
"""Checks without which another one says nothing."""


class _Checker:
    def __init__(
        self, reward: Reward, device: torch.device, size: int, changed: Sequence[str], prompts: Sequence[str]
    ) -> None:
        self.reward, self.device, self.changed, self.prompts = reward, device, changed, tuple(prompts)
        self.on_latents = isinstance(reward, LatentReward)
        self.context = SyntheticContext()
        self.inputs = self._inputs(size, size)
        self.wide = self._inputs(size, size + size // 2)

    def _inputs(self, height: int, width: int) -> Tensor:
        if self.on_latents:
            return _noise((3, 4, max(height // 8, 1), max(width // 8, 1)), 7).float()
        coarse = 0.5 + 0.4 * torch.tanh(_noise((3, 3, 6, 6), 7)).float()
        images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
        return images.clamp(0.05, 0.95)

    def _role(self, dtype: torch.dtype = torch.float32) -> RewardRole:
        return RewardRole({"reward": self.reward}, _Identity(), device=self.device, dtype=dtype)

    def _score(
        self, inputs: Tensor, prompts: Sequence[str] | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return self._values(self._role(dtype), inputs, self.prompts if prompts is None else prompts)

    def _values(self, role: RewardRole, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        """Exact values in float64: ``role.score`` rounds decoded images to 8 bits."""
        if self.on_latents:
            return role.score(inputs, prompts, context=self.context)["reward"].double()
        return role.score_images(inputs, prompts)["reward"].double()

    def shape(self) -> str:
        for inputs, prompts in (
            (self.inputs, self.prompts),
            (self.wide, self.prompts),
            (self.inputs[:1], self.prompts[:1]),
        ):
            self._score(inputs, prompts)
        return f"[{len(self.prompts)}] for {len(self.prompts)}; also one sample, and not square"

    def input_unchanged(self) -> str:
        """The role hands every reward a copy, so only the reward itself would suffer; still its gradient would fail."""
        freeze(self.reward, self.device, torch.float32)
        inputs = self.inputs.clone().to(self.device)
        prompts = list(self.prompts)
        with torch.no_grad():
            self._raw(inputs, prompts)
        if not torch.equal(inputs.cpu(), self.inputs) or prompts != list(self.prompts):
            raise CheckFailed("score writes into its images or prompts: work on a new tensor (no mul_, no [...] =)")
        return "images and prompts are as before"

    def process_unchanged(self) -> str:
        """Each call is undone in a run, too, so that only the reward itself would suffer."""
        with process_state.observed() as seen:
            self._score(self.inputs)
        changed = list(dict.fromkeys([*self.changed, *seen]))
        if changed:
            raise CheckFailed(
                f"it changes the whole process by {', '.join(changed)}; a run undoes that after each call, so the "
                "reward must not rely on it: pass dtype, device, generator or path where they are needed"
            )
        return "torch's settings, signals and folder are as before"

    def value_range(self) -> str:
        values = self._score(self.inputs)
        low, high = self.reward.value_range
        if float(values.min()) < low - 1e-4 or float(values.max()) > high + 1e-4:
            raise CheckFailed(f"{float(values.min()):.4g} to {float(values.max()):.4g}, declared {low:g} to {high:g}")
        return f"{float(values.min()):.4g} to {float(values.max()):.4g} {self.reward.unit}".rstrip()

    def determinism(self) -> str:
        difference = float((self._score(self.inputs) - self._score(self.inputs)).abs().max())
        if difference > 1e-6:
            raise CheckFailed(f"the same call gave values that differ by {difference:.2g} (dropout? random crops?)")
        return "the same call gives the same values"

    def batch_invariance(self) -> str:
        if self.on_latents:
            raise CheckSkipped("the noise of a call belongs to the whole batch")
        together = self._score(self.inputs)
        alone = torch.cat(
            [self._score(self.inputs[i : i + 1], self.prompts[i : i + 1]) for i in range(len(self.prompts))]
        )
        difference = float((together - alone).abs().max())
        if difference > 1e-4 * max(1.0, float(alone.abs().max())):
            raise CheckFailed(f"a sample's value depends on its batch by {difference:.2g} (batch norm? a mean over B?)")
        return f"alone or together: {difference:.1g} apart"

    def dtype(self) -> str:
        full, half = self._score(self.inputs), self._score(self.inputs, dtype=torch.bfloat16)
        if not bool(half.isfinite().all()):
            raise CheckFailed("not finite in bfloat16")
        differ = f"float32 and bfloat16 differ by {float((full - half).abs().max()):.2g}"
        if torch.equal(half, half.bfloat16().double()) and not torch.equal(full, full.bfloat16().double()):
            return f"{differ}; there its values have 8 bits: keep the head in rlhf_t2i.plugins.precision.Float32"
        return differ

    def nan_behavior(self) -> str:
        """A damaged sample must be noticed, and must not damage its neighbors."""
        freeze(self.reward, self.device, torch.float32)
        broken = self.inputs.clone().to(self.device)
        broken[1] = float("nan")
        try:
            with torch.no_grad():
                values = self._raw(broken, self.prompts).double().cpu()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return f"raises {type(error).__name__}"
        if bool(values[1].isfinite()):
            raise CheckFailed(f"a sample of NaN gets {float(values[1]):.4g}: it hides the failure (nan_to_num? clamp?)")
        if not bool(values[[0, 2]].isfinite().all()):
            raise CheckFailed("one sample of NaN makes the others NaN")
        return "a sample of NaN gives NaN, its neighbors are untouched"

    def _raw(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        with process_state.restored():
            if isinstance(self.reward, LatentReward):
                return self.reward.score_latents(inputs, prompts, self.context)
            return self.reward.score(inputs, prompts)

    def has_gradient(self) -> str:
        if not self.reward.differentiable:
            raise CheckSkipped("declares none: it can measure (eval_rewards), and train as `of` of a surrogate")
        if isinstance(self.reward, OnlineReward):
            raise CheckSkipped("it is learned while the generator trains")
        _, grads = self._role().value_and_grad(self.inputs, self.prompts, context=self.context)["reward"]
        return f"of size {float(grads.double().norm()):.3g} at {len(self.prompts)} images"

    def gradient(self) -> str:
        """Directional derivatives in float64 against central differences at the best of four step sizes."""
        if not self.reward.differentiable:
            raise CheckSkipped("declares none")
        if isinstance(self.reward, OnlineReward):
            raise CheckSkipped("it is learned while the generator trains")
        inputs = self.inputs.double()
        role = self._role(torch.float64)
        try:
            grads = role.value_and_grad(inputs, self.prompts, context=self.context)["reward"][1].double()
            direction = _noise(tuple(inputs.shape), 3)
            expected = (grads * direction).flatten(1).sum(1)
            errors = []
            for step in (1e-3, 1e-4, 1e-5, 1e-6):
                ahead, behind = (self._values(role, inputs + sign * step * direction, self.prompts) for sign in (1, -1))
                errors.append(float(((ahead - behind) / (2 * step) - expected).abs().max()))
        finally:
            freeze(self.reward, self.device, torch.float32)
        size = float(expected.abs().max())
        if size == 0.0:
            raise CheckFailed("the gradient is zero everywhere")
        if min(errors) > 1e-3 * size:
            raise CheckFailed(f"off by {min(errors) / size:.1g} of its size from finite differences (a detach inside?)")
        return f"agrees with finite differences to {min(errors) / size:.1g} of its size"

    def image_sensitivity(self) -> str:
        if self.on_latents:
            raise CheckSkipped("the noise of a call differs by sample")
        values = self._score(self.inputs, [self.prompts[0]] * 3)
        spread = float(values.max() - values.min())
        if spread == 0.0:
            raise CheckFailed("three different images get the same value")
        return f"three images for one prompt lie {spread:.3g} apart"

    def prompt_sensitivity(self) -> str:
        same = self.inputs[:1].expand_as(self.inputs)
        if self.on_latents:
            one, other = (self._score(self.inputs, [prompt] * 3) for prompt in self.prompts[:2])
            spread = float((one - other).abs().max())
        else:
            values = self._score(same)
            spread = float(values.max() - values.min())
        if not self.reward.uses_prompt:
            if spread > 1e-5:
                raise CheckFailed(f"uses_prompt is False, but three prompts for one image lie {spread:.3g} apart")
            raise CheckSkipped("declares that it does not read the prompt")
        if spread < 1e-7:
            raise CheckFailed(
                "three prompts for one image get the same value; if that is meant, set uses_prompt = False"
            )
        return f"three prompts for one image lie {spread:.3g} apart"

    def time(self) -> str:
        call = self._call()
        call()
        started = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        milliseconds = (time.perf_counter() - started) * 1000 / len(self.prompts)
        what = "value and gradient" if self.reward.differentiable else "value"
        return f"{milliseconds:.1f} ms per image, {what}, on {self.device}"

    def memory(self) -> str:
        call = self._call()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            used, kind = torch.cuda.max_memory_allocated() - before, "peak"
        else:
            used, kind = _saved_bytes(call), "saved for the gradient"
        weights = sum(p.numel() * p.element_size() for p in self.reward.parameters())
        return f"{used / len(self.prompts) / 2**20:.1f} MiB per image {kind}; weights {weights / 2**20:.0f} MiB"

    def training(self) -> str:
        """What a reward that learns will ask of its scorer, by the measured time of one call."""
        assert isinstance(self.reward, OnlineReward)
        started = time.perf_counter()
        self.reward.true_score(self.inputs.to(self.device), self.prompts)
        return self.reward.needs((time.perf_counter() - started) / len(self.prompts))

    def _call(self) -> Callable[[], object]:
        role = self._role()
        method = role.value_and_grad if self.reward.differentiable else role.score
        return lambda: method(self.inputs, self.prompts, context=self.context)


def _saved_bytes(call: Callable[[], object]) -> int:
    """Bytes of distinct tensors that autograd saves during a call."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(saved.values())


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
