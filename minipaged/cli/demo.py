"""`minipaged demo`: answers questions about eight stories of very different length in one batch.

Each prompt is a story with a question about one of its first sentences. The model answers correctly
only if its block table leads to the right keys and values, hundreds of tokens back.
"""

import json
import time
from dataclasses import dataclass
from random import Random
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from minipaged.cli.options import AsJson, Part, ShowBlocks, Trace, takes_engine_options
from minipaged.cli.session import Session
from minipaged.config import EngineArgs
from minipaged.engine.outputs import RequestOutput
from minipaged.errors import InvalidOption
from minipaged.evaluation.stories import KINDS, Question, prompt, tell
from minipaged.scheduler.interface import Scheduler
from minipaged.tokenizer.base import Tokenizer
from minipaged.tracing.block_map import letter
from minipaged.utils.counts import counted

STORY_SIZES = (1, 2, 4, 8, 12, 16, 24, 48)  # facts
MAX_ANSWER = 32  # tokens
LEGEND = '\nColumn "back": tokens between the answer in the story and its question.\n'
NEXT = """
Where to go next:
  learn  minipaged learn 0    # needs pip install -e ".[plot]"
  labs   minipaged lab list   # needs pip install -e ".[labs]"
  serve  minipaged serve      # needs pip install -e ".[serve]"
"""


@takes_engine_options(
    leave_out=("model",),  # only the embedded model has the vocabulary of the stories
    num_blocks=128,
    max_num_batched_tokens=256,  # spreads the prompts over several steps, to be watched
)
def demo(
    *,
    options: dict[str, Any],
    part: Part = None,
    show_blocks: ShowBlocks = False,
    as_json: AsJson = False,
    trace: Trace = None,
) -> None:
    """Answer eight questions about eight stories in one batch.

    The embedded model answers, and all stories share one pool of blocks.
    """
    args = EngineArgs(**options)  # refuses a bad value before anything is printed
    num_blocks, block_size = options["num_blocks"], args.block_size
    with Session(show_blocks, trace, live=not as_json) as session:
        if not as_json:  # before torch is imported, which takes seconds
            session.console.print(introduction(args), highlight=False)
        from minipaged.sampling import SamplingParams

        llm = session.load(options, part)
        tokenizer = llm.get_tokenizer()
        assert tokenizer is not None, "the embedded model has a tokenizer"
        cases = make_cases(tokenizer, options["seed"])
        board = Scoreboard(cases, llm.engine.scheduler)
        refuse_too_small_a_pool(cases, num_blocks, block_size)
        if not as_json:
            session.console.print("Story B, for example:\n", Text(cases[1].prompt, "dim"), sep="\n")
            session.console.print(LEGEND)
        start = time.perf_counter()
        with session.watch(None if as_json else board):
            greedy = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER)
            for index, output in llm.stream([case.prompt for case in cases], greedy):
                board.update(index, output)
        seconds = time.perf_counter() - start
        if as_json:
            answers = board.as_dict()
            report = {"right": board.num_right, "of": len(answers), "seconds": round(seconds, 3)}
            print(json.dumps({**report, "answers": answers}))
            return
        slots, longest = num_blocks * block_size, llm.engine.config.max_model_len
        summary = board.summary(seconds - session.seconds_watched, slots // longest, longest)
        session.console.print(f"\n{summary}", highlight=False)
        session.console.print(NEXT, highlight=False, markup=False, soft_wrap=True, end="")


@dataclass(frozen=True)
class Case:
    """One prompt, its question, and the tokens from the fact to the answer."""

    num_facts: int
    question: Question
    prompt: str
    num_tokens: int
    looks_back: int


def make_cases(tokenizer: Tokenizer, seed: int) -> list[Case]:
    """Eight cases; another seed tells other stories."""
    cases: list[Case] = []
    for index, num_facts in enumerate(STORY_SIZES):
        rng = Random(f"{seed}/{index}")
        story = tell(num_facts, seed=rng.getrandbits(32))
        kind = KINDS[index % len(KINDS)]
        early = [q for q in story.questions if q.kind == kind and q.fact_index <= num_facts // 4]
        question = rng.choice(early)
        text = prompt(story, question)
        since_the_fact = text[text.index(str(story.facts[question.fact_index])) :]
        cases.append(
            Case(
                num_facts,
                question,
                text,
                num_tokens=len(tokenizer.encode(text)),
                looks_back=len(tokenizer.encode(since_the_fact)),
            )
        )
    return cases


def refuse_too_small_a_pool(cases: list[Case], num_blocks: int, block_size: int) -> None:
    """Raise InvalidOption if the pool cannot hold the longest story and its answer."""
    needed = -(-(max(case.num_tokens for case in cases) + MAX_ANSWER) // block_size)
    if num_blocks < needed:
        raise InvalidOption(
            f"num_blocks is {num_blocks}, but the longest story with its answer needs {needed} "
            f"blocks of {block_size} tokens: raise num_blocks to {needed} or more."
        )


def introduction(args: EngineArgs) -> str:
    """A description of the demo."""
    growth = "A story takes a new block only when its last one is full. "
    return (
        f"Eight stories of 1 to {STORY_SIZES[-1]} sentences share a pool of {args.num_blocks} "
        f"blocks. A block holds the keys and values of {counted(args.block_size, 'token')}. "
        f"{growth if args.memory == 'paged' else ''}"
        "The embedded model answers one question about each story, all in one batch.\n"
    )


class Scoreboard:
    """The cases and the progress of each, drawn as a table."""

    def __init__(self, cases: list[Case], scheduler: Scheduler) -> None:
        self.cases = cases
        self.outputs: list[RequestOutput | None] = [None] * len(cases)
        self._scheduler = scheduler

    def update(self, index: int, output: RequestOutput) -> None:
        """Store the latest output of a case."""
        self.outputs[index] = output

    def answer(self, index: int) -> str:
        """The text generated for a case so far."""
        output = self.outputs[index]
        return "" if output is None else output.outputs[0].text.strip()

    def is_right(self, index: int) -> bool:
        """Whether the answer is the expected one, word for word."""
        return self.cases[index].question.is_answered_by(self.answer(index))

    @property
    def num_right(self) -> int:
        return sum(self.is_right(index) for index in range(len(self.cases)))

    @property
    def num_generated(self) -> int:
        return sum(len(o.outputs[0].token_ids) for o in self.outputs if o is not None)

    def as_dict(self) -> list[dict[str, object]]:
        """What `--json` prints for each case."""
        return [
            {
                "num_facts": case.num_facts,
                "prompt_tokens": case.num_tokens,
                "looks_back_tokens": case.looks_back,
                "question": case.question.text,
                "expected": case.question.answer,
                "answer": self.answer(index),
                "right": self.is_right(index),
            }
            for index, case in enumerate(self.cases)
        ]

    def summary(self, seconds: float, fitted_before: int, max_model_len: int) -> str:
        """The results, and what the same pool could hold before paging."""
        read = sum(case.num_tokens for case in self.cases)
        return (
            f"{self.num_right} of {len(self.cases)} answers are right. The model read {read} "
            f"prompt tokens and generated {self.num_generated} in {seconds:.1f} s of computing "
            f"({(read + self.num_generated) / seconds:.0f} tokens/s). Before paging, servers "
            f"reserved room for the longest possible sequence, here {max_model_len} tokens: this "
            f"pool would have held only {counted(fitted_before, 'sequence')} at a time."
        )

    def __rich__(self) -> Group:
        answered = sum(output is not None and output.finished for output in self.outputs)
        bar = ProgressBar(total=len(self.cases), completed=answered, width=32)
        return Group(self._table(), "", bar, f" {answered} of {len(self.cases)} answered")

    def _table(self) -> Table:
        # One line per case and fixed widths: a table that grows would scroll the map above it away.
        table = Table(box=None, padding=(0, 1), expand=True)
        table.add_column("")
        for title in ("tokens", "back"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("question", ratio=3, no_wrap=True, overflow="ellipsis")
        table.add_column("answer", ratio=2, no_wrap=True, overflow="ellipsis")
        table.add_column("", min_width=5, no_wrap=True)
        for index, case in enumerate(self.cases):
            table.add_row(
                letter(index),
                str(case.num_tokens),
                str(case.looks_back),
                case.question.text,
                *self._answer_and_verdict(index),
            )
        return table

    def _answer_and_verdict(self, index: int) -> tuple[Text, Text]:
        output, case = self.outputs[index], self.cases[index]
        if output is not None and output.finished:
            answer = Text(self.answer(index))
            if self.is_right(index):
                return answer, Text("right", "green")
            return answer.append(f" (expected: {case.question.answer})", "dim"), Text(
                "wrong", "red"
            )
        return Text(self.answer(index)) or Text(self._progress(index), "dim"), Text("")

    def _progress(self, index: int) -> str:
        # The cases arrive in their order, and there are no other requests.
        running = {group.arrival: group for group in self._scheduler.running}
        if index not in running:
            return "waiting"
        num_computed = running[index].sequences[0].num_computed_tokens
        return f"read {num_computed} of {self.cases[index].num_tokens}"
