"""Facts of a small world scattered in a long text, and a question about where things are now (BABILong's setting,
arXiv 2406.10149; the stories, names and sentences here are our own, not bAbI's).

A story is a list of sentences whose order matters, a question, and which sentence decides it last. `FactsTask` lets
them into the sentences of a text source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from irope_jax.core.config import ConfigError, nearest
from irope_jax.data.sources import Corpus, SourceSpec
from irope_jax.data.text_tasks.sample import Metric, TextSample, TextTask
from irope_jax.data.text_tasks.words import sentences
from irope_jax.data.tokenizer import TokenizerSpec

PEOPLE = ("Agnes", "Basil", "Cora", "Denis")
PLACES = ("library", "orchard", "cellar", "bakery", "courtyard", "greenhouse")
THINGS = ("lantern", "teapot", "violin", "compass")
SIDES = ("north", "south", "east", "west")
COUNTS = ("none", "one", "two", "three", "four")
PROMPT = (
    "Somewhere in the text below, sentences that do not belong to it tell where {people} go, what they carry, or how "
    "places lie. Later sentences hold over earlier ones. Answer the question at the end {how}.\n\n{text}\n\n"
    "Question: {question}\nAnswer:"
)


@dataclass(frozen=True)
class Story:
    """Facts and a question about them.

    Attributes:
      facts: sentences in order.
      decisive: index of the last sentence that is needed.
      question: what is asked.
      answers: all of them are to be said.
      labels: what could be said.
    """

    facts: tuple[str, ...]
    decisive: int
    question: str
    answers: tuple[str, ...]
    labels: tuple[str, ...]


class World:
    """People who walk, take and leave things; remembers what was told and which sentence told it."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.facts = rng, []
        self.place: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.moved: dict[str, int] = {}
        self.touched: dict[str, int] = {}

    def pick(self, options):
        return options[self.rng.integers(len(options))]

    def walk(self, person: str) -> None:
        self.place[person] = self.pick([place for place in PLACES if place != self.place.get(person)])
        self.moved[person] = len(self.facts)
        self.facts.append(f"{person} walked to the {self.place[person]}.")

    def take(self, person: str, thing: str) -> None:
        self.holder[thing], self.touched[thing] = person, len(self.facts)
        self.facts.append(f"{person} picked up the {thing}.")

    def leave(self, thing: str) -> None:
        person = self.holder.pop(thing)
        self.touched[thing] = len(self.facts)
        self.facts.append(f"{person} put down the {thing}.")

    def held(self, person: str) -> list[str]:
        return [thing for thing in THINGS if self.holder.get(thing) == person]

    def step(self) -> None:
        """One thing happens: half of the time someone walks."""
        free = [thing for thing in THINGS if thing not in self.holder]
        chance, present = self.rng.random(), list(self.place)
        if chance < 0.5 or not present or (chance < 0.8 and not free) or (chance >= 0.8 and not self.holder):
            self.walk(self.pick(PEOPLE))
        elif chance < 0.8:
            self.take(self.pick(present), self.pick(free))
        else:
            self.leave(self.pick(list(self.holder)))

    def story(self, decisive: int, question: str, answers, labels) -> Story:
        return Story(tuple(self.facts), decisive, question, tuple(answers), tuple(labels))


def one_fact(rng: np.random.Generator, count: int) -> Story:
    """Where someone is: the last walk tells."""
    world = World(rng)
    for _ in range(count):
        world.walk(world.pick(PEOPLE))
    person = world.pick(list(world.place))
    return world.story(world.moved[person], f"Where is {person}?", [world.place[person]], PLACES)


def two_facts(rng: np.random.Generator, count: int) -> Story:
    """Where a thing is: who has it, and where that one went last."""
    world = World(rng)
    while len(world.facts) < count or not world.holder:
        world.step()
    thing = world.pick(list(world.holder))
    person = world.holder[thing]
    decisive = max(world.touched[thing], world.moved[person])
    return world.story(decisive, f"Where is the {thing}?", [world.place[person]], PLACES)


def yes_or_no(rng: np.random.Generator, count: int) -> Story:
    """Whether someone is somewhere; half of the answers are yes."""
    world = World(rng)
    for _ in range(count):
        world.walk(world.pick(PEOPLE))
    person, truth = world.pick(list(world.place)), bool(rng.integers(2))
    place = world.place[person]
    asked = place if truth else world.pick([other for other in PLACES if other != place])
    answer = "yes" if truth else "no"
    return world.story(world.moved[person], f"Is {person} in the {asked}?", [answer], ("yes", "no"))


def counting(rng: np.random.Generator, count: int) -> Story:
    """How many things someone carries."""
    world = World(rng)
    for _ in range(count):
        world.step()
    person = world.pick(list(world.place))
    own = [i for i, fact in enumerate(world.facts) if fact.startswith(person)]
    number = COUNTS[len(world.held(person))]
    return world.story(own[-1], f"How many things does {person} carry?", [number], COUNTS)


def carrying(rng: np.random.Generator, count: int) -> Story:
    """Which things someone carries, at least one."""
    world = World(rng)
    while len(world.facts) < count or not world.holder:
        world.step()
    person = world.pick(sorted(set(world.holder.values())))
    own = [i for i, fact in enumerate(world.facts) if fact.startswith(person)]
    return world.story(own[-1], f"What does {person} carry?", world.held(person), THINGS)


def directions(rng: np.random.Generator, count: int) -> Story:
    """Which place lies on a side of another: one sentence among many tells; there are at most ten."""
    pairs = [(place, side) for place in PLACES[:3] for side in SIDES]
    order = [pairs[i] for i in rng.permutation(len(pairs))][: min(count, 10)]
    told = [(PLACES[rng.integers(3, len(PLACES))], side, place) for place, side in order]
    decisive = int(rng.integers(len(told)))
    there, side, place = told[decisive]
    facts = tuple(f"The {a} lies to the {s} of the {b}." for a, s, b in told)
    return Story(facts, decisive, f"What lies to the {side} of the {place}?", (there,), PLACES)


STORIES: dict[str, Callable[[np.random.Generator, int], Story]] = {
    "one_fact": one_fact,
    "two_facts": two_facts,
    "yes_or_no": yes_or_no,
    "counting": counting,
    "carrying": carrying,
    "directions": directions,
}


@dataclass(frozen=True)
class FactsTask(TextTask):
    """A story scattered in a text. Units are sentences of the text, from a random place of it.

    A depth is that of the decisive sentence; what was told before it stands before it.

    Attributes:
      name: which story, a key of `STORIES`.
      facts: sentences of the story, about.
      source: the text.
    """

    name: str = "one_fact"
    facts: int = 10
    source: SourceSpec = Corpus("test")

    new_tokens: ClassVar[int] = 16
    metric: ClassVar[Metric] = "labels"
    has_depth: ClassVar[bool] = True

    def __post_init__(self):
        if self.name not in STORIES:
            raise ConfigError("name", self.name, nearest(self.name, STORIES))
        if self.facts < 1:
            raise ConfigError("facts", self.facts, "a story has at least one sentence")

    def make(
        self, rng: np.random.Generator, units: int, length: int, depth: float | None, tokenizer: TokenizerSpec
    ) -> TextSample:
        story = STORIES[self.name](rng, self.facts)
        count = len(story.facts)
        at = np.sort(rng.random(count))
        if depth is not None:
            before, after = rng.random(story.decisive), rng.random(count - story.decisive - 1)
            at = np.concatenate([np.sort(before) * depth, [depth], depth + np.sort(after) * (1 - depth)])
        told = sentences(self.source)
        start = int(rng.integers(len(told)))
        text, last = [], 0
        for fact, place in zip(story.facts, (at * units).astype(int)):
            text += [*(told[(start + i) % len(told)] for i in range(last, place)), fact]
            last = place
        text += [told[(start + i) % len(told)] for i in range(last, units)]
        how = "with one or more words" if self.name == "carrying" else "with one word"
        people = ", ".join(PEOPLE[:-1]) + " and " + PEOPLE[-1]
        prompt = PROMPT.format(people=people, how=how, text=" ".join(text), question=story.question)
        return TextSample(prompt, story.answers, story.labels, story.question)
