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
KERNELS = ("copy", "decode", "merge", "naive", "prefill", "rope_and_store", "store")
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

from minipaged.evaluation.bench import compile as bench
from minipaged.evaluation.bench.launches import LLAMA_3_8B, Setting

setting = Setting(*LLAMA_3_8B, torch.float16, "auto")
rows = bench.compile_all([setting], [80])
print(json.dumps({row.kernel: (row.stack_bytes, row.copies_ahead) for row in rows}))
"""


def test_the_kernels_compile_for_ampere_spill_nothing_and_load_ahead(tmp_path):
    """For one model. `test_compile.py` looks at all models and at Hopper as well."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", ONE_MODEL], env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 8
    assert not any(stack_bytes for stack_bytes, _ in found.values())
    assert all(found[kernel][1] > 0 for kernel in ("decode", "decode, split", "prefill"))
