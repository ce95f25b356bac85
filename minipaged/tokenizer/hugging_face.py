"""Converts a Hugging Face tokenizer to tiktoken, or gives the reason why that is not possible.

Most checkpoints have a `tokenizer.json`, which describes all steps in order. The oldest, such as
OPT, have `vocab.json` and `merges.txt` instead, which omit what was then common knowledge. Unknown
features are refused, not guessed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipaged.errors import CheckpointError, UnsupportedTokenizer
from minipaged.tokenizer.bpe import BytePairTokenizer
from minipaged.tokenizer.byte_letters import BYTE_OF_CHARACTER
from minipaged.tokenizer.merges import rank_tokens
from minipaged.tokenizer.patterns import GPT2, QWEN, choose_pattern
from minipaged.tokenizer.special_tokens import read_special_names
from minipaged.utils.files import read_json_object

LONGEST_TOKEN = 1000  # bytes; the proof takes time quadratic in a token's length

# The exceptions that a broken file can cause.
_BROKEN = (LookupError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before all other steps."""

    text: str
    token_id: int
    is_special: bool
    in_normal_form: bool = False  # searched in the text's normal form


def read_tokenizer_json(path: Path) -> BytePairTokenizer:
    """The tokenizer that a `tokenizer.json` describes.

    Raises:
        CheckpointError: the file is broken.
        UnsupportedTokenizer: tiktoken cannot do what it describes, or it cannot be proved.
    """
    described = read_json_object(path)
    model = described.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f'{path} has no "model": download it again.')
    try:
        _refuse_other_models(model)
        pattern = choose_pattern(described.get("pre_tokenizer"))
        if pattern is None:
            raise UnsupportedTokenizer("it cuts text into words in a way of its own")
        return _build(
            pattern,
            model["vocab"],
            [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]],
            [_read_added_token(token) for token in described.get("added_tokens") or []],
            first_ids=_read_first_ids(described.get("post_processor")),
            normal_form=_read_normalizer(described.get("normalizer")),
            whole_words=model.get("ignore_merges") is True,
        )
    except _BROKEN as error:
        raise CheckpointError(
            f"{path} is not a complete tokenizer ({error!r}): download it again."
        ) from error


def read_vocab_and_merges(folder: Path) -> BytePairTokenizer:
    """The tokenizer of a folder with `vocab.json` and `merges.txt`.

    The tokenizer's class, which `tokenizer_config.json` may name, determines how text is cut, and
    the special tokens. Raises what `read_tokenizer_json` raises.
    """
    config_path = folder / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    made_for = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if made_for not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise UnsupportedTokenizer(f"it was made for {made_for}")
    if config.get("add_prefix_space"):
        raise UnsupportedTokenizer("it puts a space before every text")
    is_qwen = made_for == "Qwen2Tokenizer"
    end = "<|endoftext|>"
    names = {"bos_token": end, "eos_token": end, **read_special_names(folder)}
    vocab = read_json_object(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").split("\n")
        merges = [line.rstrip("\r") for line in lines if not line.startswith("#version")]
        return _build(
            QWEN if is_qwen else GPT2,
            vocab,
            [merge.split(" ") for merge in merges if merge],
            _list_added_tokens(folder, config, vocab, names),
            first_ids=[vocab[names["bos_token"]]] if config.get("add_bos_token") else [],
            normal_form=is_qwen,
        )
    except (OSError, *_BROKEN) as error:
        raise CheckpointError(
            f"{folder} contains no complete tokenizer in vocab.json and merges.txt ({error!r}): "
            "download them again."
        ) from error


def _list_added_tokens(
    folder: Path, config: dict[str, Any], vocab: dict[str, int], names: dict[str, str]
) -> list[AddedToken]:
    """The added tokens with ids, then those that only have a role."""
    listed = config.get("added_tokens_decoder") or {}  # from id, which JSON has as text
    added = {t["content"]: _read_added_token({**t, "id": int(i)}) for i, t in listed.items()}
    ids = folder / "added_tokens.json"
    if ids.is_file() and read_json_object(ids).keys() - added.keys():
        raise UnsupportedTokenizer("its added_tokens.json does not define how tokens are found")
    roles = [config.get(role) or text for role, text in names.items()]
    for role in ("additional_special_tokens", "extra_special_tokens"):
        roles += config.get(role) or []
    for token in roles:
        described = token if isinstance(token, dict) else {"content": token}
        text = described["content"]
        if text in vocab and text not in added:
            added[text] = _read_added_token({**described, "id": vocab[text], "special": True})
    return list(added.values())


def _build(
    pattern: str,
    vocab: dict[str, int],
    merges: list[list[str]],
    added: list[AddedToken],
    *,
    first_ids: list[int],
    normal_form: bool,
    whole_words: bool = False,
) -> BytePairTokenizer:
    _check_ids([*vocab.values(), *(token.token_id for token in added), *first_ids])
    _check_added_tokens(added, vocab, normal_form)
    added_ids = {token.token_id for token in added}
    tokens = {i: _spell(text) for text, i in vocab.items() if i not in added_ids}
    pairs = [(_spell(left), _spell(right)) for left, right in merges]
    longest = max(map(len, tokens.values()), default=0)
    if longest > LONGEST_TOKEN:
        raise UnsupportedTokenizer(f"it has a token of {longest} bytes")
    return BytePairTokenizer(
        pattern,
        rank_tokens(tokens.values(), pairs, whole_words),
        tokens,
        {token.text: token.token_id for token in added if token.is_special},
        other_added_tokens={t.text: t.token_id for t in added if not t.is_special},
        first_ids=first_ids,
        normal_form=normal_form,
    )


def _spell(token: str) -> bytes:
    """The bytes of a token in the file."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        raise UnsupportedTokenizer(f"its token {token!r} is not spelt in bytes") from None


# ------------------------------------------------------------------- the parts of tokenizer.json


def _refuse_other_models(model: dict[str, Any]) -> None:
    kind = model.get("type") or ("BPE" if "merges" in model else "none")  # old files have no type
    if kind != "BPE":
        raise UnsupportedTokenizer(f"its model is {kind}, not byte-pair encoding")
    for option in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedTokenizer(f"its byte-pair encoding has {option}")


def _read_normalizer(normalizer: dict[str, Any] | None) -> bool:
    """Whether text is first converted to normal form C."""
    if normalizer is None:
        return False
    kind = normalizer["type"]
    if kind == "Sequence":
        stages = normalizer["normalizers"]
        if len(stages) < 2:
            return _read_normalizer(stages[0] if stages else None)
    if kind != "NFC":
        raise UnsupportedTokenizer(f"it rewrites text first ({kind})")
    return True


def _read_added_token(token: dict[str, Any]) -> AddedToken:
    text = token["content"]
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST_TOKEN:
        raise ValueError(f"an added token of {len(text)} characters")
    if any(token.get(option) for option in ("single_word", "lstrip", "rstrip")):
        raise UnsupportedTokenizer(f"its token {text!r} includes surrounding characters")
    return AddedToken(
        text, token["id"], token.get("special") is True, bool(token.get("normalized"))
    )


def _check_ids(ids: list[Any]) -> None:
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise ValueError(f"{token_id!r} is not a token id")


def _check_added_tokens(added: list[AddedToken], vocab: dict[str, int], normal_form: bool) -> None:
    """Raise UnsupportedTokenizer if tiktoken would number or find added tokens differently."""
    texts, ids = {token.text for token in added}, {token.token_id for token in added}
    text_of = {token_id: text for text, token_id in vocab.items()}
    if len(texts) < len(added) or len(ids) < len(added) or len(text_of) < len(vocab):
        raise UnsupportedTokenizer("two of its tokens share a text or an id")
    for token in added:
        if vocab.get(token.text, token.token_id) != token.token_id or (
            text_of.get(token.token_id, token.text) != token.text
        ):
            raise UnsupportedTokenizer(f"its token {token.text!r} has two ids")
        if normal_form and token.in_normal_form:
            raise UnsupportedTokenizer(f"its token {token.text!r} is searched in normal form")
    # Tokens that are not searched in normal form are found first, at any position.
    first = [token.text for token in added if not token.in_normal_form]
    second = [token.text for token in added if token.in_normal_form]
    if any(_overlap(one, other) for one in first for other in second):
        raise UnsupportedTokenizer("its added tokens overlap, and are searched in two passes")


def _overlap(one: str, other: str) -> bool:
    """Whether the two can overlap in some text."""
    if one in other or other in one:
        return True
    ends = range(1, min(len(one), len(other)))
    return any(one[-n:] == other[:n] or other[-n:] == one[:n] for n in ends)


def _read_first_ids(processor: dict[str, Any] | None) -> list[int]:
    """The ids with which every text begins."""
    if processor is None:
        return []
    kind = processor["type"]
    if kind == "Sequence":
        first = [ids for part in processor["processors"] if (ids := _read_first_ids(part))]
        if len(first) > 1:
            raise UnsupportedTokenizer("it adds tokens twice")
        return first[0] if first else []
    if kind == "ByteLevel":  # affects offsets, not tokens
        return []
    if kind != "TemplateProcessing":
        raise UnsupportedTokenizer(f"it adds tokens in a way of its own ({kind})")
    *first, text = processor["single"]
    if "Sequence" not in text or not all("SpecialToken" in piece for piece in first):
        raise UnsupportedTokenizer("it adds tokens after a text")
    named = [piece["SpecialToken"]["id"] for piece in first]
    return [i for name in named for i in processor["special_tokens"][name]["ids"]]
