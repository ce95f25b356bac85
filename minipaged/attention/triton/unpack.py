# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""Unpack: 8-bit keys and values, for tensor cores that multiply 16 bits.

A tensor core takes its elements in a certain order from the registers of 32 threads. A GPU brings
elements of 16 bits from shared memory in this order, many at a time, but single bytes it does not.
Two neighbouring elements of a key are therefore read as one number of 16 bits, and taken apart in
the registers:

    stored      e0 o0 e1 o1 e2 o2 ...       even and odd elements of a key, 8 bits each
    read        (e0 o0) (e1 o1) (e2 o2)     as numbers of 16 bits
    unpacked    e0 e1 e2 ...   o0 o1 o2 ... two matrices of half the width

The queries are split in the same way, so that q . k = q_even . e + q_odd . o. The even and the odd
elements of the result come from the values in the same way, and are joined at the end.

A register has 32 bits, so an instruction can unpack two numbers at a time. Triton's own conversions
do not, hence a few lines of PTX, the assembly language of NVIDIA's GPUs. `$2` is a register with
two pairs of bytes; `$0` gets both even elements, `$1` both odd ones.
"""

import triton
import triton.language as tl

import minipaged.attention.triton.launch  # noqa: F401 - settles how kernels run

# 1024 + n has the bits 0x6400 + n in float16, for n up to 1023. Here n is the element plus 128.
INT8_TO_FLOAT16 = tl.constexpr("""{
.reg .b32 n, even, odd, base, shift;
mov.b32 base, 0x64646464;
mov.b32 shift, 0xe480e480;           // -1152
xor.b32 n, $2, 0x80808080;           // adds 128 to each byte
prmt.b32 even, n, base, 0x4240;      // 0x64, byte 2, 0x64, byte 0
prmt.b32 odd, n, base, 0x4341;
add.rn.f16x2 $0, even, shift;
add.rn.f16x2 $1, odd, shift;
}""")

# bfloat16 has too few digits for that. But the bits of n, up to 255, are its smallest numbers,
# n * 2^-133. Its largest power of two, 2^127, makes that n / 64.
INT8_TO_BFLOAT16 = tl.constexpr("""{
.reg .b32 n, even, odd, factor, shift;
mov.b32 factor, 0x7f007f00;          // 2^127
mov.b32 shift, 0xc000c000;           // -2, which is -128 / 64
xor.b32 n, $2, 0x80808080;
prmt.b32 even, n, 0, 0x4240;         // 0, byte 2, 0, byte 0
prmt.b32 odd, n, 0, 0x4341;
fma.rn.bf16x2 $0, even, factor, shift;
fma.rn.bf16x2 $1, odd, factor, shift;
}""")

FLOAT8_TO_FLOAT16 = tl.constexpr("""{
.reg .b32 sorted;
.reg .b16 even, odd;
prmt.b32 sorted, $2, 0, 0x3120;      // bytes 3 and 1, bytes 2 and 0
mov.b32 {even, odd}, sorted;
cvt.rn.f16x2.e4m3x2 $0, even;
cvt.rn.f16x2.e4m3x2 $1, odd;
}""")

FLOAT8_TO_BFLOAT16 = tl.constexpr("""{
.reg .b32 sorted, pair;
.reg .b16 even, odd, low, high;
.reg .f32 first, second;
prmt.b32 sorted, $2, 0, 0x3120;
mov.b32 {even, odd}, sorted;
cvt.rn.f16x2.e4m3x2 pair, even;
mov.b32 {low, high}, pair;
cvt.f32.f16 first, low;
cvt.f32.f16 second, high;
cvt.rn.bf16x2.f32 $0, second, first;
cvt.rn.f16x2.e4m3x2 pair, odd;
mov.b32 {low, high}, pair;
cvt.f32.f16 first, low;
cvt.f32.f16 second, high;
cvt.rn.bf16x2.f32 $1, second, first;
}""")


@triton.jit
def unpack(pairs, STORED: tl.constexpr, MATH: tl.constexpr):
    """Take pairs of 8-bit elements apart: two tensors like `pairs`, of the type MATH.

    Each is the stored element divided by `unit`.
    """
    if MATH == tl.float32:  # also in the interpreter, which runs no PTX
        even = pairs.to(tl.int8).to(STORED, bitcast=True).to(MATH)
        odd = (pairs >> 8).to(tl.int8).to(STORED, bitcast=True).to(MATH)
        return even, odd
    else:
        if STORED == tl.int8:
            ptx: tl.constexpr = INT8_TO_FLOAT16 if MATH == tl.float16 else INT8_TO_BFLOAT16
        else:
            ptx: tl.constexpr = FLOAT8_TO_FLOAT16 if MATH == tl.float16 else FLOAT8_TO_BFLOAT16
        even, odd = tl.inline_asm_elementwise(
            ptx, "=r,=r,r", [pairs], dtype=(tl.int16, tl.int16), is_pure=True, pack=2
        )
        return even.to(MATH, bitcast=True), odd.to(MATH, bitcast=True)


@triton.jit
def unit(STORED: tl.constexpr, MATH: tl.constexpr):
    """The number by which unpacked elements are to be multiplied."""
    if (STORED == tl.int8) & (MATH == tl.bfloat16):
        return 64.0
    else:
        return 1.0


@triton.jit
def split_pairs(rows):
    """The even and the odd elements of each row."""
    return tl.split(tl.reshape(rows, [rows.shape[0], rows.shape[1] // 2, 2]))


@triton.jit
def join_pairs(even, odd):
    """The reverse of `split_pairs`."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])
