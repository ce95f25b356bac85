"""Serving without a model: traces, costs, the loop, capacities; nothing here imports torch."""

import json
import math
import subprocess
import sys
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.cli.main import app
from minipaged.errors import InvalidOption
from minipaged.evaluation.sim import planner
from minipaged.evaluation.sim.capacity import Curve
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS, GPUS, MODELS
from minipaged.evaluation.sim.cost_model import CostModel
from minipaged.evaluation.sim.planner import deploy, estimate_capacity
from minipaged.evaluation.sim.requests import Decoding, SimRequest, genealogy
from minipaged.evaluation.sim.simulator import Simulation
from minipaged.evaluation.sim.systems import SYSTEMS, Setting, build_scheduler
from minipaged.evaluation.sim.traces import (
    WORKLOADS,
    Lengths,
    TraceRequest,
    chat_trace,
    mean_lengths,
    poisson_trace,
    read_trace,
)
from minipaged.memory import CheckedMemory

SERVER = DEPLOYMENTS["opt-13b"]
COSTS = CostModel(SERVER)
SMALL = Setting(num_slots=1600, longest=512)


def simulate(system: str, trace, setting=SMALL, **options):
    return Simulation(SYSTEMS[system], setting, COSTS, trace, **options).run()


SHORT = Lengths(40.0, 30.0, 0.8, 0.8, longest=512)
TRACE = poisson_trace(SHORT, rate=20.0, duration=10.0)

# ---- traces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_filtered_trace_has_the_means_of_the_paper(name):
    lengths = WORKLOADS[name]
    drawn = lengths.draw(50_000, seed=1)
    inputs, outputs = (sum(column) / len(drawn) for column in zip(*drawn, strict=True))
    assert inputs == pytest.approx(lengths.input_mean, rel=0.03)
    assert outputs == pytest.approx(lengths.output_mean, rel=0.03)
    assert all(p + o < 2048 and min(p, o) >= 4 for p, o in drawn)


def test_arrivals_are_poisson():
    trace = poisson_trace(SHORT, rate=50.0, duration=200.0)
    gaps = [b.arrival - a.arrival for a, b in pairwise(trace)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.1)  # as an exponential has it
    assert max(r.arrival for r in trace) < 200


def test_a_trace_is_the_same_every_time_and_another_with_another_seed():
    assert poisson_trace(SHORT, 5.0, 10.0) == poisson_trace(SHORT, 5.0, 10.0)
    assert poisson_trace(SHORT, 5.0, 10.0, seed=1) != poisson_trace(SHORT, 5.0, 10.0)


def test_most_prompts_of_a_chat_are_as_long_as_they_may_be():
    trace = chat_trace(2.0, 500.0)
    prompts = [r.input_len for r in trace]
    assert max(prompts) == 1024
    assert sorted(prompts)[len(prompts) // 2] == 1024
    assert max(r.output_len for r in trace) < 1024


AZURE_2024 = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,30,40
2024-05-10 01:00:02.009930+01:00,10,20
"""
BURST_GPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
3.5,ChatGPT,10,20,30,API
1.5,GPT-4,30,40,70,API
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,30,40
2023-11-16 18:15:48.6805900,10,20
"""


@pytest.mark.parametrize(
    "text",
    [
        "arrival,input,output\n3.5,10,20\n1.5,30,40\n",
        BURST_GPT,
        AZURE,
        AZURE_2024,
        "\ufeffarrived_at,num_prefill_tokens,num_decode_tokens\n1.5,30,40\n3.5,10.0,20\n",
        " Arrival , INPUT,Output\r\n1.5, 30 ,40\r\n\r\n3.5,10,20\r\n",
        "arrival,input,output\n2024-01-01T00:00:00Z,30,40\n2024-01-01 02:00:02+02:00,10,20,\n",
        "arrival,input,output\n1700000000,30,40\n1700000002,10,20\n",
    ],
    ids="ours BurstGPT Azure zones Vidur spaces Z epochs".split(),
)
def test_a_real_trace_is_read_in_its_own_format(tmp_path, text):
    file = tmp_path / "trace.csv"
    file.write_text(text, encoding="utf-8")
    first, second = read_trace(file)
    assert first == TraceRequest(0.0, 30, 40)
    assert (second.input_len, second.output_len) == (10, 20)
    assert second.arrival == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("when,in,out\n1,2,3\n", "has the columns when, in, out: give arrival, input, output"),
        ("", r"has the columns \(none\)"),
        ("arrival,input,output\n1,2,3\n1,x,3\n", "line 3"),
        ("arrival,input,output\n1,2\n", "line 2"),
        ("arrival,input,output\n1,2,0\n", "none of the 1 requests"),
        ("arrival,input,output\n", "none of the 0 requests"),
        ("arrival,input,output\nnan,2,3\n", "line 2: arrival is nan: give seconds from 0 up"),
        ("arrival,input,output\n-1,2,3\n", "line 2: arrival is -1: give seconds from 0 up"),
        ("arrival,input,output\n1,inf,3\n", "line 2: input is 'inf', but must be a whole number"),
        ("arrival,input,output\n1,2,-3\n", "line 2: output is '-3', but must be a whole number"),
        ("arrival,input,output\n\n1,2.5,3\n", "line 3: input is '2.5', but must be a whole"),
        ('arrival,input,output\n1,"1,000",3\n', "line 2: input is '1,000', but must be a whole"),
        ("Timestamp,Request tokens,Response tokens\n1,2,\n", "Response tokens is '', but must be"),
        ("arrival,input,output\nnoon,2,3\n", "line 2: arrival is 'noon': give seconds, or a date"),
        ("arrival,input,output\n2024-13-01 00:00:00,2,3\n", "line 2: arrival is '2024-13-01 00"),
        ("arrival,input,output\n1700000000000,2,3\n", "line 2: arrival is .* milliseconds since"),
        ("arrival,input,output\n1,2,3,4\n", "line 2 has more values than the header"),
        ("arrival,input,output,Input\n1,2,3,4\n", "names a column twice"),
        ("arrival;input;output\n1;2;3\n", "has the columns arrival;input;output: give"),
    ],
)
def test_a_trace_that_cannot_be_read_says_why(tmp_path, text, words):
    file = tmp_path / "trace.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidOption, match=words):
        read_trace(file)


def test_a_file_that_is_no_text_is_reported(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_bytes(b"arrival,input,output\n\xff\xfe,1,2\n")
    with pytest.raises(InvalidOption, match="is not CSV in UTF-8"):
        read_trace(file)


def test_requests_that_are_too_long_are_left_out(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("arrival,input,output\n5,1000,1048\n7,10,10\n", encoding="utf-8")
    assert read_trace(file, longest=2048) == [TraceRequest(0.0, 10, 10)]
    assert mean_lengths(read_trace(file)) == (505, 529)


# ---- costs ---------------------------------------------------------------------------------------


def test_a_step_costs_what_the_roofline_says():
    weights = 2 * 12.85e9 / (1555e9 * 0.8)
    assert COSTS.weights(1) == pytest.approx(weights)
    assert COSTS.weights(1000) == pytest.approx(2 * 12.85e9 * 1000 / (312e12 * 0.55))
    assert COSTS.keys(1000) == pytest.approx(1000 * 819_200 / (1555e9 * 0.7))
    assert COSTS.host(10) == pytest.approx(2e-3 + 10 * 0.30e-3)


def test_swapping_small_blocks_takes_longer_and_recomputing_does_not_care():
    """256 tokens of OPT-13B, out and back: 149 ms in blocks of 1, 27 ms in one of 256."""
    both_ways = [2 * COSTS.swap(256 // size, size) for size in (1, 8, 256)]
    assert both_ways == pytest.approx([0.149, 0.0415, 0.0267], rel=0.02)
    assert COSTS.step(0, 0, 256, 256**2 / 2) == pytest.approx(0.042, rel=0.05)


# ---- the loop ------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    "decoding",
    [Decoding(), Decoding("sample", 3), Decoding("beam", 3)],
    ids=["one", "samples", "beams"],
)
def test_every_request_gets_all_its_tokens_and_every_block_comes_back(system, decoding):
    simulation = Simulation(SYSTEMS[system], SMALL, COSTS, TRACE[:60], decoding)
    scheduler = simulation.scheduler
    scheduler.memory = CheckedMemory(scheduler.memory)
    report = simulation.run()
    assert len(report.finished) == 60
    for request in report.finished:
        assert request.arrival < request.first_token <= request.finish
    assert scheduler.memory.num_free == scheduler.memory.num_blocks
    assert not scheduler.has_unfinished()


def test_a_lone_request_takes_as_long_as_its_steps():
    report = simulate("vllm", [TraceRequest(1.0, 100, 5)])
    steps = COSTS.step(0, 0, 100, 5000) + sum(COSTS.step(1, 100 + i, 0, 0) for i in range(1, 5))
    [request] = report.finished
    assert request.finish - request.arrival == pytest.approx(steps)
    assert report.normalized_latency == pytest.approx(steps / 5)


def test_latency_is_a_mean_of_ratios_and_not_a_ratio_of_means():
    report = simulate("vllm", [TraceRequest(0.0, 10, 4), TraceRequest(0.0, 10, 400)])
    ratios = [(r.finish - r.arrival) / r.output_len for r in report.finished]
    assert report.normalized_latency == pytest.approx(sum(ratios) / 2)


def test_a_static_batch_ends_all_at_once_and_no_request_joins_it():
    trace = [TraceRequest(0.0, 10, 5), TraceRequest(0.0, 10, 50), TraceRequest(0.1, 10, 5)]
    report = simulate("fastertransformer", trace)
    by_arrival = sorted(report.finished, key=lambda r: (r.arrival, r.output_len))
    first, longest, late = by_arrival
    assert first.finish == longest.finish
    assert late.first_token > longest.finish


def test_orca_runs_as_many_as_its_pool_has_longest_requests():
    """15,728 slots and 2,048 for each: 7, whatever the requests are."""
    trace = poisson_trace(WORKLOADS["sharegpt"], 2.0, 60.0)
    setting = Setting(SERVER.num_slots)
    report = simulate("orca-max", trace, setting, until=60.0, look_from=15.0)
    assert report.mean_batch == pytest.approx(7.0)


def test_the_parts_of_the_memory_usage_add_up():
    for system in SYSTEMS:
        report = simulate(system, TRACE, until=10.0, look_from=1.0)
        total = report.share(lambda u: u.total)
        assert total == pytest.approx(1.0)
        assert all(u.total == 1600 for u in report.looks)


def test_it_stops_early_only_when_the_limit_is_exceeded():
    flood = poisson_trace(SHORT, rate=300.0, duration=30.0)
    through = simulate("orca-max", flood)
    early = simulate("orca-max", flood, limit=0.2)
    assert early.gave_up
    assert early.normalized_latency == math.inf
    assert early.num_steps < through.num_steps / 2
    assert through.normalized_latency > 0.2
    assert not simulate("vllm", TRACE, limit=10.0).gave_up


def test_recomputation_and_swapping_both_serve_all_requests():
    for way in ("recompute", "swap"):
        setting = Setting(640, longest=512, watermark=0.0, preemption=way)
        report = simulate("vllm", TRACE, setting)
        assert report.num_preemptions > 0
        assert (report.num_blocks_swapped > 0) == (way == "swap")
        assert len(report.finished) == len(TRACE)


def test_the_paper_s_order_holds_for_a_short_trace():
    flood = poisson_trace(SHORT, rate=60.0, duration=20.0)
    means = [simulate(s, flood).normalized_latency for s in SYSTEMS]
    assert means == sorted(means), "vLLM, Oracle, Pow2, Max, FasterTransformer"


def test_a_shared_prefix_is_computed_and_kept_once():
    prefixed = [TraceRequest(r.arrival, r.input_len + 64, r.output_len, 64) for r in TRACE[:40]]
    shared, alone = (Setting(1600, longest=640, prefix_caching=on) for on in (True, False))
    assert simulate("vllm", prefixed, shared).seconds < simulate("vllm", prefixed, alone).seconds
    held = [
        simulate("vllm", prefixed, setting, until=1.5, look_from=1.0).looks[0].used
        for setting in (shared, alone)
    ]
    assert held[0] < held[1]


# ---- several sequences ---------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "output", "n"), [(40, 30, 2), (5, 70, 4), (64, 33, 6)])
def test_parallel_samples_save_what_arithmetic_says(prompt, output, n):
    """(n - 1) * floor(p / B) of n * ceil((p + g) / B) blocks, in every step."""
    simulation = Simulation(
        SYSTEMS["vllm"],
        Setting(6400),
        COSTS,
        [TraceRequest(0.0, prompt, output)],
        Decoding("sample", n),
    )
    simulation._let_come()
    [request] = simulation._requests.values()
    memory = simulation.scheduler.memory
    simulation.step()  # the prompt; the samples begin with one token each
    for generated in range(1, output - 1):
        decision = simulation.scheduler.schedule()
        held = memory.num_distinct_blocks(request.group)
        unshared = sum(len(memory.tables[s.seq_id]) for s in request.group.sequences)
        assert unshared == n * -(-(prompt + generated) // 16)
        assert unshared - held == (n - 1) * (prompt // 16)
        simulation.scheduler.commit(decision)
        simulation._advance(decision)


def test_beams_fork_from_beams_and_live_longer_with_a_surer_model():
    def parted(peakedness: float) -> float:
        families = []
        for number in range(8):
            steps = genealogy(4, peakedness, number)
            parents = [next(steps) for _ in range(200)]
            assert all(len(p) == 4 and max(p) < 4 for p in parents)
            families += [len(set(p)) for p in parents]
        return sum(families) / len(families)

    assert parted(1.0) < parted(8.0) <= 4


def test_every_beam_has_the_parent_that_the_genealogy_records():
    """Prompts are told apart by their second token: it is that of the beam it descends from."""
    request = SimRequest(0, TraceRequest(0.0, 8, 50), Decoding("beam", 3), count())
    scheduler = build_scheduler(SYSTEMS["vllm"], SMALL)
    scheduler.add(request.group)
    request._parents = iter([(0, 0, 0), (0, 0, 1), (2, 2, 2), (1, 0, 1)])

    def step() -> list[list[int]]:
        scheduler.commit(scheduler.schedule())
        before = [list(beam.token_ids) for beam in request._beams]
        request.advance(scheduler)
        return [[beam.token_ids[:-1] for beam in request._beams], before]

    step()
    for parents in ((0, 0, 1), (2, 2, 2), (1, 0, 1)):
        after, before = step()
        assert after == [before[parent] for parent in parents]


def test_a_request_that_outgrows_the_pool_ends_the_simulation_with_a_sentence():
    with pytest.raises(InvalidOption, match="outgrown the whole pool of 160"):
        simulate("vllm", [TraceRequest(0.0, 10, 400)], Setting(160, longest=512))


def test_a_padded_batch_costs_what_its_longest_prompt_makes_it_cost():
    """Also after the request with that prompt has ended."""
    trace = [TraceRequest(0.0, 300, 5), TraceRequest(0.0, 10, 20)]
    report = simulate("fastertransformer", trace)
    steps = COSTS.step(0, 0, 600, 300**2) + sum(
        COSTS.step(2, 2 * (300 + i), 0, 0) for i in range(1, 20)
    )
    assert report.seconds == pytest.approx(steps)


def test_genealogies_do_not_depend_on_the_order_of_queries():
    steps = genealogy(3, 2.0, 5)
    ahead = [next(steps) for _ in range(50)]
    again = genealogy(3, 2.0, 5)
    assert [next(again) for _ in range(50)] == ahead


# ---- capacity ------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 500.0), st.floats(0.1, 500.0))  # within FARTHEST of each other
def test_a_crossing_is_found_from_any_starting_point(true, guess):
    curve = Curve(lambda rate: 0.05 if rate <= true else math.inf, guess)
    assert curve.crossing(0.2) == pytest.approx(true, rel=0.03)


@pytest.mark.parametrize("latency", [0.0, math.inf])
def test_the_search_for_a_crossing_that_does_not_exist_ends(latency):
    with pytest.raises(InvalidOption, match="no rate can be found"):
        Curve(lambda rate: latency, 1.0).crossing(0.2)


def test_a_point_that_is_out_of_order_does_not_end_the_search():
    noisy = {1.0: 0.25, 2.0: 0.15, 4.0: 0.3}
    curve = Curve(lambda rate: 0.1 if rate < 3 else 1.0, 1.0, points=noisy)
    assert curve.crossing(0.2) == pytest.approx(3.0, rel=0.03)


def test_several_thresholds_share_simulated_points():
    calls = []

    def latency(rate: float) -> float:
        calls.append(rate)
        return rate**2

    found = Curve(latency, 1.0).crossings((0.5, 0.1, 0.2))
    for threshold, rate in found.items():
        assert rate == pytest.approx(math.sqrt(threshold), rel=0.02)
    assert len(calls) == len(set(calls))


def test_a_plan_counts_what_the_weights_leave():
    server = deploy(MODELS["llama-3-8b"], GPUS["h100-80g"], 1)
    free = 0.9 * 80e9 - 1e9 - 2 * 8.03e9
    assert server.num_slots == int(free // 131_072)
    with pytest.raises(InvalidOption, match="choose at least 2"):
        deploy(MODELS["llama-3-70b"], GPUS["h100-80g"], 1)


@pytest.mark.full
def test_a_capacity_report_says_when_the_pool_is_the_bound():
    lengths = Lengths(500.0, 500.0, 0.5, 0.5, longest=4096)
    small = deploy(MODELS["llama-2-7b"], GPUS["l4-24g"], 1)
    report = estimate_capacity(small, lengths, rate=0.2, seconds=40.0)
    assert "the pool" in report.bound
    assert 0 < report.load.utilisation < report.knee.utilisation <= 1
    large = deploy(MODELS["llama-3-8b"], GPUS["h200-141g"], 1)
    short = Lengths(50.0, 50.0, 0.5, 0.5, longest=512)
    assert "time" in estimate_capacity(large, short, rate=20.0, seconds=4.0).bound


def test_the_knee_is_the_same_at_almost_no_load():
    server = deploy(MODELS["llama-3-8b"], GPUS["l4-24g"], 1)
    short = Lengths(50.0, 50.0, 2.0, 2.0, longest=1024)
    knees = [
        estimate_capacity(server, short, rate, seconds=10.0, max_num_seqs=8)
        for rate in (0.001, 2.0)
    ]
    assert knees[0].knee.rate == pytest.approx(knees[1].knee.rate, rel=0.05)
    assert knees[0].load.latency < 2 * knees[0].knee.latency / 3


@pytest.mark.parametrize("full", [False, True])
def test_a_quick_capacity_simulates_few_tokens_and_says_when_each_is_done(full, monkeypatch):
    tokens, done = [], []

    def trace(lengths: Lengths, rate: float, duration: float):
        requests = poisson_trace(lengths, rate, duration)
        tokens.append(sum(request.output_len for request in requests))
        return requests

    monkeypatch.setattr(planner, "poisson_trace", trace)
    server, short = deploy(MODELS["llama-3-8b"], GPUS["l4-24g"], 1), Lengths(50.0, 50.0, 1.0, 1.0)
    options = {"max_num_seqs": 32, "full": full, "on_simulation": lambda: done.append(0)}
    monkeypatch.setattr(planner, "MOST_TOKENS", 20_000)
    estimate_capacity(server, short, 2.0, seconds=100.0, **options)
    assert len(done) == len(tokens) <= 16
    assert (max(tokens) < 1.5 * 20_000) == (not full)


def test_a_quick_knee_is_near_the_one_of_full_simulations(monkeypatch):
    monkeypatch.setattr(planner, "MOST_TOKENS", 20_000)
    server, short = deploy(MODELS["llama-3-8b"], GPUS["l4-24g"], 1), Lengths(50.0, 50.0, 1.0, 1.0)
    quick, full = (
        estimate_capacity(server, short, 1.0, seconds=200.0, max_num_seqs=8, full=full).knee.rate
        for full in (False, True)
    )
    assert 0.95 < quick / full < 1.15


def test_capacity_for_requests_that_never_fit_is_refused():
    server = deploy(MODELS["llama-2-7b"], GPUS["l4-24g"], 1)
    with pytest.raises(InvalidOption, match="shorter requests"):
        estimate_capacity(server, Lengths(9e3, 9e3, 0.5, 0.5, longest=65_536), rate=1.0)


# ---- the command ---------------------------------------------------------------------------------


def test_systems_are_compared_on_a_real_trace(tmp_path, capsys):
    file = tmp_path / "trace.csv"
    file.write_text("arrival,input,output\n0,100,20\n0.5,200,30\n", encoding="utf-8")
    app(["simulate", "--trace", str(file)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "2 requests" in printed
    assert all(system.title in printed for system in SYSTEMS.values())
    app(
        ["simulate", "vllm", "vattention-2m", "--trace", str(file), "--json"], standalone_mode=False
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["system"] for row in rows] == ["vllm", "vattention-2m"]
    assert rows[0]["seconds_a_token"] == pytest.approx(rows[1]["seconds_a_token"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sglang"], "there is no system 'sglang'"),
        (["--server", "abacus"], "server is 'abacus'"),
        (["--workload", "poems"], "workload is 'poems'"),
        (["--rate", "0"], "numbers above 0"),
        (["--rate", "0.001", "--seconds", "1"], "no request arrives"),
        (["--rate", "inf"], "at most 1,000,000"),
        (["--seed", "-1"], "seed is -1"),
        (["--trace", "x.csv", "--rate", "2"], "--trace .*, so --rate would be ignored"),
        (["--trace", "x.csv", "--rate", "1.0"], "so --rate would be ignored"),
        (
            ["--trace", "x.csv", "--seconds", "9", "--workload", "chat", "--seed", "1"],
            "so --workload, --seconds and --seed would be ignored: leave them out",
        ),
    ],
)
def test_impossible_settings_are_refused(arguments, words):
    with pytest.raises(InvalidOption, match=words):
        app(["simulate", *arguments], standalone_mode=False)


# ---- without torch, and quick --------------------------------------------------------------------


RUN_A_FIGURE = """\
from minipaged.cli.main import app
app(["paper", "fig3", "--out", sys.argv[1]], standalone_mode=False)
"""
IMPORT = (
    "import minipaged.evaluation.sim.planner, minipaged.evaluation.paper.fig2,"
    "minipaged.evaluation.paper.fig15"
)


@pytest.mark.parametrize("program", [IMPORT, RUN_A_FIGURE])
def test_the_simulator_does_not_import_torch(program, tmp_path):
    program = f"import sys\n{program}\nsys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert run.returncode == 0
