"""`minipaged bench serve`: loads are as asked for, figures as defined, wrong responses found."""

import asyncio
import io
import json
import threading
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
from commands import minipaged
from rich.console import Console
from servers import running

pytest.importorskip("fastapi")

from minipaged.errors import InvalidOption
from minipaged.evaluation.bench import serve_fig12 as fig12
from minipaged.evaluation.bench.serve import How, run_once
from minipaged.evaluation.bench.serve_client import UNFINISHED, Client, Served, run_load
from minipaged.evaluation.bench.serve_health import large_bodies
from minipaged.evaluation.bench.serve_http import Connection, ServerUnusable, Target, ask_for_model
from minipaged.evaluation.bench.serve_load import LoadRequest, Workload
from minipaged.evaluation.bench.serve_offline import WrongTokens, check_tokens
from minipaged.evaluation.bench.serve_process import allow_many_files, as_flags
from minipaged.evaluation.bench.serve_report import Slo, summarize

BENCH = ("bench", "serve")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server"), "--max-num-seqs", "8") as server:
        yield server


def measured(capsys, monkeypatch, *flags: str) -> list[dict]:
    code, out, err = minipaged(capsys, monkeypatch, *BENCH, *flags, "--json")
    assert code == 0, err
    return json.loads(out)["rows"]


# ---- a real server -------------------------------------------------------------------------------


def test_all_requests_are_served_with_as_many_tokens_as_asked_for(capsys, monkeypatch, server):
    before = server.metrics()
    [row] = measured(
        capsys, monkeypatch, "--url", server.url, "--num-requests", "6", "--output-len", "5"
    )
    after = server.wait_until_idle()
    assert row["num_served"] == row["num_requests"] == 6
    assert (row["num_errors"], row["num_faulty"], row["num_rejected"]) == (0, 0, 0)
    warming = 4 * 5
    name = "vllm:generation_tokens_total"
    assert after[name] - before[name] == 6 * 5 + warming
    assert row["prompt_tokens"] == 6 * 64
    assert row["output_tokens_per_second"] == pytest.approx(30 / row["seconds"])
    assert row["tokens_per_second"] == pytest.approx((30 + 6 * 64) / row["seconds"])
    assert row["server_cpu_seconds"] > 0
    assert 0 < row["ttft"]["median"] <= row["ttft"]["p90"] <= row["ttft"]["p99"]


def test_every_rate_has_a_run_and_the_picture_is_written(capsys, monkeypatch, server, tmp_path):
    picture, saved = tmp_path / "rates.png", tmp_path / "rates.json"
    flags = ("--num-requests", "4", "--output-len", "4", "--slo-ttft-ms", "1e9")
    flags += ("--plot", str(picture), "--save", str(saved), "--request-rates", "50,100")
    code, out, _ = minipaged(capsys, monkeypatch, *BENCH, "--url", server.url, *flags)
    assert code == 0
    rows = json.loads(saved.read_text())["rows"]
    assert [row["rate"] for row in rows] == [50, 100]
    assert [row["goodput"] for row in rows] == [row["requests_per_second"] for row in rows]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_the_table_of_one_run_fits_into_80_columns(capsys, monkeypatch, server):
    flags = ("--num-requests", "3", "--output-len", "4", "--concurrency", "2")
    code, out, _ = minipaged(capsys, monkeypatch, *BENCH, "--url", server.url, *flags)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for part in ("TTFT", "TPOT", "ITL", "p99", "normalised latency", "3 of 3 served", "torch"):
        assert part in out


def test_a_shared_prefix_is_found_in_the_prefix_cache(capsys, monkeypatch, server):
    [row] = measured(
        capsys, monkeypatch, "--url", server.url, "--shared-prefix", "2x64", "--input-len", "16",
        "--output-len", "2", "--num-requests", "8", "--concurrency", "1", "--seed", "5",
    )  # fmt: skip
    assert row["prompt_tokens"] == 8 * 80
    assert row["cached_tokens"] == 6 * 64  # of each group, the first request computes it
    assert row["max_concurrency"] == 1


def test_a_csv_trace_brings_arrivals_and_lengths(capsys, monkeypatch, server, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,input,output\n10,20,3\n70,5,2\n11,2000,9\n")
    [row] = measured(
        capsys, monkeypatch, "--url", server.url, "--trace", str(trace), "--speed-up", "300"
    )
    assert row["num_served"] == 2  # one is longer than the context
    assert row["prompt_tokens"] == 25
    assert 0.2 <= row["seconds"] < 30


@pytest.mark.full
def test_a_server_that_is_full_is_counted_and_the_exit_code_is_0(capsys, monkeypatch, tmp_path):
    with running(tmp_path, "--max-queued", "1", "--max-num-seqs", "1") as small:
        [row] = measured(
            capsys, monkeypatch, "--url", small.url, "--num-requests", "12", "--output-len", "32"
        )
    assert row["num_rejected"] > 0
    assert row["num_errors"] == 0
    assert row["num_served"] + row["num_rejected"] == 12


def test_unfinished_requests_are_aborted_when_the_client_stops(server):
    requests = Workload(4, output_len=900, max_model_len=1024).requests(inf)

    async def load() -> list[Served]:
        facts = await ask_for_model(Target.of_url(server.url), None)
        target = replace(Target.of_url(server.url), model=facts.name)
        return await run_load(Client(target), requests, give_up=0.3)

    assert [each.error for each in asyncio.run(load())] == [UNFINISHED] * 4
    server.wait_until_idle()


@pytest.mark.full
def test_a_server_serves_1000_connections_at_once(capsys, monkeypatch, server):
    [row] = measured(
        capsys, monkeypatch, "--url", server.url, "--num-requests", "1000", "--input-len", "8",
        "--output-len", "2",
    )  # fmt: skip
    assert (row["num_served"], row["max_concurrency"]) == (1000, 1000)
    assert row["client_cpu_seconds"] < row["server_cpu_seconds"]


# ---- servers whose answers a test sets -----------------------------------------------------------


def chunk(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(*ids: int, ends: str | None = None) -> bytes:
    return chunk(choices=[{"text": "a", "token_ids": ids, "finish_reason": ends}], usage=None)


def usage(prompt: int, output: int) -> bytes:
    return chunk(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": output})


DONE = b"data: [DONE]\n\n"
WHOLE = token(1) + token(2, ends="length") + usage(3, 2) + DONE
TWO = LoadRequest(0.0, [11, 12, 13], 2)


def response(body: bytes, status: str = "200 OK", chunked: bool = True) -> bytes:
    head = f"HTTP/1.1 {status}\r\n".encode()
    if not chunked:
        return head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    pieces = (body[: len(body) // 2], body[len(body) // 2 :], b"")  # cut anywhere
    parts = [f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces]
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(parts)


@asynccontextmanager
async def answering(answer: bytes, after: float = 0.0):
    """A server that gives every request this answer; yields its address and its connections."""
    connections: list[int] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        number = len(connections) - 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(n for n in head.split(b"\r\n") if n.startswith(b"Content-Length"))
                await reader.readexactly(int(length.split()[1]))
                connections[number] += 1
                await asyncio.sleep(after)
                writer.write(answer)
                await writer.drain()
                if b"Connection: close" in head:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=2048)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Target("127.0.0.1", port, model="m"), connections


MODELS = b'{"data": [{"id": "m"}]}'


@contextmanager
def the_answering_thread(answer: bytes):
    """The same in a thread, for a command; yields the URL."""
    ready, url = threading.Event(), []
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with answering(answer) as (target, _):
            url.append(target.url)
            ready.set()
            await end.wait()

    end = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait()
    yield url[0]
    loop.call_soon_threadsafe(end.set)
    thread.join()
    loop.close()


def ask(answer: bytes, requests: list[LoadRequest], **how) -> tuple[list[Served], list[int]]:
    keep_alive, after = how.pop("keep_alive", False), how.pop("after", 0.0)

    async def load() -> tuple[list[Served], list[int]]:
        async with answering(answer, after) as (target, connections):
            client = Client(target, keep_alive)
            results = await run_load(client, requests, **how)
            client.close()
            return results, connections

    return asyncio.run(load())


WITHOUT_IDS = WHOLE.replace(b'"token_ids": [1], ', b"").replace(b'"token_ids": [2], ', b"")


@pytest.mark.parametrize("body", [WHOLE, WHOLE.replace(b"\n\n", b"\r\n\r\n"), WITHOUT_IDS])
def test_a_whole_response_is_good(body: bytes):
    [[served], _] = ask(response(body), [TWO])
    assert (served.error, served.fault) == (None, None)
    assert served.finished == served.chunk_times[-1]
    assert served.token_ids == ([] if body is WITHOUT_IDS else [1, 2])


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (token(1) + token(2, ends="length") + usage(3, 2), "does not end with [DONE]"),
        (WHOLE + token(3), "does not end with [DONE]"),
        (DONE + WHOLE, "does not end with [DONE]"),
        (token(1, 2, ends="length") + DONE, "no usage"),
        (token(1, ends="length") + usage(3, 2) + DONE, "1 token received, but the usage reports 2"),
        (
            token(1, ends="length") + usage(3, 1) + DONE,
            "2 tokens requested, but the usage reports 1",
        ),
        (token(1, 2, ends="length") + usage(4, 2) + DONE, "a prompt of 3 tokens"),
        (token(1, 2, ends="stop") + usage(3, 2) + DONE, "finish reasons are ['stop']"),
        (token(1, 2) + usage(3, 2) + DONE, "finish reasons are []"),
        (b"data: nonsense\n\n" + WHOLE, "an invalid chunk"),
        (chunk(other=1) + WHOLE, "an invalid chunk"),
    ],
)
def test_a_wrong_response_is_detected(body: bytes, fault: str):
    [[served], _] = ask(response(body), [TWO])
    assert served.fault is not None
    assert fault in served.fault
    row = summarize([served])
    assert (row.num_faulty, row.num_served, row.first_error) == (1, 0, served.fault)


@pytest.mark.parametrize(
    ("answer", "error", "is_rejected"),
    [
        (response(b"full", "429 Too Many Requests", chunked=False), "429: full", True),
        (response(b"oh", "500 Oh", chunked=False), "500: oh", False),
        (response(token(1) + chunk(error={"message": "it broke"}) + DONE), "it broke", False),
        (response(WHOLE)[:-30], "RemoteProtocolError", False),
        (b"", "RemoteProtocolError", False),
    ],
)
def test_a_request_that_is_not_served_is_an_error(answer: bytes, error: str, is_rejected: bool):
    [[served], _] = ask(answer, [TWO])
    assert error in str(served.error)
    row = summarize([served])
    assert (row.num_rejected, row.num_errors) == ((1, 0) if is_rejected else (0, 1))
    assert row.seconds_per_token is None


def test_a_missing_server_is_reported_in_one_sentence(capsys, monkeypatch):
    code, _, err = minipaged(capsys, monkeypatch, *BENCH, "--url", "http://127.0.0.1:9")
    assert code == 2
    assert "http://127.0.0.1:9 does not answer" in err


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (response(b"no", "404 No", chunked=False), "answers 404: no"),
        (response(b"[]", chunked=False), "is not a list of models"),
        (response(b'{"data": [{"id": "other"}]}', chunked=False), "serves 'other', not 'm'"),
    ],
)
def test_a_server_without_the_model_is_reported_in_one_sentence(answer: bytes, sentence: str):
    async def refused() -> None:
        async with answering(answer) as (target, _):
            await ask_for_model(target, "m")

    with pytest.raises(ServerUnusable, match=sentence):
        asyncio.run(refused())


def test_a_closed_load_keeps_so_many_requests_under_way():
    results, connections = ask(response(WHOLE), [TWO] * 9, concurrency=3, after=0.02)
    row = summarize(results)
    assert (row.num_served, row.max_concurrency, connections) == (9, 3, [1] * 9)
    assert results[-1].due >= results[0].due + 0.04  # a request is due when it can be sent


def test_connections_are_reused():
    _, connections = ask(response(WHOLE), [TWO] * 9, concurrency=3, keep_alive=True, after=0.01)
    assert len(connections) == 3
    assert sum(connections) == 9


def test_an_open_load_sends_each_request_when_it_is_due():
    requests = [replace(TWO, arrival=i / 50) for i in range(5)]
    results, _ = ask(response(WHOLE), requests, after=1.0)
    assert summarize(results).max_concurrency == 5
    gaps = [each.due - results[0].due for each in results]
    assert gaps == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    assert all(each.sent >= each.due for each in results)


def test_the_client_holds_1000_connections_at_once():
    allow_many_files()
    results, connections = ask(response(WHOLE), [TWO] * 1000, after=1.0)
    row = summarize(results)
    assert (row.num_served, len(connections)) == (1000, 1000)


# ---- figures -------------------------------------------------------------------------------------


def served(due: float, times: list[float], output_len: int, **fields) -> Served:
    each = Served(LoadRequest(0.0, [11] * 10, output_len), due, sent=due, chunk_times=times)
    each.finished = times[-1] if times else None
    for name, value in fields.items():
        setattr(each, name, value)
    return each


def test_normalised_latency_is_a_mean_of_ratios_not_a_ratio_of_means():
    row = summarize([served(0.0, [1.0, 2.0], 2), served(1.0, [2.0, 11.0], 100)])
    assert row.seconds_per_token == pytest.approx((2 / 2 + 10 / 100) / 2)
    assert not row.is_lower_bound


def test_latencies_and_throughput_are_as_defined():
    row = summarize([served(0.0, [0.5, 0.7, 1.0], 5), served(1.0, [1.1, 2.0], 2)])
    assert row.ttft.mean == pytest.approx((500 + 100) / 2)
    assert row.tpot.mean == pytest.approx((500 / 4 + 900 / 1) / 2)
    assert row.itl.median == pytest.approx(300)  # of 200, 300 and 900
    assert row.seconds == 2.0
    assert row.requests_per_second == 1.0
    assert row.output_tokens_per_second == 3.5
    assert row.tokens_per_second == 13.5


def test_latency_counts_from_when_a_request_was_due_not_from_when_it_was_sent():
    row = summarize([served(1.0, [3.0, 4.0], 2, sent=2.5)])
    assert row.ttft.mean == pytest.approx(2000)
    assert row.seconds_per_token == pytest.approx(3 / 2)
    assert row.lateness_ms == pytest.approx(1500)


def test_percentiles_are_values_that_occurred():
    row = summarize([served(0.0, [i / 1000], 1) for i in range(1, 101)])
    assert row.ttft.median == pytest.approx(50.5)
    assert (row.ttft.p90, row.ttft.p99) == pytest.approx((90, 99))
    assert row.tpot is None


def test_goodput_counts_requests_within_both_limits():
    results = [served(0.0, [0.1, 1.0], 2), served(0.0, [0.3, 1.0], 2), served(0.0, [0.1, 0.2], 2)]
    assert summarize(results).goodput is None
    assert summarize(results, Slo(ttft_ms=200)).goodput == 2.0
    assert summarize(results, Slo(ttft_ms=200, tpot_ms=500)).goodput == 1.0


def test_an_unfinished_request_counts_with_its_time_so_far():
    late = served(0.0, [1.0], 2, finished=None, error=UNFINISHED)
    row = summarize([served(0.0, [1.0, 4.0], 4), late])
    assert row.seconds_per_token == pytest.approx((4 / 4 + 4 / 2) / 2)
    assert (row.is_lower_bound, row.num_unfinished, row.num_errors) == (True, 1, 0)


# ---- loads ---------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process_that_the_seed_decides():
    many = Workload(4000, input_len=1, output_len=1)
    requests = many.requests(20.0)
    gaps = [b.arrival - a.arrival for a, b in pairwise(requests)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.05)
    # Exponential: the standard deviation is the mean.
    assert (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)
    assert requests == many.requests(20.0)
    assert requests != replace(many, seed=1).requests(20.0)
    assert [r.arrival for r in many.requests(10.0)] == [2 * r.arrival for r in requests]
    assert {r.arrival for r in many.requests(inf)} == {0.0}


def test_runs_have_the_same_lengths_and_prompts_of_their_own():
    varied = Workload(50, 40, 80, spread=1.0, max_model_len=512)
    one, two = varied.requests(1.0, 1), varied.requests(1.0, 2)
    lengths = [(len(r.prompt), r.output_len) for r in one]
    assert lengths == [(len(r.prompt), r.output_len) for r in two]
    assert len(set(lengths)) > 30
    assert all(sum(each) <= 512 for each in lengths)
    assert not {tuple(r.prompt) for r in one} & {tuple(r.prompt) for r in two}
    assert all(10 <= token < 500 for r in one for token in r.prompt)


def test_requests_of_a_group_share_its_prefix_and_nothing_else():
    requests = Workload(6, 16, 4, prefix_groups=2, prefix_len=32).requests(1.0)
    assert {len(r.prompt) for r in requests} == {48}
    prefixes = [tuple(r.prompt[:32]) for r in requests]
    assert len(set(prefixes)) == 2
    assert prefixes[0] == prefixes[2] == prefixes[4]
    assert len({tuple(r.prompt[32:]) for r in requests}) == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"input_len": 60, "output_len": 60, "prefix_groups": 1, "prefix_len": 9},
        {"input_len": 40, "output_len": 40, "spread": 0.5},
        {"input_len": 4, "output_len": 40, "spread": 0.5},
    ],
)
def test_a_workload_that_does_not_fit_is_refused(fields):
    with pytest.raises(InvalidOption):
        Workload(max_model_len=128, **fields)


# ---- against the offline engine, and Figure 12 ---------------------------------------------------


def test_the_server_is_compared_with_the_same_tokens_offline(capsys, monkeypatch):
    monkeypatch.setenv("MINIPAGED_API_KEY", "that of another server")
    code, out, err = minipaged(
        capsys, monkeypatch, *BENCH, "--against-offline", "--num-requests", "3", "--output-len",
        "4", "--rounds", "2", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)["comparison"]
    ratios = [each["server_cpu"] / each["offline_cpu"] for each in found["rounds"]]
    assert found["cpu_ratio"] == pytest.approx(sum(ratios) / 2)
    assert found["num_requests"] == 9
    assert found["idle_server_ms"] > 0
    assert found["idle_offline_ms"] > 0


class Judge:
    """An offline process that only reports the time between two tokens."""

    def __init__(self, gap: float) -> None:
        self.gap = gap
        self.asked: list[dict] = []

    def ask(self, do: str, **given):
        assert do == "gap"
        self.asked.append(given)
        return {"gap": self.gap}


def test_other_tokens_than_offline_are_an_error_unless_rounding_chose():
    results = [served(0.0, [1.0], 3, token_ids=[1, 2, 3]) for _ in range(2)]
    assert check_tokens(Judge(9.0), results, [[1, 2, 3]] * 2) == 0
    judge = Judge(1e-5)
    assert check_tokens(judge, results, [[1, 2, 3], [1, 5, 3]]) == 1
    assert judge.asked == [{"prompt": [11] * 10 + [1], "tokens": [2, 5]}]
    with pytest.raises(WrongTokens, match="request 1: token 1 is 2 from the server"):
        check_tokens(Judge(0.5), results, [[1, 2, 3], [1, 5, 3]])
    results[1].error = "429: full"
    with pytest.raises(WrongTokens, match="not served: 429"):
        check_tokens(Judge(0.0), results, [[1, 2, 3]] * 2)


def test_memories_are_measured_in_turn_and_written_above_the_plot(monkeypatch, server):
    started: list[dict] = []

    @contextmanager
    def the_same_server(options):
        started.append(options)
        yield Target.of_url(server.url)

    monkeypatch.setattr(fig12, "running_server", the_same_server)
    monkeypatch.setattr(fig12, "TOP", 0.0)  # so that the first rate is enough
    monkeypatch.setattr(fig12, "PATIENCE", 1000.0)
    systems = ("vllm", "orca-max")
    said: list[str] = []
    rows = asyncio.run(fig12.measure([8.0, 4.0], 1.0, note=said.append, systems=systems))
    assert [each["memory"] for each in started] == ["paged", "contiguous-max"]
    assert len({json.dumps({**each, "memory": ""}) for each in started}) == 1
    assert [line.split(",")[0] for line in said[2:]] == ["4 requests per second"] * 2
    assert list(rows) == list(systems)
    for system, found in rows.items():
        assert [row.rate for row in found] == [4.0]
        assert found[0].memory == fig12.MEMORY[system]
        assert found[0].num_served == found[0].num_requests == 4
    table = Console(width=80, file=io.StringIO())
    table.print(fig12.as_table(rows))
    assert "paged" in table.file.getvalue()
    assert max(map(len, table.file.getvalue().splitlines())) <= 80


@pytest.mark.full
def test_figure_12_is_served_by_all_five_kinds_of_memory(capsys, monkeypatch, tmp_path):
    picture = tmp_path / "fig12.png"
    rows = measured(
        capsys, monkeypatch, "--figure-12", "--request-rates", "2", "--seconds", "1",
        "--plot", str(picture),
    )  # fmt: skip
    assert [row["memory"] for row in rows] == list(fig12.MEMORY.values())
    assert all(row["num_served"] + row["num_unfinished"] == 2 for row in rows)
    assert picture.exists()


def test_every_system_of_the_simulator_is_served_from_a_memory_of_its_own():
    assert list(fig12.MEMORY) == list(fig12.SYSTEMS)
    assert len(set(fig12.MEMORY.values())) == len(fig12.MEMORY)


def test_the_sustained_rate_is_where_the_latency_crosses():
    flat = summarize([served(0.0, [0.1], 1)])
    rows = [
        replace(flat, rate=2.0, seconds_per_token=0.01),
        replace(flat, rate=4.0, seconds_per_token=0.03),
        replace(flat, rate=8.0, seconds_per_token=0.07),
    ]
    assert fig12.sustained(rows, at=0.05) == pytest.approx(6.0)
    assert fig12.sustained(rows, at=0.5) is None
    assert fig12.sustained(rows[2:], at=0.05) == pytest.approx(8 * 5 / 7)


def test_a_memory_that_sustains_every_rate_is_shown_with_a_lower_bound():
    flat = replace(summarize([served(0.0, [0.1], 1)]), rate=4.0, seconds_per_token=0.01)
    slow = replace(flat, seconds_per_token=0.1)
    table = Console(width=80, file=io.StringIO())
    table.print(fig12.as_table({"vllm": [flat], "orca-max": [slow]}))
    *_, bears, ratios = table.file.getvalue().splitlines()
    assert bears.split()[-2:] == [">4", "2.0"]
    assert ratios.split()[-2:] == [">2.00", "x"]


# ---- options -------------------------------------------------------------------------------------


def test_engine_options_become_flags_of_the_server():
    options = {"num_blocks": 9, "block_size": 16, "enable_prefix_caching": False, "dtype": "auto"}
    assert as_flags(options) == ["--num-blocks", "9", "--no-enable-prefix-caching"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--request-rate", "0"), "above 0"),
        (("--request-rate", "nan"), "above 0"),
        (("--request-rates", "1,x"), "numbers with commas"),
        (("--request-rates", "1,inf"), "cannot contain inf"),
        (("--request-rate", "1", "--request-rates", "1,2"), "exclude each other"),
        (("--request-rate", "1", "--concurrency", "2"), "--request-rate would be ignored"),
        (("--shared-prefix", "8"), "groups x tokens"),
        (("--shared-prefix", "0x8"), "groups x tokens"),
        (("--trace", "a.csv", "--spread", "1"), "--spread would be ignored"),
        (("--speed-up", "2"), "--speed-up has no effect without --trace"),
        (("--rounds", "2"), "--rounds has no effect without --against-offline"),
        (("--seconds", "2"), "--seconds has no effect without --figure-12"),
        (("--api-key", "k"), "--api-key has no effect without --url"),
        (("--plot", "a.png"), "several request rates: give them with --request-rates"),
        (("--plot", "a.txt", "--request-rates", "1,2"), "a file that ends in"),
        (("--save", "no/such/folder/a.json"), "there is no folder"),
        (("--url", "here"), "give a server's address"),
        (("--url", "http://a", "--num-blocks", "9"), "--num-blocks would be ignored"),
        (("--figure-12", "--num-blocks", "9"), "--num-blocks would be ignored"),
        (("--against-offline", "--url", "http://a"), "--url would be ignored"),
        (("--model", "no-such-model"), "the server has not started"),
    ],
)
def test_invalid_arguments_are_refused_in_one_sentence(capsys, monkeypatch, flags, sentence):
    code, _, err = minipaged(capsys, monkeypatch, *BENCH, *flags)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "key"), [((), "from the environment"), (("--api-key", "k"), "k")]
)
def test_the_key_is_sent_with_every_request(capsys, monkeypatch, flags, key):
    keys: list[str] = []
    real = Connection.send

    async def send(self, method, path, headers, body=b""):
        keys.append(dict(headers)["Authorization"])
        return await real(self, method, path, headers, body)

    monkeypatch.setenv("MINIPAGED_API_KEY", "from the environment")
    monkeypatch.setattr(Connection, "send", send)
    with the_answering_thread(response(MODELS, chunked=False)) as url:
        minipaged(capsys, monkeypatch, *BENCH, "--url", url, *flags, "--num-requests", "1")
    assert len(keys) > 2
    assert set(keys) == {f"Bearer {key}"}


def test_requests_longer_than_the_context_are_refused(capsys, monkeypatch, server):
    flags = ("--url", server.url, "--input-len", "1000", "--output-len", "25")
    code, _, err = minipaged(capsys, monkeypatch, *BENCH, *flags)
    assert code == 2
    assert "a request has 1025 tokens, prompt and output together, but the model supports" in err


def test_a_run_with_a_wrong_response_exits_with_1(capsys, monkeypatch, server):
    real = Client._body

    def forged(self, request):
        return real(self, replace(request, output_len=request.output_len + 1))

    monkeypatch.setattr(Client, "_body", forged)
    code, _, err = minipaged(
        capsys, monkeypatch, *BENCH, "--url", server.url, "--num-requests", "2", "--output-len",
        "3",
    )  # fmt: skip
    assert code == 1
    assert "3 tokens requested, but the usage reports 4" in err


def test_the_wall_clock_of_a_run_is_its_own(server):
    async def both():
        facts = await ask_for_model(Target.of_url(server.url), None)
        target = replace(Target.of_url(server.url + "/v1/"), model=facts.name)
        requests = Workload(2, 16, 3).requests(inf, run=9)
        return await run_once(target, requests, How(), rate=None)

    row, results = asyncio.run(both())
    assert row.num_served == 2
    assert row.client_cpu_seconds > 0
    assert [len(each.token_ids) for each in results] == [3, 3]


@pytest.mark.full
def test_health_is_measured_with_each_kind_of_large_body(capsys, monkeypatch):
    code, out, _ = minipaged(
        capsys, monkeypatch, "bench", "health", "--num-streams", "2", "--num-bodies", "1", "--json"
    )
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["handles"] for row in rows] == list(large_bodies())
    assert all(0 < row["median_ms"] <= row["p99_ms"] for row in rows)
