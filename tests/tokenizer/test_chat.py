"""Chat templates: the checkpoint's own, rendered in a sandbox."""

import json

import pytest
from checkpoints import make_checkpoint
from tokenizers_of_styles import make_llama3

from minipaged import LLM, SamplingParams
from minipaged.errors import CheckpointError, InvalidOption, InvalidRequest, MissingTokenizer
from minipaged.tokenizer.chat_prompt import chat_prompt
from minipaged.tokenizer.chat_template import TEMPLATE_FILE, render_chat
from minipaged.tokenizer.load import read_tokenizer

MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "bye"},
]


def write(tmp_path, template: str):
    (tmp_path / TEMPLATE_FILE).write_text(template)
    return tmp_path


def test_messages_become_one_prompt_that_asks_for_the_next_turn(tmp_path):
    folder = write(
        tmp_path,
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    assert render_chat(folder, MESSAGES) == "<user>hello<assistant>hi<user>bye<assistant>"


def test_a_folder_without_a_template_is_refused_with_what_to_do_instead(tmp_path):
    with pytest.raises(CheckpointError, match=r"contains no chat template.*use generate\(\)"):
        render_chat(tmp_path, MESSAGES)


def test_a_broken_template_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is broken: unexpected"):
        render_chat(write(tmp_path, "{% for"), MESSAGES)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_can_only_build_text(tmp_path, attack):
    with pytest.raises(InvalidRequest, match="refuses the messages"):
        render_chat(write(tmp_path, attack), MESSAGES)


def test_a_template_may_refuse_messages_with_a_reason(tmp_path):
    folder = write(tmp_path, "{{ raise_exception('no system turns here') }}")
    with pytest.raises(InvalidRequest, match="no system turns here"):
        render_chat(folder, MESSAGES)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "x"}]}],
        [{"role": 3, "content": "a"}],
        [None],
    ],
)
def test_a_value_that_is_not_a_chat_is_refused(tmp_path, messages):
    with pytest.raises(InvalidRequest, match="is not a chat message"):
        render_chat(write(tmp_path, ""), messages)


def test_chat_accepts_one_conversation_or_several():
    llm = LLM("storyteller")
    story = "Once upon a time Theo the frog put the white key in the meadow."
    told = [
        {"role": "system", "content": story},
        {"role": "user", "content": "What did Theo do with the key?"},
    ]
    greedy = SamplingParams(temperature=0.0, max_tokens=20)
    [one] = llm.chat(told, greedy, use_tqdm=False)
    assert one.prompt == f"{story}\nQ: What did Theo do with the key?\nA:"
    assert one.outputs[0].text == " Theo the frog put the white key in the meadow."
    many = llm.chat([told, told], greedy, use_tqdm=False)
    assert [o.outputs[0].text for o in many] == [one.outputs[0].text] * 2


@pytest.mark.parametrize(
    ("messages", "num_chats"),
    [
        ({"role": "user", "content": "a"}, 1),
        ([{"role": "user", "content": "a"}], 1),
        (({"role": "user", "content": "a"},), 1),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], 1),
        ([[{"role": "user", "content": "a"}]], 1),
        ([[{"role": "user", "content": "a"}], ({"role": "user", "content": "b"},)], 2),
    ],
)
def test_a_message_a_conversation_and_several_are_distinguished(messages, num_chats):
    llm = LLM("storyteller", num_blocks=8)
    greedy = SamplingParams(temperature=0.0, max_tokens=1)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    outputs = llm.chat(messages, greedy, use_tqdm=False, chat_template=template)
    assert len(outputs) == num_chats
    said = [messages] if isinstance(messages, dict) else messages
    expected = "ab" if num_chats == 1 and len(said) == 2 else "a"
    assert outputs[0].prompt == expected


@pytest.mark.parametrize(
    "messages", [[], [[]], "hello", [{"role": "user", "content": "a"}, [MESSAGES]], [MESSAGES, 5]]
)
def test_an_invalid_list_of_messages_is_refused(messages):
    llm = LLM("storyteller", num_blocks=8)
    with pytest.raises(InvalidRequest, match="is not a chat message"):
        llm.chat(messages, use_tqdm=False)


# ---- as transformers renders them ----------------------------------------------------------------

# In the styles of published ones, with what is hard in each.
CHATML = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%Y") %}
    {%- else %}{%- set date_string = "2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start|>system\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}
{{- system_message }}{{- eos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {{- '<|start|>' + message['role'] + '\\n\\n'+ message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n\\n' }}{%- endif %}
"""
QWEN3 = """{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.seen and message.role == "user" and message.content is string %}
        {%- set ns.seen = true %}{%- set ns.last = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- macro turn(role, text) %}<|im_start|>{{ role }}\\n{{ text }}<|im_end|>\\n{% endmacro %}
{%- for message in messages %}
    {%- set text = message.content %}
    {%- if message.role == "assistant" and '</think>' in text %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- generation %}{{- turn(message.role, text) }}{%- endgeneration %}
    {%- else %}{{- turn(message.role, text) }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3}
LONG = [
    {"role": "system", "content": ' Be <brief> & "kind". '},
    *MESSAGES[:1],
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nÉ bien! "},
    {"role": "user", "content": "1 < 2?\n"},
]
OPEN = [*LONG[:2], {"role": "assistant", "content": "É bien! "}]
TOOL = {"type": "function", "function": {"name": "é<b>", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A folder with a tokenizer and names of special tokens, and transformers' view of it."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat")
    make_llama3(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"tools": [TOOL]},
        {"enable_thinking": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("messages", [MESSAGES, LONG, OPEN], ids=["short", "long", "open"])
@pytest.mark.parametrize("style", TEMPLATES)
def test_a_template_gives_the_prompt_that_transformers_gives(style, messages, options, judge):
    folder, tokenizer = judge
    expected = tokenizer.apply_chat_template(
        messages,
        chat_template=TEMPLATES[style],
        tokenize=False,
        **{"add_generation_prompt": True, **options},
    )
    own = {name: value for name, value in options.items() if name != "enable_thinking"}
    if "enable_thinking" in options:
        own["chat_template_kwargs"] = {"enable_thinking": False}
    assert render_chat(folder, messages, chat_template=TEMPLATES[style], **own) == expected


def test_a_chat_is_encoded_with_one_bos_token(judge):
    folder, tokenizer = judge
    prompt = chat_prompt(folder, read_tokenizer(folder), MESSAGES, 1_000, chat_template=LLAMA3)
    begin = tokenizer.bos_token_id
    assert prompt["prompt_token_ids"].count(begin) == 1
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=LLAMA3, add_generation_prompt=True, return_dict=False
    )
    assert prompt["prompt_token_ids"] == expected


def test_the_template_is_found_where_checkpoints_keep_it(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "a {{ eos_token }}", "eos_token": "</s>"}))
    assert render_chat(tmp_path, MESSAGES) == "a </s>"
    several = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    config.write_text(json.dumps({"chat_template": several, "eos_token": {"content": "</s>"}}))
    assert render_chat(tmp_path, MESSAGES) == "c"
    write(tmp_path, "d {{ eos_token }}")  # the newer place
    assert render_chat(tmp_path, MESSAGES) == "d </s>"
    config.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        render_chat(tmp_path, MESSAGES)


def test_content_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    folder = write(tmp_path, "{{ messages[0].content }}")
    assert render_chat(folder, [{"role": "user", "content": parts}]) == "a\nb"


def test_a_message_that_cannot_be_continued_is_refused(tmp_path):
    write(tmp_path, "{{ messages[0].content }}")
    with pytest.raises(InvalidRequest, match="give add_generation_prompt=False"):
        render_chat(tmp_path, MESSAGES, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="out or rewrites it"):
        render_chat(tmp_path, MESSAGES, continue_final_message=True, add_generation_prompt=False)


def test_an_error_inside_a_template_is_reported_in_a_sentence(tmp_path):
    for template in ("{{ messages[9].content }}", "{{ 1 // 0 }}", "{{ messages[0].content + 1 }}"):
        with pytest.raises(InvalidRequest, match=r"refuses the messages: [^\n]+\.$"):
            render_chat(write(tmp_path, template), MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{% continue %}",
        "{{ " + "(" * 20_000 + ")" * 20_000 + " }}",
        "{% if 1 %}" * 150 + "{% endif %}" * 150,
        "{{ " + "9" * 5_000 + " }}",
    ],
    ids=["continue", "brackets", "nested", "digits"],
)
def test_a_template_that_cannot_be_compiled_is_a_sentence(template, tmp_path):
    with pytest.raises(CheckpointError, match=r"is broken: [^\n]*[^.]\.$"):
        render_chat(tmp_path, MESSAGES, chat_template=template)


def test_a_message_without_content_cannot_be_continued(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"id": "1"}]}
    with pytest.raises(InvalidRequest, match="has no content, so it cannot be continued"):
        render_chat(
            tmp_path,
            [*MESSAGES, call],
            chat_template="{{ messages }}",
            add_generation_prompt=False,
            continue_final_message=True,
        )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}{{ messages[-1].content }}{{ messages[-1].content }}",
        "{{ messages[-1].content | upper }}",
        "{{ messages[-1].content[:1] }}",
    ],
)
def test_a_repeated_or_rewritten_final_message_cannot_be_continued(template, tmp_path):
    with pytest.raises(InvalidRequest, match="out or rewrites it"):
        render_chat(
            tmp_path,
            MESSAGES,
            chat_template=template,
            add_generation_prompt=False,
            continue_final_message=True,
        )


def test_the_template_for_tools_is_used_when_there_are_tools(tmp_path):
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert render_chat(tmp_path, MESSAGES) == "a"
    assert render_chat(tmp_path, MESSAGES, tools=[TOOL]) == "b"


def test_a_template_gets_plain_copies_and_changes_no_caller_data(tmp_path):
    class Door:
        def open(self) -> str:
            return "opened"

    messages = [{"role": "user", "content": "a", "door": Door()}]
    with pytest.raises(InvalidRequest, match="refuses the messages"):
        render_chat(tmp_path, messages, chat_template="{{ messages[0].door.open() }}")
    assert messages[0].keys() == {"role", "content", "door"}


def test_a_refused_message_is_not_quoted_at_full_length(tmp_path):
    with pytest.raises(InvalidRequest) as refusal:
        render_chat(write(tmp_path, ""), [{"role": 3, "content": "a" * 100_000}])
    assert len(str(refusal.value)) < 500


def test_a_chat_needs_a_tokenizer(tmp_path):
    make_checkpoint("llama", tmp_path)
    write(tmp_path, CHATML)
    with pytest.raises(MissingTokenizer, match="contains no tokenizer"):
        LLM(tmp_path, num_blocks=8).chat(MESSAGES)


def test_llm_chat_passes_the_templates_options_on():
    llm = LLM("storyteller", num_blocks=64)
    greedy = SamplingParams(temperature=0.0, max_tokens=4)
    [output] = llm.chat(
        [{"role": "user", "content": "Once upon"}],
        greedy,
        use_tqdm=False,
        chat_template="{{ messages[0].content }}{{ word }}",
        chat_template_kwargs={"word": " a time"},
    )
    assert output.prompt == "Once upon a time"
    with pytest.raises(InvalidOption, match="no option 'tool': did you mean 'tools'"):
        llm.chat([{"role": "user", "content": "a"}], greedy, tool=[])
    with pytest.raises(InvalidOption, match="chat_template is 5: give a str or None"):
        llm.chat([{"role": "user", "content": "a"}], greedy, chat_template=5)
