"""A small trained tokenizer in the style of every family, written as checkpoints have them.

Not a test: a helper for tests. They are compared with Hugging Face's `tokenizers`.
"""

# Letters that look like others are what these texts are made for.
# ruff: noqa: RUF001

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel as NoTokens
from tokenizers.processors import TemplateProcessing

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = (
    "the The THE don't DON'T we'll I'M you've naïve café Straße über Ελλάδα мир Привет 世界 日本語 "
    "한국어 😀 👨‍👩‍👧 e\u0301 ñ n\u0303 \u0041\u030a ﬁ ² ½ Ⅷ ٣ ३ １２ 2024 3.14 1,000 1234567 x=1 "
    "!= -> :: /* */ http://a.b/c?d=e #tag @user \u00a0 \u200b \u3000 \x85 \u2028 \x1f 'ſ '’s \x00 "
    "def return \ufeff"
).split(" ")
SPACES = ["", " ", " ", "  ", "    ", "\n", "\n\n", " \n ", "\t", "\r\n", "\v"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Random texts: words of many scripts, digits, white space of all kinds, special tokens."""
    rng = random.Random(seed)
    marks = [*SPECIALS, "<|im", "<think>", "</think>", "|>", "<s>"]

    def words() -> str:
        chosen = rng.choices(WORDS + marks, k=rng.randint(1, 12))
        return "".join(word + rng.choice(SPACES) for word in chosen)

    def few_characters() -> str:
        return "".join(rng.choices(" \n\ta1'sé.\r", k=rng.randint(1, 30)))

    def any_characters() -> str:
        ranges = [
            (32, 127),
            (32, 127),
            (0, 0x100),
            (0, 0x3000),
            (0x3000, 0xD800),
            (0x1F300, 0x1F650),
        ]
        return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 40)))

    return [rng.choice([words, words, few_characters, any_characters])() for _ in range(count)]


def _train(pre_tokenizer, normalizer, specials: list[str], vocab_size: int = 1_500) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    code = Path(__file__).read_text(encoding="utf-8")
    tokenizer.train_from_iterator([*make_texts(3_000, seed=1), code], trainer)
    return tokenizer


def _split(pattern: str):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def make_gpt2(folder: Path) -> Tokenizer:
    tokenizer = _train(pre_tokenizers.ByteLevel(add_prefix_space=False), None, SPECIALS[:1])
    tokenizer.post_processor = NoTokens(trim_offsets=False)
    return _save(tokenizer, folder)


def make_smollm(folder: Path) -> Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _save(_train(pre_tokenizers.Sequence([digits, words]), None, SPECIALS), folder)


def make_qwen(folder: Path) -> Tokenizer:
    tokenizer = _train(_split(QWEN), normalizers.NFC(), SPECIALS)
    tokenizer.post_processor = NoTokens(trim_offsets=False)
    tokenizer.add_tokens(["<think>", "</think>"])
    described = json.loads(tokenizer.to_str())
    for token in described["added_tokens"]:  # as published: text, but not looked for in normal form
        token["normalized"] = False
    return _save(Tokenizer.from_str(json.dumps(described)), folder)


def make_llama3(folder: Path) -> Tokenizer:
    """With every pair that spells a token in the list, and words to which no pair leads."""
    described = json.loads(_train(_split(LLAMA3), None, []).to_str())
    vocab: dict[str, int] = described["model"]["vocab"]
    for word in ("ĠStr", "xyzzyq", "http", "ĠqqqĠ", "Ġ..,,", "ÏĢzz"):
        vocab.setdefault(word, len(vocab))
    described["model"]["ignore_merges"] = True
    described["model"]["merges"] = [
        [token[:i], token[i:]]
        for token in sorted(vocab, key=lambda token: vocab[token])
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    begin = "<|begin_of_text|>"
    tokenizer.add_special_tokens([begin, "<|eot_id|>", *SPECIALS])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return _save(tokenizer, folder)


def make_opt(folder: Path) -> Tokenizer:
    """vocab.json and merges.txt; ids in an order of their own, as in a dictionary of words."""
    trained = _train(pre_tokenizers.ByteLevel(add_prefix_space=False), None, [])
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"])
    random.Random(0).shuffle(tokens)
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *tokens])}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    end = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True}
    config = {
        "add_bos_token": True,
        "add_prefix_space": False,
        "bos_token": end,
        "eos_token": end,
        "pad_token": {**end, "content": "<pad>"},
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<pad>"])
    tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return tokenizer


def make_sentencepiece(folder: Path) -> Tokenizer:
    """Llama 2's and TinyLlama's: no words, spaces as low lines, bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1_200,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=200,
        show_progress=False,
        max_token_length=12,
    )
    tokenizer.train_from_iterator(make_texts(1_000, seed=1), trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(tokenizer, folder)


def _save(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


STYLES = {
    "gpt2": make_gpt2,
    "opt": make_opt,
    "smollm": make_smollm,
    "llama3": make_llama3,
    "qwen": make_qwen,
}
