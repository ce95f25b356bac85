"""The memory that steps need is measured before the pool takes the rest. The GPU here is a fake."""

import pytest
import torch
from checkpoints import make_checkpoint

from minipaged import LLM
from minipaged.attention.backend import BACKENDS
from minipaged.config import EngineArgs
from minipaged.errors import InvalidOption
from minipaged.sampling.sampler import Sampler
from minipaged.worker import cache_size, warm_up
from minipaged.worker.cuda_graphs import BYTES_PER_GRAPH
from minipaged.worker.warm_up import StepLimits

CUDA = torch.device("cuda")
LIMITS = StepLimits(max_num_seqs=5, max_num_batched_tokens=40, max_model_len=30, block_size=4)


class FakeGPU:
    """Counts bytes as PyTorch's allocator does: freed memory stays reserved until it is emptied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int = 0, total: int = 0) -> None:
        self.used = self.reserved = self.peak = 0
        for name, value in {
            "empty_cache": self.empty_cache,
            "reset_peak_memory_stats": self.reset_peak,
            "memory_reserved": lambda device: self.reserved,
            "max_memory_reserved": lambda device: self.peak,
            "mem_get_info": lambda device: (free - self.reserved, total),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def take(self, num_bytes: int) -> None:
        self.used += num_bytes
        self.reserved = max(self.reserved, self.used)
        self.peak = max(self.peak, self.reserved)

    def empty_cache(self) -> None:
        self.reserved = self.used

    def reset_peak(self, device: torch.device) -> None:
        self.peak = self.reserved


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    return LLM(folder, num_blocks=4, skip_tokenizer_init=True).engine.executor.runner.model


def test_the_peak_is_what_the_work_takes_beyond_what_was_taken_before(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    gpu.take(1000)  # weights
    gpu.take(70_000)  # left over from loading
    gpu.take(-70_000)

    def work():
        for num_bytes in (300, 500, -500, 100, -400):
            gpu.take(num_bytes)

    assert warm_up.peak_memory(work, CUDA) == 800
    assert gpu.reserved == 1000  # the pool may have all of the rest


@pytest.mark.parametrize(
    ("num_seqs", "num_tokens", "longest", "prompts"),
    [
        (5, 40, 30, [30, 7, 1, 1, 1]),
        (5, 5, 30, [1] * 5),
        (1, 40, 100, [40]),
        (3, 40, 10, [10, 10, 10]),  # no step can have more tokens
        (1, 40, 30, [30]),
    ],
)
def test_the_largest_steps_use_every_token_and_the_longest_context(
    num_seqs, num_tokens, longest, prompts
):
    first, second = warm_up.largest_steps(StepLimits(num_seqs, num_tokens, longest, 4))
    assert [len(each.token_ids) for each in first.sequences] == prompts
    assert [len(each.token_ids) for each in second.sequences] == [1] * num_seqs
    for step in (first, second):
        ends = [each.context_len + len(each.token_ids) for each in step.sequences]
        assert ends[0] == longest == max(ends)
        assert all(
            set(each.block_table) == {0} and len(each.block_table) * 4 >= end
            for each, end in zip(step.sequences, ends, strict=True)
        )


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_the_largest_steps_run_with_one_block(model, kv_dtype, monkeypatch):
    rows: list[int] = []
    sample = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda *args: rows.append(len(args[1])) or sample(*args))
    cpu = torch.device("cpu")
    runner = warm_up._runner_without_pool(model, BACKENDS["torch"], kv_dtype, LIMITS, cpu, None)
    for step in warm_up.largest_steps(LIMITS):
        warm_up.run(runner, step, samples=True)
        warm_up.run(runner, step, samples=False)
    assert rows == [5, 5]
    assert runner.kv_cache._pool[0].shape[2] == 1


def test_graphs_have_a_pool_of_their_own(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    needed = iter((700, 300) * 2)

    def run(*_):
        num_bytes = next(needed)
        gpu.take(num_bytes)
        gpu.take(-num_bytes)

    monkeypatch.setattr(warm_up, "run", run)
    runner = type("Runner", (), {"kv_cache": type("Cache", (), {"device": CUDA})})
    assert warm_up.working_memory(runner, LIMITS, with_graphs=False, samples=True) == 700
    with_graphs = warm_up.working_memory(runner, LIMITS, with_graphs=True, samples=True)
    assert with_graphs == 700 + 300 + 4 * BYTES_PER_GRAPH  # sizes 1, 2, 4 and 5


def test_on_a_gpu_the_pool_leaves_room_for_a_step(model, monkeypatch):
    gpu = FakeGPU(monkeypatch, free=600_000, total=1_000_000)
    gpu.take(50_000)  # weights
    run: list[bool] = []
    monkeypatch.setattr(warm_up, "_runner_without_pool", lambda *_: None)
    monkeypatch.setattr(warm_up, "working_memory", lambda *args: run.append(args[-2]) or 150_000)
    monkeypatch.setattr(warm_up, "bytes_per_block", lambda *_: 1000)
    options = EngineArgs(gpu_memory_utilization=0.8)
    safe = BACKENDS["reference"].__class__("safe", *(lambda: None,) * 2, cuda_graph_safe=True)
    for backend in (BACKENDS["torch"], safe):
        # 800,000 may be used, 450,000 are, and a step takes 150,000.
        assert warm_up.room_for_blocks(model, backend, options, LIMITS, CUDA) == 200
    options = EngineArgs(gpu_memory_utilization=0.8, enforce_eager=True)
    warm_up.room_for_blocks(model, safe, options, LIMITS, CUDA)
    assert run == [False, True, False]  # whether there will be graphs


def test_a_gpu_without_room_for_a_block_is_refused_with_what_a_step_takes(monkeypatch):
    FakeGPU(monkeypatch, free=500, total=1000)
    assert cache_size.blocks_that_fit(100, CUDA, 1.0, working_bytes=400) == 1
    with pytest.raises(InvalidOption, match="only 90 are left, besides 410 for a step"):
        cache_size.blocks_that_fit(100, CUDA, 1.0, working_bytes=410)


def test_on_a_cpu_no_step_is_run_before_the_pool_is_sized(model, monkeypatch):
    monkeypatch.setattr(warm_up, "largest_steps", None)
    args = EngineArgs(), LIMITS, torch.device("cpu")
    assert warm_up.room_for_blocks(model, BACKENDS["torch"], *args) > 0
