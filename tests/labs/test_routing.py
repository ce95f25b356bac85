"""Lab 10's router before real servers: what clients get through it, and what it finds."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from routers import OpenStream, serve_load, two_servers
from servers import SECONDS_TO_START, Running

from minipaged.cli.lab_route import route as route_command
from minipaged.errors import InvalidOption
from minipaged.labs.lab10_router import LAB
from minipaged.labs.routing.app import RouterApp, prompt_in
from minipaged.labs.routing.load import RoundRobin
from minipaged.labs.starter import library_text

BODY = {"model": "storyteller", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


@contextmanager
def route(folder: Path, servers: Sequence[Running], *flags: str) -> Iterator[Running]:
    """`minipaged lab route` with the library's solution, ready; killed at the end."""
    file = folder / LAB.file_name
    file.write_text(library_text(LAB))
    log = folder / f"route-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "minipaged", "lab", "route", str(file), "--port", "0", *flags]
    command += [word for server in servers for word in ("--server", server.url)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while "press Ctrl-C" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        url = next(word for word in log.read_text().split() if word.startswith("http"))
        yield Running(process, url.rstrip(";"), log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("routing")


@pytest.fixture(scope="module")
def servers(folder: Path):
    with two_servers(folder, "--max-num-seqs", "8") as servers:
        yield servers


def test_responses_are_those_of_the_servers(folder: Path, servers):
    with route(folder, servers) as router:
        _, direct = servers[0].post("/v1/completions", BODY)
        status, routed = router.post("/v1/completions", BODY)
        assert (status, routed["choices"]) == (200, direct["choices"])
        chunks = router.stream("/v1/completions", BODY)
        assert "".join(c["choices"][0]["text"] for c in chunks) == direct["choices"][0]["text"]
        assert router.get("/v1/models") in [server.get("/v1/models") for server in servers]
        assert router.get("/health") == (200, "")
        assert router.post("/v1/completions", {**BODY, "n": 0})[0] == 400
        assert router.post("/v1/completions", b"{")[0] == 400
        assert router.get("/v1/models/none")[0] == 404


def test_the_router_passes_on_the_abort_of_a_client(folder: Path, servers):
    with route(folder, servers) as router:
        stream = OpenStream(router)
        assert stream.began.wait(30)
        stream.leave()
        after = [server.wait_until_idle() for server in servers]
        name = 'vllm:request_success_total{finished_reason="abort",model_name="storyteller"}'
        assert sum(each[name] for each in after) == 1


def test_the_death_of_a_server_ends_only_its_own_streams(folder: Path):
    with (
        two_servers(folder, "--max-num-seqs", "8") as (doomed, other),
        route(folder, (doomed, other), "--round-robin") as router,
    ):
        streams = [OpenStream(router) for _ in range(4)]
        assert all(stream.began.wait(30) for stream in streams)
        assert doomed.metrics()["vllm:num_requests_running"] == 2
        doomed.process.kill()
        for stream in streams:
            stream.join(120)
        assert sum(stream.is_whole for stream in streams) == 2
        assert "Traceback" not in router.log.read_text()
        assert other.wait_until_idle()["vllm:request_prompt_tokens_count"] == 2
        statuses = [router.post("/v1/completions", BODY)[0] for _ in range(6)]
        assert statuses == [200] * 6, "to the server that is left"
        other.process.kill()
        other.process.wait()
        status, reply = router.post("/v1/completions", BODY)
        assert (status, reply["error"]["code"]) == (503, 503)


@pytest.mark.full
def test_the_router_finds_far_more_cached_prefixes_than_round_robin(folder: Path):
    """A pool holds five of the eight system prompts: 140 blocks, of 70 characters each."""
    hits = {}
    for flags in (("--round-robin",), ("--capacity", "560", "--slack", "6")):
        with two_servers(folder, "--max-num-seqs", "4", "--num-blocks", "140") as servers:
            with route(folder, servers, *flags) as router:
                hits[flags[0]], spread = serve_load(router, servers)
            assert sum(spread) == 256
            assert max(spread) <= 0.6 * 256
    assert hits["--capacity"] >= 1.5 * hits["--round-robin"], hits


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (b'{"prompt": "Once"}', "Once"),
        (b'{"prompt": [1, 2, 3]}', "[1, 2, 3]"),
        (b'{"messages": [{"role": "user", "content": "Hi"}]}', "user: Hi"),
        (b'{"messages": [{"role": "assistant", "tool_calls": []}]}', ""),
        (b"{", ""),
        (b"[]", ""),
        (b'{"messages": 3}', ""),
        (b"[" * 100_000, ""),
    ],
)
def test_the_prompt_of_any_body_can_be_read(body, prompt):
    assert prompt_in(body) == prompt


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "https://a:1", "http://a:port", "http://a/v1"])
def test_an_invalid_address_is_refused(url):
    with pytest.raises(InvalidOption, match="is not a server address"):
        RouterApp(RoundRobin(1), [url])


def test_missing_packages_for_the_router_are_named(tmp_path):
    with pytest.raises(InvalidOption, match="no server was given: start some"):
        route_command(tmp_path / "lab10_router.py")
    with pytest.raises(InvalidOption, match="begin with `minipaged lab start 10`"):
        route_command(tmp_path / "lab10_router.py", ["http://127.0.0.1:8001"])
