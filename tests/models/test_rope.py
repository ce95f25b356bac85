"""RoPE scaled to a longer context: how long it is, and logits on both sides of the old one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint

from minipaged import LLM, SamplingParams
from minipaged.errors import CheckpointError, InvalidOption, UnsupportedModel
from minipaged.models.llama import LlamaConfig
from minipaged.models.loader import read_model_config
from minipaged.models.rope import rope_frequencies
from minipaged.models.rope_config import RopeConfig

OLD, FACTOR = 32, 4.0
NEW = int(OLD * FACTOR)
YARN = {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": OLD}

# The scaling, and the max_position_embeddings of the same config.json.
SCALINGS: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"rope_type": "linear", "factor": FACTOR}, OLD),
    "yarn, its old context written": (YARN, OLD),
    "yarn, its new context written": (YARN, NEW),
    "yarn, no old context": ({"rope_type": "yarn", "factor": FACTOR}, OLD),
    "yarn, other range": (YARN | {"beta_fast": 4, "beta_slow": 0.5, "truncate": False}, NEW),
    "yarn, attention factor": (YARN | {"attention_factor": 1.5}, NEW),
    "yarn, mscale": (YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, NEW),
    "yarn, mscale of 0": (YARN | {"mscale": 1.0, "mscale_all_dim": 0}, NEW),
}
DYNAMIC = {"rope_type": "dynamic", "factor": FACTOR}


def checkpoint(folder: Path, scaling: dict[str, Any], context: int) -> Path:
    options = {"rope_theta": 500.0, "rope_scaling": scaling, "max_position_embeddings": context}
    return make_checkpoint("llama", folder, **options)


def prompt(length: int) -> list[int]:
    return [(7 * i + i * i) % (VOCAB_SIZE - 3) + 3 for i in range(length)]


def logprobs(folder: Path, token_ids: list[int], backend: str = "torch") -> torch.Tensor:
    """Of all tokens after each position but the last two."""
    llm = LLM(
        folder,
        num_blocks=32,
        attention_backend=backend,
        max_num_batched_tokens=64,
        max_logprobs=-1,
    )
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=VOCAB_SIZE)
    # The last token is left out: the engine needs room for a token after the prompt.
    [output] = llm.generate([token_ids[:-1]], params, use_tqdm=False)
    return torch.tensor(
        [
            [entry[token].logprob for token in range(VOCAB_SIZE)]
            for entry in output.prompt_logprobs[1:]
        ]
    )


def judged(folder: Path, token_ids: list[int]) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0, :-2].log_softmax(-1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", SCALINGS)
def test_logits_are_those_of_transformers_below_and_beyond_the_old_context(
    case: str, backend: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, *SCALINGS[case])
    for token_ids in (prompt(OLD - 4), prompt(NEW)):
        ours, theirs = logprobs(folder, token_ids, backend), judged(folder, token_ids)
        assert theirs.std() > 0.5, "logits too alike to tell a wrong model from a right one"
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("case", [*SCALINGS, "dynamic"])
def test_a_scaling_extends_the_context_by_its_factor_and_no_further(
    case: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, *(SCALINGS | {"dynamic": (DYNAMIC, OLD)})[case])
    assert read_model_config(folder).max_position_embeddings == NEW
    llm = LLM(folder, num_blocks=32)
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    [output] = llm.generate([prompt(OLD + 1)], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == NEW - OLD - 1
    with pytest.raises(InvalidOption, match=f"supports {NEW} tokens"):
        LLM(folder, max_model_len=NEW + 1)


def test_dynamic_scaling_is_that_of_transformers_at_the_extended_context(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, DYNAMIC, OLD)
    token_ids = prompt(NEW)
    theirs = judged(folder, token_ids)
    torch.testing.assert_close(logprobs(folder, token_ids), theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("length", [OLD - 4, NEW // 2])
def test_dynamic_scaling_differs_from_transformers_at_shorter_lengths(
    length: int, tmp_path: Path
) -> None:
    # As the docstring of `rope_frequencies` says: a cached key keeps the theta it was turned with.
    folder = checkpoint(tmp_path, DYNAMIC, OLD)
    token_ids = prompt(length)
    assert (logprobs(folder, token_ids) - judged(folder, token_ids)).abs().max() > 1


def test_with_dynamic_scaling_a_cached_key_equals_a_recomputed_one(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, DYNAMIC, OLD)
    llm = LLM(folder, num_blocks=32)
    params = SamplingParams(temperature=0.0, max_tokens=NEW - 21, ignore_eos=True)
    [output] = llm.generate([prompt(20)], params, use_tqdm=False)
    written = output.outputs[0].token_ids  # token by token, far beyond the old context
    at_once = logprobs(folder, [*prompt(20), *written, 0])
    assert at_once[19:].argmax(-1).tolist() == written


def test_the_yarn_test_covers_pairs_kept_stretched_and_blended() -> None:
    config = RopeConfig.from_hf({"rope_theta": 500.0, "rope_scaling": YARN | {"beta_fast": 4}})
    slowed = rope_frequencies(RopeConfig(theta=500.0), 24) / rope_frequencies(config, 24)
    assert slowed.max() == pytest.approx(FACTOR)
    assert slowed.min() == pytest.approx(1.0)
    assert ((slowed > 1.1) & (slowed < 3.9)).any()


def test_the_old_context_outside_the_scaling_has_precedence() -> None:
    hf = {"rope_scaling": YARN, "original_max_position_embeddings": 2 * OLD}
    assert RopeConfig.from_hf(hf).old_context == 2 * OLD


def test_a_head_of_two_elements_has_one_pair_independent_of_theta() -> None:
    config = RopeConfig.from_hf({"rope_scaling": DYNAMIC, "max_position_embeddings": OLD})
    assert rope_frequencies(config, 2).tolist() == [1.0]


def llama(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 101,
        "max_position_embeddings": OLD,
    } | changes


LINEAR = {"type": "linear", "factor": 2.0}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a list": ({"rope_scaling": [1]}, r"rope_scaling as \[1\]"),
    "text": ({"rope_scaling": "linear"}, "rope_scaling as 'linear'"),
    "a number": ({"rope_parameters": 2}, "rope_parameters as 2"),
    "type null": ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "names no rope_type"),
    "no type": ({"rope_scaling": {"factor": 2.0}}, "names no rope_type"),
    "factor as text": ({"rope_scaling": LINEAR | {"factor": "2"}}, "factor as '2'"),
    "factor as a list": ({"rope_scaling": LINEAR | {"factor": [2]}}, r"factor as \[2\]"),
    "factor true": ({"rope_scaling": LINEAR | {"factor": True}}, "factor as True"),
    "factor null": ({"rope_scaling": LINEAR | {"factor": None}}, "gives no 'factor'"),
    "factor NaN": ({"rope_scaling": LINEAR | {"factor": float("nan")}}, "factor as nan"),
    "factor below 1": ({"rope_scaling": LINEAR | {"factor": 0.5}}, "by the factor 0.5"),
    "factor huge": ({"rope_scaling": LINEAR | {"factor": 1e308}}, "by the factor 1e"),
    "theta of 1": ({"rope_theta": 1.0}, "rope_theta as 1"),
    "old context as text": (
        {"rope_scaling": YARN | {"original_max_position_embeddings": "32"}},
        "original_max_position_embeddings as '32'",
    ),
    "yarn's range upside down": (
        {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}},
        "beta_fast as 1, below beta_slow, which is 32",
    ),
    "truncate as text": ({"rope_scaling": YARN | {"truncate": "no"}}, "truncate as 'no'"),
    "attention factor 0": (
        {"rope_scaling": YARN | {"attention_factor": 0}},
        "attention_factor as 0",
    ),
    "mscale as text": (
        {"rope_scaling": YARN | {"mscale": "1", "mscale_all_dim": 1.0}},
        "mscale as '1'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_invalid_scaling_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    changes, sentence = BROKEN[case]
    (tmp_path / "config.json").write_text(json.dumps(llama(**changes)))
    with pytest.raises(CheckpointError, match=sentence) as refused:
        read_model_config(tmp_path)
    assert refused.type is CheckpointError
    assert str(refused.value).count(". ") == 0


@pytest.mark.parametrize(
    ("scaling", "sentence"),
    [
        ({"type": "mrope", "mrope_section": [1, 2, 3]}, "RoPE as 'mrope', but only default, lin"),
        ({"rope_type": "longrope", "factor": 2.0}, "RoPE as 'longrope'"),
        ({"full_attention": LINEAR}, "several sets of RoPE parameters"),
    ],
)
def test_an_unsupported_scaling_is_refused(scaling: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModel, match=sentence):
        LlamaConfig.from_hf(llama(rope_parameters=scaling))
