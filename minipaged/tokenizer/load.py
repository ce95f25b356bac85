"""Which tokenizer a checkpoint's folder holds."""

from pathlib import Path

from minipaged.errors import MissingTokenizer, UnsupportedTokenizer
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.hf_library import LibraryTokenizer, refuse_without_the_library
from minipaged.tokenizer.hugging_face import read_tokenizer_json, read_vocab_and_merges
from minipaged.tokenizer.special_tokens import read_roles
from minipaged.tokenizer.tiktoken_file import RANKS_CONFIG, read_ranked_tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint; tiktoken does the work wherever it can.

    Raises:
        MissingTokenizer: the folder holds none.
        CheckpointError: it holds one that is broken.
        UnsupportedTokenizer: it holds one that needs the extra "tokenizers".
    """
    tokenizer = _read_files(folder)
    tokenizer.folder = folder
    tokenizer.roles = read_roles(folder, tokenizer.vocabulary)
    return tokenizer


def _read_files(folder: Path) -> Tokenizer:
    # First the embedded model's own form. Its folder holds the same as tokenizer.json, for other
    # programs: that one cuts words in a way of its own, so reading it would take the extra.
    if (folder / RANKS_CONFIG).is_file():
        return read_ranked_tokenizer(folder)
    described = folder / "tokenizer.json"
    if described.is_file():
        try:
            return read_tokenizer_json(described)
        except UnsupportedTokenizer as reason:
            refuse_without_the_library(described, str(reason))
            return LibraryTokenizer(described)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        try:
            return read_vocab_and_merges(folder)
        except UnsupportedTokenizer as reason:
            raise UnsupportedTokenizer(
                f"{folder} contains a tokenizer in vocab.json and merges.txt that is not read "
                f"here, since {reason}: save it as tokenizer.json with transformers."
            ) from reason
    if (folder / "tokenizer.model").is_file():
        raise UnsupportedTokenizer(
            f"{folder} contains its tokenizer as tokenizer.model only, which is not read here: "
            "download tokenizer.json too."
        )
    raise MissingTokenizer(
        f"{folder} contains no tokenizer (tokenizer.json, or vocab.json and merges.txt): download "
        "it, or give prompts as token ids."
    )


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in this folder; None if it holds none. Raises CheckpointError for a bad one."""
    try:
        return read_tokenizer(folder)
    except MissingTokenizer:
        return None  # token ids still work; text is refused with a sentence
