"""How a server starts, and how it ends: signals, deadlines, a part that fails."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from servers import Running, raw_request, read_response, running

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "Once upon a time", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}
SLOW = """
import time
from minipaged.scheduler.fcfs import FCFSScheduler

class Slow(FCFSScheduler):
    def schedule(self):
        time.sleep(0.02)
        return super().schedule()
"""
FAILING = """
from minipaged.memory.allocator import BlockAllocator
from minipaged.scheduler.fcfs import FCFSScheduler

class FailsInItsTwentiethStep(FCFSScheduler):
    steps = 0

    def schedule(self):
        FailsInItsTwentiethStep.steps += 1
        if self.steps >= 20:
            raise ZeroDivisionError("the twentieth step")
        return super().schedule()

class CannotAdd(FCFSScheduler):
    def add(self, group):
        raise ZeroDivisionError("cannot add")

class CannotAbort(FCFSScheduler):
    def abort(self, group):
        raise ZeroDivisionError("cannot abort")

class CannotFree(BlockAllocator):
    def free(self, *args, **kwargs):
        raise ZeroDivisionError("cannot free")
"""
FAILING_REQUESTS = """
import math
from minipaged.engine.sampling_request import SamplingRequest

def in_the_middle(tokens):
    return len(tokens) >= 20

class RaisesForItself(SamplingRequest):
    def advance(self, sampled, fork):
        if self._seed == 13 and in_the_middle(self._first.output_token_ids):
            raise ZeroDivisionError("its own code")
        return super().advance(sampled, fork)

class BreaksItsLogits(SamplingRequest):
    def __init__(self, arrival, params, seed):
        if seed == 13:
            params.logits_processors = [self.broken]
        super().__init__(arrival, params.clone(), seed)

    def broken(self, output_token_ids, logits):
        return logits * math.nan if in_the_middle(output_token_ids) else logits
"""
FAILING_REPLIES = """
from minipaged.engine.sampling_request import SamplingRequest
from minipaged.serving import replies

choice, as_event = replies.Reply._choice, replies.as_event

def failing_choice(reply, index, content, tokens):
    if reply.body.seed in (13, 14) and tokens.finish_reason is not None:
        raise ZeroDivisionError(f"the end of the reply to {reply.body.seed}")
    return choice(reply, index, content, tokens)

def failing_event(error):
    if str(error).endswith("14"):
        raise ZeroDivisionError("the event of an error")
    return as_event(error)

replies.Reply._choice, replies.as_event = failing_choice, failing_event
"""


@pytest.fixture
def parts(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "requests.py").write_text(FAILING_REQUESTS)
    (tmp_path / "replies.py").write_text(FAILING_REPLIES)
    return tmp_path


def slow_server(parts, *flags: str):
    return running(parts, "--part", f"scheduler={parts}/slow.py:Slow", *flags)


def failing_server(parts, part: str):
    return running(parts, "--part", f"{part.replace('=', f'={parts}/failing.py:')}")


class Clients:
    """Opens connections, which the fixture closes."""

    def __init__(self) -> None:
        self.open = ExitStack()

    def send(self, server: Running, path: str = COMPLETIONS, **fields) -> socket.socket:
        """A connection that waits for the answer to a long request."""
        connection = self.open.enter_context(server.connect())
        connection.sendall(raw_request(path, LONG | fields))
        return connection

    def stream(self, server: Running, path: str = COMPLETIONS, **fields):
        """A response of which the first chunk has arrived."""
        response = http.client.HTTPResponse(self.send(server, path, **fields, stream=True))
        self.open.callback(response.close)
        response.begin()
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        return response


@pytest.fixture
def clients():
    clients = Clients()
    with clients.open:
        yield clients


def rest_of(response) -> list[dict]:
    """The events that are still to come, without [DONE], which must be the last."""
    events = [event for event in response.read().decode().split("\n\n") if event.strip()]
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.strip().removeprefix("data: ")) for event in events]


def wait_for_exit(server: Running, seconds: float) -> int:
    return server.process.wait(seconds)


def no_traceback(server: Running) -> None:
    assert "Traceback" not in server.log.read_text(), server.log.read_text()


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_running_requests_finish_after_a_signal(parts, clients, how):
    with slow_server(parts) as server, ExitStack() as idle:
        for _ in range(3):  # connections that idle delay nothing
            idle.enter_context(server.connect())
        kept = idle.enter_context(server.connect())
        kept.sendall(raw_request("/health", b"", method="GET"))
        assert read_response(kept)[0] == 200
        half = idle.enter_context(server.connect())
        half.sendall(raw_request(COMPLETIONS, LONG)[:40])
        stream, whole = clients.stream(server, max_tokens=40), clients.send(server, max_tokens=40)
        time.sleep(0.1)
        server.process.send_signal(how)
        time.sleep(0.2)
        assert server.get("/health")[0] == 503
        status, reply = server.post(COMPLETIONS, LONG)
        assert (status, reply["error"]["type"]) == (503, "ServiceUnavailableError")
        assert server.post("/tokenize", {"prompt": "a"})[0] == 503
        assert rest_of(stream)[-1]["choices"][0]["finish_reason"] == "length"
        status, _, body = read_response(whole)
        assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 40)
        assert wait_for_exit(server, 5) == 0
        no_traceback(server)


def test_requests_are_aborted_after_the_grace_period(parts, clients):
    with slow_server(parts, "--grace", "0.3") as server:
        stream, whole = clients.stream(server), clients.send(server)
        half = clients.open.enter_context(server.connect())
        half.sendall(raw_request(COMPLETIONS, LONG)[:-5])
        clients.stream(server, logprobs=20, max_tokens=5)  # which no client reads
        time.sleep(0.2)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        error = rest_of(stream)[-1]["error"]
        assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
        status, headers, body = read_response(whole)
        assert (status, json.loads(body)["error"]["code"]) == (503, 503)
        assert "retry-after" in headers
        assert wait_for_exit(server, 10) == 0
        assert time.monotonic() - start < 8
        no_traceback(server)


def test_a_second_signal_ends_the_server_at_once(parts, clients):
    with slow_server(parts) as server:
        clients.stream(server)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert server.process.poll() is None
        start = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert wait_for_exit(server, 5) == 1
        assert time.monotonic() - start < 1
        no_traceback(server)


def test_a_signal_while_nothing_runs_ends_the_server_soon(parts, clients):
    with running(parts) as server:
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 3
        no_traceback(server)


# ---- addresses and deadlines ---------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid", "203.0.113.1"])
def test_an_unavailable_address_is_reported_in_one_sentence(host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "minipaged", "serve", "--host", host, "--port", port]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert port in line
    assert host in line


def test_a_request_that_takes_too_long_is_aborted(parts, clients):
    with slow_server(parts, "--request-timeout", "0.5") as server:
        stream = clients.stream(server)
        status, reply = server.post(COMPLETIONS, LONG)
        assert (status, reply["error"]["type"]) == (504, "TimeoutError")
        assert "0.5 seconds" in rest_of(stream)[-1]["error"]["message"]
        assert server.post(COMPLETIONS, LONG | {"max_tokens": 2})[0] == 200
        server.wait_until_idle()
        no_traceback(server)


# ---- parts that fail -----------------------------------------------------------------------------


def test_an_engine_that_fails_ends_every_request_and_the_server(parts, clients):
    with failing_server(parts, "scheduler=FailsInItsTwentiethStep") as server:
        stream, whole = clients.stream(server), clients.send(server)
        *chunks, last = rest_of(stream)
        assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks)
        error = last["error"]
        assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
        assert "the twentieth step" in error["message"]
        start = time.monotonic()
        while server.get("/health")[0] != 503:
            assert time.monotonic() - start < 1
        status, _, body = read_response(whole)
        assert (status, json.loads(body)["error"]["code"]) == (503, 503)
        status, reply = server.post(COMPLETIONS, LONG)
        assert (status, reply["error"]["type"]) == (503, "ServiceUnavailableError")
        assert server.post("/tokenize", {"prompt": "a"})[0] == 503
        assert wait_for_exit(server, 10) == 1
        assert server.log.read_text().count("Traceback") == 1  # that of the part


@pytest.mark.parametrize("part", ["scheduler=CannotAbort", "scheduler=CannotAdd"])
def test_a_part_that_fails_for_one_request_does_not_affect_others(parts, clients, part):
    with failing_server(parts, part) as server:
        if part.endswith("Add"):
            for stream in (False, True):
                status, reply = server.post(COMPLETIONS, LONG | {"stream": stream})
                assert (status, reply["error"]["type"]) == (500, "InternalServerError")
        else:
            other = clients.send(server, max_tokens=300)
            with server.connect() as leaving:
                leaving.sendall(raw_request(COMPLETIONS, LONG | {"stream": True}))
                leaving.recv(100)
            assert read_response(other)[0] == 200
            assert server.post(COMPLETIONS, LONG | {"max_tokens": 2})[0] == 200
            server.wait_until_idle()
        assert server.get("/health")[0] == 200
        assert server.stop() == 0


def test_an_allocator_that_cannot_free_ends_the_server(parts):
    with failing_server(parts, "allocator=CannotFree") as server:
        status, reply = server.post(COMPLETIONS, LONG | {"max_tokens": 2})
        assert (status, reply["error"]["code"]) == (503, 503)
        assert wait_for_exit(server, 10) == 1


CHAT = {"messages": [{"role": "user", "content": "Once"}], "prompt": None}


@pytest.mark.parametrize(
    ("part", "cause"),
    [
        ("requests.py:RaisesForItself", "ZeroDivisionError: its own code"),
        ("requests.py:BreaksItsLogits", "is nan"),
        ("replies.py:SamplingRequest", "ZeroDivisionError: the end of the reply"),
    ],
)
def test_a_reply_that_fails_half_way_is_an_error_and_others_go_on(parts, clients, part, cause):
    flags = ("--part", f"sampling_request={parts}/{part}", "--stream-interval", "0")
    with running(parts, *flags) as server:
        other = clients.stream(server, max_tokens=400)
        for path, fields in ((COMPLETIONS, {}), ("/v1/chat/completions", CHAT)):
            fields = {**fields, "max_tokens": 40, "seed": 13}
            *chunks, last = rest_of(clients.stream(server, path, **fields))
            assert (last["error"]["type"], last["error"]["code"]) == ("InternalServerError", 500)
            assert len(chunks) > 10
            assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks)
            status, reply = server.post(path, LONG | fields)
            assert (status, reply["error"]["type"]) == (500, "InternalServerError")
            status, reply = server.post(path, LONG | fields | {"seed": 12})
            assert (status, reply["usage"]["completion_tokens"]) == (200, 40)
        assert rest_of(other)[-1]["choices"][0]["finish_reason"] == "length"
        server.wait_until_idle()
        assert cause in server.log.read_text()


def test_a_stream_whose_error_cannot_be_sent_is_cut_off(parts, clients):
    part = f"sampling_request={parts}/replies.py:SamplingRequest"
    with running(parts, "--part", part) as server:
        other = clients.stream(server, max_tokens=400)
        with pytest.raises(http.client.IncompleteRead):
            clients.stream(server, max_tokens=40, seed=14).read()
        assert rest_of(other)[-1]["choices"][0]["finish_reason"] == "length"
        server.wait_until_idle()
