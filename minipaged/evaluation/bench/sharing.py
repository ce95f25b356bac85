"""`minipaged bench sharing`: the memory that the samples or beams of a request save by sharing.

This measures the paper's Figure 15 on a real model: the fraction of blocks saved, compared with
sequences that share nothing, over all steps of all requests. As in the paper, a request has the
lengths of an Alpaca instruction and its answer, blocks have 16 slots, and no sequence ends early.
The paper measured it on OPT-13B.

For parallel sampling the result is arithmetic: only the full blocks of the prompt are shared. For
beam search it depends on the ancestry of the beams, and so on the model. The prefix cache is off,
as in the paper: with it, samples would also share blocks that happen to be equal.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from statistics import NormalDist

from rich.table import Table

from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.metrics import StepStats
from minipaged.evaluation.stories import tell
from minipaged.llm import LLM
from minipaged.sampling import BeamSearchParams, Params, SamplingParams
from minipaged.scheduler.output import SchedulerOutput

WIDTHS = (2, 4, 6)
PAPER = {  # section 6.3, Figure 15, Alpaca: percent of blocks saved
    "parallel sampling": {2: 6.09, 4: 8.53, 6: 9.79},
    "beam search": {2: 37.56, 4: 53.13, 6: 55.16},
}
# The paper states only the means of the traces: 19.31 tokens in, 58.45 out. A lognormal with these
# parameters has those means; its spread reproduces the paper's Figure 13.
LOG_PROMPT, LOG_OUTPUT = (2.81, 0.55), (3.71, 0.84)
SHORTEST = 4  # tokens


@dataclass(frozen=True)
class Row:
    """One setting: the saving measured here, the one by arithmetic if possible, and the paper's."""

    method: str
    width: int
    percent: float
    formula_percent: float | None
    paper_percent: float


class SharingMeter:
    """Counts, in an engine's steps, the blocks of requests with several sequences.

    with SharingMeter(llm.engine) as meter:
        llm.generate(prompts, SamplingParams(n=4))
    print(meter.saved())
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.num_held = Counter[str]()  # by request, summed over steps: blocks of its sequences,
        self.num_unshared = Counter[str]()  # and the blocks without sharing
        self._engine = engine

    def __call__(self, decision: SchedulerOutput, stats: StepStats) -> None:
        """Count a step."""
        memory = self._engine.memory
        for group in {s.group for s in decision.sequences if s.group.width > 1}:
            unshared = sum(len(memory.tables[seq.seq_id]) for seq in group.sequences)
            self.num_unshared[group.request_id] += unshared
            self.num_held[group.request_id] += memory.num_distinct_blocks(group)

    def saved(self, request_id: str | None = None) -> float:
        """The fraction of a request's blocks that sharing saves (Figure 15); None: of all."""
        if request_id is not None:
            held, unshared = self.num_held[request_id], self.num_unshared[request_id]
        else:
            held, unshared = self.num_held.total(), self.num_unshared.total()
        return 1 - held / unshared if unshared else 0.0

    def __enter__(self) -> "SharingMeter":
        self._engine.listeners.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.listeners.remove(self)


def alpaca_lengths(num_requests: int, longest: int, seed: int) -> list[tuple[int, int]]:
    """Return (prompt tokens, output tokens) of each request, at most `longest` tokens together.

    Lengths are the midpoints of `num_requests` equal slices of the distribution, so a few requests
    have the spread of many. Prompts and outputs are paired at random, because they are independent
    in the traces.
    """

    def slices(mu: float, sigma: float) -> list[int]:
        normal = NormalDist(mu, sigma)
        points = ((i + 0.5) / num_requests for i in range(num_requests))
        return [max(SHORTEST, round(math.exp(normal.inv_cdf(point)))) for point in points]

    prompts, outputs = slices(*LOG_PROMPT), slices(*LOG_OUTPUT)
    Random(seed).shuffle(outputs)
    return [(p, min(o, longest - p)) for p, o in zip(prompts, outputs, strict=True)]


def measure(
    llm: LLM, lengths: list[tuple[int, int]], seed: int, use_tqdm: bool = True
) -> Iterator[Row]:
    """Measure both methods at every width, on prompts of these lengths."""
    prompts = make_prompts(llm, lengths, seed)
    for method, paper in PAPER.items():
        for width in WIDTHS:
            params = [_params(method, width, output) for _, output in lengths]
            with SharingMeter(llm.engine) as meter:
                outputs = llm.generate(list(prompts), params, use_tqdm)
            for (_, asked), request in zip(lengths, outputs, strict=True):
                found = {len(o.token_ids) for o in request.outputs}
                assert found == {asked}, f"a request for {asked} tokens ended after {found}"
            formula = None
            if method == "parallel sampling":
                block_size = llm.engine.config.block_size
                formula = 100 * _by_formula(lengths, width, block_size)
            yield Row(method, width, 100 * meter.saved(), formula, paper[width])


def make_prompts(llm: LLM, lengths: list[tuple[int, int]], seed: int) -> list[list[int]]:
    """Make prompts of the given lengths, each from a different story."""
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None, "the embedded model has a tokenizer"
    prompts: list[list[int]] = []
    for index, (num_tokens, _) in enumerate(lengths):
        # A fact has about 15 tokens, so the story is longer than the prompt.
        story = tell(1 + num_tokens // 8, seed=Random(f"{seed}/{index}").getrandbits(32)).text
        prompts.append(tokenizer.encode(story)[:num_tokens])
        assert len(prompts[-1]) == num_tokens, "the story is too short for the prompt"
    return prompts


def _params(method: str, width: int, num_tokens: int) -> Params:
    if method == "beam search":
        return BeamSearchParams(beam_width=width, max_tokens=num_tokens, ignore_eos=True)
    return SamplingParams(n=width, max_tokens=num_tokens, ignore_eos=True)


def _by_formula(lengths: list[tuple[int, int]], n: int, block_size: int) -> float:
    """The saving of n samples: (n - 1) * floor(p / B) of n * ceil((p + g) / B) blocks per step.

    In the step that computes the prompt there is still only one sequence. In the last step, blocks
    are allocated for all tokens but the last sampled one.
    """
    saved = total = 0
    for prompt, output in lengths:
        total += math.ceil(prompt / block_size)
        for generated in range(1, output):
            saved += (n - 1) * (prompt // block_size)
            total += n * math.ceil((prompt + generated) / block_size)
    return saved / total


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    for title in ("", "sequences"):
        table.add_column(title)
    for title in ("saved", "by formula", "paper (OPT-13B)"):
        table.add_column(title, justify="right")
    for row in rows:
        formula = "" if row.formula_percent is None else f"{row.formula_percent:.2f} %"
        table.add_row(
            row.method, str(row.width), f"{row.percent:.2f} %", formula, f"{row.paper_percent} %"
        )
    return table
