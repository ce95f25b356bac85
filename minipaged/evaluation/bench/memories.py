"""Paging and virtual memory under the embedded model: the same requests, the same bytes."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

from minipaged.config import MemoryKind
from minipaged.evaluation.stories import tell
from minipaged.llm import LLM
from minipaged.sampling import SamplingParams
from minipaged.tokenizer.prompts import Prompt

NUM_REQUESTS, NUM_TOKENS = 16, 48
ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """One kind of memory."""

    memory: str
    seconds: float  # for all requests, in the middle of the rounds
    same_tokens: bool  # as the first kind generates


def measure(kinds: Iterable[MemoryKind]) -> list[Row]:
    """All kinds in turn, round after round, on a CPU."""
    llms = {kind: LLM(memory=kind, device="cpu", enable_prefix_caching=False) for kind in kinds}
    prompts: list[Prompt] = [tell(2 + n, seed=n).text for n in range(NUM_REQUESTS)]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    seconds: dict[str, list[float]] = {kind: [] for kind in llms}
    tokens: dict[str, list[list[int]]] = {}
    for _ in range(ROUNDS + 1):  # the first warms up
        for kind, llm in llms.items():
            begin = time.perf_counter()
            outputs = llm.generate(list(prompts), params, use_tqdm=False)
            seconds[kind].append(time.perf_counter() - begin)
            tokens[kind] = [output.outputs[0].token_ids for output in outputs]
    expected = next(iter(tokens.values()))
    return [
        Row(kind, statistics.median(times[1:]), tokens[kind] == expected)
        for kind, times in seconds.items()
    ]
