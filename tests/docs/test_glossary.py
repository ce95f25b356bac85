"""docs/glossary.md: sorted, each term once; its names exist, and replaced words are gone."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ENTRIES = [
    (word, *re.split(r"\s+In vLLM:\s", entry))  # the term, what it means, and its name in vLLM
    for word, entry in re.findall(r"^(\S.*)\n:   ((?:.*\n)(?:    .*\n)*)", TEXT, re.M)
]
WORDS = [word.strip("*") for word, *_ in ENTRIES]
PACKAGE = ROOT / "minipaged"

# One word for one thing: each of these things has a term here.
TERMS = """atomic write, awaiting refork, baselines, batch slot, cached block, checker, CUDA graph,
cumulative query offsets, custom part, eviction, merged matrix, output, region, rejection, scheduler
output, slot, slot mapping, step input, time per output token (TPOT), time to first token (TTFT),
victim"""

# Words that the glossary's terms have replaced, in all that a learner reads.
REPLACED = re.compile(
    r"\b(seats?|rivals?|rungs?|key heads?|whoever|somebody|second opinion|begin alike|news"
    r"|(?:gives?|gave|given|giving) up|whole file|why_not|query_starts|JoinedLinear"
    r"|minipaged plan|plans?)\b|--swap\b",
    re.IGNORECASE,
)
PROSE = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs").glob("[ag]*/*.md")),  # api, guides
    *sorted((ROOT / "tutorials").glob("*.py")),
    *sorted((ROOT / "tutorials" / "labs").glob("*.md")),
    *sorted((PACKAGE / "labs").rglob("*.py")),
]


def test_the_terms_are_sorted_and_unique():
    assert sorted(set(WORDS), key=str.casefold) == WORDS


def test_each_term_is_bold_and_under_its_letter():
    letter = ""
    for heading, line in re.findall(r"^## ([A-Z])$|^(\S.*)\n:   ", TEXT, re.M):
        letter = heading or letter
        assert heading or re.fullmatch(rf"\*\*{letter}[^*]*\*\*", line, re.IGNORECASE), line


def test_each_preferred_word_has_an_entry():
    assert set(re.split(r",\s+", " ".join(TERMS.split()))) <= set(WORDS)


def test_the_words_that_contributing_prescribes_have_entries():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [listed] = re.findall(r"one word for one thing: (.*?)\.\n", contributing, re.S)
    asked = {" ".join(word.split()) for word in listed.split(",")}
    assert len(asked) > 8
    assert asked <= set(WORDS), asked - set(WORDS)


def test_an_entry_is_one_or_two_sentences():
    for word, entry, *_ in ENTRIES:
        told = re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)", "", entry)  # links aside
        told = re.sub(r"\{\{.*?\}\}", "", told)
        assert 1 <= len(re.findall(r"[.:](?:\s|$)", told)) <= 4, word
        assert entry.endswith((".", ".\n")), word


def test_every_name_in_the_glossary_exists_in_the_code():
    [table] = re.findall(r"^## Names in vLLM\n(.*)", TEXT, re.M | re.S)
    here = re.sub(r"^(\|[^|]*\|).*$", r"\1", table, flags=re.M)  # without the column "in vLLM"
    here += "\n".join(entry for _, entry, *_ in ENTRIES)
    code = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    defined = set(re.findall(r"(?:def|class) (\w+)|^ +(?:self\.)?(\w+)(?::| =)", code, re.M))
    names = {name.split(".")[-1] for name in re.findall(r"`([\w.]+)`", here)}
    assert names <= {name for pair in defined for name in pair}


def test_words_that_the_glossary_replaced_are_gone():
    left = [
        f"{page.relative_to(ROOT)}:{number}: {word}"
        for page in PROSE
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
        for word in REPLACED.findall(line)
    ]
    assert not left, "\n".join(left)
