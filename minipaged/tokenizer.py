"""Text to tokens and back: tiktoken, always.

A model's folder says in `tiktoken.json` how its text is cut, and names the file of ranks beside it:

    {"ranks": "small.tiktoken", "pattern": " ?\\\\p{L}+|...", "special_tokens": {"<|end|>": 300}}

The ranks are in tiktoken's own format: one token a line, its bytes in base64 and its id. The id is
also its rank: of two pairs that could be merged, the one with the lower id is.
"""

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiktoken

from minipaged.errors import CheckpointError, MissingTokenizer

CONFIG_NAME = "tiktoken.json"


class Tokenizer:
    """A `tiktoken.Encoding`, and what it takes to stream from it: bytes of one token at a time.

    A model may know more ids than its tokenizer, since vocabularies are padded to round sizes. Such
    an id stands for no bytes at all, so it decodes to "".
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.special_tokens = {
            text: encoding.encode_single_token(text) for text in encoding.special_tokens_set
        }
        self.special_ids = frozenset(self.special_tokens.values())

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read `tiktoken.json` and the ranks that it names; neither network nor cache is touched.

        Raises `MissingTokenizer` if the folder has no such file, `CheckpointError` if it has one
        that cannot be used.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise MissingTokenizer(
                f"{folder} holds no tokenizer: add {CONFIG_NAME} and its ranks, or give prompts as "
                "token ids."
            )
        config = _read_config(path)
        ranks_path = path.parent / config["ranks"]
        ranks = read_ranks(ranks_path)
        _check_special_tokens(path, config["special_tokens"], ranks)
        try:
            encoding = tiktoken.Encoding(
                name=ranks_path.stem,
                pat_str=config["pattern"],
                mergeable_ranks=ranks,
                special_tokens=config["special_tokens"],
            )
        except ValueError as error:  # the only thing left unchecked
            raise CheckpointError(
                f'{path}: "pattern" is no regular expression that tiktoken can use ({error}): '
                "correct it."
            ) from error
        return cls(encoding)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id. Ids below it that were never given out decode to ""."""
        return self.encoding.n_vocab

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """The tokens of a text.

        A special token that is spelt out in the text becomes that token, as in Hugging Face's
        tokenizers; text from strangers is better encoded with `allow_special=False`, which takes
        it for mere letters.
        """
        allowed = self.encoding.special_tokens_set if allow_special else set[str]()
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of some tokens. Bytes that are no UTF-8 become U+FFFD."""
        skipped = self.special_ids if skip_special else frozenset[int]()
        pieces = (self.token_bytes(i) for i in token_ids if i not in skipped)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which need not be whole characters; none for an unknown id."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        try:
            return self.encoding.decode_single_token_bytes(token_id)
        except KeyError:  # a hole between the ids that were given out
            return b""


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a `.tiktoken` file: from a token's bytes to its id. Raises `CheckpointError`."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): put the ranks there, or correct their name "
            f"in {CONFIG_NAME}."
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
    """tiktoken would panic on these only later, in the middle of a request, or not start at all."""
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
        raise CheckpointError(f"{path} is no readable JSON ({error}): correct it.") from error
    kinds = {"ranks": str, "pattern": str, "special_tokens": dict}
    for key, kind in kinds.items():
        value = config.get(key) if isinstance(config, dict) else None
        if not isinstance(value, kind):
            what = {str: "a string", dict: "an object from text to id"}[kind]
            raise CheckpointError(f'{path} needs "{key}", {what}, and has {value!r}: add it.')
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
