"""What every role of a process really holds, measured: to be put beside what ``rlhf_t2i.tools.planning`` predicts.

On CUDA the allocator's own counts. On a CPU, where torch keeps none, the live tensors of the process are added up, and
peaks are read from the profiler's allocation events.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.worker import Worker, WorkerSpec
from rlhf_t2i.tools.planning import plan
from rlhf_t2i.tools.planning.memory import Memory


@dataclass
class Held:
    """Bytes of one role; ``host`` only where the networks live on a GPU.

    Attributes:
        weights: What was allocated for the network itself.
        gradients: More at the moment of an update than before its first backward.
        optimizer: Everything else that stays after an update.
        host: Stays in the machine's memory.
        activations: Peak over the state during a forward with graph and the gradient of its input.
        work: Peak over state and gradients during a whole update; of the assistant, whose update nobody shares.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    host: int = 0
    activations: int | None = None
    work: int = 0

    @property
    def states(self) -> int:
        """Everything but activations, wherever it lives."""
        return self.weights + self.gradients + self.optimizer + self.host


def live(kind: str) -> int:
    """Bytes of tensors alive on a kind of device: the CUDA allocator's, or of distinct storages that Python can see."""
    gc.collect()
    if kind == "cuda":
        return int(torch.cuda.memory_allocated())
    sizes: dict[int, int] = {}
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor) or isinstance(item, FakeTensor | FunctionalTensor):
            continue  # those of torch.compile's caches hold nothing
        # A gradient exists in C++ and shows in Python only once it is asked for.
        for tensor in (item, item.grad if item.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu" and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def peak(call: Callable[[], Any]) -> int:
    """The most bytes a call had allocated at once, over what was there before."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    # The allocator's own counter: events of several threads are not always in order.
    waiting, found = list(profile.profiler.kineto_results.experimental_event_tree()), []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if type(event.extra_fields).__name__ == "_ExtraFields_Allocation":
            found.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.total_allocated))
    if not found:
        return 0
    _, first, after = min(found)
    return max(0, max(total for *_, total in found) - (after - first))


class MeasuredWorker(Worker):
    """A worker that notes what each role allocates while it is built and while it trains."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.held: dict[str, Held] = {}
        self._before = live("cuda" if torch.cuda.is_available() else "cpu")
        self.highest = 0
        """This worker's bytes at the worst moment of its updates so far, on the device (with a CPU's host)."""
        super().__init__(spec)

    @contextmanager
    def _noting(self, role: str) -> Iterator[None]:
        kind = self.device.type
        before, host = live(kind), live("cpu") if kind == "cuda" else 0
        yield
        held = self.held.setdefault(role, Held())
        held.optimizer += live(kind) - before  # weights are taken out of it below
        held.host += live("cpu") - host if kind == "cuda" else 0

    def _load_text_encoders(self) -> Any:
        with self._noting("text encoders"):
            encoders = super()._load_text_encoders()
        self._own("text encoders", encoders)
        return encoders

    def _build(self, role: str) -> Any:
        with self._noting(role):
            built = super()._build(role)
        self._own(role, network(role, built))
        return built

    def _build_rewards(self, choices: Any) -> Any:
        with self._noting("reward"):
            built = super()._build_rewards(choices)
        modules = [*built.rewards.values(), self._context.store.decoder]
        self._own("reward", torch.nn.ModuleList(modules))
        return built

    def _own(self, role: str, module: Any) -> None:
        """Split what was allocated into the network's own tensors and the rest."""
        held = self.held[role]
        if role == "generator" and held.optimizer < 1024:  # the learner's network, shared
            held.optimizer = 0
            return
        tensors = [*module.parameters(), *module.buffers()]
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        held.weights = min(sum(own.values()), held.optimizer)
        held.optimizer -= held.weights

    def train_once(self, step: int, prompts: list[str]) -> None:
        """One assistant and one generator update, noting states and gradients."""
        for role, method in (("assistant", AssistantRole.train), ("learner", LearnerRole.step)):
            engine = self.roles[role].engine
            update, kind, held = engine.step, self.device.type, self.held[role]
            before = live(kind)

            def noted(rate: float, update: Any = update, held: Held = held, before: int = before) -> float:
                held.gradients = max(held.gradients, live(self.device.type) - before)
                return update(rate)

            engine.step = noted
            try:
                with self._noting(role):
                    highest = peak(partial(self.call, role, method, step, prompts))
            finally:
                del engine.step
            self.highest = max(self.highest, before - self._before + highest)
            # What a first update allocates and keeps are the moments; later ones only show the gradients.
            if step == 0:
                held.gradients = 0
            elif role == "assistant":
                held.work = highest - held.gradients

    def measure_activations(
        self,
        prompts: list[str],
        roles: Sequence[str] = ("learner", "assistant", "reference", "reward"),
        warm_up: bool = True,
    ) -> None:
        """Every role's forward and input gradient by itself on ``prompts``, the roles' own micro-batch."""
        store = self._context.store
        keys = [(0, "memory", i) for i in range(len(prompts))]
        z = rng.normal(store.latent_shape, keys).to(self.device)
        t = torch.full((len(prompts),), 500, device=self.device)
        store.conditioner.encode([*prompts, ""])  # cached: the encoders' own activations are not the networks'

        def served(role: str, branch: str) -> None:
            server = self.roles[role]
            prediction = server.forward("memory", z, t, prompts, branch, True)
            server.vjp("memory", z, t, prompts, branch, torch.ones_like(prediction))

        def drawn() -> None:
            leaf = z.clone().requires_grad_(True)
            module = self.roles["learner"].engine.module
            x0 = store.denoise(module, leaf, t, store.conditioner.encode(prompts))
            torch.autograd.grad(x0.sum(), leaf)

        calls: dict[str, Callable[[], Any]] = {
            "learner": drawn,
            "assistant": lambda: served("assistant", "conditional"),
            "reference": lambda: served("reference", "guided"),
            "reward": lambda: self.roles["reward"].value_and_grad(z, prompts),
        }
        for role in roles:
            if warm_up:  # the first one also fills caches and workspaces
                calls[role]()
            self.held[role].activations = peak(calls[role])


def network(role: str, built: Any) -> Any:
    """The role's own network."""
    if role == "learner":
        return built.engine.module
    if role == "assistant":
        return built.engine.module
    return built._network if role == "reference" else built._networks["raw"]


@dataclass
class Row:
    """Predicted and measured bytes of a role, by kind."""

    role: str
    kind: str
    predicted: int
    measured: int
    ratio: float | None = field(init=False)

    def __post_init__(self) -> None:
        self.ratio = self.measured / self.predicted if self.predicted else None


def compare(recipe: Recipe, worker: MeasuredWorker) -> list[Row]:
    """Rows by role and kind, and the sum of the states; a one-process recipe only."""
    (group,) = plan.make(recipe).groups
    predicted: dict[str, Memory] = {}
    for item in group.roles:
        role = "reward" if item.role.startswith(("reward", "decoder")) else item.role
        predicted[role] = predicted.get(role, Memory()) + item.memory
    rows: list[Row] = []
    for role, memory in predicted.items():
        held = worker.held.get(role, Held())
        on_cpu = worker.device.type == "cpu"
        optimizer = memory.optimizer + (memory.host if on_cpu else 0)
        for kind, told, found in (
            ("weights", memory.weights, held.weights),
            ("gradients", memory.gradients, held.gradients),
            ("optimizer", optimizer, held.optimizer),
            ("host", 0 if on_cpu else memory.host, held.host if memory.host else 0),
            ("states", memory.weights + memory.gradients + memory.optimizer + memory.host, held.states),
            ("activations", memory.activations, held.activations or 0),
            ("work", memory.activations + memory.buffers if held.work else 0, held.work),
        ):
            if told or found:
                rows.append(Row(role, kind, told, found))
    states = [row for row in rows if row.kind == "states"]
    rows.append(Row("all", "states", sum(r.predicted for r in states), sum(r.measured for r in states)))
    on_cpu = worker.device.type == "cpu"
    rows.append(Row("all", "peak", group.memory.device + (group.memory.host if on_cpu else 0), worker.highest))
    return rows


def markdown(rows: list[Row]) -> str:
    """A table."""
    lines = ["| role | kind | predicted, MB | measured, MB | measured / predicted |", "|---|---|---:|---:|---:|"]
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        lines.append(f"| {row.role} | {row.kind} | {row.predicted / 1e6:.1f} | {row.measured / 1e6:.1f} | {ratio} |")
    return "\n".join(lines) + "\n"
