r"""How text is cut into words before pairs are merged: four patterns, and whom they belong to.

Each is written here as tiktoken's own engine likes it, and finds what the published one finds:

- Runs are possessive (`\p{L}++`): once taken, no letter is given back. Nothing that follows in the
  pattern could use it, and a text of a million letters needs no million ways to turn back to.
- `\s++$` takes the white space at the end of a text at once, as `\s+(?!\S)` would.
- `\s+(?!\S)` leaves the last space of a run to the word after it. Where it finds nothing, there is
  one space only: so a single `\s` comes last, where the published patterns have `\s+`.
"""

from collections.abc import Mapping
from typing import Any

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2 and OPT: words, numbers and signs, each with the space before it."""

SMOLLM = (
    r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++"
    r"|\s++(?=\p{N}|$)|\s+(?!\S)|\s"
)
"""SmolLM: as GPT-2, but every digit was cut out first. So no space goes with a digit, and the white
space before one is at the end of a text, as it were."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|[^\S\r\n]++$|\s*[\r\n]+|\s+(?!\S)|\s"
)
"""Llama 3: numbers by three digits, line ends by themselves; any sign may lead a word."""

QWEN = LLAMA3.replace(r"\p{N}{1,3}+", r"\p{N}")
"""Qwen2 and Qwen3: as Llama 3, but digit by digit."""

_PUBLISHED = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": LLAMA3,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": QWEN,
}

_WITH_PATTERN = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_EACH_DIGIT = {"type": "Digits", "individual_digits": True}


def choose_pattern(pre_tokenizer: Any) -> str | None:
    """The pattern for a `pre_tokenizer` of tokenizer.json; None for one that is not known here."""
    stages = _list_stages(pre_tokenizer)
    if stages == [_WITH_PATTERN]:
        return GPT2
    if stages == [_EACH_DIGIT, _WITH_PATTERN]:
        return SMOLLM
    if len(stages) == 2 and stages[1] == _BYTES_ONLY:
        split = stages[0]
        if split.get("type") == "Split" and split.get("behavior") == "Isolated":
            published = str((split.get("pattern") or {}).get("Regex"))
            return None if split.get("invert") else _PUBLISHED.get(published)
    return None


def _list_stages(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """One after the other, with defaults filled in and what changes no token left out."""
    if not isinstance(pre_tokenizer, Mapping):
        return []
    if pre_tokenizer.get("type") == "Sequence":
        parts = pre_tokenizer.get("pretokenizers") or []
        return [stage for part in parts for stage in _list_stages(part)]
    stage = {key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}
    if stage.get("type") == "ByteLevel":
        stage = {"use_regex": True, **stage}
    return [stage]
