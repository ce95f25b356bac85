"""Every option and argument with every kind of wrong value: it works, or one sentence says why not.

A value of a wrong type, a number that no machine can hold, a list where a name belongs: whatever it
is, nothing but `MinipagedError` may come out, with the parameter's name and in one line.
"""

from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from minipaged import LLM, BeamSearchParams, MinipagedError, SamplingParams
from minipaged.config import OPTIONS
from minipaged.errors import InvalidOption


class Unshown:
    """Even its repr raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def hostile() -> list[object]:
    """New each time, for some of them are used up."""
    whole = [0, 1, -1, 3, 10**4, 10**9, 10**12, 10**15, 2**31, 2**63 - 1, 2**63, 2**64, 2**70]
    whole += [2**200, 10**30, -(2**63), -(10**30), 10**5_000, -(10**5_000)]
    reals = [0.0, -0.0, 0.5, 1.0, 5e-324, 1e-320, 1e-45, 1e-38, 1e38, 3.4e38, 1e39, 1e308]
    reals += [float("inf"), -float("inf"), float("nan"), Fraction(1, 3), Fraction(10**400)]
    texts = ["", "12", "auto", "x" * 5_000, "\0", "\ud800", b"", b"12", Path("x"), Path("\0")]
    lists = [[], [1], ["a"], ["torch"], ["float16"], [[1]], [None], (), (1,), {1}, range(3)]
    dicts = [{}, {"a": 1}, {1: 2}]
    arrays = [np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array(3)]
    arrays += [np.array([1, 2]), np.array(["a"]), torch.tensor(3), torch.tensor([1, 2])]
    others = [None, True, False, 1j, Decimal(1), object(), Unshown(), int, len, iter([1]), ...]
    return [*whole, *reals, *texts, *lists, *dicts, *arrays, *others]


def refusal(call, *positional, **named) -> MinipagedError | None:
    """What a call is refused with; None if it works. Anything else that it raises is raised."""
    try:
        call(*positional, **named)
    except MinipagedError as error:
        refused = error
    else:
        return None
    assert "\n" not in str(refused)
    assert len(str(refused)) < 600, "a message quotes a value at full length"
    return refused


def check_all(name: str, call) -> None:
    """Call with each hostile value; a refused option is named."""
    num_refused = 0
    for value in hostile():
        error = refusal(call, value)
        num_refused += error is not None
        if isinstance(error, InvalidOption):
            assert name == error.param or name in str(error)
    assert num_refused > 20


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("storyteller", num_blocks=32, max_model_len=16)


@pytest.fixture(autouse=True)
def nothing_stays_behind(request):
    yield
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm").engine
        assert not engine.has_unfinished_requests()
        memory = engine.scheduler.memory
        assert memory.num_free == memory.num_blocks


@pytest.mark.parametrize("name", [*OPTIONS, "parts"])
def test_the_engine_accepts_or_refuses_every_hostile_option(name):
    small = {} if name == "model" else {"num_blocks": 8, "block_size": 4, "max_num_seqs": 4}
    check_all(name, lambda value: LLM(**{**small, name: value}))


@pytest.mark.parametrize("memory", ["contiguous-max", "contiguous-pow2", "static", "virtual"])
@pytest.mark.parametrize(
    "name", ["block_size", "num_blocks", "max_num_seqs", "max_model_len", "max_num_batched_tokens"]
)
def test_a_baseline_accepts_or_refuses_every_hostile_size(memory, name):
    for value in (10**6, 10**9, 10**12, 10**15, 2**62, 2**63, 2**70):
        error = refusal(LLM, **{"memory": memory, "num_blocks": 64, "block_size": 4, name: value})
        assert error is not None or name == "max_num_batched_tokens" or value == 10**6


GREEDY = {"temperature": 0.0, "max_tokens": 1}
SAMPLED = {"temperature": 1.0, "max_tokens": 1}
SAMPLING = [each.name for each in fields(SamplingParams) if each.init]
BEAM = [each.name for each in fields(BeamSearchParams) if each.init]


@pytest.mark.parametrize("others", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_params_accept_or_refuse_every_hostile_option(llm, name, others):
    def ask(value: object) -> None:
        params = SamplingParams(**{**others, name: value})
        [output] = llm.generate([[5, 6]], params, use_tqdm=False)
        assert all(0 <= token < 765 for one in output.outputs for token in one.token_ids)

    check_all(name, ask)


@pytest.mark.parametrize("name", BEAM)
def test_beam_search_accepts_or_refuses_every_hostile_option(llm, name):
    def ask(value: object) -> None:
        params = BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, name: value})
        llm.generate([[5, 6]], params, use_tqdm=False)

    check_all(name, ask)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "logit_bias"])
def test_hostile_elements_of_lists_and_dicts_are_accepted_or_refused(llm, name):
    def ask(value: object) -> None:
        given = {1: value} if name == "logit_bias" else [value]
        llm.generate([[5, 6]], SamplingParams(**{**GREEDY, name: given}), use_tqdm=False)

    check_all(name, ask)


MESSAGE = {"role": "user", "content": "a"}
ONE = SamplingParams(**GREEDY)
OPTIONS_OF_CHAT = ["chat_template", "add_generation_prompt", "continue_final_message", "tools"]
ARGUMENTS = {
    "a prompt": lambda llm, value: llm.generate(value, ONE, use_tqdm=False),
    "one of many prompts": lambda llm, value: llm.generate(["a", value], ONE, use_tqdm=False),
    "a token id": lambda llm, value: llm.generate([[1, value]], ONE, use_tqdm=False),
    "a streamed prompt": lambda llm, value: list(llm.stream(value, ONE)),
    "sampling_params": lambda llm, value: llm.generate("a", value, use_tqdm=False),
    "one of sampling_params": lambda llm, value: llm.generate(["a"], [value], use_tqdm=False),
    "use_tqdm": lambda llm, value: llm.generate("a", ONE, value),
    "params of beam_search": lambda llm, value: llm.beam_search("a", value, use_tqdm=False),
    "a prefix": lambda llm, value: llm.cache_prefix(value),
    "a released prefix": lambda llm, value: llm.release_prefix(value),
    "a request id": lambda llm, value: (
        llm.engine.add_request(value, "a", ONE),
        llm.engine.abort_request(value),
    ),
    "messages": lambda llm, value: llm.chat(value, ONE, use_tqdm=False),
    "a message": lambda llm, value: llm.chat([MESSAGE, value], ONE, use_tqdm=False),
    "a conversation": lambda llm, value: llm.chat([[MESSAGE], value], ONE, use_tqdm=False),
    **{
        f"a prompt's {key}": lambda llm, value, key=key: llm.generate(
            {"prompt_token_ids": [1], key: value}, ONE, use_tqdm=False
        )
        for key in ("prompt", "prompt_token_ids", "cache_salt", "no_such_key")
    },
    **{
        f"a message's {key}": lambda llm, value, key=key: llm.chat(
            [{**MESSAGE, key: value}], ONE, use_tqdm=False
        )
        for key in ("role", "content")
    },
    **{
        f"chat's {name}": lambda llm, value, name=name: llm.chat(
            [MESSAGE], ONE, use_tqdm=False, **{name: value}
        )
        for name in [*OPTIONS_OF_CHAT, "chat_template_kwargs", "no_such_option"]
    },
}


@pytest.mark.filterwarnings("ignore")  # of a progress bar, if one is asked for
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_every_hostile_argument_of_a_call_is_accepted_or_refused(llm, argument):
    refused = [refusal(ARGUMENTS[argument], llm, value) for value in hostile()]
    assert sum(error is not None for error in refused) > 20


def test_a_key_that_is_not_text_is_refused(llm):
    for value in hostile():
        if type(value).__hash__ is not None:
            refusal(llm.generate, {"prompt": "a", value: 1}, ONE, use_tqdm=False)
            refusal(llm.chat, [{**MESSAGE, value: 1}], ONE, use_tqdm=False)
            refusal(llm.generate, "a", {value: 1}, use_tqdm=False)
            refusal(lambda value=value: SamplingParams(logit_bias={value: 1}))
