"""Tokenizer and Detokenizer, with an encoding small enough to write out here."""

import base64
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.errors import CheckpointError, MissingTokenizer
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.detokenizer import Detokenizer
from minipaged.tokenizer.load import read_tokenizer
from minipaged.tokenizer.stop_strings import StopStrings

# All single bytes, then merges; two of them cut the emoji U+1F600 and the letter é in the middle.
MERGES = [b"th", b"the", b" t", b"\xf0\x9f", b"e\xc3", b"##"]
TOKENS = [bytes([byte]) for byte in range(256)] + MERGES
END = 300  # the ids from 262 to 299 have no token, as in a padded vocabulary
CONFIG = {"ranks": "tiny.tiktoken", "pattern": r"(?s) ?[^ ]+| ", "special_tokens": {"<|end|>": END}}
RANKS = "".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(TOKENS))


def write(folder, config=CONFIG, ranks=RANKS):
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "tiktoken.json").write_text(text)
    if ranks is not None:
        (folder / "tiny.tiktoken").write_text(ranks)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return read_tokenizer(write(tmp_path_factory.mktemp("tokenizer")))


# -- Tokenizer --------------------------------------------------------------------------------


def test_merges_go_by_rank_with_bytes_as_fallback(tokenizer):
    assert tokenizer.encode("the") == [257]
    assert tokenizer.encode("ath") == [ord("a"), 256]
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("text", ["the  theé", "😀<|end|>##", "\n\t", "e\u0301漢字", "a\x00b"])
def test_decoding_an_encoded_text_gives_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    plain = tokenizer.encode(text, allow_special=False)
    assert END not in plain
    assert tokenizer.decode(plain) == text


def test_a_spelt_out_special_token_becomes_that_token_by_default(tokenizer):
    assert tokenizer.encode("a<|end|>b") == [ord("a"), END, ord("b")]
    assert tokenizer.encode("<|end|>", allow_special=False) == list(b"<|end|>")


def test_special_tokens_can_be_left_out_of_the_text(tokenizer):
    assert tokenizer.decode([257, END, 97]) == "the<|end|>a"
    assert tokenizer.decode([257, END, 97], skip_special_tokens=True) == "thea"


def test_ids_that_only_the_model_knows_decode_to_nothing(tokenizer):
    assert tokenizer.vocab_size == 301
    for unknown in (262, 299, 301, 10**9, 2**40, -1):
        assert tokenizer.token_bytes(unknown) == b""
        assert tokenizer.decode([97, unknown, 98]) == "ab"


def test_tokens_are_bytes_and_specials_are_named(tokenizer):
    assert tokenizer.token_bytes(259) == b"\xf0\x9f"
    assert tokenizer.token_bytes(END) == b"<|end|>"
    assert tokenizer.special_tokens == {"<|end|>": END}
    assert tokenizer.special_ids == {END}


def test_invalid_utf_8_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode([97, 0xFF, 259]) == "a\ufffd\ufffd"


def test_a_folder_without_a_tokenizer_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(
        MissingTokenizer, match=r"contains no tokenizer \(tokenizer\.json.*as token ids\.$"
    ):
        read_tokenizer(tmp_path)


BROKEN = {
    "no JSON": ({"config": "{"}, "is not readable JSON"),
    "a list": ({"config": []}, 'needs "ranks", a string, but has None'),
    "no pattern": ({"config": {**CONFIG, "pattern": 5}}, 'needs "pattern", a string, but has 5'),
    "no specials": ({"config": {**CONFIG, "special_tokens": []}}, "an object from text to id"),
    "bad pattern": ({"config": {**CONFIG, "pattern": "("}}, "is not a regular expression"),
    "taken id": ({"config": {**CONFIG, "special_tokens": {"x": 97}}}, "that no other token has"),
    "shared id": ({"config": {**CONFIG, "special_tokens": {"x": 300, "y": 300}}}, "'y' the id 300"),
    "text id": ({"config": {**CONFIG, "special_tokens": {"x": "300"}}}, "'x' the id '300'"),
    "empty special": ({"config": {**CONFIG, "special_tokens": {"": 300}}}, "without text"),
    "no ranks": ({"ranks": None}, r"cannot be read \(No such file or directory\)"),
    "no base64": ({"ranks": RANKS + "?? 262\n"}, r"line 263: '\?\? 262' is not a token in base64"),
    "no rank": (
        {"ranks": RANKS + "YWI=\n"},
        "line 263: 'YWI=' is not a token in base64 and its id",
    ),
    "twice": ({"ranks": RANKS + "YQ== 262\n"}, "lists a token or an id twice"),
    "same rank": ({"ranks": RANKS + "YWI= 5\n"}, "lists a token or an id twice"),
    "too high": ({"ranks": RANKS + f"YWI= {2**32}\n"}, "has an id outside"),
    "cut short": ({"ranks": RANKS[: RANKS.index("ZA== 100")]}, "lacks 156 of the 256 single bytes"),
    "empty": ({"ranks": ""}, "lacks 256 of the 256 single bytes"),
}


@pytest.mark.parametrize(("files", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_tokenizer_is_reported_with_its_file_and_the_fault(tmp_path, files, sentence):
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        read_tokenizer(write(tmp_path, **files))
    assert str(tmp_path) in str(refusal.value)
    assert str(refusal.value).endswith(".")


def test_blank_lines_and_windows_line_ends_in_the_ranks_are_harmless(tmp_path):
    ranks = RANKS.replace("\n", "\r\n") + "\r\n"
    assert read_tokenizer(write(tmp_path, ranks=ranks)).encode("the") == [257]


# -- Detokenizer ------------------------------------------------------------------------------


def stream(tokenizer, token_ids, stop=(), **options) -> tuple[list[str], Detokenizer]:
    """Each piece as it was shown, and the detokenizer at the end."""
    one = Detokenizer(tokenizer, stop, **options)
    pieces = [one.add(token_id) for token_id in token_ids]
    return [*pieces, one.finish()], one


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, found the slow way."""
    for end in range(len(text) + 1):
        for string in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end - len(string)], string
    return text, None


def check_the_stream(tokenizer, token_ids, stop) -> None:
    pieces, one = stream(tokenizer, token_ids, stop)
    expected, stopped = cut(tokenizer.decode(token_ids, skip_special_tokens=True), stop)
    assert "".join(pieces) == one.text == expected
    assert one.stopped == stopped


STOPS = [
    (),
    ("#",),
    ("##",),
    ("##a", "#b"),
    ("aba", "b#"),
    ("é", "😀a"),
    ("\ufffd",),
    ("abab", "ba"),
    ("the", "h"),
    ("a#a#b", "#a"),
    ("abab#", "bab"),
    ("aab", "ab", "aaab"),
]
TRICKY = [97, 98, 35, 257, 259, 260, 261, 0x98, 0x80, 0xA9, END, 280]
alphabet = st.text(alphabet="ab#é😀", max_size=12).map(lambda text: list(text.encode()))
token_ids = st.one_of(
    alphabet,
    st.lists(st.sampled_from(TRICKY), max_size=12),
    st.lists(st.integers(0, 305), max_size=12),
)


def check_many_streams(tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(1500):
        ids = rng.choices(TRICKY, k=12)
        check_the_stream(tokenizer, ids, rng.choice(STOPS))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(token_ids=token_ids, stop=st.sampled_from(STOPS))
def test_the_pieces_are_the_whole_text_cut_before_the_first_stop_string(tokenizer, token_ids, stop):
    check_the_stream(tokenizer, token_ids, stop)


any_stops = st.lists(st.text(alphabet="ab#", min_size=1, max_size=5), max_size=6).map(tuple)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(text=st.text(alphabet="ab#", max_size=30), stop=any_stops)
def test_stop_strings_are_found_as_by_the_slow_search(tokenizer, text, stop):
    check_the_stream(tokenizer, list(text.encode()), stop)


class Counting(list):
    """Counts how often it is read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("count", [1, 10, 1_000])
def test_a_character_costs_the_same_however_many_stop_strings_there_are(count):
    rng = random.Random(0)
    stops = StopStrings("".join(rng.choices("ab", k=12)) + "!" for _ in range(count))
    stops._fallback = Counting(stops._fallback)
    text = "".join(rng.choices("ab", k=5_000))
    stops.read(0, text)
    assert stops._fallback.reads < len(text)  # each character goes forward once, so back once


def test_a_stop_string_that_repeats_itself_costs_no_more():
    stops = StopStrings(["a" * 300 + "b"])
    stops._fallback = Counting(stops._fallback)
    state = stops.read(0, ("a" * 299 + "c") * 20)[0]
    assert state == 0
    assert stops._fallback.reads < 300 * 20


def test_many_sequences_share_one_automaton(tokenizer):
    stops = StopStrings(("##", "#a"))
    one, other = Detokenizer(tokenizer, stops), Detokenizer(tokenizer, stops)
    assert [one.add(35), other.add(98), one.add(97), other.add(97)] == ["", "b", "", "a"]
    assert (one.stopped, other.stopped) == ("#a", None)


def test_many_streams_of_split_characters_decode_correctly(tokenizer):
    check_many_streams(tokenizer)


def test_a_character_is_shown_once_its_last_byte_is_there_and_not_before(tokenizer):
    pieces, _ = stream(tokenizer, [97, 259, 0x98, 0x80, 98])
    assert pieces == ["a", "", "", "😀", "b", ""]
    assert stream(tokenizer, [260, 0xA9])[0] == ["e", "é", ""]


def test_a_character_cut_short_is_shown_as_broken_at_the_end(tokenizer):
    assert stream(tokenizer, [97, 259, 0x98])[0] == ["a", "", "", "\ufffd"]
    assert stream(tokenizer, [259, 97])[0] == ["", "\ufffda", ""]


def test_a_stop_string_over_several_tokens_is_never_shown(tokenizer):
    pieces, one = stream(tokenizer, [97, 35, 35, 98, 99], ("##b",))
    assert pieces == ["a", "", "", "", "", ""]
    assert (one.text, one.stopped) == ("a", "##b")


def test_a_stop_string_inside_one_token_cuts_that_token(tokenizer):
    pieces, one = stream(tokenizer, [257, 97], ("h",))
    assert pieces == ["t", "", ""]
    assert one.stopped == "h"


def test_text_that_only_resembled_a_stop_string_is_then_shown(tokenizer):
    pieces, one = stream(tokenizer, list(b"a##a#"), ("##b",))
    assert pieces == ["a", "", "", "##a", "", "#"]
    assert one.stopped is None


def test_the_first_complete_stop_string_counts_or_the_longest_of_several(tokenizer):
    for ids in ([97, 116, 104, 101], [97, 257]):  # however the characters come
        assert stream(tokenizer, ids, ("the", "h"))[1].stopped == "h"
        assert stream(tokenizer, ids, ("e", "the"))[1].stopped == "the"
        assert stream(tokenizer, ids, ("e", "the"))[1].text == "a"


def test_special_and_unknown_tokens_add_no_text_and_split_no_character(tokenizer):
    pieces, _ = stream(tokenizer, [END, 0xC3, END, 280, 0xA9])
    assert pieces == ["", "", "", "", "é", ""]


def test_the_text_of_the_first_min_tokens_is_free_of_stop_strings(tokenizer):
    pieces, one = stream(tokenizer, list(b"#a#b"), ("#",), min_tokens=2)
    assert pieces == ["#", "a", "", "", ""]
    assert (one.text, one.stopped) == ("#a", "#")


# -- Deliberate faults ------------------------------------------------------------------------


class Forgetful(Detokenizer):
    """Never shows what it held back."""

    def finish(self):
        return ""


class Hasty(Detokenizer):
    """Decodes each token by itself."""

    def add(self, token_id):
        self._decoder.reset()
        piece = super().add(token_id)
        return piece + self._take(self._decoder.decode(b"", final=True))


@pytest.mark.parametrize("mutant", [Forgetful, Hasty])
def test_a_faulty_detokenizer_is_detected(monkeypatch, tokenizer, mutant):
    monkeypatch.setitem(globals(), "Detokenizer", mutant)
    with pytest.raises(AssertionError):
        check_many_streams(tokenizer)


class Careless(StopStrings):
    """Holds nothing back for a stop string."""

    def num_undecided(self, state):
        return 0


class WithoutFallback(StopStrings):
    """Begins anew where a character leads nowhere."""

    def __init__(self, strings):
        super().__init__(strings)
        self._fallback = [0] * len(self._fallback)


class ShortestOfAll(StopStrings):
    """Of several stop strings that are complete at once, takes the shortest."""

    def complete(self, state):
        longest = super().complete(state)
        ends = [s for s in self.strings if longest is not None and longest.endswith(s)]
        return min(ends, key=len, default=None)

    def __init__(self, strings):
        self.strings = strings
        super().__init__(strings)


@pytest.mark.parametrize("mutant", [Careless, WithoutFallback, ShortestOfAll])
def test_a_faulty_automaton_is_detected(monkeypatch, tokenizer, mutant):
    monkeypatch.setattr("minipaged.tokenizer.detokenizer.StopStrings", mutant)
    with pytest.raises(AssertionError):
        check_many_streams(tokenizer)


# -- Tokens that begin every text ------------------------------------------------------------------


class Marked(Tokenizer):
    """Puts token 0 before every text; "<s>" is that token."""

    def __init__(self):
        letters = {1 + i: bytes([byte]) for i, byte in enumerate(range(256))}
        super().__init__({0: b"<s>", **letters}, {"<s>": 0}, [0])

    def _encode(self, text, allow_special):
        if allow_special and text.startswith("<s>"):
            return [0, *self._encode(text[3:], False)]
        return [1 + byte for byte in text.encode()]


def test_a_second_bos_token_is_warned_of_once():
    tokenizer = Marked()
    with pytest.warns(UserWarning, match=r"begins with '<s>', which .* leave it out of the text"):
        assert tokenizer.encode("<s>a") == [0, 0, 98]
    assert tokenizer.encode("<s>a") == [0, 0, 98]  # a second warning would be an error here


def test_one_bos_token_causes_no_warning():
    tokenizer = Marked()
    assert tokenizer.encode("a<s>") == [0, 98, *(1 + byte for byte in b"<s>")]
    assert tokenizer.encode("<s>a", add_special_tokens=False) == [0, 98]
