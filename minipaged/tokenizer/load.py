"""Chooses and loads the tokenizer of a checkpoint's folder."""

from pathlib import Path

from minipaged.errors import MissingTokenizer, UnsupportedTokenizer
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.hf_library import LibraryTokenizer, refuse_without_the_library
from minipaged.tokenizer.hugging_face import read_tokenizer_json, read_vocab_and_merges
from minipaged.tokenizer.special_tokens import read_roles
from minipaged.tokenizer.tiktoken_file import RANKS_CONFIG, read_ranked_tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint, with tiktoken if possible.

    Raises:
        MissingTokenizer: the folder contains none.
        CheckpointError: it is broken.
        UnsupportedTokenizer: it needs the extra "tokenizers".
    """
    tokenizer = _read_files(folder)
    tokenizer.folder = folder
    tokenizer.roles = read_roles(folder, tokenizer.vocabulary)
    return tokenizer


def _read_files(folder: Path) -> Tokenizer:
    # First the embedded model's own format. Its folder also contains tokenizer.json for other
    # programs, but that one cuts words differently, so reading it would need the extra.
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
            f"{folder} has its tokenizer only as tokenizer.model, which is not supported: "
            "download tokenizer.json too."
        )
    raise MissingTokenizer(
        f"{folder} contains no tokenizer (tokenizer.json, or vocab.json and merges.txt): download "
        "it, or give prompts as token ids."
    )


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in this folder, None if there is none. Raises CheckpointError if broken."""
    try:
        return read_tokenizer(folder)
    except MissingTokenizer:
        return None  # token ids still work; text is refused
