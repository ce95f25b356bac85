"""What `LLM` was not told: the folder, the tokenizer, and a number for every option left open."""

from collections.abc import Callable
from importlib.resources import files
from math import ceil
from pathlib import Path
from typing import Any

from minipaged.config import EngineConfig, ModelConfig, require_whole
from minipaged.errors import CheckpointError, FetchError, InvalidOption, MissingTokenizer
from minipaged.fetching.catalogue import find_known, in_words
from minipaged.fetching.local_models import ModelName, find_local
from minipaged.tokenizer import Tokenizer
from minipaged.tokenizer.folder import read_tokenizer

EMBEDDED = ("storyteller",)  # models that ship inside the package
# Query tokens in a step: as many as it takes to multiply matrices at full speed. More would only
# let those who decode wait longer.
STEP_TOKENS = {"cpu": 512, "cuda": 2048}


def find_model(model: str | Path) -> Path:
    """The folder of a model: of an embedded one, of a path, or of a name that was fetched before.

    Raises CheckpointError if there is none; nothing is ever downloaded from here.
    """
    if model in EMBEDDED:
        return Path(str(files("minipaged") / "assets" / str(model)))
    if model and Path(model).is_dir():
        return Path(model)
    fetched = find_local(model) if isinstance(model, str) else None
    if fetched is None:
        raise CheckpointError(_how_to_get(str(model)))
    return fetched


def _how_to_get(model: str) -> str:
    try:
        name = ModelName.parse(model)
    except FetchError as error:
        embedded = " or ".join(EMBEDDED)
        return f"there is no folder {model!r}, the embedded model is {embedded}, and {error}"
    known = find_known(name.repo)
    if known is None:
        return (
            f"{model!r} is neither a folder nor a model that was fetched: correct the path, or "
            f"fetch it by `minipaged fetch {model}`."
        )
    size = f"about {in_words(known.num_bytes)}, licence: {known.licence}"
    return f"{name} is not on this machine: fetch it ({size}) by `minipaged fetch {model}`."


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in this folder; None if it holds none. Raises CheckpointError for a bad one."""
    try:
        return read_tokenizer(folder)
    except MissingTokenizer:
        return None  # token ids still work; text is refused with a sentence


def choose_config(
    model: ModelConfig,
    device_type: str,
    room: Callable[[], int],
    swap_room: int,
    *,
    num_blocks: int | None,
    num_swap_blocks: int | None,
    max_model_len: int | None,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int | None,
    enable_chunked_prefill: bool,
    **others: Any,
) -> EngineConfig:
    """What was asked for, and a number for what was left open, within what memory has room for."""
    require_whole("max_num_seqs", max_num_seqs, 1)
    longest = model.max_position_embeddings
    if max_model_len is None:
        max_model_len = longest
    require_whole("max_model_len", max_model_len, 2)
    if max_model_len > longest:
        raise InvalidOption(
            f"max_model_len is {max_model_len}, but {model.architecture} was made for {longest} "
            f"tokens here: give at most {longest}."
        )
    if num_blocks is None:
        num_blocks = min(max_num_seqs * ceil(max_model_len / block_size), room())
    require_whole("num_blocks", num_blocks, 1)
    if num_swap_blocks is None:
        num_swap_blocks = min(num_blocks, swap_room)
    if max_num_batched_tokens is None:
        whole_prompt = 0 if enable_chunked_prefill else max_model_len
        max_num_batched_tokens = max(STEP_TOKENS[device_type], max_num_seqs, whole_prompt)
    return EngineConfig(
        num_blocks=num_blocks,
        num_swap_blocks=num_swap_blocks,
        max_model_len=max_model_len,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_chunked_prefill=enable_chunked_prefill,
        **others,
    )
