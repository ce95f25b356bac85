"""The benchmarks that give the documentation its numbers: they run, and check their results."""

import json
import statistics
import sys
from dataclasses import replace
from datetime import date

import pytest
import torch
from commands import minipaged

from minipaged.attention import reference
from minipaged.attention.backend import BACKENDS
from minipaged.cli import bench_options
from minipaged.evaluation.bench import cases, kernel, load
from minipaged.evaluation.bench.sharing import alpaca_lengths
from minipaged.models.loader import check_checkpoint


def test_the_lengths_have_the_means_of_the_papers_trace():
    prompts, outputs = zip(*alpaca_lengths(1000, longest=1024, seed=0), strict=True)
    assert statistics.mean(prompts) == pytest.approx(19.31, rel=0.02)
    assert statistics.mean(outputs) == pytest.approx(58.45, rel=0.02)
    assert max(p + o for p, o in zip(prompts, outputs, strict=True)) <= 1024
    assert alpaca_lengths(5, 1024, seed=0) == alpaca_lengths(5, 1024, seed=0)
    assert alpaca_lengths(5, 1024, seed=0) != alpaca_lengths(5, 1024, seed=1)


@pytest.mark.full
def test_parallel_sampling_saves_what_the_formula_says_and_beams_save_more(capsys, monkeypatch):
    code, out, _ = minipaged(
        capsys,
        monkeypatch,
        "bench",
        "sharing",
        "--num-requests",
        "3",
        "--block-size",
        "8",
        "--json",
    )
    assert code == 0
    report = json.loads(out)
    assert "torch" in report["machine"]
    saved = {(row["method"], row["width"]): row for row in report["rows"]}
    assert [width for _, width in saved] == [2, 4, 6, 2, 4, 6]
    for width in (2, 4, 6):
        samples, beams = saved["parallel sampling", width], saved["beam search", width]
        assert samples["percent"] == pytest.approx(samples["formula_percent"], abs=1e-9)
        assert samples["percent"] < beams["percent"] < 100
    assert saved["parallel sampling", 6]["paper_percent"] == 9.79


def test_the_report_is_a_table_with_the_papers_numbers_and_the_machine(capsys, monkeypatch):
    code, out, _ = minipaged(capsys, monkeypatch, "bench", "sharing", "--num-requests", "1")
    assert code == 0
    for part in ("parallel sampling", "beam search", "55.16 %", "by formula", "torch", "Python"):
        assert part in out


# ---- kernels and steps ---------------------------------------------------------------------------

F32 = torch.float32
CPU = torch.device("cpu")
TINY = kernel.Heads("tiny", 2, 1, 32)


def test_kernels_are_reported_with_their_floor_and_their_baseline(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        kernel, "CPU_CASES", [kernel.Case(TINY, 2, 32), kernel.Case(TINY, 1, 32, 32)]
    )
    saved = tmp_path / "kernel.json"
    code, out, _ = minipaged(
        capsys, monkeypatch, "bench", "kernel", "--device", "cpu", "--json", "--save", str(saved)
    )
    assert code == 0
    report = json.loads(out)
    assert json.loads(saved.read_text()) == report
    for part in ("torch", "triton", "Python", date.today().isoformat()):
        assert part in report["machine"]
    found = {(row["what"], row["backend"]): row for row in report["rows"]}
    assert {name for what, name in found if what == "decode"} == {
        "SDPA, grouped",
        "SDPA, enable_gqa",
        "torch",
        "blockwise",
    }
    assert {what for what, _ in found} == {"decode", "prefill", "store", "copy, 4 layers"}
    assert min(row["times_baseline"] for row in report["rows"] if row["what"] == "decode") == 1
    for row in report["rows"]:
        assert row["seconds"] > 0
        if row["what"] == "decode":
            assert row["percent_of_floor"] > 0


def test_a_case_that_runs_out_of_memory_is_skipped_and_named(capsys, monkeypatch):
    right = BACKENDS["torch"].paged_attention

    def greedy(q, k_cache, v_cache, batch, scale):
        if len(q) == 3:
            raise torch.OutOfMemoryError
        return right(q, k_cache, v_cache, batch, scale)

    monkeypatch.setitem(BACKENDS, "torch", replace(BACKENDS["torch"], paged_attention=greedy))
    monkeypatch.setattr(kernel, "CPU_CASES", [kernel.Case(TINY, n, 32) for n in (2, 3, 4)])
    code, out, _ = minipaged(capsys, monkeypatch, "bench", "kernel", "--device", "cpu")
    assert code == 0
    assert "Skipped, because memory is too small: decode of 3 x 32 tokens." in " ".join(out.split())


def test_the_kernel_table_names_what_was_measured(capsys, monkeypatch):
    monkeypatch.setattr(kernel, "CPU_CASES", [kernel.Case(TINY, 2, 32, kv_dtype="int8")])
    code, out, _ = minipaged(capsys, monkeypatch, "bench", "kernel", "--device", "cpu")
    assert code == 0
    for part in ("tiny", "int8", "SDPA, grouped", "of bandwidth", "x best SDPA", "torch.float32"):
        assert part in out


@pytest.mark.parametrize(
    "case",
    [
        kernel.Case(TINY, 2, 32),
        kernel.Case(TINY, 1, 48, 16),
        kernel.Case(TINY, 3, 96, short=32),
    ],
)
def test_a_kernel_with_a_wrong_result_is_not_timed(monkeypatch, case):
    right = BACKENDS["torch"].paged_attention

    def wrong(q, k_cache, v_cache, batch, scale):
        return right(q, k_cache, v_cache, batch, 2 * scale)

    list(kernel.measure([case], ["torch"], CPU, torch.float32))
    monkeypatch.setitem(BACKENDS, "torch", replace(BACKENDS["torch"], paged_attention=wrong))
    with pytest.raises(kernel.WrongResult, match="differs by"):
        list(kernel.measure([case], ["torch"], CPU, torch.float32))


def test_a_kernel_that_skips_one_tile_of_many_is_not_timed(monkeypatch):
    right = BACKENDS["reference"].paged_attention

    def forgetful(q, k_cache, v_cache, batch, scale):
        shorter = {"context_lens": batch.context_lens - 64, "seq_lens": batch.seq_lens - 64}
        batch = replace(batch, **shorter)
        return right(q, k_cache, v_cache, batch, scale)

    monkeypatch.setitem(
        BACKENDS, "reference", replace(BACKENDS["reference"], paged_attention=forgetful)
    )
    with pytest.raises(kernel.WrongResult, match=r"16,384 tokens, int8: a result differs by"):
        list(
            kernel.measure([kernel.Case(TINY, 1, 16384, kv_dtype="int8")], ["reference"], CPU, F32)
        )


@pytest.mark.parametrize("unwritten", [0, 47])
def test_a_kernel_that_leaves_a_row_unwritten_is_not_timed(monkeypatch, unwritten):
    right = BACKENDS["torch"].paged_attention

    def lazy(q, k_cache, v_cache, batch, scale):
        out = right(q, k_cache, v_cache, batch, scale)
        out[unwritten] = torch.nan  # what `measure` leaves in freed memory
        return out

    monkeypatch.setitem(BACKENDS, "torch", replace(BACKENDS["torch"], paged_attention=lazy))
    with pytest.raises(kernel.WrongResult, match="inf%"):
        list(kernel.measure([kernel.Case(TINY, 1, 48, 48)], ["torch"], CPU, F32))


def test_one_long_sequence_among_short_ones_adds_few_bytes():
    case = kernel.Case(TINY, 5, 96, short=16)
    inputs = cases.make_inputs(case, CPU, torch.float32)
    assert [span.seq_len for span in inputs.batch.spans] == [96, 16, 16, 16, 16]
    assert inputs.batch.positions.tolist() == [95, 15, 15, 15, 15]
    assert kernel._bytes_read(inputs) == 2 * (96 + 4 * 16) * 32 * 4
    even = cases.make_inputs(kernel.Case(TINY, 5, 96, kv_dtype="int8"), CPU, torch.float32)
    assert kernel._bytes_read(even) == 2 * 5 * 96 * (32 + 4)


def test_the_pool_of_a_case_contains_the_keys_of_the_contiguous_case():
    case = kernel.Case(TINY, 3, 48, queries=5)
    inputs = cases.make_inputs(case, CPU, torch.float32)
    for keys, pool in ((inputs.keys, inputs.k_cache), (inputs.values, inputs.v_cache)):
        for seq, table in enumerate(inputs.batch.block_tables):
            assert torch.equal(reference.gather(pool, table, 48), keys[seq].transpose(0, 1))
        assert pool.is_contiguous()
        new = keys[:, :, -5:].transpose(1, 2).flatten(0, 1)  # [tokens, kv_heads, head_dim]
        slots = pool.transpose(1, 2).flatten(0, 1)  # [slots, kv_heads, head_dim]
        assert torch.equal(slots[inputs.batch.slot_mapping], new)


def test_formats_are_reported_with_their_gain_and_their_error(capsys, monkeypatch):
    code, out, _ = minipaged(
        capsys, monkeypatch, "bench", "formats", "--num-questions", "3", "--json"
    )
    assert code == 0
    rows = {row["kv_dtype"]: row for row in json.loads(out)["rows"]}
    assert rows["float32"]["attention_error"] == rows["float32"]["num_changed"] == 0
    errors = [rows[name]["attention_error"] for name in ("float16", "bfloat16", "int8", "fp8")]
    assert errors == sorted(errors)
    assert errors[0] > 0
    assert errors[-1] < 0.05
    assert rows["int8"]["times_tokens"] == rows["fp8"]["times_tokens"] == 256 / 132


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_loading_is_reported_with_its_peak_and_the_size_of_the_weights(
    capsys, monkeypatch, tmp_path
):
    tiny = {**load.CHECKPOINTS["gpt2, small"], "n_embd": 48, "n_layer": 2, "vocab_size": 64}
    monkeypatch.setattr(load, "CHECKPOINTS", {"tiny": tiny})
    monkeypatch.setattr(load, "FROM_AND_TO", [("bfloat16", "float32")])
    monkeypatch.setattr(load, "find_spec", lambda _: None)  # transformers takes seconds to import
    saved = tmp_path / "load.json"
    code, out, _ = minipaged(capsys, monkeypatch, "bench", "load", "--save", str(saved))
    assert code == 0
    for part in ("tiny", "bfloat16", "float32", "minipaged", "peak / weights", "torch"):
        assert part in out
    rows = json.loads(saved.read_text())["rows"]
    assert [row["num_files"] for row in rows] == [1, load.NUM_SHARDS]
    for row in rows:
        assert 4 * (64 + 1024) * 48 < row["weight_bytes"] < 1e6
        assert row["peak_bytes"] >= 0
        assert row["seconds"] > 0


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("name", load.CHECKPOINTS)
def test_the_checkpoints_to_load_are_complete(name, num_files, tmp_path):
    small = {"n_embd": 24, "n_layer": 1, "vocab_size": 9, "n_head": 2, "num_hidden_layers": 1}
    small |= {"hidden_size": 24, "intermediate_size": 32}
    load.make_checkpoint({**load.CHECKPOINTS[name], **small}, tmp_path, torch.float16, num_files)
    assert len(list(tmp_path.glob("*.safetensors"))) == num_files
    assert check_checkpoint(tmp_path).num_layers == 1


def test_compiling_without_triton_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(bench_options, "find_spec", lambda _: None)
    code, _, err = minipaged(capsys, monkeypatch, "bench", "compile")
    assert code != 0
    assert '"triton" is not installed' in err


def test_tuning_without_a_gpu_is_refused(capsys, monkeypatch):
    code, _, err = minipaged(capsys, monkeypatch, "bench", "tune", "--device", "cpu")
    assert code != 0
    assert "needs" in err or "measures a GPU" in err


def test_a_decode_step_is_reported_with_the_bytes_that_it_reads(capsys, monkeypatch):
    code, out, _ = minipaged(
        capsys,
        monkeypatch,
        *("bench", "step", "--device", "cpu", "--num-seqs", "2", "--context-len", "9"),
        *("--quick", "--json"),
    )
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [(row["backend"], row["graphs"]) for row in rows] == [
        ("torch", False),
        ("reference", False),
    ]
    for row in rows:
        assert row["seconds"] >= row["model_seconds"] > 0
        assert row["floor_seconds"] > 0
        assert list(row["parts"]) == ["schedule", "batch", "model", "sample", "commit", "rest"]
        assert all(part > 0 for part in row["parts"].values())
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"], rel=0.5)


@pytest.mark.parametrize("model", [["--quick"], ["--model", "storyteller"]])
def test_a_decode_step_on_two_ranks_is_split_into_what_each_does(capsys, monkeypatch, model):
    code, out, err = minipaged(
        capsys,
        monkeypatch,
        *("bench", "step", "--tensor-parallel-size", "2", "--num-seqs", "3", "--context-len", "9"),
        *(*model, "--json"),
    )
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["rank"] for row in rows] == [0, 1]
    num_layers = 2 if model == ["--quick"] else 4
    for row in rows:
        assert (row["num_seqs"], row["context_len"]) == (3, 9)
        parts = [row[f"{name}_seconds"] for name in ("message", "compute", "all_reduce", "gather")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(row["sum_seconds"])
        assert (row["num_all_reduces"], row["num_gathers"]) == (2 * num_layers + 1, 1)
        # kind, four counts, and of each sequence six numbers, a token and perhaps a block
        assert 4 * (5 + 3 * 7) <= row["message_bytes"] <= row["largest_message_bytes"]
        assert row["largest_message_bytes"] <= 4 * (5 + 3 * 8)
    first, second = rows
    assert first["sum_seconds"] < first["step_seconds"] == second["step_seconds"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "storyteller"], "leave out --model, or raise --tensor-parallel-size"),
        (["--tensor-parallel-size", "2", "--quick", "--model", "x"], "--model and --quick both"),
        (["--tensor-parallel-size", "2", "--model", "nowhere"], "nowhere"),
        (["--tensor-parallel-size", "2", "--context-len", "4090"], "--context-len is 4090, above"),
        (["--tensor-parallel-size", "5", "--quick"], "choose 1 or 2 or 4"),
    ],
)
def test_a_measurement_impossible_with_this_number_of_ranks_is_refused(
    capsys, monkeypatch, options, sentence
):
    code, out, err = minipaged(capsys, monkeypatch, "bench", "step", "--device", "cpu", *options)
    assert (code, out) == (2, "")
    assert sentence in err


def test_ranks_with_gpus_are_not_timed_by_their_hosts(capsys, monkeypatch):
    from minipaged.cli import bench_step

    gpu = torch.device("cuda"), torch.float32, True
    monkeypatch.setattr(bench_step, "choose", lambda *_: gpu)
    code, _, err = minipaged(capsys, monkeypatch, "bench", "step", "--tensor-parallel-size", "2")
    assert code == 2
    assert "use --device cpu" in err


def test_bench_without_a_command_lists_the_commands(capsys, monkeypatch):
    code, out, _ = minipaged(capsys, monkeypatch, "bench")
    assert code == 0
    assert "sharing" in out


@pytest.mark.parametrize("weight_dtype", ["float32", "float16"])
def test_packed_weights_are_compared_with_plain_ones(weight_dtype, monkeypatch):
    from minipaged.evaluation.bench import linear

    if not linear.works(linear.InFloat16 if weight_dtype == "float16" else linear.InOneDNN):
        pytest.skip("this processor, or this torch, packs nothing")
    monkeypatch.setattr(linear, "BYTES_IN_TURN", 2**20)
    rows = list(linear.measure(torch.float32, weight_dtype, {"a matrix": (512, 512)}))
    assert [row.num_rows for row in rows] == list(linear.NUM_ROWS)
    assert all(row.plain_seconds > 0 and row.packed_seconds > 0 for row in rows)
    assert len(linear.as_table(rows).rows) == len(rows)


def test_weights_that_cannot_be_packed_are_not_timed(capsys, monkeypatch):
    from minipaged.evaluation.bench import linear

    monkeypatch.setattr(linear, "works", lambda form, dtype: False)
    for weight_dtype in ("float32", "float16"):
        code, _, err = minipaged(
            capsys, monkeypatch, "bench", "linear", "--weight-dtype", weight_dtype
        )
        assert code == 2
        assert f"cannot pack {weight_dtype} weights for products in torch.float32" in err


def test_both_decoding_methods_are_compared_with_sdpa(monkeypatch):
    from minipaged.evaluation.bench import decode

    monkeypatch.setattr(decode, "BYTES_IN_TURN", 2**20)
    rows = list(decode.measure(torch.float32, [(1, 20, 1), (3, 40, 2)]))
    assert [(row.num_seqs, row.context_len, row.part_in_use) for row in rows] == [
        (1, 20, 1.0),
        (3, 40, 0.5),
    ]
    for row in rows:
        assert row.sdpa_seconds > 0
        assert row.gathered_seconds > 0
        assert row.in_place_seconds > 0
        assert row.chosen == "gathered"
    assert len(decode.as_table(rows).rows) == 2


def test_prefixes_are_read_per_owner_and_per_block(monkeypatch):
    from minipaged.evaluation.bench import prefix
    from minipaged.evaluation.bench.decode_step import TINY

    monkeypatch.setattr(prefix, "BYTES_IN_TURN", 2**20)
    cases = [prefix.Case(1, 3, 32, 5), prefix.Case(2, 2, 16, 20)]
    rows = list(prefix.measure_attention(torch.float32, cases))
    rows += prefix.measure_steps(torch.float32, TINY, cases[:1])
    assert [row.part for row in rows] == ["attention", "attention", "step"]
    for row in rows:
        assert min(row.unshared_seconds, row.per_owner_seconds, row.per_block_seconds) > 0
        assert row.chosen == "per owner"
    assert len(prefix.as_table(rows).rows) == 3


def test_a_case_of_prefixes_shares_blocks_or_none():
    from minipaged.evaluation.bench.prefix import Case

    shared, num_blocks = Case(2, 3, 32, 5).sequences(shared=True)
    tables = [each.block_table for each in shared]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2] != tables[3][:2]
    assert len({block for table in tables for block in table}) == num_blocks == 2 * 2 + 6
    assert {each.context_len for each in shared} == {32 + 5 - 1}
    unshared, num_blocks = Case(2, 3, 32, 5).sequences(shared=False)
    assert len({block for each in unshared for block in each.block_table}) == num_blocks == 18


def test_bookkeeping_is_timed_at_every_size(monkeypatch, capsys):
    from minipaged.evaluation.bench import bookkeeping

    monkeypatch.setattr(bookkeeping, "POOLS", (10, 1_000))
    monkeypatch.setattr(bookkeeping, "RUNNING", (1, 20))
    monkeypatch.setattr(bookkeeping, "SIMULATED_SECONDS", 5.0)
    rows = list(bookkeeping.measure())
    assert [(row.what, row.size) for row in rows[:4]] == [
        *(("allocate and free", size) for size in (10, 1_000)),
        *(("schedule and commit", size) for size in (1, 20)),
    ]
    assert [row.what for row in rows[4:]] == ["simulate a step, vllm", "simulate a step, orca-max"]
    assert all(row.seconds > 0 for row in rows)
    assert len(bookkeeping.as_table(rows).rows) == 6
