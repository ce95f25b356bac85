"""A decode step of the whole engine, against the bytes that it must read.

Each step reads every weight once, whatever the batch, and the keys and values of every sequence:
those bytes over the bandwidth of a large copy are the floor. The model has random weights, since
what it says costs the same.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from minipaged.attention import choose_backend
from minipaged.batch import Batch, BatchBuilder
from minipaged.bench.timing import copy_work, median_seconds
from minipaged.config import EngineConfig
from minipaged.engine import LLMEngine
from minipaged.graphs import DecodeGraphs, record_cuda_graphs
from minipaged.kv_cache import KVCache
from minipaged.models.linear import pack_weights
from minipaged.models.llama import Llama, LlamaConfig
from minipaged.models.rope import RopeConfig, rope_frequencies
from minipaged.parts import Parts
from minipaged.plan import ScheduledBatch
from minipaged.runner import ModelRunner
from minipaged.sampling import SamplingParams

ONE_BILLION = LlamaConfig(  # the form of Llama 3.2 1B
    architecture="LlamaForCausalLM",
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    hidden_size=2048,
    intermediate_size=8192,
    vocab_size=128256,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500_000.0),
    activation="silu",
    tied=True,
)
TINY = replace(
    ONE_BILLION,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    hidden_size=256,
    intermediate_size=512,
    vocab_size=1024,
    max_position_embeddings=512,
)
STEPS = 32  # that are timed


@dataclass(frozen=True)
class Row:
    """Decode steps, one way."""

    backend: str
    graphs: bool
    num_seqs: int
    context_len: int
    seconds: float  # of a whole step, in the middle of all
    model_seconds: float  # of the model alone, on its device
    floor_seconds: float


def measure(
    config: LlamaConfig,
    backends: list[str],
    num_seqs: int,
    context_len: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Row]:
    """Each backend, with CUDA graphs and without where there is a GPU."""
    copy, copy_bytes = copy_work(device)
    bandwidth = copy_bytes / median_seconds({"copy": copy}, device)["copy"]
    expected: list[list[int]] | None = None
    for backend in backends:
        chosen = choose_backend(backend, device, config.head_dim)
        can_record = device.type == "cuda" and chosen.reads_only_tensors
        for with_graphs in (False, True) if can_record else (False,):
            engine = build_engine(
                config, backend, num_seqs, context_len, device, dtype, with_graphs
            )
            seconds, model_seconds, tokens = _time_steps(engine, num_seqs, context_len)
            model = engine.runner.model
            weights = sum(p.numel() * p.itemsize for p in model.parameters())
            keys = config.kv_bytes_per_token(dtype.itemsize) * num_seqs
            floor = (weights + keys * (context_len + STEPS // 2)) / bandwidth
            yield Row(backend, with_graphs, num_seqs, context_len, seconds, model_seconds, floor)
            # In half precision two kernels may round apart, and a random model's tokens with them.
            if dtype is torch.float32:
                expected = expected or tokens
                assert tokens == expected, f"{backend} generates other tokens than {backends[0]}"


def build_engine(
    config: LlamaConfig,
    backend_name: str,
    num_seqs: int,
    context_len: int,
    device: torch.device,
    dtype: torch.dtype,
    with_graphs: bool,
) -> LLMEngine:
    """An engine around a random model, with room for so many sequences."""
    backend = choose_backend(backend_name, device, config.head_dim)
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(config, backend).to(device, dtype).eval().requires_grad_(False)
    if device.type == "cpu":
        pack_weights(model)
    # Made on the CPU, and not to be rounded with the weights.
    model.rotary.frequencies = rope_frequencies(config.rope, config.head_dim).to(device)
    longest = context_len + STEPS + 8
    engine = EngineConfig(
        num_blocks=num_seqs * (longest // 16 + 1),
        num_swap_blocks=0,
        max_model_len=longest,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * context_len,  # all prompts in one step: then all decode
        enable_prefix_caching=False,
        watermark=0.0,
    )
    cache = KVCache.build(config, engine, dtype, device, backend.copy_blocks)
    graphs = None
    if with_graphs:
        blocks = engine.max_blocks_per_seq
        graphs = DecodeGraphs(model, cache, num_seqs, blocks, record_cuda_graphs(device))
    return LLMEngine(
        engine,
        Parts().build_scheduler(engine),
        BatchBuilder(num_seqs, engine.max_blocks_per_seq, engine.block_size, device),
        ModelRunner(model, cache, graphs),
        tokenizer=None,
    )


def _time_steps(
    engine: LLMEngine, num_seqs: int, context_len: int
) -> tuple[float, float, list[list[int]]]:
    """Seconds of a step in which all sequences decode, of the model in it, and all tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 4, ignore_eos=True)
    vocab_size = engine.runner.model.config.vocab_size
    for i in range(num_seqs):
        prompt = [(i * 7919 + 31 * n) % vocab_size for n in range(context_len)]
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    clock = _ModelClock(engine.runner)
    seconds: list[float] = []
    model_seconds: list[float] = []
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        outputs = engine.step()  # ends with the tokens on the host
        if len(outputs) == num_seqs:
            seconds.append(time.perf_counter() - begin)
            model_seconds.append(clock.seconds_of_last_run())
        tokens |= {output.request_id: output.outputs[0].token_ids for output in outputs}
    # The first step computes the prompts, the second compiles and records.
    in_order = [tokens[str(i)] for i in range(num_seqs)]
    return statistics.median(seconds[2:]), statistics.median(model_seconds[2:]), in_order


class _ModelClock:
    """Times the runner's part of a step from outside: on a GPU by its own clock."""

    def __init__(self, runner: ModelRunner) -> None:
        self._inner = runner.run
        self._on_gpu = runner.kv_cache.device.type == "cuda"
        self._begin: Any = None
        self._end: Any = None
        runner.run = self._run  # an attribute of this runner alone

    def _run(self, plan: ScheduledBatch, batch: Batch) -> Tensor:
        self._begin = self._now()
        logits = self._inner(plan, batch)
        self._end = self._now()
        return logits

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_of_last_run(self) -> float:
        if not self._on_gpu:
            return self._end - self._begin
        return self._begin.elapsed_time(self._end) / 1000


def as_table(rows: list[Row]) -> Table:
    """The rows for a person to read."""
    table = Table(box=None, padding=(0, 2))
    for title in ("by", "graphs"):
        table.add_column(title)
    for title in ("batch", "context", "floor", "model", "whole step", "model", "whole step"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.backend,
            "yes" if row.graphs else "no",
            str(row.num_seqs),
            f"{row.context_len:,}",
            f"{1e3 * row.floor_seconds:.2f} ms",
            f"{1e3 * row.model_seconds:.2f} ms",
            f"{1e3 * row.seconds:.2f} ms",
            f"{row.model_seconds / row.floor_seconds:.2f} x floor",
            f"{row.seconds / row.floor_seconds:.2f} x floor",
        )
    return table
