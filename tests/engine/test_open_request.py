"""What the engine keeps of an open request, to rebuild it after a fault."""

import gc
from typing import Any

import pytest

from minipaged import LLM, SamplingParams
from minipaged.engine.open_request import sampled_by_step
from minipaged.sampling.rows import SampledToken, SamplingRow

ONE = SampledToken(5, -0.5)
OTHER = SampledToken(6, -1.5, {6: -1.5, 5: -2.0}, rank=2)
BROKEN = SampledToken(0, 0.0, error="the logits are NaN")
STEPS = {3: {0: [ONE, OTHER]}, 4: {0: [OTHER], 7: [ONE]}, 9: {7: [BROKEN], 0: [ONE]}}
GREEDY = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)


def test_a_history_returns_the_tokens_of_every_step():
    history: list[Any] = []
    for step, sampled in STEPS.items():
        for seq_id, tokens in sampled.items():
            for token in tokens:
                history += (step, seq_id, *token)
    found = sampled_by_step(history)
    assert found == list(STEPS.values())
    assert [list(sampled) for sampled in found] == [[0], [0, 7], [7, 0]]
    assert type(found[0][0][1]) is SampledToken
    assert sampled_by_step([]) == []


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_a_rebuilt_request_has_the_tokens_of_the_steps_up_to_the_last(num_steps):
    engine = LLM("storyteller", num_blocks=64).engine
    params = SamplingParams(n=2, seed=1, max_tokens=20, ignore_eos=True, logprobs=2)
    engine.add_request("0", "Theo the frog", params)
    outputs = [engine.step()[0].output() for _ in range(6)]
    open_request = engine._open["0"]
    open_request.rebuild(num_steps)
    found = open_request.request.completions()
    expected = outputs[num_steps - 1].outputs if num_steps else []
    assert [one for one in found if one.token_ids] == expected


def test_a_decode_step_keeps_no_object_for_the_garbage_collector():
    engine = LLM("storyteller", num_blocks=64, enable_prefix_caching=False).engine
    for number in range(4):
        engine.add_request(str(number), "Theo the frog", GREEDY)
    counts: list[int] = []
    for _ in range(3):
        for _ in range(10):
            engine.step()
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[2] - counts[1] < 10, "less than one per step, and far less than one per token"


def test_the_row_of_a_sample_is_built_once_and_grows_with_it():
    rows: list[SamplingRow] = []
    engine = LLM("storyteller", num_blocks=64).engine
    engine.add_request("0", "Theo the frog", GREEDY)
    request = engine._open["0"].request
    [seq] = request.group.sequences
    for _ in range(3):
        rows += request.rows(seq)
        engine.step()
    assert rows[0] is rows[1] is rows[2]
    assert rows[0].output_token_ids == seq.token_ids[seq.prompt_len :]
