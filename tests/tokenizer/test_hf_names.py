"""The names of Hugging Face's tokenizers, compared with `AutoTokenizer`."""

import json
import os

import pytest
import torch
from tokenizers_of_styles import make_gpt2, make_llama3, make_qwen, make_sentencepiece, make_texts

from minipaged.errors import CheckpointError, InvalidOption, InvalidRequest
from minipaged.tokenizer.load import read_tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if documents %}{{ documents }}{% endif %}"
    "{% if mood is defined %}{{ mood }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "Hello, wörld"}, {"role": "assistant", "content": "hi"}]
STYLES = {
    "gpt2": (make_gpt2, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "qwen": (make_qwen, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "llama3": (make_llama3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "sentencepiece": (
        make_sentencepiece,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
}


@pytest.fixture(scope="module", params=STYLES)
def pair(request, tmp_path_factory):
    """Our tokenizer of a folder, and that of transformers."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    make, roles = STYLES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | roles))
    (folder / "chat_template.jinja").write_text(CHATML)
    return read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def test_tokens_with_roles_are_named_as_in_transformers(pair):
    ours, judge = pair
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours, role) == getattr(judge, role)
        assert getattr(ours, f"{role}_id") == getattr(judge, f"{role}_id")


def test_the_vocabulary_is_that_of_transformers(pair):
    ours, judge = pair
    vocab = judge.get_vocab()
    assert len(ours) == len(judge)
    assert ours.get_vocab() == vocab
    ids = [*vocab.values(), 10**6]
    assert ours.convert_ids_to_tokens(ids) == judge.convert_ids_to_tokens(ids)
    assert ours.convert_ids_to_tokens(300) == judge.convert_ids_to_tokens(300)
    tokens = [*vocab, "no such token"]
    assert ours.convert_tokens_to_ids(tokens) == judge.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("a") == judge.convert_tokens_to_ids("a")


def test_special_tokens_are_those_that_decoding_can_skip(pair):
    ours, judge = pair
    assert set(judge.all_special_ids) <= set(ours.all_special_ids)
    assert ours.convert_tokens_to_ids(ours.all_special_tokens) == ours.all_special_ids
    ids = [*ours.all_special_ids, 300]
    expected = judge.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=True) == expected
    assert ours.convert_ids_to_tokens(ids, skip_special_tokens=True) == [
        ours.convert_ids_to_tokens(300)
    ]


def test_a_call_encodes_one_text_or_several(pair):
    ours, judge = pair
    texts = ["Hello, wörld", "", "a <|im_end|> </s> b", *make_texts(40, seed=9)]
    for text in texts:
        got, expected = ours(text), judge(text)
        assert got["input_ids"] == got.input_ids == expected["input_ids"]
        assert got.attention_mask == expected["attention_mask"]
        plain = ours(text, add_special_tokens=False).input_ids
        assert plain == judge(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(plain) == judge.decode(plain)
        assert ours.decode(plain, True) == judge.decode(plain, True)
    assert ours(texts).input_ids == judge(texts)["input_ids"]
    assert ours([]).input_ids == []
    assert ours.batch_decode(ours(texts).input_ids) == judge.batch_decode(judge(texts)["input_ids"])


def test_arrays_tensors_and_single_ids_are_decoded(pair):
    ours, judge = pair
    ids = ours("Hello")["input_ids"]
    assert ours.decode(torch.tensor(ids)) == judge.decode(ids)
    assert ours.decode(ids[0]) == judge.decode(ids[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"continue_final_message": True},
        {"tools": [{"name": "é"}], "mood": "kind"},
        {"documents": [{"text": "a"}]},
        {"chat_template": "{{ messages[0].content }}"},
    ],
    ids=str,
)
def test_a_chat_template_is_applied_with_the_defaults_of_transformers(pair, options):
    ours, judge = pair
    text = ours.apply_chat_template(CHAT, tokenize=False, **options)
    assert text == judge.apply_chat_template(CHAT, tokenize=False, **options)
    expected = judge.apply_chat_template(CHAT, **options)
    assert dict(ours.apply_chat_template(CHAT, **options)) == dict(expected)
    ids = ours.apply_chat_template(CHAT, return_dict=False, **options)
    assert ids == expected["input_ids"]


def test_several_chats_give_several_answers(pair):
    ours, judge = pair
    chats = [CHAT, CHAT[:1]]
    for options in ({"tokenize": False}, {"return_dict": False}):
        expected = judge.apply_chat_template(chats, **options)
        assert ours.apply_chat_template(chats, **options) == expected
    expected = judge.apply_chat_template(chats)
    assert dict(ours.apply_chat_template(chats)) == dict(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("padding", True), ("truncation", True), ("max_length", 5), ("return_tensors", "pt")],
)
def test_an_unsupported_argument_is_refused_by_name(pair, name, value):
    ours, _ = pair
    for call in (ours, ours.encode, lambda _, **o: ours.apply_chat_template(CHAT, **o)):
        with pytest.raises(
            InvalidOption, match=rf"^{name} is .*, but .*: leave it out.*\.$"
        ) as refusal:
            call("a", **{name: value})
        assert refusal.value.param == name
        call("a", **{name: False if value is True else None})  # asks for nothing


def test_other_invalid_calls_are_refused_with_a_sentence(pair):
    ours, _ = pair
    with pytest.raises(InvalidOption, match="text_pair is 'b', but a tokenizer here only"):
        ours("a", "b")
    with pytest.raises(InvalidOption, match="no option 'paddin': did you mean 'padding'"):
        ours("a", paddin=True)
    with pytest.raises(InvalidOption, match="clean_up_tokenization_spaces is True"):
        ours.decode([300], clean_up_tokenization_spaces=True)
    for wrong in (5, None, ["a", 5]):
        with pytest.raises(InvalidRequest, match="is not text: give a string or a list"):
            ours(wrong)
    with pytest.raises(AttributeError, match="input_ids, attention_mask, but no 'offsets'"):
        _ = ours("a").offsets


def test_token_names_fall_back_to_the_config_of_the_model(tmp_path):
    judge = make_gpt2(tmp_path)
    assert read_tokenizer(tmp_path).eos_token_id is None
    end = judge.token_to_id("<|endoftext|>")
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": None, "eos_token_id": end}))
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", end)
    assert tokenizer.bos_token_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    assert read_tokenizer(tmp_path).eos_token_id is None


def test_a_tokenizer_without_a_folder_has_no_template(pair):
    ours, _ = pair
    folder, ours.folder = ours.folder, None
    try:
        with pytest.raises(CheckpointError, match="so it has no chat template: give chat_template"):
            ours.apply_chat_template(CHAT)
        template = "{{ messages[0].content }}"
        text = ours.apply_chat_template(CHAT, tokenize=False, chat_template=template)
        assert text == CHAT[0]["content"]
    finally:
        ours.folder = folder
