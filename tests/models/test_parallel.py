"""Tensor parallelism without processes: every rank is a thread, and sums are formed in memory."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint, make_checkpoints
from torch import Tensor

from minipaged import LLM
from minipaged.attention.backend import BACKENDS
from minipaged.attention.batch import BatchBuilder
from minipaged.attention.kv_cache import KVCache
from minipaged.errors import InvalidOption
from minipaged.models import safetensors_reader
from minipaged.models.base import Model
from minipaged.models.linear import pack_weights
from minipaged.models.loader import load_model, read_model_config
from minipaged.models.parallel import Part, Share, refuse_uneven_parts
from minipaged.scheduler.output import SequenceInput, StepInput
from minipaged.worker.model_runner import ModelRunner

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "opt": ("opt", {}),
    "opt, 350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "llama, 4 KV heads": ("llama", {"num_key_value_heads": 4}),
    "llama, 2 KV heads": ("llama", {}),
    "llama, 1 KV head": ("llama", {"num_key_value_heads": 1}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(VARIANTS, tmp_path_factory.mktemp("checkpoints"))


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_sums = 0
        self._given: list[Tensor] = []
        self._barrier = threading.Barrier(size, timeout=20)
        self._lock = threading.Lock()

    def part(self, rank: int) -> Part:
        return Part(rank, self.size, self._all_reduce)

    def _all_reduce(self, summand: Tensor) -> Tensor:
        with self._lock:
            self._given.append(summand.clone())
        self._barrier.wait()
        total = torch.stack(self._given).sum(0)
        if self._barrier.wait() == 0:
            self._given.clear()
            self.num_sums += 1
        self._barrier.wait()
        return summand.copy_(total)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(function, range(self.size)))


def load_parts(folder: Path, ranks: Threads) -> list[Model]:
    backend = BACKENDS["reference"]
    return [load_model(folder, backend, part=ranks.part(r)) for r in range(ranks.size)]


def logits_of(model: Model, steps: list[StepInput]) -> list[Tensor]:
    cache = KVCache(model.config, num_blocks=16, block_size=4)
    runner = ModelRunner(model, BACKENDS["reference"], cache, BatchBuilder(4, 16, 4))
    return [runner.run(step) for step in steps]


STEPS = [
    StepInput((SequenceInput(0, [3, 99, 50, 7, 100], 0, [5, 2], 5),)),
    StepInput(
        (SequenceInput(0, [60], 5, [5, 2]), SequenceInput(1, [0, 98, 13], 0, [9], 3)),
        copies=((2, 11),),
    ),
    StepInput((SequenceInput(0, [8], 6, [5, 11]), SequenceInput(1, [51], 3, [9]))),
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shards_of_all_ranks_give_the_logits_of_the_whole_model(checkpoints, variant, size):
    folder, ranks = checkpoints[variant], Threads(size)
    whole = load_model(folder, BACKENDS["reference"])
    expected = logits_of(whole, STEPS)
    parts = load_parts(folder, ranks)
    of_ranks = ranks.run(lambda rank: logits_of(parts[rank], STEPS))
    for step, logits in enumerate(expected):
        joined = torch.cat([each[step] for each in of_ranks], dim=-1)
        assert logits.std() > 0.5, "logits too alike to tell a wrong cut from a right one"
        torch.testing.assert_close(joined[:, :VOCAB_SIZE], logits, atol=1e-4, rtol=1e-4)
        assert not joined[:, VOCAB_SIZE:].any(), "the padding is not zero"
    assert ranks.num_sums == len(STEPS) * (2 * whole.config.num_layers + 1)


@pytest.mark.parametrize("variant", ["gpt2", "llama, biases"])
def test_packed_shards_give_the_logits_of_the_whole_model(checkpoints, variant, monkeypatch):
    monkeypatch.setattr("minipaged.models.linear.SMALLEST_TO_PACK", 1)
    ranks = Threads(2)
    expected = logits_of(load_model(checkpoints[variant], BACKENDS["reference"]), STEPS)
    parts = load_parts(checkpoints[variant], ranks)
    for part in parts:
        pack_weights(part)
    of_ranks = ranks.run(lambda rank: logits_of(parts[rank], STEPS))
    joined = torch.cat([each[-1] for each in of_ranks], dim=-1)[:, :VOCAB_SIZE]
    torch.testing.assert_close(joined, expected[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_shards_belong_to_the_same_model(checkpoints, variant):
    folder, ranks, backend = checkpoints[variant], Threads(2), BACKENDS["reference"]
    expected = logits_of(load_model(folder, backend, random_weights=True), STEPS)
    parts = [
        load_model(folder, backend, random_weights=True, part=ranks.part(rank)) for rank in (0, 1)
    ]
    of_ranks = ranks.run(lambda rank: logits_of(parts[rank], STEPS))
    joined = torch.cat([each[0] for each in of_ranks], dim=-1)[:, :VOCAB_SIZE]
    torch.testing.assert_close(joined, expected[0], atol=1e-4, rtol=1e-4)


# ---- how much a rank has and reads ---------------------------------------------------------------


def size_of(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rank_reads_the_bytes_of_its_share_and_no_more(checkpoints, variant, monkeypatch):
    folder, read = checkpoints[variant], 0
    original = safetensors_reader._read_at

    def counting(file: Any, stored: Any, place: int, memory: memoryview) -> None:
        nonlocal read
        read += len(memory)  # the file has no buffer: what is asked for is what is read
        original(file, stored, place, memory)

    monkeypatch.setattr(safetensors_reader, "_read_at", counting)
    whole = load_model(folder, BACKENDS["reference"])
    all_bytes, read = read, 0
    assert all_bytes == 4 * size_of(whole)
    for part in (Threads(2).part(0), Threads(2).part(1)):
        model = load_model(folder, BACKENDS["reference"], part=part)
        cut = [each for name, each in model.named_modules() if name in ("embedding", "head")]
        padding = part.rank * sum(each.weight.shape[1] for each in cut)  # 101 = 51 + 50
        assert read == 4 * (size_of(model) - padding)
        assert read < 0.65 * all_bytes
        read = 0


def test_more_ranks_than_kv_heads_have_copies_of_them(checkpoints):
    folder = checkpoints["llama, 2 KV heads"]
    parts = load_parts(folder, Threads(4))
    assert [part.config.num_kv_heads for part in parts] == [1, 1, 1, 1]
    assert [part.config.num_heads for part in parts] == [1, 1, 1, 1]
    keys = [part.layers[0].attention.qkv_proj.weight[12:24] for part in parts]
    assert torch.equal(keys[0], keys[1])
    assert torch.equal(keys[2], keys[3])
    assert not torch.equal(keys[1], keys[2])


def test_only_rank_0_has_the_bias_of_a_matrix_cut_by_rows(checkpoints):
    names = [
        {name for name, _ in part.named_parameters() if name.endswith("o_proj.bias")}
        for part in load_parts(checkpoints["gpt2"], Threads(2))
    ]
    assert names == [{"layers.0.attention.o_proj.bias", "layers.1.attention.o_proj.bias"}, set()]


def test_the_pieces_of_a_share_follow_each_other():
    share = Share(0, ((2, 4), (10, 13)), padding=1)
    assert share.length == 6
    assert list(share.pieces(0, 99)) == [((2, 4), (0, 2)), ((10, 13), (2, 5))]
    assert list(share.pieces(3, 12)) == [((3, 4), (1, 2)), ((10, 12), (2, 4))]
    assert list(share.pieces(4, 10)) == []


# ---- what cannot be divided ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size", "said"),
    [
        ({}, 3, "4 query heads cannot be divided evenly among 3 ranks: choose 1 or 2 or 4"),
        ({}, 8, "4 query heads cannot be divided evenly among 8 ranks: choose 1 or 2 or 4"),
        ({"intermediate_size": 66}, 4, "66 feed-forward units .* choose 1 or 2."),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 60},
            2,
            "3 KV heads cannot be divided evenly among 2 ranks: choose 1 or 3 or 6",
        ),
    ],
)
def test_a_size_that_the_ranks_cannot_share_equally_is_refused(tmp_path, options, size, said):
    folder = make_checkpoint("llama", tmp_path, **options)
    with pytest.raises(InvalidOption, match=said) as error:
        LLM(folder, tensor_parallel_size=size, num_blocks=8)
    assert error.value.param == "tensor_parallel_size"
    model = load_model(folder, BACKENDS["reference"], config=read_model_config(folder))
    refuse_uneven_parts(model, 1)
