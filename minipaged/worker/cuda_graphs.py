"""CUDA graphs: a decode step is recorded once and then replayed.

A decode step has hundreds of small kernels, and launching a kernel takes the host longer than many
of them run. A graph contains all launches of a step, and one launch replays it. Everything that it
recorded is fixed, however: addresses, shapes, and Python numbers. Therefore

    inputs   are copied to tensors with fixed addresses
    sizes    are rounded up to one of a few, each recorded when it first occurs. The padding rows
             belong to sequences without tokens: attention and store skip them, and the results of
             other layers stay in these rows
    numbers  of the batch that kernels need are on the GPU. The longest length, which determines
             the number of splits, is replaced by a bound, with one graph for each of a few bounds

Prefills differ in size from step to step and have enough work per kernel, so they are not recorded.
The results of a step stay in the graph's own memory until the next replay.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from minipaged.attention.backend import AttentionBackend
from minipaged.attention.batch import Batch, Span
from minipaged.attention.kv_cache import Cache
from minipaged.config import EngineConfig
from minipaged.models.base import Model
from minipaged.utils.shapes import Float

Step = Callable[[], Tensor]
# Returns a function that repeats the step with the current contents of its inputs.
Record = Callable[[Step], Step]


def record_cuda_graphs(device: torch.device) -> Record:
    """A recorder whose graphs share one memory pool, because only one of them runs at a time."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)

    def record(step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # Not in inference mode: other graphs could then not write to PyTorch's process-wide
        # state of graphs.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.cuda.graph(graph, pool=pool, stream=stream),
        ):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return record


class DecodeGraphs:
    """Decode steps of one model, recorded for several batch sizes.

    Args:
        model: its kernels are recorded. Its attention must read only tensors
            (`AttentionBackend.cuda_graph_safe`).
        kv_cache: its addresses are recorded.
        max_num_seqs: the maximum number of sequences in a batch.
        max_blocks_per_seq: the number of columns of the block table.
        record: how a step is recorded.
    """

    def __init__(
        self,
        model: Model,
        kv_cache: Cache,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        record: Record,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._record = record
        longest = max_blocks_per_seq * kv_cache.block_size
        self._sizes = sizes_to_record(max_num_seqs)
        self._lengths = lengths_to_record(longest)
        self._replays: dict[tuple[int, int], Step] = {}

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=kv_cache.device)

        self._inputs = Batch(
            token_ids=zeros(max_num_seqs, dtype=torch.long),
            positions=zeros(max_num_seqs, dtype=torch.long),
            slot_mapping=zeros(max_num_seqs, dtype=torch.long),
            cu_seqlens_q=zeros(max_num_seqs + 1),
            context_lens=zeros(max_num_seqs),
            block_tables=zeros(max_num_seqs, max_blocks_per_seq),
            logit_rows=torch.arange(max_num_seqs, device=kv_cache.device),
            spans=(),  # those of a padded batch
        )

    def can_run(self, batch: Batch) -> bool:
        """Whether every sequence has one query and needs its logits."""
        return not batch.has_prefills and len(batch.logit_rows) == batch.num_seqs

    def run(self, batch: Batch) -> Float[Tensor, "seqs vocab"]:
        """Run a step and return its logits, which are valid until the next step."""
        size = next(size for size in self._sizes if size >= batch.num_seqs)
        longest = next(length for length in self._lengths if length >= batch.longest)
        self._copy_in(batch, size)
        if (size, longest) in self._replays:
            logits = self._replays[size, longest]()
        else:
            # The first run is a normal one: kernels are compiled and libraries allocate memory,
            # which must not happen during recording (recording computes nothing).
            padded = self._padded(size, longest)
            logits = self._step(padded)
            self._replays[size, longest] = self._record(lambda: self._step(padded))
        return logits[: batch.num_seqs]

    def _step(self, batch: Batch) -> Float[Tensor, "seqs vocab"]:
        hidden = self._model(batch.token_ids, batch.positions, self._kv_cache, batch)
        return self._model.logits(hidden)

    def _copy_in(self, batch: Batch, size: int) -> None:
        """Copy this step's input to the tensors that the graph of this size reads."""
        inputs, count = self._inputs, batch.num_seqs
        inputs.token_ids[:count] = batch.token_ids
        inputs.positions[:count] = batch.positions
        inputs.slot_mapping[:count] = batch.slot_mapping
        inputs.context_lens[:count] = batch.context_lens
        inputs.block_tables[:count, : batch.block_tables.shape[1]] = batch.block_tables
        inputs.cu_seqlens_q[: count + 1] = batch.cu_seqlens_q
        inputs.cu_seqlens_q[count + 1 : size + 1] = count  # padding sequences start at the end

    def _padded(self, size: int, longest: int) -> Batch:
        inputs = self._inputs
        return replace(
            inputs,
            token_ids=inputs.token_ids[:size],
            positions=inputs.positions[:size],
            slot_mapping=inputs.slot_mapping[:size],
            cu_seqlens_q=inputs.cu_seqlens_q[: size + 1],
            context_lens=inputs.context_lens[:size],
            block_tables=inputs.block_tables[:size],
            logit_rows=inputs.logit_rows[:size],
            spans=tuple(Span(i, 1, longest - 1) for i in range(size)),
        )


def sizes_to_record(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then multiples of 8: padding is below 8 rows, at almost no cost."""
    sizes = [1, 2, 4, *range(8, max_num_seqs, 8)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def lengths_to_record(longest: int) -> list[int]:
    """Bounds for the longest sequence of a batch: 4,096 tokens, twice as many, and so on.

    A graph launches attention for its bound, so at most half of the programs of a batch of equal
    lengths have nothing to do.
    """
    lengths = [4096 * 2**power for power in range(20)]
    return [length for length in lengths if length < longest] + [longest]


def choose_graphs(
    model: Model,
    kv_cache: Cache,
    backend: AttentionBackend,
    config: EngineConfig,
    enforce_eager: bool,
) -> DecodeGraphs | None:
    """Create graphs if the device, the backend and the options allow them."""
    device = kv_cache.device
    if device.type != "cuda" or not backend.cuda_graph_safe or enforce_eager:
        return None
    record = record_cuda_graphs(device)
    return DecodeGraphs(model, kv_cache, config.max_num_seqs, config.max_blocks_per_seq, record)
