"""The paper's figures: exact values, values within a bar, and the printed report.

The bars are those that the commands print; the traces are short and always the same ones.
"""

import json
from dataclasses import replace
from importlib import import_module

import pytest

from minipaged.cli import paper as command
from minipaged.cli.main import app
from minipaged.errors import InvalidOption
from minipaged.evaluation.paper import fig2, fig12, fig13, fig16, fig17
from minipaged.evaluation.paper.figure import QUICK, Check, Figure, Result, near
from minipaged.evaluation.paper.serving import Case, find_capacity, in_parallel, serve
from minipaged.evaluation.sim import fitted
from minipaged.evaluation.sim.capacity import THRESHOLDS
from minipaged.evaluation.sim.requests import Decoding
from minipaged.evaluation.sim.systems import SYSTEMS

SHORT = replace(QUICK, short_seconds=80.0)


def figure(name: str) -> Figure:
    return import_module(f"minipaged.evaluation.paper.{name}").FIGURE


def missed(result: Result) -> list[Check]:
    return [check for check in result.checks if check.is_met is False]


def draws(result: Result) -> bool:
    canvas = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    figure(result.name).draw(result, canvas)
    return len(canvas.axes) > 0


def as_saved(result: Result) -> Result:
    """What comes back out of the JSON file can be drawn as well."""
    data = json.loads(json.dumps(result.as_dict(), allow_nan=False))["data"]
    return replace(result, data=data)


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["table1", "fig3"])
def test_arithmetic_comes_out_exactly(name):
    result = figure(name).run(SHORT)
    assert not missed(result)
    assert draws(result)


@pytest.mark.full
def test_the_memory_is_used_as_in_figure_2():
    result = fig2.FIGURE.run(SHORT)
    assert not missed(result)
    for bars in result.data["bars"].values():
        assert sum(bars) == pytest.approx(100)
    assert draws(as_saved(result))


@pytest.mark.full
def test_as_many_requests_run_at_a_time_as_in_figure_13():
    result = fig13.FIGURE.run(SHORT)
    assert not missed(result)
    assert result.data["sharegpt/orca-max"] == pytest.approx(7.0)
    assert draws(as_saved(result))


@pytest.mark.full
def test_a_chatbot_gains_and_the_three_orcas_are_alike():
    result = fig17.FIGURE.run(SHORT)
    assert not missed(result)
    assert draws(as_saved(result))


@pytest.mark.full
def test_a_shared_prefix_gains_what_figure_16_says():
    result = fig16.FIGURE.run(SHORT)
    assert not missed(result)
    assert draws(as_saved(result))


def what_they_bear(server: str, workload: str, systems) -> dict[str, dict[float, float]]:
    """By system and threshold, in requests per second."""
    searches = [fig12._search(server, workload, system, SHORT) for system in systems]
    found = in_parallel(find_capacity, searches, "capacities")
    return {each.search.case.system: each.rates for each in found}


@pytest.mark.full
@pytest.mark.parametrize("workload", ["sharegpt", "alpaca"])
def test_systems_are_in_the_paper_s_order_at_every_threshold(workload):
    rates = what_they_bear("opt-13b", workload, SYSTEMS)
    for threshold in THRESHOLDS:
        sustained = [rates[system][threshold] for system in SYSTEMS]
        assert sustained == sorted(sustained, reverse=True), f"at {threshold} s per token"
    over = {system: rates["vllm"][0.2] / rates[system][0.2] for system in SYSTEMS}
    if workload == "sharegpt":
        assert 1.4 <= over["orca-oracle"] <= 2.1
        assert 2.4 <= over["orca-max"] <= 3.7
    else:
        assert 1.2 <= over["orca-oracle"] <= 1.4


def test_175b_gains_next_to_nothing_on_short_requests():
    rates = what_they_bear("opt-175b", "alpaca", ("vllm", "orca-oracle"))
    assert rates["vllm"][0.2] / rates["orca-oracle"][0.2] < 1.1


def test_parallel_samples_save_as_much_as_in_figure_15():
    case = Case(workload="alpaca", rate=4.0, seconds=500.0, watch_memory=True)
    for width, paper in ((2, 6.09), (6, 9.79)):
        saved = serve(replace(case, decoding=Decoding("sample", width))).blocks_saved
        assert 100 * saved == pytest.approx(paper, abs=1.5)


# ---- the report ----------------------------------------------------------------------------------


def test_a_bar_is_met_or_missed_or_absent():
    assert near("x", 10.0, 10.9, percent=10).is_met
    assert not near("x", 10.0, 11.1, percent=10).is_met
    assert near("x", 50.0, 52.0, points=2).is_met
    assert not near("x", 50.0, 47.9, points=2).is_met
    assert Check("x", "7", 6.0, low=6.5).is_met is False
    assert Check("x", "7", 6.0, high=6.5).is_met is True
    assert Check("x", "7", 6.0).is_met is None


def test_a_missed_bar_is_printed_as_missed():
    result = Result("x", "X", "simulated", [Check("a", "7", 6.0, 6.5, None, "%", "because")], {})
    cells = [next(iter(column.cells)) for column in result.as_table().columns]
    assert cells == ["a", "7 %", "6 %", "from 6.5", "MISSED, because"]
    assert result.as_dict()["checks"][0]["met"] is False


def test_fitted_constants_are_defined_in_one_place():
    declared = {name for name in vars(fitted) if name.isupper()}
    assert declared == {
        "SHAREGPT_OUTPUT_CV",
        "ALPACA_OUTPUT_CV",
        "STEP_SECONDS",
        "SEQUENCE_SECONDS",
        "SYNC_SECONDS",
        "PEAKEDNESS",
    }


@pytest.mark.parametrize("name", command.NAMES)
def test_every_figure_has_a_module_that_knows_its_name(name):
    found = figure(name)
    assert found.name == name
    assert found.title


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    app(["paper", "fig3", "table1", "--out", str(tmp_path)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "2,038" in printed or "2038" in printed
    assert "0 missed" in printed
    saved = json.loads((tmp_path / "fig3.json").read_text(encoding="utf-8"))
    assert saved["effort"] == "quick"
    assert all(check["met"] for check in saved["checks"])
    assert (tmp_path / "fig3.png").exists() == ("JSON and pictures" in printed)
    assert not list(tmp_path.glob("*.part"))


def test_the_command_speaks_json(tmp_path, capsys):
    app(["paper", "fig3", "--json", "--out", str(tmp_path)], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["name"] == "fig3"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fig4"], "choose all, or some of table1, fig1"),
        (["fig3", "--quick", "--full"], "exclude each other"),
    ],
)
def test_invalid_arguments_are_reported_in_a_sentence(arguments, words, tmp_path):
    with pytest.raises(InvalidOption, match=words):
        app(["paper", *arguments, "--out", str(tmp_path)], standalone_mode=False)


def test_a_ratio_that_meets_its_bar_but_not_the_papers_range_says_so():
    def remark(paper: str, ours: float) -> str:
        check = Check("a", paper, ours, 1.4, 2.1, "x")
        return fig12._remarked(check, "opt-175b", "sharegpt").remark

    assert remark("1.7 to 2.7", 1.667) == fig12.OUTSIDE
    assert remark("1.7 to 2.7", 1.8) == remark("up to 22", 1.5) == remark("1.3", 1.5) == ""
    assert "264 GB" in remark("1.7 to 2.7", 1.2)


def test_a_capacity_report_is_printed_for_people_and_for_machines(capsys):
    small = "capacity --model llama-3-8b --gpu l4-24g --rate 1 --input 100 --output 100".split()
    small += ["--longest", "512", "--max-num-seqs", "16"]
    app(small, standalone_mode=False)
    printed = capsys.readouterr().out
    for word in ("blocks of 16", "concurrent requests", "knee", "The bottleneck"):
        assert word in printed
    app([*small, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["num_blocks"] > 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gpt-5"], "there is no model"),
        (["--gpu", "abacus"], "there is no GPU"),
        (["--rate", "0"], "--rate is 0"),
        (["--spread", "9"], "--spread is 9"),
        (["--longest", "100"], "raise --longest"),
        (["--num-gpus", "0"], "num_gpus is 0"),
        (["--trace", "x.csv", "--input", "9"], "so --input would be ignored: leave it out"),
        (["--trace", "x.csv", "--output", "9"], "so --output would be ignored"),
    ],
)
def test_a_capacity_report_that_cannot_be_made_says_why(arguments, words):
    with pytest.raises(InvalidOption, match=words):
        app(["capacity", *arguments], standalone_mode=False)
