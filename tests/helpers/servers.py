"""Real server processes for tests, on free ports of the loopback interface."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

SECONDS_TO_START = 60.0


@dataclass
class Running:
    """A server process, and where it listens."""

    process: subprocess.Popen
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Status and text of a GET request."""
        return self.request(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, body: object, **headers: str) -> tuple[int, object]:
        """Status and JSON of a POST request; a body of bytes is sent as it is."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, data, headers, method="POST")
        status, text = self.request(request)
        return status, json.loads(text or "null")

    def request(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def stream(self, path: str, body: object) -> list[dict]:
        """The events of a stream, without [DONE], which must be the last."""
        data = json.dumps({**body, "stream": True}).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, data, headers), timeout=60
        ) as response:
            lines = [line for line in response.read().decode().split("\n\n") if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def metrics(self) -> dict[str, float]:
        """All values of /metrics by name and labels, without those of buckets."""
        _, text = self.get("/metrics")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        values = (line.rpartition(" ") for line in lines)
        return {
            name.replace('{model_name="storyteller"}', ""): float(value)
            for name, _, value in values
            if "_bucket" not in name
        }

    def wait_until_idle(self) -> dict[str, float]:
        """Wait until nothing runs, waits or holds a block; returns the metrics then."""
        for _ in range(200):
            found = self.metrics()
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            if not any(found[f"vllm:{name}"] for name in names):
                return found
            time.sleep(0.05)
        raise AssertionError(f"the server is not idle: {found}")

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """A connection on which a test may send what it likes."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def send_raw(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body of what answers these bytes."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_response(connection)

    def resources(self) -> tuple[int, int]:
        """How many files and threads the process has open (on Linux; else always the same)."""
        proc = Path(f"/proc/{self.process.pid}")
        if not proc.exists():
            return 0, 0
        return len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; returns the exit code."""
        self.process.send_signal(how)
        return self.process.wait(60)


def raw_request(
    path: str, body: object, *, method: str = "POST", length: int | None = None, **headers: str
) -> bytes:
    """The bytes of a request; `length` is its Content-Length, if that is false."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(len(data) if length is None else length),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + data


def read_response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (names in lower case) and body, which must have a Content-Length."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return response.status, headers, response.read()


@contextmanager
def running(folder: Path, *flags: str, ready: str = "press Ctrl-C") -> Iterator[Running]:
    """`minipaged serve` with these flags, ready; killed at the end if it still runs."""
    log = folder / f"server-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "minipaged", "serve", "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while ready not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"not ready: {log.read_text()}"
            time.sleep(0.05)
        url = next(word for word in log.read_text().split() if word.startswith("http"))
        yield Running(process, url.rstrip(";"), log)
    finally:
        process.kill()
        process.wait()
