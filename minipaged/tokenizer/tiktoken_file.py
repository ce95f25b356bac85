"""`tiktoken.json` and a file of ranks: the format of the embedded model's tokenizer.

    {"ranks": "small.tiktoken", "pattern": " ?\\\\p{L}+|...", "special_tokens": {"<|end|>": 300}}

The ranks are in tiktoken's own format: one token per line, its bytes in base64 and its id. The id
is also its rank: of two pairs that could be merged, the one with the lower id is merged first.
"""

import base64
import json
from pathlib import Path
from typing import Any

from minipaged.errors import CheckpointError
from minipaged.tokenizer.bpe import BytePairTokenizer

RANKS_CONFIG = "tiktoken.json"


def read_ranked_tokenizer(folder: Path) -> BytePairTokenizer:
    """The tokenizer that `tiktoken.json` describes; neither network nor cache is touched.

    Raises `CheckpointError` if the file, or the ranks that it names, cannot be used.
    """
    path = folder / RANKS_CONFIG
    config = _read_config(path)
    ranks = read_ranks(folder / config["ranks"])
    _check_special_tokens(path, config["special_tokens"], ranks)
    tokens = {rank: token for token, rank in ranks.items()}
    pattern = f"{config['pattern']}|(?s:.)"  # unmatched text would be lost silently
    try:
        return BytePairTokenizer(pattern, ranks, tokens, config["special_tokens"])
    except ValueError as error:  # the only thing left unchecked
        raise CheckpointError(
            f'{path}: "pattern" is not a regular expression that tiktoken can use ({error}): '
            "correct it."
        ) from error


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a `.tiktoken` file, a map from token bytes to ids. Raises `CheckpointError`."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): put the ranks there, or correct their name "
            f"in {RANKS_CONFIG}."
        ) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise CheckpointError(
                f"{path}, line {number}: {line.decode(errors='replace')[:40]!r} is not a token in "
                "base64 and its id: fetch or write the file again."
            ) from error
    _check_ranks(path, ranks, sum(1 for line in lines if line.strip()))
    return ranks


def _check_ranks(path: Path, ranks: dict[bytes, int], num_lines: int) -> None:
    """Refuse ranks on which tiktoken would panic, at the start or during a request."""
    if not len(set(ranks.values())) == len(ranks) == num_lines:
        raise CheckpointError(f"{path} lists a token or an id twice: fetch or write it again.")
    if ranks and not 0 <= min(ranks.values()) <= max(ranks.values()) < 2**32:
        raise CheckpointError(f"{path} has an id outside [0, 2^32): fetch or write it again.")
    lacking = sum(1 for byte in range(256) if bytes([byte]) not in ranks)
    if lacking:
        raise CheckpointError(
            f"{path} lacks {lacking} of the 256 single bytes, without which some text has no "
            "tokens: fetch or write it again."
        )


def _read_config(path: Path) -> dict[str, Any]:
    """The checked content of `tiktoken.json`. Raises `CheckpointError`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): correct it.") from error
    kinds = {"ranks": str, "pattern": str, "special_tokens": dict}
    for key, kind in kinds.items():
        value = config.get(key) if isinstance(config, dict) else None
        if not isinstance(value, kind):
            what = {str: "a string", dict: "an object from text to id"}[kind]
            raise CheckpointError(f'{path} needs "{key}", {what}, but has {value!r}: add it.')
    return config


def _check_special_tokens(path: Path, special: dict[str, Any], ranks: dict[bytes, int]) -> None:
    taken = set(ranks.values())
    for text, token_id in special.items():
        if not text:
            raise CheckpointError(f"{path} has a special token without text: give it some.")
        if type(token_id) is not int or not 0 <= token_id < 2**32 or token_id in taken:
            raise CheckpointError(
                f"{path} gives special token {text!r} the id {token_id!r}: choose a whole number "
                "that no other token has."
            )
        taken.add(token_id)
