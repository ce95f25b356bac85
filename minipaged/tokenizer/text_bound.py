"""A lower bound of the number of tokens of a text, known before it is encoded.

Encoding takes time in proportion to the text, and a text of a gigabyte is too long for any model.
If no token can encode more than M characters, a text of N characters has at least N / M tokens,
which costs nothing to compute. The argument for a tokenizer.json:

    normalizer      composes at most four characters to one (NFC), or keeps each
    pre-tokenizer   cuts the text into words without dropping a character
    model           has a token for every byte, so no character vanishes, and an unknown word
                    of any length does not become one token
    tokens          none has more characters than the longest in the vocabulary

If one of these is not known to hold, there is no bound, and text of any length is encoded. This is
the case for normalizers that strip white space, remove accents or use a table (Strip, StripAccents,
Nmt, Precompiled), for pre-tokenizers that drop white space, and for added tokens that include the
white space around them.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from minipaged.tokenizer.bpe import NFC_SHRINKS
from minipaged.tokenizer.byte_letters import BYTE_OF_CHARACTER

PAIRS_SHRINK = 2
"""A str may represent a character as two surrogates, which are first joined to one character."""

_GROWING = ("NFD", "NFKD", "Prepend", "Lowercase")  # at least one character for each
_KEEPING = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split")  # unless "Removed"


def chars_per_token(described: Mapping[str, Any], normalize: Callable[[str], str]) -> int | None:
    """The maximum characters of text that one token can encode; None if no bound is known.

    Args:
        described: the content of a tokenizer.json that the library has read.
        normalize: its normalizer, through which some added tokens are looked for.
    """
    shrinks = _shrinks(described.get("normalizer"))
    added = described.get("added_tokens") or []
    if (
        shrinks is None
        or not _keeps_words(described.get("pre_tokenizer"))
        or not _has_every_byte(described)
        or any(token.get("lstrip") or token.get("rstrip") for token in added)
    ):
        return None
    texts = _texts(described["model"])
    for token in added:
        texts += token["content"], normalize(token["content"])
    return PAIRS_SHRINK * shrinks * max(map(len, texts))


def _shrinks(normalizer: Mapping[str, Any] | None) -> int | None:
    """The maximum number of characters that a normalizer composes to one; None if unknown."""
    if normalizer is None:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        stages = [_shrinks(stage) for stage in normalizer["normalizers"]]
        return None if None in stages else prod(stage or 1 for stage in stages)
    if kind in ("NFC", "NFKC"):
        return NFC_SHRINKS
    if kind == "Replace":
        replaced = normalizer["pattern"].get("String")
        return 1 if replaced and len(normalizer["content"]) >= len(replaced) else None
    return 1 if kind in _GROWING else None


def _keeps_words(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether every character becomes part of some word."""
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_keeps_words, pre_tokenizer["pretokenizers"]))
    return pre_tokenizer["type"] in _KEEPING and pre_tokenizer.get("behavior") != "Removed"


def _has_every_byte(described: Mapping[str, Any]) -> bool:
    """Whether a character without a token becomes several tokens, one per byte."""
    model = described["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    texts = set(_texts(model))
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in texts for byte in range(256))
    is_byte_level = "'type': 'ByteLevel'" in str(described.get("pre_tokenizer"))
    return model.get("type") == "BPE" and is_byte_level and texts >= BYTE_OF_CHARACTER.keys()


def _texts(model: Mapping[str, Any]) -> list[str]:
    vocab = model["vocab"]  # Unigram's is a list of pairs: a text and its score
    return [text for text, _ in vocab] if isinstance(vocab, list) else list(vocab)
