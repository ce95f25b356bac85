"""The kernels as the compiler makes them for GPUs that are not there: do they fit, are they fast?

In processes of their own: a process either compiles kernels or interprets them.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton exists for Linux only"),
    pytest.mark.full,  # test_bench_triton.py compiles the kernels for one model and one GPU
    pytest.mark.xdist_group("compile"),
]

COMPILE = """
import json
from dataclasses import asdict
from io import StringIO

import torch
from rich.console import Console
from triton import JITFunction

from minipaged.attention.triton.shapes import TileShape, TileShapes
from minipaged.evaluation.bench import compile as bench
from minipaged.evaluation.bench.launches import LLAMA_3_8B, Setting


def as_dict(row):
    return {**asdict(row), "programs": row.programs}


launch = JITFunction.run
rows = list(bench.compile_all())

setting = Setting(*LLAMA_3_8B, torch.float16, "auto")
tried = bench.compile_all([setting], [80], TileShape(32, 2, 3), TileShapes(128, 64, 4, 3))
tried = {row.kernel: row for row in tried}

from types import SimpleNamespace

import minipaged.attention.triton.decode as decoding
from minipaged.evaluation.bench import launches

setting = Setting(*LLAMA_3_8B, torch.bfloat16, "int8")
with launches.catch_launches() as caught:
    run = JITFunction.run
    metadata = SimpleNamespace(shared=20_000, num_warps=4)
    loaded = SimpleNamespace(n_regs=64, metadata=metadata, _init_handles=lambda: None)
    JITFunction.run = lambda *args, **kwargs: run(*args, **kwargs) or loaded
    decoding.programs_per_gpu = lambda device, *resources: 8 * 64 * 5
    launches.decode = lambda *args: decoding.decode(*args[:6])
    launches.launch_everything(setting)
decodes = [launch for launch in caught if launch.kernel is decoding.decode_kernel][:2]
asked_and_launched = [bench._identity(launch, 90) for launch in decodes]

table = StringIO()
Console(file=table, width=200).print(bench.as_table(rows))
report = {
    "rows": [as_dict(row) for row in rows],
    "tried": {kernel: as_dict(row) for kernel, row in tried.items()},
    "asked_and_launched": asked_and_launched,
    "table": table.getvalue(),
    "launches_again": JITFunction.run is launch,
}
print(json.dumps(report))
"""

DECODES = ["decode", "decode, split"]
MULTIPLYING = [*DECODES, "prefill"]
KERNELS = {*MULTIPLYING, "merge", "naive", "store", "rope_and_store", "copy"}
KERNELS |= {"add_rms_norm", "silu_and_mul"}
KIB = 1024
SHARED_OF_A_PROGRAM = {80: 163 * KIB, 90: 227 * KIB}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Everything compiled with an empty cache of kernels."""
    cache = tmp_path_factory.mktemp("triton")
    run = python(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache))
    assert run.returncode == 0, run.stderr
    assert any(cache.iterdir())
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def rows(report):
    return report["rows"]


def of(rows, kernel: str, **wanted):
    """The rows of this kernel with these values; at least one."""
    found = [
        row
        for row in rows
        if row["kernel"] == kernel and all(row[name] == value for name, value in wanted.items())
    ]
    assert found, f"{kernel} was not compiled for {wanted}"
    return found


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_kernel_compiles_for_ampere_and_hopper(rows, dtype, sm):
    assert {row["kernel"] for row in rows if (row["dtype"], row["sm"]) == (dtype, sm)} == KERNELS


def test_nothing_is_compiled_twice(rows):
    for kernel in MULTIPLYING:
        options = {"heads": "32/8 x 128", "dtype": "float16", "kv_dtype": "auto", "sm": 80}
        assert len(of(rows, kernel, **options)) == 1
    # `merge` depends on decode's tile, which is the same for both 8-bit types.
    merges = of(rows, "merge", heads="32/8 x 128", dtype="bfloat16", sm=90)
    assert [row["kv_dtype"] for row in merges] == ["auto", "int8"]


def test_fp8_is_compiled_for_gpus_that_support_it(rows):
    assert {row["sm"] for row in rows if row["kv_dtype"] == "fp8"} == {90}
    assert {row["sm"] for row in rows if row["kv_dtype"] == "int8"} == {80, 90}


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_no_kernel_spills_its_registers(rows, kernel):
    for row in of(rows, kernel):
        assert row["stack_bytes"] == 0, row


def test_a_kernel_with_too_few_warps_would_be_seen_to_spill(report):
    # The same tile on half the threads: twice as many numbers each.
    assert report["tried"]["prefill"]["num_warps"] == 4
    assert report["tried"]["prefill"]["stack_bytes"] > 0


def test_other_tiles_than_the_shipped_ones_can_be_tried(rows, report):
    for kernel in DECODES:
        [shipped] = of(rows, kernel, heads="32/8 x 128", dtype="float16", kv_dtype="auto", sm=80)
        assert report["tried"][kernel]["num_warps"] == 2 < shipped["num_warps"]
        assert report["tried"][kernel]["shared_bytes"] < shipped["shared_bytes"]


def test_every_program_fits_into_shared_memory(rows):
    for row in rows:
        assert row["shared_bytes"] <= SHARED_OF_A_PROGRAM[row["sm"]], row
        assert row["programs"] >= 1, row


def test_several_decoding_programs_share_a_multiprocessor(rows):
    for row in (row for kernel in DECODES for row in of(rows, kernel)):
        threads = 32 * row["num_warps"]
        assert 2 * threads * row["registers"] <= 65536, row
        assert 2 * row["shared_bytes"] <= SHARED_OF_A_PROGRAM[row["sm"]], row
        assert row["programs"] >= (3 if row["kv_dtype"] == "auto" else 2), row


def test_the_kernel_that_is_asked_for_its_resources_is_the_one_that_is_launched(report):
    # `decode` compiles it without a launch, to know how many of its programs a GPU runs at a time.
    asked, launched = report["asked_and_launched"]
    assert asked == launched


@pytest.mark.parametrize("kernel", MULTIPLYING)
def test_the_next_tile_is_loading_while_one_is_multiplied(rows, kernel):
    # Keys and values, and with 8 bits their scales.
    for row in of(rows, kernel):
        assert row["copies_ahead"] >= (2 if row["kv_dtype"] == "auto" else 4), row


@pytest.mark.parametrize(("sm", "instruction"), [(80, "HMMA"), (90, "HGMMA")])
def test_prefill_multiplies_with_the_best_instruction_of_the_gpu(rows, sm, instruction):
    # HGMMA: four warps together multiply a matrix that is in shared memory.
    assert {row["instructions"] for row in of(rows, "prefill", sm=sm)} == {instruction}


def test_decode_multiplies_on_the_tensor_cores_and_the_plain_kernels_do_not(rows):
    # HGMMA takes 64 rows, and decode has 16.
    for kernel in DECODES:
        assert {row["instructions"] for row in of(rows, kernel)} == {"HMMA"}
    for kernel in KERNELS.difference(MULTIPLYING):
        assert {row["instructions"] for row in of(rows, kernel)} == {"-"}


@pytest.mark.parametrize("kernel", MULTIPLYING)
def test_keys_are_read_16_bytes_at_a_time_while_others_are_multiplied(rows, kernel):
    assert {row["reads"] for row in of(rows, kernel)} == {"LDGSTS.128"}


# A Hopper multiprocessor issues 4 instructions per cycle, and 16 to 18 bytes arrive per cycle.
POSSIBLE = 226


@pytest.mark.parametrize("kernel", DECODES)
def test_decode_is_not_limited_by_the_number_of_instructions(rows, kernel):
    for row in of(rows, kernel):
        share = row["issued_per_kib"] / POSSIBLE
        assert 0 < share < (0.3 if row["kv_dtype"] == "auto" else 0.6), row


def test_int8_decode_needs_fewer_instructions_per_key_than_16_bits(rows):
    for kernel in DECODES:
        options = {"heads": "32/8 x 128", "dtype": "bfloat16", "sm": 90}
        [sixteen] = of(rows, kernel, kv_dtype="auto", **options)
        [eight] = of(rows, kernel, kv_dtype="int8", **options)
        assert eight["issued_per_kib"] / 2 < sixteen["issued_per_kib"]


def test_kernels_without_matrices_have_no_count_of_instructions(rows):
    for kernel in KERNELS.difference(MULTIPLYING):
        assert {row["issued_per_kib"] for row in of(rows, kernel)} == {0.0}


def test_launches_work_again_after_compiling(report):
    assert report["launches_again"]


def test_the_table_names_kernels_shapes_and_gpus(report):
    lines = report["table"].splitlines()
    assert len(lines) == 1 + len(report["rows"])
    for part in (
        "prefill",
        "32/8 x 128",
        "bfloat16",
        "int8",
        "sm_90",
        "HGMMA",
        "LDGSTS.128",
        "ahead",
        "issued / KiB",
    ):
        assert part in report["table"]


def test_interpreted_kernels_cannot_be_compiled():
    code = "from minipaged.evaluation.bench.compile import compile_all; next(compile_all())"
    run = python(code, TRITON_INTERPRET="1")
    assert run.returncode == 1
    error = run.stderr.splitlines()[-1]
    assert error.startswith("minipaged.errors.InvalidOption")
    assert "set TRITON_INTERPRET=0" in error
