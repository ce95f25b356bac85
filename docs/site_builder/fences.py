"""Which lines of a Markdown page are text, and which stand in a fenced block of code."""

import re
from collections.abc import Iterator

_FENCE = re.compile(r"\s*(`{3,}|~{3,})")


def numbered_lines(markdown: str) -> Iterator[tuple[int, str, bool]]:
    """Each line with its number, and whether it is text; the fences themselves are none."""
    fence = ""
    for number, line in enumerate(markdown.splitlines(), 1):
        match = _FENCE.match(line)
        if not fence and match:
            fence = match[1]
            yield number, line, False
        elif fence:
            ends = match is not None and match[1].startswith(fence) and not line.strip(" `~\t")
            yield number, line, False
            fence = "" if ends else fence
        else:
            yield number, line, True


def fenced(code: str, heading: str) -> str:
    """`code` in a fence that is longer than any in it."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", code)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{heading}\n{code.rstrip()}\n{ticks}"
