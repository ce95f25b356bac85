"""The fewest tokens of a text: never more than it has; None where no bound is safe."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers_of_styles import STYLES, make_sentencepiece

from minipaged import LLM, SamplingParams
from minipaged.errors import PromptTooLong
from minipaged.tokenizer.bpe import NFC_SHRINKS, BytePairTokenizer
from minipaged.tokenizer.hf_library import LibraryTokenizer
from minipaged.tokenizer.load import read_tokenizer
from minipaged.tokenizer.patterns import GPT2

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
COMPOSED = unicodedata.normalize("NFD", "\u1f82")  # four characters that NFC makes one
SURROGATES = "\ud83d\ude00"  # a character in two halves, as no valid text has it


def unigram(*pieces: str, bytes_too: bool = True) -> Tokenizer:
    """Unknown characters become bytes, or <unk>; each piece is a token."""
    texts = ["<unk>", *(BYTE_TOKENS if bytes_too else ()), *pieces]
    vocab = [(text, -float(number)) for number, text in enumerate(texts, start=1)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=bytes_too))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def byte_level(pre_tokenizer) -> Tokenizer:
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    return tokenizer


def with_normalizer(normalizer, *pieces: str) -> Tokenizer:
    tokenizer = unigram(*pieces)
    tokenizer.normalizer = normalizer
    return tokenizer


def with_added(tokenizer: Tokenizer, *added: AddedToken) -> Tokenizer:
    tokenizer.add_tokens(list(added))
    return tokenizer


def save(tokenizer: Tokenizer, folder) -> LibraryTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return LibraryTokenizer(folder / "tokenizer.json")


def compose() -> BytePairTokenizer:
    """Its longest token is one character of three bytes, which was four before NFC."""
    letter = unicodedata.normalize("NFC", COMPOSED).encode()
    ranks = {bytes([byte]): byte for byte in range(256)} | {letter[:2]: 256, letter: 257}
    tokens = {rank: token for token, rank in ranks.items()}
    return BytePairTokenizer(GPT2, ranks, tokens, {}, normal_form=True)


PREPEND = normalizers.Sequence(
    [normalizers.Prepend("\u2581" * 12), normalizers.Replace(" ", "\u2581")]
)
BOUNDED = {
    "nothing": lambda: unigram("the ", "  "),
    "halves of characters": lambda: unigram("\U0001f600" * 9),
    "NFKC": lambda: with_normalizer(normalizers.NFKC(), "\u1f82" * 9, "fi"),
    "NFC": lambda: with_normalizer(normalizers.NFC(), "\u1f82" * 9),
    "NFKD": lambda: with_normalizer(normalizers.NFKD(), "a"),
    "lower case": lambda: with_normalizer(normalizers.Lowercase(), "stra\u00dfe"),
    "prepended": lambda: with_normalizer(PREPEND, "\u2581the"),
    "a long added token": lambda: with_added(unigram(), AddedToken("<|" + "very " * 9 + "|>")),
    "a token that its normal form makes longer": lambda: with_added(
        with_normalizer(normalizers.NFKD()), AddedToken("\ufdfa", normalized=True)
    ),
    "words of bytes": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])
    ),
}
UNBOUNDED = {
    "stripped": lambda: with_normalizer(normalizers.Strip()),
    "without accents": lambda: with_normalizer(
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "shortened": lambda: with_normalizer(normalizers.Replace("a" * 16, "a")),
    "a pattern": lambda: with_normalizer(normalizers.Replace(Regex(" +"), " ")),
    "white space lost": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    ),
    "a sign removed": lambda: byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split("a", "removed"), pre_tokenizers.ByteLevel(False)]
        )
    ),
    "unknown words": lambda: unigram("the", bytes_too=False),
    "white space taken in": lambda: with_added(unigram(), AddedToken("<m>", lstrip=True)),
}

PARTS = (
    ["a", " ", "\n", "12", "the ", "fi", "\u2581", "stra\u00dfe", "\u0130", "<|endoftext|>", "<m>"],
    ["\ufdfa", unicodedata.normalize("NFKD", "\ufdfa"), COMPOSED, "e\u0301", "\u1100\u1161\u11a8"],
    ["\U0001f600", "\U0001d400", SURROGATES, "\ud800", "<|" + "very " * 9 + "|>"],
)
ALL_PARTS = [part for line in PARTS for part in line]
parts = st.sampled_from(ALL_PARTS)
texts = st.one_of(
    st.lists(parts, max_size=12).map("".join),
    st.tuples(parts, st.integers(1, 60)).map(lambda part: part[0] * part[1]),
    st.text(max_size=40),
)


def check(tokenizer, text: str) -> None:
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {"compose": compose(), "storyteller": LLM("storyteller", num_blocks=8).get_tokenizer()}
    for style, make in {**STYLES, "sentencepiece": make_sentencepiece}.items():
        folder = tmp_path_factory.mktemp(style)
        make(folder)
        made[style] = read_tokenizer(folder)
    for name, make in BOUNDED.items():
        made[name] = save(make(), tmp_path_factory.mktemp("library"))
    return made


@pytest.mark.parametrize("name", ["compose", "storyteller", *STYLES, "sentencepiece", *BOUNDED])
def test_the_lower_bound_holds_for_every_text(name, tokenizers):
    tokenizer = tokenizers[name]
    assert tokenizer.chars_per_token is not None
    longest = max(tokenizer.vocabulary.values(), key=len).decode(errors="replace")

    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(texts)
    def holds_for(text: str) -> None:
        check(tokenizer, text)
        check(tokenizer, text + longest * 9)

    holds_for()
    for part in ALL_PARTS:
        for times in (1, 9, 60):
            check(tokenizer, part * times)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_tokenizers_that_drop_characters_have_no_bound(name, tmp_path):
    tokenizer = save(UNBOUNDED[name](), tmp_path)
    assert tokenizer.chars_per_token is None
    assert tokenizer.fewest_tokens("a" * 10**6) == 0


def test_each_of_these_tokenizers_would_violate_the_bound(tmp_path):
    """The texts for which a bound by the longest token would be wrong."""
    for name, text in {
        "stripped": " " * 99,
        "without accents": "\u0301" * 99,
        "shortened": "a" * 16 * 99,
        "a pattern": " " * 99,
        "white space lost": " " * 99,
        "a sign removed": "a" * 99,
        "unknown words": "z" * 99,
        "white space taken in": " " * 99 + "<m>",
    }.items():
        tokenizer = save(UNBOUNDED[name](), tmp_path)
        longest = max(map(len, tokenizer.vocabulary.values()))
        num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
        assert num_tokens < len(text) / max(longest, 6), name


def test_no_normal_form_makes_one_character_of_more_than_four():
    whole = [chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    assert max(len(unicodedata.normalize("NFD", c)) for c in whole) == NFC_SHRINKS


def test_a_pattern_that_skips_characters_loses_none(tmp_path):
    import base64

    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (tmp_path / "r.tiktoken").write_text("".join(lines))
    described = {"ranks": "r.tiktoken", "pattern": "[a-z]+", "special_tokens": {}}
    (tmp_path / "tiktoken.json").write_text(json.dumps(described))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("a, b") == list(b"a, b")


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(monkeypatch):
    llm = LLM("storyteller", num_blocks=8, max_model_len=32)
    tokenizer = llm.get_tokenizer()

    def encode(text: str, allow_special: bool) -> list[int]:
        raise AssertionError("it was encoded")

    monkeypatch.setattr(tokenizer, "_encode", encode)
    long = "a" * (32 * tokenizer.chars_per_token)
    sentence = rf"has {len(long)} characters, so at least 32 tokens, but .* may have only 32 \(max_"
    for call in (
        lambda: llm.generate(long, SamplingParams(), use_tqdm=False),
        lambda: llm.generate({"prompt": long}, SamplingParams(), use_tqdm=False),
        lambda: llm.chat({"role": "user", "content": long}, use_tqdm=False, chat_template=TEMPLATE),
        lambda: llm.cache_prefix(long),
        lambda: llm.engine.pin_prefix(long),
    ):
        with pytest.raises(PromptTooLong, match=sentence):
            call()


TEMPLATE = "{{ messages[0].content }}"


def test_a_text_that_may_fit_is_encoded_and_then_checked():
    llm = LLM("storyteller", num_blocks=8, max_model_len=32)
    almost = "a" * (31 * llm.get_tokenizer().chars_per_token)
    with pytest.raises(PromptTooLong, match=r"the prompt has \d+ tokens"):
        llm.generate(almost, SamplingParams(), use_tqdm=False)
