"""The two sides of `minipaged bench engine`: this library and transformers, on one checkpoint."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from minipaged.config import Backend, DType, EngineArgs
from minipaged.evaluation.bench.engine_workload import Lengths, Request, Workload
from minipaged.evaluation.bench.load import forget_the_peak, resident_bytes
from minipaged.llm import LLM
from minipaged.models.loader import DTYPES
from minipaged.sampling import SamplingParams
from minipaged.tokenizer.prompts import Prompt

OURS = "minipaged"


class CannotRun(Exception):
    """A baseline does not work here. Its row records the error, and the others continue."""


@dataclass(frozen=True)
class Run:
    """One run: its time, and the generated tokens of every prompt."""

    num_tokens: int  # number of requested tokens generated in this time
    seconds: float
    cpu_seconds: float  # CPU seconds of all threads
    tokens: list[list[int]]


Work = Callable[[], Run]


@dataclass(frozen=True)
class Clock:
    """A stopwatch, started by its constructor."""

    begin: float = field(default_factory=time.perf_counter)
    cpu_begin: float = field(default_factory=time.process_time)

    def stop(self, num_tokens: int, tokens: list[list[int]]) -> Run:
        """The run since the start."""
        seconds = time.perf_counter() - self.begin
        return Run(num_tokens, seconds, time.process_time() - self.cpu_begin, tokens)


class Minipaged:
    """This library, with its defaults for a CPU and a pool for all requests."""

    def __init__(
        self, folder: Path, dtype: str, workload: Workload, backend: Backend = "auto"
    ) -> None:
        block_size = EngineArgs.block_size
        most = max(
            sum(ceil((len(prompt) + output) / block_size) for prompt, output in requests)
            for requests in (
                workload.mixed_requests(),
                workload.decode_requests(max(workload.batches)),
            )
        )
        self._llm = LLM(
            folder,
            device="cpu",
            dtype=cast(DType, dtype),
            attention_backend=backend,
            block_size=block_size,
            num_blocks=most + most // 10 + 64,  # a tenth more, so that no request is preempted
            enable_prefix_caching=False,  # so that later rounds are as much work as the first
        )

    def decode(self, requests: list[Request]) -> Run:
        """Time from when every sequence has its first token; some have more by then."""
        prompts, params = _as_ours(requests)
        tokens: list[list[int]] = [[] for _ in requests]
        clock, untimed = None, 0
        for index, output in self._llm.stream(prompts, params):
            tokens[index] = output.outputs[0].token_ids
            if clock is None and all(tokens):
                clock, untimed = Clock(), sum(map(len, tokens))
        assert clock is not None
        return clock.stop(sum(map(len, tokens)) - untimed, tokens)

    def mixed(self, workload: Workload) -> dict[str, Work]:
        """Methods to serve the mixed trace: one."""
        return {OURS: lambda: self.serve(workload.mixed_requests())}

    def serve(self, requests: list[Request]) -> Run:
        """All requests at once; the scheduler decides who runs."""
        prompts, params = _as_ours(requests)
        clock = Clock()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        tokens = [output.outputs[0].token_ids for output in outputs]
        return clock.stop(sum(map(len, tokens)), tokens)

    def shortfalls(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """The distance of each token's logit from the largest one, in the token's own context."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, ignore_eos=True)
        whole: Prompt = {"prompt_token_ids": prompt + tokens}
        [output] = self._llm.generate(whole, params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        scores = output.prompt_logprobs[len(prompt) :]  # each holds the token and the likeliest
        return [
            max(one.logprob for one in each.values()) - each[token].logprob
            for token, each in zip(tokens, scores, strict=True)
            if each is not None
        ]


def _as_ours(requests: list[Request]) -> tuple[list[Prompt], list[SamplingParams]]:
    prompts: list[Prompt] = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    return prompts, [
        SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        for _, output in requests
    ]


class Transformers:
    """Hugging Face's transformers, as its own documentation runs a model on a CPU."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        # It warns about options that are set below.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation="sdpa"
        )
        self._model: Any = loaded.eval()

    def decode(self, requests: list[Request]) -> Run:
        """Time from when every sequence has its first token, by a stopping criterion."""
        after_first = _AfterFirst()
        tokens = self._generate(requests, stopping_criteria=[after_first])
        assert after_first.clock is not None
        return after_first.clock.stop(sum(output - 1 for _, output in requests), tokens)

    def mixed(self, workload: Workload) -> dict[str, Work]:
        """Methods to serve the mixed trace: static batches, and continuous batching."""
        requests = workload.mixed_requests()
        few, many = workload.static_batches
        return {
            f"transformers, static {few}": lambda: self.serve_in_batches(requests, few),
            f"transformers, static {many}": lambda: self.serve_in_batches(requests, many),
            "transformers, continuous": lambda: self.serve_continuously(requests),
        }

    def serve_in_batches(self, requests: list[Request], size: int) -> Run:
        """Static batches in order of arrival; each request waits for the longest of its batch."""
        clock = Clock()
        tokens: list[list[int]] = []
        for first in range(0, len(requests), size):
            tokens += self._generate(requests[first : first + size])
        return clock.stop(sum(map(len, tokens)), tokens)

    @torch.inference_mode()
    def _generate(self, requests: list[Request], **options: Any) -> list[list[int]]:
        width = max(len(prompt) for prompt, _ in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(requests):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)  # padded on the left
            mask[row, width - len(prompt) :] = 1
        longest = max(output for _, output in requests)
        options |= {"max_new_tokens": longest, "do_sample": False, "pad_token_id": 0}
        found = self._model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
        return [row[:output] for row, (_, output) in zip(found, requests, strict=True)]

    def serve_continuously(self, requests: list[Request]) -> Run:
        """Its own continuous batching over a paged cache. Raises CannotRun.

        This does the work of `generate_batch`, which takes only one length for all. The manager is
        set up, and its cache allocated, before the clock starts.
        """
        try:
            with self._manager(requests) as manager:
                clock = Clock()
                names = [manager.add_request(p, max_new_tokens=output) for p, output in requests]
                tokens: dict[str, list[int]] = {}
                while len(tokens) < len(requests):
                    result = manager.get_result(timeout=1)  # seconds; None: nothing new in them
                    if result is None and not manager.is_running():
                        raise CannotRun("its thread ended before the last request")
                    if result is not None and result.error is not None:
                        raise CannotRun(result.error)
                    if result is not None and result.is_finished():
                        tokens[result.request_id] = result.generated_tokens
                in_order = [tokens[name] for name in names]
                return clock.stop(sum(map(len, in_order)), in_order)
        except CannotRun:
            raise
        except Exception as error:  # any error of a baseline must not end the other runs
            raise CannotRun(f"{type(error).__name__}: {error}") from error

    def _manager(self, requests: list[Request]) -> Any:
        """A manager with room for all requests. By default its cache would fill most memory."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        page = ContinuousBatchingConfig().page_size
        settings = ContinuousBatchingConfig(
            num_blocks=sum(1 + (len(prompt) + output) // page for prompt, output in requests),
            max_batch_tokens=2048,  # at least as many as `generate` runs at once
            allow_block_sharing=False,  # no prefix cache, as here
            auto_switch_to_flash=False,
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        return self._model.continuous_batching_context_manager(
            generation_config=generation,
            continuous_batching_config=settings,
            warmup=False,  # it records CUDA graphs
        )

    @torch.inference_mode()
    def shortfalls(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """The distance of each token's logit from the largest one, in the token's own context."""
        ids = torch.tensor([prompt + tokens])
        # Row i predicts the next token, so the last row is not needed.
        logits: Tensor = self._model(ids, logits_to_keep=len(tokens) + 1).logits[0, :-1].float()
        given = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return (logits.amax(-1) - given).tolist()


class _AfterFirst:
    """A stopping criterion that never stops: it is called after each token, and starts a clock."""

    def __init__(self) -> None:
        self.clock: Clock | None = None

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.clock = self.clock or Clock()
        return torch.zeros(len(ids), dtype=torch.bool)


# ------------------------------------------------------------------------- in a process of its own


def peak_bytes(by: str, folder: Path, dtype: str, workload: Workload) -> int | None:
    """Peak memory on the mixed trace; None without Linux's /proc.

    It is the highest resident memory minus the resident memory after the imports.
    """
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-m", __name__, by, str(folder), dtype]
    given = json.dumps({"threads": torch.get_num_threads(), "workload": asdict(workload)})
    run = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=False)
    return int(run.stdout.split()[-1]) if run.returncode == 0 else None


def _report_peak(by: str, folder: Path, dtype: str) -> None:
    given = json.load(sys.stdin)
    torch.set_num_threads(given["threads"])
    fields: dict[str, Any] = given["workload"]
    for name in ("prompts", "outputs"):
        fields[name] = Lengths(**fields[name])
    workload = Workload(**fields)
    if by != OURS:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):  # imports what it needs
            transformers.AutoModelForCausalLM.from_config(config)
    before = forget_the_peak()
    if by == OURS:
        works = Minipaged(folder, dtype, workload).mixed(workload)
    else:
        works = Transformers(folder, dtype).mixed(workload)
    works[by]()
    print(resident_bytes("VmHWM") - before)


if __name__ == "__main__":
    _report_peak(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
