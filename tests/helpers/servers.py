"""Real server processes for tests, on free ports of the loopback interface."""

import json
import os
import signal
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

    def stop(self) -> int:
        """Send SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


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
