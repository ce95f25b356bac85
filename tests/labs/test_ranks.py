"""Processes of lab 11: a deadlock is reported at once, and no process outlives the run."""

import multiprocessing as mp
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from minipaged.cli.main import app
from minipaged.errors import InvalidOption
from minipaged.labs.lab11_tensor_parallel import LAB
from minipaged.labs.starter import library_text
from minipaged.labs.tensor_parallel.model import storyteller, whole_logits
from minipaged.labs.tensor_parallel.processes import (
    Collective,
    RanksFailed,
    Report,
    run_ranks,
    what_is_wrong,
)
from minipaged.llm import LLM
from minipaged.sampling.params import SamplingParams


def add(rank: int, num_ranks: int, value: float) -> float:
    tensor = torch.full((3,), value + rank)
    dist.all_reduce(tensor)
    return tensor[0].item()


def a_sum_on_one_rank_only(rank: int, num_ranks: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(3))


def other_shapes(rank: int, num_ranks: int) -> None:
    dist.all_reduce(torch.ones(3 + rank))


def other_types(rank: int, num_ranks: int) -> None:
    dist.all_reduce(torch.ones(3, dtype=torch.int64 if rank else torch.float32))


def other_calls(rank: int, num_ranks: int) -> None:
    dist.all_reduce(torch.ones(3)) if rank else dist.barrier()


def an_error_while_another_waits(rank: int, num_ranks: int) -> None:
    if rank == 1:
        raise IndexError("list index out of range")
    dist.all_reduce(torch.ones(3))


def an_end_while_another_waits(rank: int, num_ranks: int) -> None:
    if rank == 1:
        os._exit(0)
    dist.all_reduce(torch.ones(3))


def an_endless_loop(rank: int, num_ranks: int) -> None:
    while rank == 1:
        time.sleep(0.01)
    dist.all_reduce(torch.ones(3))


def named_pid(rank: int, num_ranks: int) -> int:
    return os.getpid()


WRONG = {
    a_sum_on_one_rank_only: "rank 0 waits forever in all_reduce of float32 .3., its collective "
    "number 1: rank 1 has ended after 0 collectives",
    other_shapes: "number 1 is all_reduce of float32 .3. on rank 0 and all_reduce of float32 .4.",
    other_types: "all_reduce of float32 .3. on rank 0 and all_reduce of int64 .3. on rank 1",
    other_calls: "collective number 1 is barrier.* on rank 0 and all_reduce of float32 .3. on rank",
    an_error_while_another_waits: "rank 1: IndexError: list index out of range",
    an_end_while_another_waits: "rank 1: the process ended early",
}


def test_two_processes_add_up_and_each_call_is_noted():
    reports = run_ranks(add, 10.0)
    assert [report.value for report in reports] == [21, 21]
    assert [report.calls for report in reports] == [[Collective("all_reduce", "float32 [3]")]] * 2


@pytest.mark.parametrize("program", WRONG, ids=lambda program: program.__name__)
def test_a_deadlock_is_reported_at_once(program):
    began = time.monotonic()
    with pytest.raises(RanksFailed, match=WRONG[program]):
        run_ranks(program, seconds=60.0)
    assert time.monotonic() - began < 30


def test_a_broken_connection_is_reported_only_if_there_is_no_other_cause():
    broken = Report(error="RuntimeError: Connection closed", has_ended=True, is_broken=True)
    assert what_is_wrong([broken, Report()]) == "", "rank 1 may be about to tell why"
    cause = Report(error="IndexError: list index out of range", has_ended=True)
    assert what_is_wrong([broken, cause]) == "rank 1: IndexError: list index out of range"
    ended = Report(has_ended=True)
    assert what_is_wrong([broken, ended]) == "rank 0: RuntimeError: Connection closed"


def test_a_rank_that_never_ends_is_stopped_at_the_time_limit():
    with pytest.raises(RanksFailed, match=r"not done after 1 second: rank 0 is at its coll"):
        run_ranks(an_endless_loop, seconds=1.0)


def test_no_rank_outlives_its_run():
    for report in run_ranks(named_pid):
        with pytest.raises(ProcessLookupError):
            os.kill(report.value, 0)


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="it is the only way elsewhere")
def test_spawned_ranks_give_the_same_result_as_forked_ones(monkeypatch):
    spawn = mp.get_context("spawn")
    monkeypatch.setattr(mp, "get_context", lambda kind: spawn)
    assert [report.value for report in run_ranks(add, 10.0, seconds=60.0)] == [21, 21]


def test_the_model_of_lab_11_is_the_storyteller_of_the_library():
    llm = LLM("storyteller")
    prompt = llm.get_tokenizer().encode("Once upon a time, there was a little")
    sampling = SamplingParams(temperature=0, max_tokens=8)
    expected = list(llm.generate([prompt], sampling)[0].outputs[0].token_ids)
    weights, token_ids = storyteller(), list(prompt)
    for _ in range(8):
        token_ids.append(int(whole_logits(weights, token_ids).argmax()))
    assert token_ids[len(prompt) :] == expected


# ---- minipaged lab ranks -------------------------------------------------------------------------


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """`ranks("--num-ranks", "2")`: what the command prints about the library's own solution."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / LAB.file_name).write_text(library_text(LAB), encoding="utf-8")

    def call(*words: str) -> str:
        arguments = ["lab", "ranks", "Once upon a time", "--max-tokens", "6", *words]
        result = CliRunner().invoke(app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout

    return call


def test_any_number_of_ranks_generates_the_same_story(ranks):
    told = [ranks("--num-ranks", str(number)).splitlines() for number in (1, 2, 4)]
    assert {lines[0] for lines in told} == {told[0][0]}
    assert told[0][0].startswith("Once upon a time")
    assert [len(lines) for lines in told] == [2, 3, 5]
    assert "7 broadcast, 54 all_reduce, 6 gather" in told[1][1]


def test_the_heads_must_be_shared_equally(ranks):
    with pytest.raises(InvalidOption, match="3 ranks cannot share 4 equally"):
        ranks("--num-ranks", "3")


def test_a_story_that_is_too_long_is_refused(ranks):
    with pytest.raises(InvalidOption, match="at most 1024 tokens together"):
        ranks("--max-tokens", "1024")


def test_ranks_without_a_file_are_refused_with_the_command_to_begin(ranks, tmp_path):
    (tmp_path / LAB.file_name).unlink()
    with pytest.raises(InvalidOption, match="begin with `minipaged lab start 11`"):
        ranks()
