"""The text of a chat message never becomes a control token, whatever it spells."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Library
from tokenizers_of_styles import make_llama3, make_qwen, make_sentencepiece

from minipaged import LLM, SamplingParams
from minipaged.errors import InvalidRequest
from minipaged.tokenizer.chat_prompt import chat_prompt
from minipaged.tokenizer.hf_library import LibraryTokenizer
from minipaged.tokenizer.load import read_tokenizer

MARKS = ["<|im_start|>", "<|im_end|>"]
START, END = MARKS
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "{{ m.content }}",
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ m.content }}{% endif %}",
)


def make_metaspace(folder):
    """As Llama's without its old habits: only a text, and no piece of it, begins with a space."""
    make_sentencepiece(folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["normalizer"] = None
    tokenizer = Library.from_str(json.dumps(described))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken(START), AddedToken(END, rstrip=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


def make_marked_sentencepiece(folder):
    tokenizer = make_sentencepiece(folder)
    tokenizer.add_special_tokens(MARKS)
    tokenizer.save(str(folder / "tokenizer.json"))


MAKERS = {
    "qwen": make_qwen,
    "llama3": make_llama3,
    "sentencepiece": make_marked_sentencepiece,
    "metaspace": make_metaspace,
}


@pytest.fixture(scope="module", params=MAKERS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return read_tokenizer(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    make_qwen(folder)
    return read_tokenizer(folder)


def user(*contents):
    return [{"role": "user", "content": content} for content in contents]


def encode(tokenizer, messages, template=CHATML, **options):
    """The ids of a chat; its text must be the one that the template gives."""
    options = {"chat_template": template, "add_generation_prompt": True} | options
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids = tokenizer.apply_chat_template(messages, return_dict=False, **options)
    kwargs = {k: v for k, v in options.items() if k not in ("add_generation_prompt", "tools")}
    if set(kwargs) == {"chat_template"}:
        prompt = chat_prompt(tokenizer.folder, tokenizer, messages, 10**6, **options)
        assert prompt == {"prompt": text, "prompt_token_ids": ids}
    return ids


def marks_in(tokenizer, ids):
    """The control tokens among some ids, in order."""
    return [tokenizer.decode(i) for i in ids if i in tokenizer.special_ids]


FRAGMENTS = [*MARKS, "<|im_", "end|>", "<|", "|>", "<", ">", "a", " ", "\n", "user", "é", "</s>"]
contents = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
chats = st.lists(st.tuples(st.sampled_from(["user", "system"]), contents), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(chats)
def test_only_the_template_writes_control_tokens(qwen, chat):
    """The reference: control tokens by hand, and between them nothing but letters."""
    pieces = []
    for role, content in chat:
        pieces += [START, f"{role}\n{content}", END, "\n"]
    pieces += [START, "assistant\n"]
    expected = [
        token_id
        for piece in pieces
        for token_id in (
            [qwen.special_tokens[piece]]
            if piece in MARKS
            else qwen.encode(piece, allow_special=False)
        )
    ]
    got = encode(qwen, [{"role": role, "content": content} for role, content in chat])
    assert got == expected


@settings(max_examples=60, deadline=None)
@given(chats)
def test_every_tokenizer_keeps_message_text_from_becoming_control_tokens(tokenizer, chat):
    messages = [{"role": role, "content": content} for role, content in chat]
    ids = encode(tokenizer, messages)
    assert marks_in(tokenizer, ids) == [*MARKS * len(chat), START]


def test_an_ordinary_chat_has_the_tokens_of_its_text(tokenizer):
    for content in ("hello <b>|world|</b>", "  1 < 2 \n", "", "<|im", "É 漢 <think>hm</think>"):
        for template in (
            CHATML,
            THINKING,
            CHATML.replace("{{ m.content }}", "{{ m.content|trim }}"),
        ):
            messages = user(content)
            options = {"chat_template": template, "tokenize": False}
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
            expected = tokenizer.encode(text, add_special_tokens=False)
            assert encode(tokenizer, messages, template) == expected


def test_a_special_token_reached_by_merges_stays_text(tokenizer):
    """A vocabulary may hold the pair "<|im_" and "end|>", which makes the special token's id."""
    for mark in MARKS:
        ids = tokenizer.encode(f"a{mark}b", add_special_tokens=False, allow_special=False)
        assert marks_in(tokenizer, ids) == []
        assert tokenizer.decode(ids) == f"a{mark}b"


def test_text_around_a_spelt_out_control_token_keeps_its_tokens(tokenizer):
    """Only one message differs, so all tokens before and after it must be the same."""
    plain, spelt = (encode(tokenizer, user("one", said, "two")) for said in ("x", f"x{END}y"))
    before = plain[: [i for i, t in enumerate(plain) if t in tokenizer.special_ids][2] + 1]
    behind = plain[[i for i, t in enumerate(plain) if t in tokenizer.special_ids][3] :]
    assert spelt[: len(before)] == before
    assert spelt[-len(behind) :] == behind
    middle = spelt[len(before) : -len(behind)]
    assert END in tokenizer.decode(middle)
    assert not marks_in(tokenizer, middle)


@pytest.mark.parametrize(
    ("messages", "template", "marks"),
    [
        (user("<|im_", "end|>"), "{% for m in messages %}{{ m.content }}{% endfor %}", []),
        (user("<|im_/nopeend|>"), CHATML.replace("m.content", "m.content|replace('/nope','')"), 3),
        (user("abc<|im_end|>"), CHATML.replace("m.content", "m.content[3:]"), 3),
        (user("  <|im_end|>\n"), CHATML.replace("m.content", "m.content|trim"), 3),
        (user("a<|im_end|>"), CHATML.replace("m.content", "m.content|upper"), 3),
        (user("<|im_end|>"), CHATML.replace("m.content", "m.content ~ m.content"), 3),
        (user("a\n<|im_end|>"), CHATML.replace("m.content", "m.content.split('\n') | last"), 3),
        (user("a</think> b<|im_end|>"), THINKING, 3),
        (user("<|im_end|>"), CHATML.replace("{{ m.content }}", "{{ m | tojson }}"), 3),
        (user("<|im_end|>"), CHATML.replace("{{ m.content }}", "{{ m }}"), 3),
        (user([{"type": "text", "text": END}, {"type": "text", "text": "a"}]), CHATML, 3),
    ],
    ids=[
        *("joined", "removed", "cut off", "trimmed", "in capitals", "twice", "split", "thoughts"),
        *("JSON", "printed", "in parts"),
    ],
)
def test_templates_may_transform_messages(tokenizer, messages, template, marks):
    ids = encode(tokenizer, messages, template)
    expected = [] if marks == [] else [START, END, START]
    assert marks_in(tokenizer, ids) == expected


def test_names_calls_tools_and_documents_never_become_control_tokens(tokenizer):
    call = {"function": {"name": END, "arguments": {END: [END], "n": 1}}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": END, "name": f"a{START}", "content": ""},
    ]
    template = (
        "<|im_start|>{{ messages[0].tool_calls | tojson }}{{ messages[1].name }}"
        "{{ messages[1].role }}{{ tools | tojson }}{{ documents }}<|im_end|>"
    )
    tools = [{"name": "f", "description": f"ends {END}"}]
    ids = encode(tokenizer, messages, template, tools=tools, documents=[{"text": START}])
    assert marks_in(tokenizer, ids) == MARKS


def test_a_continued_message_never_becomes_control_tokens(tokenizer):
    options = {"add_generation_prompt": False, "continue_final_message": True}
    ids = encode(tokenizer, user(f"a{END}b"), **options)
    assert marks_in(tokenizer, ids) == [START]


def test_a_template_may_build_control_tokens_from_roles(qwen):
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    messages = [
        {"role": "im_start", "content": f"one {START}"},
        {"role": "im_end", "content": "two"},
    ]
    ids = encode(qwen, messages, template)
    assert marks_in(qwen, ids) == MARKS
    assert qwen.decode(ids) == f"{START}one {START}{END}two"


def test_control_tokens_of_template_and_message_are_never_confused(qwen):
    """The template composes the mark that the message spells out, and changes the message."""
    template = (
        "{{ '<|' + messages[0].role + '|>' + messages[0].content + messages[0].content|upper }}"
    )
    assert marks_in(qwen, encode(qwen, [{"role": "im_end", "content": "a"}], template)) == [END]
    with pytest.raises(InvalidRequest, match="cannot be told from the template's own"):
        encode(qwen, [{"role": "im_end", "content": f"a{END}"}], template)


def test_a_role_may_have_the_name_of_a_special_token(tmp_path):
    tokenizer = make_qwen(tmp_path)
    tokenizer.add_special_tokens(["user"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path)
    template = CHATML + "{% if messages[0].role == 'user' %}!{% endif %}"
    assert marks_in(read, encode(read, user("a"), template)) == [START, "user", END, START]


def test_token_names_and_caller_options_belong_to_the_template(qwen):
    template = "{{ mark }}{{ messages[0].content }}{{ eos }}"
    ids = encode(qwen, user(f"a{END}"), template, mark=START, eos=END)
    assert marks_in(qwen, ids) == MARKS


def test_a_template_may_refuse_messages_with_control_tokens(qwen):
    template = CHATML.replace("m.content", "m.content.split('<|im_end|>')[0]")
    assert marks_in(qwen, encode(qwen, user("a"), template)) == [START, END, START]
    with pytest.raises(InvalidRequest, match=r"spells out '<\|im_end\|>'.*leave it out of the"):
        encode(qwen, user(f"a{END}b"), template)


def test_a_control_token_that_is_a_word_of_the_template_does_no_harm(tmp_path):
    tokenizer = make_qwen(tmp_path)
    tokenizer.add_special_tokens(["content"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path)
    assert marks_in(read, encode(read, user("a"))) == [START, END, START]
    with pytest.raises(InvalidRequest, match="spells out 'content'"):
        encode(read, user("a content"))


def test_placeholder_characters_may_occur_in_messages(qwen):
    said = "".join(map(chr, range(0x20000, 0x20100)))
    ids = encode(qwen, user(f"{said}{END}"))
    assert qwen.decode(ids) == f"{START}user\n{said}{END}{END}\n{START}assistant\n"
    assert marks_in(qwen, ids) == [START, END, START]
    with pytest.raises(InvalidRequest, match="contains all characters from "):
        encode(qwen, user("".join(map(chr, range(0x20000, 0x2A6E0)))))


def test_special_tokens_in_messages_are_kept_where_the_caller_wants_it(qwen):
    options = {"chat_template": CHATML, "return_dict": False, "sanitize_control_tokens": False}
    ids = qwen.apply_chat_template(user(END), **options)
    assert marks_in(qwen, ids) == [START, END, END]


def test_the_library_still_encodes_as_before_after_a_spelt_out_mark(tmp_path):
    make_metaspace(tmp_path)
    tokenizer, other = read_tokenizer(tmp_path), read_tokenizer(tmp_path)
    assert isinstance(tokenizer, LibraryTokenizer)
    encode(tokenizer, user(END))
    for text in ("a b", f"a {END} b", ""):
        assert tokenizer.encode(text) == other.encode(text)
    assert tokenizer.get_vocab() == other.get_vocab()


def test_llm_chat_answers_a_message_that_spells_out_its_end_token():
    llm = LLM("storyteller", num_blocks=64)
    greedy = SamplingParams(temperature=0.0, max_tokens=1)
    [output] = llm.chat(user("a<|endoftext|>b"), greedy, use_tqdm=False)
    assert output.prompt == "\nQ: a<|endoftext|>b\nA:"
    assert llm.get_tokenizer().eos_token_id not in output.prompt_token_ids
