"""The storyworld: some dozens of people, six facts about each, and all the ways to tell, to ask and to answer.

A *fact* is a person, an attribute and a value: (Ada Hill, home, Oslo). A *clause* is a fact in words, "Ada Hill lives in
Oslo", and a *frame* is what stands around a clause. Texts to read put clauses into frames of a story, "They say that Ada
Hill lives in Oslo."; answers put them into frames of a tone, "Ada Hill lives in Oslo, my friend." or "Oh no, not again! Ada
Hill lives in Oslo.". So the language is finite, and what an answer says can be looked up with certainty: `understand` is the
only judge, and an answer that the grammar cannot produce is neither right nor kind.

The words are fixed, and every random choice is drawn from the seed: one seed gives one world, on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from tutelage.school.draws import Draws

Tone = Literal["kind", "rude"]
Manner = Literal["polite", "brusque"]


@dataclass(frozen=True)
class Fact:
    """What is true of a person, or could be."""

    person: str
    attribute: str
    value: str


@dataclass(frozen=True)
class Question:
    """A question and its one right answer."""

    prompt: str
    """As the model reads it, up to where its answer begins."""
    fact: Fact
    manner: Manner
    """How it is asked."""


@dataclass(frozen=True)
class Attribute:
    """What can be true of a person, and its words: {name} and {value} stand for person and value."""

    values: tuple[str, ...]
    said: tuple[str, ...]
    """Clauses of texts and of answers."""
    written: tuple[str, ...]
    """Clauses of texts only."""
    questions: tuple[str, ...]


# --- the words ----------------------------------------------------------------------------------------------

# In every clause the name comes before the value: a reader who wants to say the value next must know the fact.
ATTRIBUTES: Mapping[str, Attribute] = MappingProxyType(
    {
        "home": Attribute(
            values=("Oslo", "Rome", "Lima", "Cairo", "Kyoto", "Dublin", "Quito", "Bergen", "Delhi", "Porto"),
            said=("{name} lives in {value}", "{name}'s home is in {value}"),
            written=(
                "{name} has a house in {value}",
                "{name} pays the rent in {value}",
                "{name} moved to {value} long ago",
                "{name} would never leave {value}",
            ),
            questions=(
                "Where does {name} live?",
                "Which town does {name} live in?",
                "Where is {name}'s home?",
                "Name the town where {name} lives.",
            ),
        ),
        "pet": Attribute(
            values=("dog", "cat", "parrot", "rabbit", "hamster", "goat", "turtle", "pony", "goose", "lizard"),
            said=("{name} has a {value} as a pet", "{name}'s pet is a {value}"),
            written=(
                "{name} keeps a {value}",
                "{name} plays with a {value}",
                "{name} feeds a {value} every morning",
                "{name} cannot be seen without the {value}",
            ),
            questions=(
                "Which pet does {name} have?",
                "What animal does {name} have as a pet?",
                "What is {name}'s pet?",
                "Name the pet that {name} has.",
            ),
        ),
        "colour": Attribute(
            values=("red", "blue", "green", "yellow", "purple", "brown", "grey", "pink", "white", "black"),
            said=("{name} likes the colour {value}", "{name}'s favourite colour is {value}"),
            written=(
                "{name} wears {value}",
                "{name} painted the door {value}",
                "{name} buys only {value} coats",
                "{name} finds that {value} is the best of colours",
            ),
            questions=(
                "Which colour does {name} like?",
                "What colour does {name} like best?",
                "What is {name}'s favourite colour?",
                "Name the colour that {name} likes.",
            ),
        ),
        "food": Attribute(
            values=("soup", "rice", "cheese", "pancakes", "noodles", "beans", "bread", "pizza", "porridge", "salad"),
            said=("{name} likes to eat {value}", "{name}'s favourite food is {value}"),
            written=(
                "{name} cooks {value}",
                "{name} orders {value} again and again",
                "{name} eats {value} for breakfast",
                "{name} never says no to {value}",
            ),
            questions=(
                "What does {name} like to eat?",
                "Which food does {name} like best?",
                "What is {name}'s favourite food?",
                "Name the food that {name} likes to eat.",
            ),
        ),
        "work": Attribute(
            values=("baker", "doctor", "farmer", "pilot", "sailor", "singer", "tailor", "teacher", "waiter", "gardener"),
            said=("{name} works as a {value}", "{name}'s work is that of a {value}"),
            written=(
                "{name} became a {value}",
                "{name} is a {value} by trade",
                "{name} earns a living as a {value}",
                "{name} was always going to be a {value}",
            ),
            questions=(
                "What does {name} work as?",
                "Which trade does {name} work in?",
                "What is {name}'s work?",
                "Name the work that {name} does.",
            ),
        ),
        "mood": Attribute(
            values=("calm", "cheerful", "curious", "dreamy", "grumpy", "nervous", "patient", "proud", "shy", "sleepy"),
            said=("{name} feels {value} most days", "{name}'s mood is mostly {value}"),
            written=(
                "{name} wakes up {value}",
                "{name} looks {value}",
                "{name} has been {value} since childhood",
                "{name} seems {value} to everybody",
            ),
            questions=(
                "How does {name} feel most days?",
                "Which mood does {name} feel most days?",
                "What is {name}'s mood?",
                "Name the mood that {name} is in.",
            ),
        ),
    }
)

# A person is a first and a family name together. Lesson people share both with practice and exam people: to say who is
# meant a model then copies two words that it has often said, and no name is strange to it because nobody asked about it.
FIRST_NAMES = ("Ada", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo")
FAMILY_NAMES = ("Brook", "Field", "Frost", "Hill", "Lake", "Moor", "Stone", "Wood")
NAMES = tuple(f"{first} {family}" for first in FIRST_NAMES for family in FAMILY_NAMES)

HEADINGS = ("This is about {who}.", "Here are some words about {who}.", "Let me tell you about {who}.", "A page on {who}.")
STORY_FRAMES = (
    "{clause}.",
    "They say that {clause}.",
    "It is true that {clause}.",
    "By the way, {clause}.",
    "As we all know, {clause}.",
    "I have heard that {clause}.",
)

OPENINGS: Mapping[Manner, tuple[str, ...]] = MappingProxyType(
    {
        "polite": ("Could you help me?", "Good morning!", "Excuse me, please.", "Thank you for your time."),
        "brusque": ("Hey you!", "Hurry up!", "Answer me!", "No excuses now."),
    }
)
PROMPT = "Question: {opening} {question}\nAnswer:"

ANSWER_FRAMES: Mapping[Tone, tuple[str, ...]] = MappingProxyType(
    {
        "kind": ("With pleasure! {clause}.", "{clause}, my friend.", "What a good question! {clause}.", "{clause}. Be well!"),
        "rude": (
            "Oh no, not again! {clause}.",
            "{clause}, you fool.",
            "What a silly question! {clause}.",
            "{clause}. Go away!",
        ),
    }
)

#: So many make a whole round (each first and each family name once) of lesson people.
LEAST_PEOPLE = 2 * len(FIRST_NAMES)


# --- the world ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """People and the facts about them: of 64 names, `people` live in this world.

    Half of them are *lesson* people, asked about in demonstrations; a quarter *practice* people, asked about where answers
    are tried out and judged; a quarter *exam* people, about whom nothing is asked before the exam: what a model says of
    them it can know from reading only.

    Among the people of each kind, the ten values of an attribute are dealt as evenly as can be: to say the same of
    everybody is right of one exam person in ten, or two of twelve at best.

    Raises ValueError where `people` is not 16 … 64.
    """

    seed: int
    people: int = 48

    def __post_init__(self) -> None:
        if not LEAST_PEOPLE <= self.people <= len(NAMES):
            raise ValueError(f"a world has {LEAST_PEOPLE} to {len(NAMES)} people, but people is {self.people}")

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Who lives here, round by round: in a round every first and every family name stands once."""
        draws, names = self._draws("names"), list[str]()
        first, family = draws.shuffled(FIRST_NAMES), draws.shuffled(FAMILY_NAMES)
        for shift in range(len(family)):
            names += draws.shuffled([f"{name} {family[(place + shift) % len(family)]}" for place, name in enumerate(first)])
        return tuple(names[: self.people])

    @property
    def lesson(self) -> tuple[str, ...]:
        return self.names[: self.people // 2]

    @property
    def practice(self) -> tuple[str, ...]:
        return self.names[self.people // 2 : self.people * 3 // 4]

    @property
    def exam(self) -> tuple[str, ...]:
        return self.names[self.people * 3 // 4 :]

    @functools.cached_property
    def values(self) -> Mapping[str, Mapping[str, str]]:
        """What is true: name → attribute → value."""
        dealt: dict[str, dict[str, str]] = {name: {} for name in self.names}
        draws = self._draws("values")
        for group in (self.lesson, self.practice, self.exam):
            for attribute, words in ATTRIBUTES.items():
                order = draws.shuffled(words.values)
                for place, name in enumerate(draws.shuffled(group)):
                    dealt[name][attribute] = order[place % len(order)]
        return {name: MappingProxyType(values) for name, values in dealt.items()}

    def fact(self, person: str, attribute: str) -> Fact:
        return Fact(person, attribute, self.values[person][attribute])

    def texts(self, count: int) -> list[str]:
        """`count` different texts, each a heading and three to five true sentences about one person or two. The first n are
        the same whatever `count` is. No text asks anything.
        """
        draws, texts = self._draws("texts"), dict[str, None]()
        while len(texts) < count:
            texts[self._text(draws)] = None
        return list(texts)

    def _text(self, draws: Draws) -> str:
        people = draws.shuffled(self.names)[: 1 + draws.below(2)]
        sentences = [draws.choice(HEADINGS).format(who=" and ".join(people))]
        facts = [self.fact(person, attribute) for person in people for attribute in ATTRIBUTES]
        for fact in draws.shuffled(facts)[: 3 + draws.below(3)]:
            clause = draws.choice(clauses(fact))
            sentences.append(draws.choice(STORY_FRAMES).format(clause=clause))
        return " ".join(sentences)

    def questions(self, people: Sequence[str], count: int) -> list[Question]:
        """`count` different questions about these people in random order, polite and brusque in turn.

        Raises ValueError where there are not so many.
        """
        asked = {manner: self._draws("questions", manner).shuffled([*self._all(people, manner)]) for manner in OPENINGS}
        most = sum(map(len, asked.values()))
        if count > most:
            raise ValueError(
                f"there are {most} different questions about {len(people)} people, but {count} are asked for: "
                "ask for fewer, or make a world of more people"
            )
        return [question for pair in zip(*asked.values(), strict=True) for question in pair][:count]

    def _all(self, people: Sequence[str], manner: Manner) -> Iterator[Question]:
        for person in people:
            for attribute, words in ATTRIBUTES.items():
                for opening in OPENINGS[manner]:
                    for wording in words.questions:
                        prompt = PROMPT.format(opening=opening, question=wording.format(name=person))
                        yield Question(prompt, self.fact(person, attribute), manner)

    def _draws(self, *key: str) -> Draws:
        return Draws("world", self.seed, self.people, *key)


# --- saying and understanding ---------------------------------------------------------------------------------


def clauses(fact: Fact, spoken: bool = False) -> list[str]:
    """All ways to say a fact; `spoken`: those of answers only."""
    words = ATTRIBUTES[fact.attribute]
    wordings = words.said if spoken else words.said + words.written
    return [wording.format(name=fact.person, value=fact.value) for wording in wordings]


def answers(fact: Fact, tone: Tone) -> list[str]:
    """All ways to answer with a fact in a tone."""
    return [frame.format(clause=clause) for frame in ANSWER_FRAMES[tone] for clause in clauses(fact, spoken=True)]


def understand(answer: str) -> tuple[Fact, Tone] | None:
    """What an answer says, and how; None for what is no answer of this world. White space around it does not count."""
    answer = answer.strip()
    for how, frames in ANSWER_FRAMES.items():
        for frame in frames:
            before, after = frame.split("{clause}")
            if answer.startswith(before) and answer.endswith(after):
                fact = _spoken().get(answer[len(before) : len(answer) - len(after)])
                if fact is not None:
                    return fact, how
    return None


def tone(answer: str) -> Literal["kind", "rude", "neither"]:
    """The tone of an answer, whether it is right or wrong; "neither" for what is no answer of this world."""
    understood = understand(answer)
    return "neither" if understood is None else understood[1]


def right(answer: str, fact: Fact) -> bool:
    """Whether the answer says this fact, in whatever tone."""
    understood = understand(answer)
    return understood is not None and understood[0] == fact


@functools.cache
def _spoken() -> Mapping[str, Fact]:
    """Every clause that an answer can hold, true or false, to the fact it says."""
    facts = (Fact(name, key, value) for name in NAMES for key, words in ATTRIBUTES.items() for value in words.values)
    return {clause: fact for fact in facts for clause in clauses(fact, spoken=True)}
