"""The server's metrics for Prometheus, under vLLM's names."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, get_args

import prometheus_client as prometheus
from prometheus_client.metrics import MetricWrapperBase

from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.metrics import StepStats
from minipaged.engine.outputs import FinishReason, Progress, RequestOutput
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


M = TypeVar("M", bound=MetricWrapperBase)


class Metrics:
    """Counts steps and requests. Only the engine's thread counts; any thread may render."""

    content_type = prometheus.CONTENT_TYPE_LATEST

    def __init__(self, model_name: str, engine: LLMEngine) -> None:
        self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self._registry)  # CPU seconds, memory

        def new(kind: type[M], name: str, help: str, *labels: str, **options: Any) -> M:
            names = ["model_name", *labels]
            return kind(f"vllm:{name}", help, names, registry=self._registry, **options)

        for name, (help, read) in GAUGES.items():
            gauge = new(prometheus.Gauge, name, help).labels(model_name)
            gauge.set_function(partial(read, engine))
        self._counters = {
            name: new(prometheus.Counter, name, help).labels(model_name)
            for name, help in COUNTERS.items()
        }
        self._histograms = {
            name: new(prometheus.Histogram, name, help, buckets=bounds).labels(model_name)
            for name, (help, bounds) in HISTOGRAMS.items()
        }
        ends = new(
            prometheus.Counter, "request_success", "Requests that have ended.", "finished_reason"
        )
        self._ends = {reason: ends.labels(model_name, reason) for reason in get_args(FinishReason)}
        config = engine.config
        facts = {
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(config.num_blocks),
            "num_cpu_blocks": str(config.num_swap_blocks),
            "enable_prefix_caching": str(config.enable_prefix_caching),
        }
        new(prometheus.Info, "cache_config", "The KV cache.").labels(model_name).info(facts)
        self._last_token: dict[str, float] = {}  # by request id: the time of its last token

    def note_step(self, decision: SchedulerOutput, stats: StepStats) -> None:
        """A listener of the engine."""
        now, last = time.perf_counter(), self._last_token
        note_latency = self._histograms["inter_token_latency_seconds"].observe
        sampled = {group.request_id for group, _, _, samples in decision.sequences if samples}
        for request_id in sampled:
            if request_id in last:
                note_latency(now - last[request_id])
            last[request_id] = now
        self._histograms["iteration_tokens_total"].observe(stats.num_tokens)
        self._counters["num_preemptions"].inc(stats.num_preempted)
        self._counters["prefix_cache_queries"].inc(stats.num_queried_tokens)
        self._counters["prefix_cache_hits"].inc(stats.num_cached_tokens)

    def note_progress(self, progresses: Sequence[Progress]) -> None:
        """Count the new tokens of a step or of an abort, and the requests that ended."""
        num_new = sum(len(new.token_ids) for progress in progresses for new in progress.new)
        self._counters["generation_tokens"].inc(num_new)
        for progress in progresses:
            if progress.finished:
                self._last_token.pop(progress.request_id, None)
                self._note_end(progress.build_output())

    def _note_end(self, output: RequestOutput) -> None:
        times = output.metrics
        num_generated = sum(len(each.token_ids) for each in output.outputs)
        self._counters["prompt_tokens"].inc(len(output.prompt_token_ids))
        for completion in output.outputs:
            self._ends[completion.finish_reason or "error"].inc()
        self._histograms["request_prompt_tokens"].observe(len(output.prompt_token_ids))
        self._histograms["request_generation_tokens"].observe(num_generated)
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
                self._histograms[name].observe(end - begin)

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return prometheus.generate_latest(self._registry)
