"""What was asked for: frozen, checked once, never written back to.

`ModelConfig` is what the engine must know of any model; every model adds its own numbers beside
its code. `EngineConfig` holds the knobs of memory and scheduling.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, get_args

from minipaged.errors import InvalidOption

PreemptionMode = Literal["auto", "recompute", "swap"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The numbers that the engine needs of a model, whatever its family."""

    architecture: str  # the class name in the checkpoint's config.json
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int  # the longest context the model can take, in tokens
    eos_token_ids: tuple[int, ...] = ()  # any of these ends a sequence

    def kv_bytes_per_token(self, bytes_per_number: int) -> int:
        """Bytes that one token's keys and values take over all layers (paper, section 3)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_number


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Memory and scheduling, in full: no number here is a placeholder for a later one.

    Raises:
        InvalidOption: a value that cannot work, alone or together with another one.
    """

    num_blocks: int  # physical blocks in the pool
    num_swap_blocks: int  # physical blocks in the swap pool in host memory
    max_model_len: int  # prompt and output of one sequence, in tokens
    block_size: int = 16  # token slots in a block (section 4.1)
    max_num_seqs: int = 64  # sequences in one step
    max_num_batched_tokens: int = 2048  # query tokens in one step
    enable_chunked_prefill: bool = True  # False: a prompt runs whole or not at all, as in the paper
    enable_prefix_caching: bool = True  # whether full blocks are found again by their content
    preemption: PreemptionMode = "auto"  # auto: swap groups of several, recompute others
    watermark: float = 0.01  # the part of the pool that admission leaves free

    def __post_init__(self) -> None:
        least = {"block_size": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1}
        least |= {"max_model_len": 2, "num_blocks": 1, "num_swap_blocks": 0}
        for name, smallest in least.items():
            require_whole(name, getattr(self, name), smallest)
        require_share("watermark", self.watermark, 0.0, 0.99)
        require_one_of("preemption", self.preemption, get_args(PreemptionMode))
        for name in ("enable_chunked_prefill", "enable_prefix_caching"):
            require_one_of(name, getattr(self, name), (True, False))
        self._check_together()

    def _check_together(self) -> None:
        if self.preemption == "swap" and self.num_swap_blocks == 0:
            raise InvalidOption(
                'preemption="swap" needs a swap pool: raise num_swap_blocks above 0.'
            )
        # Each running sequence needs one token a step; a prompt being computed needs at least one.
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidOption(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, below max_num_seqs "
                f"({self.max_num_seqs}): raise it, or some running sequence would never get its "
                "turn."
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise InvalidOption(
                "without chunked prefill a whole prompt must fit into one step, but "
                f"max_num_batched_tokens is {self.max_num_batched_tokens} and max_model_len is "
                f"{self.max_model_len}: raise the one, lower the other, or enable_chunked_prefill."
            )

    @property
    def watermark_blocks(self) -> int:
        """Blocks that admission leaves free, so that those who run can grow."""
        return int(self.watermark * self.num_blocks)

    @property
    def max_blocks_per_seq(self) -> int:
        """Blocks of the longest sequence allowed."""
        return ceil(self.max_model_len / self.block_size)


def require_whole(name: str, value: object, least: int) -> None:
    """Refuse an option that is no whole number from `least` up. Raises InvalidOption."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidOption(f"{name} is {value!r}: give a whole number from {least} up.")


def require_share(name: str, value: Any, least: float, most: float) -> None:
    """Refuse an option that is no number from `least` to `most`. Raises InvalidOption."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        raise InvalidOption(f"{name} is {value!r}: give a number from {least} to {most}.")


def require_one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse an option that is none of the choices. Raises InvalidOption."""
    if value not in choices:
        raise InvalidOption(f"{name} is {value!r}: choose one of {', '.join(map(str, choices))}.")
