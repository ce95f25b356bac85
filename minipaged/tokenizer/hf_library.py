"""All other tokenizers, above all SentencePiece's (Llama 1 and 2, Mistral, TinyLlama).

Hugging Face's `tokenizers`, an extra, encodes these. It is not used for decoding: its `decode`
returns text, but a token is a sequence of bytes. Those are read from the vocabulary.
"""

import re
import secrets
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from minipaged.errors import CheckpointError, UnsupportedTokenizer
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.byte_letters import BYTE_OF_CHARACTER
from minipaged.tokenizer.text_bound import chars_per_token
from minipaged.utils.files import read_json_object

_PROBE = "Is this a text? 1 2 3"  # any that has tokens
LOW_LINE = "\u2581"
STRIP_ONE = [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
"""Llama's decoder step: one space is removed at the beginning of a whole text."""
Spelling = Callable[[str], bytes]
EXTRA = "pip install 'minipaged[tokenizers]'"


class LibraryTokenizer(Tokenizer):
    """The tokenizer of a `tokenizer.json`, encoded by the library that such files were made for."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a file that the library cannot read."""
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # it raises nothing more specific
            raise CheckpointError(
                f"{path} is not a tokenizer ({error}): download it again."
            ) from error
        self._alone = Lock()  # encode_special_tokens belongs to the library's object
        self._library.no_truncation()
        self._library.no_padding()
        described = read_json_object(path)
        added: dict[int, Any] = self._library.get_added_tokens_decoder()
        spell, self._spell_first = _choose_spelling(path, described.get("decoder"))
        vocabulary = {
            token_id: token.encode() if token_id in added else spell(token)
            for token, token_id in self._library.get_vocab().items()
        }
        specials = {token.content: i for i, token in added.items() if token.special}
        normalizer = self._library.normalizer
        super().__init__(
            vocabulary,
            specials,
            self._find_first_ids(),
            chars_per_token=chars_per_token(
                described, str if normalizer is None else normalizer.normalize_str
            ),
        )
        self._letters = self._find_letters(described["model"])

    def _find_first_ids(self) -> list[int]:
        """The ids before every text. Those after it are omitted: they mark its end."""
        bare = self._library.encode(_PROBE, add_special_tokens=False).ids
        framed = self._library.encode(_PROBE).ids
        begins = [i for i in range(len(framed)) if framed[i : i + len(bare)] == bare]
        return framed[: begins[0]] if begins else []

    def _encode(self, text: str, allow_special: bool) -> list[int]:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair
        with self._alone:
            self._library.encode_special_tokens = not allow_special
            token_ids = self._library.encode(text, add_special_tokens=False).ids
        if allow_special:
            return token_ids
        return [i for token_id in token_ids for i in self._letters.get(token_id, [token_id])]

    def _find_letters(self, model: dict[str, Any]) -> dict[int, list[int]]:
        """The ids of the characters of each special token, except the unknown token.

        They replace the token in plain text where merges lead to it, as from "</" and "s>".
        """
        unknown = model.get("unk_id", self._library.token_to_id(str(model.get("unk_token"))))
        found: dict[int, list[int]] = {}
        for token, token_id in self.special_tokens.items():
            spelt = [[letter] for letter in token]
            for n, letter in enumerate(token):
                if self._library.token_to_id(letter) is None:
                    spelt[n] = [f"<0x{byte:02X}>" for byte in letter.encode()]
            ids = [self._library.token_to_id(piece) for pieces in spelt for piece in pieces]
            found[token_id] = [i for i in ids if i is not None]
        found.pop(unknown, None)
        return found

    def encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        """Encode as one text, because the tokens of a piece may depend on its position."""
        joined = "".join(
            self._second_spellings[piece] if number % 2 else piece
            for number, piece in enumerate(pieces)
        )
        meant = {
            self._library.token_to_id(spelling): self.special_tokens[token]
            for token, spelling in self._second_spellings.items()
        }
        return [meant.get(i, i) for i in self._encode(joined, allow_special=False)]

    @cached_property
    def _second_spellings(self) -> dict[str, str]:
        """A spelling of each special token that cannot be guessed.

        The library treats these as added tokens that are not special, so it finds them even where
        it encodes special tokens as text.
        """
        from tokenizers import AddedToken

        added = self._library.get_added_tokens_decoder()
        second: dict[str, AddedToken] = {
            token: AddedToken(
                f"<{secrets.token_hex(16)}>",
                lstrip=added[token_id].lstrip,
                rstrip=added[token_id].rstrip,
                normalized=False,
            )
            for token, token_id in self.special_tokens.items()
        }
        with self._alone:
            self._library.add_tokens(list(second.values()))
        return {token: each.content for token, each in second.items()}

    def token_text(self, token_id: int) -> str:
        return self._library.id_to_token(token_id) or ""

    def first_token_bytes(self, token_id: int) -> bytes:
        """The bytes of a SentencePiece token without the space that every text begins with."""
        token = self._library.id_to_token(token_id)
        return b"" if token is None else self._spell_first(token)


def refuse_without_the_library(path: Path, reason: str) -> None:
    """Raise UnsupportedTokenizer unless `tokenizers` is installed."""
    if find_spec("tokenizers") is None:
        raise UnsupportedTokenizer(
            f"{path} is not a tokenizer for tiktoken, since {reason}: install the library that "
            f"reads it by {EXTRA}."
        )


def _choose_spelling(path: Path, decoder: Any) -> tuple[Spelling, Spelling]:
    """Return functions that read the bytes of a token, and of a token at the start of a text.

    Raises UnsupportedTokenizer for an unknown decoder.
    """
    steps = _list_steps(decoder)
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        return _spell_byte_level, _spell_byte_level
    strips = "Strip" in kinds
    replaces = any(step.get("pattern") == {"String": LOW_LINE} for step in steps)
    metaspace = next((step for step in steps if step.get("type") == "Metaspace"), None)
    if (strips and steps[-2:] != STRIP_ONE) or not (metaspace or replaces):
        raise UnsupportedTokenizer(
            f"{path} is neither a byte-level nor a SentencePiece tokenizer, and how its tokens "
            "become text is not known here: give another checkpoint."
        )
    spell = _spell_sentence_piece if "ByteFallback" in kinds else _spell_low_lines
    if strips:
        return spell, lambda token: spell(token).removeprefix(b" ")
    if metaspace and metaspace.get("prepend_scheme") != "never":
        return spell, lambda token: spell(token.replace(LOW_LINE, ""))
    return spell, spell


def _list_steps(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder, one after the other."""
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder.get("decoders") or [] for step in _list_steps(part)]
    return [decoder]


def _spell_sentence_piece(token: str) -> bytes:
    """Calls `_spell_low_lines`, except for "<0x0A>", which is a byte without its own token."""
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else _spell_low_lines(token)


def _spell_low_lines(token: str) -> bytes:
    """A low line represents a space."""
    return token.replace(LOW_LINE, " ").encode()


def _spell_byte_level(token: str) -> bytes:
    return bytes(BYTE_OF_CHARACTER[c] for c in token if c in BYTE_OF_CHARACTER)
