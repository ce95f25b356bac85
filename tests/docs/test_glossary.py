"""docs/glossary.md: sorted, each word once, and all words that CONTRIBUTING.md asks for."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^(\S.*)\n:   ((?:.*\n)(?:    .*\n)*)", TEXT, re.M)
WORDS = [word for word, _ in ENTRIES]


def test_the_words_are_sorted_and_each_stands_once():
    assert sorted(set(WORDS), key=str.casefold) == WORDS


def test_the_words_that_contributing_asks_for_are_there():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [listed] = re.findall(r"one word for one thing: (.*?)\.\n", contributing, re.S)
    asked = {" ".join(word.split()) for word in listed.split(",")}
    assert len(asked) > 8
    assert asked <= set(WORDS), asked - set(WORDS)


def test_an_entry_is_one_or_two_sentences():
    for word, entry in ENTRIES:
        told = re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)", "", entry)  # links aside
        told = re.sub(r"\{\{.*?\}\}", "", told)
        assert 1 <= len(re.findall(r"[.:](?:\s|$)", told)) <= 4, word
        assert entry.rstrip().endswith("."), word
