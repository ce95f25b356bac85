"""What the model is trained on: windows of token ids, and how much each prediction counts."""

from dataclasses import replace
from heapq import nlargest
from operator import itemgetter
from random import Random
from typing import NamedTuple

import tiktoken

from minipaged.evaluation.stories import PLACES, Question, Story, retell, tell, transcript


class Window(NamedTuple):
    ids: list[int]
    weights: list[float]
    kinds: list[str]  # of its questions, in order; none but in stories


ALIKE_SHARE = 0.25  # of the stories
FACT_WEIGHT = 0.05  # against 1 for an answer: nothing can predict a fact that is yet to be told
HELD_OUT_SEEDS = 1_000_000  # stories with smaller seeds are never trained on


class Windows:
    """Endless fresh windows: copies, drills and stories."""

    def __init__(self, encoding: tiktoken.Encoding, seed: int) -> None:
        self.encoding = encoding
        self.rng = Random(seed)
        self.answer = encoding.encode_single_token("\nA:")
        self.end = encoding.eot_token
        self.vocab = range(256, self.end)  # words and pieces of words, no single bytes

    def copy(self, length: int) -> Window:
        """Stretches of 8 to 32 random tokens, each given twice; the second copy counts."""
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            stretch = self.rng.choices(self.vocab, k=self.rng.randint(8, 32))
            ids += stretch + stretch
            # The first token of the second copy cannot be known.
            weights += [0.0] * (len(stretch) + 1) + [1.0] * (len(stretch) - 1)
        return Window(ids[:length], weights[:length], [])

    def drill(self, length: int, num_pairs: int) -> Window:
        """Random pairs of a key and a value, then keys again: each must recall its value."""
        keys = self.rng.sample(self.vocab, num_pairs)
        pairs = [(key, self.rng.choice(self.vocab)) for key in keys]
        ids = [token for pair in pairs for token in pair]
        weights = [0.0] * len(ids)
        while len(ids) < length:
            ids += self.rng.choice(pairs)
            weights += [0.0, 1.0]
        return Window(ids[:length], weights[:length], [])

    def alike(self, story: Story) -> Story:
        """The same story with one colour and one preposition throughout.

        In other stories "near the ..." is often enough to guess the place, and the model stops at
        guessing. Here only the name and the thing tell the facts apart.
        """
        first = story.facts[0]
        places = [p for p in PLACES if p.split()[0] == first.place.split()[0]]
        return retell(
            replace(fact, colour=first.colour, place=self.rng.choice(places))
            for fact in story.facts
        )

    def eased(self, question: Question) -> Question:
        """Where something is, without the preposition: "the meadow." for "In the meadow."

        After "In the" it is too tempting to read on from any "in the" of the story. Once the model
        can find the place without that hint, it keeps to it.
        """
        if question.kind != "place":
            return question
        return replace(question, answer=question.answer.partition(" ")[2])

    def story(self, length: int, num_facts: int, shares: dict[str, float], ease: bool) -> Window:
        """One story, then questions and answers until the window is full; answers count.

        A kind of question with twice the share comes up about twice as often.
        """
        story = tell(num_facts, HELD_OUT_SEEDS + self.rng.getrandbits(48))
        if self.rng.random() < ALIKE_SHARE:
            story = self.alike(story)
        lots = [(self.rng.random() ** (1 / shares[q.kind]), q) for q in story.questions]
        questions = [q for _, q in nlargest(length // 10, lots, key=itemgetter(0))]
        if ease:
            questions = [self.eased(q) for q in questions]
        ids = self.encoding.encode(transcript(story, questions), allowed_special="all")
        weights: list[float] = []
        answering = False
        for token in ids:
            weights.append(1.0 if answering else FACT_WEIGHT)
            answering = token == self.answer or (answering and token != self.end)
        padding = length - len(ids)  # only the shortest stories run out of questions
        ids = (ids + [self.end] * padding)[:length]
        weights = (weights + [0.0] * padding)[:length]
        return Window(ids, weights, [q.kind for q in questions])
