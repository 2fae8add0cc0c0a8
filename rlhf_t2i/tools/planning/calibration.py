"""Seconds on this machine, from running a recipe's own networks with random weights (``plan --device here``).

A network runs as it does in a step: in the recipe's precision, its micro-batch and its layouts. A large one runs block
by block, each distinct block once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rlhf_t2i.families import counting, flops
from rlhf_t2i.families.compiling import compile_blocks
from rlhf_t2i.families.counting import Network
from rlhf_t2i.families.footprints import Footprints
from rlhf_t2i.families.frozen import freeze_convs
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.worker import fair_threads
from rlhf_t2i.tools.planning import exchange
from rlhf_t2i.tools.planning.crowd import companions
from rlhf_t2i.tools.planning.speed import Links, Measured, Passes
from rlhf_t2i.training.checks import are_local
from rlhf_t2i.utils.device import default_device
from rlhf_t2i.utils.quiet import quietly

_SECONDS, _MOST = 1.0, 10
"""How long, and how often at most, something is timed."""
_WHOLE = 300_000_000
"""Parameters up to which a network runs in one piece."""
_COPIED = 2**26
_EXCHANGED = 2**24
"""Numbers of the largest all-reduce that is timed."""
_TOKENS = 77

_Inputs = tuple[tuple[object, ...], dict[str, object]]


def measure(recipe: Recipe, micro: int) -> Measured:
    """Measure the networks of a recipe here, on the GPU if there is one.

    On a CPU they run with the threads of the recipe's processes, and once more while as many processes compute; ranks
    that train together time their collectives.

    Args:
        recipe: Names networks, precisions, sizes and processes.
        micro: Images at once.

    Raises:
        UsageError: A configuration is missing or damaged.
        RunError: A process that should compute meanwhile ended.
    """
    networks, processes, threads = Footprints(recipe, default_device()), 1, torch.get_num_threads()
    links = Links()
    if default_device().type == "cpu" and recipe.placement.mode == "ray":
        processes = sum(group.devices for group in recipe.placement.groups.values())
        group = recipe.placement.groups[check_placement(recipe)["learner"][0]]
        threads = group.threads or fair_threads(processes)
        if group.devices > 1:
            links = exchange.measure(group.devices, threads, min(networks.network().parameters(), _EXCHANGED))
    with _threads(threads):
        alone, crowded = _measure(networks, recipe, micro), 1.0
        if processes > 1:
            with companions(processes - 1, threads, _heaviest, recipe.model_dump_json(), micro):
                beside = _image(networks, recipe, micro)
            crowded = max(1.0, _sum(beside) / _sum({part: alone.image[part] for part in beside}))
    return replace(alone, links=links, processes=processes, crowded=crowded)


def _measure(networks: Footprints, recipe: Recipe, micro: int) -> Measured:
    found = _image(networks, recipe, micro)
    for label, (_, network) in networks.rewards.items():
        known = Passes(0.0, 0.0, 0.0) if network is None else _passes(network, micro, (), train=False)
        found[f"reward:{label}"] = known
    rate = networks.network().flops() / found[flops.NETWORK].forward
    return Measured(found, _text(networks, recipe, rate), _bandwidth(default_device()))


def _image(networks: Footprints, recipe: Recipe, micro: int) -> dict[str, Passes]:
    """Of one image, network and decoder."""
    family, compiled = networks.store.family, recipe.optimization.compile
    decoder = family.build_decoder(networks.store.vae)
    return {
        flops.NETWORK: _passes(networks.network(), micro, family.block_names if compiled else (), train=True),
        flops.DECODER: _passes(networks.decoder(), micro, decoder.block_names if compiled else (), train=False),
    }


def _sum(image: Mapping[str, Passes]) -> float:
    return sum(sum(astuple(passes)) for passes in image.values())


def _text(networks: Footprints, recipe: Recipe, rate: float) -> float:
    """Seconds of encoding one prompt, tokenizing included; of large or absent encoders from the network's FLOP/s."""
    parameters = networks.text_encoders().parameters()
    if parameters > _WHOLE or not are_local(recipe):
        return 2 * _TOKENS * parameters / rate
    device = default_device()
    store = ModelStore(recipe.models, recipe.student, device, recipe.optimization.precision)
    with quietly():
        encode = store.text_encoders.encode_one  # keeps nothing, unlike encode()

    def run() -> None:
        with torch.no_grad():
            encode("a red fox that reads a map, at dawn")

    return _seconds(run, device)


def _heaviest(recipe: str, micro: int) -> Callable[[], None]:
    """A pass through the costliest part of a recipe's network, given as JSON."""
    networks = Footprints(Recipe.model_validate_json(recipe), default_device())
    unit = max(_units(networks.network()), key=lambda unit: unit.flops)
    return unit.passes("frozen", micro, ())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many CPU threads in here."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _passes(network: Network, batch: int, compiled: tuple[str, ...], train: bool) -> Passes:
    """Seconds of one image in a batch."""
    units, covered = _units(network), 0
    sums = dict.fromkeys(("forward", "frozen", "trained"), 0.0)
    for unit in units:
        covered += unit.count * unit.flops
        for kind in sums:
            if kind != "trained" or train:
                sums[kind] += unit.count * unit.seconds(kind, batch, compiled)
    scale = network.flops() / covered / batch if covered else 1.0 / batch
    forward, frozen = sums["forward"], max(sums["frozen"], sums["forward"])
    weights = max(sums["trained"] - frozen, 0.0)
    return Passes(scale * forward, scale * (frozen - forward), scale * weights)


class _Unit:
    """A part of a network that runs by itself, with the inputs that the forward gives it for one sample."""

    def __init__(self, module: nn.Module, inputs: _Inputs) -> None:
        self._module, (self._args, self._kwargs) = module, inputs
        self.count = 1
        with torch.no_grad():
            self.flops = counting.flops(lambda: module(*self._args, **self._kwargs))

    @property
    def layout(self) -> object:
        """Equal for parts that take equal time."""
        inputs = [tuple(t.shape) for t in tree_leaves((self._args, self._kwargs)) if isinstance(t, Tensor)]
        return type(self._module), tuple(inputs), tuple(tuple(p.shape) for p in self._module.parameters())

    def seconds(self, kind: str, batch: int, compiled: tuple[str, ...]) -> float:
        """Of a ``forward``, or of it and the backward of a ``frozen`` or ``trained`` network."""
        return _seconds(self.passes(kind, batch, compiled), default_device())

    def passes(self, kind: str, batch: int, compiled: tuple[str, ...]) -> Callable[[], None]:
        """What :meth:`seconds` times."""
        device = default_device()
        train = kind == "trained"
        module = _filled(self._module, device).train(train).requires_grad_(train)
        if not train:
            freeze_convs(module)
        if compiled:
            compile_blocks(module, compiled)
        args, kwargs = tree_map(partial(_filled_input, batch=batch, device=device), (self._args, self._kwargs))

        def run() -> None:
            with torch.set_grad_enabled(kind != "forward"):
                made = [t for t in tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor)]
            if kind != "forward":
                torch.autograd.backward(next(t for t in made if t.requires_grad).sum())
                module.zero_grad(set_to_none=True)

        return run


def _units(network: Network) -> list[_Unit]:
    """What is timed: the network in one piece if it is small, else its distinct blocks."""
    small = network.parameters() <= _WHOLE
    built = network.build()
    wanted = set(built.modules()) if small else set(_outermost_blocks(built))
    seen: list[tuple[nn.Module, _Inputs]] = []
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not running:  # the outermost of those wanted
            seen.append((module, (args, kwargs)))
        running.append(module)

    def leave(module: nn.Module, *_: object) -> None:
        running.pop()

    hooks = []
    for module in wanted:
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave))
    with torch.no_grad():
        network.call(built)
    for hook in hooks:
        hook.remove()
    found: dict[object, _Unit] = {}
    counts: Counter[object] = Counter()
    for module, inputs in seen:
        unit = _Unit(module, inputs)
        found.setdefault(unit.layout, unit)
        counts[unit.layout] += 1
    for layout, unit in found.items():
        unit.count = counts[layout]
    return list(found.values())


def _outermost_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The entries of a network's outermost ``nn.ModuleList``; the network itself where it has none."""
    lists: list[nn.ModuleList] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                lists.append(child)
            else:
                search(child)

    search(network)
    found = [
        block for entries in lists for block in entries if block is not None and any(True for _ in block.parameters())
    ]
    yield from found or [network]


def _filled(module: nn.Module, device: torch.device) -> nn.Module:
    """Memory for a meta module's weights, channels last, with values that keep numbers in range."""
    module.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
        for buffer in module.buffers():
            buffer.fill_(1 if buffer.is_floating_point() else 0)  # positions must exist, deviations divide
    return module.to(memory_format=torch.channels_last)


def _filled_input(value: object, batch: int, device: torch.device) -> object:
    """A random tensor of ``batch`` samples for a meta one of one; channels last where it is an image."""
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype, device=device)
    shape = (batch, *value.shape[1:]) if value.ndim and value.shape[0] == 1 else value.shape
    made = torch.randn(shape, device=device).to(value.dtype)
    if made.ndim == 4:
        made = made.contiguous(memory_format=torch.channels_last)
    return made.requires_grad_(True)


def _bandwidth(device: torch.device) -> float:
    """Bytes per second that are read and written."""
    source = torch.zeros(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(partial(_copy, target, source), device)


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of one call, the median of several after a first one."""

    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    taken: list[float] = []
    while len(taken) < _MOST and sum(taken) < _SECONDS:
        taken.append(once())
    return sorted(taken)[len(taken) // 2]
