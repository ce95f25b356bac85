"""Tokens and strings that end an output: which, when, and what is shown of them."""

import json

import pytest
from checkpoints import make_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.tokenizer.detokenizer import Detokenizer

END = 764  # storyteller's end of sequence, a special token
MARK = "<|endoftext|>"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("storyteller", num_blocks=64)


def generate(llm: LLM, prompt="Theo", **asked):
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **asked})
    [output] = llm.generate(prompt, params, use_tqdm=False)
    return output.outputs[0]


@pytest.mark.parametrize("min_tokens", [0, 3])
def test_a_stop_string_that_is_a_special_token_stops_at_that_token(llm, min_tokens):
    asked = {"ignore_eos": True, "logit_bias": {END: 100}, "min_tokens": min_tokens}
    one = generate(llm, stop=["x", MARK], **asked)
    assert (one.finish_reason, one.stop_reason) == ("stop", MARK)
    assert one.token_ids.index(END) == len(one.token_ids) - 1 == min_tokens
    assert MARK not in one.text
    other = generate(llm, stop_token_ids=[END], **asked)
    assert (other.token_ids, other.text, other.stop_reason) == (one.token_ids, one.text, END)


def test_a_special_stop_string_releases_text_that_others_held_back(llm):
    first = generate(llm, max_tokens=1, ignore_eos=True)
    held = generate(
        llm,
        stop=[MARK, first.text + "ZZZ"],
        ignore_eos=True,
        min_tokens=1,
        logit_bias={END: 100},
    )
    assert held.token_ids == [*first.token_ids, END]
    assert (held.text, held.stop_reason) == (first.text, MARK)


def test_a_special_stop_string_spelt_in_letters_is_a_stop_string_too(llm):
    tokenizer = llm.get_tokenizer()
    detokenizer = Detokenizer(tokenizer, (MARK,))
    for token_id in tokenizer.encode(f"a{MARK}b", allow_special=False):
        detokenizer.add(token_id)
    assert (detokenizer.text, detokenizer.stopped) == ("a", MARK)


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_min_tokens_keeps_the_end_away_even_if_it_is_ignored(llm, ignore_eos):
    one = generate(llm, max_tokens=6, min_tokens=6, ignore_eos=ignore_eos, logit_bias={END: 100})
    assert END not in one.token_ids
    assert (len(one.token_ids), one.finish_reason) == (6, "length")
    after = generate(llm, min_tokens=2, ignore_eos=ignore_eos, logit_bias={END: 100}, max_tokens=4)
    assert after.token_ids[2:] == ([END, END] if ignore_eos else [END])


def test_min_tokens_keeps_stop_tokens_away(llm):
    word = generate(llm, max_tokens=1).token_ids[0]
    one = generate(llm, min_tokens=3, stop_token_ids=[word], logit_bias={word: 100})
    assert word not in one.token_ids[:3]
    assert one.token_ids[3:] == [word]


# ---- what is shown of the token that ended it ----------------------------------------------------


def test_the_text_of_a_stop_token_is_not_shown_and_its_id_is(llm):
    full = generate(llm, ignore_eos=True)
    word = full.token_ids[3]
    cut = full.token_ids.index(word)
    one = generate(llm, ignore_eos=True, stop_token_ids=[word])
    assert one.token_ids == full.token_ids[: cut + 1]
    assert one.text == llm.get_tokenizer().decode(full.token_ids[:cut])
    assert one.stop_reason == word


@pytest.fixture(scope="module")
def plain_end(tmp_path_factory):
    """A model whose end of sequence is an ordinary token, "</s>", to its tokenizer."""
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("plain"), vocab_size=300)
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2}
    vocab |= {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=3)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("</s>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2
    return LLM(folder, num_blocks=64)


def test_an_end_token_that_is_not_special_is_not_shown(plain_end):
    one = generate(plain_end, [5, 6], logit_bias={2: 100})
    assert (one.token_ids, one.text, one.finish_reason, one.stop_reason) == ([2], "", "stop", None)
    [(_, streamed)] = plain_end.stream(
        [[5, 6]], SamplingParams(temperature=0.0, logit_bias={2: 100})
    )
    assert streamed.outputs[0].text == ""


def test_an_ignored_end_token_is_ordinary_text(plain_end):
    one = generate(plain_end, [5, 6], logit_bias={2: 100}, ignore_eos=True, max_tokens=2)
    assert one.text == "</s></s>"
    stopped = generate(plain_end, [5, 6], logit_bias={2: 100}, ignore_eos=True, stop=["</s></s>"])
    assert (stopped.text, stopped.stop_reason) == ("", "</s></s>")


def test_a_beam_does_not_show_its_end_token(plain_end):
    params = BeamSearchParams(beam_width=8, max_tokens=40, length_penalty=-10)
    [output] = plain_end.beam_search([[5, 6]], params, use_tqdm=False)
    ended = [beam for beam in output.outputs if beam.finish_reason == "stop"]
    assert ended
    assert all(beam.token_ids[-1] == 2 and "</s>" not in beam.text for beam in ended)
