"""The roles of special tokens: "bos_token" is "<s>" in one checkpoint, "<|begin|>" in another."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from minipaged.utils.files import read_json_object

_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the later file takes precedence


def read_special_names(folder: Path) -> dict[str, str]:
    """Map roles to texts, for the roles in the folder's files: bos_token, eos_token ...

    Raises CheckpointError if a file exists but cannot be read.
    """
    names: dict[str, str] = {}
    for file_name in _FILES:
        if (folder / file_name).is_file():
            for role, token in read_json_object(folder / file_name).items():
                text = token_text(token)
                if role.endswith("_token") and text is not None:
                    names[role] = text
    return names


def read_roles(folder: Path, vocabulary: Mapping[int, bytes]) -> dict[str, str]:
    """Calls `read_special_names`; if the tokenizer's files name no role, reads config.json.

    GPT-2's files name none: its end token is a default of the class in `transformers` that reads
    them. Raises CheckpointError.
    """
    names = read_special_names(folder)
    if names or not (folder / "config.json").is_file():
        return names
    config = read_json_object(folder / "config.json")
    ids = {role: config.get(f"{role}_id") for role in ("bos_token", "eos_token")}
    return {
        role: vocabulary[token_id].decode(errors="replace")
        for role, token_id in ids.items()
        if isinstance(token_id, int) and token_id in vocabulary
    }


def token_text(token: Any) -> str | None:
    """The text of a token, which a file writes as text or as an object with its "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """A regex that finds the leftmost token, and the longest one at that position."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if tokens else "(?!)")
