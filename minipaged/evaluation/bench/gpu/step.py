"""Stages "step" and "profile": decode steps of a model of a billion parameters, and their kernels.

The floor of a step is the time for its bytes: each weight once, and all keys and values
(`decode_step`). The profile shows which kernels take the rest, and how long the GPU is idle.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

from minipaged.evaluation.bench import decode_step
from minipaged.evaluation.bench.gpu.stage import Part, Setup
from minipaged.models.llama import LlamaConfig
from minipaged.sampling import SamplingParams

TINY = replace(
    decode_step.TINY, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, vocab_size=512
)
STEPS = 5  # that are profiled
LARGEST = 12  # kernels that are reported


@dataclass(frozen=True)
class Kernel:
    """All launches of a kernel in a step, or the sum over all kernels."""

    graphs: bool
    kernel: str
    calls_per_step: float
    seconds_per_step: float
    percent_of_step: float  # of the wall-clock time


def _model(setup: Setup) -> LlamaConfig:
    return TINY if setup.is_dry else decode_step.ONE_BILLION


def step_parts(setup: Setup) -> list[Part]:
    """The parts of stage "step"."""
    sizes = [(2, 17)] if setup.is_dry else [(64, 1024), (1, 1024), (256, 1024), (8, 8000)]
    modes = (True,) if setup.is_dry else (True, False)  # stage "correctness" takes both
    return [
        Part(
            f"{num_seqs} x {context_len:,}, {'graphs' if graphs else 'eager'}",
            partial(_steps, setup, num_seqs, context_len, graphs),
        )
        for num_seqs, context_len in sizes
        for graphs in modes
    ]


def _steps(setup: Setup, num_seqs: int, context_len: int, graphs: bool) -> Iterator[dict[str, Any]]:
    sizes = ["triton"], num_seqs, context_len
    for row in decode_step.measure(
        _model(setup), *sizes, setup.device, setup.dtype, graphs=(graphs,)
    ):
        found = asdict(row)
        parts: dict[str, float] = found.pop("parts")
        yield {
            **found,
            "times_floor": row.seconds / row.floor_seconds,
            "model_times_floor": row.model_seconds / row.floor_seconds,
            **{f"{part}_seconds": seconds for part, seconds in parts.items()},
        }


def profile_parts(setup: Setup) -> list[Part]:
    """The parts of stage "profile"."""
    return [
        Part("graphs" if graphs else "eager", partial(_profile, setup, graphs))
        for graphs in (True, False)
    ]


def _profile(setup: Setup, graphs: bool) -> Iterator[Kernel]:
    num_seqs, context_len = (2, 17) if setup.is_dry else (64, 1024)
    sizes = num_seqs, context_len, setup.device, setup.dtype
    engine = decode_step.build_engine(_model(setup), "triton", *sizes, graphs)
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 4, ignore_eos=True)
    for i in range(num_seqs):
        engine.add_request(str(i), {"prompt_token_ids": [i + 1] * context_len}, params)
    for _ in range(3):  # the prompts; compilation and recording
        engine.step()
    on_gpu = setup.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiled:
        begin = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        wall = (time.perf_counter() - begin) / STEPS
    found: list[Kernel] = []
    for event in profiled.key_averages():
        if on_gpu and event.device_type.name != "CUDA":
            continue  # an operation on the host, which launched kernels
        total = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds = 1e-6 * total / STEPS
        found.append(Kernel(graphs, event.key, event.count / STEPS, seconds, 100 * seconds / wall))
    found.sort(key=lambda kernel: -kernel.seconds_per_step)
    busy = sum(kernel.seconds_per_step for kernel in found)
    launched = sum(kernel.calls_per_step for kernel in found)
    yield Kernel(graphs, "the step, by the wall clock", 1.0, wall, 100.0)
    yield Kernel(graphs, "all kernels", launched, busy, 100 * busy / wall)
    yield from found[:LARGEST]
