"""The zoo's trainings on a GPU: no tensor is left on the CPU, and no step waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import pretended
from zoo import data, device, distill, latents, noise, reader, reference, training, vae


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The zoo computes on the pretended device."""
    monkeypatch.setattr(device, "DEVICE", pretended.DEVICE)
    monkeypatch.setattr(device, "autocast", nullcontext)
    data.load.cache_clear()
    with pretended.pretended_device():
        yield
    data.load.cache_clear()


def step(loss: Tensor) -> None:
    """The backward pass; nothing since the last call waited for the device."""
    loss.backward()
    assert pretended.WAITS == []
    assert loss.device == pretended.DEVICE
    assert torch.isfinite(loss.cpu())


def test_a_step_of_the_vae(elsewhere: None) -> None:
    world, model = data.load(), vae.build().to(device.DEVICE)
    vae.loss_fn(model, vae.batch(world, 0, 2))  # constants are sent once
    pretended.WAITS.clear()
    step(vae.loss_fn(model, vae.batch(world, 1, 2)))
    vae.balance(model.eval(), vae.batch(world, 2, 2))


def test_a_step_of_the_reader(elsewhere: None) -> None:
    world, model = data.load(), reader.Reader().to(device.DEVICE)
    reader.loss_fn(model, world, 0, 2)
    pretended.WAITS.clear()
    step(reader.loss_fn(model, world, 1, 2))
    found = reader.check(model.eval(), world, count=3)
    assert 0 < found["probability"] < 1


def test_a_step_of_the_reference_and_a_sample(elsewhere: None) -> None:
    world, modules = data.load(), reference.build().to(device.DEVICE)
    stored = latents.Latents(parts=[_shard(8)])
    reference.loss_fn(modules, stored, 0, 2)
    pretended.WAITS.clear()
    step(reference.loss_fn(modules, stored, 1, 2))
    with torch.no_grad():
        found = reference.sample(modules, [data.prompt(world.names[0], "red")], guidance=2.0, steps=2)
        pictures = reference.decode(vae.build().to(device.DEVICE), found)
    assert data.grid(pictures, 1).size == (data.SIZE + 2, data.SIZE + 2)


def test_a_step_of_the_warm_up_and_its_pictures(
    elsewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = reference.build().to(device.DEVICE)
    monkeypatch.setattr(distill, "teacher", lambda: modules)
    monkeypatch.setattr(data, "WORK", tmp_path)
    monkeypatch.setattr(data, "OUT", tmp_path)
    monkeypatch.setattr(distill, "SOLVER_STEPS", 1)
    monkeypatch.setattr(reader, "load", lambda: reader.Reader().to(device.DEVICE).eval())
    vae.build().save_pretrained(tmp_path / "reference/vae")
    distill.pairs(count=1, part=0, parts=1)
    stored, (embeds, pooled) = distill.stored_pairs(), distill.conditions(modules)
    assert len(stored["prompts"]) == 64
    distill.loss_fn(modules, stored, embeds, pooled, 0, 2)
    pretended.WAITS.clear()
    step(distill.loss_fn(modules, stored, embeds, pooled, 1, 2))
    found = distill.evaluate(modules["unet"], embeds, pooled, "few", each=2)
    assert found["held_out"]["pictures"] == 2


def test_a_shard_of_latents(elsewhere: None) -> None:
    whole = data.load()
    few = data.World(whole.drawings[:2], whole.names[:2])
    found = latents.shard(few, vae.build().to(device.DEVICE), 100, held_out=False)
    assert found["latents"].shape[1:] == (vae.CHANNELS, 16, 16)
    assert {tensor.device.type for tensor in found.values()} == {"cpu"}


def _shard(count: int) -> dict[str, Tensor]:
    return {
        "latents": torch.randn(count, vae.CHANNELS, 16, 16).half(),
        "prompts": torch.arange(count),
        "styles": torch.zeros(count, dtype=torch.long),
    }


def test_muon_updates_all_matrices_of_a_shape_at_once_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    directions = [torch.randn(shape) for shape in [(6, 4), (4, 2, 3, 3), (6, 4), (3, 9), (4, 2, 3, 3)]]
    one_by_one = training._updates(directions)
    monkeypatch.setattr(device, "on_cuda", lambda: True)
    at_once = training._updates(directions)
    for left, right, direction in zip(one_by_one, at_once, directions, strict=True):
        assert left.shape == right.shape == direction.flatten(1).shape
        torch.testing.assert_close(left, right, rtol=0.02, atol=0.02)


def test_a_training_that_diverges_stops_with_its_last_sound_average(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "WORK", tmp_path)
    modules = nn.ModuleDict({"line": nn.Linear(2, 1)})

    def loss(number: int) -> Tensor:
        out = modules["line"](torch.ones(1, 2)).square().mean()
        return out * float("nan") if number >= training.LOG_STEPS + 3 else out

    with pytest.raises(training.Diverged, match="toy diverged before step 50") as caught:
        training.train("toy", modules, loss, lr=1e-3, steps=100, constant=True)
    assert all(torch.isfinite(p).all() for p in caught.value.average.parameters())
    assert not all(torch.isfinite(p).all() for p in modules.parameters())


def test_the_average_has_no_history(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WORK", tmp_path)
    modules = nn.ModuleDict({"line": nn.Linear(2, 1)})
    average = training.train(
        "toy", modules, lambda _: modules["line"](torch.ones(1, 2)).square().mean(), lr=1e-3, steps=2
    )
    assert not any(p.requires_grad for p in average.parameters())


def test_noise_is_the_cpus_on_a_cpu() -> None:
    first = noise.timesteps(6, device.generator(3))
    generator = torch.Generator().manual_seed(3)
    place = (torch.arange(6) + torch.rand(6, generator=generator)) / 6
    assert torch.equal(first, (place * noise.STEPS).long()[torch.randperm(6, generator=generator)])
