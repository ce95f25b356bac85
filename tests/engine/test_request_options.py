"""Options of a request other than the choice of tokens: text, prompt, its own functions."""

import itertools
import pickle
import time

import pytest
import torch
from checkpoints import make_checkpoint
from engine_runs import assert_all_blocks_are_back

from minipaged import LLM, Parts, RequestOutput, SamplingParams
from minipaged.engine.outputs import CompletionOutput
from minipaged.errors import InvalidOption, MissingTokenizer, PromptTooLong, RequestFailed

TEXT = "Once upon a time Theo the frog put the white key in the meadow."


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("storyteller", num_blocks=64)


def output(llm: LLM, prompt=TEXT, **options) -> RequestOutput:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **options})
    [found] = llm.generate(prompt, params, use_tqdm=False)
    assert_all_blocks_are_back(llm)
    return found


def completion(llm: LLM, **options) -> CompletionOutput:
    return output(llm, **options).outputs[0]


# ---- text ----------------------------------------------------------------------------------------


def test_a_request_without_text_has_the_same_tokens_and_no_decoded_token(llm):
    silent = completion(llm, detokenize=False, logprobs=1)
    usual = completion(llm, logprobs=1)
    assert (silent.text, silent.token_ids) == ("", usual.token_ids)
    assert {each.decoded_token for entry in silent.logprobs for each in entry.values()} == {None}
    assert [entry.keys() for entry in silent.logprobs] == [entry.keys() for entry in usual.logprobs]


def test_a_stop_string_that_is_kept_ends_the_text(llm):
    text = completion(llm).text
    stop = text[4:9]
    cut, kept = completion(llm, stop=stop), completion(llm, stop=[stop, "never"], **KEEPS)
    assert kept.text == cut.text + stop == text[: text.index(stop) + len(stop)]
    assert kept.token_ids == cut.token_ids
    assert kept.stop_reason == cut.stop_reason == stop


KEEPS = {"include_stop_str_in_output": True}


def test_the_pieces_of_a_kept_stop_string_add_up_to_it(llm):
    stop = completion(llm).text[4:9]
    params = SamplingParams(temperature=0.0, max_tokens=8, stop=[stop], **KEEPS)
    *_, (_, last) = llm.stream(TEXT, params)
    texts = [found.outputs[0].text for _, found in llm.stream(TEXT, params)]
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    assert texts[-1] == last.outputs[0].text
    assert texts[-1].endswith(stop)


def test_the_end_token_is_shown_only_with_special_tokens_and_stop_strings(llm):
    end = llm.get_tokenizer().eos_token_id
    asked = {"ignore_eos": False, "logit_bias": {end: 100}}
    assert completion(llm, **asked).text == ""
    assert completion(llm, skip_special_tokens=False, **asked).text == ""
    assert completion(llm, **KEEPS, **asked).text == ""
    shown = completion(llm, skip_special_tokens=False, **KEEPS, **asked)
    assert (shown.text, shown.token_ids) == (llm.get_tokenizer().eos_token, [end])


# ---- the prompt ----------------------------------------------------------------------------------


def test_a_prompt_is_truncated_to_its_last_tokens(llm):
    ids = llm.get_tokenizer().encode(TEXT)
    found = output(llm, truncate_prompt_tokens=5)
    assert (found.prompt_token_ids, found.prompt) == (ids[-5:], TEXT)
    assert found.outputs == output(llm, ids[-5:]).outputs
    assert output(llm, truncate_prompt_tokens=1000).prompt_token_ids == ids


def test_a_prompt_that_is_too_long_fits_once_it_is_truncated(llm):
    long = TEXT * 200
    with pytest.raises(PromptTooLong):
        output(llm, long)
    found = output(llm, long, truncate_prompt_tokens=-1)
    assert len(found.prompt_token_ids) == llm.engine.config.max_model_len - 1
    assert len(found.outputs[0].token_ids) == 1


# ---- its own functions ---------------------------------------------------------------------------


def never(token: int):
    def process(output_token_ids, logits):
        logits[token] = -torch.inf
        return logits

    return process


def test_a_logits_processor_changes_the_tokens_of_its_own_request_only(llm):
    [first, *_] = completion(llm).token_ids
    asked = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    params = [SamplingParams(**asked), SamplingParams(**asked, logits_processors=[never(first)])]
    alone, changed = llm.generate([TEXT, TEXT], params, use_tqdm=False)
    assert alone.outputs[0].token_ids == completion(llm).token_ids
    assert first not in changed.outputs[0].token_ids
    assert changed.outputs[0].token_ids == completion(llm, logit_bias={first: -100}).token_ids


def test_a_logits_processor_of_three_arguments_gets_the_prompt_too(llm):
    seen = []

    def note(prompt_token_ids, output_token_ids, logits):
        seen.append((list(prompt_token_ids), list(output_token_ids)))
        return logits

    found = output(llm, logits_processors=note, max_tokens=3)
    tokens = found.outputs[0].token_ids
    assert seen == [(found.prompt_token_ids, tokens[:length]) for length in range(3)]


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (lambda logits: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda logits: None, "TypeError: a logits processor returned NoneType"),
        (lambda logits: logits[:5], r"TypeError: a logits processor returned \(5,\)"),
    ],
    ids=["raises", "nothing", "too short"],
)
def test_a_faulty_logits_processor_ends_its_own_request_and_no_other(llm, result, sentence):
    def process(output_token_ids, logits):
        return result(logits) if len(output_token_ids) == 3 else logits

    stream = llm.stream([TEXT, "Nell"], SamplingParams(temperature=0, max_tokens=8, seed=1))
    next(stream)
    with pytest.raises(RequestFailed, match=sentence):
        llm.generate("Mia", SamplingParams(temperature=0, logits_processors=[process], **FORKS))
    last = dict(stream)
    expected = llm.generate([TEXT, "Nell"], SamplingParams(temperature=0, max_tokens=8))
    for index, found in enumerate(expected):
        assert last[index].outputs[0].token_ids == found.outputs[0].token_ids
    assert_all_blocks_are_back(llm)


FORKS = {"ignore_eos": True}


def test_a_part_adjusts_the_logits_of_all_requests():
    def no_spaces(logits, rows):
        assert len(rows) == len(logits)
        logits[:, ids] = -torch.inf
        return logits

    llm = LLM("storyteller", num_blocks=32, parts=Parts(adjust_logits=no_spaces))
    tokenizer = llm.get_tokenizer()
    ids = [i for i in range(len(tokenizer)) if tokenizer.token_bytes(i).startswith(b" ")]
    params = [SamplingParams(temperature=t, seed=1, max_tokens=8) for t in (0.0, 1.0)]
    for found in llm.generate([TEXT, TEXT], params, use_tqdm=False):
        assert not set(found.outputs[0].token_ids) & set(ids)


@pytest.mark.parametrize("name", ["priority", "lora_request", "arrival_time", "trace_headers"])
def test_other_request_options_of_vllm_are_refused_by_name(llm, name):
    with pytest.raises(InvalidOption, match=f"^{name} is 5, but .+: leave it out"):
        llm.engine.add_request("0", TEXT, **{name: 5})
    llm.engine.add_request("0", TEXT, **{name: None})
    llm.engine.abort_request("0")
    with pytest.raises(InvalidOption, match="there is no option 'prio'"):
        llm.engine.add_request("0", TEXT, prio=1)


# ---- the request's own copy ----------------------------------------------------------------------


def test_parameters_that_change_later_do_not_change_an_open_request(llm):
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, stop_token_ids=[])
    stream = llm.stream(TEXT, params)
    next(stream)
    params.max_tokens = 2
    params.stop_token_ids += range(700)
    *_, (_, last) = stream
    assert last.outputs[0].token_ids == completion(llm).token_ids


def test_parameters_made_invalid_later_are_refused_by_the_next_request(llm):
    params = SamplingParams()
    params.top_p = 7
    with pytest.raises(InvalidOption, match="top_p is 7: choose a number above 0"):
        llm.generate(TEXT, params, use_tqdm=False)
    assert_all_blocks_are_back(llm)


def test_options_that_need_a_tokenizer_are_refused_without_one(tmp_path):
    llm = LLM(make_checkpoint("llama", tmp_path), num_blocks=16)
    for asked in ({"stop": "a"}, {"bad_words": ["a"]}):
        with pytest.raises(MissingTokenizer):
            llm.generate([[3, 4]], SamplingParams(**asked), use_tqdm=False)


def test_the_whole_vocabulary_is_reported_only_where_the_engine_allows_it(llm):
    with pytest.raises(InvalidOption, match="logprobs is -1, which asks for the whole vocabulary"):
        output(llm, logprobs=-1)
    generous = LLM("storyteller", num_blocks=32, max_logprobs=-1)
    [entry] = completion(generous, logprobs=-1, max_tokens=1).logprobs
    assert sorted(each.rank for each in entry.values()) == list(range(1, 766))


# ---- times ---------------------------------------------------------------------------------------


def test_times_are_those_of_the_wall_clock_and_in_order(llm):
    before = time.time()
    metrics = output(llm).metrics
    moments = [
        metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time,
        metrics.last_token_time, metrics.finished_time,
    ]  # fmt: skip
    assert moments == sorted(moments)
    assert before - 1 < moments[0] <= moments[-1] < time.time() + 1
    assert metrics.time_in_queue == moments[1] - moments[0]
    assert metrics.first_token_latency == moments[2] - moments[0]
    assert pickle.loads(pickle.dumps(metrics)) == metrics


def test_a_waiting_request_has_only_its_arrival_time(llm):
    llm.engine.add_request("0", TEXT)
    metrics = llm.engine.abort_request("0").metrics
    assert metrics.first_scheduled_time is metrics.time_in_queue is metrics.first_token_time is None
    assert metrics.finished_time >= metrics.arrival_time
