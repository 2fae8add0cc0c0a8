"""The sections of ``gpu.py``: each a function of the settings that returns plain data. One process runs one section."""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import random_models
import torch

from rlhf_t2i.algorithm import prompts as prompt_files
from rlhf_t2i.families import flops
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.worker import Worker, WorkerSpec

_RECIPE = Path(__file__).parents[1] / "recipes/di_star_pickscore.yaml"
_GROUP = "placement={mode: ray, groups: {all: {roles: [learner, generator, assistant, reference, reward]}}}"
_BUILT = "overrides.json"
_WARM_UP = 2


@dataclass(frozen=True)
class Settings:
    """What every section is told.

    Attributes:
        small: Whether this is the CPU's version.
        folder: Where the random models lie.
        steps: Timed updates.
        batch: Images an update.
        overrides: Of the recipe.
    """

    small: bool
    folder: str
    steps: int
    batch: int
    overrides: tuple[str, ...] = ()


@dataclass
class Timer:
    """Seconds until the device is done."""

    began: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        """Since the last call."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        before, self.began = self.began, time.perf_counter()
        return self.began - before


def machine(_settings: Settings) -> dict[str, Any]:
    """What runs here, and its rate of matrix products: bf16 on a GPU, float32 on a CPU."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_gib": properties.total_memory / 2**30}
        return {**found, "matmul_rate": flops.matmul_rate()}
    a, b = torch.randn(2, 1024, 1024)
    torch.mm(a, b)
    timer = Timer()
    for _ in range(10):
        torch.mm(a, b)
    return {**found, "device": f"CPU ({platform.machine()})", "matmul_rate": 10 * 2 * 1024**3 / timer.lap()}


def build(settings: Settings, sizes: random_models.Sizes | None = None) -> dict[str, Any]:
    """Write the random models, and the overrides that name them."""
    sizes = sizes or (random_models.small() if settings.small else random_models.FULL)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(settings.folder)
    overrides = random_models.build(folder, sizes, device, torch.float32 if settings.small else torch.bfloat16)
    (folder / _BUILT).write_text(json.dumps(overrides), "utf-8")
    return {"bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())}


def load(settings: Settings, *more: str) -> Recipe:
    """The paper's recipe over the random models, roles colocated, updates of ``batch`` images one by one."""
    built = json.loads((Path(settings.folder) / _BUILT).read_text("utf-8"))
    overrides = [f"{key}={json.dumps(value)}" for key, value in built.items()]
    overrides += [_GROUP, f"optimization.batch_size={settings.batch}", "optimization.micro_batch=1"]
    # Rates of zero would leave nothing to check; random networks do not fall apart at these.
    overrides += [f"optimization.{role}.warmup_steps=0" for role in ("generator", "assistant")]
    if settings.small:
        overrides.append("optimization.precision=fp32")
    elif torch.cuda.is_available() and not spacious():
        overrides.append("optimization.offload_optimizer=true")
    return reading.load(_RECIPE, [*overrides, *settings.overrides, *more])


def spacious() -> bool:
    """Whether this is a GPU that holds SDXL's whole training, optimizer states and all: more than 120 GiB."""
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= 120 * 2**30


def count(settings: Settings) -> dict[str, Any]:
    """FLOPs an image, with one assistant round."""
    recipe = load(settings)
    found: dict[str, Any] = {"image": flops.of_update(recipe, 1) / recipe.optimization.batch_size}
    for phase, works in (("generator", flops.generator_step(recipe)), ("assistant", flops.assistant_step(recipe))):
        found[phase] = {work.role: work.flops(flops.forwards(recipe)[work.part]) for work in works}
    return found


def steps(settings: Settings) -> dict[str, Any]:
    """The framework with DeepSpeed but without Ray: seconds by phase, and memory by role against the plan."""
    import role_memory

    recipe = load(settings)
    join_alone()
    worker = role_memory.MeasuredWorker(WorkerSpec(recipe, "all", ROLES, distributed=True))
    worker.connect({})
    # The second update shows the gradients apart from the states that the first one allocates.
    for number in range(2):
        worker.train_once(number, batch(recipe, number))
    times = StepTimes(recipe, worker.call, engines(worker)).run(settings.steps, 2)
    worker.measure_activations(batch(recipe, 0)[: recipe.optimization.micro_batch])
    rows = role_memory.compare(recipe, worker)
    return {**times, "memory": [asdict(row) for row in rows], "memory_table": role_memory.markdown(rows)}


def variant(settings: Settings) -> dict[str, Any]:
    """As :func:`steps`, seconds alone."""
    recipe = load(settings)
    join_alone()
    worker = Worker(WorkerSpec(recipe, "all", ROLES, distributed=True))
    worker.connect({})
    return StepTimes(recipe, worker.call, engines(worker)).run(settings.steps)


def remote(settings: Settings) -> dict[str, Any]:
    """The same process as a Ray actor."""
    from rlhf_t2i.cluster.ray_cluster import RayCluster

    recipe = load(settings)
    cluster = RayCluster(recipe)
    try:
        return StepTimes(recipe, lambda *args: cluster.call_all(*args)[0], []).run(settings.steps)
    finally:
        cluster.close()


def plain(settings: Settings) -> dict[str, Any]:
    """The framework and the plain loop on the same networks and optimizers, taking turns."""
    from against_plain import side_by_side

    return side_by_side(load(settings, "placement=local"), settings.steps)


def join_alone() -> None:
    """A torch.distributed world of this process, as DeepSpeed wants one."""
    from rlhf_t2i.engines.deepspeed import import_deepspeed

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import_deepspeed().init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def batch(recipe: Recipe, number: int) -> list[str]:
    """An update's prompts; fresh ones, so that encoding them is part of every step."""
    size = recipe.optimization.batch_size
    stream = prompt_files.PromptStream(prompt_files.read(recipe.data.prompts), recipe.seed, "benchmark")
    return stream.batch(number * size, size)


def engines(worker: Worker) -> list[Any]:
    """Those of both trained roles."""
    return [worker.roles["assistant"].engine, worker.roles["learner"].engine]


class StepTimes:
    """Times whole steps: an assistant round and a generator update.

    Args:
        recipe: The recipe.
        call: ``(role, method, *arguments) -> answer``.
        engines: Whose updates are timed apart from the rest, where they are in this process.
    """

    def __init__(self, recipe: Recipe, call: Callable[..., Any], engines: list[Any]) -> None:
        self._recipe, self._call, self._engines = recipe, call, engines
        self._updates = 0.0
        for engine in engines:
            engine.step = self._timed(engine.step)

    def _timed(self, update: Callable[[float], float]) -> Callable[[float], float]:
        def timed(rate: float) -> float:
            timer = Timer()
            timer.lap()
            norm = update(rate)
            self._updates += timer.lap()
            return norm

        return timed

    def step(self, number: int) -> dict[str, float]:
        """Seconds of one.

        Raises:
            RuntimeError: An update was skipped, since its gradient was not finite.
        """
        prompts, timer = batch(self._recipe, number), Timer()
        timer.lap()
        self._updates = 0.0
        norms = [self._call("assistant", AssistantRole.train, number, prompts).grad_norm]
        assistant = timer.lap()
        norms.append(self._call("learner", LearnerRole.step, number, prompts).grad_norm)
        generator = timer.lap()
        if not all(math.isfinite(norm) for norm in norms):
            raise RuntimeError(f"step {number}: a gradient is not finite, so its update was skipped: norms {norms}")
        return {"assistant": assistant, "generator": generator, "update": self._updates, "step": assistant + generator}

    def run(self, repeats: int, done: int = 0) -> dict[str, Any]:
        """Medians over ``repeats`` steps, after two for warming up of which ``done`` were made already."""
        for number in range(done, _WARM_UP):
            self.step(number)
        return summary(self._recipe, [self.step(max(_WARM_UP, done) + i) for i in range(repeats)], bool(self._engines))


def summary(recipe: Recipe, taken: list[dict[str, float]], updates: bool) -> dict[str, Any]:
    """Medians and images a second; with the updates' own seconds, also what 128 images an update would give."""
    median = {name: statistics.median(step[name] for step in taken) for name in taken[0]}
    images = recipe.optimization.batch_size
    found: dict[str, Any] = {"batch": images, "steps": len(taken), "seconds": median}
    found["spread"] = [min(step["step"] for step in taken), max(step["step"] for step in taken)]
    found["images_a_second"] = images / median["step"]
    if updates:
        # An update's own time does not depend on the batch.
        rest = (median["step"] - median["update"]) / images
        found["images_a_second_at_128"] = 128 / (median["update"] + 128 * rest)
    else:
        del median["update"]
    return found


SECTIONS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "machine": machine,
    "build": build,
    "flops": count,
    "steps": steps,
    "plain": plain,
    "remote": remote,
    "variant": variant,
}
