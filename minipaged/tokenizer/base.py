"""Text to tokens and back.

    bpe             byte-level byte-pair encoding, by tiktoken
    patterns        how text is cut into words before pairs of tokens are merged
    tiktoken_file   tiktoken.json and a file of ranks -> such an encoding
    hugging_face    tokenizer.json, or vocab.json and merges.txt -> such an encoding
    merges          a list of pairs -> ranks, and the proof that both cut every text alike
    hf_library      all other tokenizers, through Hugging Face's own library
    text_bound      the fewest tokens that a text can have, known before it is encoded
    special_tokens  which token plays which role: "bos_token" is "<s>" in one checkpoint
    hf_names        the names that scripts for Hugging Face's tokenizers use
    load            which of them a checkpoint's folder holds

Here is what they have in common: a token is some bytes, and not some characters.
"""

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minipaged.tokenizer.hf_names import HuggingFaceNames, refuse_others, to_list


class Tokenizer(HuggingFaceNames):
    """A vocabulary, and how text is encoded in it.

    A model may know more ids than its tokenizer, since vocabularies are padded to round sizes. Such
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
        """The bytes of every token, by id. Some ids may never have been given out."""
        self.special_tokens = dict(special_tokens)
        """Marks such as the end of a text, which are not part of what is said; by their name."""
        self.special_ids = frozenset(self.special_tokens.values())
        self.added_tokens = dict(self.special_tokens)
        """Tokens that are cut out of a text whole, whatever they spell; special or not."""
        self.first_ids = list(first_ids)
        """What the model was taught to find before every text, mostly nothing or one mark."""
        self.chars_per_token = chars_per_token
        """The most characters of text that one token can encode; None where no limit is known."""
        self._warned = False

    @property
    def vocab_size(self) -> int:
        """One more than the highest id. Ids below it that were never given out decode to ""."""
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
            text: what is to be encoded.
            add_special_tokens: begin with `first_ids`. A chat template has written them already.
            allow_special: a special token that is spelt out in the text becomes that token, as in
                Hugging Face's tokenizers; text from strangers is better encoded without, so that
                it is taken for mere letters.
            other: parameters of Hugging Face's that ask for nothing, such as `padding=False`; what
                is not built here raises InvalidOption.
        """
        refuse_others(other)
        token_ids = self._encode(text, allow_special)
        if not add_special_tokens:
            return token_ids
        if self.first_ids and token_ids[: len(self.first_ids)] == self.first_ids:
            self._warn_of_a_second_beginning()
        return self.first_ids + token_ids

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that the text certainly has, without encoding it; 0 if unknown."""
        return -(-len(text) // self.chars_per_token) if self.chars_per_token else 0

    def _warn_of_a_second_beginning(self) -> None:
        if self._warned:
            return
        self._warned = True  # once per model: a prompt may come a million times
        mark = self.decode(self.first_ids)
        warnings.warn(
            f"a prompt begins with {mark!r}, and the tokenizer puts {mark!r} before every text, so "
            "the model sees it twice: leave it out of the text, or give token ids.",
            stacklevel=2,
        )

    @abstractmethod
    def _encode(self, text: str, allow_special: bool) -> list[int]:
        """The tokens of a text, and nothing before them."""

    def decode(
        self, token_ids: int | Iterable[int], skip_special_tokens: bool = False, **other: Any
    ) -> str:
        """The text of some tokens, or of one. Bytes that are no UTF-8 become U+FFFD.

        Like Hugging Face's tokenizers, it takes the tokens for a whole text, from its beginning:
        a SentencePiece tokenizer then leaves out the first space.
        """
        refuse_others(other)
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        shown = [i for i in to_list(token_ids) if i not in skipped and i in self.vocabulary]
        pieces = [self.first_token_bytes(i) for i in shown[:1]]
        pieces += [self.token_bytes(i) for i in shown[1:]]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which need not be whole characters; none for an unknown id."""
        return self.vocabulary.get(token_id, b"")

    def first_token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that is the first of a text."""
        return self.token_bytes(token_id)
