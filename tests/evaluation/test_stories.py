"""The same seed gives the same story, and exactly one fact contains each answer."""

import subprocess
import sys
from itertools import combinations

import pytest

from minipaged.evaluation.stories import (
    ANIMALS,
    COLOURS,
    END,
    KINDS,
    MAX_FACTS,
    NAMES,
    OPENING,
    PLACES,
    THINGS,
    Fact,
    ask,
    prompt,
    retell,
    tell,
    transcript,
)

SIZES = [1, 2, 8, 24, MAX_FACTS]
THEO = Fact("Theo", "frog", "white", "key", "in the meadow")


@pytest.mark.parametrize("num_facts", SIZES)
def test_the_same_seed_tells_the_same_story(num_facts: int) -> None:
    assert tell(num_facts, seed=7) == tell(num_facts, seed=7)


def test_another_seed_tells_another_story() -> None:
    assert len({tell(8, seed).text for seed in range(100)}) == 100


@pytest.mark.parametrize("num_facts", SIZES)
def test_no_two_facts_share_a_name_or_a_thing(num_facts: int) -> None:
    facts = tell(num_facts, seed=1).facts
    assert len({fact.name for fact in facts}) == num_facts
    assert len({fact.thing for fact in facts}) == num_facts


@pytest.mark.parametrize("num_facts", SIZES)
def test_the_text_is_the_opening_and_then_every_fact_in_order(num_facts: int) -> None:
    story = tell(num_facts, seed=2)
    rest = story.text.removeprefix(OPENING)
    for fact in story.facts:
        assert rest.startswith(f" {fact}")
        rest = rest.removeprefix(f" {fact}")
    assert rest == ""


def test_facts_of_your_own_make_a_story_too() -> None:
    story = retell([THEO])
    assert story.text == f"{OPENING} {THEO}"
    assert story.questions == ask(THEO)
    assert retell(tell(8, seed=9).facts) == tell(8, seed=9)


def test_a_fact_is_one_regular_sentence() -> None:
    assert str(THEO) == "Theo the frog put the white key in the meadow."


def test_each_kind_of_question_asks_for_its_part_of_the_fact() -> None:
    asked = {question.kind: (question.text, question.answer) for question in ask(THEO)}
    assert asked == {
        "deed": (
            "What did Theo do with the key?",
            "Theo the frog put the white key in the meadow.",
        ),
        "place": ("Where is the key of Theo?", "In the meadow."),
        "colour": ("What colour is the key of Theo?", "White."),
        "animal": ("Which animal is Theo?", "A frog."),
        "person": ("Who put the white key in the meadow?", "Theo."),
    }
    assert tuple(asked) == KINDS


@pytest.mark.parametrize("num_facts", SIZES)
def test_every_fact_is_asked_for_once_in_every_kind(num_facts: int) -> None:
    story = tell(num_facts, seed=3)
    assert [(q.fact_index, q.kind) for q in story.questions] == [
        (index, kind) for index in range(num_facts) for kind in KINDS
    ]


@pytest.mark.parametrize("num_facts", SIZES)
def test_an_answer_follows_from_the_fact_it_points_to(num_facts: int) -> None:
    story = tell(num_facts, seed=4)
    for question in story.questions:
        assert question in ask(story.facts[question.fact_index], question.fact_index)


@pytest.mark.parametrize("num_facts", SIZES)
def test_no_question_of_a_story_has_two_answers(num_facts: int) -> None:
    texts = [question.text for question in tell(num_facts, seed=5).questions]
    assert len(set(texts)) == len(texts)


def test_no_word_is_in_two_lists() -> None:
    places = {noun for place in PLACES for noun in place.split()}
    lists = [set(NAMES), set(ANIMALS), set(COLOURS), set(THINGS), places]
    for some, others in combinations(lists, 2):
        assert not some & others


@pytest.mark.parametrize("words", [NAMES, ANIMALS, COLOURS, THINGS, PLACES])
def test_no_word_is_twice_in_its_list(words: tuple[str, ...]) -> None:
    assert len(set(words)) == len(words)


def test_an_animal_takes_the_article_a() -> None:
    assert all(animal[0] not in "aeiou" for animal in ANIMALS)


@pytest.mark.parametrize("num_facts", [-1, 0, MAX_FACTS + 1])
def test_a_story_that_cannot_be_told_says_how_many_facts_can(num_facts: int) -> None:
    with pytest.raises(ValueError, match=rf"story of {num_facts} facts.*1 to {MAX_FACTS}"):
        tell(num_facts, seed=0)


def test_a_prompt_ends_where_the_answer_begins() -> None:
    story = tell(3, seed=6)
    question = story.questions[0]
    assert prompt(story, question) == f"{story.text}\nQ: {question.text}\nA:"


def test_a_transcript_begins_with_the_prompt_and_closes_every_answer() -> None:
    story = tell(3, seed=6)
    first, second = story.questions[4], story.questions[9]
    text = transcript(story, [first, second])
    assert text.startswith(f"{prompt(story, first)} {first.answer}{END}")
    assert text.endswith(f"\nQ: {second.text}\nA: {second.answer}{END}")
    assert text.count(END) == 2


def test_an_answer_counts_word_for_word() -> None:
    question = ask(THEO)[1]
    assert question.is_answered_by(" In the meadow.")
    assert question.is_answered_by(f" In the meadow.{END}")
    assert not question.is_answered_by(" in the meadow.")
    assert not question.is_answered_by(" In the meadow. Mia the cat")
    assert not question.is_answered_by("")


def test_the_grammar_imports_neither_torch_nor_numpy() -> None:
    check = (
        "import sys, minipaged.evaluation.stories;"
        "sys.exit(bool({'torch', 'numpy'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
