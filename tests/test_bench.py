"""The benchmarks behind the numbers in the documentation: they run, and check what they measure."""

import json
import statistics

import pytest
from test_cli import minipaged

from minipaged.bench.sharing import alpaca_lengths


def test_the_lengths_have_the_means_of_the_papers_trace():
    prompts, outputs = zip(*alpaca_lengths(1000, longest=1024, seed=0), strict=True)
    assert statistics.mean(prompts) == pytest.approx(19.31, rel=0.02)
    assert statistics.mean(outputs) == pytest.approx(58.45, rel=0.02)
    assert max(p + o for p, o in zip(prompts, outputs, strict=True)) <= 1024
    assert alpaca_lengths(5, 1024, seed=0) == alpaca_lengths(5, 1024, seed=0)
    assert alpaca_lengths(5, 1024, seed=0) != alpaca_lengths(5, 1024, seed=1)


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


def test_bench_alone_says_what_there_is(capsys, monkeypatch):
    code, out, _ = minipaged(capsys, monkeypatch, "bench")
    assert code == 0
    assert "sharing" in out
