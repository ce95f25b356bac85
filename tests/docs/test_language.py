"""No page, docstring, comment, message or test name has the telltale words of a translation.

Each pattern comes from a sentence that readers had to read twice. A right use of one is listed in
ALLOWED, with its reason.

    python tests/docs/test_language.py              the hits per file
    python tests/docs/test_language.py README.md    those of one file, with their lines
"""

import re
import sys
from functools import cache
from pathlib import Path

import pytest
import readability

ROOT = Path(__file__).parents[2]
GLOBS = (
    "README.md",
    "docs/**/*.md",
    *(f"tutorials/**/*.{kind}" for kind in ("md", "py")),
    *(f"{folder}/**/*.py" for folder in ("minipaged", "tests")),
)
FILES = {str(file.relative_to(ROOT)): file for glob in GLOBS for file in sorted(ROOT.glob(glob))}
del FILES["tests/docs/test_language.py"]  # where every telltale is an example

UNIT = "(?:second|minute|step|token|block|sequence|request|layer|thread|program|prompt|row|rank)"
THING = "(?:table|block|request|cache|pool|kernel|engine|scheduler|file|option|checkpoint)"
VERB = "(?:gets|is|of|in|for|from|to|on|as|that)"
PERSONS = "nobody|somebody|everybody|whoever|whomever"
TELLTALES = {  # pattern: what to write instead
    # persons for requests, blocks and code
    PERSONS: "name the request, the block, the part",
    "hears?|believes?": "receives, records",
    f"{THING}s? (?:knows?|says?|wants?|believes?|speaks?)": "contains, records, needs",
    # homemade terms
    "opinions?": "checker, reference, compared with",
    "key heads?": "KV head",
    "begin alike|beginning alike": "share a prefix",
    "give up|gives up|gave up|given up|giving up": "evict, prune, abort or free",
    "rungs?": "baseline, version or step",
    "seats?": "batch slot",
    "rivals?": "baselines",
    # calques
    "so many more": "as a result, many more",
    "belong into|belongs into": "belong in",
    "rely on it that|relies on it that": "assume that",
    "straight into place": "directly into",
    "lest": "so that it does not",
    r"(?<=,\s)for (?:it|they)": "because",
    r"\d (?:x|times) more": "N times as many",
    "what must hold": "Invariants",
    "(?:is|are) no part of": "does not belong to",
    "goes? on from there": "continues",
    "kept as": "stored as",
    "keeps? books?": "counts, records",
    "in vain": "name what never comes: a deadlock, a missing answer",
    "at the most": "at most",
    "be had": "be free, be available",
    "and yet": "but",
    "shall": "must, is to",
    # places in memory
    "lies|lie|lay|lying": "is, is stored",
    "stands?(?! for| in for|-)|stood": "is, has",
    "beside": "next to, compared with, besides",
    r"(?<!falls\s)behind": "after, under",
    # rates
    rf"\d,?(?: (?:\w*s|\w?i?b|x))? an? {UNIT}": "per",
    "(?:tokens|requests|sequences|operations|instructions|bytes|steps) a second": "per second",
    rf"one (?:(?!{VERB}\b)\w+ ){{0,2}}an? {UNIT}|once an? {UNIT}": "per",
}
PATTERNS = [
    (re.compile(rf"(?:{words})(?![\w-])".replace(" ", r"\s+")), better)
    for words, better in TELLTALES.items()
]

BEHIND_VLLM = {"system behind vllm": "the idea on which vLLM rests, not a place in memory"}
ALLOWED: dict[str, dict[str, str]] = {
    "README.md": BEHIND_VLLM,
    "docs/index.md": BEHIND_VLLM,
    "minipaged/__init__.py": BEHIND_VLLM,
    "minipaged/cli/main.py": BEHIND_VLLM,
    "minipaged/evaluation/stories.py": {'"behind"': "a word of the stories"},
    "minipaged/evaluation/soak/against_vllm.py": {"{rival}": "the name of a variable"},
    "tutorials/labs/06.md": {"the red map behind the church": "a story"},
    "tutorials/04_paged_attention.py": {"behind the wall": "a story"},
    "tutorials/08_prefix_caching.py": {"behind the church": "a story"},
    "tutorials/train_storyteller/train.py": {"next rung": "of the ladder in the sentence above"},
    "minipaged/models/hub/staging.py": {"~nobody": "the home of an unknown user"},
    "minipaged/sampling/beam.py": {"kept as a hypothesis": "kept, because it is a hypothesis"},
    "tests/docs/test_glossary.py": {
        "seats?|rivals?|rungs?|key heads?|whoever|somebody|second opinion|begin alike": "examples",
    },
    "tests/labs/test_challenge.py": {"nobody": "the name of a student"},
    "tests/models/hub/test_fetch.py": {"somebody": "the token of a user"},
}

CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]*`|\]\([^)]*\)|<[^>\n]*>|\{\{.*?\}\}", re.M | re.S)
WORDS = re.compile(
    r"""\"{3}.*?\"{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*|(?<=def\ )test_\w+""",
    re.S,
)


def blank(text: str) -> str:
    """As many spaces, in as many lines, so that what follows keeps its line number."""
    return "\n".join(" " * len(line) for line in text.split("\n"))


def prose(text: str, is_python: bool) -> str:
    """A file without its code: of Python, the strings, the comments and the names of tests."""
    if is_python:
        kept, end = list[str](), 0
        for match in WORDS.finditer(text):
            words = match[0].replace("#", " ")
            words = f"{words.replace('_', ' ')}." if words.startswith("test_") else words
            kept += [blank(text[end : match.start()]), words]
            end = match.end()
        text = "".join(kept)
    return CODE.sub(lambda code: blank(code[0]), text).lower()


def telltales(text: str) -> list[tuple[int, str, str]]:
    """The line and the words of each telltale in a lower-case text, and what to write instead."""
    found = [
        (text.count("\n", 0, hit.start()) + 1, " ".join(hit[0].split()), better)
        for pattern, better in PATTERNS
        for hit in pattern.finditer(text)
        if not re.match(r"[\w-]", text[hit.start() - 1 : hit.start()] or " ")
    ]
    return sorted(found)


@cache
def hits(name: str) -> list[str]:
    """The telltales of a file, but for those that are allowed there."""
    text = prose(FILES[name].read_text(encoding="utf-8"), name.endswith(".py"))
    for phrase in ALLOWED.get(name, ()):
        text = text.replace(phrase, blank(phrase))
    return [f"{name}:{line}: {words!r}; write: {better}" for line, words, better in telltales(text)]


def test_no_page_comment_or_message_has_a_telltale_word():
    found = [hit for name in FILES for hit in hits(name)]
    assert not found, "\n".join(found)


def test_every_allowed_use_exists():
    for name, phrases in ALLOWED.items():
        text = prose(FILES[name].read_text(encoding="utf-8"), name.endswith(".py"))
        for phrase, reason in phrases.items():
            assert phrase in text, f"{name} has no {phrase!r} any more: remove it from ALLOWED"
            assert telltales(f" {phrase} "), f"{phrase!r} needs no permission"
            assert reason


@pytest.mark.parametrize(
    "sentence",
    [
        "No block is taken from nobody.",
        "Whoever comes later waits.",
        "The block table says where it is.",
        "A second opinion for each part.",
        "Two prompts that begin alike.",
        "A block is given up.",
        "They rely on it that no two hashes are equal.",
        "It joins early, for it was there first.",
        "The keys lie in the pool.",
        "Token 3 stands in slot 9.",
        "The module is beside its test.",
        "The tokens behind the last block.",
        "It serves 12 requests a second.",
        "One reference count a block.",
        "It runs once a step.",
        "The scheduler believes that its keys are cached.",
        "The part is no part of the memory.",
    ],
)
def test_a_telltale_sentence_is_flagged(sentence):
    assert telltales(prose(sentence, is_python=False))
    assert telltales(prose(f"x = 1  # {sentence}", is_python=True))
    assert telltales(prose(f'raise ValueError("{sentence}")', is_python=True))


@pytest.mark.parametrize(
    "sentence",
    [
        "OOM stands for out of memory. A slow viewer falls behind.",
        "Read `nobody` and `rung.py` first.",
        "See [the page](behind.md).",
        "It lists a token or an id twice, and understands both.",
        "In a second terminal, run the client. It takes half a second.",
    ],
)
def test_a_correct_sentence_is_not_flagged(sentence):
    assert not telltales(prose(sentence, is_python=False))


@pytest.mark.parametrize("page", readability.PAGES)
def test_no_page_needs_more_than_ten_years_of_school(page):
    value, _ = readability.grade(readability.text_of(page))
    assert value <= 10


def test_the_name_of_a_test_is_a_sentence_that_is_checked():
    code = "class A:\n    async def test_a_block_of_nobody_is_free(): ...\n"
    assert telltales(prose(code, is_python=True)) == [(2, "nobody", TELLTALES[PERSONS])]


def test_the_name_of_a_test_has_fewer_than_80_characters():
    texts = [file.read_text(encoding="utf-8") for file in FILES.values() if file.suffix == ".py"]
    names = {name for text in texts for name in re.findall(r"def (test_\w+)", text)}
    assert not [name for name in names if len(name) >= 80]


def test_code_is_not_checked():
    assert not telltales(prose("nobody = lies(behind)\n", is_python=True))
    assert not telltales(prose("```python\nnobody = 1\n```\n", is_python=False))


if __name__ == "__main__":
    for each in sys.argv[1:] or FILES:
        if sys.argv[1:]:
            print("\n".join(hits(each)))
        elif hits(each):
            print(f"{len(hits(each)):4} {each}")
