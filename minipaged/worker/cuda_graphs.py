"""CUDA graphs: a decode step recorded once and replayed ever after.

A decode step is hundreds of small kernels, and to launch one takes the host longer than many of
them run. A graph holds all launches of a step, and replaying it is a single one. What it recorded
is fixed, though: every address, every shape, every number that Python had in hand. So

    inputs   are copied into tensors that stay where they are
    sizes    are rounded up to one of a few, each recorded when it is first met. The rows too many
             belong to sequences without tokens: attention and store pass over them, and whatever
             the other layers compute from them stays in these rows
    numbers  that kernels need of a batch are on the GPU; of the longest length, which decides how
             far attention is split, a graph knows a bound, and there is one for each of a few

Prefills differ in size from step to step, and have enough work in each kernel: they are not worth
recording. The results of a step stay in the graph's own memory until the next replay.
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
# Returns a step that does the same again, with whatever its inputs then hold.
Record = Callable[[Step], Step]


def record_cuda_graphs(device: torch.device) -> Record:
    """A recorder whose graphs share one pool of memory: only one of them runs at a time."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)

    def record(step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # Not in inference mode: what PyTorch keeps for all graphs of a process could then not be
        # written by other graphs.
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
    """Decode steps of one model, recorded for some sizes of a batch.

    Args:
        model: its are the kernels. Its attention must read nothing but tensors
            (`AttentionBackend.cuda_graph_safe`).
        kv_cache: its are most of the addresses.
        max_num_seqs: sequences of the largest batch there can be.
        max_blocks_per_seq: columns of its block table.
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
        """Whether every sequence has one query and wants its logits."""
        return not batch.has_prefills and len(batch.logit_rows) == batch.num_seqs

    def run(self, batch: Batch) -> Float[Tensor, "seqs vocab"]:
        """The logits of this step, valid until the next one."""
        size = next(size for size in self._sizes if size >= batch.num_seqs)
        longest = next(length for length in self._lengths if length >= batch.longest)
        self._copy_in(batch, size)
        if (size, longest) in self._replays:
            logits = self._replays[size, longest]()
        else:
            # The first time it runs as ever: kernels are compiled, libraries set up their memory,
            # and neither may happen while a graph is recorded (which computes nothing).
            padded = self._padded(size, longest)
            logits = self._step(padded)
            self._replays[size, longest] = self._record(lambda: self._step(padded))
        return logits[: batch.num_seqs]

    def _step(self, batch: Batch) -> Float[Tensor, "seqs vocab"]:
        hidden = self._model(batch.token_ids, batch.positions, self._kv_cache, batch)
        return self._model.logits(hidden)

    def _copy_in(self, batch: Batch, size: int) -> None:
        """Put this step's numbers where the graph of this size will look for them."""
        inputs, count = self._inputs, batch.num_seqs
        inputs.token_ids[:count] = batch.token_ids
        inputs.positions[:count] = batch.positions
        inputs.slot_mapping[:count] = batch.slot_mapping
        inputs.context_lens[:count] = batch.context_lens
        inputs.block_tables[:count, : batch.block_tables.shape[1]] = batch.block_tables
        inputs.cu_seqlens_q[: count + 1] = batch.cu_seqlens_q
        inputs.cu_seqlens_q[count + 1 : size + 1] = count  # the others begin where they end

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
    """1, 2, 4, then every eighth: padding stays below 8 rows, which cost next to nothing."""
    sizes = [1, 2, 4, *range(8, max_num_seqs, 8)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def lengths_to_record(longest: int) -> list[int]:
    """4,096 tokens, four times as many, and so on: bounds for the longest sequence of a batch."""
    lengths = [4096 * 4**power for power in range(10)]
    return [length for length in lengths if length < longest] + [longest]


def choose_graphs(
    model: Model,
    kv_cache: Cache,
    backend: AttentionBackend,
    config: EngineConfig,
    enforce_eager: bool,
) -> DecodeGraphs | None:
    """Graphs where a device, a backend and the options allow them."""
    device = kv_cache.device
    if device.type != "cuda" or not backend.cuda_graph_safe or enforce_eager:
        return None
    record = record_cuda_graphs(device)
    return DecodeGraphs(model, kv_cache, config.max_num_seqs, config.max_blocks_per_seq, record)
