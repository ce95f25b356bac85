"""The live view: what viewers get, who may watch, and what the page shows of a real server."""

import asyncio
import json
import os
import shutil
import socket
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from playing import play_in_node
from servers import Running, running

from minipaged import LLM, SamplingParams
from minipaged.engine.parts import Parts
from minipaged.errors import EngineDead, InvalidOption
from minipaged.serving import live_view
from minipaged.serving.async_engine import AsyncEngine
from minipaged.serving.live_pages import MOST_VIEWERS, refuse_viewer
from minipaged.serving.live_view import LiveView
from minipaged.serving.run import serve
from minipaged.serving.settings import ServerArgs
from minipaged.tracing.events import EventLog

STORY = {"model": "storyteller", "prompt": "Once upon a time", "ignore_eos": True}
SLOW = Path(__file__).parents[1] / "helpers" / "slow_parts.py"
SMALL = (
    *("--viz", "--num-blocks", "24", "--max-num-seqs", "6", "--enable-prefix-caching"),
    *("--part", f"scheduler={SLOW}:SlowScheduler"),
)
HOSTILE = '<img src=x>{{live.js}}"&'


class Viewer:
    """A client of /viz/events that keeps each message, in a thread of its own."""

    def __init__(self, server: Running, query: str = "") -> None:
        self.messages: list[tuple[str, dict]] = []
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        request = f"GET /viz/events{query} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        self.socket.sendall(request.encode())
        self.file = self.socket.makefile("rb")
        self.status = int(self.file.readline().split()[1])
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        kind = ""
        try:
            for raw in self.file:
                name, _, value = raw.decode().rstrip("\r\n").partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    self.messages.append((kind, json.loads(value)))
        except (OSError, ValueError):
            pass  # closed

    def wait_for(self, is_there, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not is_there(self):
            assert time.monotonic() < deadline, self.messages[-2:]
            time.sleep(0.02)

    def events(self) -> list[dict]:
        """All events in order, as a trace has them."""
        events: list[dict] = []
        for kind, data in list(self.messages):
            events += [data] if kind == "snapshot" else data["events"]
        return events

    def done(self) -> list[dict]:
        return [one for kind, data in list(self.messages) if kind == "step" for one in data["done"]]

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def in_background(server: Running, **body: object) -> threading.Thread:
    thread = threading.Thread(target=server.post, args=("/v1/completions", {**STORY, **body}))
    thread.start()
    return thread


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with running(folder, *SMALL, "--served-model-name", HOSTILE) as server:
        STORY["model"] = HOSTILE
        yield server
        STORY["model"] = "storyteller"


@pytest.fixture(scope="module")
def server_with_key(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_key")
    with running(folder, "--viz", "--api-key", "a b", "--cors-origin", "*") as server:
        yield server


# ---- what viewers get ----------------------------------------------------------------------------


def test_a_late_viewer_sees_the_same_pool_as_an_early_one(server: Running):
    with closing(Viewer(server)) as early:
        early.wait_for(lambda viewer: viewer.messages)
        threads = [in_background(server, n=n, max_tokens=110, seed=n) for n in (1, 2, 1, 2)]
        early.wait_for(lambda viewer: len(viewer.messages) > 20)
        with closing(Viewer(server)) as late:
            for thread in threads:
                thread.join()
            for viewer in (early, late):
                viewer.wait_for(
                    lambda viewer: viewer.done() and viewer.done()[-1:] and is_idle(viewer)
                )
            traces = [early.events(), late.events()]
    assert traces[1][0]["event"] == "snapshot"
    assert traces[1][0]["step"] > traces[0][0]["step"]
    assert traces[1][0]["block_tables"]  # it begins while blocks are in use
    played = [{state["step"]: state for state in one["states"]} for one in play_in_node(traces)]
    assert len(played[1]) > 10
    for step, state in played[1].items():
        for name in ("sequences", "refCounts", "held", "holders", "cached", "queues"):
            assert state[name] == played[0][step][name], f"{name} in step {step}"
    assert not state["sequences"]


def is_idle(viewer: Viewer) -> bool:
    [state] = play_in_node([viewer.events()])
    return not state["states"][-1]["sequences"]


def test_a_viewer_gets_the_numbers_of_steps_and_of_requests_that_end(server: Running):
    with closing(Viewer(server)) as viewer:
        viewer.wait_for(lambda viewer: viewer.messages)
        in_background(server, max_tokens=5).join()
        viewer.wait_for(Viewer.done)
        [done] = viewer.done()
        steps = [data for kind, data in viewer.messages if kind == "step"]
    assert (done["reason"], done["output_tokens"]) == ("length", 5)
    assert 0 < done["ttft"] <= done["seconds"]
    assert sum(step.get("sampled", 0) for step in steps) == 5
    assert {step["sequences"] for step in steps} == {1}
    assert max(step["blocks"] for step in steps) > 0


def test_a_server_stops_at_once_even_with_viewers(tmp_path):
    with running(tmp_path, "--viz") as server, closing(Viewer(server)) as viewer:
        viewer.wait_for(lambda viewer: viewer.messages)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 4
        assert "Error" not in server.log.read_text()


def test_the_number_of_viewers_is_limited(server: Running):
    viewers = [Viewer(server) for _ in range(MOST_VIEWERS)]
    for viewer in viewers:
        viewer.wait_for(lambda viewer: viewer.messages)
    assert server.get("/viz/events")[0] == 429
    viewers.pop().close()
    for _ in range(100):
        with closing(Viewer(server)) as one_more:
            if one_more.status == 200:
                break
        time.sleep(0.05)
    assert one_more.status == 200
    for viewer in viewers:
        viewer.close()


# ---- without a socket ----------------------------------------------------------------------------


class Watched:
    """An engine that can be watched, in this process."""

    def __init__(self) -> None:
        self.log = EventLog()
        llm = LLM("storyteller", parts=Parts().traced(self.log), num_blocks=64)
        self.view = LiveView(llm.engine, self.log)
        self.llm = llm
        self.most_kept = 0
        self.engine = AsyncEngine(llm.engine, max_queued=8, observers=[self._observe])

    def _observe(self, progresses) -> None:
        self.view.note_progress(progresses)
        kept = self.view.ring.since(self.view.ring.first)
        self.most_kept = max(self.most_kept, sum(len(step.events) for step in kept))

    async def generate(self, num_tokens: int) -> None:
        from minipaged.engine.arrivals import check_request

        engine = self.llm.engine
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        request = check_request("Once", params, engine.traits, engine.config.max_logprobs)
        stream = await self.engine.serve(lambda: [request], 1)
        await stream.results()
        stream.close()


def kind_of(message: bytes) -> str:
    lines = message.decode().splitlines()
    return next(line for line in lines if line.startswith("event: ")).removeprefix("event: ")


def test_a_slow_viewer_restarts_and_memory_stays_bounded(monkeypatch):
    monkeypatch.setattr(live_view, "MOST_EVENTS", 60)

    async def run() -> None:
        watched = Watched()
        slow, quick = (watched.view.messages(watched.engine) for _ in range(2))
        assert kind_of(await anext(slow)) == "snapshot"
        assert kind_of(await anext(quick)) == "snapshot"
        await watched.generate(4)
        assert kind_of(await anext(quick)) == "step"
        for _ in range(5):
            await watched.generate(20)
        assert 0 < watched.most_kept <= 60
        assert kind_of(again := await anext(slow)) == "snapshot"
        assert json.loads(again.decode().splitlines()[-2].removeprefix("data: "))["step"] > 50
        await watched.generate(4)
        assert kind_of(await anext(slow)) == "step"
        await slow.aclose()
        await quick.aclose()
        await watched.engine.close(0)

    asyncio.run(run())


def test_viewers_that_have_left_cost_nothing():
    async def run() -> None:
        watched = Watched()
        await watched.generate(3)
        assert watched.log.listeners == []
        messages = watched.view.messages(watched.engine)
        await anext(messages)
        assert len(watched.log.listeners) == 1
        await messages.aclose()
        assert watched.view.num_viewers == 0
        await watched.generate(3)
        assert watched.log.listeners == []
        assert watched.view.ring.since(watched.view.ring.first) == []
        await watched.engine.close(0)

    asyncio.run(run())


def test_viewers_are_disconnected_when_the_engine_dies(monkeypatch):
    async def run() -> None:
        watched = Watched()
        messages = watched.view.messages(watched.engine)
        await anext(messages)
        monkeypatch.setattr(watched.llm.engine, "step", lambda: 1 // 0)
        with pytest.raises(EngineDead):
            await watched.generate(3)
        assert [message async for message in messages] == []
        assert watched.view.num_viewers == 0
        late = watched.view.messages(watched.engine)
        assert [message async for message in late] == []

    asyncio.run(run())


def test_a_failure_between_two_steps_affects_only_its_caller():
    async def run() -> None:
        watched = Watched()
        with pytest.raises(ZeroDivisionError):
            await watched.engine.between_steps(lambda: 1 // 0)
        assert (
            await watched.engine.between_steps(lambda: threading.current_thread().name) == "engine"
        )
        await watched.generate(3)
        await watched.engine.close(0)

    asyncio.run(run())


def test_a_message_to_an_engine_that_dies_before_reading_it_fails(monkeypatch):
    async def run() -> None:
        watched = Watched()
        started, go_on = threading.Event(), threading.Event()

        def die() -> None:
            started.set()
            go_on.wait(10)
            raise ValueError("in a step")

        monkeypatch.setattr(watched.llm.engine, "step", die)
        generating = asyncio.create_task(watched.generate(3))
        await asyncio.to_thread(started.wait, 10)
        unread = asyncio.create_task(watched.engine.between_steps(lambda: "read"))
        await asyncio.sleep(0)  # the message is sent
        go_on.set()
        for ended in (generating, unread):
            with pytest.raises(EngineDead, match="ValueError: in a step"):
                await asyncio.wait_for(ended, 10)

    asyncio.run(run())


def test_a_server_that_is_not_traced_refuses_to_show_its_pool():
    with pytest.raises(InvalidOption, match="viz needs the EventLog"):
        serve(LLM("storyteller"), ServerArgs(viz=True))


# ---- who may watch -------------------------------------------------------------------------------

PATHS = ("/viz", "/viz/events")


@pytest.mark.parametrize(
    ("client", "host", "allowed"),
    [
        ("127.0.0.1", "localhost:8000", True),
        ("127.8.9.1", "LOCALHOST.", True),
        ("::1", "[::1]:8000", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "evil.example:8000", False),  # DNS rebinding
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "", False),
        ("192.168.1.5", "localhost", False),
        ("::ffff:192.168.1.5", "localhost", False),
        (None, "localhost", False),
    ],
)
def test_without_a_key_only_local_clients_may_watch(client, host, allowed):
    headers = [(b"host", host.encode())]
    scope = {"client": client and (client, 5), "headers": headers, "query_string": b"key=x"}
    refusal = refuse_viewer(scope, None)
    assert (refusal is None) == allowed
    assert allowed or refusal.status_code == 403


@pytest.mark.parametrize("path", PATHS)
def test_with_a_key_only_its_holders_may_watch(path, server_with_key: Running):
    if path == "/viz":
        for query in ("?key=a%20b", "?key=a+b"):
            assert server_with_key.get(path + query)[0] == 200
        assert server_with_key.get(path, Authorization="Bearer a b")[0] == 200
    for query in ("", "?key=", "?key=ab", "?kez=a+b", "?key=a+b+c", "?key=%FF"):
        status, text = server_with_key.get(path + query)
        assert (status, "key=ab" in text) == (401, False)
    assert server_with_key.get(path, Authorization="Bearer x")[0] == 401
    assert server_with_key.get("/v1/models?key=a+b")[0] == 401  # a key in an address opens no more


def test_the_key_in_an_address_is_not_passed_on(server_with_key: Running):
    with closing(Viewer(server_with_key, "?key=a+b")) as viewer:
        viewer.wait_for(lambda viewer: viewer.messages)
        assert viewer.status == 200
    assert "a+b" not in server_with_key.log.read_text()
    request = urllib.request.Request(
        f"{server_with_key.url}/viz?key=a+b", headers={"Origin": "https://evil.example"}
    )
    with urllib.request.urlopen(request) as response:
        headers = response.headers
        assert "a+b" not in response.read().decode()
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Access-Control-Allow-Origin"] is None  # though cors_origin is *


def test_a_foreign_host_name_is_refused(server: Running):
    for path in PATHS:
        status, text = server.get(path, Host="evil.example")
        assert status == 403
        assert "only this machine may watch" in text


@pytest.mark.parametrize("path", PATHS)
def test_without_the_option_there_is_no_live_view(path, plain_server: Running):
    assert plain_server.get(path)[0] == 404


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("plain")) as server:
        yield server


def test_the_live_view_is_only_read(server: Running):
    for path in PATHS:
        assert server.post(path, {})[0] == 405


def test_the_page_refers_to_nothing_outside_itself(server: Running):
    status, page = server.get("/viz")
    assert status == 200
    assert "<img" not in page
    assert "&lt;img src=x&gt;{{live.js}}&quot;&amp;" in page
    assert page.replace("http://www.w3.org/2000/svg", "").count("://") == 0


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium on this machine: name one in CHROMIUM")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser):
    """Opens the live page; at the end there must have been no request elsewhere and no error."""
    complaints: list[str] = []
    contexts = []

    def open_it(server: Running, query: str = "", **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text))
        page.on("request", lambda one: ours(one.url, server) or complaints.append(one.url))
        page.goto(f"{server.url}/viz{query}")
        wait_for_status(page, "Live")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not [said for said in complaints if "ERR_" not in said]  # a server that is away


def ours(url: str, server: Running) -> bool:
    return url.startswith((f"{server.url}/viz", "data:"))


def wait_for_status(page, text: str) -> None:
    page.locator("#status", has_text=text).wait_for(timeout=60_000)


def wait_until(page, expression: str) -> None:
    """The page forbids `eval`, which Playwright's own waiting needs."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)


def test_the_page_shows_a_request_run_and_end(open_page, server: Running):
    page = open_page(server)
    thread = in_background(server, max_tokens=220)
    page.locator("#running li").wait_for()
    wait_until(page, "document.querySelectorAll('#pools .held').length > 3")
    [letter] = page.locator("#running .chip").all_inner_texts()
    assert set(page.locator("#pools .held .owner").all_inner_texts()) == {letter}
    thread.join()
    page.locator("#done li", has_text="220 tokens").wait_for()
    page.locator("#running li").wait_for(state="detached")
    assert page.locator("#done .chip").first.inner_text() == letter
    assert page.locator("#pools .held").count() == 0
    assert page.locator("#pools .idle").count() > 3
    assert page.locator("h1").inner_text() == HOSTILE
    wait_until(page, "window.live.numKnown() === 0")  # nothing adds up
    wait_until(page, "document.querySelectorAll('#curves svg[aria-label*=now]').length === 4")
    labels = page.locator("#curves svg").evaluate_all("all => all.map(svg => svg.ariaLabel)")
    assert [label.split(" in the")[0] for label in labels] == [
        "KV usage", "Batch size", "TTFT", "Tokens per second",
    ]  # fmt: skip


def test_requests_that_are_aborted_together_leave_the_page(open_page, server: Running):
    """No step follows that would tell of the queues, and the waiting one gives no block back."""
    page = open_page(server)
    runs = ask_and_leave(server, max_tokens=200, n=6)
    page.locator("#running li").wait_for()
    waits = ask_and_leave(server, max_tokens=9)
    page.locator("#waiting li").wait_for()
    for client in (runs, waits):
        client.close()
    page.locator("#done li", has_text="aborted").nth(1).wait_for()
    for queue in ("waiting", "running"):
        page.locator(f"#{queue} li").wait_for(state="detached")


def ask_and_leave(server: Running, **body: object) -> socket.socket:
    """A client that has sent a request, and closes its connection to abort it."""
    client = socket.create_connection(("127.0.0.1", server.port))
    text = json.dumps({**STORY, **body})
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
    return client


def test_two_pages_show_the_same_letters_and_blocks(open_page, server: Running):
    early = open_page(server)
    thread = in_background(server, max_tokens=150)
    early.locator("#running li").wait_for()
    late = open_page(server)
    in_background(server, max_tokens=200, n=4).join()  # some of the first one's blocks are evicted
    thread.join()
    shown = (
        "[...document.querySelectorAll('#pools .block')].map(b => [b.dataset.place, b.ariaLabel, "
        "b.innerText])"
    )
    for page in (early, late):
        page.locator("#running li").wait_for(state="detached")
        wait_until(page, "document.querySelectorAll('.block.changed').length === 0")
    assert early.evaluate(shown) == late.evaluate(shown)


def test_a_pause_closes_the_connection_and_following_begins_anew(open_page, server: Running):
    page = open_page(server)
    page.keyboard.press("Space")
    wait_for_status(page, "Paused")
    in_background(server, max_tokens=5).join()
    before = page.evaluate("window.live.state().step")
    page.get_by_role("button", name="Follow").click()
    wait_for_status(page, "Live")
    wait_until(page, f"window.live.state().step > {before}")
    assert page.locator("#done li").count() == 0


def test_a_paused_page_describes_the_last_step_in_words_and_tables(open_page, server: Running):
    page = open_page(server)
    thread = in_background(server, max_tokens=150, n=2)
    page.locator("#running li").wait_for()
    for details in ("last-step", "all-tables", "legend"):
        page.locator(f"#{details} summary").click()
    page.locator("#words li", has_text="The model computes").wait_for()
    page.get_by_role("button", name="Pause").click()
    wait_until(page, "!document.body.classList.contains('live')")
    time.sleep(0.3)  # the last frame
    state = page.evaluate("window.live.state()")
    assert page.locator("#words li").count() == len(state["notes"])
    entries = [block for table in state["sequences"].values() for block in table["blocks"]]
    assert page.locator("#tables .entry").count() == len(entries) > 2
    assert page.locator("#pools .held").count() == len(set(entries))
    thread.join()


def test_a_block_is_explained_by_focus_and_arrow_keys(open_page, server: Running):
    page = open_page(server)
    page.locator(".block[data-place='pool:22']").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#about", has_text="Block 23").wait_for()
    page.keyboard.press("Escape")
    page.locator("#about", has_text="Point at a block").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_is_as_wide_as_its_window(open_page, server: Running, width, scheme):
    options = {"color_scheme": scheme, "reduced_motion": "reduce"}
    page = open_page(server, viewport={"width": width, "height": 800}, **options)
    in_background(server, max_tokens=30, n=3).join()
    page.locator("#done li").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_finds_its_server_again(open_page, tmp_path):
    with running(tmp_path, "--viz", "--api-key", "k") as first:
        page = open_page(first, "?key=k")
        first.stop()
    wait_for_status(page, "trying again")
    again = ("--viz", "--api-key", "k", "--num-blocks", "48", "--port", str(first.port))
    with running(tmp_path, *again):
        wait_for_status(page, "Live")
        page.locator("h2", has_text="48 blocks").wait_for()


@pytest.mark.full
def test_a_server_of_several_ranks_shows_a_lane_for_each(open_page, server: Running, tmp_path):
    alone = open_page(server)
    in_background(server, max_tokens=8).join()
    alone.locator("#done li").first.wait_for()
    assert alone.locator("#ranks").is_hidden()
    with running(tmp_path, "--viz", "--device", "cpu", "--tensor-parallel-size", "2") as of_two:
        page = open_page(of_two, viewport={"width": 390, "height": 900})
        in_background(of_two, model="storyteller", max_tokens=30).join()
        page.locator("#done li").wait_for()
        lanes = page.locator(".lane")
        names = [lane.get_attribute("aria-label").split(":")[0] for lane in lanes.all()]
        assert names == ["Rank 0", "Rank 1"]
        assert lanes.nth(1).locator(".all_reduce").count() == 9  # two per layer and one more
        assert "later" in page.locator("#ranks-axis").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
