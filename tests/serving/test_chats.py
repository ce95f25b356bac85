"""/v1/chat/completions of a real server: messages in, one assistant turn out."""

import pytest
from servers import Running, running

from minipaged import SamplingParams

MESSAGES = [
    {"role": "user", "content": "Theo the frog put the white key in the meadow. Where is the key?"}
]
GREEDY = {"model": "storyteller", "messages": MESSAGES, "temperature": 0}


def chat(server: Running, **fields) -> dict:
    status, reply = server.post("/v1/chat/completions", {**GREEDY, **fields})
    assert status == 200, reply
    return reply


def refused(server: Running, **fields) -> dict:
    status, reply = server.post("/v1/chat/completions", {**GREEDY, **fields})
    assert status == 400, reply
    return reply["error"]


def test_a_chat_has_the_text_of_the_offline_engine(server, llm):
    reply = chat(server, max_completion_tokens=12)
    [output] = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=12))
    [choice] = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": output.outputs[0].text}
    assert choice["finish_reason"] == output.outputs[0].finish_reason
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["usage"]["prompt_tokens"] == len(output.prompt_token_ids)


def test_a_chat_goes_on_until_it_ends_unless_it_is_limited(server):
    reply = chat(server, ignore_eos=True)
    assert reply["usage"]["total_tokens"] == 1024  # the model's context
    assert reply["choices"][0]["finish_reason"] == "length"
    both = chat(server, ignore_eos=True, max_tokens=9, max_completion_tokens=3)
    assert both["usage"]["completion_tokens"] == 3


def test_content_may_come_in_parts(server):
    parts = [{"type": "text", "text": MESSAGES[0]["content"]}]
    assert (
        chat(server, messages=[{"role": "user", "content": parts}])["choices"]
        == (chat(server)["choices"])
    )
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    error = refused(server, messages=[{"role": "user", "content": image}])
    assert "is not a chat message" in error["message"]


def test_a_turn_that_only_called_tools_has_no_content(server):
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, *MESSAGES]
    empty = [{"role": "assistant", "content": ""}, *MESSAGES]
    assert chat(server, messages=turns)["choices"] == chat(server, messages=empty)["choices"]


def test_a_control_token_in_a_message_stays_text(server):
    plain = server.post("/tokenize", {"messages": MESSAGES})[1]["count"]
    told = [{"role": "user", "content": MESSAGES[0]["content"] + "<|endoftext|>"}]
    assert server.post("/tokenize", {"messages": told})[1]["count"] > plain + 3


def test_logprobs_have_exact_bytes_and_the_likeliest_tokens(server, llm):
    [choice] = chat(server, max_tokens=4, logprobs=True, top_logprobs=3)["choices"]
    [output] = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=4, logprobs=3))
    content = choice["logprobs"]["content"]
    assert len(content) == len(output.outputs[0].token_ids)
    for token, token_id in zip(content, output.outputs[0].token_ids, strict=True):
        assert bytes(token["bytes"]) == llm.get_tokenizer().token_bytes(token_id)
        assert len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0]["logprob"] == token["logprob"]  # greedy
        ranked = [each["logprob"] for each in token["top_logprobs"]]
        assert ranked == sorted(ranked, reverse=True)
    [choice] = chat(server, max_tokens=4, logprobs=True)["choices"]
    assert all(token["top_logprobs"] == [] for token in choice["logprobs"]["content"])


def test_the_first_chunk_has_the_role_and_no_later_one(server):
    options = {"include_usage": True}
    body = {**GREEDY, "max_tokens": 6, "n": 2, "temperature": 0.9, "stream_options": options}
    *events, last = server.stream("/v1/chat/completions", body)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[:2] == [{"role": "assistant", "content": ""}] * 2
    assert [event["choices"][0]["index"] for event in events[:2]] == [0, 1]
    assert all(set(delta) == {"content"} for delta in deltas[2:])
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert len([reason for reason in reasons if reason is not None]) == 2
    assert last["choices"] == []
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_a_stream_has_the_text_of_the_whole_response(server):
    events = server.stream("/v1/chat/completions", {**GREEDY, "max_tokens": 9, "logprobs": True})
    text = "".join(event["choices"][0]["delta"]["content"] for event in events)
    whole = chat(server, max_tokens=9, logprobs=True)["choices"][0]
    assert text == whole["message"]["content"]
    tokens = [event["choices"][0]["logprobs"] for event in events[1:]]
    content = [token for each in tokens if each for token in each["content"]]
    assert content == whole["logprobs"]["content"]


def test_the_last_message_may_be_continued(server, llm):
    said = [*MESSAGES, {"role": "assistant", "content": "The key is"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    reply = chat(server, messages=said, max_tokens=5, **options)
    [output] = llm.chat(said, SamplingParams(temperature=0, max_tokens=5), **options)
    assert reply["choices"][0]["message"]["content"] == output.outputs[0].text


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, None, "is not a chat message"),
        ({"messages": [{"content": "Hello"}]}, None, "is not a chat message"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "cannot be enforced"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "cannot be enforced"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs is not set"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs", "equal to 0"),
        ({"top_logprobs": 21, "logprobs": True}, "logprobs", "at most 20"),
        ({"logprobs": 5}, "logprobs", "valid boolean"),
        ({"chat_template": "{{ 1 }}"}, None, "trust_request_chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "sets messages"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "sets tools"),
    ],
)
def test_invalid_requests_are_refused_in_one_sentence(server, fields, param, words):
    error = refused(server, **fields)
    assert error["param"] == param
    assert words in error["message"]


def test_a_trusted_server_runs_the_template_of_a_request(tmp_path):
    with running(tmp_path, "--trust-request-chat-template", "--max-num-seqs", "2") as server:
        template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        reply = chat(server, chat_template=template, max_tokens=2)
        plain = server.post("/tokenize", {"prompt": MESSAGES[0]["content"]})[1]["count"]
        assert reply["usage"]["prompt_tokens"] == plain
