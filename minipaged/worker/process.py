"""A worker: the process of one rank above 0, which executes rank 0's messages.

It has its part of the model and of the cache, but no scheduler and no tokenizer. It ends when rank
0 sends the stop message, closes the pipe to this process's standard input, or ends itself.
"""

import os
import pickle
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import BinaryIO

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from minipaged.attention.backend import choose_backend
from minipaged.attention.device_batch import choose_builder
from minipaged.attention.kv_cache import KVCache, choose_kv_dtype
from minipaged.config import EngineArgs, EngineConfig, ModelConfig
from minipaged.models.linear import pack_weights
from minipaged.models.loader import load_model
from minipaged.models.parallel import Part
from minipaged.worker.cuda_graphs import choose_graphs
from minipaged.worker.message import StepDecoder
from minipaged.worker.model_runner import ModelRunner
from minipaged.worker.ranks import LOST_ANOTHER, RankLost, Ranks
from minipaged.worker.warm_up import StepLimits, room_for_blocks

LOOPBACK = "127.0.0.1"
STEP, STOP, REPORT, TRACED_STEP = range(4)  # the first number of a message


@dataclass(frozen=True)
class WorkerArgs:
    """The settings that a worker needs before it connects to the others."""

    options: EngineArgs
    model_folder: Path
    model_config: ModelConfig
    random_weights: bool
    limits: StepLimits | None  # if num_blocks is the number that fits in memory on every rank


@dataclass(frozen=True)
class Place:
    """The rank, the number of ranks, the device, and the file through which they connect."""

    rank: int
    size: int
    device: torch.device
    file: Path


def here(rank: int) -> str:
    """The key with which a rank announces that it is ready to connect."""
    return f"rank {rank} is here"


def work(args: WorkerArgs, ranks: Ranks, device: torch.device) -> None:
    """Load this rank's part, then execute rank 0's steps until it stops. Raises RankLost."""
    runner = _build_runner(args, ranks, device)
    runner.record_graphs(shows_progress=False)
    ranks.start_steps()
    decoder = StepDecoder()
    while True:
        kind, *message = ranks.receive()
        if kind == STOP:
            return
        if kind == REPORT:
            ranks.report()
        else:
            with ranks.noted("step"):
                runner.run(decoder.decode(message))
            if kind == TRACED_STEP:
                ranks.gather_spans()


def _build_runner(args: WorkerArgs, ranks: Ranks, device: torch.device) -> ModelRunner:
    options = args.options
    backend = choose_backend(
        options.attention_backend,
        device,
        args.model_config.head_dim,
        options.kv_cache_dtype,
        options.fixed_split_size,
    )
    model = load_model(
        args.model_folder,
        backend,
        options.dtype,
        device,
        config=args.model_config,
        random_weights=args.random_weights,
        part=Part(ranks.rank, ranks.size, ranks.all_reduce),
    )
    if device.type == "cpu":
        pack_weights(model, options.weight_dtype)
    if args.limits is not None:
        room = room_for_blocks(
            model, backend, options, args.limits, device, ranks.gather, samples=False
        )
        ranks.agree_on_least(room)
    config: EngineConfig = ranks.receive_object()
    kv_dtype = choose_kv_dtype(options.kv_cache_dtype, model.dtype)
    kv_cache = KVCache.build(model.config, config, kv_dtype, device, backend.copy_blocks)
    batches = choose_builder(
        config.max_num_seqs, config.max_blocks_per_seq, config.block_size, device
    )
    graphs = choose_graphs(model, kv_cache, backend, batches, options.enforce_eager)
    return ModelRunner(model, backend, kv_cache, batches, graphs, ranks.gather)


def _end_with(rank_0: int, pipe: BinaryIO) -> None:
    """End this process as soon as rank 0 closes the pipe or ends for any reason.

    A fork of rank 0 that outlives it keeps the pipe open, but is not the parent of this process.
    """
    while os.getppid() == rank_0:
        if select([pipe], [], [], 1.0)[0]:  # nothing more is sent: this is the end
            break
    os._exit(0)


def main() -> None:
    """The program of a worker started by `spawn.py`; it reads its settings from standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which ends this process
    place, args = pickle.load(sys.stdin.buffer)
    assert isinstance(place, Place)
    assert isinstance(args, WorkerArgs)
    watch = [os.getppid(), sys.stdin.buffer]
    threading.Thread(target=_end_with, args=watch, daemon=True).start()
    store = FileStore(str(place.file), place.size)
    store.set(here(place.rank), "yes")
    try:
        ranks = Ranks.of(args.options, store, place.rank, place.size, place.device, LOOPBACK)
        work(args, ranks, place.device)
    except RankLost as error:
        sys.exit(f"rank {place.rank} {LOST_ANOTHER}: {error}")
