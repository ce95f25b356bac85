"""Beam search: the sequences and scores of transformers, and the blocks of beams."""

from dataclasses import dataclass

import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint
from engine_runs import GREEDY, assert_all_blocks_are_back, run, set_eos, tokens
from step_watching import (
    all_tokens,
    assert_only_the_living_hold_blocks,
    prompt,
    small,
    step_to_the_end,
    watch,
)

from minipaged import LLM, BeamSearchParams, Parts, SamplingParams
from minipaged.engine.outputs import RequestOutput
from minipaged.errors import InvalidOption, InvalidRequest
from minipaged.evaluation.bench.sharing import SharingMeter
from minipaged.sampling import Beam, BeamSearch
from minipaged.sequence import Sequence, SequenceStatus

MAX_TOKENS = 12
# Tokens that these random models often generate: some sequences end, some do not.
OFTEN = {"llama": (44, 15, 84), "gpt2": (71, 72, 11), "opt": (71, 19, 29)}
RULES = (True, False, "never")
PENALTIES = (0.0, 1.0, -0.7, 2.0)
PROMPTS = [[(7 * i + 11 * n) % (VOCAB_SIZE - 3) + 3 for i in range(n)] for n in (3, 17)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


# ---- compared with transformers ------------------------------------------------------------------


@dataclass
class Models:
    """One random model, in this library and in transformers."""

    llm: LLM
    dense: torch.nn.Module
    eos: tuple[int, ...]

    def check(
        self, prompts: list[list[int]], params: list[BeamSearchParams]
    ) -> list[RequestOutput]:
        """Search for all of them together here, and one by one there."""
        outputs = run(self.llm, prompts, params)
        for ids, each, output in zip(prompts, params, outputs, strict=True):
            self.compare(ids, each, output)
        return outputs

    def compare(self, ids: list[int], params: BeamSearchParams, output: RequestOutput) -> None:
        eos = () if params.ignore_eos else self.eos
        width = params.beam_width
        only_for_beams = {
            "num_return_sequences": width,
            "length_penalty": params.length_penalty,
            "early_stopping": params.early_stopping,
        }
        expected = self.dense.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            num_beams=width,
            max_new_tokens=params.max_tokens,
            do_sample=False,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **(only_for_beams if width > 1 else {}),
        )
        sequences = [up_to_the_end(ids, eos) for ids in expected.sequences[:, len(ids) :].tolist()]
        assert [completion.token_ids for completion in output.outputs] == sequences
        for completion in output.outputs:
            ended = completion.token_ids[-1] in eos
            assert completion.finish_reason == ("stop" if ended else "length")
        if width > 1:
            scores = [completion.score for completion in output.outputs]
            assert scores == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)


def up_to_the_end(token_ids: list[int], eos: tuple[int, ...]) -> list[int]:
    """Without the padding after the end-of-sequence token."""
    ends = [i + 1 for i, token in enumerate(token_ids) if token in eos]
    return token_ids[: min(ends, default=len(token_ids))]


@pytest.fixture(scope="module", params=sorted(OFTEN))
def models(request, tmp_path_factory):
    import transformers

    folder = make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    llm = small(folder, num_blocks=400)
    set_eos(llm, *OFTEN[request.param])
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return Models(llm, dense, OFTEN[request.param])


def test_sequences_and_scores_are_those_of_transformers(models):
    kinds = [
        (ids, BeamSearchParams(width, MAX_TOKENS, length_penalty=penalty, early_stopping=rule))
        for ids, width in zip(PROMPTS * 2, (2, 3, 4, 6), strict=True)
        for penalty in PENALTIES
        for rule in RULES
    ]
    outputs = models.check(*map(list, zip(*kinds, strict=True)))
    # The comparison covers enough: sequences end in both ways, searches end early, rules differ.
    completions = [completion for output in outputs for completion in output.outputs]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    ends = [max(len(c.token_ids) for c in output.outputs) for output in outputs]
    assert sum(end < MAX_TOKENS for end in ends) >= 10
    assert any(end == MAX_TOKENS for end in ends)
    found = all_tokens(outputs)
    at_once, early, late = found[::3], found[1::3], found[2::3]
    assert at_once != early != late != at_once


@pytest.mark.parametrize("beam_width", [1, 3])
def test_without_an_end_token_sequences_are_those_of_transformers(models, beam_width):
    outputs = models.check(
        PROMPTS * 2,
        [
            BeamSearchParams(beam_width, MAX_TOKENS, length_penalty=penalty, ignore_eos=True)
            for penalty in PENALTIES
        ],
    )
    completions = [completion for output in outputs for completion in output.outputs]
    assert {(len(c.token_ids), c.finish_reason) for c in completions} == {(MAX_TOKENS, "length")}
    said = {token for completion in completions for token in completion.token_ids}
    assert said & set(models.eos)


def test_a_single_beam_is_greedy(models):
    params = [BeamSearchParams(1, MAX_TOKENS, early_stopping=rule) for rule in (True, False)]
    outputs = models.check(PROMPTS, params)
    greedy = run(models.llm, PROMPTS, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
    assert tokens(outputs) == tokens(greedy)
    reasons = [[o.outputs[0].finish_reason for o in found] for found in (outputs, greedy)]
    assert reasons[0] == reasons[1]


def test_each_stopping_rule_searches_longer_than_the_previous_one(folder):
    lengths, found = [], []
    for rule in RULES:
        llm = small(folder)
        set_eos(llm, 84, 26, 90)
        steps = watch(llm)
        [output] = run(llm, PROMPTS[1], BeamSearchParams(3, max_tokens=40, early_stopping=rule))
        lengths.append(len(steps))
        found.append(all_tokens([output]))
    assert lengths[0] < lengths[1] < lengths[2] < 41
    assert found[0] != found[1] != found[2]


# ---- beams and their blocks ----------------------------------------------------------------------

STARVED = [
    (prompt(5, first=1), BeamSearchParams(4, max_tokens=12)),
    (prompt(8, first=2), BeamSearchParams(3, max_tokens=16, early_stopping=True)),
    (prompt(9, first=3), BeamSearchParams(2, max_tokens=24, length_penalty=0.0)),
    (prompt(5, first=1), BeamSearchParams(3, max_tokens=12, early_stopping="never")),
]


def scored(outputs: list[RequestOutput]):
    return [[(c.token_ids, c.finish_reason, c.index) for c in o.outputs] for o in outputs]


def test_beams_share_blocks_and_pruned_beams_return_theirs_at_once(folder):
    llm = small(folder)
    set_eos(llm, *OFTEN["llama"])
    for name, (ids, params) in enumerate(STARVED):
        llm.engine.add_request(str(name), ids, params)
    groups = list(llm.engine.scheduler.waiting)
    steps = watch(llm)
    memory = llm.engine.scheduler.memory
    shared = parents_of_two = 0
    living = [{seq.seq_id for seq in group.sequences} for group in groups]
    outputs = {}
    llm.engine.listeners.append(meter := SharingMeter(llm.engine))
    for finished in step_to_the_end(llm):
        outputs.update({output.request_id: output for output in finished})
        assert_only_the_living_hold_blocks(llm, groups)
        for group, (_, params) in zip(groups, STARVED, strict=True):
            assert len(group.sequences) <= params.beam_width
            assert group.sequences or group.request_id in outputs
            if group.status is SequenceStatus.RUNNING:
                tables = [memory.tables[s.seq_id] for s in group.sequences]
                shared += sum(map(len, tables)) - memory.num_distinct_blocks(group)
        now = [{seq.seq_id for seq in group.sequences} for group in groups]
        parents_of_two += any(old - new and new - old for old, new in zip(living, now, strict=True))
        living = now
    assert shared > 0
    assert parents_of_two > 5  # some fork in the same step in which others are pruned
    for name in outputs:
        counted = [step for step in steps if name in step.tables]
        assert meter.num_held[name] == sum(step.held(name) for step in counted)
        assert meter.num_unshared[name] == sum(step.unshared(name) for step in counted)
        assert meter.saved(name) == 1 - meter.num_held[name] / meter.num_unshared[name] > 0
    assert_all_blocks_are_back(llm)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"preemption": "swap"}, {"preemption": "recompute"}, {"num_swap_blocks": 0}],
    ids=["swap", "recompute", "no swap pool"],
)
def test_a_small_pool_changes_neither_sequences_nor_scores(folder, options, enable_prefix_caching):
    prompts, params = map(list, zip(*STARVED, strict=True))
    found = []
    for num_blocks, more in (200, {}), (21, options):
        llm = small(
            folder, num_blocks=num_blocks, enable_prefix_caching=enable_prefix_caching, **more
        )
        set_eos(llm, *OFTEN["llama"])
        found.append(run(llm, prompts, params))
    ample, starved = found
    assert scored(starved) == scored(ample)
    for one, two in zip(starved, ample, strict=True):
        scores = [[completion.score for completion in output.outputs] for output in (one, two)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert sum(output.metrics.num_preemptions for output in starved) > 0


def test_recomputed_beams_resume_together(folder):
    """Their chunks end in different steps, and the beams must still be compared in one."""
    prompts, params = map(list, zip(*STARVED, strict=True))
    tight = {"num_swap_blocks": 0, "max_num_seqs": 9, "max_num_batched_tokens": 9}
    llm = small(folder, num_blocks=21, enable_prefix_caching=False, **tight)
    outputs = run(llm, prompts, params)
    assert scored(outputs) == scored(run(small(folder), prompts, params))
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


@pytest.mark.parametrize(
    ("options", "max_tokens", "length"),
    [({}, 5, 5), ({"max_model_len": 20}, 16, 3), ({"max_model_len": 20}, None, 3), ({}, 1, 1)],
)
def test_the_last_token_allowed_ends_all_beams(folder, options, max_tokens, length):
    params = BeamSearchParams(3, max_tokens=max_tokens, ignore_eos=True)
    [output] = run(small(folder, **options), PROMPTS[1], params)
    assert [len(c.token_ids) for c in output.outputs] == [length] * 3
    assert {c.finish_reason for c in output.outputs} == {"length"}
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3


def test_beams_that_outgrow_the_pool_end_with_what_they_have(folder):
    llm = small(folder, num_blocks=8, watermark=0.0)
    params = BeamSearchParams(3, max_tokens=40, ignore_eos=True)
    [output] = run(llm, PROMPTS[1], params)
    lengths = {len(c.token_ids) for c in output.outputs}
    assert len(output.outputs) == 3
    assert len(lengths) == 1
    assert 3 < min(lengths) < 40
    assert {c.finish_reason for c in output.outputs} == {"length"}
    ample = small(folder)
    [same] = run(ample, PROMPTS[1], BeamSearchParams(3, min(lengths), ignore_eos=True))
    assert all_tokens([output]) == all_tokens([same])


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_an_aborted_search_returns_its_beams_best_first(folder, steps):
    llm = small(folder)
    llm.engine.add_request("a", PROMPTS[1], BeamSearchParams(4, max_tokens=30, ignore_eos=True))
    for _ in range(steps):
        assert llm.engine.step() == []
    output = llm.engine.abort_request("a")
    assert output.finished
    assert_all_blocks_are_back(llm)
    assert {c.finish_reason for c in output.outputs} == {"abort"}
    assert {len(c.token_ids) for c in output.outputs} == {steps}
    assert len(output.outputs) == (4 if steps else 1)
    scores = [c.score for c in output.outputs]
    assert scores == sorted(scores, reverse=True)
    if steps:
        whole = run(llm, PROMPTS[1], BeamSearchParams(4, max_tokens=steps, ignore_eos=True))
        assert all_tokens([output]) == all_tokens(whole)


def test_a_beam_that_ended_before_an_abort_keeps_its_finish_reason(folder):
    llm = small(folder)
    set_eos(llm, 84, 26, 90)
    llm.engine.add_request("a", PROMPTS[1], BeamSearchParams(4, max_tokens=40))
    for _ in range(5):
        llm.engine.step()
    output = llm.engine.abort_request("a")
    assert {c.finish_reason for c in output.outputs} == {"stop", "abort"}
    for completion in output.outputs:
        ends = completion.token_ids[-1] in (84, 26, 90)
        assert completion.finish_reason == ("stop" if ends else "abort")
    scores = [c.score for c in output.outputs]
    assert scores == sorted(scores, reverse=True)


def test_a_search_produces_no_output_before_its_end(folder):
    shown = list(
        small(folder).stream(PROMPTS, [BeamSearchParams(3, max_tokens=6, ignore_eos=True), GREEDY])
    )
    assert [output.finished for index, output in shown if index == 0] == [True]
    assert len(shown) == 1 + 32


def test_every_beam_has_its_own_text():
    llm = LLM("storyteller", parts=Parts().checked(), num_blocks=100)
    params = BeamSearchParams(3, max_tokens=12, ignore_eos=True)
    [output] = llm.beam_search("Once upon a time", params, use_tqdm=False)
    decode = llm.get_tokenizer().decode
    assert [c.text for c in output.outputs] == [decode(c.token_ids) for c in output.outputs]
    assert len({c.text for c in output.outputs}) == 3
    assert output.prompt == "Once upon a time"


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beam_width": 0}, "beam_width is 0: choose a whole number from 1 up"),
        ({"beam_width": 2.0}, "beam_width is 2.0: choose a whole number"),
        ({"beam_width": True}, "beam_width is True: choose a whole number"),
        ({"beam_width": None}, "beam_width is None: choose a whole number"),
        ({"max_tokens": 0}, "max_tokens is 0: choose a whole number from 1 up"),
        ({"max_tokens": "9"}, "max_tokens is '9': choose a whole number"),
        ({"length_penalty": "1"}, "length_penalty is '1': choose a number from -10 to 10"),
        ({"length_penalty": None}, "length_penalty is None"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"length_penalty": float("inf")}, "length_penalty is inf"),
        ({"length_penalty": -101}, "length_penalty is -101"),
        ({"early_stopping": "always"}, "early_stopping is 'always': choose True, False or"),
        ({"early_stopping": None}, "early_stopping is None"),
        ({"ignore_eos": 1}, "ignore_eos is 1: choose True or False"),
    ],
)
def test_an_invalid_value_is_refused_with_its_own_message(options, sentence):
    with pytest.raises(InvalidOption, match=sentence):
        BeamSearchParams(**{"beam_width": 2, **options})


@pytest.mark.parametrize("params", [SamplingParams(), None, {"beam_width": 2}, 3])
def test_beam_search_takes_no_other_params(folder, params):
    with pytest.raises(InvalidRequest, match=r"beam_search takes one BeamSearchParams"):
        small(folder).beam_search(PROMPTS, params, use_tqdm=False)


@pytest.mark.parametrize(
    ("eos", "ignore_eos", "widest"),
    [((), False, 50), ((2,), False, 50), ((2, 3, 4), False, 25), ((2, 3, 4), True, 50)],
)
def test_a_width_that_needs_more_tokens_than_the_vocabulary_is_refused(
    folder, eos, ignore_eos, widest
):
    llm = small(folder, num_blocks=400)
    set_eos(llm, *eos)
    for width in widest + 1, widest + 10:
        params = BeamSearchParams(width, max_tokens=2, ignore_eos=ignore_eos)
        with pytest.raises(InvalidOption, match=f"choose a beam_width up to {widest}"):
            llm.beam_search(PROMPTS[0], params, use_tqdm=False)
    params = BeamSearchParams(widest, max_tokens=2, ignore_eos=ignore_eos)
    [output] = llm.beam_search(PROMPTS[0], params, use_tqdm=False)
    assert len(output.outputs) == widest
    assert_all_blocks_are_back(llm)


def test_a_width_beyond_the_batch_slots_is_refused(folder):
    llm = small(folder, max_num_seqs=3)
    with pytest.raises(
        InvalidRequest, match=r"asks for 4 sequences at once .* raise max_num_seqs to 4"
    ):
        llm.beam_search(PROMPTS[0], BeamSearchParams(4), use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()


# ---- the search by itself ------------------------------------------------------------------------

EOS = 0


def beams(*logprobs: float, num_output_tokens: int = 1) -> list[Beam]:
    found = []
    for seq_id, logprob in enumerate(logprobs):
        seq = Sequence(seq_id, [7, 7])
        for _ in range(num_output_tokens):
            seq.append(10 + seq_id)
        found.append(Beam(seq, logprob))
    return found


def search(beam_width: int = 2, max_tokens: int = 9, **options) -> BeamSearch:
    return BeamSearch(BeamSearchParams(beam_width, max_tokens, **options), (EOS,), max_tokens)


def chosen(candidates) -> list[tuple[int, int, float]]:
    return [(c.beam.seq.seq_id, c.token_id, pytest.approx(c.logprob)) for c in candidates]


def test_the_best_candidates_of_all_beams_continue():
    likeliest = [{1: -1.0, 2: -2.0, 3: -5.0}, {1: -0.1, 2: -0.2, 3: -0.3}]
    going_on = search().advance(beams(-1.0, -1.5), likeliest)
    assert chosen(going_on) == [(1, 1, -1.6), (1, 2, -1.7)]
    going_on = search().advance(beams(-1.0, -2.0), likeliest)
    assert chosen(going_on) == [(0, 1, -2.0), (1, 1, -2.1)]


def test_a_candidate_that_ends_is_a_hypothesis_and_the_next_one_continues():
    one = search()
    going_on = one.advance(beams(-1.0, -2.0), [{EOS: -0.5, 1: -1.0, 2: -2.0}, {3: -0.5, 4: -9.0}])
    assert chosen(going_on) == [(0, 1, -2.0), (1, 3, -2.5)]
    [hypothesis] = one.hypotheses
    assert (hypothesis.token_ids, hypothesis.finish_reason) == ([10, EOS], "stop")
    assert (hypothesis.logprob, hypothesis.score) == (-1.5, -0.75)


def test_an_ended_candidate_ranked_beyond_the_width_is_dropped():
    one = search()
    going_on = one.advance(beams(-1.0, -1.5), [{1: -0.1, 2: -0.2, EOS: -0.3}, {1: -9.0}])
    assert chosen(going_on) == [(0, 1, -1.1), (0, 2, -1.2)]
    assert one.hypotheses == []


def test_the_last_step_makes_hypotheses_of_the_best_and_ends_the_search():
    one = search(max_tokens=2)
    assert one.advance(beams(-1.0, -1.5), [{1: -0.1, EOS: -0.2}, {1: -0.1, 2: -0.2}]) == []
    found = [(h.token_ids, h.finish_reason) for h in one.hypotheses]
    assert found == [([10, 1], "length"), ([10, EOS], "stop")]


def test_of_two_equal_candidates_the_earlier_beam_and_token_goes_first():
    going_on = search(3).advance(
        beams(-1.0, -1.0), [{5: -1.0, 4: -1.0, 3: -1.0}, {6: -1.0, 1: -0.5}]
    )
    assert chosen(going_on) == [(1, 1, -1.5), (0, 5, -2.0), (0, 4, -2.0)]


def test_of_two_equal_hypotheses_the_earlier_one_is_kept():
    one = search(1, early_stopping="never")
    one.advance(beams(-1.0), [{EOS: -1.0, 1: -1.0}])
    one.advance(beams(-1.5, num_output_tokens=3), [{EOS: -2.5, 1: -3.0}])
    assert [h.token_ids for h in one.hypotheses] == [[10, EOS]]


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "goes_on"),
    [
        (True, 1.0, False),
        (False, 1.0, False),  # -3 / 2 is no better than the -2.5 / 2 that has ended
        ("never", 1.0, True),  # but -3 / 9 would be
        ("never", 0.0, False),  # without a penalty no length helps
        ("never", -1.0, False),
    ],
)
def test_a_full_list_of_hypotheses_ends_the_search_by_its_rule(
    early_stopping, length_penalty, goes_on
):
    one = search(early_stopping=early_stopping, length_penalty=length_penalty)
    going_on = one.advance(
        beams(-1.0, -2.0), [{EOS: -0.5, 1: -2.0, 2: -3.0}, {EOS: -0.5, 3: -2.0, 4: -9.0}]
    )
    assert len(one.hypotheses) == 2
    assert bool(going_on) is goes_on


def test_beams_that_may_still_improve_continue_after_enough_have_ended():
    one = search(length_penalty=0.0)
    one.advance(beams(-5.0, -6.0), [{EOS: -0.5, 1: -0.6}, {EOS: -0.1, 2: -0.2}])
    assert [h.score for h in one.hypotheses] == [-5.5]
    going_on = one.advance(
        beams(-5.6, -6.2, num_output_tokens=2), [{1: -0.1, EOS: -0.2}, {1: -3.0, 2: -9.0}]
    )
    assert [h.score for h in one.hypotheses] == [-5.5, pytest.approx(-5.8)]
    assert chosen(going_on) == [(0, 1, -5.7), (1, 1, -9.2)]


def test_a_better_hypothesis_replaces_the_worst():
    one = search(2, length_penalty=0.0, early_stopping="never")
    one.advance(beams(-9.0, -9.5), [{EOS: -1.0, 1: -2.0, 2: -3.0}, {EOS: -1.0, 3: -2.0, 4: -3.0}])
    assert [h.score for h in one.hypotheses] == [-10.0, -10.5]
    one.advance(beams(-3.0, -4.0), [{EOS: -1.0, 1: -2.0, 2: -3.0}, {1: -0.5, 2: -0.6, 3: -0.7}])
    assert [h.score for h in one.hypotheses] == [-4.0, -10.0]


def test_continuing_beams_are_ranked_with_the_hypotheses():
    one = search(2, length_penalty=0.0)
    one.advance(beams(-1.0, -2.0), [{EOS: -0.5, 1: -1.0, 2: -2.0}, {3: -0.5, 4: -9.0}])
    ranked = one.ranked(beams(-1.2, -2.5, num_output_tokens=2))
    assert [(h.score, h.finish_reason) for h in ranked] == [(-1.2, None), (-1.5, "stop")]


def test_an_ignored_end_token_continues_the_beam():
    one = search(ignore_eos=True)
    going_on = one.advance(beams(-1.0, -2.0), [{EOS: -0.5, 1: -1.0}, {2: -0.5, 3: -9.0}])
    assert chosen(going_on) == [(0, EOS, -1.5), (0, 1, -2.0)]
    assert one.hypotheses == []
