"""/v1/completions of a real server: its fields, its streams, and the offline engine's tokens."""

import json

import pytest
from servers import Running

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.serving.protocol import NOT_BUILT, SAMPLING

PROMPT = "Once upon a time"
GREEDY = {"model": "storyteller", "prompt": PROMPT, "temperature": 0}


def complete(server: Running, **fields) -> dict:
    status, reply = server.post("/v1/completions", {**GREEDY, **fields})
    assert status == 200, reply
    return reply


def refused(server: Running, **fields) -> dict:
    status, reply = server.post("/v1/completions", {**GREEDY, **fields})
    assert status == 400, reply
    assert reply["error"]["type"] == "BadRequestError"
    assert reply["error"]["code"] in (400, "context_length_exceeded")
    return reply["error"]


def offline(llm: LLM, prompt=PROMPT, **params):
    [output] = llm.generate(prompt, SamplingParams(**params), use_tqdm=False)
    return output


# ---- whole ---------------------------------------------------------------------------------------


def test_a_completion_has_the_tokens_of_the_offline_engine(server, llm):
    reply = complete(server, max_tokens=12, return_token_ids=True)
    output = offline(llm, temperature=0, max_tokens=12)
    [choice] = reply["choices"]
    assert choice == {
        "index": 0,
        "text": output.outputs[0].text,
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": output.outputs[0].token_ids,
    }
    assert reply["object"] == "text_completion"
    assert reply["model"] == "storyteller"
    assert reply["id"].startswith("cmpl-")
    counts = {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}
    assert reply["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}


def test_sixteen_tokens_are_generated_unless_asked_otherwise(server):
    assert complete(server, ignore_eos=True)["usage"]["completion_tokens"] == 16
    assert complete(server, ignore_eos=True, max_tokens=None)["usage"]["completion_tokens"] == 16


def test_several_prompts_have_numbered_choices(server, llm):
    prompts = ["Theo the frog", llm.get_tokenizer().encode(PROMPT)]
    ids = [llm.get_tokenizer().encode(prompts[0]), prompts[1]]
    for given in ([prompts[0], PROMPT], ids):
        reply = complete(server, prompt=given, n=2, temperature=0.8, seed=1, max_tokens=6)
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
        texts = [choice["text"] for choice in reply["choices"]]
        sampled = {"n": 2, "temperature": 0.8, "seed": 1, "max_tokens": 6}
        outputs = [offline(llm, prompt, **sampled) for prompt in (prompts[0], PROMPT)]
        assert texts == [each.text for output in outputs for each in output.outputs]
        assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_a_prompt_may_be_token_ids(server, llm):
    ids = llm.get_tokenizer().encode(PROMPT)
    assert complete(server, prompt=ids)["choices"] == complete(server)["choices"]


def test_a_repeated_prompt_is_found_in_the_prefix_cache(server):
    story = "Once upon a time Theo the frog put the white key in the meadow. " * 4
    complete(server, prompt=story)
    cached = complete(server, prompt=story)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= 32
    salted = complete(server, prompt=story, cache_salt="mine")["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


def test_logprobs_are_those_of_the_offline_engine(server, llm):
    found = complete(server, max_tokens=5, logprobs=3)["choices"][0]["logprobs"]
    [completion] = offline(llm, temperature=0, max_tokens=5, logprobs=3).outputs
    tokens = [llm.get_tokenizer().decode([i]) for i in completion.token_ids]
    assert found["tokens"] == tokens
    starts = [sum(map(len, tokens[:i])) for i in range(5)]
    assert found["text_offset"] == starts
    for i, (token_id, logprobs) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True)
    ):
        assert found["token_logprobs"][i] == pytest.approx(logprobs[token_id].logprob, abs=1e-4)
        assert tokens[i] in found["top_logprobs"][i]
        assert len(found["top_logprobs"][i]) == 3


def test_echo_scores_a_prompt_as_evaluation_tools_do(server, llm):
    reply = complete(server, echo=True, max_tokens=0, logprobs=1)
    [choice] = reply["choices"]
    assert choice["text"] == PROMPT
    assert choice["logprobs"]["tokens"] == ["Once", " upon", " a", " time"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert reply["usage"]["completion_tokens"] == 0
    expected = offline(llm, max_tokens=1, prompt_logprobs=1)
    for i in range(1, 4):
        judged = expected.prompt_logprobs[i][expected.prompt_token_ids[i]].logprob
        assert choice["logprobs"]["token_logprobs"][i] == pytest.approx(judged, abs=1e-4)


def test_echo_begins_the_text_with_the_prompt(server, llm):
    plain = complete(server, max_tokens=4)["choices"][0]["text"]
    for prompt in (PROMPT, llm.get_tokenizer().encode(PROMPT)):
        assert complete(server, prompt=prompt, max_tokens=4, echo=True)["choices"][0]["text"] == (
            PROMPT + plain
        )
    both = complete(server, max_tokens=4, echo=True, logprobs=0)["choices"][0]
    assert "".join(both["logprobs"]["tokens"]) == both["text"]
    assert len(both["logprobs"]["token_logprobs"]) == 8


def test_prompt_logprobs_are_an_extra_field(server, llm):
    found = complete(server, max_tokens=1, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    assert found[0] is None
    assert len(found) == 4
    for token in found[1].values():
        assert set(token) == {"logprob", "rank", "decoded_token"}


def test_a_stop_string_ends_the_text_and_is_named(server):
    text = complete(server, max_tokens=8)["choices"][0]["text"]
    [choice] = complete(server, max_tokens=8, stop=text[9:14])["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", text[9:14])
    assert choice["text"] == text[: text.index(text[9:14])]
    kept = complete(server, max_tokens=8, stop=[text[9:14]], include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == text[: text.index(text[9:14])] + text[9:14]


def test_beam_search_returns_n_outputs_the_best_first(server, llm):
    reply = complete(server, use_beam_search=True, n=3, max_tokens=6)
    [output] = llm.beam_search([PROMPT], BeamSearchParams(beam_width=3, max_tokens=6))
    texts = [choice["text"] for choice in reply["choices"]]
    assert texts == [each.text for each in output.outputs]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]


def test_beam_search_accepts_the_defaults_of_options_it_cannot_honour(server):
    usual = {"top_p": 1.0, "top_k": 0, "skip_special_tokens": True, "stop": [], "min_tokens": 0}
    fields = {"use_beam_search": True, "n": 2, "max_tokens": 3}
    assert complete(server, **fields, **usual)["choices"] == complete(server, **fields)["choices"]


def test_best_of_returns_the_likeliest_samples(server, llm):
    fields = {"n": 2, "best_of": 4, "temperature": 1.0, "seed": 3, "max_tokens": 6}
    texts = [choice["text"] for choice in complete(server, **fields)["choices"]]
    assert texts == [each.text for each in offline(llm, **fields).outputs]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 2),
        ("top_p", 0.5),
        ("min_p", 0.2),
        ("presence_penalty", 1.5),
        ("frequency_penalty", 1.5),
        ("repetition_penalty", 1.5),
        ("logit_bias", {"300": 100}),
        ("allowed_token_ids", [300, 301]),
        ("bad_words", ["in", "the"]),
        ("min_tokens", 12),
        ("stop_token_ids", [300]),
        ("ignore_eos", True),
        ("skip_special_tokens", False),
        ("truncate_prompt_tokens", 2),
    ],
)
def test_a_sampling_field_means_what_it_means_offline(server, llm, name, value):
    fields = {"temperature": 0.9, "seed": 5, "max_tokens": 12, name: value}
    text = complete(server, **fields)["choices"][0]["text"]
    assert text == offline(llm, **fields).outputs[0].text


# ---- streams -------------------------------------------------------------------------------------


def test_a_stream_has_the_text_of_the_whole_response(server):
    body = {**GREEDY, "max_tokens": 12}
    whole = complete(server, max_tokens=12)
    events = server.stream("/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert len(events) > 2
    assert len({(event["id"], event["created"]) for event in events}) == 1
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["length"]
    assert not any("usage" in event for event in events)
    assert {event["object"] for event in events} == {"text_completion"}


def test_usage_comes_last_and_only_if_it_is_asked_for(server):
    body = {**GREEDY, "max_tokens": 5, "stream_options": {"include_usage": True}}
    *events, last = server.stream("/v1/completions", body)
    assert last["choices"] == []
    assert last["usage"] == complete(server, max_tokens=5)["usage"]
    assert all(event["usage"] is None for event in events)
    events = server.stream("/v1/completions", {**GREEDY, "stream_options": {}})
    assert all(event["choices"] for event in events)


def test_usage_may_come_with_every_chunk(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.stream(
        "/v1/completions", {**GREEDY, "max_tokens": 5, "stream_options": options}
    )
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts[0] >= 1
    assert counts == sorted(counts)
    assert counts[-2:] == [5, 5]


def test_the_choices_of_a_stream_add_up_to_those_of_the_whole(server):
    fields = {"prompt": [PROMPT, "Theo"], "n": 2, "temperature": 0.8, "seed": 1, "logprobs": 2}
    whole = complete(server, **fields)["choices"]
    texts, tokens, offsets = {}, {}, {}
    for event in server.stream("/v1/completions", {**GREEDY, **fields}):
        [choice] = event["choices"]
        index = choice["index"]
        texts[index] = texts.get(index, "") + choice["text"]
        tokens.setdefault(index, []).extend(choice["logprobs"]["tokens"])
        offsets.setdefault(index, []).extend(choice["logprobs"]["text_offset"])
    assert texts == {choice["index"]: choice["text"] for choice in whole}
    assert tokens == {choice["index"]: choice["logprobs"]["tokens"] for choice in whole}
    assert offsets == {choice["index"]: choice["logprobs"]["text_offset"] for choice in whole}


def test_beams_and_best_of_come_at_the_end_of_a_stream(server):
    for fields in (
        {"use_beam_search": True, "n": 2},
        {"n": 2, "best_of": 3, "temperature": 1.0, "seed": 1},
    ):
        events = server.stream("/v1/completions", {**GREEDY, **fields})
        texts = [event["choices"][0]["text"] for event in events]
        assert texts == [choice["text"] for choice in complete(server, **fields)["choices"]]


def test_a_stream_may_echo_its_prompt(server):
    events = server.stream("/v1/completions", {**GREEDY, "echo": True, "max_tokens": 4})
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == complete(server, echo=True, max_tokens=4)["choices"][0]["text"]


# ---- what is refused, and what is ignored --------------------------------------------------------


@pytest.mark.parametrize("name", NOT_BUILT)
def test_an_unsupported_field_is_refused_by_name(server, name):
    error = refused(server, **{name: "something"})
    assert error["param"] == name
    assert error["message"].startswith(f"{name} is 'something', but ")
    complete(server, max_tokens=1, **{name: None})


def test_only_text_may_be_asked_for(server):
    assert refused(server, response_format={"type": "json_object"})["param"] == "response_format"
    complete(server, max_tokens=1, response_format={"type": "text"})


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "set echo to score"),
        ({"max_tokens": -1}, "max_tokens", "from 1 up"),
        ({"n": 0}, "n", "from 1 up"),
        ({"n": 2}, "n", "temperature 0"),
        ({"temperature": -1}, "temperature", "from 0"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "leave out stream"),
        ({"echo": True, "logprobs": 1, "stream": True}, "logprobs", "leave out stream"),
        ({"use_beam_search": True, "top_k": 3}, "top_k", "beam search"),
        ({"use_beam_search": True, "logprobs": 3}, "logprobs", "beam search"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias"),
        ({"request_id": "x" * 257}, "request_id", "at most 256"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": ""}, None, "empty"),
        ({"prompt": [[1], []]}, None, "empty"),
        ({"prompt": [10**6]}, None, "token id"),
        ({"prompt": "word " * 5000}, None, "max_model_len"),
        ({"add_special_tokens": False, "prompt": "word " * 5000}, None, "max_model_len"),
    ],
)
def test_invalid_requests_are_refused_in_one_sentence(server, fields, param, words):
    error = refused(server, **fields)
    assert error["param"] == param
    assert words in error["message"]


def test_a_prompt_that_is_too_long_has_openais_code(server):
    assert refused(server, prompt="word " * 5000)["code"] == "context_length_exceeded"
    assert refused(server, prompt=[5] * 5000)["code"] == "context_length_exceeded"


def test_null_is_the_default_of_every_field(server):
    fields = dict.fromkeys((*SAMPLING, "echo", "logprobs", "stream", "stream_options", "user"))
    fields |= {"temperature": 0}
    assert complete(server, **fields)["choices"] == complete(server)["choices"]


def test_an_unknown_field_is_ignored_with_one_warning(server):
    for _ in range(2):
        complete(server, max_tokens=1, best_friend="Theo")
    assert server.log.read_text().count("the unknown field 'best_friend'") == 1


def test_another_model_is_not_found(server):
    status, reply = server.post("/v1/completions", {**GREEDY, "model": "gpt-4"})
    assert status == 404
    assert reply["error"]["type"] == "NotFoundError"
    assert (reply["error"]["param"], reply["error"]["code"]) == ("model", "model_not_found")
    assert "'storyteller'" in reply["error"]["message"]


def test_a_request_id_becomes_part_of_the_id(server):
    for _ in range(2):
        assert complete(server, max_tokens=1, request_id="mine")["id"] == "cmpl-mine"


def test_text_in_any_script_is_returned_intact(server):
    text = "naïve 🐸 青蛙"
    reply = complete(server, prompt=text, echo=True, max_tokens=1)
    assert reply["choices"][0]["text"].startswith(text)
    assert json.loads(json.dumps(reply)) == reply
