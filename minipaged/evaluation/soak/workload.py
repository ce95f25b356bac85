"""Random engines and random requests to them, each drawn from one seed."""

import sys
from dataclasses import dataclass, replace
from math import ceil
from random import Random
from typing import Any

from minipaged.sampling import BeamSearchParams, Params, SamplingParams
from minipaged.tokenizer.prompts import Prompt

LONGEST = 128  # tokens that the model supports
VOCAB_SIZE = 765
WIDEST = 4  # sequences of one request
PAGE_GROUP = 64  # tokens: a pool of virtual memory holds at least one group of pages
NUM_RESERVED = 5  # minimum tokens of a sequence left for output
BASELINES = ("contiguous-oracle", "contiguous-pow2", "contiguous-max", "static")
VIRTUAL = ("virtual", "virtual-sliced") if sys.platform == "linux" else ()
WORDS = "Theo the frog put a white key in the meadow and Una sat by the old tower".split()
STOPS = ("o", "e", " the", "ow", " P", "frog", "in", "a", "Blue", "th", "ird", "qqq")


@dataclass(frozen=True)
class RandomRequest:
    """A request, its arrival, and whether it is aborted."""

    prompt: Prompt
    params: Params
    arrives: int  # it arrives before this step
    aborted: int | None  # number of steps after its arrival
    pins: bool = False  # its prompt is pinned as a prefix after it was computed

    @property
    def width(self) -> int:
        """The maximum number of its concurrent sequences."""
        return (
            self.params.beam_width
            if isinstance(self.params, BeamSearchParams)
            else self.params.num_samples
        )

    def within(self, max_tokens: int) -> "RandomRequest":
        """The same request, limited to the tokens that the context has room for."""
        most = min(self.params.max_tokens or max_tokens, max_tokens)
        return replace(self, params=replace(self.params, max_tokens=most))


@dataclass(frozen=True)
class Workload:
    """The options of one engine, and its requests by arrival."""

    options: dict[str, Any]
    requests: list[RandomRequest]


def draw_workload(seed: int, paged_only: bool = False) -> Workload:
    """Draw a workload; the same seed draws the same one."""
    random = Random(seed)
    options = _draw_options(random, paged_only)
    if options["memory"] == "paged" and not paged_only:  # a generator of its own
        options["async_scheduling"] = Random(f"{seed}, overlapped?").random() < 0.5
    prompts = _Prompts(random, options["max_model_len"])
    requests: list[RandomRequest] = []
    arrives = 0
    for _ in range(random.randint(4, 14)):
        arrives += random.choice((0, 0, 0, 1, 4))
        aborted = random.randint(0, 20) if random.random() < 0.1 else None
        params = _draw_params(random, options["max_num_seqs"])
        requests.append(RandomRequest(prompts.draw(), params, arrives, aborted))
    if options.get("enable_prefix_caching") and random.random() < 0.3:
        whole = prompts.full_blocks(options["block_size"])
        if whole is not None:
            once = SamplingParams(temperature=0.0, max_tokens=1)
            requests.insert(0, RandomRequest(whole, once, 0, None, pins=True))
    return Workload(options, requests)


def _draw_options(random: Random, paged_only: bool) -> dict[str, Any]:
    max_model_len, max_num_seqs = random.randint(32, LONGEST), random.randint(1, 12)
    block_size = random.choice((1, 2, 4, 8, 16, 32))
    is_baseline = random.random() < 0.2 and not paged_only
    memory = random.choice(BASELINES + VIRTUAL) if is_baseline else "paged"
    longest = ceil(max_model_len / block_size)
    if memory in BASELINES:
        longest = 1 << (longest - 1).bit_length()  # regions are powers of two
    least = ceil(PAGE_GROUP / block_size) if memory in VIRTUAL else max(2, longest // 2)
    tight = random.randint(least, least + 2 * longest)
    num_blocks = tight if random.random() < 0.7 else tight + longest * max_num_seqs
    options: dict[str, Any] = {
        "memory": memory,
        "block_size": block_size,
        "num_blocks": num_blocks,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "enable_chunked_prefill": random.random() < 0.7,
    }
    if not options["enable_chunked_prefill"]:
        options["max_num_batched_tokens"] = max_model_len + random.randint(0, 32)
    elif random.random() < 0.6:
        options["max_num_batched_tokens"] = max_num_seqs + random.randint(0, 24)
    if memory not in VIRTUAL:
        options["attention_backend"] = random.choice(("reference", "blockwise", "torch"))
    if memory not in BASELINES:
        options["watermark"] = random.choice((0.0, 0.01, 0.2))
    if memory == "paged":
        options["num_swap_blocks"] = random.choice((0, num_blocks // 2, 2 * num_blocks))
        modes = ("auto", "recompute", "swap") if options["num_swap_blocks"] else ("auto",)
        options["preemption"] = random.choice(modes)
        options["enable_prefix_caching"] = random.random() < 0.7
    return options


class _Prompts:
    """Prompts, many of which share a prefix with another one."""

    def __init__(self, random: Random, max_model_len: int) -> None:
        self._random = random
        self._longest = max_model_len - NUM_RESERVED
        self._documents = [self._tokens(LONGEST) for _ in range(2)]

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(range(VOCAB_SIZE - 1), k=count)

    def draw(self) -> Prompt:
        """Token ids or text, sometimes with a salt."""
        random = self._random
        if random.random() < 0.2:
            return {"prompt": " ".join(random.sample(WORDS, random.randint(1, 6)))}
        length = min(random.randint(0, self._longest), random.randint(0, self._longest))
        prefix = random.choice(self._documents)[:length]
        tokens = (prefix + self._tokens(random.randint(1, 12)))[-self._longest :]
        if len(prefix) > 1 and random.random() < 0.3:
            tokens = prefix  # the same prompt may come twice
        if random.random() < 0.2:
            return {"prompt_token_ids": tokens, "cache_salt": "another user"}
        return {"prompt_token_ids": tokens}

    def full_blocks(self, block_size: int) -> Prompt | None:
        """A prefix of a document that fills some blocks; None if none fits."""
        most = self._longest // block_size
        if most == 0:
            return None
        length = self._random.randint(1, most) * block_size
        return {"prompt_token_ids": self._documents[0][:length]}


def _draw_params(random: Random, max_num_seqs: int) -> Params:
    width = random.randint(1, min(WIDEST, max_num_seqs))
    max_tokens = None if random.random() < 0.03 else random.randint(NUM_RESERVED, 24)
    [kind] = random.choices(("greedy", "sampled", "best_of", "beams"), (4, 4, 2, 2))
    if kind == "beams":
        return BeamSearchParams(
            beam_width=width,
            max_tokens=max_tokens,
            length_penalty=random.choice((0.0, 1.0, 1.5, -1.0)),
            early_stopping=random.choice((True, False, "never")),
            ignore_eos=random.random() < 0.3,
        )
    return SamplingParams(
        n=random.randint(1, width) if kind == "best_of" else width if kind == "sampled" else 1,
        best_of=width if kind == "best_of" else None,
        max_tokens=max_tokens,
        seed=random.getrandbits(32),
        **({"temperature": 0.0} if kind == "greedy" else _draw_chance(random)),
        **_draw_extras(random),
    )


def _draw_chance(random: Random) -> dict[str, Any]:
    chosen: dict[str, Any] = {"temperature": random.uniform(0.3, 1.5)}
    cuts = {"top_k": random.randint(1, 40), "top_p": random.uniform(0.3, 1), "min_p": 0.05}
    return chosen | {name: value for name, value in cuts.items() if random.random() < 0.3}


def _draw_extras(random: Random) -> dict[str, Any]:
    extras: dict[str, Any] = {
        "stop": random.sample(STOPS, random.randint(1, 3)),
        "stop_token_ids": random.sample(range(VOCAB_SIZE), 20),
        "ignore_eos": True,
        "min_tokens": random.randint(1, NUM_RESERVED),
        "logprobs": random.randint(0, 4),
        "prompt_logprobs": random.randint(0, 2),
        "presence_penalty": random.uniform(-1, 1),
        "frequency_penalty": random.uniform(-1, 1),
        "repetition_penalty": random.uniform(0.8, 1.5),
        "logit_bias": {random.randrange(VOCAB_SIZE): random.uniform(-5, 5) for _ in range(5)},
    }
    return {name: value for name, value in extras.items() if random.random() < 0.15}
