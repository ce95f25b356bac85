"""The PTX that unpacks 8-bit elements, run by an emulator of its few instructions.

Triton's interpreter runs no PTX, and a GPU runs nothing else. Every byte must become exactly the
number that PyTorch reads from it, next to every other byte.
"""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

unpack = pytest.importorskip("minipaged.attention.triton.unpack")

Registers = dict[str, Tensor]  # one value for each of many threads, as 64-bit integers

BYTES = torch.arange(256)
# Each byte in each of the four places of a register, and the others from the whole range.
WORDS = torch.cat([
    sum(torch.roll(BYTES, 57 * place * shift) << 8 * place for place in range(4))
    for shift in range(5)
])  # fmt: skip


def halves(word: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The two numbers of 16 bits in each register, as float64."""
    return [((word >> s) & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype).double()
            for s in (0, 16)]  # fmt: skip


def packed(numbers: list[Tensor], dtype: torch.dtype) -> Tensor:
    low, high = (each.to(dtype).view(torch.int16).long() & 0xFFFF for each in numbers)
    return low | high << 16


def permuted(a: Tensor, b: Tensor, selector: int) -> Tensor:
    """`prmt`: each digit of the selector is the number of a byte of b and a, eight in all."""
    picked = [(selector >> 4 * place) & 0xF for place in range(4)]
    assert max(picked) < 8, "no sign is spread"
    sources = [a >> 8 * n if n < 4 else b >> 8 * (n - 4) for n in picked]
    return sum((source & 0xFF) << 8 * place for place, source in enumerate(sources))


def fused(dtype: torch.dtype) -> Callable[..., Tensor]:
    """a * b + c, or a + b, rounded once. (float64 is exact here.)"""

    def compute(*operands: Tensor) -> Tensor:
        first, second, *third = [halves(each, dtype) for each in operands]
        if third:
            numbers = [a * b + c for a, b, c in zip(first, second, third[0], strict=True)]
        else:
            numbers = [a + b for a, b in zip(first, second, strict=True)]
        return packed(numbers, dtype)

    return compute


def float8_to_float16(word: Tensor) -> Tensor:
    numbers = [((word >> s) & 0xFF).to(torch.uint8).view(torch.float8_e4m3fn) for s in (0, 8)]
    return packed([each.float() for each in numbers], torch.float16)


INSTRUCTIONS: dict[str, Callable[..., Tensor]] = {
    "xor.b32": lambda a, b: a ^ b,
    "add.rn.f16x2": fused(torch.float16),
    "fma.rn.bf16x2": fused(torch.bfloat16),
    "cvt.rn.f16x2.e4m3x2": float8_to_float16,
    "cvt.f32.f16": lambda half: half.int().to(torch.int16).view(torch.float16).double(),
    "cvt.rn.bf16x2.f32": lambda high, low: packed([low, high], torch.bfloat16),
}


def emulated(ptx: str, words: Tensor) -> tuple[Tensor, Tensor]:
    """Run the lines of PTX on registers with these contents: both results."""
    registers: Registers = {"$2": words}

    def value(name: str) -> Tensor:
        return registers[name] if name in registers else torch.full_like(words, int(name, 0))

    for line in re.findall(r"([^;{}][^;]*|\{[^;]*);", ptx.replace(".reg", "\n.reg")):
        line = re.sub(r"//.*", "", line).strip().removeprefix("{").strip()
        name, _, rest = line.partition(" ")
        if name == ".reg":
            continue
        if name == "mov.b32" and rest.startswith("{"):  # both halves
            low, high, source = re.findall(r"[$\w]+", rest)
            registers[low], registers[high] = value(source) & 0xFFFF, value(source) >> 16
            continue
        target, *operands = re.findall(r"[$\w]+", rest)
        if name == "prmt.b32":
            first, second, selector = operands
            registers[target] = permuted(value(first), value(second), int(selector, 0))
        elif name == "mov.b32":
            registers[target] = value(operands[0])
        else:
            registers[target] = INSTRUCTIONS[name](*map(value, operands))
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize(
    ("ptx", "stored", "math", "unit"),
    [
        ("INT8_TO_FLOAT16", torch.int8, torch.float16, 1),
        ("INT8_TO_BFLOAT16", torch.int8, torch.bfloat16, 64),
        ("FLOAT8_TO_FLOAT16", torch.float8_e4m3fn, torch.float16, 1),
        ("FLOAT8_TO_BFLOAT16", torch.float8_e4m3fn, torch.bfloat16, 1),
    ],
)
def test_every_byte_is_unpacked_exactly(ptx, stored, math, unit):
    results = emulated(getattr(unpack, ptx).value, WORDS)
    for parity, result in enumerate(results):  # even elements are in bytes 0 and 2
        for place, found in zip((parity, parity + 2), halves(result, math), strict=True):
            byte = ((WORDS >> 8 * place) & 0xFF).to(torch.uint8).view(stored)
            torch.testing.assert_close(
                unit * found, byte.float().double(), rtol=0, atol=0, equal_nan=True
            )


def test_a_wrong_constant_would_be_noticed():
    right = unpack.INT8_TO_BFLOAT16.value
    for old, new in (("0x4240", "0x4243"), ("0x7f007f00", "0x7e807f00"), ("0x80808080", "0x8080")):
        assert old in right
        results = emulated(right.replace(old, new), WORDS)
        assert not torch.equal(results[0], emulated(right, WORDS)[0])
