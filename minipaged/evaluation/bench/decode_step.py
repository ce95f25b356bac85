"""A decode step of the whole engine: the time of its parts, and the bytes that it must read.

Each step reads every weight once, whatever the batch, and the keys and values of every sequence.
These bytes divided by the bandwidth of a large copy are the floor. The model has random weights,
because the cost of a token does not depend on its value.

The parts are those of `LLMEngine.step`, each timed from outside on the host. On a GPU the model's
part ends when all kernels are launched, and waiting for its results counts as sampling.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from minipaged.attention.backend import BACKENDS, choose_backend
from minipaged.attention.batch import HostBatch
from minipaged.attention.device_batch import DeviceBatchBuilder, choose_builder
from minipaged.attention.kv_cache import KVCache
from minipaged.config import EngineConfig, WeightDType
from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.parts import Parts
from minipaged.evaluation.bench.timing import copy_work, median_seconds
from minipaged.models.linear import pack_weights
from minipaged.models.llama import Llama, LlamaConfig
from minipaged.models.rope import rope_frequencies
from minipaged.models.rope_config import RopeConfig
from minipaged.sampling import SamplingParams
from minipaged.scheduler.output import SequenceInput, StepInput
from minipaged.worker.cuda_graphs import DecodeGraphs, record_cuda_graphs
from minipaged.worker.executor import Executor, UniExecutor
from minipaged.worker.model_runner import ModelRunner

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
SMALL = replace(  # 135 million parameters, the form of SmolLM2 135M
    ONE_BILLION,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49152,
)
TINY = replace(
    SMALL, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=48, intermediate_size=64
)
STEPS = 32  # that are timed
PARTS = ("schedule", "batch", "model", "sample", "commit", "rest")


@dataclass(frozen=True)
class Row:
    """Decode steps with one backend."""

    backend: str
    graphs: bool
    num_seqs: int
    context_len: int
    seconds: float  # of a whole step, the median
    model_seconds: float  # of the model alone, on its device
    floor_seconds: float
    parts: dict[str, float]  # seconds of each of PARTS, medians


def measure(
    config: LlamaConfig,
    backends: list[str],
    num_seqs: int,
    context_len: int,
    device: torch.device,
    dtype: torch.dtype,
    graphs: Many[bool] | None = None,
) -> Iterator[Row]:
    """Measure each backend, with and without CUDA graphs if there is a GPU, or as in `graphs`."""
    copy, copy_bytes = copy_work(device)
    bandwidth = copy_bytes / median_seconds({"copy": copy}, device)["copy"]
    expected: list[list[int]] | None = None
    for backend in backends:
        chosen = choose_backend(backend, device, config.head_dim)
        can_record = device.type == "cuda" and chosen.cuda_graph_safe
        for recorded in graphs or (False, True)[: 1 + can_record]:
            engine = build_engine(config, backend, num_seqs, context_len, device, dtype, recorded)
            seconds, model_seconds, parts, tokens = _time_steps(engine, num_seqs, context_len)
            keys = config.kv_bytes_per_token(dtype.itemsize) * num_seqs
            num_bytes = _num_weights(config) * dtype.itemsize + keys * (context_len + STEPS // 2)
            yield Row(
                backend,
                recorded,
                num_seqs,
                context_len,
                seconds,
                model_seconds,
                num_bytes / bandwidth,
                parts,
            )
            # In half precision, kernels may round differently, which changes the tokens.
            if dtype is torch.float32:
                expected = expected or tokens
                assert tokens == expected, f"{backend} and {backends[0]} generate different tokens"


def _num_weights(config: LlamaConfig) -> int:
    with torch.device("meta"):
        model = Llama(config, BACKENDS["reference"])
    return sum(parameter.numel() for parameter in model.parameters())


def build_engine(
    config: LlamaConfig,
    backend_name: str,
    num_seqs: int,
    context_len: int,
    device: torch.device,
    dtype: torch.dtype,
    with_graphs: bool,
    weight_dtype: WeightDType = "auto",
    max_num_batched_tokens: int | None = None,
) -> LLMEngine:
    """Build an engine with a random model and room for `num_seqs` sequences."""
    backend = choose_backend(backend_name, device, config.head_dim)
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(config, backend).to(device, dtype).eval().requires_grad_(False)
    if device.type == "cpu":
        pack_weights(model, weight_dtype)
    # Made on the CPU, and not rounded with the weights.
    model.rotary.frequencies = rope_frequencies(config.rope, config.head_dim).to(device)
    longest = context_len + STEPS + 8
    engine = EngineConfig(
        num_blocks=num_seqs * (longest // 16 + 1),
        num_swap_blocks=0,
        max_model_len=longest,
        max_num_seqs=num_seqs,
        # By default all prompts in one step: then all decode
        max_num_batched_tokens=max_num_batched_tokens or num_seqs * context_len,
        enable_prefix_caching=False,
        watermark=0.0,
    )
    cache = KVCache.build(config, engine, dtype, device, backend.copy_blocks)
    sizes = num_seqs, engine.max_blocks_per_seq, engine.block_size, device
    batches, graphs = choose_builder(*sizes), None
    if with_graphs:  # on a CPU, a replay is the step itself: to try out what surrounds a graph
        record = record_cuda_graphs(device) if device.type == "cuda" else lambda step: step
        batches = DeviceBatchBuilder(*sizes)
        graphs = DecodeGraphs(model, cache, batches, record)
    return LLMEngine(
        engine,
        partial(Parts().build_scheduler, engine),
        UniExecutor(ModelRunner(model, backend, cache, batches, graphs)),
        tokenizer=None,
    )


def _time_steps(
    engine: LLMEngine, num_seqs: int, context_len: int
) -> tuple[float, float, dict[str, float], list[list[int]]]:
    """Measure steps in which all sequences decode: seconds of step, model and parts; all tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 4, ignore_eos=True)
    vocab_size = engine.executor.runner.model.config.vocab_size
    for i in range(num_seqs):
        prompt = [(i * 7919 + 31 * n) % vocab_size for n in range(context_len)]
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    clock = _ModelClock(engine.executor)
    stopwatch = _Stopwatch(engine)
    seconds: list[float] = []
    model_seconds: list[float] = []
    parts: list[dict[str, float]] = []
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        stopwatch.seconds.clear()
        begin = time.perf_counter()
        progresses = engine.step()  # ends when the tokens are on the host
        if len(progresses) == num_seqs:
            seconds.append(time.perf_counter() - begin)
            model_seconds.append(clock.seconds_of_last_run())
            stopwatch.seconds["model"] -= stopwatch.seconds["batch"]  # the runner builds the batch
            rest = seconds[-1] - sum(stopwatch.seconds.values())
            parts.append({**stopwatch.seconds, "rest": rest})
        for progress in progresses:
            tokens.setdefault(progress.request_id, []).extend(progress.new[0].token_ids)
    # The first step computes the prompts, the second compiles and records.
    in_order = [tokens[str(i)] for i in range(num_seqs)]
    medians = {part: statistics.median(each[part] for each in parts[2:]) for part in PARTS}
    return statistics.median(seconds[2:]), statistics.median(model_seconds[2:]), medians, in_order


class _Stopwatch:
    """Times each part of a step from outside, by wrapping the calls of `LLMEngine.step`."""

    def __init__(self, engine: LLMEngine) -> None:
        self.seconds: dict[str, float] = {}
        calls: dict[str, tuple[Any, str]] = {
            "schedule": (engine.scheduler, "schedule"),
            "batch": (engine.executor.runner.batches, "lay_out"),
            "model": (engine.executor, "run"),
            "sample": (engine.sampler, "sample"),
            "commit": (engine.scheduler, "commit"),
        }
        for part, (owner, name) in calls.items():
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args)
            self.seconds[part] = time.perf_counter() - begin
            return result

        return timed


class _ModelClock:
    """Times the model's part of a step from outside, on a GPU by its own clock.

    It begins when the batch is laid out on the host, and ends with the logits.
    """

    def __init__(self, executor: Executor) -> None:
        runner = executor.runner
        self._lay_out = runner.batches.lay_out
        self._run = executor.run
        self._device = runner.kv_cache.device
        self._on_gpu = self._device.type == "cuda"
        self._begin: Any = None
        self._end: Any = None
        runner.batches.lay_out = self._timed_lay_out  # attributes of these objects alone
        executor.run = self._timed_run

    def _timed_lay_out(self, sequences: Many[SequenceInput]) -> HostBatch:
        batch = self._lay_out(sequences)
        self._begin = self._now()
        return batch

    def _timed_run(self, step: StepInput) -> Tensor:
        logits = self._run(step)
        self._end = self._now()
        return logits

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds_of_last_run(self) -> float:
        if not self._on_gpu:
            return self._end - self._begin
        return self._begin.elapsed_time(self._end) / 1000


def describe(config: LlamaConfig, dtype: torch.dtype) -> str:
    """The caption of the table."""
    return (
        f"{config.num_layers} layers, hidden size {config.hidden_size}, {dtype}; floor: bytes of "
        "weights, keys and values over the bandwidth of a large copy. schedule to rest: shares of "
        "the step's time on the host"
    )


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 1))
    table.add_column("by", no_wrap=True)
    for title in ("batch", "context", "floor", "model", "/ floor", "step", "/ floor", *PARTS):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.backend + (", graphs" if row.graphs else ""),
            str(row.num_seqs),
            f"{row.context_len:,}",
            f"{1e3 * row.floor_seconds:.2f} ms",
            f"{1e3 * row.model_seconds:.2f} ms",
            f"{row.model_seconds / row.floor_seconds:.2f}",
            f"{1e3 * row.seconds:.2f} ms",
            f"{row.seconds / row.floor_seconds:.2f}",
            *(f"{100 * row.parts[part] / row.seconds:.2f} %" for part in PARTS),
        )
    return table
