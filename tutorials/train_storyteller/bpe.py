"""The tokenizer: byte-level BPE, just large enough that every word of the grammar is one token."""

import base64
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from minipaged.evaluation.stories import END, tell, transcript
from minipaged.tokenizer.byte_letters import spell_bytes
from minipaged.tokenizer.merges import last_pair, rank_tokens
from minipaged.tokenizer.tiktoken_file import read_ranked_tokenizer, read_ranks

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
    save_for_hugging_face(out)


def save_for_hugging_face(folder: Path) -> None:
    """Write the tokenizer of `tiktoken.json` as tokenizer.json too, which other programs read.

    With it, `transformers.AutoTokenizer` and load generators count the tokens that the library
    counts. The library itself keeps to `tiktoken.json`.
    """
    tokenizer = read_ranked_tokenizer(folder)
    ranks = read_ranks(folder / "storyteller.tiktoken")
    # Hugging Face's encoding merges pairs, and each token has one that is merged last.
    merges = [last_pair(token, ranks) for token in ranks if len(token) > 1]
    assert ranks == rank_tokens(ranks, merges, whole_words=False), "tiktoken merges otherwise"
    words = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    as_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    ends = {"id": tokenizer.special_tokens[END], "content": END, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [ends | flags],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [words | {"invert": False}, as_letters | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": as_letters | {"use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": tokenizer.get_vocab(),
            "merges": [" ".join(map(spell_bytes, pair)) for pair in merges],
        },
    }
    config = {
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": 1_024,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (("tokenizer.json", described), ("tokenizer_config.json", config)):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> tiktoken.Encoding:
    described = json.loads((folder / "tiktoken.json").read_text())
    lines = (folder / described["ranks"]).read_text().splitlines()
    return tiktoken.Encoding(
        "storyteller",
        pat_str=described["pattern"],
        mergeable_ranks={base64.b64decode(t): int(rank) for t, rank in map(str.split, lines)},
        special_tokens=described["special_tokens"],
    )
