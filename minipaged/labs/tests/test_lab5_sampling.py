"""Lab 5, task 4: the samples of a prompt, each with its own tokens and its own seed."""

from itertools import count

import pytest

from minipaged.sequence import Sequence, SequenceGroup

essential = pytest.mark.essential


def task(number: int) -> pytest.MarkDecorator:
    return pytest.mark.lab(number=5, task=number)


# ---- task 4: samples -----------------------------------------------------------------------------

PROMPT = [5, 6, 7]


@pytest.fixture
def ask(part):
    """A request for several samples, and how its sequences fork."""
    from minipaged.engine.request import Arrival, ModelTraits
    from minipaged.sampling import SamplingParams
    from minipaged.tokenizer.prompts import TokenizedPrompt

    def ask(n, seed=40, **options):
        seq = Sequence(0, PROMPT)
        seq.mark_computed(3)
        group = SequenceGroup("A", [seq], width=n)
        model = ModelTraits(tokenizer=None, eos_token_ids=(2,), max_model_len=100, vocab_size=100)
        arrival = Arrival(group, TokenizedPrompt(None, list(PROMPT)), model, time=0.0)
        params = SamplingParams(**{"n": n, "max_tokens": 3, **options})
        ids = count(1)

        def fork(parent):
            group.sequences.append(parent.fork(next(ids)))
            return group.sequences[-1]

        return part("sampling_request")(arrival, params, seed), group, fork

    return ask


def drawn(*token_ids):
    from minipaged.sampling.rows import SampledToken

    return [SampledToken(token, -1.0, None) for token in token_ids]


def outputs(request):
    return [sample.token_ids for sample in request.completions()]


@task(4)
def test_each_first_token_is_drawn_from_the_prompt_with_its_own_seed(ask):
    request, group, _ = ask(3)
    rows = request.rows(group.sequences[0])
    assert [row.seed for row in rows] == [40, 41, 42]
    assert {tuple(row.output_token_ids) for row in rows} == {()}
    assert {tuple(row.prompt_token_ids) for row in rows} == {(5, 6, 7)}


@task(4)
def test_later_each_sample_has_one_row_and_keeps_its_seed(ask):
    request, group, fork = ask(3)
    request.advance({0: drawn(11, 12, 13)}, fork)
    rows = [request.rows(seq) for seq in group.sequences]
    assert [len(row) for row in rows] == [1, 1, 1]
    assert [row.seed for [row] in rows] == [40, 41, 42]
    assert [list(row.output_token_ids) for [row] in rows] == [[11], [12], [13]]


@task(4)
def test_a_row_lists_the_tokens_that_end_a_sample(ask):
    for options, ends in (
        ({}, {2}),
        ({"stop_token_ids": [8]}, {2, 8}),
        ({"stop_token_ids": [8], "ignore_eos": True}, {8}),
    ):
        request, group, _ = ask(2, **options)
        for row in request.rows(group.sequences[0]):
            eos = {2} if options.get("ignore_eos") else set()  # a row may list it or not
            assert set(row.end_token_ids) | eos == ends | eos
            assert row.params.n == 2


@task(4)
@essential("sharing must never change the tokens of a sample (rule 4).")
def test_each_sample_gets_exactly_the_token_drawn_for_it(ask):
    request, group, fork = ask(3)
    assert request.advance({0: drawn(11, 12, 13)}, fork) == []
    assert [seq.token_ids for seq in group.sequences] == [[*PROMPT, t] for t in (11, 12, 13)]
    assert outputs(request) == [[11], [12], [13]]


@task(4)
def test_samples_continue_independently(ask):
    request, group, fork = ask(2)
    request.advance({0: drawn(11, 12)}, fork)
    one, other = group.sequences
    request.advance({other.seq_id: drawn(22), one.seq_id: drawn(21)}, fork)
    assert len(group.sequences) == 2
    assert outputs(request) == [[11, 21], [12, 22]]


@task(4)
def test_finished_samples_are_returned_and_the_others_continue(ask):
    request, group, fork = ask(3)
    ended = request.advance({0: drawn(11, 2, 13)}, fork)  # 2 is the end of a sequence
    first, second, third = group.sequences
    assert ended == [second]
    assert not request.is_finished
    assert request.advance({0: drawn(21), third.seq_id: drawn(23)}, fork) == []
    ended = request.advance({0: drawn(31), third.seq_id: drawn(33)}, fork)
    assert set(map(id, ended)) == {id(first), id(third)}  # max_tokens is 3
    assert request.is_finished
    assert outputs(request) == [[11, 21, 31], [2], [13, 23, 33]]


@task(4)
def test_the_first_sample_may_end_with_its_first_token(ask):
    request, group, fork = ask(2)
    ended = request.advance({0: drawn(2, 12)}, fork)
    assert [seq.token_ids for seq in ended] == [[*PROMPT, 2]]
    assert [seq.token_ids for seq in group.sequences] == [[*PROMPT, 2], [*PROMPT, 12]]
    assert outputs(request) == [[2], [12]]
