"""Batch and placement arithmetic: what is accepted, and that the proposed fixes are."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.placement import batch_geometry, check_placement, nearest_partner
from rlhf_t2i.recipe.schema import Recipe


@pytest.mark.parametrize(
    ("batch", "ranks", "micro", "expected"),
    [
        (128, 8, 2, (2, 8)),
        (128, 8, None, (16, 1)),
        (1, 1, 1, (1, 1)),
        (1, 1, None, (1, 1)),
        (12, 3, 4, (4, 1)),
        (7, 1, None, (7, 1)),
    ],
)
def test_batches_that_divide(batch: int, ranks: int, micro: int | None, expected: tuple[int, int]) -> None:
    assert batch_geometry(batch, ranks, micro) == expected


@settings(max_examples=300, deadline=None, derandomize=True)
@given(batch=st.integers(1, 300), ranks=st.integers(1, 20), micro=st.none() | st.integers(1, 40))
def test_the_split_is_exact_or_the_proposed_fixes_work(batch: int, ranks: int, micro: int | None) -> None:
    try:
        size, accumulation = batch_geometry(batch, ranks, micro)
    except UsageError as error:
        text = str(error)
        assert all(str(number) in text for number in (batch, ranks, *([micro] if micro else [])))
        for proposed in re.search(r"use batch_size (\d+)(?: or (\d+))?", text).groups():  # type: ignore[union-attr]
            if proposed:
                batch_geometry(int(proposed), ranks, micro)
        smaller = re.search(r"or micro_batch (\d+)", text)
        if smaller:
            batch_geometry(batch, ranks, int(smaller[1]))
    else:
        assert size * accumulation * ranks == batch
        assert micro is None or size == micro


def recipe(groups: dict[str, Any] | str, rewards: tuple[str, ...] = (), **optimization: Any) -> Recipe:
    placement = groups if isinstance(groups, str) else {"groups": groups}
    return Recipe.model_validate(
        {
            "steps": 1,
            "models": {"reference": "a/b", "generator": "a/b"},
            "data": {"prompts": "p"},
            "algorithm": {"rewards": [{"name": "clip", "label": label} for label in rewards]},
            "placement": placement,
            "optimization": {"batch_size": 48, **optimization},
        }
    )


FOUR = ["assistant", "reference", "reward", "generator"]


def test_one_group_by_default() -> None:
    default = Recipe.model_validate(recipe("ray").model_dump())
    assert check_placement(default) == dict.fromkeys(("learner", "generator", "assistant", "reference"), ("all", 1))


def test_local_ignores_groups() -> None:
    placed = check_placement(recipe("local", rewards=("x",)))
    assert set(placed.values()) == {("local", 1)}
    assert "reward:x" in placed


def test_rewards_split_over_groups() -> None:
    placed = check_placement(
        recipe(
            {"a": {"devices": 4, "roles": ["learner", "assistant"]}, "b": {"roles": ["reference", "reward"]},
             "c": {"devices": 2, "roles": ["reward:y"]}},
            rewards=("x", "y", "z"),
        )
    )  # fmt: skip
    assert placed["reward:x"] == placed["reward:z"] == ("b", 1)
    assert placed["reward:y"] == ("c", 2)
    assert placed["generator"] == ("a", 4), "an unplaced generator shares the learner's processes"


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"a": {"roles": ["leaner", *FOUR]}}, ["'leaner'", "did you mean 'learner'"]),
        ({"a": {"roles": ["learner", *FOUR, "reward:pik"]}}, ["did you mean 'reward:pick'"]),
        ({"a": {"roles": ["learner", *FOUR]}, "b": {"roles": ["assistant"]}}, ["'assistant'", "in 'a' too"]),
        ({"a": {"roles": ["learner", "learner", *FOUR]}}, ["'learner'", "twice"]),
        ({"a": {"roles": FOUR}}, ["'learner'"]),
        ({"a": {"roles": ["learner", "assistant", "reward"]}}, ["'reference'"]),
        ({"a": {"roles": ["learner", "assistant", "reference"]}}, ["'reward:pick'"]),
        ({"a": {"devices": 2, "roles": ["learner"]}, "b": {"devices": 3, "roles": FOUR}}, ["3", "2", "divide"]),
        ({"a": {"devices": 5, "roles": ["learner"]}, "b": {"roles": FOUR}}, ["batch_size 48", "learner ranks 5"]),
        ({"a": {"devices": 1, "roles": ["learner"]}, "b": {"devices": 5, "roles": FOUR}}, ["assistant ranks 5"]),
    ],
)
def test_bad_placements(groups: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        check_placement(recipe(groups, rewards=("pick",)))
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("stage", "assistants", "accepted"), [(3, 2, False), (3, 4, True), (3, 8, True), (3, 1, True), (2, 2, True)]
)
def test_zero_3_assistants_serve_no_two_learners_each(stage: int, assistants: int, accepted: bool) -> None:
    """Their forwards are collective, so calls of different learners would meet in different orders."""
    groups = {"a": {"devices": 4, "roles": ["learner"]}, "b": {"devices": assistants, "roles": FOUR}}
    asked = recipe(groups, zero_stage=stage)
    if accepted:
        check_placement(asked)
    else:
        with pytest.raises(UsageError, match=r"ZeRO-3 .* 2 ranks .* 4 learner ranks: give it 4 devices"):
            check_placement(asked)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(learner=st.integers(1, 64), ranks=st.integers(1, 64))
def test_the_nearest_partner_divides(learner: int, ranks: int) -> None:
    found = nearest_partner(learner, ranks)
    assert max(found, learner) % min(found, learner) == 0
    fits = [n for n in range(1, 200) if max(n, learner) % min(n, learner) == 0]
    assert abs(found - ranks) == min(abs(n - ranks) for n in fits)
