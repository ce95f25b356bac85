"""The output of a request that is served alone: the reference for random engines."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import minipaged
from minipaged.engine.outputs import RequestOutput
from minipaged.evaluation.bench.engine_workload import QUICK, make_model
from minipaged.evaluation.soak.trial import Served
from minipaged.evaluation.soak.workload import LONGEST, VOCAB_SIZE, WIDEST
from minipaged.llm import LLM
from minipaged.sampling.logprobs import Logprobs
from minipaged.sampling.rows import SamplingRow
from minipaged.sampling.sampler import Draws, Sampler

ROUNDING = 1e-3
"""Tolerance of log-probabilities: the order of float32 sums depends on the batch."""
JITTER = 1e-4
"""Noise on logits, larger than rounding and far smaller than most gaps between tokens."""
TRIES = 16
AllLogprobs = list[Logprobs | None] | list[Logprobs] | None
_TOKENIZER_FILES = ("storyteller.tiktoken", "tiktoken.json")


def make_tiny_model(folder: Path) -> None:
    """Write a checkpoint of two random layers, with the embedded model's tokenizer."""
    sizes = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": LONGEST}
    with torch.random.fork_rng(devices=[]):
        make_model(replace(QUICK, hf=QUICK.hf | sizes | {"eos_token_id": [764, 41, 79]}), folder)
    assets = Path(minipaged.__file__).parent / "assets" / "storyteller"
    for name in _TOKENIZER_FILES:
        shutil.copy(assets / name, folder)


class Alone:
    """Serves one request at a time, with ample memory and the reference attention."""

    def __init__(self, folder: Path) -> None:
        self._engine = LLM(
            folder,
            device="cpu",
            attention_backend="reference",
            enable_prefix_caching=False,
            max_num_seqs=TRIES * WIDEST,
            max_num_batched_tokens=TRIES * LONGEST,  # all prompts in the first step
        ).engine
        self._sampler = self._engine.sampler

    def difference(self, served: Served, max_model_len: int) -> str | None:
        """Describe how a request differs from itself served alone; None if it does not."""
        [expected] = self._serve(served, max_model_len, copies=1)
        return _difference(served, expected)

    def is_rounding(self, served: Served, max_model_len: int) -> bool:
        """Whether noise just above float32 rounding reproduces the served output.

        Two tokens may be so close that rounding decides, which differs from batch to batch. The
        request is then served again with noise, several times at once. The whole output must be
        equal, to the last token, so other errors are not excused.
        """
        self._engine.sampler = NoisySampler()
        try:
            outputs = self._serve(served, max_model_len, copies=TRIES)
        finally:
            self._engine.sampler = self._sampler
        return any(_difference(served, output) is None for output in outputs)

    def _serve(self, served: Served, max_model_len: int, copies: int) -> list[RequestOutput]:
        """The outputs of several copies, cut to the length of the served request."""
        room = max_model_len - len(served.output.prompt_token_ids)
        request = served.request.within(room)
        outputs: dict[str, RequestOutput] = {}
        for number in range(copies):
            self._engine.add_request(str(number), request.prompt, request.params)
        num_steps = 0
        while self._engine.has_unfinished_requests() and num_steps != served.cut_after:
            for progress in self._engine.step():
                if progress.finished:
                    outputs[progress.request_id] = progress.build_output()
            num_steps += 1
        for request_id in self._engine.unfinished_request_ids:
            aborted = self._engine.abort_request(request_id)
            assert aborted is not None, "it is unfinished"
            outputs[request_id] = aborted
        return list(outputs.values())


class NoisySampler(Sampler):
    """Adds noise to all logits before it samples."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(0)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Draws:
        noise = JITTER * torch.randn(logits.shape, generator=self._generator)  # [rows, vocab]
        return super().sample(logits + noise, rows)


def _difference(served: Served, expected: RequestOutput) -> str | None:
    output = served.output
    if len(output.outputs) != len(expected.outputs):
        return f"{len(output.outputs)} completions instead of {len(expected.outputs)}"
    for got, wanted in zip(output.outputs, expected.outputs, strict=True):
        if wanted.finish_reason == "abort":  # the reference was cut like the request
            wanted = replace(wanted, finish_reason=served.cut_reason)
        for name in ("token_ids", "text", "finish_reason", "stop_reason"):
            if getattr(got, name) != getattr(wanted, name):
                return f"{name} {getattr(got, name)!r} instead of {getattr(wanted, name)!r}"
        num_tokens = max(1, len(wanted.token_ids))
        if not abs(got.cumulative_logprob - wanted.cumulative_logprob) <= ROUNDING * num_tokens:
            return (
                f"log-probability {got.cumulative_logprob} instead of {wanted.cumulative_logprob}"
            )
        if not _are_close(got.logprobs, wanted.logprobs):
            return f"logprobs {got.logprobs} instead of {wanted.logprobs}"
    # A request cut before its first token may have computed any part of its prompt.
    if served.cut_after != 0 and not _are_close(output.prompt_logprobs, expected.prompt_logprobs):
        return f"prompt_logprobs {output.prompt_logprobs} instead of {expected.prompt_logprobs}"
    return None


def _are_close(got: AllLogprobs, wanted: AllLogprobs) -> bool:
    """Whether the values agree in order: of two equal values, either token may be first."""
    if got is None or wanted is None:
        return got is wanted
    pairs = [(a or {}, b or {}) for a, b in zip(got, wanted, strict=False)]
    return len(got) == len(wanted) and all(
        len(a) == len(b)
        and all(
            abs(x.logprob - y.logprob) <= ROUNDING
            for x, y in zip(a.values(), b.values(), strict=True)
        )
        for a, b in pairs
    )
