"""The work during which a fault is injected: one scenario per kind of memory."""

from dataclasses import dataclass
from typing import Any

from minipaged.evaluation.soak.faults import Call, abort, add, pin, release, step
from minipaged.sampling import BeamSearchParams, SamplingParams


@dataclass(frozen=True)
class Scenario:
    """A name, the options of an engine, and the calls to it."""

    name: str
    options: dict[str, Any]
    calls: list[Call]


def scenarios() -> list[Scenario]:
    """All scenarios. Each but the last forks, searches with beams, preempts and aborts."""
    small = {"block_size": 4, "max_num_seqs": 8}
    baseline = {**small, "num_blocks": 96}
    tight = {**small, "num_blocks": 16, "watermark": 0.0}
    paged = {**tight, "num_swap_blocks": 64, "max_num_batched_tokens": 24}
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": 64, "max_model_len": 64}
    return [
        Scenario("swapping", {**paged, "preemption": "swap"}, _calls(pins=True)),
        Scenario("recomputation", {**paged, "preemption": "recompute"}, _calls(pins=True)),
        Scenario("no prefix cache", {**tight, **whole, "enable_prefix_caching": False}, _calls()),
        Scenario("reference attention", {**paged, "attention_backend": "reference"}, _calls()),
        Scenario("8-bit cache", {**paged, "kv_cache_dtype": "int8"}, _calls()),
        Scenario(
            "overlapped steps", {**paged, "num_blocks": 40, "async_scheduling": True}, _calls(True)
        ),
        Scenario("contiguous memory", {**baseline, "memory": "contiguous-pow2"}, _calls()),
        Scenario("virtual memory", {**baseline, "memory": "virtual"}, _calls()),
        Scenario("out of memory", {**paged, "num_blocks": 7}, _too_long()),
    ]


def _greedy(max_tokens: int, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **others)


def _sampled(max_tokens: int, n: int, seed: int, **others: Any) -> SamplingParams:
    return SamplingParams(n=n, seed=seed, max_tokens=max_tokens, ignore_eos=True, **others)


def _calls(pins: bool = False) -> list[Call]:
    beginning = [(7 * i + i * i) % 700 for i in range(12)]  # three blocks
    return [
        add("greedy", beginning, _greedy(14, logprobs=2)),
        add("forked", "Nell the goat", _sampled(10, n=3, seed=1)),
        step,
        add("beams", "Ana the hen", BeamSearchParams(beam_width=3, max_tokens=8)),
        step,
        step,
        *([pin(beginning)] if pins else []),
        add("shares a prefix", [*beginning, 5, 6], _greedy(8, stop="zzz")),
        add("scores its prompt", beginning, _greedy(4, prompt_logprobs=1)),
        add("best of", "Once upon", _sampled(8, n=1, seed=2, best_of=2)),
        *[step] * 4,
        add("to be aborted", "Theo", _sampled(30, n=2, seed=3)),
        *[step] * 5,
        abort("to be aborted"),
        *[step] * 3,
        release,
    ]


def _too_long() -> list[Call]:
    return [
        add("outgrows the pool", "Theo the frog", _greedy(60)),
        add("other", "Nell", _sampled(6, n=2, seed=4)),
    ]
