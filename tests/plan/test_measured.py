"""Memory as a real worker allocates it against the plan, and the benchmarks that the GPU's figures come from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.roles.worker import WorkerSpec
from tests.limits import HANG_S

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Random small models in the published layouts, and the settings of ``benchmarks/gpu.py --small``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu_sections

        settings = gpu_sections.Settings(True, str(tmp_path_factory.mktemp("random")), steps=1, batch=1)
        gpu_sections.build(settings)
        yield settings


def local(settings: Any, *overrides: str) -> Recipe:
    import gpu_sections

    return gpu_sections.load(settings, "placement=local", *overrides)


def test_states_are_within_a_tenth_of_the_plan(built: Any) -> None:
    """Weights, gradients and optimizer states of every role, in a real update; one network has adapters."""
    import gpu_sections
    import role_memory

    recipe = local(built, "optimization.generator.lora={rank: 16}", "optimization.gradient_checkpointing=false")
    worker = role_memory.MeasuredWorker(WorkerSpec(recipe, "all", ROLES))
    worker.connect({})
    for number in range(2):
        worker.train_once(number, gpu_sections.batch(recipe, number))
    rows = role_memory.compare(recipe, worker)
    found = {(row.role, row.kind): row for row in rows}
    for role in ("learner", "assistant"):
        for kind in ("weights", "gradients", "optimizer", "states"):
            assert found[role, kind].measured == pytest.approx(found[role, kind].predicted, rel=0.1), (role, kind)
    for role in ("reference", "text encoders", "reward", "all"):
        assert found[role, "states"].measured == pytest.approx(found[role, "states"].predicted, rel=0.1), role
    # Adapters: far less to update than the network has weights.
    assert found["learner", "gradients"].measured < 0.2 * found["learner", "weights"].measured


def test_an_update_under_zero_borrows_what_the_plan_says() -> None:
    """``benchmarks/zero_memory.py`` on stages 1 to 3: DeepSpeed's own buffers, in real updates of two micro-batches."""
    command = [sys.executable, BENCHMARKS / "zero_memory.py", "--only", "1 rank, bf16, accumulating"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [row[0][:6] for row in rows] == ["ZeRO-1", "ZeRO-2", "ZeRO-3"]
    for label, stays, held, peak, highest, *_ in rows:
        assert float(held) == pytest.approx(float(stays), rel=0.02), label
        assert float(highest) == pytest.approx(float(peak), rel=0.2), label


def test_the_plain_diffusers_loop_computes_the_same(built: Any) -> None:
    """What the framework's speed is compared with has its losses and gradients; both then train on."""
    import against_plain

    result = against_plain.side_by_side(local(built), steps=1)
    assert result["agreement"].keys() == {"assistant loss", "x_0", "gradient at x_0"}
    assert max(result["agreement"].values()) < 1e-4
    assert result["ratio"] > 0


def test_a_wrong_plain_loop_is_not_timed(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import against_plain
    from baseline_diffusers import PlainLoop

    right = PlainLoop.reward
    monkeypatch.setattr(PlainLoop, "reward", lambda self, x0, prompts: 1.05 * right(self, x0, prompts))
    with pytest.raises(RuntimeError, match="gradient at x_0"):
        against_plain.side_by_side(local(built), steps=1)


def test_every_part_of_a_step_is_timed_beside_the_plan(built: Any) -> None:
    """``benchmarks/full_size.py``, each part through its role's own code; what a forward keeps is as planned."""
    import dataclasses

    import full_size

    settings = dataclasses.replace(built, overrides=("models.height=64", "models.width=64"))
    image = {
        part: {"forward": 1.0, "inputs": 1.0, "weights": 1.0} for part in ("network", "decoder", "reward:pickscore")
    }
    rows = []
    for part in full_size.PARTS:
        told, found = (
            full_size.predict(settings, full_size.measured(image), part, "false"),
            full_size.measure(settings, part, "false"),
        )
        rows.append({"part": part, "checkpointing": "kept", "predicted": told, "measured": found})
        assert told["seconds"] > 0 < found["seconds"]
        if part != "generator: drawing":
            assert found["activations"] == pytest.approx(told["activations"], rel=0.25), part
    text = full_size.table(image, rows)
    assert all(f"| {part} | kept |" in text for part in full_size.PARTS)
    # Guidance asks the frozen reference for two branches, the assistant for one.
    work = {row["part"]: row["predicted"]["seconds"] for row in rows}
    assert work["reference, both branches"] == pytest.approx(2 * work["assistant: serving"])
    assert work["learner"] == pytest.approx(1.5 * work["assistant: serving"])


def test_a_section_that_fails_is_written_down_and_the_others_go_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, BENCHMARKS / "gpu.py", "--small", "--sections", "flops", "--set", "models.height=63",
            "--out", tmp_path,
        ],
        capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    sections = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["sections"]
    assert sections["build"]["status"] == "done"
    assert sections["flops"]["status"].startswith("failed: UsageError: models.height: 63")
    assert "**flops**: failed" in (tmp_path / "gpu.md").read_text("utf-8")
