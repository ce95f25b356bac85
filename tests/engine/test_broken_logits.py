"""A request whose logits are broken ends with an error, and no other request notices."""

import logging
import sys
from contextlib import suppress

import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint
from engine_runs import GREEDY, PROMPTS, assert_all_blocks_are_back, checked, run, tokens
from safetensors.torch import load_file, save_file

from minipaged import LLM, BeamSearchParams, Parts, SamplingParams
from minipaged.attention import torch_decode
from minipaged.tracing.events import EventLog

BROKEN = 50  # the token that breaks the model
OPTIONS = {"block_size": 4, "num_blocks": 64, "max_model_len": 96}
HEALTHY = [[token for token in prompt if token != BROKEN] for prompt in PROMPTS]
PREFIX = [5, 6, 7, 8]  # fills a block


SAMPLES = SamplingParams(n=3, temperature=1.2, seed=2, max_tokens=6, ignore_eos=True)
BEAMS = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)


def changed(folder, change):
    """The checkpoint with other weights."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def with_nan(weights) -> None:
    weights["model.embed_tokens.weight"][BROKEN] = torch.nan


def overflows(weights) -> None:
    """All weights are finite, and in float16 some values of one token are not."""
    weights["model.embed_tokens.weight"][:, 0] = 0.0
    weights["model.embed_tokens.weight"][BROKEN, 0] = 100.0
    weights["model.layers.0.self_attn.v_proj.weight"][:, 0] = 6e4


@pytest.fixture(scope="module", params=[with_nan, overflows], ids=["NaN", "overflow"])
def folder(tmp_path_factory, request):
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)
    dtype = "float32" if request.param is with_nan else "float16"
    return changed(folder, request.param), dtype


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def broken_by_the_model(folder, **options) -> LLM:
    folder, dtype = folder
    return checked(folder, dtype=dtype, **(OPTIONS | options))


def is_error(completion) -> bool:
    """Ended with an error that says what to try."""
    assert (completion.finish_reason == "error") == (completion.error is not None)
    return completion.finish_reason == "error" and 'Try dtype="float32"' in completion.error


# ---- the others go on ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_backend": "reference"},
        {"attention_backend": "blockwise"},
        {"kv_cache_dtype": "int8"},
        {"kv_cache_dtype": "fp8"},
        {"max_num_batched_tokens": 16, "max_num_seqs": 8},
        {"memory": "contiguous-max", "num_blocks": 256},
        {"memory": "static", "num_blocks": 256},
        pytest.param(
            {"memory": "virtual"},
            marks=pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's pages"),
        ),
    ],
    ids=str,
)
def test_other_requests_have_the_same_tokens_as_without_the_broken_one(folder, options):
    expected = tokens(run(broken_by_the_model(folder, **options), HEALTHY))
    llm = broken_by_the_model(folder, **options)
    prompts = [HEALTHY[0], [9, BROKEN, 8] * 8, *HEALTHY[1:4], [BROKEN], *HEALTHY[4:]]
    for _ in range(2):  # the second time in the blocks of the first
        outputs = run(llm, prompts)
        for broken in (outputs.pop(5), outputs.pop(1)):
            assert is_error(broken.outputs[0])
            assert broken.outputs[0].token_ids == []
        assert tokens(outputs) == expected


def test_reading_blocks_in_place_does_not_affect_other_requests(folder, monkeypatch):
    monkeypatch.setattr(torch_decode, "_is_worth_it", lambda *_: True)
    monkeypatch.setattr(torch_decode, "LEAST_IN_USE", 0)
    expected = tokens(run(broken_by_the_model(folder), HEALTHY))
    outputs = run(broken_by_the_model(folder), [[BROKEN] * 9, *HEALTHY[:4], [BROKEN], *HEALTHY[4:]])
    assert tokens(outputs[1:5] + outputs[6:]) == expected


def test_the_tokens_before_the_broken_one_are_kept(folder):
    forced = SamplingParams(temperature=0.0, logit_bias={BROKEN: 100.0}, max_tokens=9)
    llm = broken_by_the_model(folder)
    [alone] = run(broken_by_the_model(folder), HEALTHY[1:2])
    first, second = run(llm, HEALTHY[1:3], [GREEDY, forced])
    assert (second.outputs[0].token_ids, is_error(second.outputs[0])) == ([BROKEN], True)
    assert first.outputs[0].token_ids == alone.outputs[0].token_ids


def test_one_line_is_logged_for_each_broken_request(folder, caplog):
    llm = broken_by_the_model(folder, max_num_batched_tokens=16, max_num_seqs=8)
    samples = SamplingParams(n=3, seed=1, max_tokens=4)
    with caplog.at_level(logging.DEBUG, logger="minipaged"):
        run(llm, [HEALTHY[0], [3, BROKEN], [9] * 20 + [BROKEN] + [9] * 20], samples)
    lines = [record.getMessage() for record in caplog.records]
    assert all(record.name.startswith("minipaged.") for record in caplog.records)
    assert len(lines) == 2
    assert f"token at position 2: {VOCAB_SIZE} of {VOCAB_SIZE} logits are NaN" in lines[0]
    # It is found in the chunk that holds the token, not at the end of the prompt.
    assert "request llm-2, token at position 26: " in lines[1]


def test_no_block_of_a_broken_request_stays_in_the_prefix_cache(folder):
    """Its prefix is healthy, but may become NaN when it is computed together with the rest."""
    for budget in (64, 8):  # whole, and in chunks
        options = {"max_num_batched_tokens": budget, "max_num_seqs": 8}
        [expected] = run(broken_by_the_model(folder, **options), [[*PREFIX, 9, 10]])
        llm = broken_by_the_model(folder, **options)
        [broken] = run(llm, [[*PREFIX, BROKEN, *range(60, 75)]])
        assert is_error(broken.outputs[0])
        pool = llm.engine.executor.runner.kv_cache._pool[0]
        assert pool[:, :, sorted(llm.engine.memory.cached)].isfinite().all()
        [found] = run(llm, [[*PREFIX, 9, 10]])
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids


def test_blocks_cached_before_the_fault_are_still_found(folder):
    llm = broken_by_the_model(folder)
    run(llm, [[*PREFIX, 9, 10]])
    [broken] = run(llm, [[*PREFIX, BROKEN]])
    assert is_error(broken.outputs[0])
    [found] = run(llm, [[*PREFIX, 9, 11]])
    assert found.num_cached_tokens == len(PREFIX)


# ---- several sequences ---------------------------------------------------------------------------


def breaking(llm: LLM, is_broken) -> LLM:
    """`is_broken(number of the step, sequence)`: whose logits become NaN."""
    executor = llm.engine.executor
    compute, steps = executor.run, iter(range(10**6))

    def run_and_break(step):
        logits, number, stop = compute(step).clone(), next(steps), 0
        for sequence in step.sequences:
            stop += sequence.num_logits
            if is_broken(number, sequence):
                logits[stop - 1] = torch.nan
        return logits

    executor.run = run_and_break
    return llm


MEMORIES = ["paged", "contiguous-max", "contiguous-oracle", "static", "virtual"]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("params", [SAMPLES, BEAMS], ids=["samples", "beams"])
def test_if_a_prompt_breaks_all_its_samples_end_and_all_blocks_return(folder, memory, params):
    if memory == "virtual" and sys.platform != "linux":
        pytest.skip("needs Linux's pages")
    llm = broken_by_the_model(folder, memory=memory, num_blocks=256)
    generate = llm.generate if params is SAMPLES else llm.beam_search
    outputs = generate([HEALTHY[0], [3, BROKEN], HEALTHY[1]], params, use_tqdm=False)
    assert_all_blocks_are_back(llm)
    assert [all(map(is_error, output.outputs)) for output in outputs] == [False, True, False]
    assert len(outputs[1].outputs) == (3 if params is SAMPLES else 1)


@pytest.mark.parametrize("n", [3, 2])
def test_a_broken_sample_ends_alone(plain, n):
    params = SamplingParams(n=n, best_of=3, temperature=1.2, seed=3, max_tokens=8, ignore_eos=True)
    [expected] = run(checked(plain, **OPTIONS), HEALTHY[:1], params)
    llm = breaking(checked(plain, **OPTIONS), lambda step, seq: (step, seq.seq_id) == (4, 1))
    [found] = run(llm, HEALTHY[:1], params)
    if n == 3:
        assert [o.finish_reason for o in found.outputs].count("error") == 1
        broken = next(o for o in found.outputs if o.finish_reason == "error")
        assert any(broken.token_ids == o.token_ids[:4] for o in expected.outputs)
        assert len(broken.token_ids) == 4
    healthy = [o.token_ids for o in found.outputs if o.finish_reason == "length"]
    assert len(healthy) == 2
    assert all(ids in [o.token_ids for o in expected.outputs] for ids in healthy) or n == 2


def test_samples_that_break_one_after_another_are_logged_once(plain, caplog):
    llm = checked(plain, **OPTIONS)
    breaking(llm, lambda step, sequence: step == 2 + sequence.seq_id)
    [found] = run(llm, HEALTHY[:1], SAMPLES)
    assert all(map(is_error, found.outputs))
    assert len(caplog.records) == 1


def test_a_broken_request_stays_broken_when_a_later_step_is_interrupted(plain, caplog):
    llm = checked(plain, **OPTIONS)

    def break_and_interrupt(step, sequence):
        if step == 5:
            raise KeyboardInterrupt
        return (step, sequence.seq_id) == (3, 1)

    breaking(llm, break_and_interrupt)
    [expected] = run(checked(plain, **OPTIONS), HEALTHY[:1], SAMPLES)
    llm.engine.add_request("it", {"prompt_token_ids": HEALTHY[0]}, SAMPLES)
    while llm.engine.has_unfinished_requests():
        with suppress(KeyboardInterrupt):
            outputs = [progress.output() for progress in llm.engine.step()]
    [output] = outputs
    assert [is_error(completion) for completion in output.outputs] == [False, True, False]
    for i in (0, 2):
        assert output.outputs[i].token_ids == expected.outputs[i].token_ids
    assert output.outputs[1].token_ids == expected.outputs[1].token_ids[:3]
    assert len(caplog.records) == 1
    assert_all_blocks_are_back(llm)


def test_a_broken_beam_is_dropped_and_the_search_goes_on(plain):
    params = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
    llm = breaking(checked(plain, **OPTIONS), lambda step, seq: step == 4 and seq.seq_id % 3 == 1)
    [found] = llm.beam_search(HEALTHY[:1], params, use_tqdm=False)
    assert [o.finish_reason for o in found.outputs] == ["length"] * 3
    assert all(len(o.token_ids) == 8 for o in found.outputs)
    assert_all_blocks_are_back(llm)


def test_a_search_without_a_beam_left_ends_with_an_error(plain):
    params = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
    [expected] = checked(plain, **OPTIONS).beam_search(
        HEALTHY[:1], BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True), use_tqdm=False
    )
    for step in (0, 4):
        llm = breaking(checked(plain, **OPTIONS), lambda number, _, step=step: number == step)
        [found] = llm.beam_search(HEALTHY[:1], params, use_tqdm=False)
        assert found.finished
        assert all(is_error(output) for output in found.outputs)
        if step:
            assert [o.token_ids for o in found.outputs] == [o.token_ids for o in expected.outputs]
        assert_all_blocks_are_back(llm)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_group_that_breaks_while_it_is_recomputed_ends_as_a_whole(plain, preemption):
    options = OPTIONS | {"num_blocks": 18, "watermark": 0.0, "preemption": preemption}
    if preemption == "recompute":
        options |= {"num_swap_blocks": 0}
    params = [
        SamplingParams(n=3, seed=i, temperature=1.2, max_tokens=16, ignore_eos=True)
        for i in range(3)
    ]
    prompts = [HEALTHY[0], HEALTHY[7], HEALTHY[4] + HEALTHY[0]]
    expected = run(checked(plain, **options), prompts, params)
    assert any(output.metrics.num_preemptions for output in expected)

    def recomputes(step, sequence):
        return step > 6 and len(sequence.token_ids) > 1

    log = EventLog()
    llm = LLM(plain, parts=Parts().checked().traced(log), **options)
    found = run(breaking(llm, recomputes), prompts, params)
    was_broken = [any(map(is_error, output.outputs)) for output in found]
    assert any(was_broken) == (preemption == "recompute")
    for output, right, broken in zip(found, expected, was_broken, strict=True):
        if broken:
            assert all(map(is_error, output.outputs))
        else:
            assert [o.token_ids for o in output.outputs] == [o.token_ids for o in right.outputs]


# ---- the request's own options -------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_options_that_forbid_every_token_are_named_in_the_error(plain, temperature):
    everything = SamplingParams(
        temperature=temperature, min_tokens=2, stop_token_ids=range(VOCAB_SIZE), seed=1
    )
    [alone] = run(checked(plain, **OPTIONS), HEALTHY[:1])
    healthy, broken = run(checked(plain, **OPTIONS), HEALTHY[:2], [GREEDY, everything])
    assert healthy.outputs[0].token_ids == alone.outputs[0].token_ids
    assert broken.outputs[0].finish_reason == "error"
    assert "min_tokens with its stop tokens" in broken.outputs[0].error


def test_options_that_leave_one_token_are_no_error(plain):
    params = SamplingParams(
        temperature=0.0, min_tokens=3, max_tokens=3, stop_token_ids=set(range(VOCAB_SIZE)) - {7}
    )
    [found] = run(checked(plain, **OPTIONS), HEALTHY[:1], params)
    assert (found.outputs[0].token_ids, found.outputs[0].finish_reason) == ([7, 7, 7], "length")
