"""A toy family: ten lines of network, conditioning by letters, flow matching, latents wider than high, no diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.base import Conditioner, Conditioning, Decoder, Family
from rlhf_t2i.families.sources import ModelRef

CHANNELS, FACTOR, LETTERS = 5, 2, "abcdefghijklmnopqrstuvwxyz"
SIZE = (16, 24)
WEIGHTS = "weights.safetensors"


class ToyNetwork(nn.Module):
    """Predicts the velocity from the latents, the noise level and the prompt's letters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = (nn.Conv2d(*size, 3, padding=1) for size in ((CHANNELS + 1, width), (width, CHANNELS)))
        self.to_q, self.mixed = nn.Linear(len(LETTERS) + 1, width), nn.ModuleList([nn.Linear(width, width)])

    def forward(self, latents: Tensor, level: Tensor, letters: Tensor, length: Tensor) -> Tensor:
        prompt = self.mixed[0](torch.tanh(self.to_q(torch.cat([letters, length[:, None]], 1))))
        plane = level.to(latents)[:, None, None, None].expand(-1, 1, *latents.shape[2:])
        hidden = self.into(torch.cat([latents, plane], 1)) + prompt[:, :, None, None]
        return self.out(torch.nn.functional.silu(hidden))


class ToyDecoder(Decoder):
    """Twice as large, three colors."""

    def __init__(self) -> None:
        super().__init__()
        self.colors = nn.Conv2d(CHANNELS, 3, 1)

    def decode(self, latents: Tensor) -> Tensor:
        large = torch.nn.functional.interpolate(latents.to(self.colors.weight.dtype), scale_factor=FACTOR)
        return torch.sigmoid(self.colors(large).float())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.float().mean(1, keepdim=True), FACTOR).expand(-1, CHANNELS, -1, -1)


class ToyConditioner(Conditioner):
    """Counts letters; a table scales them, so that there are weights to load."""

    def __init__(self, table: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Parameter(table.to(dtype), requires_grad=False)

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        counts = torch.tensor([float(prompt.lower().count(letter)) for letter in LETTERS])
        scaled = counts.to(self.table.device) * self.table.float()
        return {"letters": scaled, "length": torch.tensor(len(prompt) / 50, device=self.table.device)}

    def unconditional_row(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in self.encode_one("").items()}


class ToyFamily(Family):
    """Folders with ``network/``, ``decoder/`` and ``letters/``."""

    name = "toy"
    pipelines = ("ToyPipeline",)
    network_part = "network"
    adapter_targets = ("to_q",)

    @property
    def network_config(self) -> dict[str, Any]:
        return json.loads((self._folder / "network/config.json").read_text("utf-8"))

    @property
    def _folder(self) -> Path:
        return Path(self.reference.location)

    def check(self) -> None:
        if not (self._folder / "letters" / WEIGHTS).is_file():
            raise UsageError(f"{self._folder}/letters is missing")

    def native_size(self) -> tuple[int, int]:
        return SIZE

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return CHANNELS, height // FACTOR, width // FACTOR

    def schedule(self, height: int, width: int) -> FlowSchedule:
        return FlowSchedule(shift=2.0, time="sigma")

    def default_timesteps(self, steps: int) -> tuple[float, ...]:
        return tuple(1000 * (steps - k) / steps for k in range(steps))

    def check_structure(self, source: ModelRef, what: str) -> None:
        shapes = {name: tensor.shape for name, tensor in load_file(self._network_file(source)).items()}
        if shapes != {name: tensor.shape for name, tensor in self.build_network().state_dict().items()}:
            raise UsageError(f"{what}: {source.location} is of another structure")

    def _network_file(self, source: ModelRef | None) -> Path:
        folder = self._folder if source is None else Path(source.location)
        return folder / "network" / WEIGHTS if (folder / "network").is_dir() else folder / WEIGHTS

    def check_decoder(self, source: ModelRef | None) -> None:
        if source is not None:
            raise UsageError("models.vae: the toy family has one decoder")

    def build_network(self) -> nn.Module:
        with torch.device("meta"):
            return ToyNetwork(self.network_config["width"])

    def build_decoder(self, source: ModelRef | None = None) -> Decoder:
        with torch.device("meta"):
            return ToyDecoder()

    def build_text_encoders(self) -> nn.Module:
        with torch.device("meta"):
            return ToyConditioner(torch.empty(len(LETTERS)), torch.float32)

    def load_network(self, source: ModelRef | None = None) -> nn.Module:
        network = ToyNetwork(self.network_config["width"])
        network.load_state_dict(load_file(self._network_file(source)))
        return network

    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        return ToyConditioner(load_file(self._folder / "letters" / WEIGHTS)["table"], dtype)

    def load_decoder(self, source: ModelRef | None = None) -> Decoder:
        decoder = ToyDecoder()
        decoder.load_state_dict(load_file(self._folder / "decoder" / WEIGHTS))
        return decoder.requires_grad_(False)

    def predict(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        letters, length = (cond.tensors[name].to(x_t.dtype) for name in ("letters", "length"))
        return network(x_t, time, letters, length)

    def example_conditioning(self, batch: int, height: int, width: int, dtype: torch.dtype) -> Conditioning:
        return Conditioning(
            {"letters": torch.empty(batch, len(LETTERS), dtype=dtype), "length": torch.empty(batch, dtype=dtype)}
        )

    def check_export(self, student: Student, vae: ModelRef | None) -> None:
        if student.timesteps != self.default_timesteps(student.steps):
            raise UsageError("student.timesteps: the toy pipeline draws evenly spaced steps only")

    def export(
        self, folder: Path, weights: Mapping[str, Tensor], student: Student, dtype: torch.dtype, vae: ModelRef | None
    ) -> None:
        network = {name: tensor.to(dtype) for name, tensor in weights.items()}
        write(folder, self.network_config, network, self.load_decoder().state_dict(), self._table())

    def _table(self) -> Tensor:
        return load_file(self._folder / "letters" / WEIGHTS)["table"]


def write(
    folder: Path, config: Mapping[str, Any], network: Mapping[str, Tensor], decoder: Mapping[str, Tensor], table: Tensor
) -> None:
    """A model's folder."""
    for part, tensors in (("network", network), ("decoder", decoder), ("letters", {"table": table})):
        (folder / part).mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / part / WEIGHTS)
    (folder / "network/config.json").write_text(json.dumps(dict(config)), "utf-8")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}), "utf-8")


def make(folder: Path, seed: int) -> Path:
    """A random model."""
    torch.manual_seed(seed)
    network, decoder = ToyNetwork(width=8), ToyDecoder()
    write(folder, {"width": 8}, network.state_dict(), decoder.state_dict(), 0.2 + torch.rand(len(LETTERS)))
    return folder


@torch.no_grad()
def pipeline(folder: Path, prompts: Sequence[str], steps: int, seed: int) -> Tensor:
    """The toy's own loader and sampler: images [B, 3, H, W]; it knows nothing of the training package's samplers."""
    network, decoder = ToyNetwork(json.loads((folder / "network/config.json").read_text())["width"]), ToyDecoder()
    network.load_state_dict(load_file(folder / "network" / WEIGHTS))
    decoder.load_state_dict(load_file(folder / "decoder" / WEIGHTS))
    table = load_file(folder / "letters" / WEIGHTS)["table"]
    images = []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + index)
        draw = lambda generator=generator: torch.randn(1, CHANNELS, *(n // FACTOR for n in SIZE), generator=generator)  # noqa: E731
        letters = table * torch.tensor([[float(prompt.lower().count(letter)) for letter in LETTERS]])
        x = draw()
        for k in range(steps):
            s = (steps - k) / steps
            x0 = x - s * network(x, torch.tensor([s]), letters, torch.tensor([len(prompt) / 50]))
            if k + 1 < steps:
                s -= 1 / steps
                x = (1 - s) * x0 + s * draw()
        images.append(decoder.decode(x0))
    return torch.cat(images)
