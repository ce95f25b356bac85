"""Text to tokens and back.

    bpe             byte-level byte-pair encoding, by tiktoken
    patterns        the patterns that cut text into words before pairs are merged
    tiktoken_file   reads tiktoken.json and a file of ranks
    hugging_face    reads tokenizer.json, or vocab.json and merges.txt
    merges          converts merges to ranks, and proves that both give the same tokens
    hf_library      all other tokenizers, through Hugging Face's own library
    text_bound      a lower bound of a text's tokens, known before it is encoded
    special_tokens  the role of each special token: "bos_token" is "<s>" in one checkpoint
    hf_names        the names of Hugging Face's tokenizers
    load            chooses the tokenizer for a checkpoint's folder

This module contains what they have in common: a token is a sequence of bytes, not of characters.
"""

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minipaged.tokenizer.hf_names import HuggingFaceNames, refuse_others, to_list


class Tokenizer(HuggingFaceNames):
    """A vocabulary, and the encoding of text in it.

    A model may have more ids than its tokenizer, since vocabularies are padded to round sizes. Such
    an id has no bytes, so it decodes to "".
    """

    def __init__(
        self,
        vocabulary: Mapping[int, bytes],
        special_tokens: Mapping[str, int],
        first_ids: Sequence[int] = (),
        *,
        chars_per_token: int | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        """The bytes of every token, by id. Some ids may be unused."""
        self.special_tokens = dict(special_tokens)
        """Marks such as the end of a text, which are not part of the text; by name."""
        self.special_ids = frozenset(self.special_tokens.values())
        self.added_tokens = dict(self.special_tokens)
        """Tokens that are cut out of a text as a whole, special or not."""
        self.first_ids = list(first_ids)
        """The tokens that the model expects before every text: usually none or one mark."""
        self.chars_per_token = chars_per_token
        """The maximum characters of text per token; None if no limit is known."""
        self._warned = False

    @property
    def vocab_size(self) -> int:
        """One more than the highest id. Unused ids below it decode to ""."""
        return max(self.vocabulary, default=-1) + 1

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        allow_special: bool = True,
        **other: Any,
    ) -> list[int]:
        """The tokens of a text.

        Args:
            text: the text to encode.
            add_special_tokens: begin with `first_ids`. A chat template already writes them.
            allow_special: a special token that is spelt out in the text becomes that token, as in
                Hugging Face's tokenizers. Use False for untrusted text, so that it is encoded as
                plain text.
            other: parameters of Hugging Face's without effect, such as `padding=False`; others
                raise InvalidOption.
        """
        refuse_others(other)
        token_ids = self._encode(text, allow_special)
        if not add_special_tokens:
            return token_ids
        if self.first_ids and token_ids[: len(self.first_ids)] == self.first_ids:
            self._warn_of_a_second_beginning()
        return self.first_ids + token_ids

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the text's tokens, without encoding it; 0 if unknown."""
        return -(-len(text) // self.chars_per_token) if self.chars_per_token else 0

    def _warn_of_a_second_beginning(self) -> None:
        if self._warned:
            return
        self._warned = True  # once per model: a prompt may come a million times
        mark = self.decode(self.first_ids)
        warnings.warn(
            f"a prompt begins with {mark!r}, which the tokenizer also puts before every text, so "
            "the model sees it twice: leave it out of the text, or give token ids.",
            stacklevel=2,
        )

    @abstractmethod
    def _encode(self, text: str, allow_special: bool) -> list[int]:
        """The tokens of a text, without `first_ids`."""

    def decode(
        self, token_ids: int | Iterable[int], skip_special_tokens: bool = False, **other: Any
    ) -> str:
        """The text of one or several tokens. Bytes that are not UTF-8 become U+FFFD.

        Like Hugging Face's tokenizers, it treats the tokens as a whole text from its beginning: a
        SentencePiece tokenizer then omits the first space.
        """
        refuse_others(other)
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        shown = [i for i in to_list(token_ids) if i not in skipped and i in self.vocabulary]
        pieces = [self.first_token_bytes(i) for i in shown[:1]]
        pieces += [self.token_bytes(i) for i in shown[1:]]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, possibly incomplete characters; empty for an unknown id."""
        return self.vocabulary.get(token_id, b"")

    def first_token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token at the start of a text."""
        return self.token_bytes(token_id)
