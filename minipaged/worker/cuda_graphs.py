"""CUDA graphs: a decode step is recorded once and then replayed.

A decode step has hundreds of small kernels, and launching a kernel takes the host longer than many
of them run. A graph contains all launches of a step, and one launch replays it. Everything that it
recorded is fixed, however: addresses, shapes, and Python numbers. Therefore

    inputs   are sent to fixed addresses, with one copy per step. The rest of the preparation, which
             writes changed entries of block tables and collects the tables of the step, is recorded
    sizes    are rounded up to one of a few, each recorded when it first occurs. The padding rows
             belong to sequences without tokens: attention and store skip them, and the results of
             other layers stay in these rows
    numbers  of the batch that kernels need are on the GPU. The longest length, which determines
             the number of splits, is replaced by a bound, with one graph for each of a few bounds

Prefills differ in size from step to step and have enough work per kernel, so they are not recorded.
The results of a step stay in the graph's own memory until the next replay.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minipaged.attention.backend import AttentionBackend
from minipaged.attention.batch import Batch, BatchBuilder, HostBatch
from minipaged.attention.device_batch import DeviceBatchBuilder, fill_pending
from minipaged.attention.kv_cache import Cache
from minipaged.models.base import Model
from minipaged.utils.device import pack, unpack
from minipaged.utils.shapes import Float, Int

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
        batches: builds the batches, and owns the block tables, whose address is recorded.
        record: how a step is recorded.
    """

    def __init__(
        self, model: Model, kv_cache: Cache, batches: DeviceBatchBuilder, record: Record
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._batches = batches
        self._record = record
        self._inputs = {
            size: GraphInputs(size, batches) for size in sizes_to_record(batches.max_num_seqs)
        }
        self._lengths = lengths_to_record(batches.max_seq_len)
        self._replays: dict[tuple[int, int], Step] = {}

    def run(
        self, host: HostBatch, sampled: Int[Tensor, " rows_before"] | None = None
    ) -> Float[Tensor, "seqs vocab"]:
        """Run a step (`HostBatch.is_decode`) and return its logits, valid until the next step."""
        num_seqs, longest_seq = len(host.seq_lens), int(host.seq_lens.max())
        size = next(size for size in self._inputs if size >= num_seqs)
        longest = next(length for length in self._lengths if length >= longest_seq)
        inputs = self._inputs[size]
        inputs.fill(host, sampled)
        if (size, longest) in self._replays:
            logits = self._replays[size, longest]()
        else:
            # The first run is a normal one: kernels are compiled and libraries allocate memory,
            # which must not happen during recording (recording computes nothing).
            step = partial(self._step, inputs, longest)
            logits = step()
            self._replays[size, longest] = self._record(step)
        self._batches.note_sent()
        return logits[:num_seqs]

    def _step(self, inputs: "GraphInputs", longest: int) -> Float[Tensor, "seqs vocab"]:
        batch = inputs.batch(longest)
        hidden = self._model(batch.token_ids, batch.positions, self._kv_cache, batch)
        return self._model.logits(hidden)


class GraphInputs:
    """The tensors that the graphs of one batch size read. One copy fills all of them.

    The padding is zeros: tokens at position 0 of sequences whose block table is row 0.
    """

    def __init__(self, size: int, batches: DeviceBatchBuilder) -> None:
        self._size = size
        self._batches = batches
        # As many places as `DeviceBatchBuilder.arrays` has numbers; one changed entry per sequence.
        longs = [np.zeros(size, np.int64) for _ in range(6)]
        self._room = [*longs, *(np.zeros(length, np.int32) for length in (size + 1, size, size))]
        self._packed = pack(self._room, self._room, batches.device).to(batches.device)
        self._tensors = unpack(self._packed, self._room)

    def fill(self, host: HostBatch, sampled: Int[Tensor, " rows_before"] | None) -> None:
        """Copy this step's numbers to the addresses that the graph reads."""
        if self._batches.num_changed > self._size:  # those of whole tables, as after a fork
            self._batches.send_changes()
        # Padding sequences begin and end where the last sequence ends, so they have no tokens.
        ends = np.minimum(np.arange(self._size + 1, dtype=np.int32), len(host.seq_lens))
        arrays = self._batches.arrays(host._replace(cu_seqlens_q=ends))
        packed = pack(arrays, self._room, self._batches.device)
        self._packed.copy_(packed, non_blocking=True)
        if sampled is not None:
            token_ids = self._tensors[0]
            token_ids.copy_(fill_pending(token_ids, sampled))

    def batch(self, longest: int) -> Batch:
        """The batch of these tensors, with a bound for the length of its sequences."""
        query_lens = np.ones(self._size, np.int64)
        return self._batches.batch_of(self._tensors, query_lens, longest * query_lens)


BYTES_PER_GRAPH = 8 * 2**20  # assumed: what the driver keeps for each


def num_graphs(max_num_seqs: int, longest: int) -> int:
    """The number of graphs for these limits."""
    return len(sizes_to_record(max_num_seqs)) * len(lengths_to_record(longest))


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
    batches: BatchBuilder,
    enforce_eager: bool,
) -> DecodeGraphs | None:
    """Create graphs if the device, the backend and the options allow them."""
    if not isinstance(batches, DeviceBatchBuilder) or kv_cache.device.type != "cuda":
        return None
    if not backend.cuda_graph_safe or enforce_eager:
        return None
    return DecodeGraphs(model, kv_cache, batches, record_cuda_graphs(kv_cache.device))
