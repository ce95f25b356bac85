"""Whole runs against `transformers`, by family: the same tokens, whatever happens to blocks.

Each row takes a small random checkpoint through `LLM.generate`: prompts of different lengths that
share a prefix, in a pool so small that blocks are found again, taken away and brought back. Then
`transformers` generates after each prompt alone.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LLAMA3_SCALING, VOCAB_SIZE, make_checkpoint

from minipaged import LLM, Parts, SamplingParams
from minipaged.errors import InvalidOption, PromptTooLong
from minipaged.tracing.events import Event, EventLog

MAX_TOKENS = 16
LENGTHS = (40, 17, 29, 22, 33, 16)  # of the prompts
SHARED = 16  # tokens with which they all begin: four blocks
WINDOW = LENGTHS[0] + MAX_TOKENS  # that of one row, filled to its last token

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "opt_350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_rope_scaled": ("llama", {"rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING}),
    "mistral": ("mistral", {}),
    "mistral_windowed": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)


def tokens(length: int, first: int) -> list[int]:
    return [(7 * i + 11 * first + i * i) % (VOCAB_SIZE - 3) + 3 for i in range(length)]


PROMPTS = [tokens(SHARED, 0) + tokens(length - SHARED, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """A family's checkpoint, saved in this dtype; made once."""

    @functools.cache
    def make(family: str, saved: torch.dtype) -> Path:
        name, options = FAMILIES[family]
        folder = tmp_path_factory.mktemp(f"{family}-{saved}")
        return make_checkpoint(name, folder, dtype=saved, **options)

    return make


@functools.cache
def written_by_transformers(folder: Path) -> list[list[int]]:
    """Its greedy tokens after each prompt alone, in float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    written = []
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        written.append(output[0, len(prompt) :].tolist())
    return written


def assert_the_engine_writes_the_same(folder: Path, preemption: str) -> None:
    events: list[Event] = []
    llm = LLM(
        folder,
        preemption=preemption,
        enable_prefix_caching=True,
        block_size=4,
        num_blocks=24,  # the longest sequence alone needs 14
        num_swap_blocks=100,
        max_num_seqs=8,
        max_num_batched_tokens=24,  # the longest prompts are computed in parts
        parts=Parts().checked().traced(EventLog(events.append)),
    )
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == written_by_transformers(folder)
    # The run met all that it was meant to meet.
    assert sum(output.num_cached_tokens >= SHARED - 4 for output in outputs) >= 3
    modes = [event.fields["mode"] for event in events if event.event == "preempt"]
    assert len(modes) == sum(output.metrics.num_preemptions for output in outputs) >= 2
    assert set(modes) == {preemption}
    assert any(event.event == "swap_in" for event in events) == (preemption == "swap")


@pytest.mark.sampled
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_writes_what_transformers_writes(
    family: str, preemption: str, checkpoint: Any
) -> None:
    assert_the_engine_writes_the_same(checkpoint(family, torch.float32), preemption)


@pytest.mark.sampled
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_writes_it_from_a_checkpoint_in_bfloat16_too(
    family: str, preemption: str, checkpoint: Any
) -> None:
    assert_the_engine_writes_the_same(checkpoint(family, torch.bfloat16), preemption)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_engine_is_as_exact_as_transformers(family: str, checkpoint: Any) -> None:
    import transformers

    folder = checkpoint(family, torch.bfloat16)
    llm = LLM(
        folder,
        dtype="bfloat16",
        block_size=4,
        num_blocks=24,
        max_num_batched_tokens=64,
        max_logprobs=-1,
    )
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=VOCAB_SIZE)
    [output] = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    ours = torch.tensor(
        [
            [entry[token].logprob for token in range(VOCAB_SIZE)]
            for entry in output.prompt_logprobs[1:]
        ]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    exact = logprobs(model, PROMPTS[0])
    for parameter in model.parameters():  # model.to() would round the rotary frequencies as well
        parameter.data = parameter.data.bfloat16()
    theirs = logprobs(model, PROMPTS[0])
    # The same roundings in another order: neither is the other's truth, float32 is that of both.
    assert (ours - exact).abs().mean() < 1.3 * (theirs - exact).abs().mean()
    assert (ours - exact).abs().mean() < 0.05 * exact.std()


def logprobs(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)


def test_lengths_beyond_the_sliding_window_are_refused(checkpoint: Any) -> None:
    folder = checkpoint("mistral_windowed", torch.float32)
    with pytest.raises(
        InvalidOption, match=f"max_model_len is {WINDOW + 1}, .* supports {WINDOW} tokens"
    ):
        LLM(folder, max_model_len=WINDOW + 1)
    llm = LLM(folder)
    [output] = llm.generate([tokens(WINDOW - 1, 0)], GREEDY, use_tqdm=False)
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (1, "length")
    with pytest.raises(PromptTooLong, match="Shorten the prompt by 1 token"):
        llm.generate([tokens(WINDOW, 0)], GREEDY, use_tqdm=False)
