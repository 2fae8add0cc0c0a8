"""The calls of one training step as a graph: who calls whom, and what waits for what.

This is the order in which ``training/loop.py``, ``roles/learner.py`` and ``roles/assistant.py`` make their calls; where
they change, :data:`NOW` changes with them. Every call stands for all devices of its group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhf_t2i.tools.planning.simulation import Call, Kind

After = tuple[str, ...]
HOP, TEXT = "calls between groups", "text encoders"
"""Roles of what no role of the recipe does."""


@dataclass(frozen=True)
class Rules:
    """Which calls the code lets overlap.

    Attributes:
        rewards_beside_denoisers: Rewards in the learner's own group run while denoisers elsewhere work.
        next_micro_batch: The learner draws the next micro-batch, and asks for its predictions, while the last one's
            products are on their way.
        draws_ahead: The generator draws the assistant's next samples while the assistant trains on the last ones.
        first_draw: The learner draws its first micro-batch, and rewards score it, while the assistant trains for the
            last time of a step; with draws_ahead, whose samples come first.
    """

    rewards_beside_denoisers: bool = True
    next_micro_batch: bool = False
    draws_ahead: bool = False
    first_draw: bool = False

    def under(self, stage: int) -> Rules:
        """Under ZeRO-3 every drawing gathers weights from all ranks, which must see the calls in one order."""
        if stage < 3:
            return self
        return replace(self, next_micro_batch=False, draws_ahead=False, first_draw=False)


NOW = Rules(True, True, True, True)
"""What the code does: everything that keeps the numbers of the serial order."""


@dataclass(frozen=True)
class Trained:
    """What a trained role does besides its passes, on one of its devices.

    Attributes:
        micro_batches: Per update.
        reduce: Seconds in which the devices exchange gradients after every micro-batch.
        beside: Seconds of every micro-batch's collectives that the computation hides, as far as it lasts.
        finish: After the last micro-batch: (name, kind, seconds), one after the other.
    """

    micro_batches: int
    reduce: float = 0.0
    beside: float = 0.0
    finish: Sequence[tuple[str, Kind, float]] = ()


@dataclass(frozen=True)
class Lesson:
    """The lesson of a reward that learns, before each generator update.

    Attributes:
        role: ``reward:LABEL``.
        group: Of the reward.
        draw: Seconds of drawing its samples.
        learn: Seconds of decoding and learning from them.
    """

    role: str
    group: str
    draw: float
    learn: float


@dataclass(frozen=True)
class Shape:
    """A step's calls: where, how many, and how long each takes for one micro-batch on a device of its group.

    Attributes:
        groups: The group of learner, generator, assistant and reference.
        assistant, learner: The trained roles.
        rounds: Assistant updates per step.
        sample: Drawing the assistant's samples.
        train: The assistant's forward and backward.
        draw: The learner's forward.
        backward: The learner's backward.
        predict: Forwards of assistant and reference.
        product: Their vector-Jacobian products.
        score: By group, (role, seconds) of decoder and rewards, forward and backward.
        encode: By group, encoding the prompts of a micro-batch of the assistant's update, and of the learner's.
        hop: Of sending a call to another group, and of its answer.
        lessons: Of rewards that learn.
    """

    groups: Mapping[str, str]
    assistant: Trained
    learner: Trained
    rounds: int
    sample: float
    train: float
    draw: float
    backward: float
    predict: Mapping[str, float]
    product: Mapping[str, float]
    score: Mapping[str, Sequence[tuple[str, float]]] = field(default_factory=dict)
    encode: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {})
    hop: float = 0.0
    lessons: Sequence[Lesson] = ()


def step(shape: Shape, rules: Rules = NOW) -> list[Call]:
    """All calls of a step in order of precedence: lessons and the assistant's updates, then the generator's."""
    graph = _Graph(shape, rules)
    done, taught = graph.lessons()
    before = done
    for number in range(shape.rounds):
        before, done = done, graph.assistant_update(f"assistant {number}", done)
    graph.generator_update("generator", (*done, *taught), before)
    return graph.calls


def assistant_update(shape: Shape, rules: Rules = NOW) -> list[Call]:
    """The calls of one assistant update alone, as in the warm-up."""
    graph = _Graph(shape, rules)
    graph.assistant_update("assistant", ())
    return graph.calls


class _Graph:
    """The calls so far. Its methods return the names that the next call waits for."""

    def __init__(self, shape: Shape, rules: Rules) -> None:
        self._shape, self._rules = shape, rules
        self.calls: list[Call] = []

    def lessons(self) -> tuple[After, After]:
        """The last drawing of samples for lessons, for which the assistant's updates wait; and the lessons."""
        drawn, taught, drawn_at = After(), After(), self._shape.groups["generator"]
        for lesson in self._shape.lessons:
            at = f"assistant, lesson of {lesson.role}"
            drawn = self._add(f"{at}: sample", "generator", drawn_at, lesson.draw, drawn)
            ready = self._hop(f"{at}: samples", drawn_at, lesson.group, drawn)
            taught += self._add(f"{at}: learn", lesson.role, lesson.group, lesson.learn, ready)
        return drawn, taught

    def assistant_update(self, name: str, after: After) -> After:
        """Samples are drawn, the assistant learns to denoise them."""
        shape, done = self._shape, after
        home, drawn_at = shape.groups["assistant"], shape.groups["generator"]
        for number in range(shape.assistant.micro_batches):
            at = f"{name}.{number}"
            # Theta is the same in all rounds of a step.
            asked = () if self._rules.draws_ahead else done
            # An assistant elsewhere encodes the prompts meanwhile.
            again = self._encode(f"{at}: encode again", 0, home, done) if home != drawn_at else ()
            ready = self._hop(f"{at}: ask for samples", home, drawn_at, asked)
            ready = self._encode(f"{at}: encode", 0, drawn_at, ready)
            ready = self._add(f"{at}: sample", "generator", drawn_at, shape.sample, ready)
            ready = (*self._hop(f"{at}: samples", drawn_at, home, ready), *again)
            done = self._micro_batch(at, "assistant", shape.assistant, shape.train, (*ready, *done))
        return self._finish(name, "assistant", shape.assistant, done)

    def generator_update(self, name: str, after: After, last_round: After) -> After:
        """Micro-batch by micro-batch: draw, ask rewards and denoisers, go backward; then the update.

        Args:
            name: Of the update.
            after: Ends with the last assistant update.
            last_round: Ends with what that update waited for.
        """
        shape, done, predicted, before = self._shape, after, after, after
        home = shape.groups["learner"]
        for number in range(shape.learner.micro_batches):
            at = f"{name}.{number}"
            # While the last products are on their way, one micro-batch ahead: the graphs of two are alive.
            free = (*predicted, *before) if self._rules.next_micro_batch else done
            begun = not number and self._rules.first_draw and home != shape.groups["assistant"]
            begun = begun and not shape.lessons  # the rewards score after their lessons
            if begun:
                free = last_round
            drawn = self._encode(f"{at}: encode", 1, home, free)
            drawn = self._add(f"{at}: draw", "learner", home, shape.draw, drawn)
            predicted, answers = self._answers(at, drawn, after, begun)
            before = done
            done = self._micro_batch(at, "learner", shape.learner, shape.backward, (*answers, *done))
        return self._finish(name, "learner", shape.learner, done)

    def _late(self, group: str, begun: bool) -> bool:
        """Whether the rewards of a group elsewhere are asked after the prediction of its only denoiser.

        Of an update that began while the assistant trained, only those that share its devices.
        """
        shape = self._shape
        assistant, reference = (shape.groups[role] == group for role in ("assistant", "reference"))
        return group != shape.groups["learner"] and assistant != reference and (assistant or not begun)

    def _answers(self, at: str, asked: After, trained: After, begun: bool) -> tuple[After, After]:
        """The predictions of one micro-batch; and gradients of rewards and products of denoisers."""
        shape, home = self._shape, self._shape.groups["learner"]
        denoisers = [role for role in ("assistant", "reference") if shape.groups[role] != home]
        beside = self._rules.rewards_beside_denoisers and bool(denoisers)
        arrived = {
            group: self._hop(f"{at}: ask {group}", home, group, asked)
            for group in dict.fromkeys([*shape.score, *shape.groups.values()])
        }
        encoded = {}
        for group in dict.fromkeys([*shape.score, *(shape.groups[role] for role in ("assistant", "reference"))]):
            again = group != home
            encoded[group] = self._encode(f"{at}: encode, {group}", 1, group, arrived[group]) if again else asked
        scores = After()
        for group in shape.score:
            if (group != home and not self._late(group, begun)) or (group == home and beside):
                scores += self._score(at, group, encoded[group])
        predictions = After()
        for role in ("assistant", "reference"):
            where = shape.groups[role]
            ready = (*encoded[where], *trained)
            ready = self._add(f"{at}: predict, {role}", role, where, shape.predict[role], ready)
            predictions += self._hop(f"{at}: prediction, {role}", where, home, ready)
            if where in shape.score and self._late(where, begun):
                scores += self._score(at, where, ready)
        products = After()
        for role in ("assistant", "reference"):
            where = shape.groups[role]
            ready = self._hop(f"{at}: ask product, {role}", home, where, predictions)
            ready = self._add(f"{at}: product, {role}", role, where, shape.product[role], ready)
            products += self._hop(f"{at}: product back, {role}", where, home, ready)
        if home in shape.score and not beside:
            scores += self._score(at, home, products)
        return predictions, scores + products

    def _score(self, at: str, group: str, ready: After) -> After:
        for role, seconds in self._shape.score[group]:
            ready = self._add(f"{at}: {role}, {group}", role, group, seconds, ready)
        return self._hop(f"{at}: scores, {group}", group, self._shape.groups["learner"], ready)

    def _micro_batch(self, at: str, role: str, trained: Trained, seconds: float, ready: After) -> After:
        """The pass that makes gradients, and the exchange of them."""
        group = self._shape.groups[role]
        done = self._add(f"{at}: backward", role, group, seconds, ready)
        if trained.beside:
            done += self._add(f"{at}: collectives", role, group, trained.beside, ready, "communication", link=True)
        return self._add(f"{at}: reduce", role, group, trained.reduce, done, "communication")

    def _finish(self, name: str, role: str, trained: Trained, done: After) -> After:
        for what, kind, seconds in trained.finish:
            done = self._add(f"{name}: {what}", role, self._shape.groups[role], seconds, done, kind)
        return done

    def _encode(self, name: str, phase: int, group: str, after: After) -> After:
        """Every process encodes a prompt once: its roles share what is cached."""
        return self._add(name, TEXT, group, self._shape.encode[phase].get(group, 0.0), after)

    def _hop(self, name: str, source: str, target: str, after: After) -> After:
        seconds = self._shape.hop if source != target else 0.0
        return self._add(name, HOP, None, seconds, after, "communication")

    def _add(
        self,
        name: str,
        role: str,
        group: str | None,
        seconds: float,
        after: After,
        kind: Kind = "compute",
        link: bool = False,
    ) -> After:
        """Add a call; one that takes no time is left out, and whoever waits for it waits for what it waits for."""
        if not seconds:
            return after
        self.calls.append(Call(name, role, group, seconds, tuple(dict.fromkeys(after)), kind, link))
        return (name,)
