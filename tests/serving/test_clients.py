"""OpenAI's clients against a real server: the guide's examples, and all else that clients rely on.

The second part runs directly and through vllm-router. What is not installed is skipped.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from routers import vllm_router
from servers import Running, running

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "serve_a_model.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"^```(?P<language>python|sh)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<out>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
SECTIONS = {
    "curl": None, "openai": "openai", "litellm": "litellm", "langchain-openai": "langchain_openai",
    "llm": "llm", "API key": "openai", "Metrics": None,
}  # fmt: skip
"""By heading: the package that its lines need."""
STARTS_A_SERVER = re.compile(r"minipaged serve|docker|systemctl|pip install")


def section(heading: str) -> str:
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server"), "--max-num-seqs", "8") as server:
        yield server


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locked")
    flags = ("--api-key", "sesame", "--max-num-seqs", "1", "--max-queued", "2")
    with running(folder, *flags) as server:
        yield server


def run(code: str, language: str, server: Running, folder: Path) -> str:
    """What a block prints, in a process of its own with a home of its own."""
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    command = {"python": [sys.executable, "-c"], "sh": ["bash", "-euo", "pipefail", "-c"]}[language]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")
    }
    environment |= {
        "HOME": str(folder),
        "LLM_USER_PATH": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [*command, code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_lines_of_the_guide_print_what_it_says(heading, server, locked, tmp_path):
    package = SECTIONS[heading]
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if shutil.which("curl") is None and package is None:
        pytest.skip("curl is not installed")
    chosen = locked if heading == "API key" else server
    blocks = [
        block
        for block in BLOCK.finditer(section(heading))
        if not STARTS_A_SERVER.search(block["code"])
    ]
    assert blocks
    for block in blocks:
        printed = run(block["code"], block["language"], chosen, tmp_path)
        assert printed.rstrip("\n") == (block["out"] or "").rstrip("\n")


def test_each_python_block_of_the_guide_is_run():
    assert GUIDE.count("```python") == sum(
        section(heading).count("```python") for heading in SECTIONS
    )


def test_the_metrics_of_the_guide_exist(server: Running):
    _, text = server.get("/metrics")
    named = set(re.findall(r"vllm:\w+", section("Metrics")))
    assert len(named) > 6
    for name in named - {"vllm:num_requests"}:  # the pattern that is searched for
        assert re.search(rf"^{name}(_count|_total)?\{{", text, re.MULTILINE), name


# ---- openai: what programs rely on ---------------------------------------------------------------

PROMPT = "Once upon a time"
QUESTION = [{"role": "user", "content": "Where is the key of Theo?"}]


@pytest.fixture
def openai(monkeypatch):
    module = pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return module


@pytest.fixture(scope="module", params=["directly", "through_vllm_router"])
def address(request, server: Running, tmp_path_factory):
    if request.param == "directly":
        yield server.url
        return
    pytest.importorskip("vllm_router")
    with vllm_router(tmp_path_factory.mktemp("router"), [server], "cache_aware") as router:
        yield router.url


@pytest.fixture
def client(openai, address: str):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, **fields):
    usual = {"model": "storyteller", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    return client.completions.create(**{**usual, **fields})


def chat(client, **fields):
    usual = {"model": "storyteller", "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**{**usual, **fields})


def test_the_chunks_of_a_completion_add_up_to_the_whole(client):
    whole = complete(client, n=2, temperature=1, seed=3, logprobs=1)
    texts, tokens, reasons = {0: "", 1: ""}, {0: [], 1: []}, {}
    options = {"include_usage": True}
    *chunks, last = complete(
        client, n=2, temperature=1, seed=3, logprobs=1, stream=True, stream_options=options
    )
    for chunk in chunks:
        assert (chunk.object, chunk.usage) == ("text_completion", None)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
            if choice.finish_reason:
                assert choice.index not in reasons, "one finish_reason for each choice"
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert tokens == {choice.index: choice.logprobs.tokens for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert (last.choices, last.usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_the_chunks_of_a_chat_add_up_to_the_whole(client):
    whole = chat(client, logprobs=True, top_logprobs=2)
    first, *chunks = chat(client, logprobs=True, top_logprobs=2, stream=True)
    assert first.choices[0].delta.role == "assistant"
    assert not any(chunk.choices[0].delta.role for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    streamed = [
        token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == whole.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 for token in streamed)
    assert b"".join(bytes(token.bytes) for token in streamed).decode().startswith(text)


def test_openais_own_stream_helper_collects_a_chat(client):
    with client.chat.completions.stream(
        model="storyteller", messages=QUESTION, max_tokens=8, temperature=0
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == chat(client).choices[0].message.content


def test_several_prompts_have_choices_in_order(client):
    prompts = [PROMPT, "Once upon a time Mia the cat"]
    drawn = {"n": 2, "temperature": 1, "seed": 5}
    both = complete(client, prompt=prompts, **drawn)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    alone = [complete(client, prompt=prompt, **drawn).choices for prompt in prompts]
    assert [each.text for each in both.choices] == [each.text for two in alone for each in two]


def test_the_same_seed_gives_the_same_samples(client):
    draws = [
        [choice.text for choice in complete(client, n=3, temperature=1, seed=seed).choices]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_stop_text_ends_the_output_and_is_named(client):
    choice = complete(client, max_tokens=40, stop=["Q:", "."]).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", ".")
    assert "." not in choice.text
    streamed = "".join(
        chunk.choices[0].text for chunk in complete(client, max_tokens=40, stop=["."], stream=True)
    )
    assert streamed == choice.text, "nothing of a stop text is sent and taken back"


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_harness_can_score_a_continuation(client, max_tokens):
    """As lm-eval does: token ids in, and the sums of what follows the context."""
    context, rest = 4, 5
    tokens = complete(
        client, max_tokens=rest, extra_body={"return_token_ids": True, "ignore_eos": True}
    ).choices[0]
    ids = [*tokens.prompt_token_ids, *tokens.token_ids]
    scored = complete(client, prompt=[ids, ids[:6]], max_tokens=max_tokens, echo=True, logprobs=1)
    found = scored.choices[0].logprobs
    end = len(ids)
    assert len(found.tokens) == end + max_tokens
    assert found.token_logprobs[0] is None
    chosen, top = found.token_logprobs[context:end], found.top_logprobs[context:end]
    assert all(math.isclose(one, max(best.values())) for one, best in zip(chosen, top, strict=True))
    again = complete(client, max_tokens=rest, logprobs=1, extra_body={"ignore_eos": True})
    assert chosen == pytest.approx(again.choices[0].logprobs.token_logprobs, abs=1e-4)
    assert scored.usage.completion_tokens == 2 * max_tokens


def test_tools_are_accepted_and_a_forced_call_is_refused(client, openai):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert chat(client, tools=tools, tool_choice="auto").choices[0].message.content
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, tools=tools, tool_choice=choice)
        assert refused.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"temperature": -1}, "BadRequestError", "temperature"),
        ({"max_tokens": "many"}, "BadRequestError", "max_tokens"),
        ({"n": 0}, "BadRequestError", "n"),
        ({"logprobs": 10**9}, "BadRequestError", "logprobs"),
        ({"logit_bias": {"99999": 1.0}}, "BadRequestError", "logit_bias"),
        ({"suffix": "."}, "BadRequestError", "suffix"),
        ({"prompt": ""}, "BadRequestError", None),
        ({"model": "gpt-4"}, "NotFoundError", None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_raises_openais_exception(client, openai, fields, error, param, request):
    if "through_vllm_router-max_tokens" in request.node.name:
        pytest.skip("the router checks types itself, and answers 422")
    for stream in (False, True):  # a stream is refused before its first byte
        with pytest.raises(getattr(openai, error)) as refused:
            complete(client, **fields, stream=stream)
        if param is not None:
            assert refused.value.param == param


def test_a_prompt_that_is_too_long_has_openais_code(client, openai):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, messages=[{"role": "user", "content": "Once " * 3000}])
    assert refused.value.code == "context_length_exceeded"


def test_a_full_queue_raises_rate_limit_error(openai, locked: Running):
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="sesame", max_retries=0) as client:
        long = {"max_tokens": 900, "stream": True, "extra_body": {"ignore_eos": True}}
        with complete(client, prompt=[PROMPT] * 2, **long) as stream:
            next(iter(stream))  # the first prompt runs, and the second waits
            with pytest.raises(openai.RateLimitError) as refused:
                complete(client, prompt=[PROMPT] * 2)
    assert refused.value.response.headers["retry-after"] == "1"


def test_a_stream_that_is_closed_is_aborted(client, server: Running):
    before = server.metrics()
    stream = complete(client, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    after = server.wait_until_idle()
    name = 'vllm:request_success_total{finished_reason="abort",model_name="storyteller"}'
    assert after[name] == before[name] + 1
