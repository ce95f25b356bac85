"""Shared blocks end to end: samples of one prompt, cached and pinned prefixes, mixed decoding."""

import random
from itertools import product

import pytest
import torch
from checkpoints import make_checkpoint
from engine_runs import GREEDY, assert_all_blocks_are_back, run, set_eos, tokens
from step_watching import (
    all_tokens,
    assert_only_the_living_hold_blocks,
    num_computed,
    prompt,
    small,
    step_to_the_end,
    watch,
)

from minipaged import LLM, BeamSearchParams, Parts, SamplingParams
from minipaged.attention.backend import BACKENDS
from minipaged.errors import InvalidRequest, PromptTooLong
from minipaged.evaluation.bench.sharing import SharingMeter
from minipaged.sequence import SequenceGroup, SequenceStatus
from minipaged.tracing.events import EventLog


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def storyteller() -> LLM:
    return LLM("storyteller", parts=Parts().checked(), num_blocks=100)


def sampled(max_tokens: int = 12, **options) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "ignore_eos": True, "seed": 5, **options})


# ---- several samples of one prompt ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"min_tokens": 5, "stop_token_ids": list(range(3, 40))},
        {"logprobs": 2, "min_p": 0.05, "logit_bias": {7: 3.0}},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_n_samples_of_one_prompt_are_those_of_n_requests_with_seeds_in_a_row(folder, options):
    prompts = [prompt(length, first=length) for length in (3, 16, 21)]
    together = run(small(folder), prompts, sampled(n=4, **options))
    alone = run(
        small(folder),
        [one for one in prompts for _ in range(4)],
        [sampled(**options | {"seed": 5 + i}) for _ in prompts for i in range(4)],
    )
    samples = [sample for output in together for sample in output.outputs]
    assert [sample.index for sample in samples] == [0, 1, 2, 3] * 3
    for sample, output in zip(samples, alone, strict=True):
        [single] = output.outputs
        assert sample.token_ids == single.token_ids
        assert (sample.finish_reason, sample.stop_reason) == (
            single.finish_reason,
            single.stop_reason,
        )
        assert sample.cumulative_logprob == pytest.approx(single.cumulative_logprob, abs=1e-3)
        assert (sample.logprobs is None) == (single.logprobs is None)
    assert len({tuple(sample.token_ids) for sample in samples}) == len(samples)


def test_each_sample_ends_at_its_own_stop_string_and_has_its_own_text(storyteller):
    params = sampled(max_tokens=30, stop=["the", "."])
    [together] = run(storyteller, ["Once upon a time"], [sampled(30, n=4, stop=["the", "."])])
    alone = run(
        storyteller,
        ["Once upon a time"] * 4,
        [sampled(30, stop=params.stop, seed=5 + i) for i in range(4)],
    )
    for sample, output in zip(together.outputs, alone, strict=True):
        [single] = output.outputs
        assert (sample.text, sample.stop_reason) == (single.text, single.stop_reason)
    assert len({sample.text for sample in together.outputs}) > 1
    assert "stop" in {sample.finish_reason for sample in together.outputs}


def test_best_of_returns_the_likeliest_samples_best_first(folder):
    prompts = [prompt(5), prompt(18, first=3)]
    all_five = run(small(folder), prompts, sampled(n=5))
    best_two = run(small(folder), prompts, sampled(n=2, best_of=5))
    in_order = []
    for five, two in zip(all_five, best_two, strict=True):
        ranked = sorted(five.outputs, key=lambda sample: -sample.cumulative_logprob)
        assert [s.token_ids for s in two.outputs] == [s.token_ids for s in ranked[:2]]
        assert [s.index for s in two.outputs] == [0, 1]
        in_order.append([s.index for s in ranked[:2]])
    assert in_order != [[0, 1], [0, 1]]


def test_best_of_shows_nothing_before_the_end_and_n_samples_show_every_token(folder):
    shown = [output for _, output in small(folder).stream([prompt(5)], sampled(4, n=2, best_of=3))]
    assert [output.finished for output in shown] == [True]
    shown = [output for _, output in small(folder).stream([prompt(5)], sampled(4, n=3))]
    assert [[len(s.token_ids) for s in o.outputs] for o in shown] == [[i] * 3 for i in (1, 2, 3, 4)]


def test_one_sample_shares_nothing_and_is_not_counted(folder):
    llm = small(folder)
    with SharingMeter(llm.engine) as meter:
        [output] = run(llm, [prompt(9)], sampled())
    assert (meter.num_held, meter.num_unshared, meter.saved()) == ({}, {}, 0.0)
    [best_of_one] = run(small(folder), [prompt(9)], sampled(best_of=1))
    assert tokens([best_of_one]) == tokens([output])


def test_a_sample_that_ends_returns_its_blocks_at_once(folder):
    llm = small(folder)
    set_eos(llm, *range(3, 20))
    llm.engine.add_request("a", prompt(10), sampled(40, n=5, ignore_eos=False, seed=0))
    group = llm.engine.scheduler.waiting[0]
    living = []
    for _ in step_to_the_end(llm):
        assert_only_the_living_hold_blocks(llm, [group])
        living.append(len(group.sequences))
    assert living == sorted(living, reverse=True)
    assert len(set(living)) >= 4
    assert_all_blocks_are_back(llm)


@pytest.mark.parametrize("max_num_batched_tokens", [64, 8])
def test_the_prompt_of_several_samples_is_computed_once(folder, max_num_batched_tokens):
    llm = small(folder, max_num_seqs=8, max_num_batched_tokens=max_num_batched_tokens)
    steps = watch(llm)
    run(llm, [prompt(21)], sampled(7, n=4))
    assert num_computed(steps) == 21 + 4 * 6


def test_samples_outgrow_the_pool_together_and_keep_what_they_have(folder):
    llm = small(folder, num_blocks=8, watermark=0.0)
    [output] = run(llm, [prompt(9)], sampled(40, n=3))
    # 2 shared blocks and 2 of each sample: 16 tokens of each, and one more is sampled from them
    assert [len(s.token_ids) for s in output.outputs] == [16 + 1 - 9] * 3
    assert {s.finish_reason for s in output.outputs} == {"length"}
    [ample] = run(small(folder), [prompt(9)], sampled(8, n=3))
    assert all_tokens([output]) == all_tokens([ample])


def test_a_group_takes_its_batch_slots_before_it_forks(folder):
    llm = small(folder, max_num_seqs=4, max_num_batched_tokens=64)
    steps = watch(llm)
    run(llm, [prompt(5), prompt(6, first=1), prompt(7, first=2)], sampled(6, n=2))
    assert max(sum(map(len, step.tables.values())) for step in steps) == 4


# ---- how many blocks sharing saves ---------------------------------------------------------------


def blocks_by_formula(p: int, g: int, n: int, size: int) -> tuple[int, int]:
    """The blocks of n samples with p prompt and g generated tokens: those held, and unshared."""
    if g == 0:
        return -(-p // size), -(-p // size)  # the prompt's own step: one sequence
    unshared = n * -(-(p + g) // size)
    return unshared - (n - 1) * (p // size), unshared


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("block_size", "enable_prefix_caching"),
    [(1, False), (3, False), (4, False), (16, False), (4, True), (16, True)],
)
def test_blocks_saved_are_those_of_the_closed_formula(folder, block_size, enable_prefix_caching):
    llm = small(
        folder, block_size=block_size, num_blocks=800, enable_prefix_caching=enable_prefix_caching
    )
    shapes = [(1, 2), (4, 3), (12, 5), (15, 2), (16, 4), (17, 3), (32, 2), (37, 4)]
    max_tokens = 9
    steps = watch(llm)
    prompts = [prompt(p, first=i) for i, (p, _) in enumerate(shapes)]
    with SharingMeter(llm.engine) as meter:
        outputs = run(llm, prompts, [sampled(max_tokens, n=n) for _, n in shapes])
    assert len(steps) == max_tokens
    for (p, n), output in zip(shapes, outputs, strict=True):
        by_formula = [blocks_by_formula(p, g, n, block_size) for g in range(max_tokens)]
        name = output.request_id
        assert [(s.held(name), s.unshared(name)) for s in steps] == by_formula
        held, unshared = (sum(column) for column in zip(*by_formula, strict=True))
        assert (meter.num_held[name], meter.num_unshared[name]) == (held, unshared)
        assert meter.saved(name) == pytest.approx(1 - held / unshared)
        for g, step in enumerate(steps):
            begun = steps[0].tables[name][0][-1]
            of_this = [target for source, target in step.copies if source == begun]
            assert len(of_this) == (n - 1 if g == 1 and p % block_size else 0)
    begun_blocks = sum(n - 1 for p, n in shapes if p % block_size)
    assert [len(step.copies) for step in steps] == [0, begun_blocks] + [0] * (max_tokens - 2)


def test_samples_that_generate_the_same_block_share_it(folder):
    """Only with the prefix cache: of two equal blocks it keeps one."""
    likely = sampled(9, n=4, temperature=0.01)
    for caching in (True, False):
        llm = small(folder, block_size=2, enable_prefix_caching=caching)
        steps = watch(llm)
        [output] = run(llm, [prompt(5)], likely)
        assert len({tuple(s.token_ids) for s in output.outputs}) == 1
        by_formula = [blocks_by_formula(5, g, 4, 2) for g in range(9)]
        held = [step.held(output.request_id) for step in steps]
        if caching:
            # What the last step computes is found only after it: the last block is each one's own.
            assert held[-1] == (5 + 8) // 2 + 4
            assert held[-1] < by_formula[-1][0]
        else:
            assert held == [number for number, _ in by_formula]


def test_the_last_sample_keeps_the_block_that_the_others_copied(folder):
    llm = small(folder)
    steps = watch(llm)
    run(llm, [prompt(6)], sampled(3, n=4))
    [original] = steps[0].tables["llm-0"]
    after = steps[1].tables["llm-0"]
    assert [table[0] for table in after] == [original[0]] * 4
    assert [table[1] == original[1] for table in after] == [False, False, False, True]
    assert sorted(steps[1].copies) == sorted((original[1], table[1]) for table in after[:3])


def test_a_prompt_in_chunks_is_counted_once_per_step(folder):
    llm = small(folder, max_num_seqs=4, max_num_batched_tokens=8)
    with SharingMeter(llm.engine) as meter:
        run(llm, [prompt(30)], sampled(5, n=3))
    by_formula = [blocks_by_formula(30, 0, 3, 4)] * 4
    by_formula += [blocks_by_formula(30, g, 3, 4) for g in range(1, 5)]
    held, unshared = (sum(column) for column in zip(*by_formula, strict=True))
    assert (meter.num_held["llm-0"], meter.num_unshared["llm-0"]) == (held, unshared)


def test_samples_that_have_ended_are_counted_no_more(folder):
    llm = small(folder)
    set_eos(llm, *range(3, 20))
    steps = watch(llm)
    with SharingMeter(llm.engine) as meter:
        [output] = run(llm, [prompt(10)], sampled(40, n=5, ignore_eos=False, seed=0))
    computed = [len(s.token_ids) - 1 for s in output.outputs]
    expected = [blocks_by_formula(10, 0, 1, 4)]
    for g in range(1, max(computed) + 1):
        expected.append(blocks_by_formula(10, g, sum(c >= g for c in computed), 4))
    assert len(set(computed)) >= 4
    assert [(s.held("llm-0"), s.unshared("llm-0")) for s in steps] == expected
    held, unshared = (sum(column) for column in zip(*expected, strict=True))
    assert (meter.num_held["llm-0"], meter.num_unshared["llm-0"]) == (held, unshared)


# ---- the prefix cache ----------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("common", [0, 1, 4, 15, 16, 31, 40])
def test_a_second_prompt_finds_the_full_blocks_of_the_shared_prefix(folder, block_size, common):
    llm = small(folder, block_size=block_size)
    first, second = prompt(45), prompt(45)[:common] + prompt(50, first=1)[common:]
    second[common] = 3 if first[common] != 3 else 4
    run(llm, [first], GREEDY)
    steps = watch(llm)
    [output] = run(llm, [second], GREEDY)
    assert output.num_cached_tokens == common // block_size * block_size
    assert steps[0].computed == {output.request_id: 50 - output.num_cached_tokens}
    uncached = small(folder, block_size=block_size, enable_prefix_caching=False)
    assert tokens([output]) == tokens(run(uncached, [second], GREEDY))


@pytest.mark.parametrize("n", [1, 3])
def test_only_the_last_token_of_a_fully_cached_prompt_is_computed(folder, n):
    llm = small(folder)
    params = sampled(n=n)
    [once] = run(llm, [prompt(20)], params)
    steps = watch(llm)
    [again] = run(llm, [prompt(20)], params)
    assert (once.num_cached_tokens, again.num_cached_tokens) == (0, 19)
    assert [step.computed[again.request_id] for step in steps] == [1] + [n] * 11
    assert all_tokens([again]) == all_tokens([once])


def test_a_fully_cached_prompt_whose_blocks_are_in_use_writes_to_a_copy(folder):
    llm = small(folder)
    [expected] = run(small(folder), [prompt(20)], GREEDY)
    first = llm.stream([prompt(20)], GREEDY)
    next(first)
    steps = watch(llm)
    [second] = run_beside(llm, [prompt(20)], GREEDY)
    assert second.num_cached_tokens == 19
    [(source, target)] = steps[0].copies
    assert (source, target) == (steps[0].tables["llm-0"][0][4], steps[0].tables["llm-1"][0][4])
    *_, (_, last) = first
    assert tokens([second, last]) == tokens([expected]) * 2
    assert_all_blocks_are_back(llm)


def run_beside(llm: LLM, prompts, params):
    """Like `run`, while other requests hold blocks."""
    return llm.generate(prompts, params, use_tqdm=False)


def test_two_equal_prompts_that_arrive_together_share_blocks(folder):
    llm = small(folder)
    steps = watch(llm)
    first, second, other = run(llm, [prompt(22), prompt(22), prompt(9, first=4)], GREEDY)
    assert [o.num_cached_tokens for o in (first, second, other)] == [0, 20, 0]
    assert tokens([first]) == tokens([second]) == tokens(run(small(folder), [prompt(22)], GREEDY))
    shared = steps[1].tables[first.request_id][0][:5]
    assert steps[1].tables[second.request_id][0][:5] == shared


def test_generated_blocks_are_found(folder):
    llm = small(folder)
    [first] = run(llm, [prompt(10)], GREEDY)
    conversation = prompt(10) + first.outputs[0].token_ids
    [second] = run(llm, [[*conversation, 5, 6]], GREEDY)
    # the last token was sampled, but nothing came after it: its keys were never computed
    assert second.num_cached_tokens == (len(conversation) - 1) // 4 * 4 == 40
    expected = run(small(folder, enable_prefix_caching=False), [[*conversation, 5, 6]], GREEDY)
    assert tokens([second]) == tokens(expected)


def test_the_generated_blocks_of_every_sample_are_found(folder):
    llm = small(folder)
    [first] = run(llm, [prompt(10)], sampled(15, n=3, seed=8))
    assert len({tuple(sample.token_ids[:2]) for sample in first.outputs}) == 3
    for sample in first.outputs:
        [output] = run(llm, [prompt(10) + sample.token_ids], GREEDY)
        assert output.num_cached_tokens == 24


def test_only_prompts_with_the_same_salt_share(folder):
    llm = small(folder)
    ids = prompt(20)
    salted = {
        salt: {"prompt_token_ids": ids, "cache_salt": salt} if salt else ids
        for salt in (None, "a", "b")
    }
    found = []
    for salt in (None, "a", "b", "a", None, "b"):
        [output] = run(llm, [salted[salt]], GREEDY)
        found.append(output.num_cached_tokens)
    assert found == [0, 0, 0, 19, 19, 19]
    together = run(llm, [{**salted["a"], "cache_salt": salt} for salt in "cdc"], GREEDY)
    assert [output.num_cached_tokens for output in together] == [0, 0, 19]


def test_without_prefix_caching_nothing_is_found(folder):
    llm = small(folder, enable_prefix_caching=False)
    outputs = [*run(llm, [prompt(20)] * 2, GREEDY), *run(llm, [prompt(20)], GREEDY)]
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 0]
    assert not llm.engine.scheduler.memory.cached


def test_prompt_logprobs_are_computed_though_the_prompt_is_cached(folder):
    import transformers

    llm = small(folder)
    run(llm, [prompt(20)], GREEDY)
    steps = watch(llm)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, prompt_logprobs=0)
    together = run(llm, [prompt(20), prompt(20), prompt(20)], [params, GREEDY, params])
    assert [output.num_cached_tokens for output in together] == [0, 19, 0]
    assert steps[0].computed[together[0].request_id] == 20
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        dense = model(torch.tensor([prompt(20)])).logits[0].log_softmax(-1)
    for output in together[::2]:
        assert output.prompt_logprobs[0] is None
        for i, (token, entry) in enumerate(
            zip(prompt(20)[1:], output.prompt_logprobs[1:], strict=True)
        ):
            assert list(entry) == [token]
            assert entry[token].logprob == pytest.approx(dense[i, token].item(), abs=1e-3)


def test_a_request_preempted_by_recomputation_finds_its_own_blocks_again(folder):
    prompts = [prompt(17), prompt(19, first=1), prompt(18, first=2)]
    computed = {}
    for caching in (True, False):
        llm = small(
            folder, num_blocks=18, preemption="recompute", enable_prefix_caching=caching,
            watermark=0.0,
        )  # fmt: skip
        steps = watch(llm)
        outputs = run(llm, prompts, GREEDY)
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
        assert [output.num_cached_tokens for output in outputs] == [0, 0, 0]
        assert tokens(outputs) == tokens(run(small(folder), prompts, GREEDY))
        computed[caching] = num_computed(steps)
    assert computed[True] < computed[False]


@pytest.mark.parametrize("num_blocks", [13, 17])
def test_evictions_in_a_tiny_pool_do_not_change_the_tokens(folder, num_blocks):
    events = []
    parts = Parts().traced(EventLog(events.append))
    llm = small(folder, num_blocks=num_blocks, parts=parts)
    expected = {}
    ample = small(folder, enable_prefix_caching=False)
    order = random.Random(0).choices(range(4), k=14)
    for first in order:
        ids = prompt(8) + prompt(6 + first, first=first)
        if first not in expected:
            [expected[first]] = tokens(run(ample, [ids], GREEDY))
        [output] = run(llm, [ids], GREEDY)
        assert output.outputs[0].token_ids == expected[first]
    assert sum(event.event == "evict" for event in events) > 20


# ---- pinned prefixes -----------------------------------------------------------------------------


def flood(llm: LLM) -> None:
    """Fill the pool with other requests' blocks, so that all evictable blocks are evicted."""
    memory = llm.engine.scheduler.memory
    before = dict(memory.cached)
    held = {block for table in memory.tables.values() for block in table.blocks}
    for first in range(6, 9):
        length = (memory.num_free - 1) * memory.block_size
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        run_beside(llm, [prompt(length, first=first)], params)
    assert not {b for b, key in before.items() if memory.cached.get(b) == key} - held


def test_a_pinned_prefix_stays_cached_until_it_is_released(folder):
    llm = small(folder, num_blocks=16)
    memory = llm.engine.scheduler.memory
    pinned = llm.cache_prefix(prompt(14))
    assert (pinned.num_tokens, pinned.num_blocks) == (12, 3)
    assert memory.num_free == memory.num_blocks - pinned.num_blocks
    expected = tokens(run(small(folder), [prompt(20)], GREEDY))
    for _ in range(2):
        flood(llm)
        [output] = run_beside(llm, [prompt(20)], GREEDY)
        assert output.num_cached_tokens == 12
        assert tokens([output]) == expected
    llm.release_prefix(pinned)
    assert_all_blocks_are_back(llm)
    flood(llm)
    [output] = run(llm, [prompt(20)], GREEDY)
    assert output.num_cached_tokens == 0
    assert tokens([output]) == expected


def test_a_released_prefix_is_still_found_until_its_blocks_are_needed(folder):
    llm = small(folder)
    llm.release_prefix(llm.cache_prefix(prompt(12)))
    [output] = run(llm, [prompt(20)], GREEDY)
    assert output.num_cached_tokens == 12


def test_a_pinned_prefix_that_is_the_whole_prompt_is_written_to_a_copy(folder):
    llm = small(folder)
    pinned = llm.cache_prefix(prompt(12))
    steps = watch(llm)
    [output] = run_beside(llm, [prompt(12)], sampled(n=3))
    assert output.num_cached_tokens == 11
    assert len(steps[0].copies) == 1
    assert all_tokens([output]) == all_tokens(run(small(folder), [prompt(12)], sampled(n=3)))
    llm.release_prefix(pinned)
    assert_all_blocks_are_back(llm)


def test_two_pins_of_one_prefix_share_its_blocks_and_are_released_one_by_one(folder):
    llm = small(folder)
    memory = llm.engine.scheduler.memory
    one, two = llm.cache_prefix(prompt(12)), llm.cache_prefix(prompt(16))
    assert memory.num_free == memory.num_blocks - 4
    llm.release_prefix(two)
    assert memory.num_free == memory.num_blocks - 3
    with pytest.raises(InvalidRequest, match="is not pinned here: was it released before"):
        llm.release_prefix(two)
    assert memory.num_free == memory.num_blocks - 3
    llm.release_prefix(one)
    assert_all_blocks_are_back(llm)


def test_a_prefix_is_pinned_under_its_salt(folder):
    llm = small(folder)
    pinned = llm.cache_prefix({"prompt_token_ids": prompt(12), "cache_salt": "a"})
    salts = ("a", "b", None)
    outputs = run_beside(
        llm, [{"prompt_token_ids": prompt(20), "cache_salt": s} for s in salts], GREEDY
    )
    assert [output.num_cached_tokens for output in outputs] == [12, 0, 0]
    llm.release_prefix(pinned)


def test_a_prefix_that_cannot_be_cached_is_refused(folder):
    llm = small(folder, num_blocks=8)
    with pytest.raises(InvalidRequest, match="a prefix of 3 fills no block of 4 tokens"):
        llm.cache_prefix(prompt(3))
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        llm.cache_prefix([])
    with pytest.raises(PromptTooLong, match="needs 9 blocks of 4 tokens, the pool has 8"):
        llm.cache_prefix(prompt(36))
    with pytest.raises(InvalidRequest, match="only in paged memory with prefix caching"):
        small(folder, enable_prefix_caching=False).cache_prefix(prompt(12))
    assert_all_blocks_are_back(llm)
    assert not llm.engine.has_unfinished_requests()


def test_a_prompt_too_long_for_the_unpinned_blocks_is_refused_alone(folder):
    llm = small(folder, num_blocks=12)
    pinned = llm.cache_prefix(prompt(24))
    somebody_else = llm.stream([prompt(5, first=1)], sampled(10))
    next(somebody_else)
    with pytest.raises(PromptTooLong, match=r"too many of the pool's 12 blocks for a prompt"):
        llm.generate([prompt(26, first=2)], GREEDY, use_tqdm=False)
    [with_it] = run_beside(llm, [prompt(26)], sampled(10))
    assert with_it.num_cached_tokens == 24
    *_, (_, last) = somebody_else
    expected = run(small(folder), [prompt(5, first=1), prompt(26)], sampled(10))
    assert tokens([last, with_it]) == tokens(expected)
    llm.release_prefix(pinned)
    assert len(run(llm, [prompt(26, first=2)], sampled(10))[0].outputs[0].token_ids) == 10


def test_a_request_that_outgrows_the_unpinned_blocks_ends_by_length(folder):
    llm = small(folder, num_blocks=12)
    pinned = llm.cache_prefix(prompt(24))
    [output] = run_beside(llm, [prompt(10, first=1)], GREEDY)
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 6 * 4 + 1 - 10
    llm.release_prefix(pinned)
    assert_all_blocks_are_back(llm)


def test_a_waiting_prompt_ends_if_pinning_takes_the_blocks_it_needs(folder):
    llm = small(folder, num_blocks=12)
    run(llm, [prompt(24)], GREEDY)
    llm.engine.add_request("a", prompt(30, first=1), sampled(n=2))
    pinned = llm.engine.pin_prefix(prompt(24))
    [[output]] = step_to_the_end(llm)
    assert [(s.token_ids, s.finish_reason) for s in output.outputs] == [([], "length")] * 2
    llm.release_prefix(pinned)
    assert_all_blocks_are_back(llm)


def test_the_engine_pins_only_a_prefix_that_is_cached(folder):
    llm = small(folder)
    assert llm.engine.pin_prefix(prompt(12)) is None
    assert_all_blocks_are_back(llm)
    run(llm, [prompt(10)], GREEDY)
    assert llm.engine.pin_prefix(prompt(12)) is None
    assert llm.engine.pin_prefix(prompt(8)).num_blocks == 2


# ---- all ways of decoding in one batch -----------------------------------------------------------

MIXED: list[tuple[list[int], SamplingParams | BeamSearchParams]] = [
    (prompt(9, first=1), SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)),
    (prompt(16, first=2), sampled(12, n=3)),
    (prompt(7, first=3), BeamSearchParams(beam_width=4, max_tokens=12)),
    (prompt(21, first=4), sampled(12, top_p=0.9, repetition_penalty=1.2)),
    (prompt(17, first=5), sampled(10, n=2, best_of=4, temperature=1.3)),
    (prompt(16, first=2), BeamSearchParams(beam_width=2, max_tokens=14, length_penalty=0.0)),
    (prompt(13, first=6), BeamSearchParams(beam_width=3, max_tokens=10, early_stopping="never")),
    (prompt(16, first=2), sampled(8, n=2, seed=9, presence_penalty=1.0)),
    (prompt(2, first=7), BeamSearchParams(beam_width=1, max_tokens=9, early_stopping=True)),
]
ENDS = (15, 85, 32, 44)  # tokens that the model generates often


def mixed(llm: LLM):
    set_eos(llm, *ENDS)
    return run(llm, *map(list, zip(*MIXED, strict=True)))


def assert_same(outputs, expected) -> None:
    assert all_tokens(outputs) == all_tokens(expected)
    for output, other in zip(outputs, expected, strict=True):
        for one, two in zip(output.outputs, other.outputs, strict=True):
            assert (one.index, one.finish_reason) == (two.index, two.finish_reason)
            assert one.cumulative_logprob == pytest.approx(two.cumulative_logprob, abs=1e-3)
            assert one.score == pytest.approx(two.score, abs=1e-3)


@pytest.fixture(scope="module")
def alone(folder):
    """What each of the mixed requests gives with an engine to itself."""
    outputs = []
    for ids, params in MIXED:
        llm = small(folder, attention_backend="reference", enable_prefix_caching=False)
        set_eos(llm, *ENDS)
        outputs += run(llm, [ids], params)
    reasons = {(o.score is None, o.finish_reason) for output in outputs for o in output.outputs}
    assert {(True, "length"), (False, "stop"), (False, "length")} <= reasons
    return outputs


def some_of(seed: int, how_many: int, *choices):
    return random.Random(seed).sample(list(product(*choices)), how_many)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("block_size", "attention_backend", "enable_prefix_caching", "steps"),
    some_of(1, 8, [1, 4, 16], sorted(BACKENDS), [True, False], ["whole", "chunks", "roomy"]),
)
def test_every_decoding_method_gives_the_same_alone_and_in_a_batch(
    folder, alone, block_size, attention_backend, enable_prefix_caching, steps
):
    llm = small(
        folder,
        block_size=block_size,
        num_blocks=1200 // block_size,
        attention_backend=attention_backend,
        enable_prefix_caching=enable_prefix_caching,
        **STEPS[steps],
    )
    outputs = mixed(llm)
    assert_same(outputs, alone)
    assert sum(output.metrics.num_preemptions for output in outputs) == 0


STEPS = {
    "whole": {"enable_chunked_prefill": False},
    "chunks": {"max_num_seqs": 10, "max_num_batched_tokens": 10},
    "roomy": {},
}
MEMORY = {
    "recompute": {"preemption": "recompute"},
    "swap": {"preemption": "swap"},
    "auto": {"preemption": "auto"},
    "no swap pool": {"preemption": "auto", "num_swap_blocks": 0},
    "a small swap pool": {"preemption": "swap", "num_swap_blocks": 3},
}


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("block_size", "attention_backend", "memory", "enable_prefix_caching", "steps"),
    some_of(3, 18, [1, 4, 16], sorted(BACKENDS), MEMORY, [True, False], STEPS),
)
def test_every_decoding_method_gives_the_same_in_a_small_pool(
    folder, alone, block_size, attention_backend, memory, enable_prefix_caching, steps
):
    llm = small(
        folder,
        block_size=block_size,
        num_blocks={1: 110, 4: 29, 16: 9}[block_size],
        attention_backend=attention_backend,
        enable_prefix_caching=enable_prefix_caching,
        watermark=0.0,
        **MEMORY[memory],
        **STEPS[steps],
    )
    outputs = mixed(llm)
    assert_same(outputs, alone)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


def sharing(llm: LLM, group: SequenceGroup) -> list[list[int]]:
    """The group's block tables with its blocks numbered in the order in which they occur."""
    tables = [llm.engine.scheduler.memory.tables[s.seq_id].blocks for s in group.sequences]
    numbers: dict[int, int] = {}
    return [[numbers.setdefault(block, len(numbers)) for block in table] for table in tables]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize(
    "params", [sampled(16, n=3), BeamSearchParams(beam_width=4, max_tokens=24)]
)
def test_a_forked_group_that_is_swapped_keeps_its_sharing(folder, params, enable_prefix_caching):
    llm = small(folder, num_blocks=18, enable_prefix_caching=enable_prefix_caching)
    scheduler = llm.engine.scheduler
    memory = scheduler.memory
    llm.engine.add_request("old", prompt(13), GREEDY)
    llm.engine.add_request("forked", prompt(14, first=1), params)
    group = scheduler.waiting[1]
    found, times_swapped, before = {}, 0, [[]]
    while llm.engine.has_unfinished_requests():
        was = group.status
        found.update({p.request_id: p.output() for p in llm.engine.step() if p.finished})
        if group.status is SequenceStatus.SWAPPED:
            now = sharing(llm, group)
            assert now == before
            distinct = memory.num_distinct_blocks(group)
            assert distinct < sum(map(len, now))
            assert memory.num_swap_blocks - memory.num_free_swap_blocks == distinct
            times_swapped += was is not SequenceStatus.SWAPPED
        elif group.status is SequenceStatus.RUNNING:
            assert memory.num_free_swap_blocks == memory.num_swap_blocks
            if was is SequenceStatus.SWAPPED and isinstance(params, SamplingParams):
                now = sharing(llm, group)
                grown = [table[: len(old)] for table, old in zip(now, before, strict=True)]
                assert {b for t in grown for b in t[:3]} == {0, 1, 2}
                assert memory.num_distinct_blocks(group) - 3 == sum(len(t) - 3 for t in now)
            before = sharing(llm, group)
    assert times_swapped > 0
    expected = run(small(folder), [prompt(13), prompt(14, first=1)], [GREEDY, params])
    assert all_tokens([found["old"], found["forked"]]) == all_tokens(expected)
    assert_all_blocks_are_back(llm)
