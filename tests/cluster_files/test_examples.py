"""The cluster examples: valid, and true to this project's command line and pinned Ray."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "cluster"


def test_the_slurm_script_parses_and_refuses_no_recipe(tmp_path: Path) -> None:
    script = EXAMPLES / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    refused = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert refused.returncode != 0
    assert "usage: sbatch" in refused.stderr


@pytest.mark.parametrize("image", ["", "rlhf-t2i.sif"])
def test_the_slurm_script_starts_every_node_and_returns_the_runs_exit_code(image: str, tmp_path: Path) -> None:
    """With stand-ins for Slurm's, Ray's and this project's commands that write down how they were called."""
    calls = tmp_path / "calls"
    commands = {
        "scontrol": "printf 'n1\\nn2\\n'",
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; "$@"',
        "hostname": "echo 10.0.0.1",
        "apptainer": f'echo "$1 $2 $3" >> {tmp_path}/contained; shift 3; exec "$@"',
        "ray": f'echo "ray $*" >> {calls}',
        # Instead of a time, wait for the call that the script gives the time to.
        "sleep": f"echo >> {tmp_path}/naps; until [ $(grep -c ^ray {calls}) -ge $(wc -l < {tmp_path}/naps) ]; "
        "do /bin/sleep 0.05; done",
        "rlhf-t2i": f'echo "rlhf-t2i $*" >> {calls}; [ "$1" = plan ] || exit 143',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "RESUME": "1",
        "IMAGE": image,
    }
    script = EXAMPLES / "slurm.sbatch"
    ran = subprocess.run(
        ["bash", str(script), "r.yaml", "--out", "x"], env=env, cwd=tmp_path, timeout=HANG_S, check=False
    )
    assert ran.returncode == 143
    lines = calls.read_text().splitlines()
    assert any(line.startswith("ray start --head --node-ip-address=10.0.0.1 --port=6379") for line in lines)
    assert any(line.startswith("ray start --address=10.0.0.1:6379") for line in lines)
    assert [line for line in lines if not line.startswith("ray")] == [
        "rlhf-t2i plan r.yaml --address 10.0.0.1:6379",
        "rlhf-t2i run r.yaml --address 10.0.0.1:6379 --resume --out x",
    ]
    contained = tmp_path / "contained"
    assert contained.exists() == bool(image)
    if image:  # two nodes, plan and run
        assert contained.read_text().splitlines() == ["exec --nv rlhf-t2i.sif"] * 4


def test_the_ray_job_is_whole() -> None:
    job = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["entrypoint"].startswith("rlhf-t2i run /data/recipes/")
    recipe = spec["entrypoint"].split()[2].removeprefix("/data/")
    assert (ROOT / recipe).is_file()
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["image"] == "rlhf-t2i:0.1.0"
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
    worker = cluster["workerGroupSpecs"][0]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    devices = yaml.safe_load((ROOT / recipe).read_text())["placement"]["groups"].values()
    assert worker["replicas"] * int(limits["nvidia.com/gpu"]) >= sum(group.get("devices", 1) for group in devices)
