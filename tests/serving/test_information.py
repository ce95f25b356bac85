"""The endpoints that do not generate: models, health, tokens, documentation, metrics."""

import json
import re
import urllib.request

import pytest
from servers import Running, running

from minipaged import LLM, __version__


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    flags = ("--max-num-seqs", "4", "--served-model-name", "storyteller")
    with running(tmp_path_factory.mktemp("server"), *flags) as server:
        yield server


def get(server: Running, path: str):
    status, text = server.get(path)
    assert status == 200
    return text


def test_the_ready_line_says_where_the_server_listens(server):
    line = server.log.read_text().splitlines()[0]
    assert re.fullmatch(
        r"minipaged serves storyteller on http://127\.0\.0\.1:\d+; press Ctrl-C to stop\.", line
    )


def test_models_are_listed_with_the_length_of_their_context(server):
    status, reply = server.post("/v1/models", {})
    assert status == 405
    assert reply["error"]["type"] == "MethodNotAllowedError"
    listed = server.get("/v1/models")[1]
    [model] = json.loads(listed)["data"]
    assert model["id"] == "storyteller"
    assert model["max_model_len"] == 1024
    assert server.get("/v1/models/storyteller")[0] == 200
    assert server.get("/v1/models/gpt-4")[0] == 404


def test_the_version_is_that_of_the_library(server):
    assert get(server, "/version") == f'{{"version":"{__version__}"}}'


def test_text_becomes_tokens_and_back(server):
    tokenizer = LLM("storyteller").get_tokenizer()
    text = "Theo the frog 🐸<|endoftext|>"
    status, reply = server.post("/tokenize", {"prompt": text})
    ids = tokenizer.encode(text)
    assert (status, reply) == (200, {"count": len(ids), "max_model_len": 1024, "tokens": ids})
    assert server.post("/detokenize", {"tokens": ids}) == (200, {"prompt": text})
    status, reply = server.post("/tokenize", {})
    assert status == 400
    assert reply["error"]["message"] == "there is no text: give prompt or messages."


def test_the_documentation_loads_nothing_from_the_network(server):
    page = get(server, "/docs")
    assert "<code>POST /v1/chat/completions</code>" in page
    assert "<code>use_beam_search</code>" in page
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert get(server, "/openapi.json").startswith("{")


def test_metrics_count_what_clients_received(server):
    before = server.wait_until_idle()
    finished = {"stop": 0, "length": 0}
    tokens = prompts = 0
    for number in range(4):
        body = {"prompt": ["Once upon a time", "Theo"], "n": 2, "max_tokens": 9, "seed": number}
        status, reply = server.post("/v1/completions", body)
        assert status == 200
        tokens += reply["usage"]["completion_tokens"]
        prompts += reply["usage"]["prompt_tokens"]
        for choice in reply["choices"]:
            finished[choice["finish_reason"]] += 1
    events = server.stream(
        "/v1/completions", {"prompt": "Theo", "max_tokens": 7, "ignore_eos": True}
    )
    assert events
    after = server.wait_until_idle()

    def grew(name: str) -> float:
        return after[f"vllm:{name}"] - before[f"vllm:{name}"]

    assert grew("generation_tokens_total") == tokens + 7
    assert grew("prompt_tokens_total") == prompts + 2
    assert grew("request_generation_tokens_count") == 9
    assert grew("time_to_first_token_seconds_count") == 9
    assert grew("e2e_request_latency_seconds_count") == 9
    assert grew("request_queue_time_seconds_count") == 9
    assert grew("prefix_cache_queries_total") == prompts + 2
    reasons = {
        reason: after[name] - before[name]
        for reason in ("stop", "length", "abort", "error")
        for name in after
        if name.startswith("vllm:request_success_total") and f'"{reason}"' in name
    }
    assert reasons == {**finished, "length": finished["length"] + 1, "abort": 0, "error": 0}
    # A request of n tokens has n - 1 times between two of them.
    assert grew("iteration_tokens_total_count") > 0
    assert 0 < grew("inter_token_latency_seconds_count") <= tokens + 6
    assert after["process_cpu_seconds_total"] > 0


def test_the_pool_is_described_by_the_metrics(server):
    [info] = [line for line in get(server, "/metrics").splitlines() if "cache_config_info{" in line]
    assert 'block_size="16"' in info
    assert info.endswith(" 1.0")


# ---- keys ----------------------------------------------------------------------------------------


def test_a_key_is_asked_for_except_by_health_and_metrics(tmp_path):
    with running(tmp_path, "--api-key", "secret", "--max-num-seqs", "2") as server:
        assert server.get("/health")[0] == server.get("/metrics")[0] == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, text = server.get("/v1/models", **headers)
            assert status == 401
            assert '"AuthenticationError"' in text
            assert server.post("/tokenize", {"prompt": "a"}, **headers)[0] == 401
        key = {"Authorization": "Bearer secret"}
        assert server.get("/v1/models", **key)[0] == 200
        assert server.post("/v1/completions", {"prompt": "Theo"}, **key)[0] == 200


def test_a_key_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIPAGED_API_KEY", "secret")
    with running(tmp_path, "--max-num-seqs", "2") as server:
        assert server.get("/v1/models")[0] == 401
        assert server.get("/v1/models", Authorization="Bearer secret")[0] == 200


def test_pages_of_the_allowed_website_may_use_the_server(tmp_path):
    flags = ("--cors-origin", "http://a.example", "--api-key", "k", "--max-num-seqs", "2")
    with running(tmp_path, *flags) as server:
        request = urllib.request.Request(
            server.url + "/v1/completions",
            method="OPTIONS",
            headers={"Origin": "http://a.example", "Access-Control-Request-Method": "POST"},
        )
        with urllib.request.urlopen(request) as response:
            assert response.headers["access-control-allow-origin"] == "http://a.example"
