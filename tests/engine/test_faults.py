"""An exception or Ctrl-C at any point: every other request ends as if nothing had happened."""

import logging
import pickle
import threading
from itertools import islice
from random import Random

import pytest
from checkpoints import make_checkpoint
from engine_runs import GREEDY, PROMPTS, assert_all_blocks_are_back, checked, run, tokens
from full_set import examples

from minipaged import LLM, Parts, SamplingParams
from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.open_request import OpenRequest
from minipaged.engine.outputs import Progress
from minipaged.engine.sampling_request import SamplingRequest
from minipaged.errors import RequestFailed
from minipaged.evaluation.soak.faults import (
    InjectedError,
    Injector,
    inject,
    perform,
)
from minipaged.evaluation.soak.scenarios import scenarios
from minipaged.memory import BlockManager
from minipaged.sampling import BeamSearchParams

SCENARIOS = {scenario.name: scenario for scenario in scenarios()}
SAMPLED = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)


def engine_of(name: str) -> LLMEngine:
    return LLM("storyteller", **SCENARIOS[name].options).engine


def findings(name: str, count: int, seed: int = 0):
    return list(islice(inject(engine_of(name), SCENARIOS[name].calls, Random(seed)), count))


# ---- at any point of any call --------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_at_any_boundary_changes_no_other_request(name, record_property):
    found = findings(name, examples(8, full=60))
    record_property("faults", len(found))
    assert [finding for finding in found if finding.mismatch] == []


def test_the_scenarios_have_everything_under_way():
    for name in ("swapping", "recomputation"):
        engine, seen = engine_of(name), set()

        def note(decision, stats, seen=seen):
            seen |= {name for name in ("swap_out", "swap_in", "copies") if getattr(decision, name)}
            seen |= {"preempted"} if decision.preempted else set()
            seen |= {"prefix hit"} if decision.num_cached_tokens else set()

        engine.listeners.append(note)
        undisturbed = perform(engine, SCENARIOS[name].calls, Injector())
        assert {"swap_out", "swap_in", "copies", "preempted", "prefix hit"} <= seen
        assert {len(output.outputs) for output in undisturbed.outputs.values()} == {1, 3}
    engine = engine_of("out of memory")
    ended = perform(engine, SCENARIOS["out of memory"].calls, Injector()).outputs
    assert len(ended["outgrows the pool"].outputs[0].token_ids) < 60


def test_boundaries_are_found_in_each_kind_of_part():
    counting = Injector(places={})
    perform(engine_of("swapping"), SCENARIOS["swapping"].calls, counting)
    for part in (
        "attention.kv_cache", "attention.torch_decode", "engine.beam_request", "engine.llm_engine",
        "engine.prefixes", "memory.allocator", "memory.block_manager", "memory.prefix_cache",
        "models.llama", "sampling.sampler", "scheduler.fcfs", "tokenizer.detokenizer",
        "worker.model_runner",
    ):  # fmt: skip
        assert any(place.startswith(f"{part}.") for place in counting.places), part


# ---- deliberate faults: each must be noticed -----------------------------------------------------


def leave_out_the_restart(monkeypatch):
    restart = LLMEngine.restart
    begun = set()

    def only_once(engine):  # at the beginning of a run
        if id(engine) not in begun or not engine._open:
            begun.add(id(engine))
            restart(engine)
        engine._is_cut_short = False

    monkeypatch.setattr(LLMEngine, "restart", only_once)


def keep_the_tokens_of_the_step(monkeypatch):
    rebuild = OpenRequest.rebuild
    monkeypatch.setattr(OpenRequest, "rebuild", lambda self, _: rebuild(self, 10**9))


def forget_the_forks(monkeypatch):
    rebuild = OpenRequest.rebuild

    def without_forks(self, last_step):
        group = rebuild(self, last_step)
        group.awaiting_refork = []
        return group

    monkeypatch.setattr(OpenRequest, "rebuild", without_forks)


def report_tokens_again(monkeypatch):
    replay = OpenRequest._replay

    def without_reporting(self, request, sampled, child_ids):
        request.progress, progress = lambda: None, request.progress
        replay(self, request, sampled, child_ids)
        request.progress = progress

    monkeypatch.setattr(OpenRequest, "_replay", without_reporting)


def keep_the_forks_of_the_step(monkeypatch):
    rebuild = OpenRequest.rebuild

    def with_all_forks(self, last_step):
        forked = self.forked
        group = rebuild(self, last_step)
        self.forked = forked
        return group

    monkeypatch.setattr(OpenRequest, "rebuild", with_all_forks)


MUTANTS = [
    leave_out_the_restart,
    keep_the_tokens_of_the_step,
    forget_the_forks,
    report_tokens_again,
]


@pytest.mark.parametrize("mutate", MUTANTS)
def test_an_incorrect_restart_is_detected(mutate, monkeypatch):
    mutate(monkeypatch)
    engine, scenario = engine_of("recomputation"), SCENARIOS["recomputation"]
    mismatches = []
    try:
        for finding in islice(inject(engine, scenario.calls, Random(1)), 40):
            mismatches.append(finding.mismatch)
            if finding.mismatch:
                break
    except Exception as error:  # the engine itself noticed
        mismatches.append(repr(error))
    assert any(mismatches)


def fork_twice(monkeypatch) -> list[tuple[list[int], str]]:
    """The samples of a request: Ctrl-C comes in the step that forks, and once more later."""
    llm = LLM("storyteller", num_blocks=64)
    advance, calls = SamplingRequest.advance, []

    def advance_and_be_interrupted(self, sampled, fork):
        ended = advance(self, sampled, fork)
        calls.append(len(self.group.sequences))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return ended

    monkeypatch.setattr(SamplingRequest, "advance", advance_and_be_interrupted)
    llm.engine.add_request("0", "Theo the frog", SAMPLED)
    with pytest.raises(KeyboardInterrupt):
        llm.engine.step()
    assert calls == [3], "the request had not forked"
    for _ in range(4):
        llm.engine.step()
    llm.engine.restart()
    last: list[Progress] = []
    while llm.engine.has_unfinished_requests():
        last = llm.engine.step() or last
    return [(one.token_ids, one.text) for one in last[0].outputs]


def test_forks_of_a_step_that_was_cut_short_are_forgotten(monkeypatch):
    undisturbed = read(LLM("storyteller", num_blocks=64).stream("Theo the frog", SAMPLED))
    with monkeypatch.context() as patches:
        assert fork_twice(patches) == undisturbed
    with monkeypatch.context() as patches:
        keep_the_forks_of_the_step(patches)
        with pytest.raises((KeyError, AssertionError, RequestFailed)):
            assert fork_twice(patches) == undisturbed


# ---- streams and generate ------------------------------------------------------------------------


def read(stream) -> list[tuple[list[int], str]]:
    output = None
    for _, output in stream:  # noqa: B007
        pass
    return [(completion.token_ids, completion.text) for completion in output.outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def storyteller() -> LLM:
    return LLM("storyteller", num_blocks=64)


def interrupted(llm: LLM, injector: Injector) -> list[tuple[list[int], str]]:
    """The samples of an open stream, after a fault in another caller's `generate`."""
    llm.engine.restart()
    stream = llm.stream("Theo the frog", SAMPLED)
    next(stream)
    try:
        with injector.active():
            llm.generate(["Nell the goat", "Ana"], GREEDY, use_tqdm=False)
    except (KeyboardInterrupt, InjectedError, RequestFailed):
        assert injector.where is not None
    samples = read(stream)
    assert not llm.engine.has_unfinished_requests()
    assert_all_blocks_are_back(llm)
    return samples


@pytest.mark.parametrize("fault", [KeyboardInterrupt, InjectedError])
def test_a_fault_in_one_generate_does_not_change_a_stream_of_another(storyteller, fault):
    counting = Injector(places={})
    undisturbed = interrupted(storyteller, counting)
    rng, places = Random(2), sorted(counting.places)
    for place in rng.sample(places, min(len(places), examples(8, full=80))):
        injector = Injector(fault(), (rng.choice(counting.places[place]),))
        try:
            samples, guilty = interrupted(storyteller, injector), None
        except RequestFailed as error:  # it is the stream's own code that failed
            samples, guilty = None, error.__cause__
        assert guilty is injector.fault or samples == undisturbed, place


def test_results_that_were_not_received_are_returned_by_the_next_step(storyteller, monkeypatch):
    step, alone = storyteller.engine.step, read(storyteller.stream("Theo the frog", GREEDY))
    stream = storyteller.stream("Theo the frog", GREEDY)
    next(stream)

    def step_to_the_end_and_be_interrupted():
        while len(storyteller.engine.unfinished_request_ids) > 1:
            step()
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(storyteller.engine, "step", step_to_the_end_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        storyteller.generate("Nell", SamplingParams(max_tokens=40, ignore_eos=True), use_tqdm=False)
    assert read(stream) == alone


def test_a_second_ctrl_c_leaves_no_requests_and_no_blocks(storyteller, monkeypatch):
    engine, abort = storyteller.engine, storyteller.engine.abort_request

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "step", interrupt)
    monkeypatch.setattr(engine, "abort_request", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storyteller.generate(["Theo", "Nell", "Ana"], GREEDY, use_tqdm=False)
    assert len(engine.unfinished_request_ids) == 3
    monkeypatch.undo()
    assert engine.abort_request == abort
    run(storyteller, ["Theo"])
    assert not engine.has_unfinished_requests()


# ---- the code of one request ---------------------------------------------------------------------


def test_a_request_whose_tokenizer_fails_ends_alone(storyteller, monkeypatch):
    alone = read(storyteller.stream("Theo the frog", SAMPLED))
    stream = storyteller.stream("Theo the frog", SAMPLED)
    next(stream)
    engine = storyteller.engine
    engine.add_request("guilty", "Nell the goat", GREEDY)
    add = engine._open["guilty"].request.advance

    def fail(sampled, fork):
        add(sampled, fork)
        raise LookupError("no such token")

    monkeypatch.setattr(engine._open["guilty"].request, "advance", fail)
    [failed] = [progress for progress in engine.step() if progress.request_id == "guilty"]
    assert failed.finished
    assert isinstance(failed.error, RequestFailed)
    assert isinstance(failed.error.__cause__, LookupError)
    assert "'guilty' has ended" in str(failed.error)
    assert "LookupError: no such token" in str(failed.error)
    assert failed.output().outputs[0].finish_reason == "error"
    assert read(stream) == alone
    assert_all_blocks_are_back(storyteller)


def test_generate_raises_what_ended_its_request(storyteller, monkeypatch):
    def fail(*_):
        raise LookupError("no such token")

    monkeypatch.setattr("minipaged.tokenizer.detokenizer.Detokenizer.add", fail)
    with pytest.raises(RequestFailed, match="no such token") as raised:
        storyteller.generate("Theo", GREEDY, use_tqdm=False)
    assert isinstance(raised.value.__cause__, LookupError)
    assert_all_blocks_are_back(storyteller)


# ---- parts that fail -----------------------------------------------------------------------------


def test_a_part_that_fails_once_changes_no_request(folder):
    class FreesOnTheSecondTry(BlockManager):
        num_failed = 0

        def free(self, seq):
            if FreesOnTheSecondTry.num_failed == 0:
                FreesOnTheSecondTry.num_failed += 1
                raise MemoryError("for once")
            super().free(seq)

    llm = LLM(folder, parts=Parts(memory=FreesOnTheSecondTry))
    for number, prompt in enumerate(PROMPTS):
        llm.engine.add_request(str(number), prompt, GREEDY)
    outputs = {}
    while llm.engine.has_unfinished_requests():
        try:
            progresses = llm.engine.step()
        except MemoryError:
            continue
        outputs |= {p.request_id: p.output() for p in progresses if p.finished}
    assert FreesOnTheSecondTry.num_failed == 1
    in_order = [outputs[str(number)] for number in range(len(PROMPTS))]
    assert tokens(in_order) == tokens(run(checked(folder)))
    assert_all_blocks_are_back(llm)


def test_a_listener_that_fails_undoes_its_step(storyteller):
    def fail(*_):
        storyteller.engine.listeners.remove(fail)
        raise LookupError("a listener")

    alone = read(storyteller.stream("Theo", GREEDY))
    stream = storyteller.stream("Theo", GREEDY)
    next(stream)
    storyteller.engine.listeners.append(fail)
    with pytest.raises(LookupError, match="a listener"):
        storyteller.generate("Nell", GREEDY, use_tqdm=False)
    assert read(stream) == alone


def test_an_abort_whose_part_fails_is_logged_and_completed(folder, caplog):
    class NeverFrees(BlockManager):
        def free(self, seq):
            raise MemoryError("never")

    llm = LLM(folder, parts=Parts(memory=NeverFrees))
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    with caplog.at_level(logging.ERROR, logger="minipaged"):
        stream.close()
    assert "a part failed while request 'llm-0' was aborted" in caplog.text
    assert not llm.engine.has_unfinished_requests()
    assert_all_blocks_are_back(llm)


def test_a_pinned_prefix_is_pinned_again_once_it_is_computed(folder):
    llm = checked(folder, num_blocks=40, block_size=4)
    prefix = llm.cache_prefix(PROMPTS[1][:16])
    llm.engine.restart()
    assert llm.engine.memory.num_free == 40
    assert llm.engine.prefixes.pinned == [prefix]
    llm.generate([PROMPTS[1]], GREEDY, use_tqdm=False)
    assert llm.engine.memory.num_free == 40 - prefix.num_blocks
    llm.release_prefix(prefix)
    assert_all_blocks_are_back(llm)


def test_a_lost_prefix_can_be_released(folder):
    llm = checked(folder, num_blocks=40, block_size=4)
    prefix = llm.cache_prefix(PROMPTS[1][:16])
    llm.engine.restart()
    llm.release_prefix(prefix)
    run(llm)
    assert llm.engine.prefixes.pinned == []


# ---- threads -------------------------------------------------------------------------------------


def test_two_threads_generate_at_once_and_get_their_own_tokens(storyteller):
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[5], PROMPTS[7]]
    params = [GREEDY, SAMPLED, GREEDY, BeamSearchParams(beam_width=2, max_tokens=8)]
    expected = [o.outputs for o in storyteller.generate(prompts, params, use_tqdm=False)]
    found: dict[int, list] = {0: [], 1: []}

    def serve(number: int) -> None:
        for _ in range(3):
            outputs = storyteller.generate(prompts[number::2], params[number::2], use_tqdm=False)
            found[number].append([output.outputs for output in outputs])

    threads = [threading.Thread(target=serve, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number, results in found.items():
        assert len(results) == 3
        for result in results:
            for one, other in zip(result, expected[number::2], strict=True):
                assert [c.token_ids for c in one] == [c.token_ids for c in other]
    assert_all_blocks_are_back(storyteller)


def test_threads_share_the_steps(storyteller):
    """Two calls of 32 tokens that overlap take fewer steps than one after the other."""
    both_have_begun = threading.Barrier(2, timeout=60)

    def serve() -> None:
        stream = storyteller.stream("Theo the frog", GREEDY)
        next(stream)
        both_have_begun.wait()
        read(stream)

    begin, _ = storyteller.engine.last_step
    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert storyteller.engine.last_step[0] - begin < 2 * 32


def test_an_llm_can_be_pickled(storyteller):
    copy = pickle.loads(pickle.dumps(storyteller))
    assert tokens(run(copy, ["Theo"])) == tokens(run(storyteller, ["Theo"]))
