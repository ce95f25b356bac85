"""Every family of models, compared with `transformers`."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    LINEAR_SCALING,
    LLAMA3_SCALING,
    VOCAB_SIZE,
    make_checkpoint,
    make_checkpoints,
)
from torch import Tensor

from minipaged.attention.backend import BACKENDS, AttentionBackend
from minipaged.attention.batch import Batch, BatchBuilder
from minipaged.attention.kv_cache import KVCache
from minipaged.attention.reference import causal_attention
from minipaged.memory import BlockTable
from minipaged.models.base import Model
from minipaged.models.loader import load_model
from minipaged.models.rope import rope_frequencies
from minipaged.models.rope_config import RopeConfig
from minipaged.scheduler.output import SequenceInput, StepInput
from minipaged.worker.model_runner import ModelRunner

BLOCK_SIZE = 4
NUM_BLOCKS = 64
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2, other options": (
        "gpt2",
        {"n_inner": 40, "layer_norm_epsilon": 0.1, "activation_function": "gelu"},
    ),
    "opt": ("opt", {}),
    "opt, untied": ("opt", {"tie_word_embeddings": False}),
    "opt, 350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt, norms after": ("opt", {"do_layer_norm_before": False}),
    "opt, narrow embedding": ("opt", {"word_embed_proj_dim": 24, "tie_word_embeddings": False}),
    "llama, all heads alike": ("llama", {"num_key_value_heads": 4}),
    "llama, grouped": ("llama", {}),
    "llama, one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, rope theta": ("llama", {"rope_theta": 500.0}),
    "llama, rope linear": ("llama", {"rope_theta": 500.0, "rope_scaling": LINEAR_SCALING}),
    "llama, rope llama3": ("llama", {"rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING}),
    "llama, other options": ("llama", {"head_dim": 32, "rms_norm_eps": 0.1, "hidden_act": "gelu"}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(VARIANTS, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def judge(checkpoints: dict[str, Path]):
    """The same checkpoint in transformers, loaded once."""
    from transformers import AutoModelForCausalLM

    loaded: dict[str, Any] = {}

    def load(variant: str) -> Any:
        if variant not in loaded:
            loaded[variant] = AutoModelForCausalLM.from_pretrained(checkpoints[variant])
        return loaded[variant]

    return load


class Paged:
    """Runs a model step by step over a pool whose blocks are dealt out in random order."""

    def __init__(self, model: Model, backend: str = "reference") -> None:
        self.cache = KVCache(model.config, NUM_BLOCKS, BLOCK_SIZE)
        batches = BatchBuilder(8, NUM_BLOCKS, BLOCK_SIZE)
        self.runner = ModelRunner(model, BACKENDS[backend], self.cache, batches)
        self.free = list(range(NUM_BLOCKS))
        random.Random(0).shuffle(self.free)
        self.tables: dict[int, BlockTable] = {}

    def step(self, new_tokens: dict[int, list[int]], all_logits: bool = False) -> Tensor:
        """Compute these tokens of these sequences; logits of each one's last token, or of all."""
        queries: list[SequenceInput] = []
        for seq_id, token_ids in new_tokens.items():
            table = self.tables.setdefault(seq_id, BlockTable(BLOCK_SIZE, [], 0))
            context_len = table.num_tokens
            table.num_tokens += len(token_ids)
            while len(table.blocks) * BLOCK_SIZE < table.num_tokens:
                table.blocks.append(self.free.pop())
            num_logits = len(token_ids) if all_logits else 1
            queries.append(SequenceInput(seq_id, token_ids, context_len, table.blocks, num_logits))
        return self.runner.run(StepInput(tuple(queries)))


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


def judged(model: Any, token_ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


# ------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(
    variant: str, backend: str, checkpoints: dict[str, Path], judge: Any
) -> None:
    paged = Paged(load_model(checkpoints[variant], BACKENDS[backend]), backend)
    token_ids = prompt(41)
    expected = judged(judge(variant), token_ids)
    assert expected.std() > 0.5, "logits too alike to tell a wrong model from a right one"
    torch.testing.assert_close(
        paged.step({0: token_ids}, all_logits=True), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_sequences_of_different_lengths_generate_in_one_batch_as_each_would_alone(
    variant: str, checkpoints: dict[str, Path], judge: Any
) -> None:
    paged = Paged(load_model(checkpoints[variant], BACKENDS["reference"]))
    prompts = {0: prompt(7, 1), 1: prompt(1, 2), 2: prompt(12, 3)}
    new_tokens = prompts
    sequences = {seq_id: list(token_ids) for seq_id, token_ids in prompts.items()}
    for _ in range(32):
        logits = paged.step(new_tokens)
        new_tokens = {s: [t] for s, t in zip(prompts, logits.argmax(-1).tolist(), strict=True)}
        for seq_id, token_ids in new_tokens.items():
            sequences[seq_id] += token_ids
    for seq_id, token_ids in sequences.items():
        # Greedy generation, checked in one pass: each token is the best after all before it.
        best = judged(judge(variant), token_ids).argmax(-1).tolist()
        begin = len(prompts[seq_id])
        assert token_ids[begin:] == best[begin - 1 : -1]


@pytest.mark.parametrize("variant", ["gpt2", "opt", "llama, grouped", "qwen3"])
def test_a_chunked_prompt_next_to_a_decode_gives_the_same_logits(
    variant: str, checkpoints: dict[str, Path]
) -> None:
    model = load_model(checkpoints[variant], BACKENDS["reference"])
    token_ids = prompt(19)
    whole = Paged(model).step({0: token_ids})
    paged = Paged(model)
    paged.step({0: token_ids[:5], 1: prompt(9, 1)})
    paged.step({1: [4], 0: token_ids[5:6]})
    chunked = paged.step({1: [5], 0: token_ids[6:]})
    torch.testing.assert_close(chunked[1:], whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["gpt2", "opt", "llama, grouped"])
def test_earlier_contents_of_the_pool_do_not_matter(
    variant: str, checkpoints: dict[str, Path]
) -> None:
    model = load_model(checkpoints[variant], BACKENDS["reference"])
    clean, used = Paged(model), Paged(model)
    for keys, values in used.cache.layers:
        keys.fill_(7.0)
        values.fill_(-7.0)
    torch.testing.assert_close(used.step({0: prompt(9)}), clean.step({0: prompt(9)}))


@pytest.mark.parametrize(
    ("family", "options"),
    [("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 1})],
)
def test_up_to_the_width_of_its_window_a_sliding_attention_is_full_and_no_further(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    window = 24
    make_checkpoint(family, tmp_path, sliding_window=window, **options)
    model = load_model(tmp_path, BACKENDS["reference"])
    assert model.config.max_position_embeddings == window  # no token that would differ is served
    slides = AutoModelForCausalLM.from_pretrained(tmp_path)
    token_ids = prompt(window + 1)
    full = Paged(model).step({0: token_ids}, all_logits=True)
    difference = (full - judged(slides, token_ids)).abs().amax(-1)  # [tokens]
    assert difference[:window].max() < 1e-4
    assert difference[window] > 1e-2


def test_bfloat16_stays_near_transformers_in_bfloat16(checkpoints: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoints["qwen3"]
    model = load_model(folder, BACKENDS["reference"], dtype="bfloat16")
    paged = Paged(model)
    paged.cache = KVCache(model.config, NUM_BLOCKS, BLOCK_SIZE, dtype=torch.bfloat16)
    logits = paged.step({0: prompt(20)}, all_logits=True)
    assert logits.dtype == torch.bfloat16
    judge = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in judge.parameters():  # judge.to() would round the rotary frequencies as well
        parameter.data = parameter.data.bfloat16()
    expected = judged(judge, prompt(20)).float()
    # Half of bfloat16's 8 bits are lost to sums in another order; a wrong model is off by its std.
    assert (logits.float() - expected).abs().mean() < 0.02 * expected.std()


def test_the_llama3_scaling_test_covers_all_three_frequency_ranges() -> None:
    scaling = {"rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING}
    slowed = rope_frequencies(RopeConfig(theta=500.0), 12) / rope_frequencies(
        RopeConfig.from_hf(scaling), 12
    )
    assert slowed.max() == pytest.approx(8.0)
    assert slowed.min() == pytest.approx(1.0)
    assert ((slowed > 1.1) & (slowed < 7.9)).any()


class Dense:
    """Attention over what was stored last, without a cache: differentiable."""

    def store(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> None:
        self.keys, self.values = k, v

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        return causal_attention(q, self.keys, self.values, 0, scale)


@pytest.mark.parametrize("variant", ["gpt2", "opt", "llama, grouped", "qwen3, biases"])
def test_the_same_modules_can_be_trained_with_an_attention_that_has_gradients(
    variant: str, checkpoints: dict[str, Path]
) -> None:
    dense = Dense()
    backend = AttentionBackend("dense", dense.attend, dense.store)
    model = load_model(checkpoints[variant], backend).requires_grad_(True)
    batch = BatchBuilder(1, 3, BLOCK_SIZE).build([SequenceInput(0, prompt(9), 0, [0, 1, 2])])
    cache = KVCache(model.config, 3, BLOCK_SIZE)
    model.logits(model(batch.token_ids, batch.positions, cache, batch)).logsumexp(
        -1
    ).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
