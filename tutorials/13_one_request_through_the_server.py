# %% [markdown]
# # 13. One request through the server
#
# An engine needs one thread, and a server has many clients, who arrive at any time, read slowly and
# leave early. You write the server between the two, and measure where the time of a request goes.
#
# **Needs** [chapter 6](06_continuous_batching.md), [chapter 12](12_one_tokens_journey.md) ·
# **Time** 35 minutes · **Lab** [10, a prefix-aware router](labs/10.md)
#
# ![One thread owns the engine: clients write to its inbox and read from queues.](openings/13.svg)
#
# ## Goals
#
# - Why one thread owns the engine, and how all other threads talk to it.
# - What happens to the blocks of a client who leaves.
# - What the time to first token consists of, and what grows when more clients arrive.
# - Why a server must refuse requests before it runs out of memory.
#
# ## Invariants
#
# 1. Only one thread calls the engine.
# 2. When a client leaves, all blocks of its request are freed, and no more tokens are computed for
#    it.
# 3. A slow reader delays no other client.
# 4. The tokens are those of the engine without a server.
#
# ## Predict
#
# - A client asks for 200 tokens and leaves after the first one. How many tokens does a careless
#   server compute for that client?
# - One client waits 10 ms for the first token. How long do 32 clients wait who arrive together: 10
#   ms, 320 ms, or something in between?
# - Forty clients arrive together, and the server runs 8 requests and lets 8 wait. What happens to
#   the others?
#
# ## Build it: a server of your own
#
# `LLMEngine` may be called by one thread at a time, and a step takes milliseconds. If every
# client's thread called it, each would wait for the steps of all others. So one thread owns the
# engine. All other threads put messages into its inbox, which it reads between two steps. The
# results of a step go into one queue per request, from which the client's thread takes them.
#
# ```mermaid
# flowchart LR
#     client1[client] <-->|HTTP| thread1[its thread]
#     client2[client] <-->|HTTP| thread2[its thread]
#     thread1 -->|add, abort| inbox
#     thread2 -->|add, abort| inbox
#     inbox --> engine[engine thread]
#     engine -->|new tokens| thread1
#     engine -->|new tokens| thread2
# ```

# %%
import http.client
import json
import queue
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

from minipaged import LLM, SamplingParams
from minipaged.sampling import RequestOutputKind


class EngineThread(threading.Thread):
    """The only thread that calls the engine."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(daemon=True)
        self.engine = llm.engine
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()  # calls to make between two steps
        self.readers: dict[str, queue.SimpleQueue] = {}
        self.num_tokens = 0  # computed so far
        self.start()

    def run(self) -> None:
        while True:
            while not self.inbox.empty() or not self.engine.has_unfinished_requests():
                self.inbox.get()()
            for progress in self.engine.step():
                self.num_tokens += sum(len(new.token_ids) for new in progress.new)
                self.readers[progress.request_id].put(progress)

    def add(self, request_id: str, body: dict, reader: queue.SimpleQueue) -> None:
        params = SamplingParams(
            temperature=0,
            max_tokens=body["max_tokens"],
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        self.readers[request_id] = reader
        self.engine.add_request(request_id, body["prompt"], params)


class CarelessHandler(BaseHTTPRequestHandler):
    """One thread per client: sends each piece of text as soon as it arrives."""

    numbers = count()
    engine: EngineThread

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request_id, reader = str(next(self.numbers)), queue.SimpleQueue()
        self.engine.inbox.put(partial(self.engine.add, request_id, body, reader))
        self.send_response(200)
        self.end_headers()
        try:
            self.send_all(reader)
        except OSError:  # the client has left
            self.client_left(request_id)

    def send_all(self, reader: queue.SimpleQueue) -> None:
        finished = False
        while not finished:
            progress = reader.get()
            for new in progress.new:
                event = {"choices": [{"text": new.text}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            finished = progress.finished

    def client_left(self, request_id: str) -> None:
        pass

    def log_message(self, *_: object) -> None:
        pass  # no line per request


# %% [markdown]
# That is a complete server. It sends *server-sent events*, each of which is `data: {...}` and an
# empty line, as OpenAI's protocol does for streams. A client sends a prompt and records when each
# event arrives.

# %%


class Client:
    """One request: its text, and the time of each event, in seconds since it was sent."""

    def __init__(self, port: int, prompt: str, max_tokens: int = 24, leave_after: int = 10**9):
        self.texts: list[str] = []
        self.times: list[float] = []
        connection = http.client.HTTPConnection("127.0.0.1", port)
        start = time.perf_counter()
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        self.response = connection.getresponse()
        for line in self.response if self.response.status == 200 else ():
            if len(self.times) == leave_after:
                break
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                self.texts.append(event["choices"][0]["text"])
                self.times.append(time.perf_counter() - start)
        self.response.close()
        connection.close()


def serve_with(handler: type[CarelessHandler], llm: LLM) -> tuple[ThreadingHTTPServer, int]:
    handler.engine = EngineThread(llm)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, server.server_port


llm = LLM("storyteller", num_blocks=512)
server, port = serve_with(CarelessHandler, llm)
client = Client(port, "Once upon a time")
print("".join(client.texts))
print(f"first text after {1000 * client.times[0]:.0f} ms, {len(client.times)} events")

# %% [markdown]
# ### A client leaves
#
# A client asks for 200 tokens, reads one, and closes the connection.


# %%
def leave_early(handler: type[CarelessHandler]) -> int:
    """How many tokens are computed for a client who leaves after the first one."""
    before = handler.engine.num_tokens
    Client(port, "Once upon a time", max_tokens=200, leave_after=1)
    while handler.engine.engine.has_unfinished_requests():
        time.sleep(0.01)
    return handler.engine.num_tokens - before


careless = leave_early(CarelessHandler)
server.shutdown()
print(f"{careless} tokens were computed for a client who had left after one")

# %% [markdown]
# The server noticed when a write failed, and did nothing about it. The request kept its blocks to
# the end, while other clients waited for them. One line fixes it:


# %%
class Handler(CarelessHandler):
    def client_left(self, request_id: str) -> None:
        self.engine.inbox.put(partial(self.engine.engine.abort_request, request_id))


server, port = serve_with(Handler, LLM("storyteller", num_blocks=512))
careful = leave_early(Handler)
memory = Handler.engine.engine.memory
print(f"{careful} tokens, and {memory.num_blocks - memory.num_free} blocks are still in use")

# %% [markdown]
# It is more than one token: the network buffers what the client does not read, so the first writes
# after it has left still succeed. A server that computes a long prompt does not write at all, so
# the library's server also watches for the end of the connection. Its engine thread is like yours,
# but its clients share one event loop (asyncio):
#
# @@ minipaged.serving.async_engine.AsyncEngine._run
#
# There are three more differences. Other threads encode the prompts, since a long text takes longer
# than a step. Results that a slow reader has not fetched are merged into one, so they need no more
# memory than the text itself. And if a step raises, every open request ends with an error instead
# of hanging.
#
# ### Where the time of a request goes
#
# The rest of the chapter measures the library's server, in a separate process (it needs
# `pip install -e ".[serve]"`). Its `/metrics` page reports how long requests waited, how long their
# prompts were computed, and how long they decoded. The client measures the total.

# %%
import subprocess
import sys


def start_server(options: str) -> tuple[subprocess.Popen, int]:
    """The library's server: its process and its port."""
    command = [sys.executable, "-m", "minipaged", "serve", "--port", "0", *options.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    print(ready := process.stdout.readline().strip())
    return process, int(ready.split(";")[0].rsplit(":", 1)[1])


process, real_port = start_server("--max-num-seqs 32 --num-blocks 2048 --stream-interval 0")


def seconds_by_part(port: int) -> dict[str, float]:
    """Seconds that all requests together have spent on each part, from /metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    found = {line.split("{")[0]: float(line.split()[-1]) for line in lines if "_sum{" in line}
    parts = ("queue", "prefill", "decode")
    return {part: found[f"vllm:request_{part}_time_seconds_sum"] for part in parts}


# %% Milliseconds of a request by part, for three prompt lengths
import drawing

from minipaged.evaluation.stories import tell

figure, axes = drawing.picture(7.2, 2.2)
names = []
for line, num_facts in enumerate((4, 32, 64)):
    text = tell(num_facts=num_facts, seed=num_facts).text
    names.append(f"{len(llm.get_tokenizer().encode(text))} tokens")
    Client(real_port, text[::-1][:40])  # warm up
    before, whole = seconds_by_part(real_port), 0.0
    for number in range(5):  # each time with another first word, so that no prefix is cached
        whole += Client(real_port, f"{number} {text}").times[-1]
    after, left = seconds_by_part(real_port), 0.0
    spent = {part: after[part] - before[part] for part in after}
    spent = {"HTTP and text": whole - sum(spent.values()), **spent}
    for part, colour in zip(spent, drawing.COLOURS, strict=False):
        width = 1000 * spent[part] / 5
        axes.barh(-line, width, left=left, color=colour, label=part if not line else None)
        left += width
axes.set_yticks([0, -1, -2], names)
axes.set(xlabel="ms from sending the request to the last of 24 tokens")
axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=4, fontsize=8)

# %% [markdown]
# The time to first token (TTFT) is everything before the decode: HTTP, encoding the prompt,
# waiting, and computing the prompt. On an idle server there is no waiting, and a longer prompt
# means more prefill.
#
# ### More clients
#
# Now 1 to 32 clients arrive together. Each prompt must be computed, but all decodes share every
# step (chapter 6).

# %%
from concurrent.futures import ThreadPoolExecutor

seeds = count(1000)


def together(port: int, number: int, max_tokens: int = 48) -> list[Client]:
    """Clients who arrive at the same time, each with a new prompt."""
    prompts = [tell(num_facts=8, seed=next(seeds)).text for _ in range(number)]
    with ThreadPoolExecutor(number) as threads:
        return list(threads.map(lambda prompt: Client(port, prompt, max_tokens), prompts))


# %% Time to first token and tokens per second, by number of clients at once
together(real_port, 1)  # warm up
crowds = (1, 2, 4, 8, 16, 32)
first: list[float] = []
speed: list[float] = []
for crowd in crowds:
    start = time.perf_counter()
    clients = together(real_port, crowd)
    elapsed = time.perf_counter() - start
    waits = sorted(client.times[0] for client in clients)
    first.append(1000 * waits[len(waits) // 2])
    speed.append(48 * crowd / elapsed)

figure, (left_axes, right_axes) = drawing.picture(7.2, 2.8, ncols=2)
left_axes.plot(crowds, first, marker="o")
left_axes.set(xlabel="clients at once", ylabel="median TTFT, ms", ylim=(0, None))
right_axes.plot(crowds, speed, marker="o", color=drawing.COLOURS[2])
right_axes.set(xlabel="clients at once", ylabel="tokens per second", ylim=(0, None))
for axes in (left_axes, right_axes):
    axes.set(xscale="log", xticks=crowds, xticklabels=crowds)

process.terminate()
print("exit code after SIGTERM:", process.wait())

# %% [markdown]
# ### Too many clients
#
# An unbounded queue helps no client: the last one waits for minutes, and waiting prompts fill the
# memory. So the server has a limit, and answers further requests at once with status 429. Clients
# of OpenAI's API wait a little and try again.

# %%
process, busy_port = start_server("--max-num-seqs 8 --max-queued 8 --num-blocks 512")
answers = [client.response.status for client in together(busy_port, 40, max_tokens=200)]
print({status: answers.count(status) for status in sorted(set(answers))})
process.terminate()
process.wait()

# %% [markdown]
# ## Check
#
# Invariant 4: with eight clients at once, the texts are those of the engine without a server.
# Invariant 2: after an early leave, all blocks are free again, and the careless server is caught.
# Invariant 3: a client who does not read delays no other.

# %%
seeds = count(2000)
stories = [tell(num_facts=8, seed=2000 + index).text for index in range(8)]
greedy = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
expected = LLM("storyteller").generate(stories, greedy, use_tqdm=False)
served = {"".join(client.texts) for client in together(port, 8)}
assert served == {output.outputs[0].text for output in expected}
print("the texts of the engine without a server")

assert memory.num_free == memory.num_blocks, "a block was lost"
assert careless == 200, "the careless server computes all of them"
assert careful < 200, "the fixed one stops"
print("a client who leaves frees the blocks")

slow = http.client.HTTPConnection("127.0.0.1", port)
body = json.dumps({"prompt": "Once upon a time", "max_tokens": 200})
slow.request("POST", "/v1/completions", body)  # and reads nothing
quick = Client(port, "Theo the frog", max_tokens=8)
assert quick.times[-1] < 5
slow.close()
server.shutdown()
print(f"while another client reads nothing, 8 tokens took {1000 * quick.times[-1]:.0f} ms")

# %% [markdown]
# ### Exercise: TTFT and TPOT
#
# Two figures describe a stream: TTFT, and the *time per output token* (TPOT) after the first. The
# first token pays for waiting and for the prompt, the others for one step each. Compute both from
# what a client sees: for each chunk, the seconds since the request was sent, and the number of
# tokens in it. A chunk has several tokens if the server merged them for a slow reader. With a
# single token there is no TPOT: return None.


# %%
def latencies(chunks: list[tuple[float, int]]) -> tuple[float, float | None]:
    """(seconds since the request was sent, tokens) of each chunk -> TTFT and TPOT, in seconds."""
    first, last = chunks[0][0], chunks[-1][0]
    return first, last / len(chunks)  # your turn


# %%
def milliseconds(pair: tuple[float, float | None] | None) -> str:
    return " and ".join("None" if each is None else f"{1000 * each:.2f} ms" for each in pair or ())


def check_exercise(latencies) -> bool:
    """Compare with what `minipaged bench serve` reports for these streams."""
    streams = {
        "one token per chunk": ([(0.10, 1), (0.12, 1), (0.14, 1), (0.16, 1)], (0.10, 0.02)),
        "merged chunks": ([(0.10, 1), (0.16, 3), (0.20, 2)], (0.10, 0.02)),
        "two tokens first": ([(0.30, 2), (0.39, 2)], (0.30, 0.03)),
        "a single token": ([(0.05, 1)], (0.05, None)),
    }
    solved = True
    for name, (chunks, pair) in streams.items():
        yours, expected = milliseconds(latencies(chunks)), milliseconds(pair)
        print(f"{name:20} yours: {yours}, expected: {expected}")
        solved = solved and yours == expected
    return solved


print("solved" if check_exercise(latencies) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# From the first chunk to the last, how much time passes, and how many tokens follow the first one?
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# Divide the time after the first chunk by the number of tokens after the first token.
#
# ```python
# def latencies(chunks: list[tuple[float, int]]) -> tuple[float, float | None]:
#     """(seconds since the request was sent, tokens) of each chunk -> TTFT and TPOT, in seconds."""
#     first, last = chunks[0][0], chunks[-1][0]
#     after_first = sum(num_tokens for _, num_tokens in chunks) - 1
#     return first, (last - first) / after_first if after_first else None
# ```
#
# The gaps between chunks are another figure, the *inter-token latency* (ITL).
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# The careless server computes all 200 tokens. Thirty-two clients wait many times as long as one,
# because 32 prompts have to be computed. On a quiet machine it is less than 32 times, because
# several prompts share a step. Of forty clients, those beyond the limit are refused at once, with
# status 429. It may be more than 24 of them: no waiting request can start before the running step
# ends.
#
# </details>
#
# ## Questions
#
# **Why does the handler not call `engine.abort_request` itself when the client has left?**
#
# <details markdown="1"><summary>Answer</summary>
#
# It runs in another thread, and the running step may use the request's blocks. A lock would also
# work, but the handler would wait for a whole step.
#
# </details>
#
# **Your server has one thread per client. What does the library's server gain with one event loop
# for all?**
#
# <details markdown="1"><summary>Answer</summary>
#
# After a step with 256 sequences, the engine would wake 256 threads; the event loop is woken once.
# Python's threads also compete with the engine's thread for the interpreter, so every wake-up slows
# down the next step.
#
# </details>
#
# **A step raises an exception. Why does the server not simply try again?**
#
# <details markdown="1"><summary>Answer</summary>
#
# The same step would most likely raise again, forever, while clients wait. Instead they get an
# error, `/health` returns 503, and the process ends, so that its supervisor starts a new one.
#
# </details>
#
# ## Results

# %%
print(f"tokens computed for a client who left after one: {careless}, then {careful}")
print(f"median TTFT of 32 clients: {first[-1] / first[0]:.1f} times that of one")
print(f"tokens per second with 32 clients: {speed[-1] / speed[0]:.1f} times as many")

# %% [markdown]
# With several servers, a router decides which one gets a request: write it in [lab 10](labs/10.md).
# To run the library's server, see [Serve a model](../guides/serve_a_model.md).
#
# Next: [cut a model in two](14_cut_a_model_in_two.md), for several devices.
