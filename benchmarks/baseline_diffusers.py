"""Diff-Instruct* as one plain loop in one process, the obvious way with diffusers: what the framework is timed against.

Everything of a generator step is one autograd graph with one ``backward()``: generator, noise, assistant, guided
reference, decoder, reward. Prompts are encoded when they are needed, classifier-free guidance doubles the batch as
diffusers' pipelines do, the VAE runs in float32 as the SDXL pipeline's ``upcast_vae`` does. Only torch, diffusers' and
transformers' networks are used; the noise can be given, so that ``benchmarks/gpu.py`` checks that loss and gradient
equal the framework's before it times anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Noise:
    """The draws of one micro-batch: z, timesteps and eps."""

    z: Tensor
    t: Tensor
    eps: Tensor


@dataclass
class PlainLoop:
    """Networks, optimizers and the settings of the paper's row DI*-In.

    Attributes:
        generator: One-step UNet, trained.
        assistant: UNet, trained.
        reference: UNet, frozen.
        vae: AutoencoderKL in float32, frozen.
        text_encoders: SDXL's two.
        tokenizers: Theirs.
        clip: CLIPModel of PickScore, frozen.
        clip_tokenizer: Its tokenizer.
        generator_optimizer: Any torch optimizer over the generator's weights.
        assistant_optimizer: Any torch optimizer over the assistant's.
        abar: The schedule's cumulative products [T], float64.
        guidance: omega of e_u + omega (e_c - e_u).
        reward_scale: alpha of equation (3.3).
        resolution: Pixels.
        timestep: Of the one-step generator.
        ranges: Inclusive timesteps of the divergence and of the assistant's loss.
        max_grad_norm: Of both optimizers.
        autocast: Compute dtype where weights are float32, else None.
    """

    generator: Any
    assistant: Any
    reference: Any
    vae: Any
    text_encoders: Sequence[Any]
    tokenizers: Sequence[Any]
    clip: Any
    clip_tokenizer: Any
    generator_optimizer: Any
    assistant_optimizer: Any
    abar: Tensor
    guidance: float
    reward_scale: float
    resolution: int
    timestep: int
    ranges: tuple[tuple[int, int], tuple[int, int]]
    max_grad_norm: float
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.device = next(self.generator.parameters()).device
        self.latents = self.resolution // 2 ** (len(self.vae.config.block_out_channels) - 1)
        abar = self.abar.to(self.device)
        self._alpha, self._sigma = abar.sqrt().float(), (1 - abar).sqrt().float()

    def update(self, prompts: Sequence[str], micro: int, noises: Sequence[tuple[Noise, Noise]] | None = None) -> None:
        """One assistant update and one generator update on a batch, by gradient accumulation.

        Args:
            prompts: The batch.
            micro: Images at once.
            noises: (assistant's, generator's) by micro-batch; drawn here when absent.
        """
        parts = [prompts[i : i + micro] for i in range(0, len(prompts), micro)]
        for number, part in enumerate(parts):
            noise = noises[number][0] if noises else self.draw(len(part), self.ranges[1])
            (self.assistant_loss(part, noise) / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(self.assistant.parameters(), self.max_grad_norm)
        self.assistant_optimizer.step()
        self.assistant_optimizer.zero_grad()
        self.assistant.requires_grad_(False)
        for number, part in enumerate(parts):
            noise = noises[number][1] if noises else self.draw(len(part), self.ranges[0])
            embeds = self.encode(part)
            x0 = self.one_step(noise.z, embeds)
            (self.generator_loss(x0, part, embeds, noise) / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), self.max_grad_norm)
        self.generator_optimizer.step()
        self.generator_optimizer.zero_grad()
        self.assistant.requires_grad_(True)

    def draw(self, count: int, span: tuple[int, int]) -> Noise:
        """Fresh noise on the device."""
        shape = (count, 4, self.latents, self.latents)
        t = torch.randint(span[0], span[1] + 1, (count,), device=self.device)
        return Noise(torch.randn(shape, device=self.device), t, torch.randn(shape, device=self.device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """SDXL's prompt embeddings [B, 77, D] and pooled projection [B, P]."""
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            output = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return torch.cat(hidden, dim=-1), output[0]

    def predict(self, unet: Any, x_t: Tensor, t: Tensor, embeds: tuple[Tensor, Tensor]) -> Tensor:
        """The UNet's noise prediction."""
        dtype = next(unet.parameters()).dtype
        size = float(self.resolution)
        ids = torch.tensor([[size, size, 0, 0, size, size]], device=self.device, dtype=dtype).repeat(len(x_t), 1)
        added = {"text_embeds": embeds[1].to(dtype), "time_ids": ids}
        mixed = self.autocast is not None and dtype == torch.float32
        with torch.autocast(self.device.type, self.autocast) if mixed else nullcontext():
            output = unet(x_t.to(dtype), t, encoder_hidden_states=embeds[0].to(dtype), added_cond_kwargs=added)
        return output.sample.float()

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """a_t x0 + g_t eps."""
        return self._at(self._alpha, t) * x0 + self._at(self._sigma, t) * eps

    def to_x0(self, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The denoised latents."""
        return (x_t - self._at(self._sigma, t) * eps) / self._at(self._alpha, t)

    def _at(self, values: Tensor, t: Tensor) -> Tensor:
        return values[t].reshape(-1, 1, 1, 1)

    def one_step(self, z: Tensor, embeds: tuple[Tensor, Tensor]) -> Tensor:
        """The generator's latents."""
        t = torch.full((len(z),), self.timestep, device=self.device)
        return self.to_x0(self.predict(self.generator, z, t, embeds), z, t)

    def assistant_loss(self, prompts: Sequence[str], noise: Noise) -> Tensor:
        """Denoising loss on the generator's samples."""
        embeds = self.encode(prompts)
        with torch.no_grad():
            x0 = self.one_step(noise.z, embeds)
        x_t = self.add_noise(x0, noise.t, noise.eps)
        return F.mse_loss(self.predict(self.assistant, x_t, noise.t, embeds), noise.eps)

    def generator_loss(self, x0: Tensor, prompts: Sequence[str], embeds: tuple[Tensor, Tensor], noise: Noise) -> Tensor:
        """Equation (3.4) with the pseudo-Huber distance, minus the scaled reward; the batch's mean."""
        x_t = self.add_noise(x0, noise.t, noise.eps)
        fake = self.to_x0(self.predict(self.assistant, x_t, noise.t, embeds), x_t, noise.t)
        both = tuple(torch.cat([torch.zeros_like(e), e]) for e in embeds)
        twice, t_twice = torch.cat([x_t, x_t]), torch.cat([noise.t, noise.t])
        eps_u, eps_c = self.predict(self.reference, twice, t_twice, both).chunk(2)
        real = self.to_x0(eps_u + self.guidance * (eps_c - eps_u), x_t, noise.t)
        delta = fake - real
        c = 5.4e-4 * delta[0].numel() ** 0.5
        unit = delta / (delta.square().flatten(1).sum(1) + c**2).sqrt().reshape(-1, 1, 1, 1)
        divergence = -(unit * (fake - x0)).flatten(1).sum(1)
        return (divergence - self.reward_scale * self.reward(x0, prompts)).mean()

    def reward(self, x0: Tensor, prompts: Sequence[str]) -> Tensor:
        """PickScore's cosine [B] of the decoded images."""
        image = self.vae.decode(x0 / self.vae.config.scaling_factor).sample
        image = (image / 2 + 0.5).clamp(0, 1)
        size = self.clip.config.vision_config.image_size
        pixels = F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=self.device).reshape(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        pixels = (pixels - mean) / std
        dtype = next(self.clip.parameters()).dtype
        with torch.autocast(self.device.type, dtype) if dtype != torch.float32 else nullcontext():
            pictures = self.clip.get_image_features(pixel_values=pixels.to(dtype)).pooler_output
            with torch.no_grad():
                tokens = self.clip_tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
                words = self.clip.get_text_features(**tokens.to(self.device)).pooler_output
        return F.cosine_similarity(pictures.float(), words.float())
