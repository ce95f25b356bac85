"""Chooses a value for every option that was not given."""

from collections.abc import Callable

from minipaged.config import EngineArgs, EngineConfig, ModelConfig
from minipaged.errors import InvalidOption
from minipaged.worker.warm_up import StepLimits

# Query tokens per step: enough to multiply matrices at full speed. With more, running requests
# would only wait longer for their next token.
STEP_TOKENS = {"cpu": 512, "cuda": 2048}


def choose_limits(args: EngineArgs, model: ModelConfig, device_type: str) -> StepLimits:
    """The size of the largest step. Raises InvalidOption."""
    longest = model.max_position_embeddings
    max_model_len = longest if args.max_model_len is None else args.max_model_len
    if max_model_len > longest:
        raise InvalidOption(
            f"max_model_len is {max_model_len}, but this {model.architecture} supports {longest} "
            f"tokens: lower max_model_len to {longest}.",
            "max_model_len",
        )
    max_num_batched_tokens = args.max_num_batched_tokens
    if max_num_batched_tokens is None:
        whole_prompt = 0 if args.enable_chunked_prefill else max_model_len
        max_num_batched_tokens = max(STEP_TOKENS[device_type], args.max_num_seqs, whole_prompt)
    return StepLimits(args.max_num_seqs, max_num_batched_tokens, max_model_len, args.block_size)


def choose_config(
    args: EngineArgs, limits: StepLimits, room: Callable[[], int], swap_room: int
) -> EngineConfig:
    """Choose a value for every option that was not given.

    Args:
        limits: those of `choose_limits`.
        room: returns how many blocks fit in memory.
        swap_room: maximum blocks of a swap pool whose size was not given.
    """
    num_blocks, num_swap_blocks = args.num_blocks, args.num_swap_blocks
    if num_blocks is None:
        num_blocks = min(args.max_num_seqs * limits.max_blocks_per_seq, room())
    if num_swap_blocks is None:
        num_swap_blocks = min(num_blocks, swap_room) if args.memory == "paged" else 0
    caches_prefixes = args.enable_prefix_caching
    return EngineConfig.from_args(
        args,
        num_blocks=num_blocks,
        num_swap_blocks=num_swap_blocks,
        max_model_len=limits.max_model_len,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        async_scheduling=bool(args.async_scheduling),
        enable_prefix_caching=args.memory == "paged"
        if caches_prefixes is None
        else caches_prefixes,
    )
