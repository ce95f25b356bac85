"""`minipaged bench gpu` without a GPU: the dry run, failures of every kind, the report."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import failing_stages
import pytest
import torch
from commands import minipaged

from minipaged.attention.backend import choose_backend
from minipaged.attention.triton.machine import is_interpreted
from minipaged.evaluation.bench import asked_process, kernel
from minipaged.evaluation.bench.cases import Case, exact_rows, make_inputs
from minipaged.evaluation.bench.gpu import (
    attention,
    child,
    compiling,
    correctness,
    counters,
    markdown,
    report,
    run,
    sampler,
    swap,
)
from minipaged.evaluation.bench.gpu.stage import Part, Setup
from minipaged.evaluation.bench.gpu.stages import STAGES
from minipaged.evaluation.bench.kernel import WrongResult

pytestmark = [
    pytest.mark.skipif(not is_interpreted(), reason="this process compiles for a GPU"),
    pytest.mark.filterwarnings("ignore:no GPU"),
    pytest.mark.xdist_group("bench_gpu"),
]

CPU = torch.device("cpu")
DRY = Setup.here(is_dry=True)
REAL = Setup.here(is_dry=False)
KERNELS_PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


# ---- the dry run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The printed text, and the rows in the file."""
    file = tmp_path_factory.mktemp("dry") / "gpu.jsonl"
    command = [sys.executable, "-m", "minipaged", "bench", "gpu", "--dry-run"]
    finished = subprocess.run(
        [*command, "--save", str(file)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout, file


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_the_dry_run_measures_every_part_of_every_stage(dry_run, stage):
    printed, file = dry_run
    assert f"\n{stage}: " in f"\n{printed}"
    rows = [row for row in run.read(file) if row["stage"] == stage]
    assert [row["status"] for row in rows] == ["measured"] * (len(rows) - 1) + ["finished"]
    [parts] = [each.parts(DRY) for each in STAGES if each.name == stage]
    assert {row["part"] for row in rows[:-1]} == {part.name for part in parts}


def test_figures_of_a_dry_run_are_not_reported(dry_run, capsys, monkeypatch):
    printed, file = dry_run
    assert "its figures mean nothing" in printed
    code, out, err = minipaged(capsys, monkeypatch, "bench", "gpu", "--report", str(file))
    assert (code, out) == (2, "")
    assert "rows of a dry run" in err


def test_the_parts_of_a_real_run_can_be_listed_without_a_gpu():
    for stage in STAGES:
        names = [part.name for part in stage.parts(REAL)]
        assert names
        assert len(names) == len(set(names)), names


def test_the_default_budget_is_below_eight_minutes():
    from minipaged.cli.bench_gpu import gpu

    budget = gpu.__defaults__[1]
    assert budget == sum(stage.seconds for stage in STAGES)
    assert budget + run.GRACE <= 480


def test_the_page_about_benchmarks_has_every_stage_and_its_seconds():
    page = KERNELS_PAGE.with_name("benchmarks.md").read_text(encoding="utf-8")
    table = page[page.index("| stage | seconds | rows |") :].split("\n\n")[0]
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert names == [stage.name for stage in STAGES]
    seconds = {stage.name: stage.seconds for stage in STAGES}
    for row in rows:
        assert int(row[1]) == sum(seconds[name] for name in re.findall(r"`(\w+)`", row[0]))


def test_all_kernels_of_other_stages_are_compiled_before():
    jobs = {job[:5]: job for job in compiling.jobs(REAL)}
    tiles = {(*job[:5], tile) for job in compiling.jobs(REAL) for tile in job[5:] if tile}
    for dtype, case in correctness.typed_cases(REAL):
        assert compiling._job(case, dtype)[:5] in jobs
    for case in attention.cases(REAL):
        job = compiling._job(case, torch.bfloat16)[:5]
        assert job in jobs
        for tile in attention.tiles(REAL, case):
            assert (*job, tile) in tiles


def test_a_kernel_that_cannot_be_compiled_is_a_row_with_the_reason():
    [job] = compiling.jobs(DRY)
    [row] = compiling.compile_jobs(90, [[*job]])  # this process interprets
    assert "set TRITON_INTERPRET=0" in row["kernel"]
    assert (row["heads"], row["dtype"]) == ("2/1 x 32", "float16")


# ---- failures ------------------------------------------------------------------------------------


def test_a_failure_costs_its_own_part_and_rows_are_saved_as_they_finish(tmp_path):
    file = tmp_path / "rows.jsonl"
    measured = run.measure(failing_stages.STAGES, "failing_stages", budget=1000, is_dry=True)
    rows = []
    for row in run.saved(measured, file):
        rows.append(row)
        lines = file.read_text(encoding="utf-8").splitlines()  # while the run continues
        assert [json.loads(line) for line in lines] == rows
    found = {
        stage.name: [(r["status"], r.get("part")) for r in rows if r["stage"] == stage.name]
        for stage in failing_stages.STAGES
    }
    fine = [("measured", "part 0"), ("measured", "part 1"), ("finished", None)]
    assert found["raising"] == [("measured", "wrong"), ("failed", "wrong"), *fine]
    assert found["dying"] == [("failed", "death"), *fine]
    assert found["listing"] == [("failed", "")]
    assert found["last"] == fine
    failures = dict(line.split(", ", 1) for line in report.failures(rows))
    assert "ValueError: the kernel is wrong" in failures["raising"]
    assert "exit code 3" in failures["dying"]
    assert "exit code 4" in failures["listing"]
    assert "in raises" in next(row["trace"] for row in rows if "trace" in row)


class Clock:
    """Replaces the time of a run, and its process: each part takes `seconds`."""

    def __init__(self, monkeypatch, seconds: float, limits: list[float]) -> None:
        self.now = 0.0
        monkeypatch.setattr(run.time, "monotonic", lambda: self.now)

        def ask(child, do, within, **given):
            if do == "parts":
                return [f"part {number}" for number in range(6)]
            limits.append(within)
            self.now += min(seconds, within)
            if seconds > within:
                raise asked_process.ProcessEnded(f"did not answer within {within:.0f} s")
            return {"rows": [{"number": 1}], "failure": None, "is_lost": False}

        monkeypatch.setattr(run._Child, "ask", ask)


def test_a_stage_over_its_budget_is_cut_short_and_says_so(monkeypatch):
    Clock(monkeypatch, 20.0, limits := [])
    stages = [replace_seconds(50), replace_seconds(100)]
    rows = list(run.measure(stages, "", budget=150, is_dry=True))
    statuses = [row["status"] for row in rows]
    assert statuses[:5] == ["measured", "measured", "measured", "cut short", "finished"]
    # The second stage has 90 s: what the first has left.
    assert statuses[5:] == ["measured"] * 5 + ["cut short", "finished"]
    assert rows[3]["part"] == "part 3"
    assert "the 50 s of this stage are used up: 3 of 6 parts are left out" in rows[3]["failure"]
    assert limits[:3] == [80, 60, 40]  # the time of the stage, and the grace


def test_a_part_that_does_not_end_is_ended(monkeypatch):
    Clock(monkeypatch, 1000.0, [])
    rows = list(run.measure([replace_seconds(50)], "", budget=50, is_dry=True))
    assert [row["status"] for row in rows] == ["failed", "cut short", "finished"]
    assert "did not answer within 80 s" in rows[0]["failure"]


def test_a_process_that_lost_the_gpu_is_replaced(monkeypatch):
    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def part_that_reads_too_far():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    answer = child._measure(Part("too far", part_that_reads_too_far), torch.device("cuda"))
    assert answer["is_lost"]
    assert child._measure(Part("too far", part_that_reads_too_far), CPU)["is_lost"] is False

    ended = []
    monkeypatch.setattr(run._Child, "end", lambda self: ended.append(True))
    monkeypatch.setattr(
        run._Child, "ask", lambda self, do, within, **_: ["a"] if do == "parts" else answer
    )
    rows = list(run.measure(failing_stages.STAGES[:1], "", budget=60, is_dry=True))
    assert [row["status"] for row in rows] == ["failed", "finished"]
    assert len(ended) == 2  # after the part, and at the end of the run


def test_time_that_is_left_is_divided_among_the_remaining_stages(monkeypatch):
    given = []
    clock = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])

    def measure_stage(child, stage, seconds, grace):
        given.append(round(seconds))
        clock[0] += 40  # however long it had
        yield {"status": "finished"}

    monkeypatch.setattr(run, "_measure_stage", measure_stage)
    stages = [replace_seconds(30), replace_seconds(30), replace_seconds(30)]
    list(run.measure(stages, "", budget=90, is_dry=True))
    assert given == [30, 25, 10]


def replace_seconds(seconds: float):
    return failing_stages.STAGES[0]._replace(seconds=seconds)


def test_a_file_with_several_runs_is_read_as_the_last_of_each_stage(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"run": "1", "stage": "decode", "n": 1},
        {"run": "1", "stage": "swap", "n": 2},
        {"run": "2", "stage": "decode", "n": 3},
    ]
    assert list(run.saved(rows, file)) == rows
    assert [row["n"] for row in run.read(file)] == [2, 3]


def test_a_process_that_does_not_answer_is_ended_with_all_that_it_started():
    with asked_process.AskedProcess("asked_program", {}) as process:
        other = process.ask("start_another")
        with pytest.raises(asked_process.ProcessEnded, match="did not answer within 0 s"):
            process.ask("hang", within=0.1)
    while is_running(other):  # the signal may take a moment
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def test_a_process_that_ends_by_itself_is_reported_with_its_exit_code():
    with asked_process.AskedProcess("asked_program", {}) as process:
        with pytest.raises(asked_process.ProcessEnded, match="exit code 3"):
            process.ask("exit", within=100)
        process.kill()  # has no effect


# ---- wrong results -------------------------------------------------------------------------------


def forgetful(name, *arguments):
    """A backend that does not see the first 16 keys of a sequence."""
    backend = choose_backend(name, *arguments)

    def attend(q, k_cache, v_cache, batch, scale):
        batch = replace(
            batch,
            block_tables=batch.block_tables[:, 1:].contiguous(),
            context_lens=batch.context_lens - 16,
            seq_lens=batch.seq_lens - 16,
        )
        return backend.paged_attention(q, k_cache, v_cache, batch, scale)

    return replace(backend, paged_attention=attend)


def rows_of(parts: list[Part], number: int) -> list:
    return list(parts[number].measure())


@pytest.mark.parametrize("parts", [correctness.parts, attention.decode_parts])
def test_attention_that_misses_keys_is_refused(monkeypatch, parts):
    assert rows_of(parts(DRY), 0)
    monkeypatch.setattr(kernel, "choose_backend", forgetful)
    with pytest.raises(WrongResult, match="differs by"):
        rows_of(parts(DRY), 0)


def test_a_mixed_batch_that_misses_keys_is_refused(monkeypatch):
    def wrong(name, *arguments):
        backend = choose_backend(name, *arguments)
        attend = backend.paged_attention
        return replace(backend, paged_attention=lambda *given: 1.1 * attend(*given))

    [mixed] = [part for part in correctness.parts(DRY) if "mixed" in part.name]
    monkeypatch.setattr(correctness, "choose_backend", wrong)
    with pytest.raises(WrongResult, match="mixed of 3"):
        list(mixed.measure())


def test_a_graph_with_other_tokens_is_refused(monkeypatch):
    def measure(*_, **__):
        yield from ()
        raise AssertionError("triton and triton generate different tokens")

    monkeypatch.setattr(correctness.decode_step, "measure", measure)
    with pytest.raises(AssertionError, match="different tokens"):
        rows_of(correctness.parts(DRY), -1)


def test_a_tile_with_wrong_results_fails_after_the_others_are_measured(monkeypatch):
    def wrong(q, k_cache, v_cache, batch, scale, out, shape):
        if shape.tile == 32:
            raise RuntimeError("PassManager::run failed")
        out.fill_(1.0)

    shapes = [attention.TileShape(16, 4, 2), attention.TileShape(32, 4, 2)]
    monkeypatch.setattr(attention, "TINY_TILES", shapes)
    monkeypatch.setattr(attention, "decode", wrong)
    answer = child._measure(attention.decode_parts(DRY)[0], CPU)
    backends = [row["backend"] for row in answer["rows"]]
    assert [name for name in backends if name.startswith("triton")] == ["triton"]
    assert "triton 16,4,2, decode of 1 x 272 tokens" in answer["failure"]
    assert "triton 32,4,2: PassManager::run failed" in answer["failure"]


def test_a_tile_that_is_too_large_is_left_out(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def too_large(*_, **__):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(attention, "decode", too_large)
    backends = {row.backend for row in rows_of(attention.decode_parts(DRY), 0)}
    assert "triton" in backends
    assert "triton 16,4,2" not in backends


@pytest.mark.parametrize("name", sampler.OPTIONS)
def test_a_token_that_the_options_exclude_is_refused(name):
    logits = torch.arange(2000.0)[None] / 100  # the last is the likeliest
    sampler.check(name, logits, [1999])
    if name != "temperature":  # which excludes none
        with pytest.raises(WrongResult, match=f"{name}: token 0 was chosen"):
            sampler.check(name, logits, [0])


def test_blocks_that_change_while_they_are_swapped_are_refused(monkeypatch):
    def clears(self, pairs):
        self.clear([block for _, block in pairs])

    monkeypatch.setattr(swap.KVCache, "swap_in", clears)
    with pytest.raises(WrongResult, match="have changed"):
        rows_of(swap.parts(DRY), 2)


def test_a_needle_outweighs_all_other_keys():
    case = Case(kernel.Heads("", 4, 2, 32), 3, 96)
    inputs = make_inputs(case, CPU, torch.float32, seed=1, needles=True)
    places = set()
    for seq in range(3):
        for head in range(4):
            scores = inputs.keys[seq, head // 2] @ inputs.q[seq, head] * inputs.scale  # [length]
            weights = scores.softmax(dim=0)
            assert weights.max() > 0.95
            places.add(int(weights.argmax()) // 16)
    assert places == set(range(6))  # every block has one
    plain = make_inputs(case, CPU, torch.float32, seed=1)
    assert torch.equal(plain.q, inputs.q)
    assert not torch.equal(exact_rows(plain)[1], exact_rows(inputs)[1])


# ---- counters ------------------------------------------------------------------------------------

CSV = """==PROF== Connected to process 7
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","decode_kernel(bf16*, bf16*)","GPU Speed Of Light Throughput","DRAM Throughput","%","91.20"
"0","decode_kernel(bf16*, bf16*)","Launch Statistics","Registers Per Thread","register/thread","96"
"0","decode_kernel(bf16*, bf16*)","Launch Statistics","Function Cache Configuration","","none"
"""


def install_ncu(folder: Path, monkeypatch, script: str) -> None:
    ncu = folder / "ncu"
    ncu.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_counters_are_read_from_ncu(tmp_path, monkeypatch):
    (tmp_path / "out.csv").write_text(CSV, encoding="utf-8")
    install_ncu(tmp_path, monkeypatch, f"cat {tmp_path}/out.csv")
    rows = rows_of(counters.parts(DRY), 0)
    assert [(row.kernel, row.metric, row.value) for row in rows] == [
        ("decode_kernel", "DRAM Throughput", "91.20"),
        ("decode_kernel", "Registers Per Thread", "96"),
    ]


def test_the_program_that_ncu_measures_runs(tmp_path, monkeypatch):
    # All options of ncu end before the program's name.
    install_ncu(tmp_path, monkeypatch, 'while [ "$1" != "-m" ]; do p=$1; shift; done; exec $p "$@"')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    [row] = rows_of(counters.parts(DRY), 1)
    assert (row.metric, row.unit) == ("not measured", "exit code 0")


def test_counters_that_are_not_permitted_are_a_row_with_the_reason(tmp_path, monkeypatch):
    install_ncu(tmp_path, monkeypatch, "echo '==ERROR== ERR_NVGPUCTRPERM' >&2; exit 1")
    [row] = rows_of(counters.parts(DRY), 0)
    assert (row.metric, row.unit) == ("not measured", "exit code 1")
    assert "ERR_NVGPUCTRPERM" in row.value


def test_a_machine_without_ncu_has_a_row_that_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(counters, "PLACES", ())
    [row] = rows_of(counters.parts(DRY), 0)
    assert "not installed" in row.value


# ---- the report ----------------------------------------------------------------------------------


def decode_row(backend: str, seconds: float, **changes) -> dict:
    row = kernel.Row(
        "decode",
        "32/8",
        64,
        "8,192",
        "auto",
        backend,
        seconds,
        92.0,
        0.9,
        None,
        1e-3,
        2_000_000_000,
    )
    given = {
        "run": "2026-12-01T10:00:00",
        "dry_run": False,
        "stage": "decode",
        "status": "measured",
    }
    return {**given, "part": "", **vars(row), **changes}


def step_row(times_floor: float) -> dict:
    given = {"run": "2026-12-01T10:00:00", "dry_run": False, "stage": "step", "status": "measured"}
    figures = {"floor_seconds": 1e-3, "model_times_floor": 1.1, "seconds": 1e-3 * times_floor}
    sizes = {"num_seqs": 64, "context_len": 1024, "graphs": True}
    return {**given, "part": "", **sizes, **figures, "times_floor": times_floor}


ROWS = [
    decode_row("SDPA, grouped", 600e-6),
    decode_row("triton", 540e-6),
    decode_row("triton 64,4,3", 530e-6),
    decode_row("triton", 60e-6, num_seqs=1, lengths="32,768", percent_of_floor=70.0, num_bytes=100),
    decode_row("SDPA, grouped", 60e-6, num_seqs=1, lengths="32,768"),
    step_row(1.42),
    {**step_row(1.0), "status": "failed", "part": "1 x 1,024", "failure": "OutOfMemoryError: no"},
]


def test_the_section_says_for_each_aim_whether_it_is_met():
    text = markdown.section(ROWS)
    aims = [line.split(" | ")[-1].removesuffix(" |") for line in text.splitlines()[4:9]]
    assert aims == ["92 %", "70 %, missed", "0.90 x", "not measured", "1.42 x, missed"]
    assert (
        "| 32/8 | 64 x 8,192 | auto | 540.0 us | 92 % | 0.90 x SDPA, grouped "
        "| 0.98 x (triton 64,4,3) |"
    ) in text
    assert "- step, 1 x 1,024: failed: OutOfMemoryError: no" in text


def test_the_page_about_kernels_has_what_the_file_of_a_run_says():
    """`minipaged bench gpu --save docs/gpu.jsonl`, then `--report docs/gpu.jsonl`."""
    file = KERNELS_PAGE.with_name("gpu.jsonl")
    rows = run.read(file) if file.exists() else []
    page = KERNELS_PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- minipaged bench gpu --report -->\n", "<!-- end -->\n"
    marked = page[page.index(begin) + len(begin) : page.index(end)]
    assert marked.strip() == markdown.section(rows)


def test_a_file_is_reported_as_markdown(capsys, monkeypatch, tmp_path):
    file = tmp_path / "gpu.jsonl"
    list(run.saved(ROWS, file))
    code, out, _ = minipaged(capsys, monkeypatch, "bench", "gpu", "--report", str(file))
    assert code == 0
    assert out.strip() == markdown.section(ROWS)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("seconds", 0.0123, "12.30 ms"),
        ("model_seconds", 0.000456, "456.0 us"),
        ("seconds_per_step", 1e-6, "1.0 us"),
        ("percent_of_floor", 91.234, "91.2 %"),
        ("error", 0.00123, "1.2e-03"),
        ("peak_bytes", 1234567, "1,234,567"),
        ("teraflops", 612.345, "612.3"),
        ("graphs", True, "yes"),
        ("kernel", "k" * 70, "k" * 57 + "..."),
        ("error", None, ""),
    ],
)
def test_a_value_is_shown_in_the_unit_of_its_column(name, value, text):
    assert report.cell(name, value) == text


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "needs a GPU, and none was found"),
        (["--dry-run", "--stages", "decode,dance"], "there is no stage 'dance': choose among"),
        (["--report", "x.jsonl", "--dry-run"], "leave out the others"),
        (["--report", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--budget", "5"], "10"),
    ],
)
def test_what_cannot_be_run_is_refused(capsys, monkeypatch, options, sentence):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # set back afterwards
    code, out, err = minipaged(capsys, monkeypatch, "bench", "gpu", *options)
    assert (code, out) == (2, "")
    assert sentence in err


def test_a_failed_part_gives_exit_code_1_and_json_lines(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(run, "measure", lambda *_: iter(ROWS))
    code, out, _ = minipaged(capsys, monkeypatch, "bench", "gpu", "--dry-run", "--json")
    assert code == 1
    assert [json.loads(line) for line in out.splitlines()] == ROWS
