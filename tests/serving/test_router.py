"""vllm-router before two servers: where requests go, and what a server's death costs.

What clients rely on is tested through the router as well, in test_clients.py. Skipped without the
package vllm-router.
"""

import time
from pathlib import Path

import pytest
from routers import OpenStream, serve_load, two_servers, vllm_router
from servers import Running

pytest.importorskip("vllm_router")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("routers")


def test_cache_aware_routing_finds_more_prefixes_than_round_robin(folder: Path):
    """A server's pool holds five of the eight system prompts."""
    hits = {}
    for policy in ("round_robin", "cache_aware"):
        with (
            two_servers(folder, "--max-num-seqs", "4", "--num-blocks", "140") as servers,
            vllm_router(folder, servers, policy) as router,
        ):
            hits[policy], spread = serve_load(router, servers)
            assert sum(spread) == 256
            assert min(spread) >= 256 / 4, f"{policy} sent {spread} requests to the two servers"
    assert hits["cache_aware"] >= 1.5 * hits["round_robin"], hits


def test_the_death_of_a_server_ends_only_its_own_streams(folder: Path):
    with (
        two_servers(folder, "--max-num-seqs", "8") as (doomed, other),
        vllm_router(folder, (doomed, other), "round_robin") as router,
    ):
        streams = [OpenStream(router) for _ in range(6)]
        assert all(stream.began.wait(30) for stream in streams)
        lost = int(doomed.metrics()["vllm:num_requests_running"])
        assert lost == 3
        doomed.process.kill()
        for stream in streams:
            stream.join(120)
        assert sum(stream.is_whole for stream in streams) == len(streams) - lost
        other.wait_until_idle()
        answer_again(router)


def answer_again(router: Running, patience: float = 30.0) -> None:
    """Wait until ten requests in a row are served: those to the dead server are sent again."""
    body = {"model": "storyteller", "prompt": "Once upon a time", "max_tokens": 2}
    deadline, in_a_row = time.monotonic() + patience, 0
    while in_a_row < 10:
        assert time.monotonic() < deadline, router.log.read_text()[-2000:]
        try:
            status, _ = router.post("/v1/completions", body)
        except ValueError:  # the router's own error is no JSON
            status = 0
        in_a_row = in_a_row + 1 if status == 200 else 0
