"""`minipaged bench engine`: its figures are as defined, and a wrong token is found."""

import io
import json
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from commands import minipaged
from in_this_process import InThisProcess
from rich.console import Console

from minipaged.attention.backend import BACKENDS
from minipaged.evaluation.bench import engine, engine_process, engine_report, engine_sides
from minipaged.evaluation.bench.engine_referee import Referee, WrongTokens
from minipaged.evaluation.bench.engine_report import Row
from minipaged.evaluation.bench.engine_workload import FULL, QUICK, make_model
from minipaged.sampling.sampler import Draws

QUICKLY = ("bench", "engine", "--quick", "--rounds", "1")
AGAINST = ("--against", "transformers")
STATIC = [f"transformers, static {size}" for size in QUICK.static_batches]
CONTINUOUS = "transformers, continuous"


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(engine_process, "AskedProcess", InThisProcess)
    monkeypatch.setattr(engine_process.Engine, "peak_bytes", lambda _: 12345)


def test_every_case_is_reported_with_ratios_tokens_and_memory(
    capsys, monkeypatch, tmp_path, in_this_process
):
    saved = tmp_path / "engine.json"
    code, out, _ = minipaged(
        capsys, monkeypatch, *QUICKLY[:-1], "2", *AGAINST, "--json", "--save", str(saved)
    )
    assert code == 0
    report = json.loads(out)
    assert json.loads(saved.read_text()) == report
    assert "torch" in report["machine"]
    rows = {(row["case"], row["by"]): row for row in report["rows"]}
    assert list(rows) == [
        ("decode, batch 1", "minipaged"),
        ("decode, batch 1", "transformers"),
        ("decode, batch 1", "a read of all weights"),
        ("decode, batch 3", "minipaged"),
        ("decode, batch 3", "transformers"),
        ("prefill, 1 x 40", "minipaged"),
        ("prefill, 1 x 40", "transformers"),
        ("prefill, 3 x 20", "minipaged"),
        ("prefill, 3 x 20", "transformers"),
        ("prefix 24, 3 requests", "minipaged"),
        ("prefix 24, 3 requests", "transformers"),
        *(("mixed trace", by) for by in ("minipaged", *STATIC, CONTINUOUS)),
    ]
    wanted = sum(output for _, output in QUICK.mixed_requests())
    for (case, by), row in rows.items():
        assert row["failure"] is None
        assert len(row["rounds"]) == 2
        assert row["tokens_per_second"] == pytest.approx(row["num_tokens"] / row["seconds"])
        assert row["cores"] == pytest.approx(
            statistics.median(cpu / seconds for seconds, cpu in row["rounds"])
        )
        assert (row["percent_of_read"] is not None) == (case == "decode, batch 1")
        assert (row["times_seconds"] is not None) == by.startswith("transformers")
        if case == "mixed trace":
            assert row["num_tokens"] == wanted
        if by != "a read of all weights":
            assert row["num_alike"] == row["num_requests"]
            assert row["peak_bytes"] == 12345
            assert (row["weights"], row["keys"]) == ("float32", "float32")
    assert rows["decode, batch 3", "minipaged"]["num_tokens"] == 3 * QUICK.new_tokens
    for by in ("minipaged", "transformers"):
        assert rows["prefill, 3 x 20", by]["num_tokens"] == 3 * 20
        assert rows["prefix 24, 3 requests", by]["num_tokens"] == 3 * QUICK.new_tokens


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_the_peak_of_each_side_is_measured_in_a_process_of_its_own(tmp_path):
    weight_bytes = 4 * make_model(QUICK, tmp_path)
    options = engine._options(QUICK, tmp_path, "float32")
    with ExitStack() as stack:
        ours = engine_process.start_engine(stack, None, options, tmp_path)
        assert ours.about["weights"] == "float32"
        before = ours.peak_bytes()
        ours.forget_peak()
        assert ours.ask("serve", 60, requests=[([1, 2], 3)], after_first=False)["num_tokens"] == 3
        after = ours.peak_bytes()
    assert weight_bytes < after < before + 1e8 < 1e9


def test_the_table_names_what_was_measured(capsys, monkeypatch, in_this_process):
    code, out, _ = minipaged(capsys, monkeypatch, *QUICKLY)
    assert code == 0
    for part in ("decode, batch 1", "decode, batch 3", "mixed trace", "a read of all weights"):
        assert part in out
    for part in ("tokens/s", "cores", "random weights", "weights in float32", "torch"):
        assert part in out
    assert "transformers" not in out


def test_a_table_shows_ratios_close_calls_peaks_and_failed_sides():
    rows = [
        Row("mixed trace", "minipaged", num_requests=24, num_alike=23, num_close=1),
        Row("mixed trace", "static 8", times_seconds=2.5, times_cpu_seconds=3.0, peak_bytes=10**9),
        Row("mixed trace", "continuous", failure="ImportError: no such thing"),
    ]
    columns = [list(column.cells) for column in engine_report.as_table(rows).columns]
    assert columns[0][1:] == ["  minipaged", "  static 8", "  continuous"]
    assert columns[3:] == [
        ["", "", "2.50 x", ""],
        ["", "", "3.00 x", ""],
        ["", "", "1.00", ""],
        ["", "23/24, 1 close", "", ""],
    ]
    assert engine_report.failures(rows) == ["continuous has no figures: ImportError: no such thing"]


def test_the_longest_names_and_figures_fit_into_80_columns_without_folding():
    row = Row(
        "mixed trace", STATIC[0], 1, 1.0, 1.0, 10000.5, times_seconds=12.34, times_cpu_seconds=1.2,
        cores=12.5, num_requests=32, num_alike=20, num_close=12, peak_bytes=10**10,
    )  # fmt: skip
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(engine_report.as_table([row, replace(row, by=CONTINUOUS)]))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[-1].rstrip().endswith("20/32, 12 close")


def test_the_mixed_trace_is_the_one_that_the_documentation_names():
    requests = FULL.mixed_requests()
    assert requests == FULL.mixed_requests()
    assert len(requests) == 24
    assert sum(len(prompt) for prompt, _ in requests) == 3262
    assert sum(output for _, output in requests) == 2637
    assert len({tuple(prompt) for prompt, _ in requests}) == 24


def test_no_two_rounds_or_cases_have_a_prompt_with_the_same_start():
    prompts = [
        tuple(prompt[:8])
        for case in FULL.cases()
        for number in range(3)
        for prompt, _ in case.requests(number)[: 1 if case.kind == "prefix" else None]
    ]
    assert len(prompts) == len(set(prompts))


def test_the_requests_of_the_prefix_case_share_exactly_the_prefix():
    prompts = [prompt for prompt, _ in FULL.sharing_requests()]
    assert len(prompts) == FULL.num_sharing
    assert len({tuple(prompt[: FULL.prefix_len]) for prompt in prompts}) == 1
    assert len({prompt[FULL.prefix_len] for prompt in prompts}) > 1


# ---- the same tokens -----------------------------------------------------------------------------


def off_by_one(monkeypatch):
    right = Draws.read

    def wrong(self):
        return [token._replace(token_id=(token.token_id + 1) % 512) for token in right(self)]

    monkeypatch.setattr(Draws, "read", wrong)


def attention_at_twice_the_scale(monkeypatch):
    right = BACKENDS["torch"].paged_attention

    def wrong(q, k_cache, v_cache, batch, scale):
        return right(q, k_cache, v_cache, batch, 2 * scale)

    monkeypatch.setitem(BACKENDS, "torch", replace(BACKENDS["torch"], paged_attention=wrong))


@pytest.mark.parametrize("fault", [off_by_one, attention_at_twice_the_scale])
@pytest.mark.parametrize("options", [(), AGAINST, ("--dtype", "bfloat16")])
def test_a_wrong_token_in_a_timed_run_is_detected(
    capsys, monkeypatch, in_this_process, fault, options
):
    fault(monkeypatch)
    code, out, err = minipaged(capsys, monkeypatch, *QUICKLY, *options)
    assert code == 2
    assert out == ""
    assert "minipaged's token" in err
    assert "below the likeliest" in err
    assert len(err.strip().splitlines()) == 1


def test_bfloat16_is_compared_with_the_reference_and_agreement_counted(
    capsys, monkeypatch, in_this_process
):
    code, out, _ = minipaged(
        capsys, monkeypatch, *QUICKLY, *AGAINST, "--dtype", "bfloat16", "--json"
    )
    assert code == 0
    [row] = [
        row
        for row in json.loads(out)["rows"]
        if (row["case"], row["by"]) == ("mixed trace", "minipaged")
    ]
    assert 0 <= row["num_alike"] <= row["num_requests"] == QUICK.num_requests


@pytest.mark.parametrize(
    ("trusts", "tokens", "shortfall", "num_close"),
    [
        (True, [1, 2], None, 0),  # as the baseline has them: not looked at again
        (True, [1, 3], 5e-4, 1),
        (True, [1, 3], 0.0, 1),  # the baseline itself was rounded otherwise
        (False, [1, 2], 0.0, 0),
        (False, [1, 2], 5e-4, 1),
        (True, [1, 3], 2e-3, None),
        (False, [1, 2], 2e-3, None),
        (False, [1, 2], float("nan"), None),
        (True, [1], 0.0, None),
    ],
)
def test_only_rounding_may_choose_another_token(trusts, tokens, shortfall, num_close):
    referee = Referee("the judge", lambda *_: [0.0, shortfall])
    given = ("decode", "minipaged", [([7], 2)], [tokens], [[1, 2]] if trusts else None, 1e-3)
    if num_close is None:
        with pytest.raises(WrongTokens, match="decode, request 0"):
            referee.check(*given)
    else:
        assert referee.check(*given) == num_close


def test_both_sides_measure_the_distance_to_the_likeliest_token_alike(tmp_path):
    make_model(QUICK, tmp_path)
    options = engine._options(QUICK, tmp_path, "float32")
    ours = engine_sides.Minipaged(options, backend="reference")
    theirs = engine_sides.Transformers(options)
    prompt, tokens = [3, 1, 4, 1, 5], [9, 2, 6]
    found = ours.shortfalls(prompt, tokens)
    assert min(found) > 0
    assert found == pytest.approx(theirs.shortfalls(prompt, tokens), abs=1e-4)
    [greedy] = ours.serve([(prompt, 4)], after_first=False)["tokens"]
    assert ours.shortfalls(prompt, greedy) == [0, 0, 0, 0]


# ---- what cannot be ------------------------------------------------------------------------------


def test_a_baseline_that_cannot_run_does_not_stop_the_others(capsys, monkeypatch, in_this_process):
    def broken(*_):
        raise RuntimeError("no CPU, please")

    monkeypatch.setattr(engine_sides.Transformers, "_manager", broken)
    code, out, _ = minipaged(capsys, monkeypatch, *QUICKLY, *AGAINST, "--json")
    assert code == 0
    failures = {row["by"]: row["failure"] for row in json.loads(out)["rows"]}
    assert failures.pop(CONTINUOUS) == "RuntimeError: no CPU, please"
    assert set(failures.values()) == {None}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (AGAINST, "transformers is not installed: pip install 'minipaged[test]'"),
        (("--plot", "bars.png"), "pip install 'minipaged[plot]'"),
        (("--plot", "bars.txt"), "give a file that ends in .png"),
        (("--dtype", "float16"), "choose float32 or bfloat16"),
        (("--against", "sglang"), "give vllm, openvino, llama.cpp, transformers, or one of"),
        (("--against", "vllm", "--against", "vllm"), "run `python -m venv "),
        (("--save", "no/such/folder/engine.json"), "there is no folder no/such/folder"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_runs(capsys, monkeypatch, options, sentence):
    monkeypatch.setattr(engine_report, "find_spec", lambda _: None)
    monkeypatch.setattr(engine_process, "find_spec", lambda _: None)
    monkeypatch.setattr(engine, "measure", lambda *_: pytest.fail("it ran"))
    code, out, err = minipaged(capsys, monkeypatch, *QUICKLY, *options)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt(), 130), (WrongTokens("a token is wrong"), 2)]
)
def test_a_run_that_is_stopped_reports_the_cases_that_it_has_finished(
    capsys, monkeypatch, in_this_process, tmp_path, stop, code
):
    measure, saved = engine.measure, tmp_path / "engine.json"

    def stopped(*args):
        for row in measure(*args):
            if row.case == "decode, batch 3":
                raise stop
            yield row

    monkeypatch.setattr(engine, "measure", stopped)
    found, out, _ = minipaged(capsys, monkeypatch, *QUICKLY, "--json", "--save", str(saved))
    assert found == code
    cases = {row["case"] for row in json.loads(out)["rows"]}
    assert cases == {"decode, batch 1"}
    assert json.loads(saved.read_text()) == json.loads(out)


def test_bars_are_drawn_to_a_file(tmp_path):
    rows = [
        Row("decode, batch 1", "minipaged", tokens_per_second=20.0),
        Row("decode, batch 1", "transformers", failure="no"),
        Row("mixed trace", "minipaged", tokens_per_second=90.0),
    ]
    engine_report.plot_rows(rows, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_every_engine_gets_the_same_number_of_threads(capsys, monkeypatch, in_this_process):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[0] if chosen else 7)
    minipaged(capsys, monkeypatch, *QUICKLY)
    assert chosen == [7]
    chosen.clear()
    minipaged(capsys, monkeypatch, *QUICKLY, *AGAINST, "--threads", "1")
    assert chosen == [1, 1, 1]  # this process, and both engines
