"""The server's metrics for Prometheus, under vLLM's names."""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, ProcessCollector, core, generate_latest
from prometheus_client.registry import Collector

from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.metrics import StepStats
from minipaged.engine.outputs import Progress, RequestOutput
from minipaged.scheduler.output import SchedulerOutput

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
COUNTS = tuple(2**i for i in range(18))

GAUGES: dict[str, tuple[str, Callable[[LLMEngine], float]]] = {
    "num_requests_running": ("Requests that are running.", lambda e: len(e.scheduler.running)),
    "num_requests_waiting": (
        "Requests that are waiting or swapped.",
        lambda e: len(e.scheduler.waiting) + len(e.scheduler.swapped),
    ),
    "kv_cache_usage_perc": (
        "Share of the blocks that are in use, 0 to 1.",
        lambda e: 1 - e.memory.num_free / e.memory.num_blocks,
    ),
}
"""Read from the engine whenever the metrics are rendered."""
COUNTERS = {
    "prompt_tokens": "Prompt tokens of the requests that have ended.",
    "generation_tokens": "Tokens that were generated and returned.",
    "num_preemptions": "Preemptions.",
    "prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens that were found there.",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token (TTFT).", SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of a request (ITL).", SECONDS),
    "e2e_request_latency_seconds": ("From arrival to the end.", SECONDS),
    "request_queue_time_seconds": ("From arrival until it was first scheduled.", SECONDS),
    "request_prefill_time_seconds": (
        "From when it was first scheduled to the first token.",
        SECONDS,
    ),
    "request_decode_time_seconds": ("From the first token to the last.", SECONDS),
    "request_prompt_tokens": ("Prompt tokens of a request.", COUNTS),
    "request_generation_tokens": ("Tokens generated for a request.", COUNTS),
    "iteration_tokens_total": ("Tokens computed in a step.", COUNTS),
}


class Tally:
    """A histogram: the number of values between each two bounds, and the sum of all."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, `times` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += times * value

    def totals(self) -> tuple[list[tuple[str, float]], float]:
        """Return (bound, number of values up to it) pairs, as in Prometheus, and their sum."""
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True)), self._sum


class Metrics(Collector):
    """Counts steps and requests. Only the engine's thread counts; any thread may render.

    The counts are plain numbers, because prometheus_client's own histograms take a lock per value,
    and the time between two tokens is one value per token.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str, engine: LLMEngine) -> None:
        self._model_name = model_name
        self._engine = engine
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._tallies = {name: Tally(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self._ends = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self._last_token: dict[str, float] = {}  # by request id: the time of its last token
        self._num_counted: dict[str, int] = {}  # by request id: its tokens counted so far
        self._registry = core.CollectorRegistry()
        ProcessCollector(registry=self._registry)  # CPU seconds and memory of this process
        self._registry.register(self)

    # ---- in the engine's thread ------------------------------------------------------------------

    def note_step(self, decision: SchedulerOutput, stats: StepStats) -> None:
        """A listener of the engine."""
        now, last = time.perf_counter(), self._last_token
        since: Counter[float] = Counter()
        for group, _, _, samples in decision.sequences:
            if samples:
                if group.request_id in last:
                    since[last[group.request_id]] += 1
                last[group.request_id] = now
        for before, times in since.items():
            self._tallies["inter_token_latency_seconds"].add(now - before, times)
        self._tallies["iteration_tokens_total"].add(stats.num_tokens)
        self._counts["num_preemptions"] += stats.num_preempted
        self._counts["prefix_cache_queries"] += stats.num_queried_tokens
        self._counts["prefix_cache_hits"] += stats.num_cached_tokens

    def note_progress(self, progresses: Sequence[Progress]) -> None:
        """Count the new tokens of a step or of an abort, and the requests that ended."""
        for progress in progresses:
            request_id = progress.request_id
            counted = self._num_counted.get(request_id, 0)
            if progress.finished:
                total = self._note_end(progress.build_output())
                self._num_counted.pop(request_id, None)
                self._last_token.pop(request_id, None)
            else:
                total = counted + sum(len(new.token_ids) for new in progress.new)
                self._num_counted[request_id] = total
            self._counts["generation_tokens"] += total - counted

    def _note_end(self, output: RequestOutput) -> int:
        """Count a request that ended; returns the number of its generated tokens."""
        times = output.metrics
        num_generated = sum(len(each.token_ids) for each in output.outputs)
        self._counts["prompt_tokens"] += len(output.prompt_token_ids)
        for completion in output.outputs:
            self._ends[completion.finish_reason or "error"] += 1
        self._tallies["request_prompt_tokens"].add(len(output.prompt_token_ids))
        self._tallies["request_generation_tokens"].add(num_generated)
        arrival, scheduled = times.arrival_time, times.first_scheduled_time
        first, last = times.first_token_time, times.last_token_time
        for name, begin, end in (
            ("request_queue_time_seconds", arrival, scheduled),
            ("time_to_first_token_seconds", arrival, first),
            ("request_prefill_time_seconds", scheduled, first),
            ("request_decode_time_seconds", first, last),
            ("e2e_request_latency_seconds", arrival, times.finished_time),
        ):
            if begin is not None and end is not None:
                self._tallies[name].add(end - begin)
        return num_generated

    # ---- in any thread ---------------------------------------------------------------------------

    def collect(self) -> Iterator[core.Metric]:
        """All metrics, for the registry."""
        for key, (help, value) in GAUGES.items():
            yield self._family(core.GaugeMetricFamily, key, help, value(self._engine))
        for key, help in COUNTERS.items():
            yield self._family(core.CounterMetricFamily, key, help, self._counts[key])
        for key, (help, _) in HISTOGRAMS.items():
            yield self._family(core.HistogramMetricFamily, key, help, *self._tallies[key].totals())
        labels, help = ["model_name", "finished_reason"], "Requests that have ended."
        ends = core.CounterMetricFamily("vllm:request_success", help, labels=labels)
        for reason, number in self._ends.items():
            ends.add_metric([self._model_name, reason], number)
        yield ends
        config = self._engine.config
        facts = {
            "model_name": self._model_name,
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(config.num_blocks),
            "num_cpu_blocks": str(config.num_swap_blocks),
            "enable_prefix_caching": str(config.enable_prefix_caching),
        }
        yield core.InfoMetricFamily("vllm:cache_config", "The KV cache.", facts)

    def _family(self, kind: type[Any], key: str, help: str, *values: Any) -> core.Metric:
        family = kind(f"vllm:{key}", help, labels=["model_name"])
        family.add_metric([self._model_name], *values)
        return family

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
