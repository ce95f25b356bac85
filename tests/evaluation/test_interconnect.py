"""What GPUs that share a model send each other, and what it adds to a simulated step."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.cli.main import app
from minipaged.errors import InvalidOption
from minipaged.evaluation.sim import planner
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS, GPUS, MODELS
from minipaged.evaluation.sim.cost_model import CostModel
from minipaged.evaluation.sim.interconnect import CONTROL_SECONDS, Link
from minipaged.evaluation.sim.planner import deploy, estimate_capacity
from minipaged.evaluation.sim.simulator import Simulation
from minipaged.evaluation.sim.systems import SYSTEMS, Setting
from minipaged.evaluation.sim.traces import Lengths, TraceRequest

SLOW = Link(bandwidth=1e9, latency=1e-3)
SEVERAL = [name for name, server in DEPLOYMENTS.items() if server.num_gpus > 1]


# ---- collectives ---------------------------------------------------------------------------------


def test_an_all_reduce_moves_its_bytes_almost_twice_and_a_gather_once():
    link = Link(bandwidth=100.0, latency=2.0)
    # 4 GPUs, 400 bytes: 3 parts of 100 bytes leave each GPU to add up, and 3 to hand out the sum.
    assert link.all_reduce(400, num_gpus=4) == 2 + 600 / 100
    assert link.gather(400, num_gpus=4) == 2 + 300 / 100


def test_the_links_of_the_paper_s_gpus_are_as_published():
    for name in ("a100-40g", "a100-80g"):  # NVLink 3: 600 GB/s over both directions
        assert GPUS[name].link.bandwidth == 600e9 / 2


# ---- steps ---------------------------------------------------------------------------------------


def test_a_step_of_66b_costs_129_all_reduces_and_a_gather():
    """50 decodes and a prompt of 10, on 4 A100s: by hand, from the paper's shapes."""
    all_reduce = 20e-6 + 1.5 * (60 * 9216 * 2) / 300e9  # 25.5 us
    gather = 20e-6 + 0.75 * (51 * 50_272 * 2) / 300e9  # 32.8 us
    by_hand = (2 * 64 + 1) * all_reduce + gather
    assert by_hand == pytest.approx(3.326e-3, rel=1e-3)
    costs = CostModel(DEPLOYMENTS["opt-66b"])
    assert costs.communication(num_tokens=60, num_rows=51) == pytest.approx(by_hand)


def test_a_step_of_175b_costs_193_all_reduces_and_a_gather():
    """100 decodes on 8 A100s."""
    all_reduce = 20e-6 + 1.75 * (100 * 12_288 * 2) / 300e9  # 34.3 us
    gather = 20e-6 + 0.875 * (100 * 50_272 * 2) / 300e9
    by_hand = (2 * 96 + 1) * all_reduce + gather
    assert by_hand == pytest.approx(6.676e-3, rel=1e-3)
    costs = CostModel(DEPLOYMENTS["opt-175b"])
    assert costs.communication(num_tokens=100, num_rows=100) == pytest.approx(by_hand)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_step_contains_its_communication(name):
    costs = CostModel(DEPLOYMENTS[name])
    parts = costs.host(30) + costs.weights(230) + costs.keys(10_000) + costs.prompts(2e4)
    step = costs.step(30, 10_000, 200, 2e4, num_prompts=2)
    assert step == pytest.approx(parts + costs.communication(230, 32))
    assert costs.communication(230, 32) > 0


@pytest.mark.parametrize("system", ["vllm", "fastertransformer"])
@pytest.mark.parametrize("name", SEVERAL)
def test_a_simulated_request_waits_for_the_communication_of_its_steps(name, system):
    """The first step computes the prompt and one row of logits, each later step one token."""
    server = DEPLOYMENTS[name]

    def seconds(costs: CostModel) -> float:
        setting = Setting(server.num_slots, model=server.model)
        return (
            Simulation(SYSTEMS[system], setting, costs, [TraceRequest(0.0, 100, 5)]).run().seconds
        )

    fast, slow = CostModel(server), CostModel(server.with_link(SLOW))
    steps = [(100, 1)] + 4 * [(1, 1)]
    added = sum(slow.communication(*step) - fast.communication(*step) for step in steps)
    assert seconds(slow) - seconds(fast) == pytest.approx(added)


counts = st.integers(0, 3000)
links = st.builds(Link, st.floats(1e9, 1e13), st.floats(0, 1e-2))


@given(st.sampled_from(SEVERAL), links, st.floats(0, 1e-2), st.floats(1, 100), counts, counts)
def test_a_slower_link_never_makes_a_step_faster(name, link, later, factor, decodes, prompt):
    server = DEPLOYMENTS[name]

    def seconds(link: Link) -> float:
        return CostModel(server.with_link(link)).step(decodes, 9 * decodes, prompt, prompt, 1)

    assert seconds(Link(link.bandwidth, link.latency + later)) >= seconds(link)
    assert seconds(Link(link.bandwidth / factor, link.latency)) >= seconds(link)


# ---- one GPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "seconds"), [("opt-13b", 0.053163295803874584), ("llama-13b", 0.053565393705972485)]
)
@pytest.mark.parametrize("num_prompts", [0, 3])
def test_a_step_on_one_gpu_costs_what_it_did_without_communication(name, seconds, num_prompts):
    """The figures are older than the links of the cost model."""
    for server in (DEPLOYMENTS[name], DEPLOYMENTS[name].with_link(SLOW)):
        costs = CostModel(server)
        assert costs.step(30, 10_000, 200, 20_000.0, num_prompts) == seconds
        assert costs.communication(30, 30) == 0


def test_the_capacity_of_one_gpu_is_what_it_was_without_communication():
    """The figures are older than the links of the cost model."""
    server = deploy(MODELS["llama-3-8b"], GPUS["l4-24g"], 1)
    lengths = Lengths(50.0, 50.0, 2.0, 2.0, longest=1024)
    report = estimate_capacity(server, lengths, 2.0, seconds=10.0, max_num_seqs=8)
    assert report.knee.rate == pytest.approx(2.5570933433999414, rel=1e-9)
    assert report.load.latency == pytest.approx(0.10887002200726041, rel=1e-9)
    assert len(report.knee.parts) == 4


# ---- capacity ------------------------------------------------------------------------------------


def test_a_model_on_several_gpus_waits_for_a_message_in_each_step():
    for num_gpus, seconds in ((1, 0.0), (2, CONTROL_SECONDS)):
        server = deploy(MODELS["llama-3-8b"], GPUS["h100-80g"], num_gpus)
        assert server.sync_seconds == seconds
        assert CostModel(server, step_seconds=1.0).host(0) == 1.0 + seconds


def test_a_model_that_no_split_makes_fit_needs_larger_gpus():
    two_heads = replace(MODELS["llama-3-70b"], num_heads=2, num_kv_heads=2)
    with pytest.raises(InvalidOption, match="choose larger GPUs"):
        deploy(two_heads, GPUS["l4-24g"], 2)


def test_more_gpus_than_kv_heads_hold_copies_of_them():
    model, gpu = MODELS["llama-3-8b"], GPUS["h100-80g"]  # 32 query heads, 8 KV heads
    eight, sixteen = (deploy(model, gpu, n) for n in (8, 16))
    assert sixteen.model.kv_bytes_per_token == 2 * eight.model.kv_bytes_per_token
    free = 16 * (0.9 * gpu.memory_bytes - 1e9) - model.weight_bytes
    assert sixteen.num_slots == int(free // (2 * model.kv_bytes_per_token))
    with pytest.raises(InvalidOption, match="among 12 GPUs: choose one of 1, 2, 4, 8, 16, 32"):
        deploy(model, gpu, 12)


SMALL = "capacity --model llama-3-8b --gpu l4-24g --rate 1 --input 100 --output 100".split()
SMALL += ["--longest", "512", "--max-num-seqs", "16", "--json"]


def test_capacity_takes_the_link_from_its_flags(monkeypatch, capsys):
    monkeypatch.setattr(planner, "MOST_TOKENS", 2_000)

    def report(*flags: str):
        app([*SMALL, *flags], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    own = report("--num-gpus", "2")
    slow = report("--tensor-parallel-size", "2", "--link-bandwidth", "4", "--link-latency", "500")
    assert own["server"]["gpu"]["link"] == {"bandwidth": 32e9, "latency": 40e-6}
    assert slow["server"]["gpu"]["link"] == pytest.approx({"bandwidth": 4e9, "latency": 500e-6})
    parts = [each["load"]["parts"]["communication between GPUs"] for each in (own, slow)]
    assert 0 < 5 * parts[0] < parts[1]
    # Each token waits for 65 all-reduces and a gather, 460 us later than over the GPU's own link.
    assert own["load"]["latency"] + 66 * 460e-6 < slow["load"]["latency"]


def test_capacity_prints_the_link_of_several_gpus(monkeypatch, capsys):
    monkeypatch.setattr(planner, "MOST_TOKENS", 2_000)
    flags = ["--num-gpus", "2", "--link-bandwidth", "450", "--link-latency", "12"]
    app([*SMALL[:-1], *flags], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "450 GB/s per GPU" in printed
    assert "12 us" in printed
    assert "communication between GPUs" in printed


def test_simulate_takes_the_link_from_its_flags(tmp_path, capsys):
    file = tmp_path / "trace.csv"
    file.write_text("arrival,input,output\n0,100,20\n", encoding="utf-8")

    def seconds(*flags: str) -> float:
        command = ["simulate", "vllm", "--server", "opt-66b", "--trace", str(file), "--json"]
        app([*command, *flags], standalone_mode=False)
        return json.loads(capsys.readouterr().out)["seconds"]

    # 20 steps of 129 all-reduces and a gather, each 30 us later.
    assert seconds("--link-latency", "50") - seconds() == pytest.approx(20 * 130 * 30e-6)
    assert seconds("--link-bandwidth", "32") > seconds()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("capacity --num-gpus 3", "32 query heads .* 3 GPUs: choose one of 1, 2, 4, 8"),
        ("capacity --model llama-3-70b --gpu l4-24g", "choose at least 8"),
        ("capacity --link-latency 5", "links between GPUs, but this server has one GPU: leave"),
        ("capacity --num-gpus 2 --link-bandwidth 0", "--link-bandwidth is 0: give a number above"),
        ("capacity --num-gpus 2 --link-bandwidth inf", "--link-bandwidth is inf"),
        (
            "capacity --num-gpus 2 --link-latency -1",
            "--link-latency is -1: give 0 or a number above",
        ),
        ("capacity --num-gpus 2 --link-latency nan", "--link-latency is nan"),
        ("simulate --link-bandwidth 32", "links between GPUs, but this server has one GPU: leave"),
        ("simulate --server opt-66b --link-latency -1", "--link-latency is -1"),
    ],
)
def test_an_invalid_link_is_refused(command, words):
    with pytest.raises(InvalidOption, match=words):
        app(command.split(), standalone_mode=False)
