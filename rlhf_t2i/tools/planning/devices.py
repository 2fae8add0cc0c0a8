"""Accelerators that a plan can be made for. Imports no torch: a wrong name is refused at once."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from rlhf_t2i.errors import UsageError
from rlhf_t2i.tools.planning.speed import Links

USABLE = 0.9
"""Share of a device's memory a plan may fill: the CUDA context, workspaces and fragmentation take the rest."""

HERE = "here"
"""The name that stands for this machine, whose rates are measured."""

# The first three are such that 30 guided steps of SDXL on an A100 take the 3.1 s that diffusers' documentation measured
# ("Accelerate inference", bf16 with fused attention, not compiled); that an H100 reaches the same shares is assumed.
MATMUL = 0.55
"""Share of the peak that products reach: the best shapes reach 0.80 on H100 and H200 and 0.86 on A100 (measured
in stas00/ml-engineering, "Maximum Achievable Matmul FLOPS"), a network's shapes less."""
CONVOLUTION = 0.4
"""Share of the peak that convolutions reach, in bf16 and in TF32."""
WIDE_ATTENTION = 0.1
"""Assumed share of the peak in 16 bits of torch's memory-efficient attention, which takes heads over 256."""
MEMORY = 0.7
"""Share of the memory's bandwidth: large copies reach 0.9 where others measured them, norms and small tensors less."""
LINK = 0.7
"""Assumed share of the links that collectives reach: 0.84 of NVLink between two H100 was measured (NCCL issue 1264)."""
NETWORK = 0.8
"""Assumed share of the network cards' rate."""
LAUNCH = 6e-6
"""Assumed seconds in which Python starts one kernel; others measured 4.2 us for an operator alone on an H100."""
SHORTEST = 2.5e-6
"""Assumed seconds of the shortest kernel, with the gap before the next."""


@dataclass(frozen=True)
class Device:
    """One accelerator, from its maker's data sheet.

    Attributes:
        memory: GiB that torch sees.
        bf16: Peak dense FLOP/s in bfloat16, without sparsity.
        tf32: The same in TF32, which convolutions of float32 take (torch's default; products do not).
        fp32: Peak FLOP/s in float32 outside the tensor cores.
        bandwidth: Peak bytes per second of the device's memory.
        link: Peak bytes per second in one direction between devices of a machine (NVLink; PCIe where there is none).
        attention: Share of the peak that fused attention reaches.
    """

    memory: float
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    link: float
    attention: float
    launch: float = LAUNCH
    shortest: float = SHORTEST

    def rate(self, kind: str, bits: int) -> float:
        """FLOP/s that kernels of a kind (:mod:`rlhf_t2i.families.kernels`) reach in numbers of so many bits."""
        peak = self.bf16 if bits == 16 else self.tf32 if kind == "convolution" else self.fp32
        wide = WIDE_ATTENTION if bits == 16 else self.attention
        shares = {"matmul": MATMUL, "convolution": CONVOLUTION, "attention": self.attention, "wide attention": wide}
        return peak * shares[kind]

    @property
    def achieved_bandwidth(self) -> float:
        """Bytes per second that kernels reach."""
        return self.bandwidth * MEMORY

    def links(self, network_gbps: float | None = None) -> Links:
        """What connects so many of them, eight to a machine.

        Args:
            network_gbps: Of all network cards of one machine, in Gb/s; None: its network is not counted.
        """
        return Links(self.link * LINK, None if network_gbps is None else network_gbps * 1e9 / 8 * NETWORK)


# FlashAttention-2 reaches 0.35 of an H100 (arXiv 2407.08608) and 0.5 to 0.73 of an A100 (arXiv 2307.08691). The L40S is
# assumed to be like the A100.
DEVICES = {
    "h100-80gb": Device(79.1, 989e12, 494e12, 67e12, 3.35e12, 450e9, 0.35),
    "h200-141gb": Device(139.8, 989e12, 494e12, 67e12, 4.8e12, 450e9, 0.35),
    "a100-80gb": Device(79.1, 312e12, 156e12, 19.5e12, 2.04e12, 300e9, 0.6),
    "a100-40gb": Device(39.4, 312e12, 156e12, 19.5e12, 1.56e12, 300e9, 0.6),
    "l40s-48gb": Device(44.5, 362e12, 183e12, 91.6e12, 0.864e12, 32e9, 0.6),
}


def find(name: str) -> tuple[str, Device | None]:
    """(full name, device) by a name or its beginning: ``h100`` is ``h100-80gb``. :data:`HERE` has no device.

    Raises:
        UsageError: Unknown; the sentence names the nearest known one.
    """
    wanted = name.strip().lower()
    if wanted == HERE:
        return HERE, None
    full = next((known for known in DEVICES if known == wanted or known.startswith(f"{wanted}-")), None)
    if full is None:
        short = {known.partition("-")[0] for known in DEVICES}
        near = difflib.get_close_matches(wanted, [*DEVICES, *sorted(short), HERE], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"--device {name}: unknown; {hint}Known: {', '.join(DEVICES)}, and {HERE} for this machine")
    return full, DEVICES[full]
