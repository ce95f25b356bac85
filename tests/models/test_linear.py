"""Linear layers, joined and packed: whatever the form of the weights, the numbers are the same."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import make_checkpoint

from minipaged import LLM, SamplingParams
from minipaged.attention.backend import BACKENDS
from minipaged.models import linear
from minipaged.models.linear import Linear, MergedLinear, can_pack, pack_weights
from minipaged.models.loader import load_model

PACKS = can_pack(torch.float32)
needs_packing = pytest.mark.skipif(not PACKS, reason="this processor, or this torch, packs nothing")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def packs_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMALLEST_TO_PACK", 0)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 33, 130])
def test_a_packed_layer_gives_the_result_of_the_plain_one(
    rows: int, bias: bool, dtype: torch.dtype, packs_everything: None
) -> None:
    if not can_pack(dtype):
        pytest.skip("this processor does not pack this type")
    torch.manual_seed(0)
    layer = Linear(80, 208, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(rows, 160).to(dtype)[:, 80:]  # not contiguous
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    plain = layer(x)
    layer.pack()
    assert layer.packed_weight is not None
    packed = layer(x)
    assert packed.dtype == plain.dtype
    assert packed.shape == plain.shape
    error = (plain.double() - exact).abs().max() if rows else 0.0
    torch.testing.assert_close(packed.double(), exact, rtol=0, atol=2 * float(error) + 1e-6)


@needs_packing
def test_a_packed_layer_keeps_one_copy_of_its_weight(packs_everything: None) -> None:
    layer = Linear(64, 64)
    layer.pack()
    layer.pack()  # once more does nothing
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@needs_packing
def test_a_small_matrix_is_not_packed() -> None:
    small, large = Linear(511, 512), Linear(512, 512)
    small.pack()
    large.pack()
    assert (small.packed_weight is None, large.packed_weight is None) == (True, False)


@needs_packing
def test_a_packing_with_wrong_results_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    true_linear = linear._packed_linear
    faults = {
        "wrong": lambda x, packed, bias: true_linear(x, packed, bias) * 1.1,
        "without bias": lambda x, packed, bias: true_linear(x, packed, None),
        "wrong for many rows": lambda x, packed, bias: true_linear(x, packed, bias) * (len(x) < 30),
        "no such operator": lambda x, packed, bias: torch.ops.mkldnn.no_such_operator(x),
        "not a number": lambda x, packed, bias: true_linear(x, packed, bias) * torch.nan,
    }
    for fault in faults.values():
        monkeypatch.setattr(linear, "_packed_linear", fault)
        can_pack.cache_clear()
        assert not can_pack(torch.float32)
    monkeypatch.undo()
    can_pack.cache_clear()
    assert can_pack(torch.float32)


def test_a_merged_layer_gives_the_results_of_its_parts() -> None:
    torch.manual_seed(0)
    joined = MergedLinear(16, (24, 8, 8))
    x = torch.randn(5, 16)
    start = 0
    for size, part in zip(joined.sizes, joined(x), strict=True):
        rows = slice(start, start + size)
        torch.testing.assert_close(part, F.linear(x, joined.weight[rows], joined.bias[rows]))
        start += size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_a_packed_model_generates_the_same_tokens(
    family: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(family, tmp_path, tie_word_embeddings=tied)
    prompts = [[5, 6, 7], [9] * 20, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]]

    def generated() -> list[list[int]]:
        outputs = LLM(tmp_path).generate(prompts, GREEDY, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    monkeypatch.setattr(linear, "can_pack", lambda dtype: False)
    plain = generated()
    monkeypatch.undo()
    monkeypatch.setattr(linear, "SMALLEST_TO_PACK", 0)
    assert generated() == plain


@needs_packing
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_only_the_embeddings_norms_and_biases_of_a_packed_model_are_left(
    family: str, tmp_path: Path, packs_everything: None
) -> None:
    make_checkpoint(family, tmp_path, tie_word_embeddings=True)
    model = load_model(tmp_path, BACKENDS["torch"])
    num_matrices = sum(isinstance(module, Linear) for module in model.modules())
    pack_weights(model)
    left = [name for name, _ in model.named_parameters()]
    assert all("embedding" in name or "norm" in name or name.endswith("bias") for name in left)
    packed = [m for m in model.modules() if isinstance(m, Linear) and m.packed_weight is not None]
    assert len(packed) == num_matrices + 1  # the tied head has become a matrix of its own


@pytest.mark.parametrize("why", ["the operators are missing", "all matrices are small"])
def test_a_model_is_unchanged_if_nothing_can_be_packed(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("llama", tmp_path, tie_word_embeddings=True)
    model = load_model(tmp_path, BACKENDS["torch"])
    before = [name for name, _ in model.named_parameters()]
    if why == "the operators are missing":
        monkeypatch.setattr(linear, "SMALLEST_TO_PACK", 0)
        monkeypatch.setattr(linear, "can_pack", lambda dtype: False)
    pack_weights(model)
    assert [name for name, _ in model.named_parameters()] == before
    assert model.head is None
