"""The budget of a step: its counts are those that can be computed by hand."""

import json
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import minipaged

from minipaged.attention.backend import BACKENDS
from minipaged.cli import bench_step
from minipaged.evaluation.bench import budget, budget_counts, timing
from minipaged.evaluation.bench.decode_step import TINY, build_engine
from minipaged.models.linear import pack_weights
from minipaged.models.llama import Llama
from minipaged.models.packed import InFloat16, works
from minipaged.scheduler.output import SequenceInput, StepInput

# Two layers with 4 heads of 4 elements, 2 KV heads, and 10 tokens in the vocabulary.
CONFIG = replace(TINY, head_dim=4, hidden_size=8, intermediate_size=6, vocab_size=10)
QKV, OUTPUT, GATE_UP, DOWN = 8 * (16 + 8 + 8), 16 * 8, 8 * 12, 6 * 8
MATRICES = 2 * (QKV + OUTPUT + GATE_UP + DOWN)
NORMS = (2 * 2 + 1) * 8
KEYS_AND_VALUES = 2 * 2 * 2 * 4  # of a token, in two layers, with two KV heads of 4 elements
DECODES = StepInput((SequenceInput(0, [1], 5, [0]), SequenceInput(1, [2], 7, [1])))
CHUNK = StepInput((SequenceInput(0, [1, 2, 3], 16, [0, 1], num_logits=0),))


def tiny_model(**options) -> Llama:
    torch.manual_seed(0)
    return Llama(replace(CONFIG, **options), BACKENDS["torch"]).eval().requires_grad_(False)


def test_a_step_reads_each_weight_once_and_the_keys_of_each_sequence():
    tied = MATRICES + NORMS + 10 * 8
    assert budget_counts.count_bytes(tiny_model(), DECODES) == 4 * (
        tied + (6 + 8) * KEYS_AND_VALUES
    )
    assert budget_counts.count_bytes(tiny_model(), CHUNK) == 4 * (tied + 19 * KEYS_AND_VALUES)


def test_only_the_rows_of_an_untied_embedding_are_read():
    untied = MATRICES + NORMS + 10 * 8 + 2 * 8  # the head, and a row of each of two tokens
    assert budget_counts.count_bytes(tiny_model(tied=False), DECODES) == 4 * (
        untied + (6 + 8) * KEYS_AND_VALUES
    )


def test_packed_weights_count_as_they_are_kept():
    if not works(InFloat16):
        pytest.skip("this processor, or this torch, has no products with float16 weights")
    model = tiny_model()
    pack_weights(model, "float16")
    assert budget_counts.count_bytes(model, DECODES) == 2 * (MATRICES + 10 * 8) + 4 * (
        NORMS + 2 * 8 + (6 + 8) * KEYS_AND_VALUES
    )


def test_the_operations_are_those_of_the_matrices_and_of_attention():
    """Two for each weight and token; each query meets a key and a value of 4 elements per head."""
    attention = 2 * 2 * 4 * 4  # multiplications of a query with a key and a value it sees
    assert budget_counts.count_operations(tiny_model(), DECODES) == 2 * (
        2 * (MATRICES + 10 * 8) + (6 + 8) * attention
    )
    assert budget_counts.count_operations(tiny_model(), CHUNK) == 2 * (
        3 * MATRICES + (17 + 18 + 19) * attention
    )
    assert budget_counts.count_operations(
        tiny_model(tied=False), DECODES
    ) == budget_counts.count_operations(tiny_model(), DECODES)


@torch.inference_mode()
def test_operators_are_counted_apart_from_views_and_inside_composed_ones():
    class Module(torch.nn.Module):
        def forward(self, x):
            x = x.view(2, 3).t() + 1  # two views and a sum
            x = x.reshape(6).contiguous()  # a copy and its view; already contiguous
            return F.linear(x[None], torch.ones(6, 6)).flatten()

    module = Module()
    with budget_counts.counted_operators(module) as operators:
        for _ in range(2):  # the last call counts
            module(torch.zeros(6))
    assert "forward" not in vars(module)
    # + 1, the copy, ones, and mm
    assert operators.num_operators == 4
    assert operators.num_views > 2


def model_of(engine) -> Any:
    return engine.executor.runner.model


def measured(workload, change=lambda engine: None) -> budget.Row:
    engine = build_engine(
        *(TINY, "torch", workload.num_seqs, workload.prompt_len, budget.CPU, torch.float32, False),
        max_num_batched_tokens=None if workload.decodes else workload.num_tokens,
    )
    change(engine)
    return budget.measure_workload(engine, workload)


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    monkeypatch.setattr(timing, "BYTES_TO_READ", 2**20)
    monkeypatch.setattr(timing, "MATRIX_SIZE", 64)


def test_an_additional_operator_in_a_layer_is_counted():
    def negate_twice(engine):
        model_of(engine).layers[-1].mlp.activation = lambda x: F.silu(x).neg().neg()

    workload = budget.Workload(2, 1, 9, num_steps=2)
    before, after = measured(workload), measured(workload, negate_twice)
    assert after.operators_per_layer == before.operators_per_layer + 2
    assert after.views_per_layer == before.views_per_layer


@pytest.mark.parametrize(
    "workload", budget.QUICK_WORKLOADS, ids=lambda w: f"{w.num_seqs}x{w.num_tokens}"
)
def test_the_parts_of_a_step_add_up(workload):
    row = measured(workload)
    assert sum(row.parts.values()) == pytest.approx(row.seconds)
    assert list(row.parts) == list(budget.PARTS)
    assert min(row.parts.values()) > 0
    assert row.floor_seconds == max(row.read_seconds, row.compute_seconds) > 0
    assert 10 < row.operators_per_layer < 100


SLOW = 0.03


def slowly(call):
    def slow_call(*args):
        time.sleep(SLOW)
        return call(*args)

    return slow_call


def slow(owner, name):
    setattr(owner, name, slowly(getattr(owner, name)))


def slow_attention(engine):
    runner = engine.executor.runner
    runner.backend = replace(runner.backend, paged_attention=slowly(runner.backend.paged_attention))


def slow_head(engine):
    model = model_of(engine)
    slow(*((model, "logits") if model.head is None else (model.head, "forward")))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("matrices", lambda engine: slow(model_of(engine).layers[0].mlp.down_proj, "forward")),
        ("matrices", slow_head),
        ("attention", slow_attention),
        ("other", lambda engine: slow(model_of(engine).rotary, "forward")),
        ("other", lambda engine: slow(engine.sampler, "sample")),
        ("host", lambda engine: slow(engine.executor.runner.batches, "lay_out")),
        ("host", lambda engine: slow(engine.scheduler, "schedule")),
    ],
)
def test_a_slow_call_belongs_to_its_part(part, change):
    row = measured(budget.Workload(2, 1, 9, num_steps=1), change)
    assert row.parts[part] >= SLOW
    assert min(row.parts.values()) > 0


def test_a_chunk_of_a_prompt_is_measured_with_the_tokens_before_it():
    first, later = (measured(budget.Workload(1, 16, n, num_steps=1)) for n in (0, 32))
    keys = TINY.kv_bytes_per_token(4)
    assert later.num_bytes - first.num_bytes == 32 * keys
    pairs = 16 * 32  # of a query and a key before the chunk
    assert later.num_operations - first.num_operations == 4 * 2 * pairs * 4 * 64


def test_the_sleeps_of_other_threads_are_counted():
    if not budget_counts.TASKS.exists():
        pytest.skip("only Linux counts them")
    has_slept, may_end = threading.Event(), threading.Event()

    def sleep():
        for _ in range(5):
            time.sleep(0.001)
        has_slept.set()
        may_end.wait()

    before = budget_counts.count_sleeps()
    assert threading.get_native_id() not in before
    thread = threading.Thread(target=sleep)
    thread.start()
    has_slept.wait()
    after = budget_counts.count_sleeps()
    may_end.set()
    thread.join()
    assert thread.native_id not in before
    assert after[thread.native_id] >= 5
    assert thread.native_id not in budget_counts.count_sleeps()


def test_a_thread_that_a_layer_wakes_is_counted(monkeypatch):
    if not budget_counts.TASKS.exists():
        pytest.skip("only Linux counts them")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    wake, has_slept, is_over = threading.Semaphore(0), threading.Semaphore(0), False

    def sleep_when_woken():
        for _ in range(1000):  # before the step: not counted
            time.sleep(1e-6)
        has_slept.release()
        while wake.acquire() and not is_over:
            time.sleep(0.001)
            has_slept.release()

    def wakes_a_thread(engine):
        layer = model_of(engine).layers[0]
        forward = layer.forward

        def wake_then_forward(*args):
            wake.release()
            has_slept.acquire()
            return forward(*args)

        layer.forward = wake_then_forward

    thread = threading.Thread(target=sleep_when_woken)
    thread.start()
    has_slept.acquire()
    row = measured(budget.Workload(1, 1, 9, num_steps=3), wakes_a_thread)
    is_over = True
    wake.release()
    thread.join()
    assert row.wake_ups_per_layer is not None
    assert 1 <= row.wake_ups_per_layer * TINY.num_layers < 1000


@pytest.mark.parametrize("policy", ["ACTIVE", "PASSIVE", None])
def test_wake_ups_are_counted_only_if_waiting_threads_sleep(policy, monkeypatch):
    if not budget_counts.TASKS.exists():
        pytest.skip("only Linux counts them")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    reason = budget_counts.why_no_wake_ups()
    row = measured(budget.Workload(1, 1, 9, num_steps=1))
    table = budget.as_table([row])
    shown = list(table.columns[-1].cells)
    if policy == "PASSIVE":
        assert reason is None
        assert row.wake_ups_per_layer is not None
        assert shown != ["-"]
    else:
        assert reason is not None
        assert "spin" in reason
        assert reason in budget.describe(TINY, torch.float32, "auto", [row])
        assert row.wake_ups_per_layer is None
        assert shown == ["-"]


def test_a_system_without_counts_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(budget_counts, "TASKS", tmp_path / "none")
    assert budget_counts.count_sleeps() == {}
    assert "Linux" in (budget_counts.why_no_wake_ups() or "")


@pytest.mark.parametrize("weights", [[], ["--weight-dtype", "float16"]])
def test_the_command_prints_a_row_per_workload(capsys, monkeypatch, weights):
    if weights and not works(InFloat16):
        pytest.skip("this processor, or this torch, has no products with float16 weights")
    options = ("bench", "step", "--budget", "--quick", "--device", "cpu", *weights)
    code, out, _ = minipaged(capsys, monkeypatch, *options, "--context-len", "12", "--json")
    assert code == 0
    report = json.loads(out)
    assert f"weights in {'float16' if weights else 'float32'}" in report["note"]
    found = [(row["num_seqs"], row["num_tokens"], row["context_len"]) for row in report["rows"]]
    assert found == [(1, 1, 12), (3, 1, 12), (1, 16, 0), (1, 16, 32)]
    for row in report["rows"]:
        assert row["seconds"] > 0
        assert row["floor_seconds"] == max(row["read_seconds"], row["compute_seconds"]) > 0
    one, three = report["rows"][0], report["rows"][1]
    assert one["num_bytes"] < three["num_bytes"]
    assert one["num_operations"] * 2 < three["num_operations"]


def test_the_table_names_each_workload(capsys, monkeypatch):
    code, out, _ = minipaged(capsys, monkeypatch, "bench", "step", "--budget", "--quick")
    assert code == 0
    for name in ("decode, 3 after 9", "prefill, 16 after 32", "wake-ups", "floor"):
        assert name in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--budget", "--num-seqs", "3"], "leave out --num-seqs"),
        (["--budget", "--tensor-parallel-size", "2"], "leave out --tensor-parallel-size"),
        (["--budget", "--model", "storyteller"], "leave out --model"),
        (["--budget", "--context-len", "9000"], "--context-len is 9000, above"),
        (["--budget", "--dtype", "bfloat16", "--weight-dtype", "float16"], "choose others"),
        (["--weight-dtype", "float16"], "an option of --budget"),
    ],
)
def test_options_that_a_budget_ignores_are_refused(capsys, monkeypatch, options, sentence):
    code, out, err = minipaged(capsys, monkeypatch, "bench", "step", "--device", "cpu", *options)
    assert (code, out) == (2, "")
    assert sentence in err


def test_a_budget_on_a_gpu_is_refused(capsys, monkeypatch):
    gpu = torch.device("cuda"), torch.float32, True
    monkeypatch.setattr(bench_step, "choose", lambda *_: gpu)
    code, _, err = minipaged(capsys, monkeypatch, "bench", "step", "--budget")
    assert code == 2
    assert "use --device cpu" in err
