"""A table of how hard each page is to read: `python tests/docs/readability.py`.

The Flesch-Kincaid grade is 0.39 words per sentence + 11.8 syllables per word - 15.59: the years of
school that a reader needs. Code blocks, tables and headings are left out. Inline code counts as one
syllable, because "num_cached_tokens" is a name and not a hard word.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GLOBS = ("README.md", "docs/**/*.md", "tutorials/labs/*.md", "tutorials/[0-9]*.py")
PAGES = [str(path.relative_to(ROOT)) for glob in GLOBS for path in sorted(ROOT.glob(glob))]
CODE = re.compile(r"^( *)```.*?^\1```|<!--.*?-->", re.M | re.S)
NO_PROSE = re.compile(r"^(?: *(?:\||#|!\[|@@|:::|---|title:)| {4,}\S).*$", re.M)  # tables ...
CELL = re.compile(r"^# %% \[markdown\].*\n((?:#.*\n)*)", re.M)
SILENT = re.compile("(?<=[^aeiouylcsxzg])es$|(?<=[^aeiouyl])e$|(?<=[^aeiouytdl])ed$")


def text_of(page: str) -> str:
    """The prose of a page: sentences only, inline code as the word "it"."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".py"):
        text = "\n\n".join(re.sub("^# ?", "", cell, flags=re.M) for cell in CELL.findall(text))
    text = re.sub(r"`[^`\n]+`|\{\{.*?\}\}", "it", NO_PROSE.sub("", CODE.sub("", text)))
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)  # of a link, its words
    return re.sub(r"https?://\S+|[*_>]", "", text)


def num_syllables(word: str) -> int:
    """Groups of vowels, without a silent e: right for nine words in ten."""
    return max(1, len(re.findall("[aeiouy]+", SILENT.sub("", word.lower()))))


def grade(text: str) -> tuple[float, int]:
    """The Flesch-Kincaid grade and the number of words; a list item or paragraph is a sentence."""
    parts = re.split(r"[.!?](?:\s|$)|\n\s*\n|\n\s*(?:[-*]|\d+\.)\s", text)
    sentences = [words for part in parts if len(words := re.findall("[A-Za-z']+", part)) > 1]
    words = [word for sentence in sentences for word in sentence]
    if not words:
        return 0.0, 0
    per_word = sum(map(num_syllables, words)) / len(words)
    return 0.39 * len(words) / len(sentences) + 11.8 * per_word - 15.59, len(words)


if __name__ == "__main__":
    print("grade  words  page")
    for value, num_words, page in sorted((*grade(text_of(page)), page) for page in PAGES)[::-1]:
        print(f"{value:5.1f}  {num_words:5}  {page}")
