"""The reward role: exact gradients, micro-batches, sharing, and failures that name reward, prompt and sample."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_t2i import plugins
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.plugins import registry
from rlhf_t2i.plugins.base import Reward
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.reward_failure import RewardFailure
from rlhf_t2i.tools.reward_check import SyntheticContext
from rlhf_t2i.utils.images import to_8_bits
from tests.rewards import builders, faulty

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a dog on a hill", "trees", "a red fox in the snow"]


class Decoder(nn.Module):
    """A small smooth decoder to [0, 1] that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)]).requires_grad_(
            False
        )
        self.calls = 0

    def decode(self, latents: Tensor) -> Tensor:
        self.calls += 1
        hidden = torch.tanh(self.blocks[0](latents))
        return torch.sigmoid(nn.functional.interpolate(self.blocks[1](hidden), scale_factor=4, mode="bilinear"))


def make_role(rewards: dict[str, Reward], **options: Any) -> RewardRole:
    settings: dict[str, Any] = {"device": CPU, "dtype": torch.float32}
    return RewardRole(rewards, options.pop("vae", None) or Decoder(), **(settings | options))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(builders.write_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(4, 4, 9, 9, generator=torch.Generator().manual_seed(3))


def assert_same(first: dict[str, Any], second: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert list(first) == list(second)
    for label, (values, grads) in first.items():
        assert torch.allclose(values, second[label][0], atol=tolerance, rtol=tolerance)
        assert torch.allclose(grads, second[label][1], atol=tolerance * float(grads.abs().max()), rtol=tolerance)


def test_the_gradient_is_that_of_plain_autograd(latents: Tensor, clip_folder: str) -> None:
    reward = registry.reward("pickscore", model=clip_folder)
    vae = Decoder()
    role = make_role({"pick": reward}, vae=vae)
    values, grads = role.value_and_grad(latents, PROMPTS)["pick"]
    leaf = latents.clone().requires_grad_()
    expected = reward.score(vae.decode(leaf), PROMPTS)
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    assert torch.allclose(values, expected.detach(), atol=1e-6)
    assert torch.allclose(grads, expected_grad, atol=1e-7)
    assert float(grads.flatten(1).norm(dim=1).min()) > 0
    assert values.dtype == grads.dtype == torch.float32
    assert not values.requires_grad
    assert not grads.requires_grad


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 3}, {"activation_checkpointing": True}])
def test_micro_batches_and_checkpointing_change_nothing(
    latents: Tensor, clip_folder: str, options: dict[str, Any]
) -> None:
    rewards = {"pick": registry.reward("pickscore", model=clip_folder), "good": faulty.Good()}
    whole = make_role(rewards).value_and_grad(latents, PROMPTS)
    assert_same(whole, make_role(rewards, **options).value_and_grad(latents, PROMPTS))


def test_checkpointing_keeps_less_for_the_backward_pass(latents: Tensor, tmp_path: Path) -> None:
    """Each layer's activations are dropped; only its input stays."""
    from rlhf_t2i.tools.reward_check import _saved_bytes

    folders = [str(builders.write_clip(tmp_path / name)) for name in ("plain", "checkpointed")]
    roles = [
        make_role({"pick": registry.reward("pickscore", model=folder)}, activation_checkpointing=on)
        for folder, on in zip(folders, (False, True), strict=True)
    ]
    plain, checkpointed = (_saved_bytes(lambda role=role: role.value_and_grad(latents, PROMPTS)) for role in roles)
    assert 0 < checkpointed < 0.8 * plain


def test_several_rewards_share_one_decode(latents: Tensor) -> None:
    vae = Decoder()
    rewards = {"one": faulty.Good(), "two": faulty.Good(), "three": faulty.Measured()}
    role = make_role(rewards, vae=vae, trained=["one", "two"])
    together = role.value_and_grad(latents, PROMPTS)
    assert vae.calls == 1
    role.score(latents, PROMPTS)
    assert vae.calls == 2
    alone = make_role({"two": faulty.Good()}).value_and_grad(latents, PROMPTS)
    assert_same({"two": together["two"]}, alone)


def test_one_model_shared_by_two_rewards_is_loaded_once(clip_folder: str) -> None:
    with plugins.sharing():
        first = registry.reward("pickscore", model=clip_folder)
        second = registry.reward("clip", model=clip_folder, unit="logit")
    assert first.clip.model is second.clip.model


def test_a_role_in_half_precision_leaves_another_roles_weights_alone(clip_folder: str) -> None:
    with plugins.sharing():
        exact = make_role({"p": registry.reward("pickscore", model=clip_folder)}, vae=builders.Identity())
    before = exact.score(builders.pictures(2), PROMPTS[:2])
    with plugins.sharing():
        make_role({"p": registry.reward("pickscore", model=clip_folder)}, dtype=torch.bfloat16)
    after = exact.score(builders.pictures(2), PROMPTS[:2])
    assert torch.equal(before["p"], after["p"])


def test_text_features_are_computed_once_a_prompt(clip_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = registry.reward("pickscore", model=clip_folder)
    seen: list[str] = []
    encode = reward.encode_text
    monkeypatch.setattr(reward, "encode_text", lambda prompts: (seen.extend(prompts), encode(prompts))[1])
    role = make_role({"pick": reward}, vae=builders.Identity())
    images = builders.pictures(4)
    role.score(images, ["a", "b", "a", "b"])
    role.score(images, ["b", "c", "a", "c"])
    assert sorted(seen) == ["a", "b", "c"]


def test_half_precision_stays_close_and_returns_float32(latents: Tensor, clip_folder: str, tmp_path: Path) -> None:
    exact = make_role({"p": registry.reward("pickscore", model=clip_folder)}).value_and_grad(latents, PROMPTS)["p"]
    # A folder of its own: rewards on one folder share their weights, and so their dtype.
    half = registry.reward("pickscore", model=str(builders.write_clip(tmp_path)))
    values, grads = make_role({"p": half}, dtype=torch.bfloat16).value_and_grad(latents, PROMPTS)["p"]
    assert next(half.parameters()).dtype == torch.bfloat16
    assert values.dtype == grads.dtype == torch.float32
    assert (values - exact[0]).abs().max() < 0.03
    assert torch.nn.functional.cosine_similarity(grads.flatten(), exact[1].flatten(), 0) > 0.98


def test_scores_of_latents_are_those_of_their_saved_images(latents: Tensor) -> None:
    role = make_role({"good": faulty.Good()}, micro_batch=2)
    images = role.decode(latents)
    assert images.shape == (4, 3, 36, 36)
    assert not images.requires_grad
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    expected = role.rewards["good"].score(to_8_bits(images) / 255, PROMPTS)
    assert torch.allclose(role.score(latents, PROMPTS)["good"], expected, atol=1e-6)
    # What is measured is the image as a PNG holds it; what trains is the image as it was decoded.
    assert not torch.allclose(role.value_and_grad(latents, PROMPTS)["good"][0], expected, atol=1e-6)
    assert torch.equal(
        role.score_images(to_8_bits(images) / 255, PROMPTS)["good"], role.score(latents, PROMPTS)["good"]
    )


def test_latent_rewards_get_the_context_and_need_one(latents: Tensor) -> None:
    role = make_role({"cfg": registry.reward("cfg_implicit"), "good": faulty.Good()})
    context = SyntheticContext()
    results = role.value_and_grad(latents, PROMPTS, context=context)
    conditional, unconditional = context.reference(latents, context.sample_timesteps(4), PROMPTS)
    assert torch.allclose(results["cfg"][1], conditional - unconditional, atol=1e-5)
    assert list(results) == ["cfg", "good"]
    with pytest.raises(UsageError, match=r"'cfg' scores latents and needs the reference"):
        role.value_and_grad(latents, PROMPTS)


BAD = ["a cat", "a dog", "bad", "a hill"]


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (faulty.NotFinite(), "its value is not finite"),
        (faulty.InfiniteGradient(), "its gradient at the image is not finite"),
        (faulty.Raises(), ": ValueError: cannot read this"),
    ],
)
def test_a_failure_names_reward_and_prompt_and_saves_the_sample(
    latents: Tensor, tmp_path: Path, reward: Reward, reason: str
) -> None:
    role = make_role({"my/reward.py:Mine": reward}, failures_dir=tmp_path / "failures")
    with pytest.raises(RewardFailure) as caught:
        role.value_and_grad(latents, BAD)
    failure = caught.value
    assert isinstance(failure, RunError)
    assert (failure.reward, failure.prompt) == ("my/reward.py:Mine", "bad")
    assert failure.reason.endswith(reason)
    assert reason[0] != ":" or failure.reason.startswith("faulty.py:"), "the author's file and line"
    for part in ("'my/reward.py:Mine'", "'bad'", reason):
        assert part in str(failure)
    (folder,) = (tmp_path / "failures").iterdir()
    assert failure.saved == str(folder)
    saved = load_file(folder / "sample.safetensors")
    assert torch.equal(saved["latent"], latents[2])
    assert torch.allclose(saved["image"], role.decode(latents[2:3])[0], atol=1e-6)
    assert Image.open(folder / "image.png").size == (36, 36)
    report = json.loads((folder / "failure.json").read_text())
    assert (report["prompt"], report["reason"]) == ("bad", failure.reason)


def test_a_sample_that_cannot_be_saved_does_not_hide_the_failure(latents: Tensor, tmp_path: Path) -> None:
    (tmp_path / "failures").write_text("a file where the folder should be")
    role = make_role({"r": faulty.NotFinite()}, failures_dir=tmp_path / "failures")
    with pytest.raises(RewardFailure, match=r"its value is not finite \(and the sample could not be saved: "):
        role.value_and_grad(latents, BAD)


def test_a_repeated_failure_writes_one_folder(latents: Tensor, tmp_path: Path) -> None:
    role = make_role({"r": faulty.NotFinite()}, failures_dir=tmp_path)
    for _ in range(2):
        with pytest.raises(RewardFailure):
            role.value_and_grad(latents, BAD)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (faulty.WrongShape(), r"score returned shape \[4, 1\], not a tensor \[4\]"),
        (faulty.NotATensor(), r"score returned a list, not a tensor \[4\]"),
        (faulty.Detached(), "no gradient reaches its input"),
    ],
)
def test_a_broken_contract_stops_the_step(latents: Tensor, reward: Reward, reason: str) -> None:
    with pytest.raises(RewardFailure, match=reason):
        make_role({"broken": reward}).value_and_grad(latents, PROMPTS)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda values: values + 1j, "complex64, strided on cpu"),
        (lambda values: values.to_sparse(), "float32, sparse_coo on cpu"),
        (lambda values: values.to("meta"), "float32, strided on meta"),
    ],
)
def test_values_that_are_no_plain_numbers_are_named(latents: Tensor, change: Any, kind: str) -> None:
    class Odd(faulty.Good):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return change(super().score(images, prompts))

    for call in ("value_and_grad", "score"):
        with pytest.raises(RewardFailure, match=rf"without plain numbers \({kind}\); return real, dense ones"):
            getattr(make_role({"odd": Odd()}), call)(latents, PROMPTS)


def test_measuring_is_checked_too(latents: Tensor) -> None:
    with pytest.raises(RewardFailure, match=r"'bad': its value is not finite"):
        make_role({"r": faulty.NotFinite()}).score(latents, BAD)
    with pytest.raises(RewardFailure, match=r"'bad': faulty.py:\d+: ValueError"):
        make_role({"r": faulty.Raises()}).score(latents, BAD)


def test_latents_that_are_not_finite_are_blamed_on_themselves(latents: Tensor, tmp_path: Path) -> None:
    latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(RewardFailure, match=r"decoder.*'a dog on a hill': the decoded image is not finite"):
        make_role({"good": faulty.Good()}, failures_dir=tmp_path).value_and_grad(latents, PROMPTS)
    assert list(tmp_path.glob("decoder-*/sample.safetensors"))


def test_a_failure_survives_pickling() -> None:
    failure = RewardFailure("r", "a prompt", "a reason", "OUT/failures/x")
    copy = pickle.loads(pickle.dumps(failure))
    assert (str(copy), copy.saved) == (str(failure), "OUT/failures/x")


def test_a_reward_without_gradient_is_measured_but_does_not_train(latents: Tensor) -> None:
    role = make_role({"measured": faulty.Measured()})
    assert role.score(latents, PROMPTS)["measured"].shape == (4,)
    with pytest.raises(UsageError, match=r"'measured' has no gradient"):
        role.value_and_grad(latents, PROMPTS)


def test_everything_is_frozen_and_in_eval_mode(clip_folder: str) -> None:
    reward = registry.reward("pickscore", model=clip_folder).train()
    make_role({"pick": reward})
    assert not reward.training
    assert not any(p.requires_grad for p in reward.parameters())
