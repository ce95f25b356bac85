"""Which token plays which role: "bos_token" is "<s>" in one checkpoint, "<|begin|>" in another."""

from pathlib import Path
from typing import Any

from minipaged.utils.files import read_json_object

_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the later one counts


def read_special_names(folder: Path) -> dict[str, str]:
    """From role to text, for the roles that the folder's files name: bos_token, eos_token ...

    Raises CheckpointError if a file is there and cannot be read.
    """
    names: dict[str, str] = {}
    for file_name in _FILES:
        if (folder / file_name).is_file():
            for role, token in read_json_object(folder / file_name).items():
                text = token_text(token)
                if role.endswith("_token") and text is not None:
                    names[role] = text
    return names


def token_text(token: Any) -> str | None:
    """A token is written as its text, or as an object with its "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
