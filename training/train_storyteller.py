"""Train the embedded model `storyteller` from nothing: tokenizer, curriculum, export.

    python training/train_storyteller.py --out minipaged/assets/storyteller

Every batch is told afresh by the grammar in `minipaged.stories`, so the model sees no story twice
and cannot learn one by heart. What it must learn is to look back, and it does so in three stages:

1. copy     random tokens, twice over: predict the second copy. This grows the attention heads that
            find an earlier occurrence of a token and read on from there.
2. ladder   stories with many questions behind each, and drills (random key-value pairs, then keys
            to look up). One fact at first; more whenever nine answers in ten are right, even of
            the kind that is answered worst. That kind is also asked for most.
3. settle   stories of every length, while the learning rate falls to nothing.

The run can be stopped and started again: it resumes from the checkpoint under `--work`.
"""

import argparse
import base64
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from heapq import nlargest
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import NamedTuple

import regex
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minipaged.stories import (
    END,
    KINDS,
    MAX_FACTS,
    PLACES,
    Question,
    Story,
    retell,
    tell,
    transcript,
)

# ---------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE, small enough that every word of the grammar becomes one token
# ---------------------------------------------------------------------------------------------

# Words take their leading space along; "\nQ:" and "\nA:" are pieces of their own. No piece crosses
# a word, so no token does.
PATTERN = r"\n[QA]:| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def train_bpe(text: str, max_tokens: int) -> dict[bytes, int]:
    """Merge the most frequent pair again and again, until each piece of `text` is one token."""
    pieces = Counter(regex.findall(PATTERN, text))
    words = [([bytes([b]) for b in piece.encode()], count) for piece, count in pieces.items()]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < max_tokens:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for parts, count in words:
            for pair in pairwise(parts):
                pairs[pair] += count
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        for parts, _ in words:
            for i in range(len(parts) - 1, 0, -1):
                if i < len(parts) and parts[i - 1] == left and parts[i] == right:
                    parts[i - 1 : i + 1] = [left + right]
    return ranks


def save_tokenizer(out: Path) -> None:
    """Train on two thousand stories and write the ranks in tiktoken's own format."""
    told = (tell(8, seed) for seed in range(2_000))
    ranks = train_bpe("".join(transcript(s, s.questions).replace(END, "") for s in told), 1_023)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (out / "storyteller.tiktoken").write_text("".join(lines))
    description = {
        "ranks": "storyteller.tiktoken",
        "pattern": PATTERN,
        "special_tokens": {END: len(ranks)},
    }
    (out / "tiktoken.json").write_text(json.dumps(description, indent=2) + "\n")


def load_tokenizer(folder: Path) -> tiktoken.Encoding:
    described = json.loads((folder / "tiktoken.json").read_text())
    lines = (folder / described["ranks"]).read_text().splitlines()
    return tiktoken.Encoding(
        "storyteller",
        pat_str=described["pattern"],
        mergeable_ranks={base64.b64decode(t): int(rank) for t, rank in map(str.split, lines)},
        special_tokens=described["special_tokens"],
    )


# ---------------------------------------------------------------------------------------------
# Model: LLaMA, dense and without a cache; module names are those of Hugging Face's checkpoints
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 1024
    rope_theta: float = 500_000.0  # half the pairs hardly turn in 1,024 tokens: they see far back
    rms_norm_eps: float = 1e-5


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as in Hugging Face's LLaMA: dimension i turns with dimension i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        q_size = shape.num_attention_heads * shape.head_dim
        kv_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # [batch, heads, time, head_dim]
        k = self.k_proj(x).view(heads).transpose(1, 2)  # [batch, kv_heads, time, head_dim]
        v = self.v_proj(x).view(heads).transpose(1, 2)
        group = q.shape[1] // k.shape[1]
        k = rotate(k, cos, sin).repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Storyteller(nn.Module):
    """Token ids in, logits out; the embedding is also the output matrix (tied)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        half = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angles = torch.outer(
            torch.arange(shape.max_position_embeddings).float(), shape.rope_theta**-half
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)

    def forward(self, token_ids: Tensor) -> Tensor:
        time_steps = token_ids.shape[1]
        cos, sin = self.cos[:time_steps], self.sin[:time_steps]
        x = self.embed_tokens(token_ids)  # [batch, time, hidden]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)  # [batch, time, vocab]


# ---------------------------------------------------------------------------------------------
# Windows: one row of token ids, and for each token how much its prediction counts
# ---------------------------------------------------------------------------------------------


class Window(NamedTuple):
    ids: list[int]
    weights: list[float]
    kinds: list[str]  # of its questions, in order; none but in stories


ALIKE_SHARE = 0.25  # of the stories
FACT_WEIGHT = 0.05  # against 1 for an answer: nothing can predict a fact that is yet to be told
HELD_OUT_SEEDS = 1_000_000  # stories with smaller seeds are never trained on


class Windows:
    """Endless fresh windows: copies, drills and stories."""

    def __init__(self, encoding: tiktoken.Encoding, seed: int) -> None:
        self.encoding = encoding
        self.rng = Random(seed)
        self.answer = encoding.encode_single_token("\nA:")
        self.end = encoding.eot_token
        self.vocab = range(256, self.end)  # words and pieces of words, no single bytes

    def copy(self, length: int) -> Window:
        """Stretches of 8 to 32 random tokens, each given twice; the second copy counts."""
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            stretch = self.rng.choices(self.vocab, k=self.rng.randint(8, 32))
            ids += stretch + stretch
            # The first token of the second copy cannot be known.
            weights += [0.0] * (len(stretch) + 1) + [1.0] * (len(stretch) - 1)
        return Window(ids[:length], weights[:length], [])

    def drill(self, length: int, num_pairs: int) -> Window:
        """Random pairs of a key and a value, then keys again: each must recall its value."""
        keys = self.rng.sample(self.vocab, num_pairs)
        pairs = [(key, self.rng.choice(self.vocab)) for key in keys]
        ids = [token for pair in pairs for token in pair]
        weights = [0.0] * len(ids)
        while len(ids) < length:
            ids += self.rng.choice(pairs)
            weights += [0.0, 1.0]
        return Window(ids[:length], weights[:length], [])

    def alike(self, story: Story) -> Story:
        """The same story with one colour and one preposition throughout.

        In other stories "near the ..." is often enough to guess the place, and the model stops at
        guessing. Here only the name and the thing tell the facts apart.
        """
        first = story.facts[0]
        places = [p for p in PLACES if p.split()[0] == first.place.split()[0]]
        return retell(
            replace(fact, colour=first.colour, place=self.rng.choice(places))
            for fact in story.facts
        )

    def eased(self, question: Question) -> Question:
        """Where something is, without the preposition: "the meadow." for "In the meadow."

        After "In the" it is too tempting to read on from any "in the" of the story. Once the model
        can find the place without that hint, it keeps to it.
        """
        if question.kind != "place":
            return question
        return replace(question, answer=question.answer.partition(" ")[2])

    def story(self, length: int, num_facts: int, shares: dict[str, float], ease: bool) -> Window:
        """One story, then questions and answers until the window is full; answers count.

        A kind of question with twice the share comes up about twice as often.
        """
        story = tell(num_facts, HELD_OUT_SEEDS + self.rng.getrandbits(48))
        if self.rng.random() < ALIKE_SHARE:
            story = self.alike(story)
        lots = [(self.rng.random() ** (1 / shares[q.kind]), q) for q in story.questions]
        questions = [q for _, q in nlargest(length // 10, lots, key=itemgetter(0))]
        if ease:
            questions = [self.eased(q) for q in questions]
        ids = self.encoding.encode(transcript(story, questions), allowed_special="all")
        weights: list[float] = []
        answering = False
        for token in ids:
            weights.append(1.0 if answering else FACT_WEIGHT)
            answering = token == self.answer or (answering and token != self.end)
        padding = length - len(ids)  # only the shortest stories run out of questions
        ids = (ids + [self.end] * padding)[:length]
        weights = (weights + [0.0] * padding)[:length]
        return Window(ids, weights, [q.kind for q in questions])


# ---------------------------------------------------------------------------------------------
# Curriculum: what the next batch is made of, and when it gets harder
# ---------------------------------------------------------------------------------------------

RUNGS = (1, 2, 4, 8, 16, 32, MAX_FACTS)  # facts in a story
COPIES_WELL = 0.2  # loss at which copying has been learnt; some tokens repeat, so it stays above 0
EASED_UP_TO = 8  # facts; see Windows.eased
CLIMBS_AT = 0.7  # share of wholly right answers, in the worst kind, that earns the next rung
DRILL_SHARE = 0.15  # of the batches on the ladder


@dataclass
class Progress:
    """Where a run stands: a line of the log, and saved with the weights."""

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


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


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
        """Muon for the matrices (with AdamW alone copying came far later), AdamW for the rest."""
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


# ---------------------------------------------------------------------------------------------
# Export: the folder that any reader of Hugging Face's LLaMA checkpoints understands
# ---------------------------------------------------------------------------------------------

# A chat is a story (the system's turn) and then questions and answers, as in training.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "system" %}{{ message.content }}
{%- elif message.role == "user" %}{{ "\\nQ: " + message.content }}
{%- else %}{{ "\\nA: " + message.content + "<|endoftext|>" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "\\nA:" }}{% endif -%}
"""


def export(model: Storyteller, encoding: tiktoken.Encoding, out: Path) -> None:
    tensors = {f"model.{name}": w.half().contiguous() for name, w in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": encoding.eot_token,
        "torch_dtype": "float16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def load_model(folder: Path) -> Storyteller:
    """The exported model, in float32 arithmetic with the weights as rounded for shipping."""
    config = json.loads((folder / "config.json").read_text())
    model = Storyteller(Shape(**{f.name: config[f.name] for f in fields(Shape)}))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
    return model.float()


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
