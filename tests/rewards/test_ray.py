"""The reward role behind a Ray actor: the numbers of the same process, and failures that keep their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_t2i.cluster.clients import Limit, get
from rlhf_t2i.plugins import registry
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.reward_failure import RewardFailure
from tests.limits import HANG_S
from tests.rewards import builders, faulty
from tests.rewards.test_role import BAD, PROMPTS, Decoder

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Holder:
    """An actor that builds its own rewards, as a worker does."""

    def __init__(self, clip_folder: str, failures: Path) -> None:
        self.rewards = {"pick": registry.reward("pickscore", model=clip_folder), "picky": faulty.NotFinite()}
        self.failures = failures

    def value_and_grad(
        self, trained: str, micro_batch: int | None, latents: torch.Tensor, prompts: list[str]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        role = RewardRole(
            self.rewards, Decoder(), device=torch.device("cpu"), micro_batch=micro_batch, failures_dir=self.failures,
            trained=[trained],
        )  # fmt: skip
        return role.value_and_grad(latents, prompts)


def test_through_ray_the_numbers_are_the_same_and_failures_keep_their_names(
    ray_for_rewards: None, tmp_path: Path
) -> None:
    import ray

    folder = str(builders.write_clip(tmp_path / "clip"))
    latents = torch.randn(4, 4, 9, 9, generator=torch.Generator().manual_seed(3))
    here = Holder(folder, tmp_path / "failures").value_and_grad("pick", None, latents, PROMPTS)["pick"]
    actor = ray.remote(Holder).remote(folder, tmp_path / "failures")
    for micro_batch in (None, 1):
        (there,) = get([actor.value_and_grad.remote("pick", micro_batch, latents, PROMPTS)], Limit(HANG_S), "reward")
        for ours, theirs in zip(here, there["pick"], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
        with pytest.raises(RewardFailure) as caught:
            get([actor.value_and_grad.remote("picky", micro_batch, latents, BAD)], Limit(HANG_S), "reward")
        assert (caught.value.reward, caught.value.prompt) == ("picky", "bad")
        assert Path(str(caught.value.saved)).is_dir()
    ray.kill(actor)
