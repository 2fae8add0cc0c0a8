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

    def __init__(self, clip_folder: str, micro_batch: int | None, failures: Path, trained: str) -> None:
        rewards = {"pick": registry.reward("pickscore", model=clip_folder), "picky": faulty.NotFinite()}
        self.role = RewardRole(
            rewards, Decoder(), device=torch.device("cpu"), micro_batch=micro_batch, failures_dir=failures,
            trained=[trained],
        )  # fmt: skip

    def value_and_grad(self, latents: torch.Tensor, prompts: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return self.role.value_and_grad(latents, prompts)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_through_ray_the_numbers_are_the_same_and_failures_keep_their_names(
    ray_for_rewards: None, tmp_path: Path, micro_batch: int | None
) -> None:
    import ray

    folder = str(builders.write_clip(tmp_path / "clip"))
    latents = torch.randn(4, 4, 9, 9, generator=torch.Generator().manual_seed(3))
    here = Holder(folder, None, tmp_path / "failures", "pick").value_and_grad(latents, PROMPTS)["pick"]
    actors = [ray.remote(Holder).remote(folder, micro_batch, tmp_path / "failures", name) for name in ("pick", "picky")]
    (there,) = get([actors[0].value_and_grad.remote(latents, PROMPTS)], Limit(HANG_S), "reward")
    for ours, theirs in zip(here, there["pick"], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    with pytest.raises(RewardFailure) as caught:
        get([actors[1].value_and_grad.remote(latents, BAD)], Limit(HANG_S), "reward")
    assert (caught.value.reward, caught.value.prompt) == ("picky", "bad")
    assert Path(str(caught.value.saved)).is_dir()
    for actor in actors:
        ray.kill(actor)
