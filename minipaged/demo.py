"""`minipaged demo`: eight prompts of very different length, answered together.

Each prompt is a story with a question about one of its first sentences, so the answer stands far
back: a model gets it right only if every block of keys and values in between is where its block
table says.
"""

from dataclasses import dataclass
from random import Random

from rich.table import Table

from minipaged.outputs import RequestOutput
from minipaged.stories import KINDS, Question, prompt, tell
from minipaged.tokenizer import Tokenizer

STORY_SIZES = (1, 2, 4, 8, 12, 16, 24, 40)  # facts


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


class Scoreboard:
    """The cases and the answers so far, right and wrong."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        self.outputs: list[RequestOutput | None] = [None] * len(cases)

    def update(self, index: int, output: RequestOutput) -> None:
        self.outputs[index] = output

    def answer(self, index: int) -> str:
        output = self.outputs[index]
        return "" if output is None else output.outputs[0].text.strip()

    def is_finished(self, index: int) -> bool:
        output = self.outputs[index]
        return output is not None and output.finished

    def is_right(self, index: int) -> bool:
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

    def __rich__(self) -> Table:
        table = Table(box=None, padding=(0, 1))
        for title in ("facts", "tokens", "looks back"):
            table.add_column(title, justify="right")
        for title in ("question", "answer", ""):
            table.add_column(title)
        for index, case in enumerate(self.cases):
            table.add_row(
                str(case.num_facts),
                str(case.num_tokens),
                str(case.looks_back),
                case.question.text,
                self.answer(index),
                self._verdict(index),
            )
        return table

    def _verdict(self, index: int) -> str:
        if not self.is_finished(index):
            return ""
        if self.is_right(index):
            return "[green]right[/green]"
        return f"[red]wrong: {self.cases[index].question.answer}[/red]"
