"""The graph of a step and its simulation against schedules worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_t2i.tools.planning import graph
from rlhf_t2i.tools.planning.graph import NOW, Lesson, Rules, Shape, Trained
from rlhf_t2i.tools.planning.simulation import Call, Timeline, simulate, without_communication

SERIAL, SOME = Rules(rewards_beside_denoisers=False), Rules()
APART = {"learner": "train", "generator": "train", "assistant": "serve", "reference": "serve"}
SHAPE = Shape(
    groups=APART,
    assistant=Trained(3),
    learner=Trained(2),
    rounds=1,
    sample=2,
    train=3,
    draw=2,
    backward=3,
    predict={"assistant": 1, "reference": 2},
    product={"assistant": 1, "reference": 2},
    score={"train": [("decoder", 3), ("reward:r", 1)]},
)
TOGETHER = replace(SHAPE, groups=dict.fromkeys(APART, "all"), score={"all": SHAPE.score["train"]})


def times(timeline: Timeline) -> dict[str, tuple[float, float]]:
    return {span.call.name: (span.start, span.end) for span in timeline.spans}


def generator(shape: Shape, rules: Rules) -> dict[str, tuple[float, float]]:
    return times(simulate(graph.step(replace(shape, rounds=0), rules)))


def test_a_device_takes_what_is_ready_and_listed_first() -> None:
    calls = [
        Call("a", "x", "one", 2.0),
        Call("late", "x", "one", 1.0, ("far",)),
        Call("early", "y", "one", 3.0),
        Call("far", "y", "two", 3.0),
        Call("beside", "y", "one", 10.0, kind="communication", link=True),
        Call("wait", "y", None, 4.0, ("a",)),
        Call("free", "y", None, 4.0, ("a",)),
    ]
    found = simulate(calls)
    # When "a" ends "late" still waits for "far", so "early" runs to its end.
    assert times(found) == {
        "a": (0, 2), "far": (0, 3), "early": (2, 5), "late": (5, 6), "beside": (0, 10), "wait": (2, 6), "free": (2, 6)
    }  # fmt: skip
    assert found.seconds == 10
    assert found.busy() == {("one", "x"): 3, ("one", "y"): 3, ("two", "y"): 3}
    assert found.idle() == {"one": pytest.approx(0.4), "two": pytest.approx(0.7)}
    assert simulate(without_communication(calls)).seconds == 6


def test_groups_that_compute_at_once_slow_each_other_down() -> None:
    """Twice as long together: of 4 and 3 the first half together ends at 6, what is left of the 4 is 1 alone."""
    calls = [
        Call("a", "x", "one", 4.0),
        Call("b", "y", "two", 3.0),
        Call("sent", "y", "two", 2.0, ("b",), kind="communication"),
        Call("away", "y", None, 5.0),
    ]
    found = simulate(calls, lambda groups: float(len(groups)))
    assert times(found) == {"a": (0, 7), "b": (0, 6), "sent": (6, 8), "away": (0, 5)}
    assert found.busy() == {("one", "x"): 7, ("two", "y"): 6}
    assert times(simulate(calls)) == {"a": (0, 4), "b": (0, 3), "sent": (3, 5), "away": (0, 5)}


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([Call("a", "x", "g", 1), Call("a", "x", "g", 1)], "one name"),
        ([Call("a", "x", "g", 1, ("b",))], "'a' waits for 'b'"),
        ([Call("a", "x", "g", 1, ("b",)), Call("b", "x", "g", 1, ("a",))], "waits for itself"),
    ],
)
def test_graphs_that_cannot_run_are_refused(calls: list[Call], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simulate(calls)


@pytest.mark.parametrize("rules", [SERIAL, SOME, NOW], ids=["serial", "some", "all"])
def test_one_group_does_one_call_after_the_other(rules: Rules) -> None:
    """Nothing overlaps, and nothing waits, whatever the rules allow."""
    found = simulate(graph.step(TOGETHER, rules))
    assert found.seconds == 3 * (2 + 3) + 2 * (2 + 3 + 3 + 4 + 3)
    assert found.idle() == {"all": pytest.approx(0)}


def test_rewards_of_the_learners_group_wait_for_the_denoisers() -> None:
    """Draw 2; forwards 1 + 2 and products 1 + 2 elsewhere; rewards 4; backward 3: 15 for each of two micro-batches."""
    found = generator(SHAPE, SERIAL)
    assert found["generator.0: draw"] == (0, 2)
    assert found["generator.0: predict, reference"] == (3, 5)
    assert found["generator.0: product, assistant"] == (5, 6)
    assert found["generator.0: decoder, train"] == (8, 11)
    assert found["generator.0: reward:r, train"] == (11, 12)
    assert found["generator.0: backward"] == (12, 15)
    assert found["generator.1: backward"] == (27, 30)


def test_rewards_run_beside_denoisers_elsewhere() -> None:
    """6 of the denoisers hide the 4 of the rewards: 2 + 6 + 3 for each micro-batch."""
    found = generator(SHAPE, SOME)
    assert found["generator.0: decoder, train"] == (2, 5)
    assert found["generator.0: backward"] == (8, 11)
    assert found["generator.1: backward"] == (19, 22)


def test_the_next_micro_batch_is_drawn_while_products_come_back() -> None:
    found = generator(SHAPE, Rules(next_micro_batch=True))
    assert found["generator.0: reward:r, train"] == (5, 6)
    assert found["generator.1: draw"] == (6, 8)  # the predictions came at 5, the products come at 8
    assert found["generator.0: backward"] == (8, 11)
    assert found["generator.1: predict, assistant"] == (8, 9)
    assert found["generator.1: decoder, train"] == (11, 14)
    assert found["generator.1: product, reference"] == (12, 14)
    assert found["generator.1: backward"] == (15, 18)


def test_at_most_two_micro_batches_are_alive() -> None:
    """Where denoisers are slow the learner draws one ahead, not all."""
    slow = replace(SHAPE, learner=Trained(4), product={"assistant": 10, "reference": 10})
    found = generator(slow, NOW)
    for number in (2, 3):
        assert found[f"generator.{number}: draw"][0] >= found[f"generator.{number - 2}: backward"][1]


def test_samples_are_drawn_while_the_assistant_trains() -> None:
    """2 + 3 three times; ahead, all but the first drawing hide: also those of the next round."""
    two_rounds = replace(SHAPE, learner=Trained(0), rounds=2)
    assert simulate(graph.step(two_rounds, SOME)).seconds == 6 * (2 + 3)
    ahead = simulate(graph.step(two_rounds, NOW))
    assert ahead.seconds == 2 + 6 * 3
    assert times(ahead)["assistant 1.0: sample"] == (6, 8)
    assert simulate(graph.assistant_update(two_rounds, SOME)).seconds == 3 * (2 + 3)


def test_the_learners_first_micro_batch_is_drawn_while_the_assistant_trains() -> None:
    """Samples come first; predictions wait for the assistant's last update, which ends at 11, rewards do not."""
    ahead = Rules(draws_ahead=True, first_draw=True)
    found = times(simulate(graph.step(SHAPE, ahead)))
    assert found["assistant 0.2: sample"] == (4, 6)
    assert found["generator.0: draw"] == (6, 8)
    assert found["generator.0: decoder, train"] == (8, 11)
    assert found["generator.0: predict, assistant"] == (11, 12)
    assert found["generator.0: backward"] == (17, 20)
    later = simulate(graph.step(SHAPE, Rules(draws_ahead=True))).seconds
    assert simulate(graph.step(SHAPE, ahead)).seconds == later - 2
    assert graph.step(TOGETHER, Rules(first_draw=True)) == graph.step(TOGETHER, Rules())
    assert NOW.under(3) == replace(NOW, next_micro_batch=False, draws_ahead=False, first_draw=False)
    assert NOW.under(2) == NOW


def test_calls_between_groups_and_their_answers_take_time() -> None:
    """Samples: there and back. A micro-batch of the learner: forwards there and back, products there and back."""
    far = replace(SHAPE, hop=0.5)
    found = times(simulate(graph.step(far, SOME)))
    assert found["assistant 0.0: sample"] == (0.5, 2.5)
    assert found["assistant 0.0: backward"] == (3, 6)
    assert found["generator.0: draw"] == (18, 20)
    assert found["generator.0: predict, assistant"] == (20.5, 21.5)
    assert found["generator.0: product, assistant"] == (24.5, 25.5)
    assert found["generator.0: backward"] == (28, 31)
    together = replace(TOGETHER, hop=0.5)
    assert simulate(graph.step(together, SOME)).seconds == simulate(graph.step(TOGETHER, SOME)).seconds


def test_rewards_on_devices_of_their_own() -> None:
    alone = replace(SHAPE, score={"judge": SHAPE.score["train"]})
    found = simulate(graph.step(replace(alone, rounds=0), SOME))
    assert times(found)["generator.0: decoder, judge"] == (2, 5)
    assert found.seconds == 22
    assert found.idle() == {
        "train": pytest.approx(1 - 10 / 22), "judge": pytest.approx(1 - 8 / 22), "serve": pytest.approx(1 - 12 / 22)
    }  # fmt: skip


def test_rewards_beside_one_denoiser_elsewhere_follow_its_prediction() -> None:
    """The learner's reference, which takes 2, has both predictions at 2 instead of at 4 + 1."""
    split = replace(SHAPE, groups={**APART, "reference": "train"}, score={"serve": SHAPE.score["train"]})
    found = generator(split, SOME)
    assert found["generator.0: predict, assistant"] == (2, 3)
    assert found["generator.0: decoder, serve"] == (3, 6)
    assert found["generator.0: product, reference"] == (4, 6)
    # With the reference instead, and begun while the assistant trains, they come first: it has nothing else to do.
    other = replace(
        split, groups={**APART, "assistant": "mine", "reference": "serve"}, rounds=1, learner=Trained(1), hop=0.0
    )
    begun = times(simulate(graph.step(other, NOW)))
    assert begun["generator.0: reward:r, serve"][1] <= begun["generator.0: predict, reference"][0]
    later = generator(other, SOME)
    assert later["generator.0: predict, reference"][1] <= later["generator.0: decoder, serve"][0]


def test_an_assistant_elsewhere_encodes_while_its_samples_are_drawn() -> None:
    encode = ({"train": 1.0, "serve": 1.5}, {})
    found = times(simulate(graph.assistant_update(replace(SHAPE, encode=encode), SOME)))
    assert found["assistant.0: encode again"] == (0, 1.5)
    assert found["assistant.0: sample"] == (1, 3)
    assert found["assistant.0: backward"] == (3, 6)


def test_a_lesson_runs_beside_the_assistant_and_ends_before_the_generators_update() -> None:
    far = [Lesson("reward:r", "judge", draw=2, learn=5), Lesson("reward:s", "judge", draw=1, learn=20)]
    shape = replace(SHAPE, score={}, lessons=far)
    found = times(simulate(graph.step(shape, NOW)))
    assert found["assistant, lesson of reward:r: learn"] == (2, 7)
    assert found["assistant, lesson of reward:s: sample"] == (2, 3)
    assert found["assistant, lesson of reward:s: learn"] == (7, 27)
    assert found["assistant 0.0: sample"] == (3, 5)
    assert found["assistant 0.2: backward"] == (11, 14)
    assert found["generator.0: draw"] == (27, 29)  # not while the assistant trains: the reward scores what it learned
    together = replace(TOGETHER, lessons=[Lesson("reward:r", "all", draw=2, learn=5)])
    assert simulate(graph.step(together, NOW)).seconds == simulate(graph.step(TOGETHER, NOW)).seconds + 7


def test_gradients_are_exchanged_in_every_micro_batch_or_at_the_end() -> None:
    update = [("reduce", "communication", 4.0), ("update", "compute", 1.0)]
    often = replace(TOGETHER, learner=Trained(2, reduce=2.0, finish=update[1:]))
    once = replace(TOGETHER, learner=Trained(2, finish=update))
    plain = simulate(graph.step(TOGETHER, SOME)).seconds
    for shape in (often, once):
        calls = graph.step(shape, SOME)
        found = simulate(calls)
        assert found.seconds == plain + 5
        assert simulate(without_communication(calls)).seconds == plain + 1
        assert sum(found.busy("communication").values()) == 4


def test_collectives_beside_the_computation_show_only_where_they_are_longer() -> None:
    plain = simulate(graph.step(TOGETHER, SOME)).seconds
    for beside, longer in ((3.0, 0.0), (5.0, 2 * 2.0)):
        hidden = replace(TOGETHER, learner=Trained(2, beside=beside))
        assert simulate(graph.step(hidden, SOME)).seconds == plain + longer


def test_every_process_encodes_a_prompt_once() -> None:
    encode = ({"train": 1.0, "serve": 1.0}, {"train": 1.0, "serve": 1.0})
    found = simulate(graph.step(replace(SHAPE, encode=encode), SOME))
    # 1 in either group for each of the assistant's three micro-batches, and of the learner's two.
    assert found.busy()["train", graph.TEXT] == found.busy()["serve", graph.TEXT] == 5
    assert found.seconds == 3 * 6 + 2 * 13  # the assistant's encoding runs beside the generator's
    both = simulate(graph.step(replace(TOGETHER, encode=({"all": 1.0}, {"all": 1.0})), SOME))
    assert both.busy()["all", graph.TEXT] == 5
