"""Text to tokens and back.

    patterns      how text is cut into words before pairs of tokens are merged
    byte_pairs    byte-level byte-pair encoding, by tiktoken
    ranks         tiktoken.json and a file of ranks -> such an encoding
    merges        a list of pairs -> ranks, and the proof that both cut every text alike
    special_names which token plays which role: "bos_token" is "<s>" in one checkpoint
    hugging_face  tokenizer.json, or vocab.json and merges.txt -> an encoding by tiktoken
    library       all other tokenizers, through Hugging Face's own library
    folder        which of them a checkpoint's folder holds

Here is what they have in common: a token is some bytes, and not some characters.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence


class Tokenizer(ABC):
    """A vocabulary, and how text is encoded in it.

    A model may know more ids than its tokenizer, since vocabularies are padded to round sizes. Such
    an id has no bytes, so it decodes to "".
    """

    def __init__(
        self,
        vocabulary: Mapping[int, bytes],
        special_tokens: Mapping[str, int],
        first_ids: Sequence[int] = (),
    ) -> None:
        self.vocabulary = vocabulary
        """The bytes of every token, by id. Some ids may never have been given out."""
        self.special_tokens = dict(special_tokens)
        """Marks such as the end of a text, which are not part of what is said; by their name."""
        self.special_ids = frozenset(self.special_tokens.values())
        self.first_ids = list(first_ids)
        """What the model was taught to find before every text, mostly nothing or one mark."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id. Ids below it that were never given out decode to ""."""
        return max(self.vocabulary, default=-1) + 1

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True
    ) -> list[int]:
        """The tokens of a text.

        Args:
            text: what is to be encoded.
            add_special_tokens: begin with `first_ids`. A chat template has written them already.
            allow_special: a special token that is spelt out in the text becomes that token, as in
                Hugging Face's tokenizers; text from strangers is better encoded without, so that
                it is taken for mere letters.
        """
        token_ids = self._encode(text, allow_special)
        return self.first_ids + token_ids if add_special_tokens else token_ids

    @abstractmethod
    def _encode(self, text: str, allow_special: bool) -> list[int]:
        """The tokens of a text, and nothing before them."""

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of some tokens. Bytes that are no UTF-8 become U+FFFD."""
        skipped = self.special_ids if skip_special else frozenset[int]()
        pieces = (self.token_bytes(i) for i in token_ids if i not in skipped)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which need not be whole characters; none for an unknown id."""
        return self.vocabulary.get(token_id, b"")
