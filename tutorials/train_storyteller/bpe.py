"""The tokenizer: byte-level BPE, just large enough that every word of the grammar is one token."""

import base64
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from minipaged.evaluation.stories import END, tell, transcript

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
