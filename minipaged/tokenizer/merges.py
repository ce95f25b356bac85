"""Converts a list of merges to ranks for tiktoken, and proves that both give the same tokens.

Hugging Face's byte-pair encoding merges *pairs of tokens*: the neighbours whose pair is highest
in a list of merges. tiktoken merges *bytes*: the neighbours that together spell the token of the
lowest rank, whatever pair they are. Both take the leftmost of equals. So tiktoken could merge two
neighbours that spell a token but are in no list. It never does if this holds:

    Spell a token in single bytes and merge them by rank until two pieces are left. Those two are
    its *last pair*, and the list must contain it.

The proof: a pair becomes adjacent in a text only if no earlier merge crossed its two ends. Then all
merges between the ends were those of the token by itself, and the pair is its last pair. If last
pairs have the same order as ranks, both methods have the same candidates in every step and choose
the same one. A token whose bytes get stuck in more than two pieces is never merged in any text.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise

from minipaged.errors import UnsupportedTokenizer

Pair = tuple[bytes, bytes]

# Bytes that never occur in UTF-8. A vocabulary may lack them, but tiktoken needs them.
_NOT_IN_UTF8 = frozenset(bytes([byte]) for byte in (0xC0, 0xC1, *range(0xF5, 0x100)))


def rank_tokens(tokens: Iterable[bytes], merges: list[Pair], whole_words: bool) -> dict[bytes, int]:
    """Return the ranks with which tiktoken encodes like the list of merges.

    Args:
        tokens: the vocabulary, without added tokens.
        merges: pairs, best first.
        whole_words: a word that is a token becomes that token, even if no merges lead to it
            ("ignore_merges"). tiktoken always does this, so without the option a token that no
            merge leads to gets no rank.

    Raises UnsupportedTokenizer if tiktoken could encode some text differently.
    """
    vocabulary = set(tokens)
    ranks = {bytes([byte]): byte for byte in range(256)}
    lacking = len(ranks.keys() - vocabulary - _NOT_IN_UTF8)
    if lacking:
        raise UnsupportedTokenizer(f"its vocabulary lacks {lacking} of the single bytes")
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    if ranks.keys() - vocabulary - _NOT_IN_UTF8:
        raise UnsupportedTokenizer("it merges pairs into something that is not in its vocabulary")
    unreachable = _prove_equal(ranks, merges)
    if not whole_words:
        return {token: rank for token, rank in ranks.items() if token not in unreachable}
    for token in vocabulary - ranks.keys():
        if len(_before_last_merge(token, ranks)) == 2:
            raise UnsupportedTokenizer(f"no merge leads to {token!r}, and tiktoken would find one")
        ranks[token] = len(ranks)
    return ranks


def _prove_equal(ranks: Mapping[bytes, int], merges: list[Pair]) -> set[bytes]:
    """Return the tokens that no merge leads to, or raise UnsupportedTokenizer."""
    places = {pair: place for place, pair in enumerate(merges)}
    unreachable: set[bytes] = set()
    latest = -1
    for token in ranks:
        if len(token) == 1:
            continue
        pieces = _before_last_merge(token, ranks)
        if len(pieces) > 2:
            unreachable.add(token)
            continue
        place = places.get((pieces[0], pieces[1]))
        if place is None:
            raise UnsupportedTokenizer(f"tiktoken would merge {pieces} into one token")
        if place < latest:
            raise UnsupportedTokenizer(f"tiktoken would merge {pieces} too early")
        latest = place
    return unreachable


def last_pair(token: bytes, ranks: Mapping[bytes, int]) -> Pair:
    """The pair that merges to this token. Raises ValueError if no merge leads to it."""
    left, right = _before_last_merge(token, ranks)
    return left, right


def _before_last_merge(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The last pair that the bytes of a token become, or the pieces in which they get stuck.

    The token's own rank plays no part: while there are three pieces or more, no two neighbours are
    the whole token.
    """
    ends = list(range(len(token) + 1))  # piece i is token[ends[i] : ends[i + 1]]
    while len(ends) > 3:
        best, place = None, 0
        for i in range(len(ends) - 2):
            rank = ranks.get(token[ends[i] : ends[i + 2]])
            if rank is not None and (best is None or rank < best):
                best, place = rank, i + 1
        if best is None:
            break
        del ends[place]
    return [token[begin:end] for begin, end in pairwise(ends)]
