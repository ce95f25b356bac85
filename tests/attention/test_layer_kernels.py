"""The fused kernels between matrix products, against PyTorch in float64: on a GPU, or interpreted.

As in test_triton.py, scratch memory is poisoned with NaN, and so is the memory around the inputs.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import make_checkpoint
from torch import Tensor

from minipaged.attention.backend import BACKENDS, choose_backend
from minipaged.attention.device_batch import choose_builder
from minipaged.attention.kv_cache import KVCache
from minipaged.attention.triton import add_rms_norm as norm_file
from minipaged.attention.triton import silu_and_mul as gate_file
from minipaged.models.loader import load_model
from minipaged.scheduler.output import SequenceInput

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMPTY = torch.empty  # before it is poisoned
# One unit in the last place of bfloat16, which the interpreter cuts off instead of rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-5

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16", "bfloat16"])
# Powers of two, one less, one more; one chunk of a gate, and more.
every_width = pytest.mark.parametrize("width", [1, 48, 64, 1023, 1025, 2304])


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*shape: Any, **options: Any) -> Tensor:
        tensor = EMPTY(*shape, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def rows(count: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random rows of very different sizes, in the middle of a tensor of NaN."""
    random = torch.Generator().manual_seed(seed)
    around = torch.full((count, width + 7), torch.nan, dtype=dtype)
    sizes = torch.tensor([1.0, 0.03, 30.0]).repeat(count)[:count, None]
    around[:, 3:-4] = sizes * torch.randn(count, width, generator=random)
    return around.to(DEVICE)[:, 3:-4]


def assert_rows_near(found: Tensor, expected: Tensor) -> None:
    """Each row by its own size: a small one counts as much as a large one."""
    assert found.dtype in TOLERANCE
    error = (found.double() - expected).norm(dim=-1)
    assert (error <= TOLERANCE[found.dtype] * expected.norm(dim=-1)).all()


def check_norm(module: ModuleType, width: int, dtype: torch.dtype) -> None:
    x, delta = (rows(5, width, dtype, seed) for seed in (0, 1))
    weight = 1 + rows(1, width, dtype, 2)[0]
    before = [each.clone() for each in (x, delta, weight)]
    total, normed = module.add_rms_norm(x, delta, weight, EPS)
    assert total.dtype == normed.dtype == dtype
    assert_rows_near(total, x.double() + delta.double())
    exact = total.double()  # the norm is that of the rounded sum
    scale = (exact.square().mean(-1, keepdim=True) + EPS).rsqrt()
    assert_rows_near(normed, exact * scale * weight.double())
    for tensor, old in zip((x, delta, weight), before, strict=True):
        assert torch.equal(tensor, old)


def check_gate(module: ModuleType, width: int, dtype: torch.dtype) -> None:
    gate, up = rows(5, 2 * width, dtype, 3).split(width, dim=-1)  # as of a merged matrix
    out = module.silu_and_mul(gate, up)
    assert out.dtype == dtype
    assert_rows_near(out, F.silu(gate.double()) * up.double())


@every_dtype
@every_width
def test_a_sum_and_its_norm_are_those_of_float64(width: int, dtype: torch.dtype) -> None:
    check_norm(norm_file, width, dtype)


@every_dtype
@every_width
def test_a_gated_row_is_that_of_float64(width: int, dtype: torch.dtype) -> None:
    check_gate(gate_file, width, dtype)


def check_rounding(norm: Callable[..., Any], gate: Callable[..., Any]) -> None:
    """Nearly all numbers have the bits that PyTorch's two operations give."""
    x, delta, weight = (rows(9, 576, torch.float16, seed) for seed in (0, 1, 2))
    total, normed = norm(x, delta, weight[0], EPS)
    assert torch.equal(total, x + delta)
    expected = F.rms_norm(x + delta, (576,), weight[0], EPS)
    assert (normed == expected).double().mean() > 0.99
    assert (gate(x, delta) == F.silu(x) * delta).double().mean() > 0.99


def test_half_precision_is_rounded_where_pytorch_rounds_it() -> None:
    check_rounding(norm_file.add_rms_norm, gate_file.silu_and_mul)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # interpreted, -inf times 0 is one
def test_extreme_gates_give_what_pytorch_gives() -> None:
    gate = torch.tensor([[-torch.inf, torch.inf, torch.nan, -200.0, 200.0, -0.0]], device=DEVICE)
    out = gate_file.silu_and_mul(gate, torch.ones_like(gate))
    torch.testing.assert_close(out, F.silu(gate), equal_nan=True)


def test_no_rows_give_no_rows() -> None:
    none, weight = torch.ones(0, 48, device=DEVICE), torch.ones(48, device=DEVICE)
    total, normed = norm_file.add_rms_norm(none, none, weight, EPS)
    assert total.shape == normed.shape == gate_file.silu_and_mul(none, none).shape == (0, 48)


def test_rows_of_other_shapes_or_with_gaps_are_refused() -> None:
    x, weight = torch.ones(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with pytest.raises(AssertionError, match="is added to"):
        norm_file.add_rms_norm(x, x[:1], weight, EPS)
    with pytest.raises(AssertionError, match="the weight is"):
        norm_file.add_rms_norm(x, x, weight[:4], EPS)
    with pytest.raises(AssertionError, match="not contiguous"):
        norm_file.add_rms_norm(x, torch.ones(8, 2, device=DEVICE).t(), weight, EPS)
    with pytest.raises(AssertionError, match="of up"):
        gate_file.silu_and_mul(x, x[:, :4])
    with pytest.raises(AssertionError, match="not contiguous"):
        gate_file.silu_and_mul(x, torch.ones(8, 2, device=DEVICE).t())


# ---- in a model ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:no GPU")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_computes_the_same_with_fused_kernels(family: str, tmp_path: Path) -> None:
    folder, plain = make_checkpoint(family, tmp_path), BACKENDS["reference"]
    chosen = choose_backend("triton", DEVICE)
    calls: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            return getattr(chosen, name)(*args)

        return call

    fused = replace(plain, **{name: noted(name) for name in ("add_rms_norm", "silu_and_mul")})
    logits: list[Tensor] = []
    for backend in (plain, fused):
        model = load_model(folder, backend, device=DEVICE)
        batches = choose_builder(1, 3, 4, torch.device(DEVICE))
        batch = batches.build([SequenceInput(0, [5, 9, 2, 7], 0, [0, 1, 2])])
        cache = KVCache(model.config, 3, 4, device=DEVICE)
        logits.append(model.logits(model(batch.token_ids, batch.positions, cache, batch)))
    torch.testing.assert_close(*logits)
    layers = model.config.num_layers
    assert calls == ["add_rms_norm", "add_rms_norm", "silu_and_mul"] * layers + ["add_rms_norm"]


def test_another_activation_than_silu_is_not_replaced(tmp_path: Path) -> None:
    def refused(*_: Any) -> Tensor:
        raise AssertionError("it computes SiLU")

    folder = make_checkpoint("llama", tmp_path, hidden_act="gelu")
    backend = replace(BACKENDS["reference"], silu_and_mul=refused)
    model = load_model(folder, backend)
    model.layers[0].mlp(torch.ones(1, model.config.hidden_size))


# ---- faults that the checks must catch -----------------------------------------------------------

MUTANTS = {
    "eps is left out": (check_norm, norm_file, " + eps)", ")"),
    "the sum is not written back": (
        check_norm, norm_file, "columns, rounded, mask", "columns, old, mask"
    ),
    "the norm is of the input alone": (
        check_norm, norm_file, "exact = rounded.to", "exact = old.to"
    ),
    "the mean is over the padded width": (check_norm, norm_file, "/ HIDDEN + eps", "/ WIDTH + eps"),
    "the weight is left out": (check_norm, norm_file, "scale * weights)", "scale)"),
    "rows are taken to be without gaps": (
        check_norm, norm_file, "delta + token * delta_stride", "delta + token * HIDDEN"
    ),
    "gate and up are swapped": (check_gate, gate_file, "out, gate, up,", "out, up, gate,"),
    "the gate is not multiplied": (check_gate, gate_file, "(activation * ups)", "activation"),
    "only the first chunk is computed": (
        check_gate, gate_file, "tl.program_id(1) * CHUNK + ", ""
    ),
    "the last column is left out": (check_gate, gate_file, "< INNER", "< INNER - 1"),
}  # fmt: skip


def altered(folder: Path, module: ModuleType, old: str, new: str) -> ModuleType:
    """The file with one piece replaced; on disk, because Triton reads a kernel's text there."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert old in text, f"{module.__name__} has changed, no more {old!r}: renew this mutant"
    file = folder / "mutant.py"
    file.write_text(text.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutant", file)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_deliberate_fault_of_a_fused_kernel_is_caught(mutant: tuple, tmp_path: Path) -> None:
    check, module, old, new = mutant
    with pytest.raises(AssertionError):
        check(altered(tmp_path, module, old, new), 1500, torch.float32)
    check(module, 1500, torch.float32)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (norm_file, "rounded.to(tl.float32)", "old + new"),
        (gate_file, "activation.to(out.dtype.element_ty).to(tl.float32)", "activation"),
    ],
    ids=["the norm is of the exact sum", "the activation is not rounded"],
)
def test_rounding_elsewhere_than_pytorch_is_caught(
    module: ModuleType, old: str, new: str, tmp_path: Path
) -> None:
    mutant = altered(tmp_path, module, old, new)
    real = norm_file.add_rms_norm, gate_file.silu_and_mul
    faulty = (getattr(mutant, each.__name__, each) for each in real)
    with pytest.raises(AssertionError):
        check_rounding(*faulty)
