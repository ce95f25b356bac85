"""A rank that is killed, stopped, fails or hangs: the others end, the caller gets the reason."""

import gc
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from rank_processes import children_of, free_port, script, wait_until, wait_until_gone
from servers import raw_request, running

from minipaged import LLM, Parts, SamplingParams
from minipaged.attention.reference import reference_paged_attention
from minipaged.errors import InvalidOption, WorkerLost
from minipaged.worker import spawn
from minipaged.worker.executor import uninterrupted

PROMPTS = ["Once upon a time", "Theo the frog"]
SMALL = {"num_blocks": 300, "max_num_seqs": 4}

FULL = pytest.mark.full

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def started(monkeypatch):
    """All processes that this test starts; none may be left at its end."""
    processes: list[subprocess.Popen] = []

    class Noted(subprocess.Popen):
        def __init__(self, *positional, **named) -> None:
            super().__init__(*positional, **named)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    yield processes
    gc.collect()
    left = [each for each in processes if each.poll() is None]
    for each in left:
        each.kill()
        each.wait()
    assert not left


def two_ranks(**options) -> LLM:
    return LLM("storyteller", **{"tensor_parallel_size": 2, **SMALL, **options})


def tokens(llm: LLM, count: int = 12) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    return [each.outputs[0].token_ids for each in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The tokens of one process."""
    return tokens(LLM("storyteller", **SMALL))


def between_steps(llm: LLM, number: int, act) -> None:
    """Call `act` once, at the end of this step."""

    def listen(_, stats) -> None:
        if stats.step == number:
            act()

    llm.engine.listeners.append(listen)


def within_a_step(llm: LLM, number: int, act) -> None:
    """Call `act` once, before the third layer of rank 0 in this step."""
    calls = []

    def hook(*_) -> None:
        calls.append(None)
        if len(calls) == number:
            act()

    llm.engine.executor.runner.model.layers[2].register_forward_pre_hook(hook)


def signal_and_note(worker, number: signal.Signals, times: list[float]) -> None:
    times.append(time.monotonic())
    worker.send_signal(number)


# ---- a worker is lost ----------------------------------------------------------------------------


@pytest.mark.parametrize("when", [between_steps, within_a_step])
def test_a_killed_worker_is_reported_at_once_and_a_new_engine_works(started, expected, when):
    llm = two_ranks()
    [worker] = started
    killed = list[float]()
    when(llm, 5, partial(signal_and_note, worker, signal.SIGKILL, killed))
    with pytest.raises(WorkerLost, match=r"rank 1 has ended \(exit code -9, SIGKILL\)") as lost:
        tokens(llm)
    print("seconds", time.monotonic() - killed[0])
    assert time.monotonic() - killed[0] < 5
    said = str(lost.value)
    assert "log is empty" in said or "[Gloo]" in said  # torch 2.8 writes a line per connection
    assert worker.poll() == -signal.SIGKILL
    before = time.monotonic()
    with pytest.raises(WorkerLost, match="build a new one: rank 1 has ended"):
        tokens(llm)
    assert time.monotonic() - before < 0.5
    assert tokens(two_ranks()) == expected


@pytest.mark.parametrize("when", [between_steps, pytest.param(within_a_step, marks=FULL)])
def test_a_stopped_worker_is_lost_after_the_step_timeout(started, when):
    llm = two_ranks(step_timeout=2)
    [worker] = started
    stopped = list[float]()
    when(llm, 5, partial(signal_and_note, worker, signal.SIGSTOP, stopped))
    with pytest.raises(WorkerLost, match="rank 1 does not answer") as lost:
        tokens(llm)
    print("seconds", time.monotonic() - stopped[0])
    assert time.monotonic() - stopped[0] < 2 + 1  # one to kill it, and for a busy machine
    assert "step_timeout" in str(lost.value)
    assert worker.poll() == -signal.SIGKILL


def test_a_stopped_worker_is_killed_when_its_engine_is_deleted(started):
    llm = two_ranks()
    [worker] = started
    worker.send_signal(signal.SIGSTOP)
    os.waitpid(worker.pid, os.WUNTRACED)  # until it has stopped
    before = time.monotonic()
    del llm  # nothing else refers to it: no garbage collection is needed
    print("seconds", time.monotonic() - before)
    assert worker.poll() == -signal.SIGKILL
    assert time.monotonic() - before < spawn.SECONDS_TO_END + 1


@pytest.mark.full
@pytest.mark.parametrize(
    ("how", "what"),
    [("SIGKILL", r"rank 2 has ended \(exit code -9"), ("SIGSTOP", "rank 2 does not")],
)
def test_the_failed_rank_of_four_is_named(started, how, what):
    llm = two_ranks(tensor_parallel_size=4, step_timeout=3)
    within_a_step(llm, 5, lambda: started[1].send_signal(signal.Signals[how]))
    with pytest.raises(WorkerLost, match=what):
        tokens(llm)
    assert None not in [each.poll() for each in started]


# torch raises RuntimeError for broken connections and for much else; a handler of SIGTERM may exit.
@pytest.mark.parametrize("error", [ZeroDivisionError("here"), RuntimeError("here"), SystemExit(3)])
def test_an_exception_within_a_step_of_rank_0_ends_the_workers(started, error):
    llm = two_ranks()

    def fail() -> None:
        raise error

    within_a_step(llm, 3, fail)
    with pytest.raises(type(error)) as raised:
        tokens(llm)
    assert raised.value is error
    assert started[0].poll() is not None
    with pytest.raises(WorkerLost, match=f"middle of a step .{type(error).__name__}: {error}"):
        tokens(llm)


def test_an_exception_within_a_step_of_a_worker_is_shown(started, monkeypatch):
    sabotage(monkeypatch, "StepDecoder.decode", "raise RuntimeError('no such kernel')")
    llm = two_ranks()
    with pytest.raises(WorkerLost, match="rank 1 has ended") as lost:
        tokens(llm)
    assert "RuntimeError: no such kernel" in str(lost.value)


# ---- a worker that does not start ----------------------------------------------------------------

SABOTAGE = """
import os, time
from minipaged.worker import process

def fail(*_, **__):
    {how}

process.{where} = fail
process.main()
"""


def sabotage(monkeypatch, where: str, how: str) -> None:
    monkeypatch.setattr(spawn, "PROGRAM", SABOTAGE.format(where=where, how=how))


@pytest.mark.parametrize(
    ("where", "how", "cause"),
    [
        ("load_model", "raise MemoryError('layer 7')", "MemoryError: layer 7"),
        ("load_model", "os.kill(os.getpid(), 9)", "SIGKILL"),  # as when memory runs out
        pytest.param(
            *("FileStore", "raise OSError('no such folder')", "OSError: no such folder"),
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_worker_that_fails_while_starting_shows_its_log(started, monkeypatch, where, how, cause):
    sabotage(monkeypatch, where, how)
    before = time.monotonic()
    with pytest.raises(WorkerLost, match=r"rank 1 has ended \(exit code") as lost:
        two_ranks()
    print("seconds", time.monotonic() - before)
    assert cause in str(lost.value)
    assert time.monotonic() - before < 20  # start_timeout is 600
    assert started[0].poll() is not None


@pytest.mark.parametrize("where", ["FileStore", pytest.param("load_model", marks=FULL)])
def test_a_worker_that_hangs_while_starting_is_lost_after_start_timeout(
    started, monkeypatch, where
):
    sabotage(monkeypatch, where, "time.sleep(600)")
    before = time.monotonic()
    with pytest.raises(WorkerLost, match="rank 1 does not answer") as lost:
        two_ranks(start_timeout=6)
    print("seconds", time.monotonic() - before)
    assert "start_timeout" in str(lost.value)
    assert time.monotonic() - before < 20
    assert started[0].poll() == -signal.SIGKILL


# ---- rank 0 ends ---------------------------------------------------------------------------------

ENDS = [
    pytest.param("", 0, id="normally", marks=FULL),
    pytest.param("raise ZeroDivisionError", 1, id="exception"),
    pytest.param("sys.exit(5)", 5, id="sys.exit", marks=FULL),
    pytest.param("os._exit(6)", 6, id="os._exit", marks=FULL),
    pytest.param("os.kill(os.getpid(), 15)", -signal.SIGTERM, id="SIGTERM", marks=FULL),
    pytest.param(
        "model.layers[2].register_forward_pre_hook(lambda *_: os._exit(7))", 7, id="in a step"
    ),
]


@pytest.mark.parametrize(("code", "exit_code"), ENDS)
def test_workers_end_with_rank_0(tmp_path, code, exit_code):
    model = "model = llm.engine.executor.runner.model"
    lines = ["llm = two_ranks()", "tell_workers(llm)", model, code, "tokens(llm)"]
    with script(tmp_path, "\n".join(lines)) as rank_0:
        workers = rank_0.wait_for_workers()
        assert rank_0.wait_for_end() == exit_code
        print("seconds", wait_until_gone(workers, 10))


STEPS = "llm.engine.listeners.append(lambda *_: say('ready', 'now'))\ntokens(llm, 900)"
IDLE = "say('ready', 'now')\ntime.sleep(600)"
FORKED = "if os.fork():\n    say('ready', 'now')\ntime.sleep(600)"  # the fork outlives rank 0


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(STEPS, id="in a step"),
        pytest.param(IDLE, id="idle", marks=FULL),
        pytest.param(FORKED, id="with a fork", marks=FULL),
    ],
)
def test_workers_end_when_rank_0_is_killed(tmp_path, code):
    with script(tmp_path, f"llm = two_ranks()\ntell_workers(llm)\n{code}") as rank_0:
        workers = rank_0.wait_for_workers()
        rank_0.wait_for("ready")
        rank_0.process.kill()
        print("seconds", wait_until_gone(workers, 10))


FORK = """
llm = two_ranks()
tell_workers(llm)
before = tokens(llm)
child = os.fork()
if child == 0:
    try:
        tokens(llm)
    except WorkerLost as error:
        say("refused", error)
    llm.engine.executor.close()
    os._exit(7)  # as the children of multiprocessing
say("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), tokens(llm) == before)
"""


@pytest.mark.full
def test_a_fork_of_rank_0_does_not_affect_its_engine(tmp_path):
    with script(tmp_path, FORK) as rank_0:
        assert rank_0.wait_for("child") == ["7", "True"]
        assert "fork" in rank_0.wait_for("refused")
        assert rank_0.wait_for_end() == 0
        wait_until_gone(rank_0.wait_for_workers(), 10)


# ---- Ctrl-C --------------------------------------------------------------------------------------


def test_ctrl_c_within_a_step_takes_effect_at_its_end(started, expected):
    llm = two_ranks()
    within_a_step(llm, 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        tokens(llm)
    assert not llm.engine.has_unfinished_requests()
    assert tokens(llm) == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


INTERRUPTED = """
llm = two_ranks()
tell_workers(llm)
expected = tokens(LLM("storyteller", **SMALL))
say_step = lambda *_: say("step", "now")
llm.engine.listeners.append(say_step)
try:
    tokens(llm, 900)
except KeyboardInterrupt:
    llm.engine.listeners.remove(say_step)
    say("interrupted", tokens(llm) == expected)
"""


def test_ctrl_c_in_a_terminal_leaves_the_engine_usable(tmp_path):
    with script(tmp_path, INTERRUPTED) as rank_0:
        [worker] = rank_0.wait_for_workers()
        rank_0.wait_for("step", count=5)
        os.killpg(rank_0.process.pid, signal.SIGINT)
        assert rank_0.wait_for("interrupted") == ["True"]
        assert rank_0.wait_for_end() == 0
        wait_until_gone([worker], 10)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_ctrl_c_after_a_step_follows_the_handler_of_the_program(handler):
    calls = []
    chosen = (lambda *_: calls.append(None)) if callable(handler) else handler
    before = signal.signal(signal.SIGINT, chosen)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert not calls
        assert len(calls) == callable(handler)
        assert signal.getsignal(signal.SIGINT) is chosen
    finally:
        signal.signal(signal.SIGINT, before)


# ---- several engines -----------------------------------------------------------------------------


def test_two_engines_in_one_process_do_not_interfere(started, expected):
    first, second = two_ranks(), two_ranks()
    assert tokens(first) == expected
    assert tokens(second) == expected
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    streams = [each.stream(PROMPTS[:1], params) for each in (first, second)]
    both = [list(outputs) for outputs in zip(*streams, strict=True)]  # step by step
    assert [output.outputs[0].token_ids for _, output in both[-1]] == expected[:1] * 2
    del first, streams
    gc.collect()
    assert started[0].poll() == 0
    assert tokens(second) == expected
    second.engine.executor.close()
    assert started[1].poll() == 0
    with pytest.raises(WorkerLost, match="closed"):
        tokens(second)


@pytest.mark.full
def test_two_processes_with_an_engine_each_do_not_interfere(tmp_path, expected):
    code = "llm = two_ranks()\ntell_workers(llm)\nsay('tokens', tokens(llm))"
    with script(tmp_path, code) as first, script(tmp_path, code) as second:
        for each in (first, second):
            assert json.loads("".join(each.wait_for("tokens"))) == expected
            assert each.wait_for_end() == 0
            wait_until_gone(each.wait_for_workers(), 10)


# ---- torchrun ------------------------------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--master-addr", "127.0.0.1"]
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
JOINED = """
say("rank", os.environ["RANK"], os.getpid())
llm = two_ranks()
say("tokens", tokens(llm))
try:
    two_ranks()
except InvalidOption as error:
    say("refused", error)
"""


def test_torchrun_gives_the_same_tokens_and_one_engine(tmp_path, expected):
    command = [*TORCHRUN, "--master-port", free_port(), "--nproc-per-node", "2"]
    with script(tmp_path, JOINED, *command, **LOOPBACK) as torchrun:
        assert json.loads("".join(torchrun.wait_for("tokens"))) == expected
        assert "another script." in " ".join(torchrun.wait_for("refused"))
        assert torchrun.wait_for_end() == 0
        wait_until_gone([int(pid) for pid in torchrun.wait_for("rank", 2)[1::2]], 10)


@pytest.mark.full
def test_torchrun_on_two_nodes_gives_the_same_tokens(tmp_path, expected):
    shared = [*TORCHRUN, "--master-port", free_port(), "--nproc-per-node", "1", "--nnodes", "2"]
    with (
        script(tmp_path, JOINED, *shared, "--node-rank", "0", **LOOPBACK) as first,
        script(tmp_path, JOINED, *shared, "--node-rank", "1", **LOOPBACK) as second,
    ):
        assert json.loads("".join(first.wait_for("tokens"))) == expected
        assert first.wait_for_end() == 0
        assert second.wait_for_end() == 0


KILLED_BY_TORCHRUN = """
say("rank", os.environ["RANK"], os.getpid())
llm = two_ranks()
llm.engine.listeners.append(lambda *_: say("step", "now"))
while True:
    tokens(llm, 900)
"""


@pytest.mark.full
def test_torchrun_ends_when_one_of_its_processes_is_killed(tmp_path):
    command = [*TORCHRUN, "--master-port", free_port(), "--nproc-per-node", "2"]
    with script(tmp_path, KILLED_BY_TORCHRUN, *command, **LOOPBACK) as torchrun:
        torchrun.wait_for("step", count=3)
        ranks = torchrun.wait_for("rank", 2)
        pids = dict(zip(ranks[::2], map(int, ranks[1::2]), strict=True))
        os.kill(pids["1"], signal.SIGKILL)
        assert torchrun.wait_for_end() != 0
        wait_until_gone(list(pids.values()), 10)


def test_a_tensor_parallel_size_other_than_torchruns_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InvalidOption, match="size is 2, but torchrun has started 3 processes"):
        two_ranks()


# ---- the server ----------------------------------------------------------------------------------

FLAGS = ["--tensor-parallel-size", "2", "--num-blocks", "300", "--max-num-seqs", "4"]
BODY = {"prompt": PROMPTS[0], "max_tokens": 12, "ignore_eos": True, "temperature": 0}


def test_a_server_of_two_ranks_leaves_no_processes(tmp_path):
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    [one] = LLM("storyteller", **SMALL).generate(PROMPTS[0], params, use_tqdm=False)
    with running(tmp_path, *FLAGS) as server:
        workers = children_of(server.process.pid)
        status, reply = server.post("/v1/completions", BODY)
        assert (status, reply["choices"][0]["text"]) == (200, one.outputs[0].text)
        assert server.stop() == 0
        wait_until_gone(workers, 5)


def test_a_server_tells_its_clients_of_a_killed_worker_and_ends(tmp_path):
    with running(tmp_path, *FLAGS) as server, server.connect() as connection:
        [worker] = children_of(server.process.pid)
        body = {**BODY, "max_tokens": 1000, "stream": True}
        connection.sendall(raw_request("/v1/completions", body))
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.readline().startswith(b"data: ")
        os.kill(worker, signal.SIGKILL)
        print("seconds", wait_until(lambda: server.get("/health")[0] == 503, 1, "503"))
        rest = response.read().decode()
        assert "rank 1 has ended (exit code -9, SIGKILL)" in rest
        assert '"error"' in rest
        response.close()
        assert server.process.wait(10) == 1
        wait_until_gone([worker], 1)


def test_an_idle_server_notices_a_killed_worker(tmp_path):
    with running(tmp_path, *FLAGS) as server:
        [worker] = children_of(server.process.pid)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: server.get("/health")[0] == 503, 5, "503")
        assert server.process.wait(10) == 1


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "size", "what"),
    [
        ({}, 3, "4 query heads"),
        ({}, 8, "4 query heads"),  # larger than the number of heads
        ({}, 1024, "4 query heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "3 KV heads"),
        ({"intermediate_size": 386}, 4, "386 feed-forward units"),
    ],
)
def test_a_size_that_does_not_fit_the_model_starts_no_process(started, overrides, size, what):
    with pytest.raises(InvalidOption, match=f"{what} cannot be divided evenly") as refused:
        LLM("storyteller", tensor_parallel_size=size, hf_overrides=overrides, **SMALL)
    assert refused.value.param == "tensor_parallel_size"
    assert len(str(refused.value).splitlines()) == 1
    assert not started


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start_timeout": 60}, "start_timeout is 60, but has no effect with one rank"),
        ({"step_timeout": 60}, "step_timeout is 60, but has no effect with one rank"),
        ({"tensor_parallel_size": 2, "memory": "virtual"}, "in one process"),
        ({"tensor_parallel_size": 2, "memory": "contiguous-max"}, "in one process"),
        (
            {"tensor_parallel_size": 2, "parts": Parts(paged_attention=reference_paged_attention)},
            "paged_attention is in this process only",
        ),
    ],
)
def test_options_that_several_ranks_cannot_honour_start_no_process(started, options, sentence):
    with pytest.raises(InvalidOption, match=sentence):
        LLM("storyteller", **options)
    assert not started


@pytest.mark.parametrize(
    ("device", "sentence"),
    [("cuda:1", "each of the 3 ranks has a GPU of its own"), ("cuda", "this machine has 2")],
)
def test_too_few_gpus_for_the_ranks_are_refused(started, monkeypatch, device, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidOption, match=sentence):
        LLM("storyteller", device=device, tensor_parallel_size=3)
    assert not started
