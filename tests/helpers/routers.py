"""Routers before real servers, and the load that judges them."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from servers import Running, running

from minipaged.labs.routing.load import NUM_OPEN, NUM_TOKENS, requests

SECONDS_TO_START = 60.0


@contextmanager
def two_servers(folder: Path, *flags: str) -> Iterator[list[Running]]:
    """Two equal servers, ready."""
    with ExitStack() as stack:
        yield [stack.enter_context(running(folder, *flags)) for _ in range(2)]


@contextmanager
def vllm_router(folder: Path, servers: Sequence[Running], policy: str) -> Iterator[Running]:
    """`vllm-router` before these servers, ready; killed at the end."""
    log, port = folder / f"router-{time.monotonic_ns()}.log", free_port()
    command = [
        *(sys.executable, "-m", "vllm_router.launch_router", "--policy", policy),
        *("--port", str(port), "--prometheus-port", str(free_port())),
        *("--worker-urls", *(server.url for server in servers)),
    ]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    router = Running(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_for(router)
        yield router
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port on which no process listens: the router cannot be told to choose one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(router: Running) -> None:
    """Wait until a router answers."""
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        assert router.process.poll() is None, router.log.read_text()
        assert time.monotonic() < deadline, f"not ready: {router.log.read_text()}"
        try:
            if router.get("/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)


def serve_load(router: Running, servers: Sequence[Running]) -> tuple[int, list[int]]:
    """8 system prompts x 32 requests through a router.

    Returns the prompt tokens found in prefix caches, and the requests by server.
    """

    def ask(request: tuple[str, str]) -> int:
        messages = [{"role": "system", "content": request[0]}]
        messages += [{"role": "user", "content": request[1]}]
        body = {"messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0}
        return router.post("/v1/chat/completions", {"model": "storyteller", **body})[0]

    before = [server.metrics() for server in servers]
    with ThreadPoolExecutor(NUM_OPEN) as clients:
        statuses = list(clients.map(ask, requests()))
    assert statuses == [200] * len(statuses)
    after = [server.wait_until_idle() for server in servers]

    def growth(name: str) -> list[int]:
        return [int(now[name] - then[name]) for now, then in zip(after, before, strict=True)]

    hits = sum(growth("vllm:prefix_cache_hits_total"))
    return hits, growth("vllm:request_prompt_tokens_count")


class OpenStream(threading.Thread):
    """A long completion whose events are read as they arrive."""

    def __init__(self, router: Running) -> None:
        super().__init__(daemon=True)
        self.router = router
        self.began = threading.Event()
        self.is_whole = False
        self.response: Any = None
        self.start()

    def run(self) -> None:
        body = {
            "model": "storyteller", "prompt": "Once upon a time", "max_tokens": 900,
            "stream": True, "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        request = urllib.request.Request(
            self.router.url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as self.response:
                for line in self.response:
                    self.began.set()
                    self.is_whole = line.strip() == b"data: [DONE]" or self.is_whole
        except (OSError, ValueError):
            pass  # the connection broke, as it may

    def leave(self) -> None:
        """Close the connection, as a client does that is no longer interested."""
        self.response.fp.raw._sock.shutdown(socket.SHUT_RDWR)
