"""`minipaged demo`: eight stories of very different length, asked about together.

Each prompt is a story with a question about one of its first sentences, so the answer stands far
back: a model gets it right only if every block of keys and values in between is where its block
table says.
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
from minipaged.engine.outputs import RequestOutput
from minipaged.errors import InvalidOption
from minipaged.evaluation.stories import KINDS, Question, prompt, tell
from minipaged.scheduler.interface import Scheduler
from minipaged.tokenizer.base import Tokenizer
from minipaged.tracing.block_map import letter

STORY_SIZES = (1, 2, 4, 8, 12, 16, 24, 48)  # facts
MAX_ANSWER = 32  # tokens


@takes_engine_options(
    leave_out=("model",),  # the stories are in the words of the embedded model
    num_blocks=128,
    max_num_batched_tokens=256,  # prompts are computed over several steps, which can be watched
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
    num_blocks, block_size = options["num_blocks"], options["block_size"]
    with Session(show_blocks, trace, live=not as_json) as session:
        from minipaged.sampling import SamplingParams

        llm = session.load(options, part)
        tokenizer = llm.get_tokenizer()
        assert tokenizer is not None, "the embedded model has a tokenizer"
        cases = make_cases(tokenizer, options["seed"])
        board = Scoreboard(cases, llm.engine.scheduler)
        refuse_too_small_a_pool(cases, num_blocks, block_size)
        if not as_json:
            about, example = introduction(cases, num_blocks, block_size)
            session.console.print(about, "", Text(example, style="dim"), "", sep="\n")
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


@dataclass(frozen=True)
class Case:
    """One prompt, its question, and how many tokens lie between the fact and the answer."""

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
    """Raise InvalidOption if the longest story and its answer could never be in the pool."""
    needed = -(-(max(case.num_tokens for case in cases) + MAX_ANSWER) // block_size)
    if num_blocks < needed:
        raise InvalidOption(
            f"num_blocks is {num_blocks}, and the longest story with its answer needs {needed} "
            f"blocks of {block_size} tokens: raise num_blocks to {needed} or more."
        )


def introduction(cases: list[Case], num_blocks: int, block_size: int) -> tuple[str, str]:
    """What there is to see, and one of the prompts as an example."""
    about = (
        f"Eight stories, of 1 to {cases[-1].num_facts} facts, share a pool of {num_blocks} blocks. "
        f"A block holds the keys and values of {block_size} tokens, and a story takes one only "
        'when it needs it. "Back" is how many tokens back the answer stands. Story B, for one:'
    )
    return about, cases[1].prompt


class Scoreboard:
    """The cases and the progress of each, drawn as a table."""

    def __init__(self, cases: list[Case], scheduler: Scheduler) -> None:
        self.cases = cases
        self.outputs: list[RequestOutput | None] = [None] * len(cases)
        self._scheduler = scheduler

    def update(self, index: int, output: RequestOutput) -> None:
        """Note what a case has so far."""
        self.outputs[index] = output

    def answer(self, index: int) -> str:
        """What has been generated for a case."""
        output = self.outputs[index]
        return "" if output is None else output.outputs[0].text.strip()

    def is_right(self, index: int) -> bool:
        """Whether the answer is the only right one, word for word."""
        return self.cases[index].question.is_answered_by(self.answer(index))

    @property
    def num_right(self) -> int:
        return sum(self.is_right(index) for index in range(len(self.cases)))

    @property
    def num_generated(self) -> int:
        return sum(len(o.outputs[0].token_ids) for o in self.outputs if o is not None)

    def as_dict(self) -> list[dict[str, object]]:
        """What `--json` prints of each case."""
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
        """What has been seen, and what the same memory could have held before paging."""
        read = sum(case.num_tokens for case in self.cases)
        return (
            f"{self.num_right} of {len(self.cases)} right; {read} prompt tokens read and "
            f"{self.num_generated} generated in {seconds:.1f} s of computing "
            f"({(read + self.num_generated) / seconds:.0f} tokens/s). Had each story reserved room "
            f"for {max_model_len} tokens beforehand, as was usual before paging, the same memory "
            f"would have held {fitted_before} of them at a time."
        )

    def __rich__(self) -> Group:
        answered = sum(output is not None and output.finished for output in self.outputs)
        bar = ProgressBar(total=len(self.cases), completed=answered, width=32)
        return Group(self._table(), "", bar, f" {answered} of {len(self.cases)} answered")

    def _table(self) -> Table:
        # One line a case and fixed widths: a table that grows would push what is above it away.
        table = Table(box=None, padding=(0, 1), expand=True)
        table.add_column("")
        for title in ("facts", "tokens", "back"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("question", ratio=5, no_wrap=True, overflow="ellipsis")
        table.add_column("answer", ratio=4, no_wrap=True, overflow="ellipsis")
        table.add_column("", ratio=3, no_wrap=True, overflow="ellipsis")
        for index, case in enumerate(self.cases):
            table.add_row(
                letter(index),
                str(case.num_facts),
                str(case.num_tokens),
                str(case.looks_back),
                case.question.text,
                self.answer(index),
                self._state(index),
            )
        return table

    def _state(self, index: int) -> Text:
        output, case = self.outputs[index], self.cases[index]
        if output is not None and output.finished:
            if self.is_right(index):
                return Text("right", style="green")
            return Text(f"wrong: {case.question.answer}", style="red")
        # The cases arrive in their order, and no other requests do.
        running = {group.arrival: group for group in self._scheduler.running}
        if index not in running:
            return Text("waiting", style="dim")
        num_computed = running[index].sequences[0].num_computed_tokens
        if num_computed < case.num_tokens:
            return Text(f"{num_computed} of {case.num_tokens}", style="dim")  # fits 80 columns
        return Text("answering", style="dim")
