"""Several Ray nodes on this machine, joined by ``--address``: a run spreads over them and equals one process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rlhf_t2i.recipe import reading
from rlhf_t2i.training import run
from tests import tiny
from tests.limits import HANG_S
from tests.training.test_run import metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NODES = 3
# The learner's two ranks and the rest: three processes of one CPU each, on nodes that have one. Weights cross nodes.
APART = (
    "placement={mode: ray, groups: {train: {devices: 2, roles: [learner], threads: 1}, "
    "score: {roles: [generator, assistant, reference, reward], threads: 1}}}"
)
# The command line, telling on which node every process was placed.
CHILD = """
import json, sys
from ray.util import placement_group_table
from rlhf_t2i import cli
from rlhf_t2i.cluster import ray_cluster
from rlhf_t2i.cluster.ray_cluster import RayCluster
environment = ray_cluster._actor_environment
def told(spec):
    print("neighbors", spec.neighbors, flush=True)
    return environment(spec)
ray_cluster._actor_environment = told
reserve = RayCluster._reserve
def noted(self):
    reserve(self)
    print("nodes", json.dumps(placement_group_table(self._group)["bundles_to_node_id"]), flush=True)
RayCluster._reserve = noted
placement_group = ray_cluster.placement_group
def waits(*args, **options):
    print("waits for a placement", flush=True)
    return placement_group(*args, **options)
ray_cluster.placement_group = waits
cli.main()
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Three raylets with a CPU each; a dead one is noticed in seconds instead of half a minute."""
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 1,
        "include_dashboard": False,
        "_system_config": {"health_check_period_ms": 500, "health_check_initial_delay_ms": 0},
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(NODES - 1):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def address(nodes: Any) -> str:
    return str(nodes.address)


@pytest.fixture(scope="module")
def joined(nodes: Any, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed run over three nodes, and what it printed."""
    folder = tmp_path_factory.mktemp("joined") / "run"
    child = cli("run", recipe, "--set", APART, "--address", nodes.address, "--out", folder)
    out, error = child.communicate(timeout=HANG_S)
    assert child.returncode == 0, error
    return folder, out


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path, tiny_clip: Path, tiny_prompts: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    optimizer = {"lr": 1e-3, "eps": 1e-4}
    data = tiny.recipe_dict(
        tiny_sdxl,
        tiny_prompts,
        steps=6,
        checkpoints={"every": 2},
        algorithm={"rewards": [{"name": "pickscore", "scale": 100.0, "options": {"model": str(tiny_clip)}}]},
        optimization={"batch_size": 4, "zero_stage": 2, "generator": optimizer, "assistant": optimizer},
        evaluation={"images": 4, "images_per_prompt": 2},
        logging={"sample_count": 2},
    )
    path.write_text(json.dumps(data), "utf-8")  # JSON is YAML
    return path


def cli(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def weights(run: Path) -> torch.Tensor:
    state = load_file(run / "model/unet/diffusion_pytorch_model.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


def test_a_run_spreads_over_the_nodes_and_equals_local(
    joined: tuple[Path, str], recipe: Path, tmp_path: Path, tiny_sdxl: Path
) -> None:
    folder, out = joined
    (placed,) = [line for line in out.splitlines() if line.startswith("nodes ")]
    assert len(set(json.loads(placed.removeprefix("nodes ")).values())) == NODES
    assert [line for line in out.splitlines() if line.startswith("neighbors")] == ["neighbors 1"] * NODES

    run.run(reading.load(recipe, ["placement=local"]), tmp_path / "local")
    start = load_file(tiny_sdxl / "unet/diffusion_pytorch_model.safetensors")
    begun = torch.cat([start[name].flatten() for name in sorted(start)])
    ours, theirs = weights(folder), weights(tmp_path / "local")
    # Against what training changed, not against the weights.
    assert (ours - theirs).norm() < 1e-3 * (theirs - begun).norm()
    assert (theirs - begun).norm() > 1e-3 * begun.norm()
    timings = [json.loads(line)["timing"] for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [timing["weight_bytes"] for timing in timings] == [begun.nbytes] * 6  # to another node, once per step
    assert all(0 < timing["weights"] < timing["step"] for timing in timings)


def test_a_run_survives_the_loss_of_a_whole_node_bit_for_bit(
    nodes: Any, joined: tuple[Path, str], recipe: Path, tmp_path: Path
) -> None:
    """The learner's node is killed, raylet and all, in the middle of a step; another one is free."""
    nodes.add_node(num_cpus=1)
    folder, held, released = tmp_path / "killed", tmp_path / "held", tmp_path / "released"
    plugin = tmp_path / "holding.py"
    plugin.write_text(HOLDING.format(out=str(folder), held=str(held), released=str(released)), "utf-8")
    holding = f"algorithm.rewards.0.name={plugin}:Holding"
    child = cli(
        "run", recipe, "--set", APART, "--set", holding, "--set", "algorithm.rewards.0.label=pickscore",
        "--address", nodes.address, "--out", folder,
    )  # fmt: skip
    while not held.exists():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes.worker_nodes}
    victim = next(pid for pid in raylets if runs_the_learner(pid))  # of its two ranks the head holds one at most
    raylet = psutil.Process(victim)
    for process in [raylet, *raylet.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # it ends by itself when its raylet does
            process.kill()
    nodes.remove_node(raylets[victim], allow_graceful=False)
    released.touch()
    out, error = child.communicate(timeout=HANG_S)
    assert child.returncode == 0, error
    told = " ".join(error.split())
    assert re.search(r"died.*starting again from step_00000[24] \(restart 1 of 3\)", told), told
    assert out.count("nodes ") == 2
    assert weights(folder).equal(weights(joined[0]))
    assert metrics(folder) == metrics(joined[0])


HOLDING = """
import time
from pathlib import Path
from rlhf_t2i_plugins.rewards.pickscore import PickScore

class Holding(PickScore):
    \"""Holds the fourth step, when the checkpoint of the second is whole, until it is released.\"""

    def score(self, images, prompts):
        rows, second = Path({out!r}) / "metrics.jsonl", Path({out!r}) / "checkpoints/step_000002"
        if rows.is_file() and rows.read_bytes().count(b"\\n") == 3 and not Path({released!r}).exists():
            while not second.exists():
                time.sleep(0.01)
            Path({held!r}).touch()
            while not Path({released!r}).exists():
                time.sleep(0.01)
        return super().score(images, prompts)
"""


KEEPERS = """
import sys
import ray
from rlhf_t2i.cluster.connect import join
from rlhf_t2i.cluster.ray_cluster import start_weight_store
join(sys.argv[1])
keepers = [start_weight_store(str(i)) for i in range(5)]
ask = lambda _: ray.get_runtime_context().get_node_id()
print(*{ray.get(weight_store.__ray_call__.remote(ask)) == ask(0) for weight_store in keepers})
"""


def test_the_keeper_of_weights_stays_beside_the_driver(address: str) -> None:
    """On a generator's node it would be lost with it, and the run could not go on."""
    done = subprocess.run(
        [sys.executable, "-c", KEEPERS, address], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.stdout.split() == ["True"], done.stderr


BESIDE = """
import sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rlhf_t2i.cluster.connect import join, same_node
join(sys.argv[1])

@ray.remote(num_cpus=0)
class Child:
    def node(self):
        return ray.get_runtime_context().get_node_id()

@ray.remote(num_cpus=0)
class Parent:
    def same(self):
        children = [Child.options(scheduling_strategy=same_node()).remote() for _ in range(3)]
        return {ray.get(child.node.remote()) for child in children} == {ray.get_runtime_context().get_node_id()}

nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
parents = [Parent.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, False)).remote() for n in nodes]
print(len(nodes), *{ray.get(parent.same.remote()) for parent in parents})
"""


def test_what_a_process_starts_beside_itself_is_on_its_node(address: str) -> None:
    """A reward in an environment of its own shares the device of the process that hosts it."""
    done = subprocess.run(
        [sys.executable, "-c", BESIDE, address], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    nodes, *same = done.stdout.split()
    assert int(nodes) >= NODES, done.stderr
    assert same == ["True"]


def runs_the_learner(raylet: int) -> bool:
    for process in psutil.Process(raylet).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # an idle one that Ray has just ended
            if process.environ().get("RLHF_T2I_PROCESS", "").startswith("train/"):
                return True
    return False


def test_what_the_cluster_lacks_is_said_at_once(address: str, recipe: Path, tmp_path: Path) -> None:
    more = APART.replace("devices: 2", "devices: 4").replace("score: {", "score: {devices: 2, ")
    lacking = "placement needs 6 CPUs (train: 4, score: 2) but the cluster has 3"
    asked = {
        f"{lacking}:": cli("plan", recipe, "--set", more, "--address", address),
        f"{lacking} free:": cli("run", recipe, "--set", more, "--address", address, "--out", tmp_path / "run"),
    }
    for sentence, command in asked.items():
        out, error = command.communicate(timeout=HANG_S)
        assert command.returncode == 2, error
        assert sentence in error
        assert "Traceback" not in error
        assert "waits" not in out
    assert not (tmp_path / "run").exists()
