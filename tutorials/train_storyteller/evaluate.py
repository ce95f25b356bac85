"""How often `storyteller` answers exactly, by number of facts and kind of question.

    python tutorials/train_storyteller/evaluate.py minipaged/assets/storyteller

The weights are the exported ones, rounded as they are shipped, and the stories are ones that the
training never told. `--card` also puts the table into the model card.
"""

import argparse
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from bpe import load_tokenizer
from dense_llama import Storyteller, load_model
from windows import HELD_OUT_SEEDS

from minipaged.evaluation.stories import END, KINDS, MAX_FACTS, Question, Story, prompt, tell

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, MAX_FACTS)


@dataclass
class Score:
    """What happened to the questions asked of stories of one size."""

    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    loss: float = 0.0  # summed over the answers' tokens
    num_tokens: int = 0

    def share(self, kind: str) -> str:
        return f"{self.right[kind] / self.asked[kind]:.1%}"


def exam(num_facts: int, num_questions: int) -> list[tuple[Story, Question]]:
    """One question a story, the kinds in turn, each about a place in the story taken in turn."""
    seed = num_facts * 10_000
    assert num_questions <= 10_000, "the next size's stories begin 10,000 seeds on"
    assert seed + num_questions <= HELD_OUT_SEEDS, "training may have told the rest"
    asked: list[tuple[Story, Question]] = []
    for index in range(num_questions):
        story = tell(num_facts, seed + index)
        fact_index = index // len(KINDS) % num_facts
        asked.append((story, story.questions[fact_index * len(KINDS) + index % len(KINDS)]))
    return asked


@torch.inference_mode()
def score(
    model: Storyteller, encoding: tiktoken.Encoding, num_facts: int, num_questions: int
) -> Score:
    """Ask, and count an answer as right if greedy decoding gives all of it and then the end.

    One pass over prompt and answer tells: greedy decoding feeds itself its own choices, so it
    writes the right answer exactly if the likeliest token is the right one at each of its places.
    """
    result = Score()
    for story, question in exam(num_facts, num_questions):
        before = encoding.encode(prompt(story, question))
        answer = encoding.encode(f" {question.answer}{END}", allowed_special="all")
        logits = model(torch.tensor([before + answer]))[0, len(before) - 1 : -1]  # [answer, vocab]
        target = torch.tensor(answer)
        right = bool((logits.argmax(-1) == target).all())
        for kind in (question.kind, "all"):
            result.asked[kind] += 1
            result.right[kind] += right
        result.loss += float(F.cross_entropy(logits, target, reduction="sum"))
        result.num_tokens += len(answer)
    return result


def table(scores: dict[int, Score], lengths: dict[int, int]) -> str:
    columns = ["facts", "tokens", *KINDS, "**all**", "loss", "questions"]
    rows = [columns, ["---:"] * len(columns)]
    for size, s in scores.items():
        shares = [s.share(kind) for kind in KINDS] + [f"**{s.share('all')}**"]
        loss = f"{s.loss / s.num_tokens:.4f}"
        rows.append([str(size), str(lengths[size]), *shares, loss, str(s.asked["all"])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how often storyteller is right.")
    parser.add_argument("model", type=Path, help="folder with the exported model")
    parser.add_argument("--questions", type=int, default=500, help="per size of story")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="facts in a story")
    parser.add_argument("--card", action="store_true", help="write the table into MODEL_CARD.md")
    args = parser.parse_args()

    torch.set_num_threads(1)  # one short pass at a time: a second thread would mostly wait
    encoding = load_tokenizer(args.model)
    model = load_model(args.model)
    scores: dict[int, Score] = {}
    lengths: dict[int, int] = {}
    for size in args.sizes:
        lengths[size] = len(encoding.encode(tell(size, seed=0).text))
        scores[size] = score(model, encoding, size, args.questions)
        print(f"{size} facts: {scores[size].share('all')} right", flush=True)
    result = table(scores, lengths)
    print(result)
    if args.card:
        card = args.model / "MODEL_CARD.md"
        between = r"(?<=<!-- recall -->\n).*?(?=<!-- /recall -->)"
        text, found = re.subn(between, f"{result}\n", card.read_text(), flags=re.DOTALL)
        if not found:
            raise SystemExit(f"{card} has no lines '<!-- recall -->' and '<!-- /recall -->'")
        card.write_text(text)


if __name__ == "__main__":
    main()
