"""CUDA graphs: decode steps are recorded when the engine starts, and then replayed.

A decode step has hundreds of small kernels, and launching a kernel takes the host longer than many
of them run. A graph contains all launches of a step, and one launch replays it. Everything that it
recorded is fixed, however: addresses, shapes, and Python numbers. Therefore

    inputs   are sent to fixed addresses, with one copy per step. The rest of the preparation, which
             writes changed entries of block tables and collects the tables of the step, is recorded
    sizes    are rounded up to one of a few. The padding rows belong to sequences without tokens:
             attention and store skip them, and the results of other layers stay in these rows
    numbers  of the batch that kernels need are on the GPU. The longest length, which determines
             the number of splits, is replaced by a bound, with one graph for each of a few bounds

A graph is recorded for each size and bound. There are 11 sizes for 64 sequences and at most 51, and
1 bound for 4,096 tokens, 3 for 16,384 and 6 for 131,072. The largest come first, because all share
one memory pool: the others fit into what the first has allocated. For the same reason a graph ends
with the hidden states, in one buffer. Logits, which are many times as large, are computed after it,
and only for the real rows.

Prefills differ in size from step to step and have enough work per kernel, so they are not recorded,
nor are batches of more than 512 sequences.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from minipaged.attention.backend import AttentionBackend
from minipaged.attention.batch import Batch, BatchBuilder, HostBatch
from minipaged.attention.device_batch import DeviceBatchBuilder, fill_pending
from minipaged.attention.kv_cache import Cache
from minipaged.models.base import Model
from minipaged.utils.device import pack, unpack
from minipaged.utils.progress import progress_bar
from minipaged.utils.shapes import Float, Int

Step = Callable[[], None]
# Returns a function that repeats the step with the current contents of its inputs.
Record = Callable[[Step], Step]

MOST_SEQUENCES = 512  # of a recorded batch
BYTES_PER_GRAPH = 8 * 2**20  # kept by the driver: assumed, not measured
SECONDS_WITHOUT_PROGRESS = 5.0  # of recording, before a progress bar is shown


def record_cuda_graphs(device: torch.device) -> Record:
    """A recorder whose graphs share one memory pool, because only one of them runs at a time."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)

    def record(step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            step()
        return graph.replay

    return record


class DecodeGraphs:
    """Decode steps of one model, for several batch sizes.

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
        self._hidden: Tensor | None = None  # the result of every graph, in its first rows

    def record_all(self, shows_progress: bool = True) -> None:
        """Record all steps, the largest first: on all ranks in the same order."""
        steps = [*product(reversed(self._inputs), reversed(self._lengths))]
        options = {"desc": "Recording", "delay": SECONDS_WITHOUT_PROGRESS}
        steps = progress_bar(steps, shown=shows_progress, **options)
        # Not in inference mode: graphs could then not write to PyTorch's process-wide state.
        with torch.inference_mode(False), torch.no_grad():
            for size, longest in steps:
                step = partial(self._step, self._inputs[size], longest)
                # The first run is a normal one: kernels are compiled and libraries allocate memory,
                # which must not happen during recording (recording computes nothing).
                step()
                self._replays[size, longest] = self._record(step)

    def can_run(self, host: HostBatch) -> bool:
        """Whether each sequence has one query and needs its logits, in a batch of recorded size."""
        num_seqs = len(host.seq_lens)
        is_decode = len(host.token_ids) == num_seqs == len(host.logit_rows)
        return is_decode and num_seqs <= MOST_SEQUENCES

    def run(
        self, host: HostBatch, sampled: Int[Tensor, " rows_before"] | None = None
    ) -> Float[Tensor, "seqs vocab"]:
        """Run a step that `can_run`, and return its logits."""
        num_seqs, longest_seq = len(host.seq_lens), int(host.seq_lens.max())
        size = next(size for size in self._inputs if size >= num_seqs)
        longest = next(length for length in self._lengths if length >= longest_seq)
        self._inputs[size].fill(host, sampled)
        self._replays[size, longest]()
        self._batches.note_sent()
        assert self._hidden is not None, "a step is replayed that was not recorded"
        return self._model.logits(self._hidden[:num_seqs])

    def _step(self, inputs: "GraphInputs", longest: int) -> None:
        batch = inputs.batch(longest)
        hidden = self._model(batch.token_ids, batch.positions, self._kv_cache, batch)
        if self._hidden is None:  # this is the largest batch
            self._hidden = torch.empty_like(hidden)
        self._hidden[: len(hidden)] = hidden


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


def num_graphs(max_num_seqs: int, longest: int) -> int:
    """The number of graphs for these limits."""
    return len(sizes_to_record(max_num_seqs)) * len(lengths_to_record(longest))


def sizes_to_record(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then multiples of 8, and of 16 above 256: padding is few rows, at almost no cost."""
    largest = min(max_num_seqs, MOST_SEQUENCES)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, largest, 16)]
    return [size for size in sizes if size < largest] + [largest]


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
