"""Linear layers, joined and packed: whatever the form of the weights, the numbers are the same."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import make_checkpoint

from minipaged import LLM, SamplingParams
from minipaged.attention.backend import BACKENDS
from minipaged.errors import InvalidOption
from minipaged.models import linear, packed
from minipaged.models.linear import Linear, MergedLinear, pack_weights
from minipaged.models.loader import load_model
from minipaged.models.packed import InFloat16, InOneDNN, fits_float16, works

needs_packing = pytest.mark.skipif(
    not works(InOneDNN), reason="this processor, or this torch, packs nothing"
)
needs_float16 = pytest.mark.skipif(
    not works(InFloat16), reason="this processor, or this torch, multiplies no float16 weights"
)
each_form = pytest.mark.parametrize(
    "form",
    [
        pytest.param(InOneDNN, marks=needs_packing),
        pytest.param(InFloat16, marks=needs_float16),
    ],
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def packs_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMALLEST_TO_PACK", 0)


@pytest.mark.parametrize(
    ("saved", "dtype", "form"),
    [
        (torch.float32, torch.float32, InOneDNN),
        (torch.bfloat16, torch.bfloat16, InOneDNN),
        (torch.float16, torch.float32, InFloat16),
        (torch.bfloat16, torch.float32, InFloat16),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 33, 130])
def test_a_packed_layer_gives_the_result_of_the_plain_one(
    rows: int, bias: bool, saved: torch.dtype, dtype: torch.dtype, form, packs_everything: None
) -> None:
    if not works(form, dtype):
        pytest.skip("this processor, or this torch, does not pack this type so")
    torch.manual_seed(0)
    layer = Linear(80, 208, bias=bias).to(saved).to(dtype).requires_grad_(False)
    x = torch.randn(rows, 160).to(dtype)[:, 80:]  # not contiguous
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    plain = layer(x)
    layer.pack()
    assert isinstance(layer.packed, form)
    assert layer.packed.num_bytes == 80 * 208 * saved.itemsize
    found = layer(x)
    assert found.dtype == plain.dtype
    assert found.shape == plain.shape
    error = (plain.double() - exact).abs().max() if rows else 0.0
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2 * float(error) + 1e-6)


def test_a_matrix_fits_float16_if_it_was_saved_in_half_precision() -> None:
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(300, 300)
    for saved in (torch.float16, torch.bfloat16):
        assert fits_float16(weight.to(saved).float())
    assert not fits_float16(weight)
    assert fits_float16(torch.zeros(3, 3))
    in_bfloat16 = weight.bfloat16().float()
    for number in (65536.0, 1e30, torch.inf, torch.nan):  # no numbers of float16
        assert not fits_float16(in_bfloat16.index_fill(0, torch.tensor(7), number)), number
    tiny = in_bfloat16.clone()
    tiny[5] = 3e-8  # rounded to 6e-8, which changes no result
    assert fits_float16(tiny)
    assert not fits_float16(1e-4 * in_bfloat16)  # here it would


@needs_packing
def test_a_matrix_saved_in_float32_keeps_its_elements_unless_asked(packs_everything: None) -> None:
    exact, as_asked, rounded = (Linear(64, 64).requires_grad_(False) for _ in range(3))
    as_asked.weight.copy_(as_asked.weight.half())
    exact.pack()
    as_asked.pack("float32")
    assert isinstance(exact.packed, InOneDNN)
    assert isinstance(as_asked.packed, InOneDNN)
    if works(InFloat16):
        rounded.pack("float16")
        assert isinstance(rounded.packed, InFloat16)


@needs_float16
def test_weights_beyond_float16_are_refused_or_kept(tmp_path: Path, packs_everything: None) -> None:
    layer = Linear(64, 64).bfloat16().float().requires_grad_(False)
    layer.weight[3, 5] = 2.0**17
    with pytest.raises(InvalidOption, match=r"a weight of this model is 1.31e\+05, and float16"):
        layer.pack("float16")
    layer.pack()
    assert not isinstance(layer.packed, InFloat16)


@needs_float16
def test_a_small_matrix_is_rounded_only_if_asked() -> None:
    layer = Linear(16, 16).half().float()
    layer.pack()
    assert layer.packed is None
    layer.pack("float16")
    assert isinstance(layer.packed, InFloat16)


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
    assert (small.packed is None, large.packed is None) == (True, False)


@each_form
def test_a_form_with_wrong_results_is_never_used(form, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, zero = form.multiply, torch.zeros(48)
    faults = {
        "wrong": lambda self, x: multiply(self, x) * 1.1,
        "without bias": lambda self, x: multiply(form(self.weight, zero), x),
        "wrong for many rows": lambda self, x: multiply(self, x) * (len(x) < 30),
        "no such operator": lambda self, x: torch.ops.mkldnn.no_such_operator(x),
        "not a number": lambda self, x: multiply(self, x) * torch.nan,
    }
    begin = form.__init__

    def remember(self, weight, bias):
        begin(self, weight, bias)
        self.weight = weight

    monkeypatch.setattr(form, "__init__", remember)
    for fault in faults.values():
        monkeypatch.setattr(form, "multiply", fault)
        works.cache_clear()
        assert not works(form)
    monkeypatch.undo()
    works.cache_clear()
    assert works(form)


def test_a_merged_layer_gives_the_results_of_its_parts() -> None:
    torch.manual_seed(0)
    joined = MergedLinear(16, (24, 8, 8))
    x = torch.randn(5, 16)
    start = 0
    for size, part in zip(joined.sizes, joined(x), strict=True):
        rows = slice(start, start + size)
        torch.testing.assert_close(part, F.linear(x, joined.weight[rows], joined.bias[rows]))
        start += size


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_a_packed_model_generates_the_same_tokens(
    family: str, tied: bool, saved: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(family, tmp_path, tie_word_embeddings=tied, dtype=saved)
    prompts = [[5, 6, 7], [9] * 20, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]]

    def generated() -> list[list[int]]:
        outputs = LLM(tmp_path).generate(prompts, GREEDY, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    monkeypatch.setattr(packed, "works", lambda *_: False)
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
    matrices = [m for m in model.modules() if isinstance(m, Linear) and m.packed is not None]
    assert len(matrices) == num_matrices + 1  # the tied head has become a matrix of its own


@pytest.mark.parametrize("why", ["the operators are missing", "all matrices are small"])
def test_a_model_is_unchanged_if_nothing_can_be_packed(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("llama", tmp_path, tie_word_embeddings=True)
    model = load_model(tmp_path, BACKENDS["torch"])
    before = [name for name, _ in model.named_parameters()]
    if why == "the operators are missing":
        monkeypatch.setattr(linear, "SMALLEST_TO_PACK", 0)
        monkeypatch.setattr(packed, "works", lambda *_: False)
    pack_weights(model)
    assert [name for name, _ in model.named_parameters()] == before
    assert model.head is None
