"""Measures the memory that a step needs besides weights, keys and values.

On a GPU, the pool takes the memory that is left, so everything else must be known before: the
activations of the model, the logits, the sampler's temporary tensors, CUDA graphs. Therefore the
largest steps that the options allow are run before there is a pool. Their keys and values go to a
cache with a single block: it is every entry of every block table, so that a context may be of any
length.

Not included are the logits of a whole prompt, which only `prompt_logprobs` asks for. They are
allocated from the memory that `gpu_memory_utilization` leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minipaged.attention.backend import AttentionBackend
from minipaged.attention.device_batch import choose_builder
from minipaged.attention.kv_cache import KVCache, bytes_per_block, choose_kv_dtype
from minipaged.config import EngineArgs
from minipaged.models.base import Model
from minipaged.sampling import SamplingParams
from minipaged.sampling.rows import SamplingRow
from minipaged.sampling.sampler import Sampler
from minipaged.scheduler.output import SequenceInput, StepInput
from minipaged.worker.cache_size import blocks_that_fit
from minipaged.worker.cuda_graphs import BYTES_PER_GRAPH, num_graphs
from minipaged.worker.model_runner import ModelRunner
from minipaged.worker.ranks import num_local_ranks

# Every stage of the sampler, for every row.
EVERYTHING = SamplingParams(
    temperature=0.9, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, logprobs=20
)


@dataclass(frozen=True)
class StepLimits:
    """The size of the largest step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_model_len // self.block_size)


def room_for_blocks(
    model: Model,
    backend: AttentionBackend,
    options: EngineArgs,
    limits: StepLimits,
    device: torch.device,
    gather: Callable[[Tensor], Tensor] | None = None,
    samples: bool = True,
) -> int:
    """The number of blocks that fit in memory, once weights are loaded, besides the largest step.

    All ranks of a model must call it, because the steps that it runs exchange sums.

    Args:
        gather: concatenates the logits of several ranks.
        samples: whether this rank samples.
    """
    kv_dtype = choose_kv_dtype(options.kv_cache_dtype, model.dtype)
    block_bytes = bytes_per_block(model.config, limits.block_size, kv_dtype)
    working_bytes = 0
    if device.type == "cuda":  # a CPU's pool leaves most of the memory free
        runner = _runner_without_pool(model, backend, kv_dtype, limits, device, gather)
        with_graphs = backend.cuda_graph_safe and not options.enforce_eager
        working_bytes = working_memory(runner, limits, with_graphs, samples)
    ranks = num_local_ranks(options.tensor_parallel_size)
    utilization = options.gpu_memory_utilization
    return blocks_that_fit(block_bytes, device, utilization, ranks, working_bytes)


def working_memory(
    runner: ModelRunner, limits: StepLimits, with_graphs: bool, samples: bool
) -> int:
    """Bytes of a GPU's memory that steps take."""
    device = runner.kv_cache.device
    prompts, decodes = (
        peak_memory(partial(run, runner, step, samples), device) for step in largest_steps(limits)
    )
    if not with_graphs:
        return max(prompts, decodes)
    # Graphs have a pool of their own, as large as the largest of them needs.
    graphs = decodes + BYTES_PER_GRAPH * num_graphs(limits.max_num_seqs, limits.max_model_len)
    return max(prompts, decodes) + graphs


def _runner_without_pool(
    model: Model,
    backend: AttentionBackend,
    kv_dtype: torch.dtype,
    limits: StepLimits,
    device: torch.device,
    gather: Callable[[Tensor], Tensor] | None,
) -> ModelRunner:
    size, copy_blocks = limits.block_size, backend.copy_blocks
    cache = KVCache(model.config, 1, size, dtype=kv_dtype, device=device, copy_blocks=copy_blocks)
    batches = choose_builder(limits.max_num_seqs, limits.max_blocks_per_seq, size, device)
    return ModelRunner(model, backend, cache, batches, gather=gather)


def largest_steps(limits: StepLimits) -> tuple[StepInput, StepInput]:
    """A step with as many prompt tokens as possible, and one in which all sequences decode.

    The first sequence of each ends with the longest context.
    """
    longest, num_seqs = limits.max_model_len, limits.max_num_seqs
    prompts, decodes = list[SequenceInput](), list[SequenceInput]()
    left = limits.max_num_batched_tokens
    for seq_id in range(num_seqs):
        others = num_seqs - 1 - seq_id  # each of them needs one token
        num_tokens = max(1, min(longest, left - others))
        left -= num_tokens
        end = longest if seq_id == 0 else num_tokens
        blocks = [0] * -(-end // limits.block_size)
        prompts.append(SequenceInput(seq_id, [0] * num_tokens, end - num_tokens, blocks))
        decodes.append(SequenceInput(seq_id, [0], end - 1, blocks))
    return StepInput(tuple(prompts)), StepInput(tuple(decodes))


def run(runner: ModelRunner, step: StepInput, samples: bool) -> None:
    """Run a step, and sample from its logits in every way at once."""
    logits = runner.run(step)
    if samples:
        rows = [SamplingRow(EVERYTHING, [0], [0], seed=0) for _ in step.sequences]
        Sampler().sample(logits, rows)


def peak_memory(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes of a GPU's memory that were taken at a time, beyond those taken before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    work()
    peak = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    return peak
