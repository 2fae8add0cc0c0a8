"""The commands of docs/cluster.md and examples/cluster, run with their tokens on two machines.

A machine is a network and process namespace with a shell in it, and a home of its own; an address each, one cable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests import tiny
from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]
UNSHARE = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
HEAD, WORKER = "10.77.0.1", "10.77.0.2"
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


def namespaces() -> bool:
    """Whether this user may make them."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(not namespaces(), reason="needs root for network and process namespaces"),
]


class Machine:
    """A shell in namespaces of its own; all its processes end with it."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.shell = subprocess.Popen(
            [*UNSHARE, "bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment, cwd=folder,
        )  # fmt: skip
        self.run("true")
        (self.first,) = psutil.Process(self.shell.pid).children()
        self.pid = self.first.pid

    def run(self, command: str) -> tuple[int, str]:
        """A command's exit code and output; what it exports stays."""
        assert self.shell.stdin is not None
        assert self.shell.stdout is not None
        end = uuid.uuid4().hex
        self.shell.stdin.write(f"{command}\necho; echo {end} $?\n")
        self.shell.stdin.flush()
        lines = []
        for line in self.shell.stdout:
            if line.startswith(end):
                return int(line.split()[1]), "".join(lines)
            lines.append(line)
        raise AssertionError(f"the machine is gone: {lines}")

    def close(self) -> None:
        """Switch it off; returns when its last process has ended and writes no more files."""
        self.shell.kill()
        self.shell.wait()
        with suppress(psutil.NoSuchProcess):
            while self.first.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, since Ray's sockets are below it."""
    made = Path(tempfile.mkdtemp(prefix="m", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def machines(folder: Path) -> Iterator[list[Machine]]:
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    commands = {
        # Each machine has one CPU, so that a recipe of two processes needs both.
        "ray": 'cpus=(); [ "$1" != start ] || cpus=(--num-cpus=1)\n'
        f'exec {sys.executable} -m ray.scripts.scripts "$@" "${{cpus[@]}}"',
        "rlhf-t2i": f'exec {sys.executable} -m rlhf_t2i.cli "$@"',
    }
    for name, body in commands.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{body}\n", "utf-8")
        (bin_folder / name).chmod(0o755)
    made = []
    try:
        for number in (1, 2):
            home = folder / f"home{number}"
            home.mkdir()
            kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_"))}
            path = f"{bin_folder}:{os.environ['PATH']}"
            made.append(Machine(kept | {"HOME": str(home), "PATH": path} | RAY, folder))
        a, b = (machine.pid for machine in made)
        subprocess.run(
            ["ip", "link", "add", "eth0", "netns", str(a), "type", "veth", "peer", "name", "eth0", "netns", str(b)],
            check=True,
        )
        for machine, address in zip(made, (HEAD, WORKER), strict=True):
            code, said = machine.run(
                f"ip address add {address}/24 dev eth0 && ip link set eth0 up && ip link set lo up "
                "&& ip route add default dev eth0"
            )
            assert code == 0, said
        yield made
    finally:
        for machine in made:
            machine.close()


@pytest.fixture
def recipe(folder: Path, tiny_sdxl: Path, tiny_clip: Path, tiny_prompts: Path) -> Path:
    groups = {
        "train": {"roles": ["learner", "generator"], "threads": 1},
        "score": {"roles": ["assistant", "reference", "reward"], "threads": 1},
    }
    data = tiny.recipe_dict(
        tiny_sdxl,
        tiny_prompts,
        steps=1,
        algorithm={"rewards": [{"name": "pickscore", "scale": 100.0, "options": {"model": str(tiny_clip)}}]},
        optimization={"batch_size": 2},
        evaluation={"images": 2, "images_per_prompt": 2},
        logging={"sample_count": 1},
        placement={"mode": "ray", "groups": groups},
    )
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(data), "utf-8")
    return path


def documented() -> list[tuple[str, str]]:
    """Command and place of every line under "Bare metal"."""
    section = (ROOT / "docs/cluster.md").read_text("utf-8").partition("## Bare metal")[2].partition("\n## ")[0]
    return re.findall(r"^    (.+?) +# (first machine|every machine|every other machine|any machine)", section, re.M)


def test_the_commands_of_the_page(machines: list[Machine], recipe: Path, folder: Path) -> None:
    first, other = machines
    where = {
        "first machine": [first],
        "every other machine": [other],
        "every machine": machines,
        "any machine": [other],
    }
    commands = documented()
    assert [command.split()[0] for command, _ in commands][-3:] == ["rlhf-t2i", "rlhf-t2i", "ray"]
    for command, place in commands:
        filled = command.replace("HOST", HEAD).replace("RECIPE", str(recipe))
        for machine in where[place]:
            if filled.startswith("rlhf-t2i run"):
                filled += f" --out {folder}/out"
            code, said = machine.run(filled)
            assert code == 0, (filled, said)
        if "get-auth-token" in command:
            token = folder / "home1/.ray/auth_token"
            assert token.stat().st_mode & 0o077 == 0
            (folder / "home2/.ray").mkdir()
            shutil.copy2(token, folder / "home2/.ray/auth_token")
        if "ray start --address" in command:
            session = Path(first.run("readlink -f $RAY_TMPDIR")[1].strip())
            assert session.stat().st_mode & 0o077 == 0
    assert (folder / "out/model").is_dir()
    shutil.rmtree(session)


def test_the_slurm_script_makes_a_cluster_with_a_token(machines: list[Machine], recipe: Path, folder: Path) -> None:
    """``srun`` hands commands for the second machine to a loop there, with the environment and the umask."""
    first, other = machines
    before, joined = set(Path("/tmp").glob("ray-??????")), folder / "joined"
    os.mkfifo(folder / "orders")
    code, _ = other.run(f'(while true; do read -r order < {folder}/orders; bash -c "$order" & done) > {joined} 2>&1 &')
    assert code == 0
    stand_ins = {
        "scontrol": "printf 'n1\\nn2\\n'",
        "hostname": f"echo {HEAD}",
        # Instead of a time, wait for what the script gives the time to: the head, then the second node.
        "sleep": f"until (exec 3<> /dev/tcp/{HEAD}/6379) 2> /dev/null; do /bin/sleep 0.1; done\n"
        f"[ -e {folder}/slept ] || {{ touch {folder}/slept; exit; }}\n"
        f'until grep -q "Ray runtime started" {joined}; do /bin/sleep 0.1; done\n'
        f'until [ "$(ray status --address {HEAD}:6379 | grep -c " node_")" = 2 ]; do /bin/sleep 0.5; done',
        "srun": 'far=; while [ "${1#--}" != "$1" ]; do [ "${1#--exclude}" = "$1" ] || far=1; shift; done\n'
        f'[ -n "$far" ] || exec "$@"\nvars=$(export -p | grep RAY_ | tr "\\n" ";")\n'
        f'echo "umask $(umask); $vars $*" > {folder}/orders; exec /bin/sleep {HANG_S}',
    }
    for name, body in stand_ins.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n", "utf-8")
        (folder / "bin" / name).chmod(0o755)
    slurm = "SLURM_JOB_NODELIST=n[1-2] SLURM_JOB_NUM_NODES=2 SLURM_GPUS_ON_NODE=0"
    script = ROOT / "examples/cluster/slurm.sbatch"
    code, said = first.run(f"{slurm} bash {script} {recipe} --out {folder}/out")
    assert code == 0, said
    assert (folder / "out/model").is_dir()
    assert set(Path("/tmp").glob("ray-??????")) == before


def test_the_ray_job_starts_with_the_operators_token(machines: list[Machine], recipe: Path, folder: Path) -> None:
    """The commands that KubeRay composes from ``rayStartParams``, and the entry point, in order."""
    first, other = machines
    spec = yaml.safe_load((ROOT / "examples/cluster/kuberay.yaml").read_text("utf-8"))["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}

    def parameters(group: dict[str, dict[str, str]]) -> str:
        return " ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items())

    def run(machine: Machine, command: str) -> None:
        code, said = machine.run(command)
        assert code == 0, (command, said)

    for machine in machines:
        run(machine, f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN={'ab' * 32} RAY_TMPDIR={folder}")
    run(first, f"ray start --head {parameters(cluster['headGroupSpec'])}")
    run(other, f"ray start --address={HEAD}:6379 {parameters(cluster['workerGroupSpecs'][0])}")
    entry = re.sub(r"run \S+", f"plan {recipe}", spec["entrypoint"]).partition(" --out")[0]
    assert entry.endswith("--address auto")
    code, said = first.run(entry)
    assert code == 0, said
    assert "cluster: 0 GPUs, 2 CPUs" in said
