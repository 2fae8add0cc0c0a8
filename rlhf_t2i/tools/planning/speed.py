"""How long the calls of a step take on a device: from a data sheet's roofline, or as measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Protocol

from rlhf_t2i.tools.planning.zero import Setting

if TYPE_CHECKING:
    from rlhf_t2i.families.footprints import Footprints
    from rlhf_t2i.families.kernels import Kernel, Pass
    from rlhf_t2i.tools.planning.devices import Device

_UPDATE_BYTES = 52
"""Moved per number that a rank updates under bf16: its norm (2), a float32 copy (6), clipping (8), AdamW (16 read and
12 written), the new bf16 weight (6) and its gradient set to zero (2). From the code of DeepSpeed 0.19.8 and torch."""
_HOST = 50e9
"""Assumed bytes per second of a process in host memory, where an offloaded optimizer steps."""
_PINNED = 25e9
"""Assumed bytes per second between a device and pinned host memory (PCIe 4)."""
_TOKENS = 77


@dataclass(frozen=True)
class Passes:
    """Seconds of one call of a network on a batch.

    Attributes:
        forward: Of its forward.
        inputs: Of the gradient in its input.
        weights: Of the gradients in its weights, and of adding them up.
    """

    forward: float
    inputs: float
    weights: float


@dataclass(frozen=True)
class Links:
    """What connects the devices.

    Attributes:
        node: Bytes per second that a device sends to its neighbors in a machine, as collectives reach it; None:
            exchanging data is not counted.
        network: Bytes per second that a whole machine sends to others; None: all devices are in one.
        devices: In one machine.
        start: Seconds before the first byte of a collective arrives.
    """

    node: float | None = None
    network: float | None = None
    devices: int = 8
    start: float = 20e-6

    def seconds(self, sent: float, ranks: int) -> float:
        """Of collectives in which each of so many ranks sends ``sent`` bytes.

        Rings enter and leave every machine once, over all of its network cards together.
        """
        if self.node is None or ranks < 2 or not sent:
            return 0.0
        slowest = self.node
        if self.network is not None and ranks > self.devices:
            slowest = min(slowest, self.network)
        return self.start + sent / slowest


class Speed(Protocol):
    """How long the parts of a step take on one device."""

    @property
    def links(self) -> Links:
        """What connects the devices."""

    def passes(self, part: str, images: int) -> Passes:
        """Seconds of one call of a network (:mod:`rlhf_t2i.families.flops` names the parts) on so many images."""

    def encode(self, prompts: int) -> float:
        """Seconds of encoding prompts, one after the other."""

    def update(self, numbers: int, setting: Setting) -> float:
        """Seconds in which one rank updates so many numbers."""

    def copy(self, moved: float) -> float:
        """Seconds of reading and writing so many bytes on the device."""

    def crowding(self, processes: int) -> float:
        """How many times as long a process computes while so many of the step's processes do so at once."""

    def describe(self) -> str:
        """What the seconds are from, in a sentence."""


@dataclass(frozen=True)
class Measured:
    """Seconds measured on this machine, in proportion to the images.

    Attributes:
        image: Of one image, by part.
        text: Of one prompt.
        bandwidth: Bytes per second that are read and written; None: updates are not counted.
        links: What connects the devices.
        processes: The processes of the recipe that share this machine's cores.
        crowded: How many times as long one of them computes while all do.
    """

    image: Mapping[str, Passes]
    text: float = 0.0
    bandwidth: float | None = None
    links: Links = Links()
    processes: int = 1
    crowded: float = 1.0

    def passes(self, part: str, images: int) -> Passes:
        """See :meth:`Speed.passes`."""
        one = self.image[part]
        return Passes(images * one.forward, images * one.inputs, images * one.weights)

    def encode(self, prompts: int) -> float:
        """See :meth:`Speed.encode`."""
        return prompts * self.text

    def update(self, numbers: int, setting: Setting) -> float:
        """See :meth:`Speed.update`."""
        return self.copy((_UPDATE_BYTES if setting.precision == "bf16" else _UPDATE_BYTES - 12) * numbers)

    def copy(self, moved: float) -> float:
        """See :meth:`Speed.copy`."""
        return moved / self.bandwidth if self.bandwidth else 0.0

    def crowding(self, processes: int) -> float:
        """See :meth:`Speed.crowding`; in proportion to the processes between one and all, which were measured."""
        others = min(processes, self.processes) - 1
        return 1.0 + (self.crowded - 1.0) * others / (self.processes - 1) if others > 0 else 1.0

    def describe(self) -> str:
        """See :meth:`Speed.describe`."""
        parts = (f"{part} {1e3 * p.forward:.3g} + {1e3 * p.inputs:.3g} ms" for part, p in self.image.items())
        crowd = f"; {self.crowded:.2f} times as long while {self.processes} processes compute"
        return f"measured here, per image, forward + gradient: {', '.join(parts)}" + crowd * (self.processes > 1)


@dataclass(frozen=True)
class Roofline:
    """A data sheet's device: every kernel takes the longest of its arithmetic, its memory traffic and its launch.

    Attributes:
        device: The device.
        networks: Of the recipe.
        links: What connects the devices.
    """

    device: Device
    networks: Footprints
    links: Links
    _known: dict[tuple[str, int], Passes] = field(default_factory=dict, repr=False, compare=False)

    def passes(self, part: str, images: int) -> Passes:
        """See :meth:`Speed.passes`."""
        if (part, images) not in self._known:
            self._known[part, images] = self._passes(part, images)
        return self._known[part, images]

    def _passes(self, part: str, images: int) -> Passes:
        network = self.networks.part(part)
        if network is None:  # the plan says that it is not counted
            return Passes(0.0, 0.0, 0.0)
        forward, inputs, weights = (self._pass(part, images, which) for which in ("forward", "inputs", "weights"))
        # Gradients of several micro-batches are added up: both are read, the sum is written.
        width = 2 if self.networks.precision == "bf16" else 4
        return Passes(forward, inputs, weights + self.copy(3 * width * network.parameters()))

    def _pass(self, part: str, images: int, which: Pass) -> float:
        from rlhf_t2i.families import kernels

        network = self.networks.part(part)
        assert network is not None
        counted = kernels.of_pass(network.kernels(), which)
        run = sum(count * self._seconds(kernel, images) for kernel, count in counted.items())
        return max(run, self.device.launch * sum(counted.values()))

    def _seconds(self, kernel: Kernel, images: int) -> float:
        moved = (images * kernel.moved + kernel.weights) / self.device.achieved_bandwidth
        if kernel.kind == "memory":
            return max(moved, self.device.shortest)
        return max(images * kernel.flops / self.device.rate(kernel.kind, kernel.bits), moved, self.device.shortest)

    def encode(self, prompts: int) -> float:
        """See :meth:`Speed.encode`. One prompt reads every weight and starts two kernels per layer that has some."""
        text = self.networks.text_encoders()
        width = 2 if self.networks.precision == "bf16" else 4
        moved = width * text.parameters() / self.device.achieved_bandwidth
        flops = 2 * _TOKENS * text.parameters() / self.device.rate("matmul", 8 * width)
        return prompts * max(moved, flops, 2 * text.layers() * self.device.launch)

    def update(self, numbers: int, setting: Setting) -> float:
        """See :meth:`Speed.update`."""
        width = 2 if setting.precision == "bf16" else 4
        if setting.offload:  # gradients down, weights up, the rest in host memory
            return 2 * width * numbers / _PINNED + _UPDATE_BYTES * numbers / _HOST
        return self.copy((_UPDATE_BYTES if width == 2 else _UPDATE_BYTES - 12) * numbers)

    def copy(self, moved: float) -> float:
        """See :meth:`Speed.copy`."""
        return moved / self.device.achieved_bandwidth

    def crowding(self, processes: int) -> float:
        """See :meth:`Speed.crowding`: every process has a device of its own."""
        return 1.0

    def describe(self) -> str:
        """See :meth:`Speed.describe`."""
        device = self.device
        rates = ", ".join(
            f"{kind} {device.rate(kind, bits) / 1e12:.3g}" + (" (fp32)" if bits == 32 else "")
            for kind, bits in (("matmul", 16), ("attention", 16), ("convolution", 16), ("convolution", 32))
        )
        memory, launch = device.achieved_bandwidth / 1e12, 1e6 * device.launch
        return (
            f"assumed, never measured by us on a GPU: TFLOP/s of {rates}; memory {memory:.3g} TB/s; {launch:.2g} us "
            f"per launch; links {(self.links.node or 0) / 1e9:.3g} GB/s"
        )


def as_json(speed: Speed) -> dict[str, object]:
    """Plain data."""
    data: dict[str, object] = {"links": asdict(speed.links), "source": speed.describe()}
    if isinstance(speed, Measured):
        data |= {"image": {part: asdict(p) for part, p in speed.image.items()}, "bandwidth": speed.bandwidth}
        data |= {"processes": speed.processes, "crowded": speed.crowded}
    return data
