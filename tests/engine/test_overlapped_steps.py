"""Steps that are launched before the results of the last one are read: order, and same tokens."""

import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from checkpoints import VOCAB_SIZE, make_checkpoint
from engine_runs import assert_all_blocks_are_back, checked
from full_set import examples

from minipaged import LLM, Parts, SamplingParams
from minipaged.engine import launched_step, overlap
from minipaged.errors import InvalidOption
from minipaged.evaluation.soak.alone import Alone, make_tiny_model
from minipaged.evaluation.soak.trial import Trial
from minipaged.evaluation.soak.workload import draw_workload
from minipaged.evaluation.testing.stub_device import StubDevice
from minipaged.sampling import BeamSearchParams
from minipaged.sequence import Sequence
from minipaged.tracing.events import EventLog

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=4, max_tokens=9, ignore_eos=True)
PROMPTS = [[3 + (5 * i + 7 * n) % (VOCAB_SIZE - 3) for n in range(6 + i)] for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("overlapped"))


def overlapped(folder, **options) -> LLM:
    return checked(folder, **{"num_blocks": 64, "async_scheduling": True, **options})


def count_launches(llm: LLM) -> dict[str, int]:
    """How many steps were launched ahead, and how many alone."""
    launch, counts = llm.engine._launch, {"ahead": 0, "alone": 0}

    def launch_and_count(after=None):
        counts["alone" if after is None else "ahead"] += 1
        return launch(after)

    llm.engine._launch = launch_and_count
    return counts


def results(outputs) -> list:
    return [
        [(each.token_ids, each.text, each.finish_reason, each.stop_reason) for each in one.outputs]
        for one in outputs
    ]


# ---- the order of events -------------------------------------------------------------------------


def test_a_step_is_launched_while_the_device_computes_the_step_before(folder):
    """The device starts each step but the last only after the next one was launched."""
    last, waited = 12, threading.Condition()

    def wait_for_the_next(number: int) -> None:
        with waited:
            is_followed = waited.wait_for(
                lambda: number >= last or device.num_launched > number, timeout=20
            )
        assert is_followed, f"step {number + 1} was not launched while step {number} was computed"

    device = StubDevice(before_step=wait_for_the_next)
    llm = LLM(folder, num_blocks=64, async_scheduling=True, device="cpu")
    device.attach(llm.engine)
    run = llm.engine.executor.run

    def run_and_notify(*arguments):
        with waited:
            coming = run(*arguments)
            waited.notify_all()
        return coming

    llm.engine.executor.run = run_and_notify
    outputs = llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    order = [(what, number) for _, what, number in device.events if what in ("launch", "read")]
    for number in range(1, last):
        assert order.index(("launch", number + 1)) < order.index(("read", number))
    plain = LLM(folder, num_blocks=64, device="cpu").generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    assert results(outputs) == results(plain)


def test_without_overlap_a_step_is_read_before_the_next_is_launched(folder):
    device = StubDevice()
    llm = LLM(folder, num_blocks=64, async_scheduling=False, device="cpu")
    device.attach(llm.engine)
    llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    order = [(what, number) for _, what, number in device.events if what in ("launch", "read")]
    assert order == [(what, number) for number in range(1, 13) for what in ("launch", "read")]


# ---- the same tokens -----------------------------------------------------------------------------

KINDS = {
    "greedy": GREEDY,
    "seeded": SAMPLED,
    "three samples": SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True),
    "best of": SamplingParams(n=1, best_of=3, temperature=1.0, seed=2, max_tokens=8),
    "stop token": SamplingParams(
        temperature=1.0, seed=6, stop_token_ids=range(3, VOCAB_SIZE, 4), max_tokens=30
    ),
    "minimum length": SamplingParams(
        temperature=1.0, seed=6, min_tokens=7, max_tokens=20, stop_token_ids=range(3, VOCAB_SIZE, 4)
    ),
    "penalties": SamplingParams(temperature=0.0, max_tokens=10, repetition_penalty=1.7),
    "logprobs": SamplingParams(temperature=0.0, max_tokens=8, logprobs=2, prompt_logprobs=1),
    "beams": BeamSearchParams(beam_width=3, max_tokens=7),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [None, 5])
def test_requests_of_every_kind_get_the_tokens_that_they_get_without_overlap(folder, kind, budget):
    """Alone and with requests that may be computed ahead; whole prompts, and in chunks."""
    options = {"max_num_seqs": 5, "max_num_batched_tokens": budget}
    for params in ([KINDS[kind]] * 4, [KINDS[kind], GREEDY, SAMPLED, KINDS[kind]]):
        plain = checked(folder, num_blocks=64, **options)
        expected = plain.generate(PROMPTS, params, use_tqdm=False)
        llm = overlapped(folder, **options)
        counts = count_launches(llm)
        assert results(llm.generate(PROMPTS, params, use_tqdm=False)) == results(expected)
        assert_all_blocks_are_back(llm)
    # In the mixed batch, other requests run alone at the end; but one search follows the other.
    assert counts["ahead"] > 0 or kind == "beams"


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preempted_requests_get_the_same_tokens_and_a_preemption_waits(folder, preemption):
    options = {"block_size": 4, "num_blocks": 12, "num_swap_blocks": 30, "watermark": 0.0}
    options |= {"preemption": preemption, "max_num_seqs": 6}
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    expected = results(checked(folder, **options).generate(PROMPTS, params, use_tqdm=False))
    llm = overlapped(folder, **options)
    counts, preempted = count_launches(llm), []
    schedule = llm.engine.scheduler.schedule

    def schedule_and_note():
        decision = schedule()
        if decision.preempted:
            preempted.append(
                max(
                    s.seq.num_in_flight
                    for g in llm.engine.scheduler.running
                    for s in decision.sequences
                )
            )
        return decision

    llm.engine.scheduler.schedule = schedule_and_note
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert results(outputs) == expected
    assert preempted
    assert max(preempted) == 0, "a group was preempted while a step was in flight"
    assert counts["ahead"] > 0


def test_prefixes_are_found_and_only_blocks_whose_results_were_read_are_cached(folder):
    prefix = [5 + n % 40 for n in range(32)]
    llm = overlapped(folder)
    counts = count_launches(llm)
    commit, computed = llm.engine.scheduler.commit, []

    def commit_and_note(decision):
        computed.extend(s.seq.num_in_flight for s in decision.sequences)
        commit(decision)

    llm.engine.scheduler.commit = commit_and_note
    prompts = [[*prefix, 60 + i] for i in range(3)]
    outputs = llm.generate(prompts, SAMPLED, use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [0, 32, 32]
    assert counts["ahead"] > 0
    assert set(computed) == {0}
    expected = checked(folder, num_blocks=64).generate(prompts, SAMPLED, use_tqdm=False)
    assert results(outputs) == results(expected)


def test_a_sequence_that_stops_is_left_out_of_the_step_that_follows_it(folder):
    stop = results(overlapped(folder).generate(PROMPTS[:1], GREEDY, use_tqdm=False))[0][0][0][4]
    params = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[stop])
    llm = overlapped(folder)
    [output, other] = llm.generate(PROMPTS[:2], [params, GREEDY], use_tqdm=False)
    assert output.outputs[0].token_ids[-1] == stop
    assert output.outputs[0].finish_reason == "stop"
    assert other.outputs[0].finish_reason == "length"
    assert_all_blocks_are_back(llm)


def test_a_request_may_be_aborted_and_its_id_reused_while_a_step_is_in_flight(folder):
    llm = overlapped(folder)
    engine = llm.engine
    [expected] = results(checked(folder, num_blocks=64).generate(PROMPTS[1:2], SAMPLED))
    engine.add_request("a", PROMPTS[0], GREEDY)
    engine.add_request("b", PROMPTS[2], GREEDY)
    for _ in range(4):
        engine.step()
    assert engine._launched is not None
    aborted = engine.abort_request("a")
    assert len(aborted.outputs[0].token_ids) == 4
    engine.add_request("a", PROMPTS[1], SAMPLED)
    found = {}
    while engine.has_unfinished_requests():
        for progress in engine.step():
            found[progress.request_id] = progress.build_output()
    assert results([found["a"]]) == [expected]
    assert_all_blocks_are_back(llm)


def test_nothing_is_in_flight_when_the_last_request_has_ended(folder):
    llm = overlapped(folder)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert llm.engine._launched is None


def test_a_sequence_with_broken_logits_ends_alone(folder):
    plain = results(checked(folder, num_blocks=64).generate(PROMPTS[:3], GREEDY, use_tqdm=False))
    llm = overlapped(folder)
    run, steps = llm.engine.executor.run, iter(range(100))

    def run_and_break(step, *pending):
        logits, number = run(step, *pending).clone(), next(steps)
        if number >= 4:  # in step 4 and in those launched before it is read
            for row, sequence in enumerate(step.sequences):
                if sequence.seq_id == 1:
                    logits[row] = float("nan")
        return logits

    llm.engine.executor.run = run_and_break
    first, broken, last = llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)
    assert results([first, last]) == [plain[0], plain[2]]
    assert broken.outputs[0].finish_reason == "error"
    assert broken.outputs[0].token_ids == plain[1][0][0][:4]
    assert_all_blocks_are_back(llm)


# ---- the random engines, and deliberate faults ---------------------------------------------------


def finds_a_mismatch(count: int) -> bool:
    """Whether one of so many random engines, half of which overlap, gives other tokens."""
    with TemporaryDirectory() as name:
        make_tiny_model(Path(name))
        alone = Alone(Path(name))
        for seed in range(17, 17 + count):
            trial = Trial(workload := draw_workload(seed))
            try:
                trial.run(Path(name), Parts())
            except Exception:
                return True
            longest = workload.options["max_model_len"]
            if any(alone.difference(served, longest) for served in trial.served):
                return True
    return False


def test_half_of_the_random_engines_overlap_and_nothing_differs():
    assert not finds_a_mismatch(examples(4, full=60))


def forget(change: str):
    """A deliberate fault in one method."""

    def leave_out_nothing(step, requests):
        return None

    def never_arrive(step):
        return None

    def without_pending(seq, row):
        seq.token_ids.append(-1)  # always the token of row 0

    def always(step, scheduler, requests):
        return True

    return {
        "leave_out_ended": (overlap, "leave_out_ended", leave_out_nothing),
        "arrive": (overlap, "arrive", never_arrive),
        "append_pending": (Sequence, "append_pending", without_pending),
        "may_look_ahead": (overlap, "may_look_ahead", always),
    }[change]


@pytest.mark.parametrize(
    "change", ["leave_out_ended", "arrive", "append_pending", "may_look_ahead"]
)
def test_a_deliberate_fault_is_found(change, monkeypatch):
    monkeypatch.setattr(*forget(change))
    assert finds_a_mismatch(12)


def test_a_seeded_draw_does_not_depend_on_overlap(folder, monkeypatch):
    """A fault: the position of the draw leaves out the pending token."""
    expected = results(checked(folder, num_blocks=64).generate(PROMPTS, SAMPLED, use_tqdm=False))
    row = launched_step.SamplingRow
    monkeypatch.setattr(row, "position", property(lambda self: len(self.output_token_ids)))
    assert results(overlapped(folder).generate(PROMPTS, SAMPLED, use_tqdm=False)) != expected


# ---- what cannot overlap -------------------------------------------------------------------------


class OwnScheduler(Parts().scheduler):
    """A custom part, which does not know tokens in flight."""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"memory": "contiguous-max"}, "memory='contiguous-max'"),
        ({"memory": "virtual"}, "memory='virtual'"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2"),
        ({"parts": Parts(scheduler=OwnScheduler)}, "the part scheduler"),
        ({"parts": Parts(adjust_logits=lambda logits, rows: logits)}, "the part adjust_logits"),
        ({"parts": Parts().traced(EventLog())}, "the run is traced"),
    ],
)
def test_what_cannot_overlap_is_refused_in_one_sentence(folder, options, reason):
    with pytest.raises(InvalidOption, match=f"async_scheduling is True, but .*{reason}") as refusal:
        LLM(folder, num_blocks=64, device="cpu", async_scheduling=True, **options)
    assert refusal.value.param == "async_scheduling"


def test_steps_do_not_overlap_on_a_cpu_unless_asked(folder):
    assert not LLM(folder, num_blocks=64, device="cpu").engine.config.async_scheduling
    asked = LLM(folder, num_blocks=64, device="cpu", async_scheduling=True)
    assert asked.engine.config.async_scheduling
