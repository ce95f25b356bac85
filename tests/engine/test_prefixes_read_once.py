"""The engine gives the same tokens whether shared prefixes are read once per block or per owner."""

from collections.abc import Callable
from typing import Any

import pytest
from checkpoints import make_checkpoint
from engine_runs import run
from step_watching import all_tokens, prompt, small, watch

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.attention import shared_prefix, torch_decode
from minipaged.attention.shared_prefix import SharedDecodes

Workload = Callable[[LLM], list[list[list[int]]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def sampled(max_tokens: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=5, **options)


def cached_prefix(llm: LLM) -> list[list[list[int]]]:
    start = prompt(22)
    prompts = [start + prompt(length, first=length) for length in (3, 4, 9, 17)]
    first = run(llm, [start], sampled(2))
    return all_tokens(first + run(llm, [*prompts, prompt(5, first=50)], sampled()))


def cached_prefixes_of_several_lengths(llm: LLM) -> list[list[list[int]]]:
    starts = [prompt(length, first=length % 3) for length in (8, 17, 13)]
    prompts = [start + prompt(5, first=20 + i) for i in range(3) for start in starts]
    return all_tokens(run(llm, starts, sampled(1)) + run(llm, prompts, sampled()))


def samples(llm: LLM) -> list[list[list[int]]]:
    # 22 is within a block of 4: the samples fork there, and copy that block before they write.
    steps = watch(llm)
    found = run(llm, [prompt(22), prompt(5, first=3), prompt(16, first=9)], sampled(n=4))
    assert any(step.copies for step in steps)
    return all_tokens(found)


def beams(llm: LLM) -> list[list[list[int]]]:
    params = BeamSearchParams(beam_width=4, max_tokens=14, ignore_eos=True)
    return all_tokens(run(llm, [prompt(10), prompt(6, first=3)], params))


WORKLOADS: list[Workload] = [cached_prefix, cached_prefixes_of_several_lengths, samples, beams]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prefixes are read once, however short; a list of how many prefixes each layer has read."""
    found: list[int] = []
    attend = SharedDecodes.attend

    def attend_and_count(self: SharedDecodes, *args: Any):
        found.append(sum(each.blocks.stop - each.blocks.start for each in self.prefixes))
        return attend(self, *args)

    monkeypatch.setattr(shared_prefix, "FEWEST_SAVED", 0)
    monkeypatch.setattr(SharedDecodes, "attend", attend_and_count)
    return found


@pytest.mark.parametrize("rest", ["gathered", "in place"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.__name__)
def test_tokens_are_those_of_the_reference(folder, workload, rest, reads, monkeypatch):
    monkeypatch.setattr(torch_decode, "_is_worth_it", lambda *_: rest == "in place")
    monkeypatch.setattr(torch_decode, "LEAST_IN_USE", 0)
    monkeypatch.setattr(torch_decode, "MOST_ENTRIES", 100)
    expected = workload(small(folder, attention_backend="reference"))
    assert not reads
    assert workload(small(folder, attention_backend="torch")) == expected
    assert reads
    assert max(reads) > 1 or workload is cached_prefix


@pytest.mark.parametrize("kv_cache_dtype", ["float16", "int8", "fp8"])
def test_tokens_of_small_pools_are_those_of_the_reference(folder, kv_cache_dtype, reads):
    options = {"kv_cache_dtype": kv_cache_dtype}
    for workload in (cached_prefix, samples):
        expected = workload(small(folder, attention_backend="reference", **options))
        assert workload(small(folder, attention_backend="torch", **options)) == expected
    assert reads


@pytest.mark.parametrize("max_num_batched_tokens", [64, 6])
def test_prompts_in_the_same_steps_change_nothing(folder, max_num_batched_tokens, reads):
    options = {"max_num_seqs": 6, "max_num_batched_tokens": max_num_batched_tokens}
    prompts = [prompt(12) + prompt(length, first=length) for length in (3, 30, 9, 41, 17)]

    def tokens_of(backend: str):
        llm = small(folder, attention_backend=backend, **options)
        return all_tokens(run(llm, [prompt(12)], sampled(1)) + run(llm, prompts, sampled(n=2)))

    assert tokens_of("torch") == tokens_of("reference")
    assert reads


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("workload", [samples, beams], ids=lambda workload: workload.__name__)
def test_preempted_groups_share_again(folder, workload, preemption, reads):
    expected = workload(small(folder, attention_backend="reference"))
    options = {"num_blocks": 34 if workload is samples else 19, "watermark": 0.0}
    llm = small(folder, attention_backend="torch", preemption=preemption, **options)
    preempted: list[int] = []
    llm.engine.listeners.append(lambda decision, _: preempted.append(len(decision.preempted)))
    assert workload(llm) == expected
    assert sum(preempted) > 0
    assert reads
