"""Operators on meta tensors that are not called again: the counts stay, and views and promotions are not remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from rlhf_t2i.families import counting, layouts
from rlhf_t2i.families.frozen import freeze_convs
from rlhf_t2i.families.recomputing import checkpoint_layers
from tests import tiny

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_known", {})


@pytest.mark.parametrize("prepare", [nn.Module.train, freeze_convs, checkpoint_layers])
def test_counts_are_those_of_calling_every_operator(
    prepare: Callable[[nn.Module], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny.sdxl_unet().to("meta")
    prepare(network)

    def call() -> tuple[Tensor, Tensor]:
        with torch.device("meta"):
            x = torch.empty(1, *tiny.LATENTS, requires_grad=True)
            cond = {"text_embeds": torch.empty(1, tiny.WIDTH), "time_ids": torch.zeros(1, 6)}
            return x, network(x, torch.empty(1), torch.empty(1, 77, 2 * tiny.WIDTH), added_cond_kwargs=cond)[0]

    def counts() -> tuple[int, int]:
        return counting.flops(call), counting.peak(network, call)

    remembered = counts()
    assert layouts._known
    monkeypatch.setattr(layouts, "run", lambda func, args, kwargs: func(*args, **kwargs))
    assert counts() == remembered


def run(func: torch._ops.OpOverload, *args: object, **kwargs: object) -> object:
    return layouts.run(func, args, kwargs)


def test_a_layout_that_recurs_gives_a_tensor_of_its_own() -> None:
    x = torch.empty(2, 3, 4, 4, device="meta").to(memory_format=torch.channels_last)
    first, second = run(aten.relu.default, x), run(aten.relu.default, x)
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    assert second.is_contiguous(memory_format=torch.channels_last)
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_none_among_several_results_stays_none() -> None:
    x, weight = torch.empty(1, 2, 4, 4, device="meta"), torch.empty(2, 2, 1, 1, device="meta")
    args = (x, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False])
    for _ in range(2):
        found = run(aten.convolution_backward.default, *args)
        assert isinstance(found, tuple)
        assert found[0].shape == x.shape
        assert found[1:] == (None, None)


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.view.default, (torch.empty(4, device="meta"), [2, 2]), {}),
        (aten.relu_.default, (torch.empty(4, device="meta"),), {}),
        (aten.add.Tensor, (torch.empty(4, device="meta", dtype=torch.int64), torch.tensor(1.5)), {}),
        (aten.relu.default, (torch.empty(4),), {}),
    ],
    ids=["a view", "written in place", "a tensor without dimensions", "a tensor with values"],
)
def test_other_operators_are_always_called(
    func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> None:
    layouts.run(func, args, kwargs)
    assert not layouts._known


def test_numbers_of_other_types_are_told_apart() -> None:
    """1 == 1.0 == True to a dictionary, but not to type promotion."""
    x = torch.empty(4, device="meta", dtype=torch.int64)
    dtypes = [getattr(run(aten.add.Scalar, x, number), "dtype") for number in (1, 1.0, True)]  # noqa: B009
    assert dtypes == [torch.int64, torch.float32, torch.int64]
