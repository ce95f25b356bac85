"""Byte-level byte-pair encoding, by tiktoken: GPT-2's, and that of most models since.

A text goes through four steps:

    added tokens   "<|user|>" and similar tokens are cut out first, each as one token
    normal form    some models compose letters first (NFC): an "e" and a combining accent are an "é"
    words          what is left is cut into words by a pattern; no token spans two of them
    pairs          a word begins as single bytes; the pair with the lowest rank is merged, until
                   no two neighbours make a token ("Neural Machine Translation of Rare Words with
                   Subword Units", arXiv 1508.07909, on bytes as in GPT-2)

The last two are tiktoken's work.
"""

import unicodedata
from collections.abc import Mapping, Sequence

import tiktoken

from minipaged.errors import InvalidRequest
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.special_tokens import any_of

NFC_SHRINKS = 4
"""The maximum number of characters that NFC composes to one: none decomposes into more, and
decomposing never makes a text shorter."""


class BytePairTokenizer(Tokenizer):
    """tiktoken merges by rank; a token's id is looked up afterwards, since it need not be its rank.

    Args:
        pattern: cuts text into words, and matches every character.
        ranks: from a token's bytes to its rank, for tokens that pairs are merged into. All bytes
            that occur in UTF-8 must be there.
        tokens: from id to bytes, for all tokens but the added ones.
        special_tokens: added tokens that are marks.
        other_added_tokens: added tokens that are text, but never made of pairs: "<think>".
        first_ids: the tokens before every text.
        normal_form: whether text is first converted to Unicode's normal form C.
    """

    def __init__(
        self,
        pattern: str,
        ranks: Mapping[bytes, int],
        tokens: Mapping[int, bytes],
        special_tokens: Mapping[str, int],
        *,
        other_added_tokens: Mapping[str, int] | None = None,
        first_ids: Sequence[int] = (),
        normal_form: bool = False,
    ) -> None:
        all_added = {**special_tokens, **(other_added_tokens or {})}
        added = {token_id: text.encode() for text, token_id in all_added.items()}
        vocabulary = {**tokens, **added}
        longest = max(map(len, vocabulary.values()), default=0)  # bytes, so no fewer characters
        super().__init__(
            vocabulary,
            special_tokens,
            first_ids,
            chars_per_token=longest * (NFC_SHRINKS if normal_form else 1),
        )
        self.added_tokens = all_added
        self._encoding = tiktoken.Encoding(
            name="", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={}
        )
        ids = {token: token_id for token_id, token in tokens.items()}
        self._id_of_rank = {rank: ids[token] for token, rank in ranks.items() if token in ids}
        self._normal_form = normal_form
        self._any_added = any_of(all_added)
        self._any_other = any_of(other_added_tokens or {})

    def _encode(self, text: str, allow_special: bool) -> list[int]:
        token_ids: list[int] = []
        pieces = (self._any_added if allow_special else self._any_other).split(text)
        for number, piece in enumerate(pieces):
            if number % 2 == 0:  # matches have odd indices, the text between them even ones
                token_ids += self._encode_words(piece)
            else:
                token_ids.append(self.added_tokens[piece])
        return token_ids

    def _encode_words(self, text: str) -> list[int]:
        if self._normal_form:
            text = unicodedata.normalize("NFC", text)
        try:
            ranks = self._encoding.encode_ordinary(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            # The regex engine fails after backtracking a million times.
            raise InvalidRequest(
                f"a text of {len(text)} characters cannot be cut into tokens, since it has a "
                "million or more spaces or line ends in a row: shorten them."
            ) from error
        return [self._id_of_rank[rank] for rank in ranks]
