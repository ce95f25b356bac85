"""What a step returns, what is built from it on demand, and what listeners receive."""

from itertools import pairwise

import pytest
from engine_runs import tokens

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.engine.metrics import StepStats
from minipaged.engine.outputs import Progress, RequestOutputKind
from minipaged.engine.request import Request

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
TEXT = "Once upon a time Theo the frog put the white key in the meadow."


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("storyteller", block_size=4)


def steps(llm: LLM, *requests: tuple[str, object]) -> list[list[Progress]]:
    """All steps of these requests, each a prompt and its parameters."""
    for number, (prompt, params) in enumerate(requests):
        llm.engine.add_request(str(number), prompt, params)
    made: list[list[Progress]] = []
    while llm.engine.has_unfinished_requests():
        made.append(llm.engine.step())
    return made


def greedy(max_tokens: int, **options) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


def test_progress_adds_up_to_the_output(llm):
    params = [greedy(9, logprobs=2), SamplingParams(n=3, max_tokens=7, seed=1, logprobs=0)]
    finished = {}
    text: dict[tuple[str, int], str] = {}
    token_ids: dict[tuple[str, int], list[int]] = {}
    logprobs: dict[tuple[str, int], list[dict[int, float]]] = {}
    for progresses in steps(llm, (TEXT, params[0]), ("Mia", params[1])):
        for progress in progresses:
            for new in progress.new:
                key = progress.request_id, new.completion
                text[key] = text.get(key, "") + new.text
                token_ids.setdefault(key, []).extend(new.token_ids)
                logprobs.setdefault(key, []).extend(new.logprobs)
            if progress.finished:
                finished[progress.request_id] = progress.output()
    assert [len(finished[name].outputs) for name in "01"] == [1, 3]
    for name, output in finished.items():
        for completion in output.outputs:
            key = name, completion.index
            assert text[key] == completion.text
            assert token_ids[key] == completion.token_ids
            assert logprobs[key] == completion.logprobs


def test_a_step_tells_of_each_token_and_each_end_once(llm):
    params = SamplingParams(n=4, max_tokens=12, seed=3, stop=["the"])
    ends: list[int] = []
    for progresses in steps(llm, (TEXT, params)):
        for new in (new for progress in progresses for new in progress.new):
            assert new.token_ids or new.finish_reason
            assert new.completion not in ends, "a sample goes on after its end"
            if new.finish_reason is not None:
                ends.append(new.completion)
    assert sorted(ends) == [0, 1, 2, 3]


def test_an_output_is_cumulative_or_a_delta(llm):
    *_, [last] = steps(llm, (TEXT, greedy(5)))
    assert last.output(FINAL_ONLY) == last.output(CUMULATIVE) == last.output()
    [whole] = last.output().outputs
    [delta] = last.output(DELTA).outputs
    assert delta.token_ids == whole.token_ids[-1:]
    assert whole.text.endswith(delta.text)
    assert (delta.finish_reason, delta.index) == ("length", 0)
    assert last.output(DELTA).prompt_token_ids == last.output().prompt_token_ids


def test_the_output_kind_of_a_request_decides_what_its_steps_give(llm):
    pieces = {}
    for kind in RequestOutputKind:
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, output_kind=kind)
        llm.engine.add_request("0", TEXT, params)
        pieces[kind] = []
        while llm.engine.has_unfinished_requests():
            pieces[kind] += [progress.outputs[0].token_ids for progress in llm.engine.step()]
    whole = pieces[FINAL_ONLY][0]
    assert pieces[CUMULATIVE] == [whole[:length] for length in (1, 2, 3, 4, 5)]
    assert pieces[DELTA] == [[token] for token in whole]
    assert pieces[FINAL_ONLY] == [whole]


def test_a_progress_is_read_like_the_results_of_a_step_in_vllm(llm):
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=1, prompt_logprobs=1)
    *_, [last] = steps(llm, (TEXT, params))
    output = last.output()
    for name in ("outputs", "prompt", "prompt_token_ids", "prompt_logprobs", "metrics"):
        assert getattr(last, name) == getattr(output, name)
    assert output.outputs[0].finished()
    assert (output.request_id, output.finished) == (last.request_id, last.finished)


def test_streams_that_share_their_steps_lose_no_delta(llm):
    params = SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, logprobs=0, output_kind=DELTA
    )
    fast, slow = llm.stream(TEXT, params), llm.stream([TEXT, "Nell"], params)
    [alone] = llm.generate(TEXT, params, use_tqdm=False)
    next(slow)
    list(fast)  # runs steps that the other stream does not read one by one
    read = [(1, output) for index, output in [*slow] if index == 0]
    tokens = [token for _, output in read for token in output.outputs[0].token_ids]
    assert tokens == alone.outputs[0].token_ids[1:]
    assert sum(len(output.outputs[0].logprobs) for _, output in read) == 5


def test_a_cumulative_output_grows_by_a_token_per_step(llm):
    llm.engine.add_request("0", TEXT, greedy(6))
    lengths: list[int] = []
    while llm.engine.has_unfinished_requests():
        [progress] = llm.engine.step()
        lengths.append(len(progress.output().outputs[0].token_ids))
    assert lengths == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "params",
    [
        BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True),
        SamplingParams(n=2, best_of=3, max_tokens=5, seed=1, ignore_eos=True),
    ],
    ids=["beams", "best_of"],
)
def test_outputs_that_are_decided_at_the_end_come_in_one_progress_record(llm, params):
    made = steps(llm, (TEXT, params))
    assert [len(step) for step in made] == [0, 0, 0, 0, 1]
    [progress] = made[-1]
    output = progress.output()
    assert progress.finished
    assert [new.token_ids for new in progress.new] == [o.token_ids for o in output.outputs]
    assert progress.output(DELTA).outputs[0].token_ids == output.outputs[0].token_ids


def test_generate_builds_the_output_of_each_request_once(llm, monkeypatch):
    built: list[str] = []
    build = Request.output

    def counted(self):
        built.append(self.group.request_id)
        return build(self)

    monkeypatch.setattr(Request, "output", counted)
    outputs = llm.generate([TEXT, "Mia"], [greedy(9), greedy(4)], use_tqdm=False)
    assert sorted(built) == sorted(output.request_id for output in outputs)


def test_listeners_receive_the_statistics_of_each_step():
    llm = LLM("storyteller", block_size=4)
    heard: list[StepStats] = []
    llm.engine.listeners.append(lambda decision, stats: heard.append(stats))
    llm.generate([TEXT, TEXT], greedy(4), use_tqdm=False)
    prompt_len = len(llm.get_tokenizer().encode(TEXT))
    first = heard[0]
    # Of two equal prompts the second waits a step for the blocks of the first.
    assert (first.num_running, first.num_waiting, first.num_swapped) == (1, 1, 0)
    assert (first.num_sequences, first.num_tokens, first.num_cached_tokens) == (1, prompt_len, 0)
    assert sum(stats.num_queried_tokens for stats in heard) == 2 * prompt_len
    assert heard[1].num_cached_tokens == (prompt_len - 1) // 4 * 4 > 0
    assert all(stats.num_blocks_in_use <= stats.num_blocks for stats in heard)
    assert all(stats.schedule_seconds + stats.run_seconds >= 0 for stats in heard)
    assert all(later.step == earlier.step + 1 for earlier, later in pairwise(heard))
    assert heard[-1].num_preempted == 0


def test_without_a_listener_no_statistics_are_collected(llm, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a step without listeners counts nothing")

    monkeypatch.setattr(StepStats, "of", refuse)
    assert tokens(llm.generate([TEXT], greedy(3), use_tqdm=False))
