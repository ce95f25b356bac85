"""A tokenizer as Hugging Face publishes it -> tiktoken, or the reason why that is not possible.

Most checkpoints have a `tokenizer.json`, which says what is done in which order. The oldest, OPT
among them, have `vocab.json` and `merges.txt` instead, which leave unsaid what everybody knew.
Whatever is not understood here is refused rather than guessed at.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipaged.errors import CheckpointError, UnsupportedTokenizer
from minipaged.json_files import read_json_object
from minipaged.tokenizer.byte_pairs import BytePairTokenizer
from minipaged.tokenizer.merges import rank_tokens
from minipaged.tokenizer.patterns import GPT2, QWEN, choose_pattern
from minipaged.tokenizer.special_names import read_special_names


def _byte_characters() -> dict[str, int]:
    """GPT-2's letters for bytes, with which a token that is no text can stand in a JSON file.

    A byte that is a visible character in Latin-1 is that character; all others, in order, are the
    characters from U+0100 on. So a space is "\u0120".
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before anything else happens to it."""

    text: str
    token_id: int
    is_special: bool


def read_tokenizer_json(path: Path) -> BytePairTokenizer:
    """The tokenizer that a `tokenizer.json` describes.

    Raises:
        CheckpointError: the file is broken.
        UnsupportedTokenizer: tiktoken cannot do what it describes, or cannot be proved to.
    """
    described = read_json_object(path)
    model = described.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f'{path} has no "model": download it again.')
    _refuse_other_models(model)
    pattern = choose_pattern(described.get("pre_tokenizer"))
    if pattern is None:
        raise UnsupportedTokenizer("it cuts text into words in a way of its own")
    normal_form = _read_normalizer(described.get("normalizer"))
    try:
        return _build(
            pattern,
            model["vocab"],
            [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]],
            _read_added_tokens(described.get("added_tokens") or [], normal_form),
            first_ids=_read_first_ids(described.get("post_processor")),
            normal_form=normal_form,
            whole_words=bool(model.get("ignore_merges")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no whole tokenizer ({error!r}): download it again."
        ) from error


def read_vocab_and_merges(folder: Path) -> BytePairTokenizer:
    """The tokenizer of a folder with `vocab.json` and `merges.txt`.

    How text is cut follows from the tokenizer's class, which `tokenizer_config.json` may name, and
    so do its special tokens. Raises what `read_tokenizer_json` raises.
    """
    config_path = folder / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    made_for = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if made_for not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise UnsupportedTokenizer(f"it was made for {made_for}")
    if config.get("add_prefix_space"):
        raise UnsupportedTokenizer("it puts a space before every text")
    is_qwen = made_for == "Qwen2Tokenizer"
    vocab = read_json_object(folder / "vocab.json")
    names = {"eos_token": "<|endoftext|>", **read_special_names(folder)}
    listed = config.get("added_tokens_decoder") or {}  # from id, which JSON has as text
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        added = _read_added_tokens(
            [{**token, "id": int(i)} for i, token in listed.items()], is_qwen
        )
        known = {token.text for token in added}
        added += [
            AddedToken(text, vocab[text], is_special=True)
            for text in sorted(set(names.values()))
            if text in vocab and text not in known
        ]
        return _build(
            QWEN if is_qwen else GPT2,
            vocab,
            [line.split(" ") for line in lines if line and not line.startswith("#version")],
            added,
            first_ids=[vocab[names["bos_token"]]] if config.get("add_bos_token") else [],
            normal_form=is_qwen,
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} holds no whole tokenizer in vocab.json and merges.txt ({error!r}): download "
            "them again."
        ) from error


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
    added_ids = {token.token_id for token in added}
    tokens = {i: _spell(text) for text, i in vocab.items() if i not in added_ids}
    pairs = [(_spell(left), _spell(right)) for left, right in merges]
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
    """The bytes that a token of the file stands for."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        raise UnsupportedTokenizer(f"its token {token!r} is not spelt in bytes") from None


# ------------------------------------------------------------------- the parts of tokenizer.json


def _refuse_other_models(model: dict[str, Any]) -> None:
    kind = model.get("type") or ("BPE" if "merges" in model else "none")  # old files do not say
    if kind != "BPE":
        raise UnsupportedTokenizer(f"its model is {kind}, and not byte-pair encoding")
    for option in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedTokenizer(f"its byte-pair encoding has {option}")


def _read_normalizer(normalizer: Any) -> bool:
    """Whether text is put into normal form C first."""
    kind = normalizer and normalizer.get("type")
    if kind == "Sequence":
        stages = normalizer.get("normalizers") or []
        return _read_normalizer(stages[0] if len(stages) == 1 else stages and {"type": "many"})
    if kind not in (None, "NFC"):
        raise UnsupportedTokenizer(f"it rewrites text first ({kind})")
    return kind == "NFC"


def _read_added_tokens(listed: list[dict[str, Any]], normal_form: bool) -> list[AddedToken]:
    for token in listed:
        if any(token.get(option) for option in ("single_word", "lstrip", "rstrip")):
            raise UnsupportedTokenizer(f"its token {token['content']!r} takes in what is around it")
        if normal_form and token.get("normalized"):
            raise UnsupportedTokenizer(
                f"its token {token['content']!r} is looked for in normal form"
            )
    return [AddedToken(t["content"], t["id"], bool(t.get("special"))) for t in listed]


def _read_first_ids(processor: Any) -> list[int]:
    """The ids with which every text begins."""
    kind = processor and processor.get("type")
    if kind == "Sequence":
        return [i for part in processor["processors"] for i in _read_first_ids(part)]
    if kind in (None, "ByteLevel"):  # which looks after offsets, not tokens
        return []
    if kind != "TemplateProcessing":
        raise UnsupportedTokenizer(f"it adds tokens in a way of its own ({kind})")
    *first, text = processor["single"]
    if "Sequence" not in text or not all("SpecialToken" in piece for piece in first):
        raise UnsupportedTokenizer("it adds tokens after a text")
    named = [piece["SpecialToken"]["id"] for piece in first]
    return [i for name in named for i in processor["special_tokens"][name]["ids"]]
