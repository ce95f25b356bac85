"""Chat templates: the checkpoint's own, rendered in a sandbox."""

import pytest

from minipaged import LLM, SamplingParams
from minipaged.chat import TEMPLATE_FILE, render_chat
from minipaged.errors import CheckpointError, InvalidRequest

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


def test_a_folder_without_a_template_says_what_to_do_instead(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no chat template.*use generate\(\)"):
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
def test_a_template_can_do_nothing_but_build_text(tmp_path, attack):
    with pytest.raises(InvalidRequest, match="refuses the messages"):
        render_chat(write(tmp_path, attack), MESSAGES)


def test_a_template_may_refuse_messages_with_a_reason(tmp_path):
    folder = write(tmp_path, "{{ raise_exception('no system turns here') }}")
    with pytest.raises(InvalidRequest, match="no system turns here"):
        render_chat(folder, MESSAGES)


@pytest.mark.parametrize(
    "messages", [[], "hello", [{"role": "user"}], [{"role": "user", "content": [{"type": "x"}]}]]
)
def test_what_is_no_chat_is_refused(tmp_path, messages):
    with pytest.raises(InvalidRequest, match="is no message of a chat"):
        render_chat(write(tmp_path, ""), messages)


def test_a_conversation_and_many_conversations_are_answered():
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
