"""What a server counts, under vLLM's names, for Prometheus."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

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
"""Read when they are asked for."""
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
    "request_prefill_time_seconds": ("From there to the first token.", SECONDS),
    "request_decode_time_seconds": ("From there to the last token.", SECONDS),
    "request_prompt_tokens": ("Prompt tokens of a request.", COUNTS),
    "request_generation_tokens": ("Tokens generated for a request.", COUNTS),
    "iteration_tokens_total": ("Tokens computed in a step.", COUNTS),
}


class Metrics:
    """Counts steps and requests. The engine's thread counts, any thread may render."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str, engine: LLMEngine) -> None:
        config = engine.config
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # CPU seconds and memory of this process
        label, registry = ["model_name"], self._registry
        for name, (help, value) in GAUGES.items():
            gauge = Gauge(f"vllm:{name}", help, label, registry=registry).labels(model_name)
            gauge.set_function(partial(value, engine))
        self._counters = {
            name: Counter(f"vllm:{name}", help, label, registry=registry).labels(model_name)
            for name, help in COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(f"vllm:{name}", help, label, buckets=buckets, registry=registry).labels(
                model_name
            )
            for name, (help, buckets) in HISTOGRAMS.items()
        }
        self._success = Counter(
            "vllm:request_success",
            "Requests that have ended.",
            [*label, "finished_reason"],
            registry=registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model_name, reason)
        facts = {
            "model_name": model_name,
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(config.num_blocks),
            "num_cpu_blocks": str(config.num_swap_blocks),
            "enable_prefix_caching": str(config.enable_prefix_caching),
        }
        info = Gauge("vllm:cache_config_info", "The KV cache.", list(facts), registry=registry)
        info.labels(**facts).set(1)
        self._model_name = model_name
        self._last_token: dict[str, float] = {}  # by request id: when it got its last one
        self._num_counted: dict[str, int] = {}  # by request id: tokens

    def note_step(self, decision: SchedulerOutput, stats: StepStats) -> None:
        """A listener of the engine."""
        now, last = time.perf_counter(), self._last_token
        for group, _, _, samples in decision.sequences:
            if samples:
                if group.request_id in last:
                    self._observe("inter_token_latency_seconds", now - last[group.request_id])
                last[group.request_id] = now
        self._histograms["iteration_tokens_total"].observe(stats.num_tokens)
        counted = {
            "num_preemptions": stats.num_preempted,
            "prefix_cache_queries": stats.num_queried_tokens,
            "prefix_cache_hits": stats.num_cached_tokens,
        }
        for name, number in counted.items():
            if number:
                self._counters[name].inc(number)

    def note_progress(self, progresses: Sequence[Progress]) -> None:
        """What requests have got in a step, and those that have ended."""
        num_new = 0
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
            num_new += total - counted
        self._counters["generation_tokens"].inc(num_new)

    def _note_end(self, output: RequestOutput) -> int:
        """Returns the number of tokens that were generated for it."""
        times, observe = output.metrics, self._observe
        num_generated = sum(len(each.token_ids) for each in output.outputs)
        self._counters["prompt_tokens"].inc(len(output.prompt_token_ids))
        for completion in output.outputs:
            self._success.labels(self._model_name, completion.finish_reason or "error").inc()
        observe("request_prompt_tokens", len(output.prompt_token_ids))
        observe("request_generation_tokens", num_generated)
        scheduled, first, last = (
            times.first_scheduled_time,
            times.first_token_time,
            times.last_token_time,
        )
        if scheduled is not None:
            observe("request_queue_time_seconds", scheduled - times.arrival_time)
        if scheduled is not None and first is not None and last is not None:
            observe("time_to_first_token_seconds", first - times.arrival_time)
            observe("request_prefill_time_seconds", first - scheduled)
            observe("request_decode_time_seconds", last - first)
        if times.finished_time is not None:
            observe("e2e_request_latency_seconds", times.finished_time - times.arrival_time)
        return num_generated

    def _observe(self, name: str, value: Any) -> None:
        self._histograms[name].observe(value)

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
