"""The embedded model's tokenizer in two forms: tiktoken's, which the library reads, and another.

A load generator counts tokens in Hugging Face's, the engine in tiktoken's.
"""

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_styles import make_texts

import minipaged
from minipaged.evaluation.stories import END, tell, transcript
from minipaged.tokenizer.bpe import BytePairTokenizer
from minipaged.tokenizer.load import read_tokenizer

FOLDER = Path(minipaged.__file__).parent / "assets" / "storyteller"
PIECES = [*"aeQAT: \n\t\r?.'\v\x1c\x85\xa0\u2028\u3000é漢😀\u0301", "\nQ:", "\nA:", "  ", " Theo"]
PIECES += [END, END[:5], END[5:], "the", " key", "Once upon a time", "12"]


@pytest.fixture(scope="module")
def pair():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    return read_tokenizer(FOLDER), AutoTokenizer.from_pretrained(FOLDER)


def check(pair, text: str) -> None:
    ours, judge = pair
    ids = ours.encode(text)
    assert judge.encode(text) == ids, repr(text)
    for skip in (False, True):
        assert ours.decode(ids, skip) == judge.decode(ids, skip_special_tokens=skip), repr(text)


def test_stories_have_the_same_tokens_in_both_forms(pair):
    for seed in range(100):
        story = tell(8, seed)
        check(pair, transcript(story, story.questions))


def test_texts_of_all_kinds_have_the_same_tokens_in_both_forms(pair):
    for text in make_texts(2_000, seed=7):
        check(pair, text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=60))
def test_pieces_in_any_order_have_the_same_tokens_in_both_forms(pair, text):
    check(pair, text)


def test_invalid_utf_8_is_decoded_alike(pair):
    ours, judge = pair
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(len(ours)) for _ in range(rng.randint(0, 30))]
        assert ours.decode(ids) == judge.decode(ids)


def test_names_and_sizes_are_the_same_in_both_forms(pair):
    ours, judge = pair
    assert len(ours) == len(judge) == 765
    assert ours.get_vocab() == judge.get_vocab()
    assert (
        (ours.eos_token, ours.eos_token_id) == (judge.eos_token, judge.eos_token_id) == (END, 764)
    )
    assert ours.bos_token_id is judge.bos_token_id is None
    assert ours.all_special_ids == judge.all_special_ids


def test_a_chat_has_the_same_tokens_in_both_forms(pair):
    ours, judge = pair
    story = tell(4, seed=3)
    chat = [{"role": "system", "content": story.text}]
    chat += [{"role": "user", "content": story.questions[0].text}]
    chat += [{"role": "assistant", "content": "White."}]
    for options in ({}, {"add_generation_prompt": True}):
        expected = judge.apply_chat_template(chat, **options)
        assert dict(ours.apply_chat_template(chat, **options)) == dict(expected)
        text = judge.apply_chat_template(chat, tokenize=False, **options)
        assert ours.apply_chat_template(chat, tokenize=False, **options) == text


def test_the_own_tokenizer_format_has_precedence():
    """The other one would need the extra `tokenizers`, which is not always installed."""
    assert (FOLDER / "tokenizer.json").is_file()
    assert type(read_tokenizer(FOLDER)) is BytePairTokenizer
