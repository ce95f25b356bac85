"""All other tokenizers, above all SentencePiece's (Llama 1 and 2, Mistral, TinyLlama).

These are encoded by Hugging Face's `tokenizers`, an extra. What it is not asked for is the way
back: its `decode` gives text, and a token is some bytes. Those are read out of the vocabulary.
"""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from minipaged.errors import CheckpointError, UnsupportedTokenizer
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.hugging_face import BYTE_OF_CHARACTER

_PROBE = "Is this a text? 1 2 3"  # any that has tokens
EXTRA = "pip install 'minipaged[tokenizers]'"


class LibraryTokenizer(Tokenizer):
    """What a `tokenizer.json` describes, encoded by the library that such files were made for."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a file that the library cannot read."""
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # it raises nothing more specific
            raise CheckpointError(
                f"{path} is no tokenizer ({error}): download it again."
            ) from error
        self._alone = Lock()  # encode_special_tokens belongs to the library's object
        self._library.no_truncation()
        self._library.no_padding()
        added: dict[int, Any] = self._library.get_added_tokens_decoder()
        spell = _choose_spelling(path, repr(self._library.decoder))
        vocabulary = {
            token_id: token.encode() if token_id in added else spell(token)
            for token, token_id in self._library.get_vocab().items()
        }
        specials = {token.content: i for i, token in added.items() if token.special}
        super().__init__(vocabulary, specials, self._find_first_ids())

    def _find_first_ids(self) -> list[int]:
        """What stands before every text. What would stand behind it is left out: it is an end."""
        bare = self._library.encode(_PROBE, add_special_tokens=False).ids
        framed = self._library.encode(_PROBE).ids
        begins = [i for i in range(len(framed)) if framed[i : i + len(bare)] == bare]
        return framed[: begins[0]] if begins else []

    def _encode(self, text: str, allow_special: bool) -> list[int]:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair
        with self._alone:
            self._library.encode_special_tokens = not allow_special
            return self._library.encode(text, add_special_tokens=False).ids


def refuse_without_the_library(path: Path, reason: str) -> None:
    """Raise UnsupportedTokenizer unless `tokenizers` is installed."""
    if find_spec("tokenizers") is None:
        raise UnsupportedTokenizer(
            f"{path} is no tokenizer for tiktoken, since {reason}: install the library that reads "
            f"it by {EXTRA}."
        )


def _choose_spelling(path: Path, decoder: str) -> Callable[[str], bytes]:
    if "ByteLevel" in decoder:
        return _spell_byte_level
    if "Metaspace" in decoder or "\u2581" in decoder:
        return _spell_sentence_piece
    raise UnsupportedTokenizer(
        f"{path} is neither a byte-level nor a SentencePiece tokenizer, and how its tokens become "
        "text is not known here: give another checkpoint."
    )


def _spell_sentence_piece(token: str) -> bytes:
    """A low line stands for a space, and "<0x0A>" for a byte of what is no token by itself."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()


def _spell_byte_level(token: str) -> bytes:
    return bytes(BYTE_OF_CHARACTER[c] for c in token if c in BYTE_OF_CHARACTER)
