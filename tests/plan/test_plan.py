"""``rlhf-t2i plan``: counts equal the built networks', memory adds up, nothing is started."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from click.testing import Result
from typer.testing import CliRunner

from rlhf_t2i.cluster.node_check import ClusterState
from rlhf_t2i.commands import plan as command
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.tools.planning import plan as planning
from rlhf_t2i.tools.planning.memory import RolePlan
from tests import tiny

LATENT_BYTES = 4 * 4 * 8 * 8
APART = {
    "mode": "ray",
    "groups": {
        "train": {"devices": 2, "roles": ["learner"]},
        "score": {"devices": 2, "roles": ["assistant", "reference"]},
        "judge": {"roles": ["reward"]},
        "draw": {"roles": ["generator"]},
    },
}


def build(folder: Path, clip: Path | None = None, **changes: Any) -> Recipe:
    rewards = [{"name": "pickscore", "scale": 100.0, "options": {"model": str(clip)}}] if clip else []
    algorithm = {"rewards": rewards, **changes.pop("algorithm", {})}
    optimization = {"batch_size": 8, **changes.pop("optimization", {})}
    data = tiny.recipe_dict(folder, Path("/nowhere"), algorithm=algorithm, optimization=optimization, **changes)
    return Recipe.model_validate(data)


def size(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_the_built_networks(tiny_sdxl: Path, tiny_clip: Path) -> None:
    from transformers import CLIPModel

    recipe = build(tiny_sdxl, tiny_clip)
    plan = planning.make(recipe)
    models = ModelStore(recipe.models, recipe.student, torch.device("cpu"))
    assert plan.parts["network"] == size(models.generator_network())
    assert plan.parts["decoder"] == size(models.decoder.vae)
    assert plan.parts["text encoders"] == size(models.conditioner)
    assert plan.parts["reward:pickscore"] == size(CLIPModel.from_pretrained(tiny_clip))
    assert plan.latents == tiny.LATENTS
    assert plan.notes == ()


def test_sd15_has_one_text_encoder(tiny_sd15: Path) -> None:
    recipe = build(tiny_sd15)
    assert planning.make(recipe).parts["text encoders"] == size(
        ModelStore(recipe.models, recipe.student, torch.device("cpu")).conditioner
    )


def test_groups_add_up_and_a_shared_generator_is_free(tiny_sdxl: Path, tiny_clip: Path) -> None:
    plan = planning.make(build(tiny_sdxl, tiny_clip))
    (group,) = plan.groups
    by_role = {item.role: item for item in group.roles}
    assert by_role["generator"].memory.device == 0
    assert group.memory.weights == sum(item.memory.weights for item in group.roles)
    # Rewards and denoisers take turns beside the learner's graph.
    rewards = sum(item.memory.activations for item in group.roles if item.role.startswith("reward"))
    denoisers = by_role["assistant"].memory.activations + by_role["reference"].memory.activations
    assert group.memory.activations == by_role["learner"].memory.activations + max(rewards, denoisers)
    assert plan.traffic == ()
    assert plan.weights_sync == 0


def test_batch_geometry_and_activations_follow_the_ranks(tiny_sdxl: Path, tiny_clip: Path) -> None:
    whole = planning.make(build(tiny_sdxl, tiny_clip, placement=APART))
    assert whole.batch["learner"] == {"global": 8, "ranks": 2, "micro": 4, "accumulation": 1}
    small = planning.make(build(tiny_sdxl, tiny_clip, placement=APART, optimization={"micro_batch": 1}))
    assert small.batch["assistant"] == {"global": 8, "ranks": 2, "micro": 1, "accumulation": 4}

    def activations(plan: planning.Plan, role: str) -> int:
        return next(i.memory.activations for g in plan.groups for i in g.roles if i.role == role)

    for role in ("assistant", "reference", "decoder", "reward:pickscore"):
        assert activations(whole, role) == 4 * activations(small, role) > 0
    # Of several micro-batches the learner draws one ahead while the denoisers work on the last one: two graphs.
    assert activations(whole, "learner") == 2 * activations(small, "learner") > 0
    frugal = build(tiny_sdxl, tiny_clip, placement=APART, optimization={"gradient_checkpointing": True})
    assert activations(planning.make(frugal), "learner") < activations(whole, "learner")


def test_an_update_of_several_micro_batches_keeps_its_sum(tiny_sdxl: Path) -> None:
    """While other roles work; and one process without Ray is plain torch, whatever ``zero_stage`` says."""

    def learner(mode: str, micro_batch: int | None) -> RolePlan:
        settings = {"zero_stage": 2, "micro_batch": micro_batch}
        placement = {"mode": mode, "groups": {"all": {"roles": list(ROLES)}}}
        (group,) = planning.make(build(tiny_sdxl, placement=placement, optimization=settings)).groups
        return next(role for role in group.roles if role.role == "learner")

    whole, summed = learner("ray", None), learner("ray", 2)
    assert (whole.summed, summed.summed) == (0, 4 * (whole.parameters or 0))
    assert learner("ray", 8).summed == 0
    assert whole.memory.buffers > 0 == learner("local", None).memory.buffers


def test_traffic_of_an_image(tiny_sdxl: Path, tiny_clip: Path) -> None:
    plan = planning.make(build(tiny_sdxl, tiny_clip, placement=APART))
    found = {(item.source, item.target): (item.sent, item.returned) for item in plan.traffic}
    # x_t, then x_t and the cotangent; the prediction, then the gradient.
    assert found["learner", "assistant"] == found["learner", "reference"] == (3 * LATENT_BYTES, 2 * LATENT_BYTES)
    assert found["learner", "reward (pickscore)"] == (LATENT_BYTES, LATENT_BYTES + 4)
    assert found["assistant", "generator"] == (0, LATENT_BYTES)
    assert plan.weights_sync == 4 * (plan.parts["network"] or 0)


def test_kl_and_outer_guidance_change_the_traffic(tiny_sdxl: Path) -> None:
    kl = planning.make(build(tiny_sdxl, placement=APART, algorithm={"divergence": {"name": "kl"}}))
    found = {item.target: (item.sent, item.returned) for item in kl.traffic}
    assert found["assistant"] == found["reference"] == (LATENT_BYTES, LATENT_BYTES)
    outer = planning.make(build(tiny_sdxl, placement=APART, algorithm={"cfg": {"mode": "outer"}}))
    found = {item.target: (item.sent, item.returned) for item in outer.traffic}
    assert found["reference"] == (4 * LATENT_BYTES, 3 * LATENT_BYTES)


def test_a_reward_s_own_micro_batch_bounds_the_decoder(tiny_sdxl: Path, tiny_clip: Path) -> None:
    """One decoding serves all rewards of a call; those that only measure keep no graph, and no training has any."""

    def rewards(micro_batch: int | None, kind: str = "rewards") -> list[RolePlan]:
        choice = {"name": "pickscore", "options": {"model": str(tiny_clip)}, "micro_batch": micro_batch}
        algorithm: dict[str, Any] = {"rewards": [], kind: [choice]}
        recipe = build(tiny_sdxl, algorithm=algorithm, evaluation={"batch_size": 8})
        (group,) = planning.make(recipe).groups
        return [role for role in group.roles if role.role.startswith("reward")]

    for whole, one in zip(rewards(None), rewards(1), strict=True):
        assert whole.memory.activations == 8 * one.memory.activations > 0
        assert whole.measuring == 8 * one.measuring > 0
        assert one.measuring < one.memory.activations
    for role, measures in zip(rewards(2), rewards(2, "eval_rewards"), strict=True):
        assert measures.memory == dataclasses.replace(role.memory, activations=0)
        assert measures.measuring == role.measuring


def test_the_implicit_reward_decodes_nothing(tiny_sdxl: Path) -> None:
    (group,) = planning.make(build(tiny_sdxl, algorithm={"rewards": [{"name": "cfg_implicit"}]})).groups
    assert all(role.memory.activations == 0 for role in group.roles if role.role.startswith("reward"))


@pytest.mark.parametrize(
    ("guidance", "branches"),
    [
        ({"guidance_scale": 7.5}, 2),
        ({"guidance_scale": 1.0}, 1),
        ({"guidance_scale": 1.0, "convention": "one_plus"}, 2),
        ({"guidance_scale": 0}, 1),
        ({"mode": "outer"}, 1),
    ],
)
def test_the_reference_keeps_a_graph_a_branch(tiny_sdxl: Path, guidance: dict[str, Any], branches: int) -> None:
    (group,) = planning.make(build(tiny_sdxl, algorithm={"cfg": guidance})).groups
    (one,) = planning.make(build(tiny_sdxl, algorithm={"cfg": {"guidance_scale": 0}})).groups
    kept, single = (next(r.memory.activations for r in g.roles if r.role == "reference") for g in (group, one))
    assert kept == branches * single > 0


def test_rewards_with_one_model_share_it(tiny_sdxl: Path, tiny_clip: Path) -> None:
    twice = [{"name": "pickscore", "label": label, "options": {"model": str(tiny_clip)}} for label in ("one", "two")]
    plan = planning.make(build(tiny_sdxl, algorithm={"rewards": twice}))
    weights = [
        i.memory.weights for g in plan.groups for i in g.roles if i.role.startswith("reward:") and "VAE" not in i.role
    ]
    assert weights[0] > 0
    assert weights[1] == 0


def test_published_sizes_need_no_network() -> None:
    recipe = Recipe.model_validate(
        {
            "steps": 1,
            "models": {
                "reference": "stabilityai/stable-diffusion-xl-base-1.0",
                "generator": "tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin",
                "vae": "madebyollin/sdxl-vae-fp16-fix",
            },
            "data": {"prompts": "p"},
            "algorithm": {"rewards": [{"name": "pickscore"}]},
            "optimization": {"batch_size": 8, "precision": "bf16", "gradient_checkpointing": True, "zero_stage": 2},
            "placement": {"groups": {"all": {"devices": 8, "roles": list(ROLES)}}},
        }
    )
    plan = planning.make(recipe)
    assert plan.parts == {
        "network": 2_567_463_684,
        "text encoders": 123_060_480 + 694_659_840,
        "decoder": 83_653_863,
        "reward:pickscore": 986_109_441,
    }
    assert plan.latents == (4, 128, 128)
    assert plan.notes == ()
    assert 20e9 < plan.groups[0].memory.device < 80e9


def test_unknown_hub_models_are_refused() -> None:
    recipe = Recipe.model_validate(
        {"steps": 1, "models": {"reference": "who/knows", "generator": "who/knows"}, "data": {"prompts": "p"}}
    )
    with pytest.raises(UsageError, match="who/knows cannot be read from the hub"):
        planning.make(recipe)


UNKNOWN = """
from rlhf_t2i import plugins


class Mine(plugins.Reward):
    def score(self, images, prompts):
        return images.mean((1, 2, 3))
"""


def test_a_reward_of_unknown_cost_is_told_not_zero(tiny_sdxl: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(UNKNOWN)
    plan = planning.make(build(tiny_sdxl, algorithm={"rewards": [{"name": f"{file}:Mine", "label": "mine"}]}))
    assert plan.parts["reward:mine"] is None
    assert plan.notes == ("reward:mine: its network is not known here: its memory and time are not counted",)
    (role,) = [role for role in plan.groups[0].roles if role.role == "reward:mine"]
    assert role.parameters is None


def test_the_average_is_planned(tiny_sdxl: Path) -> None:
    """In host memory on the learner's first rank; on the generator's device once it is sampled."""

    def roles(**optimization: Any) -> dict[str, RolePlan]:
        plan = planning.make(build(tiny_sdxl, placement=APART, optimization=optimization))
        return {
            role.role: role for group in plan.groups for role in group.roles if role.role in ("learner", "generator")
        }

    plain, average = roles(), roles(ema={"half_life_kimg": 1.0})
    count = plain["learner"].parameters or 0
    assert average["learner"].memory.host - plain["learner"].memory.host == 4 * count
    assert average["generator"].memory.weights == 2 * plain["generator"].memory.weights == 8 * count


def test_without_rewards_the_decoder_is_there_for_previews(tiny_sdxl: Path) -> None:
    (group,) = planning.make(build(tiny_sdxl)).groups
    (decoder,) = [role for role in group.roles if role.role == "decoder"]
    assert decoder.memory.weights > 0 == decoder.memory.activations < decoder.measuring


def test_adapters_keep_less_than_whole_training(tiny_sdxl: Path) -> None:
    """What is counted is the network with its adapters, which alone want gradients."""
    lora = {"rank": 2}

    def learner(**optimization: Any) -> RolePlan:
        (group,) = planning.make(build(tiny_sdxl, optimization=optimization)).groups
        return next(role for role in group.roles if role.role == "learner")

    whole, adapted = learner(), learner(generator={"lora": lora})
    assert adapted.memory.gradients < 0.5 * whole.memory.gradients
    assert adapted.memory.weights > whole.memory.weights
    assert adapted.memory.activations != whole.memory.activations


def test_disk_follows_the_checkpoints(tiny_sdxl: Path) -> None:
    def disk(**checkpoints: Any) -> Any:
        recipe = build(tiny_sdxl, steps=10, checkpoints=checkpoints)
        return planning.make(recipe).disk

    few = disk(every=5, keep=5)  # two are written
    assert few.checkpoints == 2 * few.checkpoint
    many = disk(every=1, keep=3, keep_best=False)  # and the one being written
    assert many.checkpoints == 4 * many.checkpoint
    assert disk(every=1, keep=3).checkpoints == 5 * many.checkpoint
    assert many.total == many.checkpoints + many.model + many.samples


def test_a_reward_has_the_compute_precision_and_the_vae_does_not(tiny_sdxl: Path, tiny_clip: Path) -> None:
    by_precision = {}
    for precision in ("fp32", "bf16"):
        plan = planning.make(build(tiny_sdxl, tiny_clip, optimization={"precision": precision}))
        by_precision[precision] = {role.role: role.memory.weights for role in plan.groups[0].roles}
    full, half = by_precision["fp32"], by_precision["bf16"]
    assert half["reward:pickscore"] == full["reward:pickscore"] / 2 > 0
    assert half["decoder"] == full["decoder"] > 0


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"unet/config\.json is damaged"):
        planning.make(build(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tiny_sdxl: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    data = build(tiny_sdxl, tiny_clip, placement=APART).model_dump()
    data["data"]["prompts"] = str(tiny.make_prompts(tmp_path_factory.mktemp("prompts")))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(data))
    return recipe


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(command.plan_command)
    return app


def test_the_table_fits_eighty_columns(file: Path, app: typer.Typer) -> None:
    ran = CliRunner().invoke(app, [str(file)])
    assert ran.exit_code == 0, ran.output
    assert max(map(len, ran.output.splitlines())) <= 80
    for word in ("train x2", "score x2", "judge x1", "draw x1", "learner -> assistant", "8 = 2 ranks x 4 images"):
        assert word in ran.output
    assert list(file.parent.iterdir()) == [file], "a plan writes nothing"


def test_json_is_the_plan(file: Path, app: typer.Typer) -> None:
    ran = CliRunner().invoke(app, [str(file), "--json", "--set", "optimization.micro_batch=2"])
    assert "counting the networks" in ran.stderr
    data = json.loads(ran.stdout)
    assert data["devices"] == 6
    assert data["batch"]["learner"] == {"global": 8, "ranks": 2, "micro": 2, "accumulation": 2}
    train = next(group for group in data["groups"] if group["name"] == "train")
    kinds = ("weights", "gradients", "optimizer", "activations", "buffers")
    assert train["memory"]["device"] == sum(train["memory"][kind] for kind in kinds) > 0


@pytest.mark.parametrize("key", ["prompts", "held_out"])
def test_missing_prompts_are_named_after_the_plan(key: str, file: Path, app: typer.Typer) -> None:
    """A plan needs no prompts; the run that follows does."""
    ran = CliRunner().invoke(app, [str(file), "--set", f"data.{key}=/absent.txt", "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["devices"] == 6
    warning = f"warning: data.{key}: no such prompt file: /absent.txt; `rlhf-t2i run` will refuse this"
    assert ran.stderr.splitlines()[-1] == warning


def test_errors_are_usage_errors(file: Path, app: typer.Typer) -> None:
    ran = CliRunner().invoke(app, [str(file), "--set", "optimization.batch_size=9"])
    assert isinstance(ran.exception, UsageError)
    assert "batch_size 9" in str(ran.exception)


def test_a_cluster_that_cannot_take_the_run_is_refused(
    file: Path, app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(gpus: float, *more: str, problems: Sequence[str] = (), lost: Sequence[str] = ()) -> Result:
        state = ClusterState({"CPU": 64.0, "GPU": gpus}, list(problems), list(lost))
        monkeypatch.setattr("rlhf_t2i.cluster.node_check.inspect", lambda *asked: state)
        return CliRunner().invoke(app, [str(file), "--address", "10.0.0.1:6379", *more])

    ran = ask(4)
    assert "cluster: 4 GPUs, 64 CPUs" in ran.output
    assert isinstance(ran.exception, UsageError)
    assert "needs 6 GPUs" in str(ran.exception)
    assert ask(4, "--set", "placement.share_devices=true").exit_code == 0
    assert ask(0).exit_code == 0
    ran = ask(8, problems=["node 10.0.0.2 has other packages: torch 2.9 (here 2.13)", "node 10.0.0.3 does not answer"])
    assert str(ran.exception) == (
        "node 10.0.0.2 has other packages: torch 2.9 (here 2.13); node 10.0.0.3 does not answer"
    )
    ran = ask(8, lost=["node 10.0.0.4 has left the cluster"])
    assert (ran.exit_code, "warning: node 10.0.0.4 has left the cluster" in ran.output) == (0, True)


def test_no_ray_and_no_torch_before_they_are_needed(file: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from rlhf_t2i.commands import plan\n"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'deepspeed'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "try: plan.plan_command(pathlib.Path(sys.argv[1]), ['optimization.batch_size=9'])\n"
        "except plan.UsageError: assert not heavy & set(sys.modules)\n"
        "else: raise AssertionError\n"
        "plan.plan_command(pathlib.Path(sys.argv[1]), json_=True)\n"
        "assert not {'ray', 'deepspeed'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, stdout=subprocess.DEVNULL)
