"""The options of a user, and the configurations of engine and model.

    EngineArgs    the options as given; None means "choose for me"
    EngineConfig  the options of scheduler, memory and engine, with a value in place of every None
    ModelConfig   the properties of a model that the engine needs; each family adds its own

All are frozen and checked at construction. `EngineArgs` declares each option once, with its
default, limits and help text. The arguments of `LLM` and the flags of the command line are derived
from it (see `minipaged/utils/options.py`).
"""

from dataclasses import dataclass, fields
from math import ceil
from pathlib import Path
from typing import Any, Literal

from minipaged.errors import InvalidOption
from minipaged.utils.options import check_options, option, options_of

DType = Literal["auto", "float32", "bfloat16", "float16", "float", "half"]
WeightDType = Literal["auto", "float32", "float16"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
Backend = Literal["auto", "reference", "blockwise", "torch", "triton", "triton-naive"]
MemoryKind = Literal[
    "paged", "contiguous-oracle", "contiguous-pow2", "contiguous-max", "static",
    "virtual", "virtual-sliced", "virtual-2m", "virtual-2m-sliced",
]  # fmt: skip
PreemptionMode = Literal["auto", "recompute", "swap"]


@dataclass(frozen=True)
class EngineArgs:
    """The options as given. Each option is checked on its own here.

    Combinations with other options, the model and the device are checked when the engine is built
    (`minipaged/engine/build.py`), which also chooses a value for each None.

    Raises:
        InvalidOption: a value is invalid.
    """

    # ---- the model, and where it runs
    model: str | Path = option(
        "storyteller",
        "storyteller, the embedded model; the folder of a Hugging Face checkpoint; or owner/name "
        "on the hub, after `minipaged fetch owner/name`.",
        kw_only=False,
    )
    device: str = option(
        "auto", "auto (a CUDA GPU if available), cpu, cuda, or one GPU such as cuda:1."
    )
    dtype: DType = option(
        "auto", "Data type of weights and activations. auto: float32 on a CPU, as saved on a GPU."
    )
    weight_dtype: WeightDType = option(
        "auto",
        "Data type in which a CPU keeps matrices that it multiplies in float32. auto: float16 for "
        "those saved in half precision.",
    )
    attention_backend: Backend = option(
        "auto", "Attention implementation. auto: triton on a GPU, torch otherwise."
    )
    fixed_split_size: int | None = option(
        None,
        "Tokens per split when decode attention cuts a long sequence, so that its result does not "
        "depend on the rest of the batch. Needs the backend triton. Default: as many splits as "
        "fill the GPU.",
        at_least=256,
    )
    enforce_eager: bool = option(
        False, "Launch the kernels of a decode step one by one, without CUDA graphs."
    )
    seed: int = option(0, "Random seed.", at_least=0)

    # ---- several ranks
    tensor_parallel_size: int = option(
        1,
        "Number of ranks that the model is split over. Each rank is a process on this machine, "
        "with its own GPU if the device is cuda. Under torchrun, its processes are the ranks.",
        at_least=1,
        at_most=1024,
    )
    start_timeout: float = option(
        600.0, "Maximum seconds to start all ranks and load the model.", at_least=0.1, at_most=10**6
    )
    step_timeout: float = option(
        300.0, "Maximum seconds that a rank waits in a step.", at_least=0.1, at_most=10**6
    )

    # ---- memory for keys and values
    memory: MemoryKind = option(
        "paged",
        "Memory manager for keys and values: paged, or a baseline. contiguous reserves memory for "
        "the whole request in advance, as Orca does. static also runs each batch to its end, as "
        "FasterTransformer does. virtual maps pages as a sequence grows, as vAttention does.",
    )
    kv_cache_dtype: KVCacheDType = option(
        "auto", "Data type of keys and values. auto: the model's. int8 and fp8 fit more tokens."
    )
    block_size: int = option(16, "Token slots per block.", at_least=1)
    num_blocks: int | None = option(
        None,
        "Blocks in the pool. Default: enough for max_num_seqs sequences of maximum length, or as "
        "many as fit in memory.",
        at_least=1,
    )
    num_swap_blocks: int | None = option(
        None,
        "Blocks in the swap pool, in host memory. Default: as many as in the pool, up to 2 GiB.",
        at_least=0,
    )
    gpu_memory_utilization: float = option(
        0.9,
        "Fraction of the GPU's memory to use for weights and blocks. Has no effect on a CPU or if "
        "num_blocks is given.",
        at_least=0.01,
        at_most=1.0,
    )
    enable_prefix_caching: bool | None = option(
        None,
        "Reuse full blocks with the same content, so that a prefix that several prompts share is "
        "computed and stored once. Default: on if the memory is paged.",
    )

    # ---- scheduling
    max_model_len: int | None = option(
        None,
        "Maximum tokens per sequence, prompt and output together. Default: what the model "
        "supports.",
        at_least=2,
    )
    max_logprobs: int = option(
        20,
        "Maximum logprobs or prompt_logprobs per request; -1 allows the whole vocabulary.",
        at_least=-1,
    )
    max_num_seqs: int = option(64, "Maximum sequences per step.", at_least=1, at_most=65_536)
    max_num_batched_tokens: int | None = option(
        None,
        "Maximum tokens per step. Default: 512 on a CPU, 2048 on a GPU, or more if a whole prompt "
        "must fit into one step.",
        at_least=1,
    )
    enable_chunked_prefill: bool = option(
        True, "Split long prompts over several steps. Off: one step per prompt, as in the paper."
    )
    preemption: PreemptionMode = option(
        "auto",
        "How preempted requests resume: recompute their tokens or swap their blocks. auto, as in "
        "the first vLLM: swap requests with several sequences, recompute others. Even recompute "
        "swaps requests with several sequences while the swap pool has room.",
    )
    async_scheduling: bool | None = option(
        None,
        "Launch each step before the results of the last one are read, so that the GPU need not "
        "wait for the host. Default: on if the device is a GPU and nothing prevents it.",
    )
    watermark: float = option(
        0.01,
        "Fraction of the pool that admission keeps free, so that running requests can grow.",
        at_least=0.0,
        at_most=0.99,
    )

    def __post_init__(self) -> None:
        check_options(self)

    def is_given(self, name: str) -> bool:
        """Whether an option differs from its default."""
        return getattr(self, name) != OPTIONS[name].default


OPTIONS = options_of(EngineArgs)
"""The declarations above, by name."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of memory, scheduler and engine, with a value in place of every None.

    Raises:
        InvalidOption: a value is invalid, alone or together with another one.
    """

    num_blocks: int
    num_swap_blocks: int
    max_model_len: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    async_scheduling: bool = False
    block_size: int = EngineArgs.block_size
    max_num_seqs: int = EngineArgs.max_num_seqs
    enable_chunked_prefill: bool = EngineArgs.enable_chunked_prefill
    preemption: PreemptionMode = EngineArgs.preemption
    watermark: float = EngineArgs.watermark
    max_logprobs: int = EngineArgs.max_logprobs

    @classmethod
    def from_args(cls, args: EngineArgs, **chosen: Any) -> "EngineConfig":
        """The user's options, except for those in `chosen`."""
        given = {each.name: getattr(args, each.name) for each in fields(cls)}
        return cls(**(given | chosen))

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            assert value is not None, f"{each.name} was left open: a number must be chosen for it"
            OPTIONS[each.name].check(value)
        self._check_together()

    def _check_together(self) -> None:
        if self.preemption == "swap" and self.num_swap_blocks == 0:
            raise InvalidOption(
                'preemption="swap" needs a swap pool, but num_swap_blocks is 0: raise it.'
            )
        # A running sequence needs one token per step; a prompt being computed needs at least one.
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidOption(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, below max_num_seqs "
                f"({self.max_num_seqs}), so some running sequence would never get its turn: raise "
                "max_num_batched_tokens or lower max_num_seqs."
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise InvalidOption(
                "without chunked prefill a whole prompt must fit into one step, but "
                f"max_num_batched_tokens is {self.max_num_batched_tokens} and max_model_len is "
                f"{self.max_model_len}: raise max_num_batched_tokens, lower max_model_len, or set "
                "enable_chunked_prefill."
            )

    @property
    def watermark_blocks(self) -> int:
        """Blocks that admission leaves free, so that running requests can grow."""
        return int(self.watermark * self.num_blocks)

    @property
    def max_blocks_per_seq(self) -> int:
        """Blocks of the longest sequence allowed."""
        return ceil(self.max_model_len / self.block_size)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The properties that the engine needs of a model of any family."""

    architecture: str  # the class name in the checkpoint's config.json
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int  # the longest context that the model supports, in tokens
    eos_token_ids: tuple[int, ...] = ()  # any of these ends a sequence

    def kv_bytes_per_token(self, bytes_per_number: int) -> int:
        """Bytes of one token's keys and values over all layers (paper, section 3)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_number
