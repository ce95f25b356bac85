"""Merging by rank and merging by a list of pairs: where the proof holds, they are the same."""

import itertools
import random

import pytest
import tiktoken

from minipaged.errors import UnsupportedTokenizer
from minipaged.tokenizer import merges as merges_module
from minipaged.tokenizer.merges import rank_tokens

BYTES = [bytes([byte]) for byte in range(256)]
WORDS = [bytes(w) for n in range(1, 8) for w in itertools.product(b"ab", repeat=n)]


def merge_by_list(word: bytes, merges: list, vocabulary: set, whole_words: bool) -> list[bytes]:
    """As Hugging Face's library does it: the neighbours whose pair ranks highest, leftmost."""
    if whole_words and word in vocabulary:
        return [word]
    places = {pair: place for place, pair in enumerate(merges)}
    pieces = [word[i : i + 1] for i in range(len(word))]
    while True:
        found = [
            (places[pair], i) for i, pair in enumerate(itertools.pairwise(pieces)) if pair in places
        ]
        if not found:
            return pieces
        _, i = min(found)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def merge_by_rank(words: list[bytes], ranks: dict[bytes, int]) -> list[list[bytes]]:
    encoding = tiktoken.Encoding("", pat_str=r"\w+", mergeable_ranks=ranks, special_tokens={})
    decode = encoding.decode_single_token_bytes
    return [[decode(i) for i in encoding.encode_ordinary(word.decode())] for word in words]


def make_merges(rng: random.Random) -> list[tuple[bytes, bytes]]:
    """An untrained list: often one that no text could have led to."""
    tokens, merges = [b"a", b"b"], []
    while len(merges) < rng.randint(1, 7):
        pair = (rng.choice(tokens), rng.choice(tokens))
        if len(pair[0] + pair[1]) <= 6 and pair not in merges:
            merges.append(pair)
            if pair[0] + pair[1] not in tokens:
                tokens.append(pair[0] + pair[1])
    if rng.random() < 0.3:
        i = rng.randrange(len(merges))
        merges.insert(rng.randrange(len(merges)), merges.pop(i))
    return merges


def try_many(whole_words: bool, num_tries: int = 1_000) -> tuple[int, int, int]:
    """How many lists were proved equal, refused, and refused although no word would differ."""
    rng = random.Random(0)
    proved = refused = needlessly = 0
    for _ in range(num_tries):
        merges = make_merges(rng)
        vocabulary = {left + right for left, right in merges}
        if rng.random() < 0.5:  # a token to which no merge leads
            vocabulary.add(rng.choice(WORDS))
        expected = [merge_by_list(word, merges, vocabulary, whole_words) for word in WORDS]
        try:
            ranks = rank_tokens([*BYTES, *vocabulary], merges, whole_words)
        except UnsupportedTokenizer:
            refused += 1
            unproved = {token: i for i, token in enumerate([*BYTES, *(x + y for x, y in merges)])}
            needlessly += merge_by_rank(WORDS, unproved) == expected
            continue
        proved += 1
        assert merge_by_rank(WORDS, ranks) == expected, merges
    return proved, refused, needlessly


@pytest.mark.parametrize("whole_words", [False, True])
def test_merges_proved_equal_merge_every_word_alike(whole_words):
    proved, refused, needlessly = try_many(whole_words)
    assert min(proved, refused) > 100, "both must happen"
    assert needlessly < 0.05 * refused, "refused, though nothing would have gone wrong"


def believe(ranks, merges):
    """No proof."""
    return set()


def believe_pairs(ranks, merges):
    """The order of merges is not looked at."""
    splits = {token: merges_module._before_last_merge(token, ranks) for token in ranks}
    for token, pieces in splits.items():
        if len(token) > 1 and len(pieces) == 2 and tuple(pieces) not in merges:
            raise UnsupportedTokenizer("")
    return {token for token, pieces in splits.items() if len(pieces) > 2}


def believe_order(ranks, merges):
    """Whether a pair is in the list is not looked at."""
    return {t for t in ranks if len(merges_module._before_last_merge(t, ranks)) > 2}


@pytest.mark.parametrize("fault", [believe, believe_pairs, believe_order])
def test_a_proof_with_a_gap_is_detected(monkeypatch, fault):
    monkeypatch.setattr(merges_module, "_prove_equal", fault)
    with pytest.raises(AssertionError):
        try_many(whole_words=False)


def test_a_vocabulary_without_a_byte_that_text_can_have_is_refused():
    with pytest.raises(UnsupportedTokenizer, match="lacks 2 of the single bytes"):
        rank_tokens([b for b in BYTES if b not in (b"a", b"b")], [], False)
    never = [b for b in BYTES if b not in (b"\xc0", b"\xff")]  # no text has these in UTF-8
    assert len(rank_tokens(never, [], False)) == 256


def test_a_merge_whose_result_is_no_token_is_refused():
    with pytest.raises(UnsupportedTokenizer, match="not in its vocabulary"):
        rank_tokens(BYTES, [(b"a", b"b")], False)
