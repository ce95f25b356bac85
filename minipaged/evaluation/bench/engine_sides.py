"""The engines of `minipaged bench engine` that run in this environment: this library, transformers.

Run as a program, this module is one of them, and answers as `engine_peer` does.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from minipaged import __version__
from minipaged.config import Backend, DType
from minipaged.evaluation.bench.engine_peer import Clock, Request, answer, serve
from minipaged.llm import LLM
from minipaged.models.loader import DTYPES
from minipaged.sampling import SamplingParams
from minipaged.tokenizer.prompts import Prompt

OURS = "minipaged"
CONTINUOUS = "continuous"  # transformers' continuous batching
Answer = dict[str, Any]  # of `Clock.stop`


class Minipaged:
    """This library, with its defaults for a CPU and a pool for all requests."""

    def __init__(self, options: dict[str, Any], backend: Backend = "auto") -> None:
        dtype: str = options["dtype"]
        self._llm = LLM(
            options["folder"],
            device="cpu",
            dtype=cast(DType, dtype),
            weight_dtype=options.get("weight_dtype", "auto"),
            attention_backend=backend,
            num_blocks=options["num_blocks"],
        )
        weights: str = options.get("weight_dtype", dtype)
        self.about = {"version": __version__, "weights": weights, "keys": dtype}

    def serve(self, requests: list[Request], after_first: bool, way: str = "") -> Answer:
        """All requests at once; the scheduler decides who runs. There is one way to do so."""
        del way
        return serve(self._stream, requests, after_first)

    def _stream(self, requests: list[Request]) -> Iterator[tuple[int, list[int]]]:
        prompts: list[Prompt] = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [
            SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
            for _, output in requests
        ]
        for index, output in self._llm.stream(prompts, params):
            yield index, output.outputs[0].token_ids

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


class Transformers:
    """Hugging Face's transformers, as its own documentation runs a model on a CPU."""

    def __init__(self, options: dict[str, Any]) -> None:
        import transformers

        dtype: str = options["dtype"]

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        # It warns about options that are set below.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            options["folder"], dtype=DTYPES[dtype], attn_implementation="sdpa"
        )
        self._model: Any = loaded.eval()
        self.about = {"version": transformers.__version__, "weights": dtype, "keys": dtype}

    def serve(self, requests: list[Request], after_first: bool, way: str = "") -> Answer:
        """One batch of all requests; "static 8": batches of eight; or CONTINUOUS batching."""
        if way == CONTINUOUS:
            return self._serve_continuously(requests)
        if after_first:
            return self._decode(requests)
        return self._serve_in_batches(requests, int(way.split()[-1]) if way else len(requests))

    def _decode(self, requests: list[Request]) -> Answer:
        """Time from when every sequence has its first token, by a stopping criterion."""
        after_first = _AfterFirst()
        tokens = self._generate(requests, stopping_criteria=[after_first])
        assert after_first.clock is not None
        return after_first.clock.stop(sum(output - 1 for _, output in requests), tokens)

    def _serve_in_batches(self, requests: list[Request], size: int) -> Answer:
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

    def _serve_continuously(self, requests: list[Request]) -> Answer:
        """Its own continuous batching over a paged cache.

        This does the work of `generate_batch`, which takes only one length for all. The manager is
        set up, and its cache allocated, before the clock starts.
        """
        with self._manager(requests) as manager:
            clock = Clock()
            names = [manager.add_request(p, max_new_tokens=output) for p, output in requests]
            tokens: dict[str, list[int]] = {}
            while len(tokens) < len(requests):
                result = manager.get_result(timeout=1)  # seconds; None: nothing new in them
                if result is None and not manager.is_running():
                    raise RuntimeError("its thread ended before the last request")
                if result is not None and result.error is not None:
                    raise RuntimeError(result.error)
                if result is not None and result.is_finished():
                    tokens[result.request_id] = result.generated_tokens
            in_order = [tokens[name] for name in names]
            return clock.stop(sum(map(len, in_order)), in_order)

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


def ways(options: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """The functions that the process answers with: `load` comes first."""
    sides: list[Minipaged | Transformers] = []

    def load() -> dict[str, str]:
        torch.set_num_threads(options["threads"])
        sides.append((Minipaged if options["engine"] == OURS else Transformers)(options))
        return sides[0].about

    return {
        "load": load,
        "serve": lambda **given: sides[0].serve(**given),
        "shortfalls": lambda **given: sides[0].shortfalls(**given),
    }


if __name__ == "__main__":
    answer(ways(json.loads(sys.argv[1])))
