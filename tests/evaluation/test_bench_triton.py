"""The benchmarks of the Triton kernels, on tiny cases in Triton's interpreter."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from commands import minipaged
from rich.console import Console
from triton.runtime.interpreter import InterpretedFunction

from minipaged.attention.triton.copy_blocks import copy_blocks
from minipaged.attention.triton.machine import is_interpreted
from minipaged.attention.triton.shapes import TileShape, TileShapes
from minipaged.evaluation.bench import kernel, tune
from minipaged.evaluation.bench.launches import Setting, launch_everything
from minipaged.evaluation.bench.timing import median_seconds
from minipaged.evaluation.bench.writes import measure_writes

CPU = torch.device("cpu")
KERNELS = """
    add_rms_norm copy decode merge naive prefill rope_and_store silu_and_mul store
""".split()
TINY = kernel.Heads("tiny", 2, 1, 32)

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="this process compiles for a GPU")


@pytest.mark.filterwarnings("ignore:no GPU")
def test_the_writing_kernels_are_compared_with_their_pytorch_versions():
    rows = list(measure_writes(TINY, 2, "triton", CPU, torch.float32, (3,), 2))
    assert [row.backend for row in rows] == [
        "index",
        "triton",
        "rotate, then triton",
        "RoPE within triton",
        "index",
        "triton",
    ]


def test_the_sweep_lists_the_fastest_first_next_to_the_default(monkeypatch):
    monkeypatch.setattr(tune, "DECODE_SHAPES", [TileShape(16, 4, 2)])
    monkeypatch.setattr(tune, "PREFILL_SHAPES", [TileShapes(16, 16, 4, 2)])
    cases = [kernel.Case(TINY, 1, 32), kernel.Case(TINY, 1, 32, queries=32)]
    rows = list(tune.sweep(cases, CPU, torch.float32, rounds=1))
    assert {row.case for row in rows} == set(cases)
    for case in cases:
        times = [row.seconds for row in rows if row.case == case]
        assert times == sorted(times)
        [shipped] = {row.shipped_choice for row in rows if row.case == case}
        assert shipped in {row.choice for row in rows if row.case == case}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tune.as_table(rows, best=1))
    assert console.export_text().count("(shipped)") == 2


class CurrentGpu:
    """A fake `torch.cuda.device_of`: the device of the tensor whose GPU is current."""

    def __init__(self) -> None:
        self.device: torch.device | None = None

    @contextmanager
    def device_of(self, tensor: torch.Tensor) -> Iterator[None]:
        before, self.device = self.device, tensor.device
        yield
        self.device = before


def test_the_gpu_of_the_tensors_is_current_at_every_launch(monkeypatch):
    current = CurrentGpu()
    launches: dict[str, torch.device | None] = {}

    def run(kernel, *args, **kwargs):
        launches[kernel.__name__] = current.device

    monkeypatch.setattr(torch.cuda, "device_of", current.device_of)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    launch_everything(Setting(4, 2, 64, torch.float16, "auto"))
    meta = torch.device("meta")
    assert launches == {f"{name}_kernel": meta for name in KERNELS}
    # Swapping: the pool of the host is the first argument, the pairs are on the GPU.
    pool, pairs = torch.zeros(1, 2, 3, 1, 4, 8), torch.empty(1, 2, device="meta")
    copy_blocks(pool, pool.to("meta"), pairs)
    assert launches["copy_kernel"] == meta
    assert current.device is None


def test_works_are_timed_with_the_gpu_of_their_device_current(monkeypatch):
    current = CurrentGpu()
    monkeypatch.setattr(torch.cuda, "device_of", current.device_of)
    seen: set[torch.device | None] = set()
    median_seconds({"work": lambda: seen.add(current.device)}, CPU, rounds=1)
    assert seen == {CPU}


def test_compiling_in_a_process_that_interprets_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # set back afterwards, whatever the command does
    code, _, err = minipaged(capsys, monkeypatch, "bench", "compile")
    assert code != 0
    assert "TRITON_INTERPRET=0" in err


ONE_MODEL = """
import json

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from minipaged.evaluation.bench import compile as bench
from minipaged.evaluation.bench.launches import (
    LLAMA_3_8B, Setting, catch_launches, launch_everything
)

setting = Setting(*LLAMA_3_8B, torch.float16, "auto")
rows = list(bench.compile_all([setting], [80]))


class AbsentGPU:
    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def note(*, cache_hit, **_):
    hits.append(cache_hit)


hits = []
knobs.compilation.listener = note
driver.set_active(AbsentGPU())
with catch_launches() as launches:
    launch_everything(setting, 80)
for launch in launches:  # as for a launch, up to the launch itself
    launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.kwargs)
found = {row.kernel: (row.stack_bytes, row.copies_ahead) for row in rows}
print(json.dumps({"found": found, "hits": hits}))
"""


@pytest.fixture(scope="module")
def one_model(tmp_path_factory):
    """The kernels of one model, compiled. `test_compile.py` looks at all models and at Hopper."""
    cache = tmp_path_factory.mktemp("triton")
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", ONE_MODEL], env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.xdist_group("one_model")
def test_the_kernels_compile_for_ampere_spill_nothing_and_load_ahead(one_model):
    found = one_model["found"]
    assert found.keys() == {*KERNELS, "decode, split"}
    assert not any(stack_bytes for stack_bytes, _ in found.values())
    assert all(found[kernel][1] > 0 for kernel in ("decode", "decode, split", "prefill"))


@pytest.mark.xdist_group("one_model")
def test_a_launch_finds_the_kernel_that_was_compiled_before(one_model):
    assert one_model["hits"] == [True] * len(one_model["found"])
