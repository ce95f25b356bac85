"""The engine end to end: the same tokens whatever the memory, batch and attention backend."""

from itertools import pairwise

import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint
from engine_runs import GREEDY, PROMPTS, assert_all_blocks_are_back, checked, run, set_eos, tokens

from minipaged import LLM, BeamSearchParams, Parts, SamplingParams
from minipaged.attention.backend import BACKENDS
from minipaged.errors import (
    CheckpointError,
    InvalidOption,
    InvalidRequest,
    MissingTokenizer,
    PromptTooLong,
)
from minipaged.memory import BlockAllocator
from minipaged.scheduler.fcfs import FCFSScheduler

MIXED = [
    SamplingParams(
        temperature=0.0 if i % 2 else 1.3,
        top_p=0.9,
        repetition_penalty=1.1,
        presence_penalty=0.3,
        seed=i,
        max_tokens=40,
        ignore_eos=True,
    )
    for i in range(len(PROMPTS))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


# ---- the right tokens ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    """What an ample pool and the reference attention give."""
    outputs = run(checked(folder, attention_backend="reference"), params=MIXED)
    assert sum(output.metrics.num_preemptions for output in outputs) == 0
    return tokens(outputs)


@pytest.mark.filterwarnings("ignore:no GPU")
@pytest.mark.parametrize("attention_backend", ["triton", "triton-naive"])
def test_the_triton_kernels_write_what_the_reference_writes(folder, attention_backend):
    pytest.importorskip("triton")
    # Interpreted here: few prompts, but a mixture of chunks, decodes, copies and preemptions.
    options = {"block_size": 4, "num_blocks": 14, "max_model_len": 40, "max_num_seqs": 4}
    options |= {"max_num_batched_tokens": 8}
    prompts = [prompt[:n] for prompt, n in zip(PROMPTS[1:4], (13, 5, 9), strict=True)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True),
        SamplingParams(n=2, seed=3, max_tokens=6, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True),
    ]
    expected = run(checked(folder, attention_backend="reference", **options), prompts, params)
    llm = checked(folder, attention_backend=attention_backend, **options)
    for found, right in zip(run(llm, prompts, params), expected, strict=True):
        assert [o.token_ids for o in found.outputs] == [o.token_ids for o in right.outputs]


@pytest.mark.parametrize("kv_cache_dtype", ["float16", "bfloat16", "int8", "fp8"])
def test_every_backend_reads_a_smaller_cache_alike(folder, kv_cache_dtype):
    outputs = [
        run(LLM(folder, attention_backend=name, kv_cache_dtype=kv_cache_dtype)) for name in BACKENDS
    ]
    assert tokens(outputs[0]) == tokens(outputs[1]) == tokens(outputs[2])
    used = LLM(folder, kv_cache_dtype=kv_cache_dtype).engine.executor.runner.kv_cache
    assert used.layers[0][0].dtype in (torch.float16, torch.bfloat16, torch.float32)


def test_an_8_bit_cache_of_the_same_memory_holds_more_blocks(folder, monkeypatch):
    from minipaged.worker import warm_up

    monkeypatch.setattr(warm_up, "blocks_that_fit", lambda block_bytes, *_: 2**20 // block_bytes)
    blocks = {
        dtype: LLM(folder, kv_cache_dtype=dtype, max_num_seqs=256).engine.config.num_blocks
        for dtype in ("float32", "float16", "int8")
    }
    assert blocks["float16"] // 2 == blocks["float32"]
    assert blocks["int8"] > 1.4 * blocks["float16"]  # heads of 12: 12 + 4 bytes instead of 24


@pytest.mark.sampled
@pytest.mark.parametrize("attention_backend", sorted(BACKENDS))
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
def test_repeated_preemption_does_not_change_the_tokens(
    folder, expected, attention_backend, preemption, block_size
):
    llm = checked(
        folder,
        attention_backend=attention_backend,
        preemption=preemption,
        block_size=block_size,
        num_blocks=112 // block_size + 1,
        num_swap_blocks=1000 // block_size,
        max_num_batched_tokens=70,
    )
    outputs = run(llm, params=MIXED)
    assert tokens(outputs) == expected
    assert sum(output.metrics.num_preemptions for output in outputs) >= 4


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_8_bit_keys_survive_sharing_copies_and_preemption(folder, preemption, kv_cache_dtype):
    # A key's bits depend on nothing but the key: computing it again stores the same bits.
    prompts, params = PROMPTS[:4], SamplingParams(n=3, seed=4, max_tokens=12, ignore_eos=True)
    options = {"kv_cache_dtype": kv_cache_dtype, "block_size": 4, "preemption": preemption}
    ample = run(checked(folder, **options), prompts, params)
    starved = run(checked(folder, **options, num_blocks=40, num_swap_blocks=99), prompts, params)
    assert sum(output.metrics.num_preemptions for output in starved) >= 2
    for found, right in zip(starved, ample, strict=True):
        assert [o.token_ids for o in found.outputs] == [o.token_ids for o in right.outputs]


@pytest.mark.parametrize("max_num_batched_tokens", [8, 13, 64])
def test_the_size_of_prompt_chunks_changes_no_token(folder, expected, max_num_batched_tokens):
    llm = checked(folder, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=8)
    assert tokens(run(llm, params=MIXED)) == expected


def test_whole_prompts_change_no_token(folder, expected):
    assert tokens(run(checked(folder, enable_chunked_prefill=False), params=MIXED)) == expected


def test_a_request_gets_the_same_tokens_alone_and_in_a_batch(folder, expected):
    llm = checked(folder)
    for prompt, params, whole in zip(PROMPTS, MIXED, expected, strict=True):
        assert tokens(run(llm, [prompt], params)) == [whole]


def test_a_request_that_joins_midway_changes_no_others_tokens(folder, expected):
    engine = checked(folder).engine
    finished = {}
    for index, (prompt, params) in enumerate(zip(PROMPTS, MIXED, strict=True)):
        engine.add_request(str(index), prompt, params)
        for _ in range(3):
            finished.update({p.request_id: p.output() for p in engine.step() if p.finished})
    while engine.has_unfinished_requests():
        finished.update({p.request_id: p.output() for p in engine.step() if p.finished})
    assert [finished[str(i)].outputs[0].token_ids for i in range(len(PROMPTS))] == expected


def test_requests_without_a_seed_follow_the_seed_of_the_engine(folder):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    first, again, other = (
        tokens(run(checked(folder, seed=seed), params=params)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_two_equal_prompts_draw_different_tokens(folder):
    same = [PROMPTS[0]] * 2
    one, two = tokens(run(checked(folder), same, SamplingParams(max_tokens=20, ignore_eos=True)))
    assert one != two


def test_tokens_are_the_same_in_bfloat16_for_every_preemption(folder):
    ample = tokens(run(checked(folder, dtype="bfloat16", attention_backend="reference")))
    starved = checked(
        folder, dtype="bfloat16", attention_backend="reference", num_blocks=8, preemption="swap"
    )
    assert starved.engine.executor.runner.kv_cache.layers[0][0].dtype is torch.bfloat16
    assert tokens(run(starved)) == ample


# ---- how a sequence ends -------------------------------------------------------------------------


def test_a_sequence_that_outgrows_the_pool_ends_and_the_others_continue(folder, expected):
    llm = checked(folder, block_size=4, num_blocks=12)
    long, short = PROMPTS[5], PROMPTS[0]
    outputs = run(
        llm,
        [long, short],
        [SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True), GREEDY],
    )
    assert outputs[0].outputs[0].finish_reason == "length"
    assert len(outputs[0].outputs[0].token_ids) == 12 * 4 + 1 - len(long)
    assert len(outputs[1].outputs[0].token_ids) == 32
    whole = tokens(run(checked(folder), [long, short]))
    assert tokens(outputs)[1] == whole[1]


def test_the_context_ends_a_sequence_by_length(folder):
    [output] = run(checked(folder, max_model_len=20), [PROMPTS[2]])
    assert len(output.outputs[0].token_ids) == 3
    assert output.outputs[0].finish_reason == "length"


def test_the_end_token_ends_a_sequence_unless_ignored(folder):
    [whole] = run(checked(folder), [PROMPTS[0]])
    eos = whole.outputs[0].token_ids[4]
    first = whole.outputs[0].token_ids.index(eos)
    llm = checked(folder)
    set_eos(llm, eos)
    [ended] = run(llm, [PROMPTS[0]], SamplingParams(temperature=0.0, max_tokens=32))
    assert ended.outputs[0].token_ids == whole.outputs[0].token_ids[: first + 1]
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", None)
    [ignored] = run(llm, [PROMPTS[0]])
    assert ignored.outputs[0].token_ids == whole.outputs[0].token_ids


def test_a_stop_token_ends_a_sequence_and_is_reported(folder):
    [whole] = run(checked(folder), [PROMPTS[0]])
    stop = whole.outputs[0].token_ids[5]
    params = SamplingParams(temperature=0.0, max_tokens=32, stop_token_ids=[stop], ignore_eos=True)
    [ended] = run(checked(folder), [PROMPTS[0]], params)
    assert ended.outputs[0].token_ids[-1] == stop
    assert len(ended.outputs[0].token_ids) <= 6
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", stop)


def test_min_tokens_forbids_stops_until_then(folder):
    [whole] = run(checked(folder), [PROMPTS[0]])
    stops = list(set(whole.outputs[0].token_ids[:5]))
    params = SamplingParams(
        temperature=0.0, max_tokens=32, min_tokens=10, stop_token_ids=stops, ignore_eos=True
    )
    [output] = run(checked(folder), [PROMPTS[0]], params)
    assert len(output.outputs[0].token_ids) > 10
    assert not set(output.outputs[0].token_ids[:10]) & set(stops)


def test_an_end_that_is_also_the_last_token_allowed_is_a_stop(folder):
    [whole] = run(checked(folder), [PROMPTS[0]])
    ids = whole.outputs[0].token_ids
    place = next(i for i, token in enumerate(ids) if token not in ids[:i] and i > 2)
    params = SamplingParams(
        temperature=0.0, max_tokens=place + 1, stop_token_ids=[ids[place]], ignore_eos=True
    )
    [output] = run(checked(folder), [PROMPTS[0]], params)
    assert len(output.outputs[0].token_ids) == place + 1
    assert output.outputs[0].finish_reason == "stop"


# ---- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 9, "max_num_seqs": 4}])
def test_logprobs_of_prompt_and_output_are_those_of_the_dense_model(folder, options):
    check_logprobs(folder, checked(folder, **options), PROMPTS[:4])


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_logprobs_survive_preemption(folder, preemption):
    llm = checked(
        folder, num_blocks=26, block_size=4, preemption=preemption, max_num_batched_tokens=16,
        max_num_seqs=8,
    )  # fmt: skip
    outputs = check_logprobs(folder, llm, [PROMPTS[1], PROMPTS[3], PROMPTS[2]])
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


def test_logprobs_survive_preemption_in_the_middle_of_a_prompt(folder):
    """The second prompt loses its blocks when half computed, and comes back in other chunks."""
    llm = checked(
        folder, num_blocks=20, block_size=4, preemption="recompute", max_num_batched_tokens=7,
        max_num_seqs=4, watermark=0.0,
    )  # fmt: skip
    outputs = check_logprobs(folder, llm, [PROMPTS[7], PROMPTS[3]])
    assert outputs[1].metrics.num_preemptions > 0


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_max_logprobs_bounds_what_a_request_may_ask_for(folder, name):
    for limit in (0, 3, -1):
        llm = checked(folder, max_logprobs=limit)
        allowed = SamplingParams(max_tokens=1, **{name: 40 if limit < 0 else limit})
        assert len(llm.generate(PROMPTS[1], allowed, use_tqdm=False)) == 1
        if limit >= 0:
            more = SamplingParams(max_tokens=1, **{name: limit + 1})
            sentence = rf"{name} is {limit + 1}, but this engine reports at most {limit} "
            with pytest.raises(InvalidOption, match=sentence):
                llm.generate(PROMPTS[1], more, use_tqdm=False)


def check_logprobs(folder, llm: LLM, prompts):
    import transformers

    params = SamplingParams(
        temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    outputs = run(llm, prompts, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        ids = prompt + completion.token_ids
        with torch.inference_mode():
            dense = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = [*output.prompt_logprobs[1:], *completion.logprobs]
        assert output.prompt_logprobs[0] is None
        assert len(found) == len(ids) - 1
        for position, (token, entry) in enumerate(zip(ids[1:], found, strict=True)):
            top = 2 if position + 1 < len(prompt) else 3
            best = dense[position].topk(top).indices.tolist()
            assert set(entry) == {token, *best}
            assert next(iter(entry)) == token
            for each, found_one in entry.items():
                assert found_one.logprob == pytest.approx(dense[position, each].item(), abs=1e-3)
                assert found_one.rank == 1 + (dense[position] > dense[position, each]).sum()
        generated = [
            entry[token].logprob
            for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        assert completion.cumulative_logprob == pytest.approx(sum(generated), abs=1e-3)
    return outputs


# ---- bad input: one sentence, and nothing is lost ------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "error", "sentence"),
    [
        ([], InvalidRequest, "the prompt is empty"),
        ({"prompt_token_ids": [3], "salt": "x"}, InvalidRequest, "the key 'salt': its keys are"),
        ({"prompt_token_ids": [3], "cache_salt": ""}, InvalidRequest, "cache_salt is ''"),
        ([3, VOCAB_SIZE], InvalidRequest, f"token id {VOCAB_SIZE}.*0 to {VOCAB_SIZE - 1}"),
        ([3] * 128, PromptTooLong, "128 tokens.*Shorten the prompt by 1 token"),
        ([3] * 60, PromptTooLong, "needs 4 blocks of 16 tokens, the pool has 3"),
        ("some text", MissingTokenizer, "contains no tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_and_leaves_no_trace(
    folder, prompt, error, sentence
):
    llm = checked(folder, num_blocks=3)
    somebody_else = llm.stream(PROMPTS[0], GREEDY)
    next(somebody_else)
    with pytest.raises(error, match=sentence):
        llm.generate([PROMPTS[2], prompt], GREEDY, use_tqdm=False)
    assert len(llm.engine.unfinished_request_ids) == 1
    *_, (_, last) = somebody_else
    assert tokens([last]) == tokens(run(checked(folder), [PROMPTS[0]]))
    assert_all_blocks_are_back(llm)


@pytest.mark.parametrize(
    "form",
    [
        lambda ids: {"prompt_token_ids": ids},
        lambda ids: [{"prompt_token_ids": ids}],
        lambda ids: [ids],
        lambda ids: tuple(ids),
        lambda ids: torch.tensor(ids),
        lambda ids: [torch.tensor(ids)],
        lambda ids: iter([ids]),
        lambda ids: list(torch.tensor(ids).numpy()),
    ],
)
def test_a_prompt_may_come_in_vllms_forms_or_as_an_array(folder, expected, form):
    [output] = run(checked(folder), form(PROMPTS[0]), MIXED[0])
    assert output.outputs[0].token_ids == expected[0]
    assert output.prompt_token_ids == PROMPTS[0]
    assert all(type(token) is int for token in output.prompt_token_ids)


@pytest.mark.parametrize(
    "prompt", [None, 3, 1.5, b"abc", [1.5], [True], [None], [[None]], [[[3]]], {"prompt": None}]
)
def test_a_value_that_is_no_prompt_is_refused_in_one_sentence(folder, prompt):
    llm = checked(folder)
    with pytest.raises(InvalidRequest, match="give text, a list of token ids"):
        llm.generate(prompt, GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()


def test_no_prompts_give_no_outputs(folder):
    assert run(checked(folder), []) == []


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [None], SamplingParams])
def test_a_value_that_is_no_sampling_params_is_refused(folder, params):
    with pytest.raises(InvalidRequest, match=r"SamplingParams\(...\)"):
        checked(folder).generate([PROMPTS[0]], params, use_tqdm=False)


def test_streams_that_are_open_together_share_the_steps_and_lose_nothing(folder, expected):
    llm = checked(folder)
    one = llm.stream(PROMPTS[:3], MIXED[:3])
    two = llm.stream(PROMPTS[3:], MIXED[3:])
    found: dict[int, list[int]] = {}
    index, output = next(one)
    for index, output in two:
        found[index + 3] = output.outputs[0].token_ids
    middle = run(llm, [PROMPTS[0]], MIXED[0]) if not llm.engine.scheduler.memory.tables else None
    for index, output in one:
        found[index] = output.outputs[0].token_ids
    assert [found[i] for i in range(len(PROMPTS))] == expected
    assert middle is None or tokens(middle) == expected[:1]
    assert_all_blocks_are_back(llm)


def test_unread_outputs_do_not_hide_a_request_added_directly(folder):
    llm = checked(folder)
    one = llm.stream(PROMPTS[:2], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    next(one)
    list(llm.stream(PROMPTS[2], GREEDY))  # the first stream's requests finish meanwhile, unread
    llm.engine.add_request("x", PROMPTS[0], GREEDY)
    with pytest.raises(InvalidRequest, match="added to it directly"):
        llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)


def test_no_leftover_of_a_call_hides_a_request_added_directly(folder):
    llm = checked(folder)
    stream = llm.stream(PROMPTS[:2], GREEDY)
    next(stream)
    stream.close()
    with pytest.raises(PromptTooLong):
        llm.generate([3] * 128, GREEDY, use_tqdm=False)
    llm.engine.add_request("x", PROMPTS[0], GREEDY)
    with pytest.raises(InvalidRequest, match="added to it directly"):
        llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)


def test_streamed_outputs_do_not_change_afterwards(folder):
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=1)
    outputs = [output for _, output in checked(folder).stream(PROMPTS[0], params)]
    assert [len(o.outputs[0].logprobs) for o in outputs] == [1, 2, 3, 4, 5]


def test_changing_the_lists_of_an_output_does_not_change_the_request(folder):
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, repetition_penalty=1.5)
    [expected] = run(checked(folder), PROMPTS[:1], params)
    for _, output in checked(folder).stream(PROMPTS[0], params):
        last = output.prompt_token_ids.copy(), output.outputs[0].token_ids.copy()
        output.prompt_token_ids.append(7)
        output.outputs[0].token_ids.clear()
    assert last == (PROMPTS[0], expected.outputs[0].token_ids)


def test_a_negative_token_id_is_refused(folder):
    with pytest.raises(InvalidRequest, match="token id -1"):
        checked(folder).generate([3, -1], GREEDY, use_tqdm=False)


def test_generate_does_not_run_requests_whose_outputs_it_would_lose(folder):
    llm = checked(folder)
    llm.engine.add_request("llm-0", PROMPTS[0], GREEDY)
    with pytest.raises(InvalidRequest, match="added to it directly"):
        llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    assert llm.engine.has_unfinished_requests()


def test_parameters_that_the_model_cannot_serve_are_refused(folder):
    llm = checked(folder)
    for params, error, sentence in [
        (
            SamplingParams(n=65),
            InvalidRequest,
            "asks for 65 sequences at once .* raise max_num_seqs to 65",
        ),
        (BeamSearchParams(65), InvalidOption, "130 tokens, but the vocabulary has"),
        (SamplingParams(stop="x"), MissingTokenizer, "use stop_token_ids"),
        (SamplingParams(stop_token_ids=[VOCAB_SIZE]), InvalidOption, "stop_token_ids"),
        (SamplingParams(logit_bias={VOCAB_SIZE: 1.0}), InvalidOption, "logit_bias"),
    ]:
        with pytest.raises(error, match=sentence):
            llm.generate(PROMPTS[0], params, use_tqdm=False)
    with pytest.raises(InvalidRequest, match="8 prompts came with 2 sampling_params"):
        llm.generate(PROMPTS, [GREEDY] * 2, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()


def test_two_requests_of_one_name_are_refused(folder):
    engine = checked(folder).engine
    engine.add_request("a", PROMPTS[0], GREEDY)
    with pytest.raises(InvalidRequest, match="'a' is being served"):
        engine.add_request("a", PROMPTS[0], GREEDY)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"device": "tpu9000"}, InvalidOption, "there is no device 'tpu9000'"),
        ({"dtype": "float64"}, InvalidOption, "dtype is 'float64'"),
        ({"attention_backend": "flash"}, InvalidOption, "attention_backend is 'flash'"),
        ({"max_model_len": 129}, InvalidOption, "max_model_len is 129"),
        ({"block_size": 0}, InvalidOption, "block_size is 0"),
        ({"num_blocks": 0}, InvalidOption, "num_blocks is 0"),
        ({"max_num_seqs": 0}, InvalidOption, "max_num_seqs is 0"),
        ({"preemption": "never"}, InvalidOption, "preemption is 'never'"),
    ],
)
def test_an_option_that_cannot_work_is_refused(folder, options, error, sentence):
    with pytest.raises(error, match=sentence):
        LLM(folder, **options)


def test_a_pool_larger_than_the_machine_is_refused(folder):
    with pytest.raises(InvalidOption, match="the machine has"):
        LLM(folder, num_blocks=10**12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_blocks", 1.5),
        ("num_blocks", "4"),
        ("num_swap_blocks", -1),
        ("block_size", "16"),
        ("max_model_len", "8"),
        ("max_model_len", 1),
        ("max_num_seqs", 2.0),
        ("max_num_batched_tokens", 0),
        ("enable_chunked_prefill", "no"),
        ("gpu_memory_utilization", 7),
        ("watermark", "a"),
        ("device", None),
        ("device", "meta"),
        ("dtype", "float65"),
    ],
)
def test_an_option_of_a_wrong_kind_is_refused_by_its_name(folder, name, value):
    with pytest.raises(InvalidOption, match=name):
        LLM(folder, **{name: value})


def test_the_token_budget_grows_with_batch_slots_and_with_whole_prompts(tmp_path):
    folder = make_checkpoint("llama", tmp_path, max_position_embeddings=4096)
    whole = LLM(folder, num_blocks=4, enable_chunked_prefill=False)
    assert whole.engine.config.max_num_batched_tokens == 4096
    many = LLM(folder, num_blocks=4, max_num_seqs=3000)
    assert many.engine.config.max_num_batched_tokens == 3000
    assert LLM(folder, num_blocks=4).engine.config.max_num_batched_tokens == 512


def test_the_pool_holds_the_longest_sequences_or_as_much_as_memory_allows(folder, monkeypatch):
    assert LLM(folder, max_num_seqs=3).engine.config.num_blocks == 3 * 128 // 16
    monkeypatch.setattr("minipaged.engine.build.room_for_blocks", lambda *_: 7)
    assert LLM(folder).engine.config.num_blocks == 7
    monkeypatch.setattr("minipaged.engine.build.SWAP_BYTES", 0)
    assert LLM(folder).engine.config.num_swap_blocks == 1


def test_a_misspelt_option_is_refused(folder):
    with pytest.raises(InvalidOption, match="'num_block': did you mean 'num_blocks'"):
        LLM(folder, num_block=3)


def test_a_missing_model_is_named():
    with pytest.raises(CheckpointError, match=r"no folder 'nowhere'.*storyteller"):
        LLM("nowhere")


def test_an_aborted_request_returns_what_it_has_and_its_blocks(folder):
    llm = checked(folder)
    llm.engine.add_request("a", PROMPTS[0], GREEDY)
    for _ in range(4):
        llm.engine.step()
    output = llm.engine.abort_request("a")
    assert output.outputs[0].finish_reason == "abort"
    assert len(output.outputs[0].token_ids) == 4
    assert llm.engine.abort_request("a") is None
    assert_all_blocks_are_back(llm)


def test_closing_a_stream_aborts_its_unfinished_requests(folder):
    llm = checked(folder)
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.has_unfinished_requests()
    assert_all_blocks_are_back(llm)


# ---- parts ---------------------------------------------------------------------------------------


def test_a_custom_part_is_used_in_its_role(folder, expected):
    calls = []

    class Backwards(BlockAllocator):
        """Hands out the highest block first."""

        def __init__(self, num_blocks: int) -> None:
            super().__init__(num_blocks)
            self._free.reverse()

    def attention(q, k_cache, v_cache, batch, scale):
        calls.append(batch.num_seqs)
        return BACKENDS["reference"].paged_attention(q, k_cache, v_cache, batch, scale)

    llm = checked(folder, parts=Parts(allocator=Backwards, paged_attention=attention))
    assert tokens(run(llm, params=MIXED)) == expected
    assert max(calls) == len(PROMPTS)


def test_a_custom_store_kv_is_called(folder):
    calls = []

    def store(*arguments):
        calls.append(1)
        return BACKENDS["torch"].store_kv(*arguments)

    run(checked(folder, parts=Parts(store_kv=store)), [PROMPTS[0]])
    assert calls


@pytest.mark.parametrize(
    "select_victim", [lambda groups: None, lambda groups: groups[99], lambda groups: 0]
)
def test_a_part_that_fails_is_named_and_every_block_comes_back(folder, select_victim):
    llm = checked(folder, parts=Parts(select_victim=select_victim), num_blocks=8)
    with pytest.raises((InvalidOption, IndexError), match=r"`select_victim` chose|list index"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()
    assert not llm.engine.scheduler.has_unfinished()
    assert_all_blocks_are_back(llm)


def test_attention_to_a_neighbours_block_changes_the_tokens(folder, expected):
    """The proof that these tests would notice a fault."""

    def astray(q, k_cache, v_cache, batch, scale):
        batch.block_tables[:, 0] = batch.block_tables[0, 0]
        return BACKENDS["reference"].paged_attention(q, k_cache, v_cache, batch, scale)

    found = tokens(run(checked(folder, parts=Parts(paged_attention=astray)), params=MIXED))
    assert found != expected


def test_times_are_those_of_the_engines_clock(folder):
    llm = checked(folder)
    ticks = iter(range(1000))
    llm.engine._clock = lambda: float(next(ticks))
    metrics = run(llm, [PROMPTS[0]])[0].metrics
    times = [metrics.arrival_time, metrics.first_token_time, metrics.last_token_time]
    assert all(a < b for a, b in pairwise(times))
    readings = 4  # of the clock per step
    assert metrics.last_token_time - metrics.first_token_time == 31 * readings


# ---- parts that break their contract -------------------------------------------------------------


class BreaksAfterAStep(FCFSScheduler):
    """Fails in the second step, and in every abort after it."""

    steps = 0

    def schedule(self):
        self.steps += 1
        assert self.steps < 2, "the fault itself"
        return super().schedule()

    def abort(self, group):
        raise LookupError("what the fault has led to")


def test_the_first_error_is_reported_even_if_it_causes_others(folder):
    llm = LLM(folder, parts=Parts(scheduler=BreaksAfterAStep))
    with pytest.raises(AssertionError, match="the fault itself"):
        run(llm)
    assert not llm.engine.has_unfinished_requests()


class LosesThoseWhoWait(FCFSScheduler):
    def schedule(self):
        decision = super().schedule()
        self.waiting.clear()
        return decision


def test_a_scheduler_that_loses_a_request_is_named_instead_of_waited_for(folder):
    llm = LLM(folder, max_num_seqs=2, parts=Parts(scheduler=LosesThoseWhoWait))
    with pytest.raises(AssertionError, match="the scheduler has lost llm-2, llm-3"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
