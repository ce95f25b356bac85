r"""The patterns that cut text into words before pairs are merged, and their models.

Each is rewritten for tiktoken's regex engine, and matches the same words as the published one:

- Runs are possessive (`\p{L}++`), without backtracking. The rest of the pattern could not match the
  characters anyway, and a text of a million letters would need a million backtracking positions.
- `\s++$` matches the white space at the end of a text at once, like `\s+(?!\S)`.
- `\s+(?!\S)` leaves the last space of a run to the next word. If it does not match, there is only
  one space, so the last alternative is a single `\s`, where the published patterns have `\s+`.
"""

from collections.abc import Mapping
from typing import Any

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2 and OPT: words, numbers and signs, each with the space before it."""

SMOLLM = (
    r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++"
    r"|\s++(?=\p{N}|$)|\s+(?!\S)|\s"
)
"""SmolLM: as GPT-2, but every digit is cut out first. A space therefore never joins a digit, and
white space before a digit counts as the end of a text."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|[^\S\r\n]++$|\s*[\r\n]+|\s+(?!\S)|\s"
)
"""Llama 3: numbers in groups of three digits, separate line ends; any sign may start a word."""

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
    """The pattern for a `pre_tokenizer` of tokenizer.json; None for an unknown one."""
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
    """Its steps in order, with defaults, and without those that do not affect tokens."""
    if not isinstance(pre_tokenizer, Mapping):
        return []
    if pre_tokenizer.get("type") == "Sequence":
        parts = pre_tokenizer.get("pretokenizers") or []
        return [stage for part in parts for stage in _list_stages(part)]
    stage = {key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}
    if stage.get("type") == "ByteLevel":
        stage = {"use_regex": True, **stage}
    return [stage]
