"""/v1/completions of a real server: its fields, its streams, and the offline engine's tokens."""

import pytest
from servers import Running, running

from minipaged import LLM, SamplingParams

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server"), "--max-num-seqs", "8") as server:
        yield server


@pytest.fixture(scope="module")
def llm():
    return LLM("storyteller")


def test_a_completion_has_the_tokens_of_the_offline_engine(server: Running, llm: LLM):
    body = {"model": "storyteller", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    status, reply = server.post("/v1/completions", body)
    [output] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))
    assert status == 200
    [choice] = reply["choices"]
    assert choice["text"] == output.outputs[0].text
    assert choice["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 12
