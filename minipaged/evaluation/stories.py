"""Short village stories with questions about every fact: the training data of the embedded model.

A story is a list of facts, and each fact is one sentence of the same form:

    Once upon a time Theo the frog put the white key in the meadow. Mia the cat put ...

No two facts of a story share a name or a thing, so every question below has exactly one answer,
which occurs only in the story. A model can find it only by attending to the one sentence that
contains it. A story therefore tests a cache: if a block of keys and values is lost or mixed up,
some answer is visibly wrong, and `Question.fact_index` identifies the missing sentence.

    >>> story = tell(num_facts=2, seed=0)
    >>> print(prompt(story, story.questions[1]))    # doctest: +SKIP
    Once upon a time ...
    Q: Where is the key of Theo?
    A:

Everything here is pure Python and depends on nothing but the seed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

END = "<|endoftext|>"
"""The special token that closes every answer."""

OPENING = "Once upon a time"
"""The start of every story. It also gives the first name a leading space, like all other names."""

# Short words, so that a small byte-level BPE makes each one token. No word is in two lists.
NAMES = tuple(
    """
    Ada Abel Amy Anna Ben Bess Bob Cara Carl Cleo Dan Dora Ed Ella Emma Eric Eva Finn Gus Hal Hans
    Hugo Ida Ina Ivan Jack Jan Jill Joe June Kate Ken Kim Lars Lea Leo Lily Lou Luke Max Mia Mona
    Nell Nick Nina Noah Nora Olga Otto Pam Paul Pia Rita Rob Rosa Ruth Sam Sara Ted Theo Tim Tom
    Una Will
    """.split()
)
ANIMALS = tuple(
    "bear cat cow dog duck fox frog goat goose hare hen horse mole mouse pig rat sheep toad wolf "
    "wren".split()
)
COLOURS = tuple("black blue brown gold green grey pink red silver tan white yellow".split())
THINGS = tuple(
    """
    axe bag ball basket bell belt book boot bottle bowl box bread broom brush bucket button cake
    candle cap chair coat coin comb cup dish doll drum egg fan flag flute fork glove hammer harp hat
    hook jar jug kettle key kite knife lamp map mask mirror nail needle pan pear pen pipe plate pot
    purse ring rope saw scarf shoe spoon sword tray
    """.split()
)
PLACES = tuple(
    f"{preposition} the {noun}"
    for preposition, nouns in {
        "in": "barn cave cellar church forest garden house inn meadow mill school stable tower "
        "yard",
        "on": "bench bridge hill roof stairs table wall",
        "under": "bench bridge hedge oak stairs table tree",
        "behind": "barn church hedge hill house mill oak school stable tower tree wall",
        "near": "bridge cave forest gate inn lake meadow pond river road well",
    }.items()
    for noun in nouns.split()
)

MAX_FACTS = min(len(NAMES), len(THINGS))


@dataclass(frozen=True)
class Fact:
    """One fact: a name, an animal, and a thing of some colour that was put somewhere."""

    name: str
    animal: str
    colour: str
    thing: str
    place: str

    def __str__(self) -> str:
        return f"{self.name} the {self.animal} put the {self.colour} {self.thing} {self.place}."


@dataclass(frozen=True)
class Question:
    """One question about one fact of a story, with its only right answer."""

    text: str
    answer: str
    fact_index: int
    kind: str

    def is_answered_by(self, output: str) -> bool:
        """Whether a model's output is exactly the right answer (surrounding space is ignored)."""
        return output.removesuffix(END).strip() == self.answer


@dataclass(frozen=True)
class Story:
    """The facts, their text, and every question about them, fact by fact."""

    facts: tuple[Fact, ...]
    text: str
    questions: tuple[Question, ...]


def ask(fact: Fact, fact_index: int = 0) -> tuple[Question, ...]:
    """All questions about one fact, one of each kind, in the order of `KINDS`."""
    return (
        Question(
            f"What did {fact.name} do with the {fact.thing}?",
            str(fact),
            fact_index,
            "deed",
        ),
        Question(
            f"Where is the {fact.thing} of {fact.name}?",
            f"{fact.place.capitalize()}.",
            fact_index,
            "place",
        ),
        Question(
            f"What colour is the {fact.thing} of {fact.name}?",
            f"{fact.colour.capitalize()}.",
            fact_index,
            "colour",
        ),
        Question(f"Which animal is {fact.name}?", f"A {fact.animal}.", fact_index, "animal"),
        Question(
            f"Who put the {fact.colour} {fact.thing} {fact.place}?",
            f"{fact.name}.",
            fact_index,
            "person",
        ),
    )


KINDS = ("deed", "place", "colour", "animal", "person")
"""What a question asks for: the whole fact, or one part of it."""


def tell(num_facts: int, seed: int) -> Story:
    """Tell a story of `num_facts` facts; the same seed tells the same story."""
    if not 1 <= num_facts <= MAX_FACTS:
        raise ValueError(
            f"a story of {num_facts} facts cannot be told: each fact needs a unique name and a "
            f"unique thing, and there are {MAX_FACTS}. Give 1 to {MAX_FACTS} facts."
        )
    rng = Random(seed)
    facts = tuple(
        Fact(name, rng.choice(ANIMALS), rng.choice(COLOURS), thing, rng.choice(PLACES))
        for name, thing in zip(
            rng.sample(NAMES, num_facts), rng.sample(THINGS, num_facts), strict=True
        )
    )
    return retell(facts)


def retell(facts: Iterable[Fact]) -> Story:
    """Build a story from your own facts; each needs a unique name and a unique thing."""
    facts = tuple(facts)
    return Story(
        facts=facts,
        text=" ".join([OPENING, *map(str, facts)]),
        questions=tuple(q for index, fact in enumerate(facts) for q in ask(fact, index)),
    )


def prompt(story: Story, question: Question) -> str:
    """The prompt for the model: the story, then the question."""
    return f"{story.text}\nQ: {question.text}\nA:"


def transcript(story: Story, questions: Iterable[Question]) -> str:
    """The story with answered questions: the text that the model is trained on.

    It begins exactly as `prompt` does, so the first answer has the same position as in use.
    """
    answered = (f"\nQ: {q.text}\nA: {q.answer}{END}" for q in questions)
    return story.text + "".join(answered)
