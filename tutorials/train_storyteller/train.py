"""Train the embedded model `storyteller` from nothing: tokenizer, curriculum, export.

    python tutorials/train_storyteller/train.py --out minipaged/assets/storyteller

Every batch is told afresh by the grammar in `minipaged.evaluation.stories`, so the model sees no
story twice and cannot learn one by heart. What it must learn is to look back, and it does so in
three stages:

1. copy     random tokens, twice over: predict the second copy. This grows the attention heads that
            find an earlier occurrence of a token and read on from there.
2. ladder   stories, each followed by many questions, and drills (random key-value pairs, then keys
            to look up). One fact at first; more whenever nine answers in ten are right, even of
            the kind that is answered worst. That kind is also asked for most.
3. settle   stories of every length, while the learning rate falls to nothing.

The run can be stopped and started again: it resumes from the checkpoint under `--work`.
Needs torch 2.9 or newer, for its Muon optimiser.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from bpe import load_tokenizer, save_tokenizer
from dense_llama import Shape, Storyteller, export
from torch import Tensor, nn
from windows import Window, Windows

from minipaged.evaluation.stories import KINDS, MAX_FACTS

# ---- curriculum: what the next batch is made of, and when it gets harder -------------------------

RUNGS = (1, 2, 4, 8, 16, 32, MAX_FACTS)  # facts in a story
COPIES_WELL = 0.2  # loss at which copying has been learnt; some tokens repeat, so it stays above 0
EASED_UP_TO = 8  # facts; see Windows.eased
CLIMBS_AT = 0.7  # share of wholly right answers, in the worst kind, that earns the next rung
DRILL_SHARE = 0.15  # of the batches on the ladder


@dataclass
class Progress:
    """The state of a run: a line of the log, and saved with the weights."""

    stage: str = "copy"
    rung: int = 0
    step: int = 0
    stage_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 7.0  # running mean over the tokens that count in full
    drill_recall: float = 0.0
    recall: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def __str__(self) -> str:
        facts = RUNGS[min(self.rung, len(RUNGS) - 1)]
        return (
            f"step {self.step} {self.stage}, up to {facts} facts: "
            f"loss {self.loss:.3f}, drills {self.drill_recall:.2f}, "
            + ", ".join(f"{kind} {recall:.2f}" for kind, recall in self.recall.items())
            + f", {self.tokens / 1e6:.2f}M tokens in {self.seconds:.0f} s"
        )

    def enter(self, stage: str) -> None:
        self.stage, self.stage_step = stage, 0

    def advance(self, settle_steps: int) -> None:
        """Go on to the next rung or stage if this one is done."""
        if self.stage == "copy" and self.loss < COPIES_WELL:
            self.enter("ladder")
        elif self.stage == "ladder" and min(self.recall.values()) > CLIMBS_AT:
            self.recall = dict.fromkeys(KINDS, 0.0)  # the next rung has to earn its own
            self.rung += 1
            if self.rung == len(RUNGS):
                self.enter("settle")
        elif self.stage == "settle" and self.stage_step == settle_steps:
            self.enter("done")


def window_length(num_facts: int) -> int:
    """Room for the story (11 tokens a fact) and as much for questions, up to the context."""
    return next((n for n in (128, 256, 512) if num_facts * 24 <= n), 1023)


def next_batch(windows: Windows, progress: Progress, num_tokens: int) -> tuple[str, list[Window]]:
    """The kind of the batch and its windows, one token longer than the model's input."""
    rng = windows.rng
    if progress.stage == "copy":
        return "copy", [windows.copy(129) for _ in range(num_tokens // 128)]
    # Settling goes over every length again, from stories of four facts up.
    rung = rng.randrange(2, len(RUNGS)) if progress.stage == "settle" else progress.rung
    most = RUNGS[rung]
    length = window_length(most)
    count = num_tokens // length
    if progress.stage == "ladder" and rng.random() < DRILL_SHARE:
        pairs = min(8 * (rung + 1), 64)
        return "drill", [windows.drill(length + 1, rng.randint(2, pairs)) for _ in range(count)]
    ease = progress.stage == "ladder" and most <= EASED_UP_TO
    shares = {kind: 1.1 - recall for kind, recall in progress.recall.items()}  # ask for the worst
    facts = [most if rng.random() < 0.5 else rng.randint(1, most) for _ in range(count)]
    return "story", [windows.story(length + 1, num_facts, shares, ease) for num_facts in facts]


# ---- training ------------------------------------------------------------------------------------


def drift(mean: float, value: float, rate: float) -> float:
    """A running mean that forgets: it goes a part of the way to each new value."""
    return mean + rate * (value - mean)


class Trainer:
    """The model, its optimisers and its progress; everything that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, encoding: tiktoken.Encoding) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.windows = Windows(encoding, args.seed)
        self.model = Storyteller(Shape(encoding.n_vocab))
        self.optimisers = self.make_optimisers()
        self.progress = Progress()
        # Compiling pays a tenth or two, and needs a C++ compiler.
        self.predict = torch.compile(self.losses, dynamic=False) if args.compile else self.losses
        self.checkpoint: Path = args.work / "checkpoint.pt"
        if self.checkpoint.exists():
            self.resume()

    def make_optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices (AdamW alone was slow to learn copying), AdamW for the rest."""
        weights = dict(self.model.named_parameters())
        matrices = [w for name, w in weights.items() if name.endswith("proj.weight")]
        others = [w for name, w in weights.items() if not name.endswith("proj.weight")]
        return [
            torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]

    def learning_rate(self) -> float:
        """Warm up, hold, and fall to nothing while settling."""
        p = self.progress
        if p.stage == "settle":
            return self.args.lr * (1 - p.stage_step / self.args.settle_steps)
        return self.args.lr * min(1.0, p.step / 100)

    def losses(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss to follow, the loss over what counts in full, and the likeliest tokens."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(x)  # [batch, time, vocab]
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none")
        weights = weights.flatten()
        counts = weights == 1
        counted = (loss.detach() * counts).sum() / counts.sum()
        return (loss * weights).sum() / weights.sum(), counted, logits.detach().argmax(-1)

    def step(self) -> None:
        kind, rows = next_batch(self.windows, self.progress, self.args.batch_tokens)
        ids = torch.tensor([row.ids for row in rows])
        weights = torch.tensor([row.weights for row in rows])[:, 1:]
        x, y = ids[:, :-1], ids[:, 1:]
        loss, counted, predicted = self.predict(x, y, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate()
            optimiser.step()
            optimiser.zero_grad()
        missed = (weights == 1) & (predicted != y)  # [batch, time]
        p = self.progress
        p.step += 1
        p.stage_step += 1
        p.tokens += x.numel()
        if kind == "drill":
            hits = 1 - float(missed.sum() / (weights == 1).sum())
            p.drill_recall = drift(p.drill_recall, hits, 0.1)
            return
        p.loss = drift(p.loss, float(counted), 0.05)
        for row, row_x, row_missed in zip(rows, x, missed, strict=True):
            self.record_answers(row.kinds, row_x == self.windows.answer, row_missed)

    def record_answers(self, kinds: list[str], begins: Tensor, missed: Tensor) -> None:
        """An answer is right if each of its tokens was the likeliest one."""
        recall = self.progress.recall
        number = begins.cumsum(0)  # 1 in the first answer, and so on; 0 in the story
        wrong = torch.zeros(int(number[-1]) + 1).index_add_(0, number, missed.float()) > 0
        for kind, is_wrong in zip(kinds, wrong[1:].tolist(), strict=False):  # the window cuts some
            recall[kind] = drift(recall[kind], 1 - is_wrong, 0.005)

    def run(self) -> None:
        """Train to the end; a line of the log every 50 steps, a checkpoint every 100."""
        p = self.progress
        with (self.args.work / "training_log.jsonl").open("a") as log:
            while p.stage != "done":
                start = time.perf_counter()
                self.step()
                p.seconds += time.perf_counter() - start
                if p.step % 50 == 0:
                    print(json.dumps(asdict(p)), file=log, flush=True)
                    print(p, flush=True)
                p.advance(self.args.settle_steps)
                if p.step % 100 == 0 or p.stage == "done":
                    self.save()

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "progress": asdict(self.progress),
            "rng": self.windows.rng.getstate(),
        }
        unfinished = self.checkpoint.with_suffix(".tmp")  # a stop while writing loses nothing
        torch.save(state, unfinished)
        unfinished.rename(self.checkpoint)

    def resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=False)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        self.windows.rng.setstate(state["rng"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train storyteller from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--work", type=Path, default=Path("storyteller_run"), help="checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--settle-steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint as it is")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(args.out)
    encoding = load_tokenizer(args.out)
    trainer = Trainer(args, encoding)
    if not args.export_only:
        trainer.run()
    export(trainer.model, encoding, args.out)


if __name__ == "__main__":
    main()
