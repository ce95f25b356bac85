"""SamplingParams and Sampler: against a slow reference, transformers and deliberate faults."""

import inspect
import math
import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minipaged.errors import InvalidOption
from minipaged.sampling import SamplingParams, adjust, draw, sampler
from minipaged.sampling.draw import draw_weights
from minipaged.sampling.not_built import NOT_BUILT
from minipaged.sampling.rows import SampledToken, SamplingRow
from minipaged.sampling.sampler import Sampler, Scores

VOCAB = 40
NEVER = 1e-10  # less likely tokens round to a weight of zero


def row(prompt=(1, 2, 3), output=(), seed=0, ends=(), words=(), **options) -> SamplingRow:
    params = SamplingParams(**options)
    return SamplingRow(params, list(prompt), list(output), seed, ends, words)


def random_logits(num_rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sample_ids(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    return [token.token_id for token in Sampler().sample(logits, rows).read()]


def home_of(stage: str):
    return next(each for each in (sampler, draw, adjust) if hasattr(each, stage))


# -- A reference: one row, one token at a time, in double precision ----------------------


def reference_logits(logits: torch.Tensor, row: SamplingRow) -> list[float]:
    """What a greedy row takes its maximum of."""
    params, result = row.params, []
    for token, logit in enumerate(logits.tolist()):
        logit += (params.logit_bias or {}).get(token, 0.0)
        if len(row.output_token_ids) < params.min_tokens and token in row.end_token_ids:
            logit = -math.inf
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            logit = -math.inf
        so_far = [*row.output_token_ids, token]
        if any(so_far[-len(word) :] == word for word in row.bad_words):
            logit = -math.inf
        for process in params.logits_processors:
            logit = process(row.output_token_ids, torch.tensor([logit])).item()
        count = list(row.output_token_ids).count(token)
        if count or token in row.prompt_token_ids:
            scale = params.repetition_penalty
            logit = logit / scale if logit > 0 else logit * scale
        logit -= params.frequency_penalty * count + (params.presence_penalty if count else 0)
        result.append(logit)
    return result


def reference_probabilities(logits: torch.Tensor, row: SamplingRow) -> np.ndarray:
    params = row.params
    scaled = np.array(reference_logits(logits, row)) / params.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities[probabilities < params.min_p] = 0  # the likeliest is 1 here
    ranking = np.argsort(-probabilities, kind="stable").tolist()
    if params.top_k > 0:
        probabilities[ranking[params.top_k :]] = 0
    probabilities /= probabilities.sum()
    mass = 0.0
    for token in ranking:
        if params.top_p < 1 and mass >= params.top_p:
            probabilities[token] = 0
        else:
            mass += probabilities[token]
    return probabilities / probabilities.sum()


def drawn_from(logits: torch.Tensor, rows: list[SamplingRow]) -> np.ndarray:
    weights = draw.draw_weights(sampler.adjust(logits, rows)[0], rows).double()
    return (weights / weights.sum(-1, keepdim=True)).numpy()


def halve(output_token_ids, logits):
    return logits / 2


def add_the_length(output_token_ids, logits):
    return logits + len(output_token_ids)


OPTIONS = {
    "temperature": [0.0, 0.3, 1.0, 1.7],
    "top_k": [-1, 0, 1, 5, 39, 40, 1000],
    "top_p": [0.001, 0.5, 0.9, 1.0],
    "min_p": [0.0, 0.05, 0.4, 1.0],
    "presence_penalty": [-1.0, 0.0, 0.7],
    "frequency_penalty": [-0.5, 0.0, 1.1],
    "repetition_penalty": [0.8, 1.0, 1.5],
    "logit_bias": [None, {3: 4.5}, {0: -100, 20: 2, 39: 3.25}],
    "allowed_token_ids": [None, [7], range(1, 40, 2)],
    "logits_processors": [None, halve, [halve, add_the_length]],
    "min_tokens": [0, 3, 5],
    "logprobs": [None, -1, 0, 1, 3, 1000],
}


def random_row(rng: random.Random) -> SamplingRow:
    asked = {name: rng.choice(values) for name, values in OPTIONS.items() if rng.random() < 0.4}
    prompt, output = (rng.choices(range(VOCAB), k=rng.randrange(9)) for _ in range(2))
    ends = rng.choice([(), (0,), (4, 17)])
    words = rng.choice([(), [[5]], [[6], [*output[-2:], 9], [3, 8, 8]]])
    asked |= {"bad_words": ["given in token ids"]} if words else {}
    return row(prompt, output, rng.getrandbits(70), ends, words, **asked)


def random_batches(count: int) -> Iterator[tuple[torch.Tensor, list[SamplingRow]]]:
    """The same every time, so a failure comes back; too plain to need hypothesis' shrinking."""
    for seed in range(count):
        rng = random.Random(seed)
        rows = [random_row(rng) for _ in range(rng.randint(1, 6))]
        yield random_logits(len(rows), seed=seed), rows


# -- Checks that a right sampler passes and a faulty one must not (see the mutants below) -----


def check_the_distribution() -> None:
    """Tokens are drawn from the reference's distribution, for batches of all kinds."""
    for logits, rows in random_batches(150):
        for token, one, own in zip(sample_ids(logits, rows), logits, rows, strict=True):
            if own.params.is_greedy:
                assert token == int(np.argmax(reference_logits(one, own)))
        chance = [i for i, own in enumerate(rows) if not own.params.is_greedy]
        if chance:
            found = drawn_from(logits[chance], [rows[i] for i in chance])
            for mine, i in zip(found, chance, strict=True):
                expected = reference_probabilities(logits[i], rows[i])
                assert np.array_equal(mine > NEVER, expected > NEVER)
                assert np.allclose(mine, expected, atol=1e-5)


def check_company() -> None:
    """A row gets the same token and the same logprobs, to the bit, alone and in any batch."""
    for logits, rows in random_batches(60):
        alone = [Sampler().sample(logits[i : i + 1], [own]).read()[0] for i, own in enumerate(rows)]
        assert Sampler().sample(logits, rows).read() == alone
        backwards = Sampler().sample(logits.flip(0), rows[::-1]).read()
        assert backwards == alone[::-1]


def check_frequencies() -> None:
    """Over many seeds, and over many places of one seed, tokens come as often as they should."""
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05, 0.0])
    logits = torch.tensor(probabilities).log().float().expand(4000, 6)
    for rows in (
        [row(seed=seed) for seed in range(4000)],
        [row(seed=7, output=[0] * place) for place in range(4000)],
    ):
        counts = Counter(sample_ids(logits, rows))
        assert counts[5] == 0
        expected = probabilities[:5] * 4000
        found = np.array([counts[token] for token in range(5)])
        assert ((found - expected) ** 2 / expected).sum() < 18.5  # chi square, 4 degrees: 0.1 %


def check_the_ends_of_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest random number still draw a token that can be drawn."""
    logits = torch.tensor([[-math.inf, -math.inf, 0.3, 0.1, -60.0, -math.inf]])
    for number, token in ((0.0, 2), (1 - 2.0**-53, 3)):
        with monkeypatch.context() as patch:
            patch.setattr(draw, "uniform", lambda seed, position, number=number: number)
            assert sample_ids(logits, [row()]) == [token]


def test_the_distribution_is_that_of_a_slow_checker():
    check_the_distribution()


def test_a_row_gets_the_same_token_whatever_else_is_in_the_batch():
    check_company()


def test_tokens_come_as_often_as_their_probability_says():
    check_frequencies()


def test_a_token_of_zero_probability_is_never_drawn(monkeypatch):
    check_the_ends_of_the_draw(monkeypatch)


def sorted_top_p(weights, top_p):
    """The definition of top_p, with the whole vocabulary sorted."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    ends = ordered.cumsum(-1)
    kept = ends - ordered < top_p * ends[:, -1:]
    return torch.zeros_like(weights).scatter(-1, order, ordered * kept)


def check_top_p_against_sorting():
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        rows, vocab, bits, kinds, top_k = (
            int(torch.randint(1, most, (), generator=generator)) for most in (4, 12, 38, 6, 12)
        )
        weights = torch.randint(0, kinds, (rows, vocab), generator=generator) << bits  # with ties
        top_p = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
        expected = sorted_top_p(weights, top_p)
        assert torch.equal(draw.keep_top_p(weights, top_p, None), expected)
        cut = weights * (weights >= weights.topk(min(top_k, vocab)).values[:, -1:])
        found = draw.keep_top_p(cut, top_p, top_k)
        assert torch.equal(found, sorted_top_p(cut, top_p))


def test_top_p_keeps_what_sorting_the_vocabulary_keeps():
    check_top_p_against_sorting()


@pytest.mark.parametrize("spread", [0.1, 8.0])
def test_top_p_of_a_large_vocabulary_keeps_few_or_most_tokens(spread):
    logits = spread * torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    weights = ((logits - logits.amax(-1, keepdim=True)).exp() * 2**40).long()
    top_p = torch.tensor([[0.1], [0.9], [0.999]], dtype=torch.float64)
    kept = draw.keep_top_p(weights, top_p)
    assert torch.equal(kept, sorted_top_p(weights, top_p))
    assert bool(((kept > 0).sum(-1) > 1024).any()) == (spread == 0.1)


# -- Deliberate faults ------------------------------------------------------------------------

right = {name: getattr(sampler, name) for name in ("adjust", "draw")}
right |= {name: getattr(draw, name) for name in ("keep_top_k", "uniform")}
right |= {name: getattr(adjust, name) for name in ("bad_word_ends", "penalise")}


def top_p_that_may_drop_the_likeliest(weights, top_p, _):
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    kept = ordered.cumsum(-1) < top_p * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(weights).scatter(-1, order, ordered * kept)


def top_p_that_keeps_all_equals(weights, top_p, _):
    kept = sorted_top_p(weights, top_p)
    least = kept.where(kept > 0, torch.iinfo(torch.int64).max).amin(-1, keepdim=True)
    return weights.where(weights >= least, 0)


def top_k_of_the_greediest_neighbour(logits, top_k):
    return right["keep_top_k"](logits, [max(top_k)] * len(top_k))


def min_p_of_all_rows_together(logits, min_p):
    return logits.masked_fill(logits < logits.max() + min_p.log(), -torch.inf)


def penalties_that_count_the_prompt(logits, rows):
    joined = [[*r.prompt_token_ids, *r.output_token_ids] for r in rows]
    rows = [r._replace(output_token_ids=ids) for r, ids in zip(rows, joined, strict=True)]
    return right["penalise"](logits, rows)


def penalties_that_forget_the_prompt(logits, rows):
    return right["penalise"](logits, [r._replace(prompt_token_ids=[]) for r in rows])


def a_draw_that_mixes_in_the_row_number(logits, rows):
    rows = [r._replace(seed=r.seed + i) for i, r in enumerate(rows)]
    return right["draw"](logits, rows)


def a_number_that_forgets_the_place(seed, position):
    return right["uniform"](seed, 0)


def a_number_that_leans(seed, position):
    return right["uniform"](seed, position) ** 1.2


def adjustments_that_forget_the_end(logits, rows):
    return right["adjust"](logits, [r._replace(end_token_ids=()) for r in rows])


def bad_words_that_end_anywhere(row):
    return [last for *_, last in row.bad_words]


def bad_words_of_one_token_only(row):
    return right["bad_word_ends"](row._replace(bad_words=[w for w in row.bad_words if w[1:] == []]))


right_searchsorted = torch.searchsorted
MUTANTS = [
    ("keep_top_p", top_p_that_may_drop_the_likeliest, check_the_distribution),
    ("keep_top_p", top_p_that_keeps_all_equals, check_top_p_against_sorting),
    ("keep_top_k", top_k_of_the_greediest_neighbour, check_the_distribution),
    ("keep_top_k", top_k_of_the_greediest_neighbour, check_company),
    ("keep_min_p", min_p_of_all_rows_together, check_company),
    ("penalise", penalties_that_count_the_prompt, check_the_distribution),
    ("penalise", penalties_that_forget_the_prompt, check_the_distribution),
    ("adjust", adjustments_that_forget_the_end, check_the_distribution),
    ("bad_word_ends", bad_words_that_end_anywhere, check_the_distribution),
    ("bad_word_ends", bad_words_of_one_token_only, check_the_distribution),
    ("draw", a_draw_that_mixes_in_the_row_number, check_company),
    ("uniform", a_number_that_forgets_the_place, check_frequencies),
    ("uniform", a_number_that_leans, check_frequencies),
]


@pytest.mark.parametrize(
    ("name", "mutant", "check"), MUTANTS, ids=[f"{m.__name__}-{c.__name__}" for _, m, c in MUTANTS]
)
def test_a_faulty_stage_is_detected(monkeypatch, name, mutant, check):
    monkeypatch.setattr(home_of(name), name, mutant)
    with pytest.raises(AssertionError):
        check()


def test_a_draw_that_stops_one_token_early_is_detected(monkeypatch):
    def left(ends, target, *, right):
        return right_searchsorted(ends, target, right=False)

    monkeypatch.setattr(torch, "searchsorted", left)
    with pytest.raises(AssertionError):
        check_the_ends_of_the_draw(monkeypatch)


# -- compared with transformers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "processors"),
    [
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"repetition_penalty": 1.3}, [RepetitionPenaltyLogitsProcessor(1.3)]),
        (
            {
                "repetition_penalty": 0.9,
                "temperature": 1.4,
                "min_p": 0.02,
                "top_k": 20,
                "top_p": 0.7,
            },
            [
                RepetitionPenaltyLogitsProcessor(0.9),
                TemperatureLogitsWarper(1.4),
                MinPLogitsWarper(0.02),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.7),
            ],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_distribution_is_that_of_transformers(asked, processors):
    prompt, output = [3, 1, 4], [1, 5, 9]
    logits = random_logits(30, vocab=500)
    scores = LogitsProcessorList(processors)(torch.tensor([prompt + output] * 30), logits.clone())
    expected = scores.softmax(-1).numpy()
    found = drawn_from(logits, [row(prompt, output, **asked)] * 30)
    assert np.array_equal(found > NEVER, expected > NEVER)
    assert np.allclose(found, expected, atol=1e-6)


# -- Single properties --------------------------------------------------------------------------


def test_temperature_zero_takes_the_likeliest_and_on_ties_the_lowest_id():
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0]])
    assert sample_ids(logits, [row(temperature=0)] * 2) == [1, 0]
    assert sample_ids(logits, [row(temperature=1e-30)] * 2) == [1, 0]


def test_a_greedy_batch_skips_all_other_stages(monkeypatch):
    for stage in ("draw", "adjust"):
        monkeypatch.setattr(
            home_of(stage), stage, lambda *_: pytest.fail("a stage that no row asks for")
        )
    logits = random_logits(3)
    assert sample_ids(logits, [row(temperature=0)] * 3) == logits.argmax(-1).tolist()


def test_all_results_of_a_step_come_to_the_host_at_once(monkeypatch):
    # Each of these makes the host wait for a GPU. (test_gpu.py counts the waits themselves.)
    fetched: list[str] = []

    def watch(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def counted(self, *args, **options):
            fetched.append(name)
            return original(self, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)

    rng = random.Random(5)
    rows = [*(random_row(rng) for _ in range(8)), row(temperature=0.0, logprobs=3), row(logprobs=0)]
    logits = random_logits(len(rows))
    for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"):
        watch(name)
    Sampler().sample(logits, rows).read()
    assert fetched == ["numpy", "tolist"]  # NumPy takes the argmax of logits that are on the host


def test_token_ids_beyond_2_to_the_24_are_distinct():
    logits = torch.zeros(1, 2**24 + 4, dtype=torch.float16)  # float32 counts to 2^24
    logits[0, -1] = 1
    [token] = Sampler().sample(logits, [row(temperature=0.0, logprobs=1)]).read()
    assert token.token_id == 2**24 + 3
    assert list(token.top_logprobs) == [2**24 + 3]


def test_the_same_seed_and_position_give_the_same_token_after_preemption():
    logits = random_logits(1)
    before = row(output=[5, 6], seed=-3)
    readmitted = row(prompt=[9] * 50, output=[7, 8], seed=-3)  # all that counts is the place
    assert sample_ids(logits, [before]) == sample_ids(logits, [readmitted])


def test_neighbouring_seeds_share_no_random_numbers():
    numbers = {draw.uniform(seed, place) for seed in range(-5, 45) for place in range(100)}
    assert len(numbers) == 50 * 100
    assert all(0 <= number < 1 for number in numbers)


def test_an_end_token_is_forbidden_for_exactly_min_tokens():
    logits = torch.tensor([[0.0, 9.0, 1.0, 8.0]] * 3)
    rows = [row(output=[0] * n, ends=(1, 3), temperature=0, min_tokens=2) for n in (0, 1, 2)]
    assert sample_ids(logits, rows) == [2, 2, 1]


def test_top_k_keeps_ties_and_top_p_keeps_the_lower_id_of_a_tie():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert (drawn_from(logits, [row(top_k=2)]) > 0).tolist() == [[True, True, True, False]]
    logits = torch.zeros(1, 4)
    assert (drawn_from(logits, [row(top_p=0.5)]) > 0).tolist() == [[True, True, False, False]]


def test_the_sampler_does_not_modify_the_logits_of_the_caller():
    logits = random_logits(2)
    before = logits.clone()
    busy = row(output=[1], ends=(2,), min_tokens=3, logit_bias={4: 9}, repetition_penalty=2)
    Sampler().sample(logits, [busy, row(temperature=0.1, top_k=3, top_p=0.5, min_p=0.1)]).read()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_sampled_in_single_precision(dtype):
    logits = random_logits(4).to(dtype)
    rows = [row(seed=i, top_p=0.9, logprobs=2) for i in range(4)]
    assert Sampler().sample(logits, rows).read() == Sampler().sample(logits.float(), rows).read()


def test_no_rows_give_no_tokens():
    assert Sampler().sample(random_logits(0), []).read() == []


def test_broken_logits_of_one_row_leave_the_others_alone():
    logits = random_logits(3)
    rows = [row(seed=i, top_k=5, top_p=0.9, min_p=0.01) for i in range(3)]
    expected = Sampler().sample(logits, rows).read()
    for broken in (math.nan, -math.inf, math.inf):
        logits[1] = broken
        found = Sampler().sample(logits, rows).read()
        assert (found[0], found[2]) == (expected[0], expected[2])
        assert found[1].error is not None


@pytest.mark.parametrize("asked", [{"temperature": 0}, {}, {"logit_bias": {3: 1.0}}, {"top_k": 2}])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ({4: math.nan}, f"1 of {VOCAB} logits are NaN"),
        ({4: math.nan, 5: math.inf, 6: math.nan}, f"2 of {VOCAB} logits are NaN"),
        ({4: math.inf}, f"1 of {VOCAB} logits are +inf"),
        (dict.fromkeys(range(VOCAB), -math.inf), f"{VOCAB} of {VOCAB} logits are -inf"),
    ],
)
def test_one_broken_logit_is_enough_to_break_a_row(asked, spoil, says):
    logits = random_logits(1)
    for token_id, value in spoil.items():
        logits[0, token_id] = value
    [token] = Sampler().sample(logits, [row(**asked)]).read()
    assert token.error.startswith(says)
    assert 'Try dtype="float32"' in token.error


@pytest.mark.parametrize("asked", [{"temperature": 0}, {}, {"logit_bias": {3: 1.0}}, {"top_k": 2}])
def test_a_model_may_forbid_tokens_itself(asked):
    logits = random_logits(1)
    logits[0, 1:] = -math.inf
    [token] = Sampler().sample(logits, [row(**asked)]).read()
    assert (token.token_id, token.error) == (0, None)


@pytest.mark.parametrize("temperature", [0, 1])
def test_options_that_leave_no_token_are_an_error_of_their_own(temperature):
    rows = [
        row(temperature=temperature),
        row(temperature=temperature, ends=range(VOCAB), min_tokens=1),
    ]
    healthy, broken = Sampler().sample(random_logits(2), rows).read()
    assert healthy.error is None
    assert "leave no token to choose" in broken.error
    assert "the largest logit after them is -inf" in broken.error


# -- Logprobs ---------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model_whatever_the_options_do():
    logits = random_logits(1)
    [token] = (
        Sampler().sample(logits, [row(logit_bias={7: 100}, temperature=0.2, logprobs=3)]).read()
    )
    expected = logits[0].log_softmax(-1)
    likeliest = expected.argsort(descending=True).tolist()[:3]
    assert token.token_id == 7
    assert 7 not in likeliest
    assert token.logprob == pytest.approx(expected[7].item())
    assert list(token.top_logprobs) == [*likeliest, 7]
    assert token.top_logprobs == pytest.approx({i: expected[i].item() for i in [*likeliest, 7]})


def test_a_sampled_token_among_the_likeliest_is_not_listed_twice():
    logits = random_logits(1)
    [token] = Sampler().sample(logits, [row(temperature=0, logprobs=2)]).read()
    assert len(token.top_logprobs) == 2
    assert next(iter(token.top_logprobs.items())) == (token.token_id, token.logprob)


def test_each_row_lists_as_many_logprobs_as_it_asked_for():
    rows = [row(temperature=0, logprobs=n) for n in (None, 0, 5, 1000)]
    tops = [token.top_logprobs for token in Sampler().sample(random_logits(4), rows).read()]
    assert tops[0] is None
    assert [len(top) for top in tops[1:]] == [1, 5, VOCAB]
    for top in tops[1:]:
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_rows_scored_a_few_at_a_time_get_the_same_scores(monkeypatch):
    logits = random_logits(7)
    logits[5] = math.nan
    ends = {"ends": range(VOCAB), "min_tokens": 1}  # leaves no token to choose
    for asked in ({}, {"logprobs": 3}):
        rows = [row(seed=i, **asked, **(ends if i == 3 else {})) for i in range(7)]
        expected = repr(Sampler().sample(logits, rows).read())  # NaN differs from itself
        monkeypatch.setattr(sampler, "SCORED_AT_ONCE", {"cpu": 2 * VOCAB + 1})
        assert repr(Sampler().sample(logits, rows).read()) == expected
        monkeypatch.undo()


def test_logprobs_need_no_second_matrix_of_logits(monkeypatch):
    monkeypatch.setattr(sampler, "SCORED_AT_ONCE", {"cpu": 3 * 400})
    logits, largest = random_logits(20, 400), 0

    class Largest(TorchDispatchMode):
        """Notes the number of elements of the largest new tensor."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for new in tree_leaves(result):
                if isinstance(new, torch.Tensor) and not function.is_view:
                    largest = max(largest, new.numel())
            return result

    with Largest():
        Scores(logits, logits.argmax(-1).tolist(), [2] * 20).read()
    assert largest == 3 * 400


def test_prompt_logprobs_score_the_token_that_came_next():
    logits = random_logits(3)
    expected = logits.log_softmax(-1)
    found = Scores(logits, [8, 0, 5], [2, 2, None]).read()
    assert [token.token_id for token in found] == [8, 0, 5]
    for i, token in enumerate(found):
        assert token.logprob == pytest.approx(expected[i, token.token_id].item())
    assert [token.top_logprobs is None for token in found] == [False, False, True]
    assert all(token.token_id in token.top_logprobs for token in found[:2])
    assert found[2] == SampledToken(5, found[2].logprob, None)


# -- SamplingParams ---------------------------------------------------------------------------


def make(**asked: Any) -> SamplingParams:
    return SamplingParams(**asked)


WHOLE_FROM_0 = "choose a whole number from 0 up"
WHOLE_FROM_1 = "choose a whole number from 1 up"
BAD = [
    ({"n": 0}, f"n is 0: {WHOLE_FROM_1}."),
    ({"n": 1.5}, f"n is 1.5: {WHOLE_FROM_1}."),
    ({"n": None}, f"n is None: {WHOLE_FROM_1}."),
    ({"n": True}, f"n is True: {WHOLE_FROM_1}."),
    ({"best_of": 0}, "best_of is 0: choose a whole number from n up or None."),
    (
        {"n": 3, "best_of": 2},
        "best_of is 2, but n=3 outputs are to be returned: raise best_of to at least 3 or lower n.",
    ),
    (
        {"n": 2, "temperature": 0},
        (
            "n is 2 with temperature 0, which would give one and the same output 2 times: raise "
            "temperature or set n to 1."
        ),
    ),
    (
        {"best_of": 2, "temperature": 0},
        (
            "best_of is 2 with temperature 0, which would give one and the same output 2 times: "
            "raise temperature or set best_of to 1."
        ),
    ),
    (
        {"temperature": -0.5},
        "temperature is -0.5: choose a number from 0 (greedy) to 1000000.",
    ),
    (
        {"temperature": math.inf},
        "temperature is inf: choose a number from 0 (greedy) to 1000000.",
    ),
    (
        {"temperature": math.nan},
        "temperature is nan: choose a number from 0 (greedy) to 1000000.",
    ),
    (
        {"temperature": "hot"},
        "temperature is 'hot': choose a number from 0 (greedy) to 1000000.",
    ),
    ({"top_k": -2}, "top_k is -2: choose a whole number from 1 up, or 0 for all tokens."),
    ({"top_p": 0}, "top_p is 0: choose a number above 0 and up to 1 (1 for all tokens)."),
    ({"top_p": 1.1}, "top_p is 1.1: choose a number above 0 and up to 1 (1 for all tokens)."),
    ({"min_p": -0.1}, "min_p is -0.1: choose a number from 0 (for all tokens) to 1."),
    ({"min_p": 2}, "min_p is 2: choose a number from 0 (for all tokens) to 1."),
    ({"presence_penalty": 3}, "presence_penalty is 3: choose a number from -2 to 2."),
    ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5: choose a number from -2 to 2."),
    (
        {"repetition_penalty": 0},
        "repetition_penalty is 0: choose a number from 0.01 to 100 (1 for no penalty).",
    ),
    ({"logit_bias": [5]}, "logit_bias is [5]: choose a dict from token id to bias."),
    ({"logit_bias": {-1: 2.0}}, "logit_bias names token -1: choose ids from 0 up."),
    (
        {"logit_bias": {5: 101}},
        (
            "logit_bias of token 5 is 101: choose a number from -100 (as good as never) to 100 "
            "(as good as always)."
        ),
    ),
    ({"seed": 0.5}, "seed is 0.5: choose a whole number or None."),
    ({"stop": ""}, "stop contains '': choose strings of one character or more."),
    ({"stop": ["a", 5]}, "stop contains 5: choose strings of one character or more."),
    ({"stop": 5}, "stop contains 5: choose strings of one character or more."),
    ({"stop_token_ids": [3, -1]}, "stop_token_ids contains -1: choose ids from 0 up."),
    ({"stop_token_ids": 0.5}, "stop_token_ids contains 0.5: choose ids from 0 up."),
    ({"ignore_eos": "no"}, "ignore_eos is 'no': choose True or False."),
    ({"min_tokens": -1}, f"min_tokens is -1: {WHOLE_FROM_0}."),
    ({"max_tokens": 0}, f"max_tokens is 0: {WHOLE_FROM_1} or None."),
    (
        {"min_tokens": 17},
        (
            "min_tokens is 17, but max_tokens ends the output after 16: raise max_tokens or lower "
            "min_tokens."
        ),
    ),
    ({"logprobs": -2}, f"logprobs is -2: {WHOLE_FROM_0}, -1 for the whole vocabulary or None."),
    (
        {"prompt_logprobs": 2.0},
        f"prompt_logprobs is 2.0: {WHOLE_FROM_0}, -1 for the whole vocabulary or None.",
    ),
    ({"bad_words": [""]}, "bad_words contains '': choose strings of one character or more."),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids contains -1: choose ids from 0 up."),
    (
        {"allowed_token_ids": []},
        ("allowed_token_ids is empty, so no token could be chosen: give some, or None for all."),
    ),
    (
        {"logits_processors": ["twice"]},
        (
            "logits_processors contains 'twice': give functions of the output tokens and a row of "
            "logits."
        ),
    ),
    (
        {"truncate_prompt_tokens": 0},
        "truncate_prompt_tokens is 0: choose a whole number from 1 up, or -1 or None.",
    ),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output is 1: choose True or False."),
    (
        {"detokenize": False, "stop": "a"},
        (
            "stop strings are found in the text, but detokenize=False produces none: leave out "
            "detokenize, or use stop_token_ids."
        ),
    ),
    ({"skip_special_tokens": 0}, "skip_special_tokens is 0: choose True or False."),
    (
        {"spaces_between_special_tokens": None},
        "spaces_between_special_tokens is None: choose True or False.",
    ),
    ({"output_kind": 1}, "output_kind is 1: give a RequestOutputKind."),
]


@pytest.mark.parametrize(("asked", "sentence"), BAD, ids=[str(asked) for asked, _ in BAD])
def test_an_invalid_value_is_refused_with_a_sentence(asked, sentence):
    with pytest.raises(InvalidOption) as refusal:
        make(**asked)
    assert str(refusal.value) == sentence


def test_every_option_has_a_value_that_is_refused():
    refused = {name for asked, _ in BAD for name in asked}
    assert refused == set(inspect.signature(SamplingParams).parameters)


def test_a_misspelt_option_is_an_error():
    with pytest.raises(InvalidOption, match="no option 'temprature': did you mean 'temperature'"):
        make(temprature=0.5)


def test_params_that_ask_for_the_same_are_equal():
    one = SamplingParams(stop="a", stop_token_ids=[1, 2], logit_bias={3: 1}, temperature=1)
    other = SamplingParams(stop=["a"], stop_token_ids=(1, 2), logit_bias={3: 1.0})
    assert one == other
    assert (one.stop_strings, one.stop_ids) == (("a",), (1, 2))


def test_a_copy_of_changed_params_is_checked_again():
    params = SamplingParams()
    params.temperature, params.repetition_penalty = 0.0, 1.5
    params.stop.append("end")
    copy = params.clone()
    assert copy == params
    assert copy.adjusts_logits
    assert copy.stop_automaton
    params.stop.append("later")
    assert copy.stop_strings == ("end",)
    params.n = 2
    with pytest.raises(InvalidOption, match="n is 2 with temperature 0"):
        params.clone()


def test_none_means_the_default():
    optional = SamplingParams.from_optional(n=None, temperature=None, max_tokens=None, top_p=0.5)
    assert optional == SamplingParams(max_tokens=None, top_p=0.5)
    bias = {"5": 1000, 6: -200.0, "7": 1}
    assert SamplingParams.from_optional(logit_bias=bias).logit_bias == {5: 100, 6: -100, 7: 1}
    assert SamplingParams(logit_bias={"5": 1}, seed=-1) == SamplingParams(logit_bias={5: 1.0})


@pytest.mark.parametrize("name", NOT_BUILT)
def test_an_unsupported_option_is_refused_by_name(name):
    with pytest.raises(
        InvalidOption, match=rf"^{name} is .+, but .+: leave it out.*\.$"
    ) as refusal:
        make(**{name: np.array([1, 2])})
    assert refusal.value.param == name
    _, harmless = NOT_BUILT[name]
    assert make(**{name: None}) == make(**{name: harmless}) == make()


def test_params_do_not_follow_a_dict_or_list_that_changes_later():
    stop, bias = ["a"], {1: 1.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[2] = 2.0
    assert (params.stop_strings, params.logit_bias) == (("a",), {1: 1.0})


def test_numpy_numbers_become_python_numbers():
    params = make(top_k=np.int64(3), temperature=np.float32(0.5), stop_token_ids=np.array([4]))
    values = (params.top_k, params.temperature, params.stop_ids[0])
    assert values == (3, 0.5, 4)
    assert [type(value) for value in values] == [int, float, int]


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_more_logprobs_than_the_engine_reports_are_refused(name):
    params = SamplingParams(**{name: 21})
    params.check_model(10, max_logprobs=21)
    params.check_model(10, max_logprobs=-1)
    SamplingParams(**{name: 0}).check_model(10, max_logprobs=0)
    sentence = rf"{name} is 21, but this engine reports at most 20 \(max_logprobs\)"
    with pytest.raises(InvalidOption, match=sentence) as refusal:
        params.check_model(10, max_logprobs=20)
    assert refusal.value.param == name


def test_stop_strings_of_too_many_characters_are_refused():
    SamplingParams(stop=["ab" * 1_000])
    with pytest.raises(InvalidOption, match="2 strings of stop have 300001 characters in all"):
        SamplingParams(stop=["a" * 300_000, "b"])


EXTREMES = [
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 100},
    {"presence_penalty": 2, "frequency_penalty": -2},
    {"temperature": 1e-320},
    {"temperature": 1e-5},
    {"temperature": 1e6},
    {"top_p": 5e-324},
    {"top_p": 1 - 1e-16},
    {"min_p": 5e-324},
    {"min_p": 1},
    {"top_k": 2**63 - 1},
    {"logit_bias": {3: 100, 4: -100, 5: 5e-324}},
    {"temperature": 1e-5, "repetition_penalty": 0.01, "logit_bias": {1: -100}, "top_p": 1e-38},
]


@pytest.mark.parametrize("scale", [0.01, 1.0, 6e4])
@pytest.mark.parametrize("asked", EXTREMES, ids=str)
def test_extreme_values_give_no_nan_and_no_wrong_token(asked, scale):
    logits = scale * torch.linspace(-1, 1, 9)[torch.randperm(9, generator=seeded(1))][None]
    given = SamplingParams(**{"temperature": 1.0, **asked, "min_tokens": 1})
    row = SamplingRow(given, [0, 1, 2], [2, 2, 3], seed=3)
    adjusted, _ = adjust.adjust(logits, [row])
    assert adjusted.isfinite().all()
    slow = logits[0].double()
    for token_id, bias in (given.logit_bias or {}).items():
        slow[token_id] += bias
    for token_id in (0, 1, 2, 3):
        penalty = given.repetition_penalty
        slow[token_id] *= 1 / penalty if slow[token_id] > 0 else penalty
    for token_id, times in ((2, 2), (3, 1)):
        slow[token_id] -= times * given.frequency_penalty + given.presence_penalty
    assert torch.allclose(adjusted[0].double(), slow, rtol=1e-5, atol=1e-6)
    [sampled] = Sampler().sample(logits, [row]).read()
    if given.is_greedy:
        assert sampled.token_id == slow.argmax()
        return
    weights = draw_weights(adjusted, [row])[0]
    assert weights.min() >= 0
    assert weights.max() == weights[slow.argmax()] > 0
    assert weights[sampled.token_id] > 0


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": value}
        for value in (1e-38, 1e-45, 5e-324, 1e38, 1e308, math.inf, math.nan)
    ]
    + [{"temperature": value} for value in (1e38, 1e308, 10**400, Fraction(10**400))],
    ids=str,
)
def test_a_number_that_would_leave_float32_is_refused(asked):
    [name] = asked
    with pytest.raises(InvalidOption, match=rf"^{name} is .*: choose a number from ") as refusal:
        make(**asked)
    assert refusal.value.param == name


def test_a_token_beyond_the_vocabulary_is_refused_before_it_can_break_a_step():
    last = {"logit_bias": {9: 1}, "stop_token_ids": [9], "allowed_token_ids": [9]}
    SamplingParams(**last).check_model(10, max_logprobs=20)
    for asked in ({"logit_bias": {10: 1}}, {"stop_token_ids": [10]}, {"allowed_token_ids": [10]}):
        [name] = asked
        sentence = (
            f"{name} names token 10, but the vocabulary has 10 tokens: choose ids from 0 to 9"
        )
        with pytest.raises(InvalidOption, match=sentence):
            SamplingParams(**asked).check_model(10, max_logprobs=20)
