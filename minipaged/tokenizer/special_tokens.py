"""Which token plays which role: "bos_token" is "<s>" in one checkpoint, "<|begin|>" in another."""

from pathlib import Path
from typing import Any

from minipaged.tokenizer.base import Tokenizer
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


def find_end_token(folder: Path, tokenizer: Tokenizer) -> int | None:
    """The id of the token that the tokenizer's files name as the end of a sequence.

    None where they name none, or one that the tokenizer does not have. Raises CheckpointError.
    """
    text = read_special_names(folder).get("eos_token", "")
    ids = {token: token_id for token_id, token in tokenizer.vocabulary.items()}
    return tokenizer.special_tokens.get(text, ids.get(text.encode()))


def token_text(token: Any) -> str | None:
    """A token is written as its text, or as an object with its "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
