"""Tiles of matrices in few bits as numbers, inside of a Triton kernel (packed.py says how they lie in bytes).

A letter is a stretch of its axis: O outputs, I inputs, H scales of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decoded(
    matrix,
    output_O,
    is_O,
    i,
    inputs,
    first,
    row,
    numbers_at,
    scales_at,
    more_at,
    scale_row,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    MORE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows `first` + output of one matrix, columns from i on, in float32; zeros past the last column.

    The bytes of `matrix` are read once, but for int3, where codes lie across bytes. i is a multiple of INPUTS; INPUTS and
    GROUP are powers of two; EVEN: INPUTS divides the columns.
    """
    output_O += first
    value_OI = _values(matrix + numbers_at, output_O, is_O, i, inputs, row, CODE, INPUTS, EVEN)
    scales = matrix + scales_at
    if SCALE == "bf16":
        scales = scales.to(tl.pointer_type(tl.bfloat16))
    elif SCALE == "f32":
        scales = scales.to(tl.pointer_type(tl.float32))
    place_O = output_O // BLOCK * scale_row
    scale_OI = _widened(scales, place_O, is_O, i, inputs, SCALE, GROUP, OUTPUTS, INPUTS, EVEN)
    if MORE == "times" or MORE == "over":
        whole = tl.load((matrix + more_at).to(tl.pointer_type(tl.float32)))
        scale_OI = scale_OI * whole if MORE == "times" else scale_OI / whole
    number_OI = value_OI * scale_OI
    if MORE == "minimum":
        minimums = (matrix + more_at).to(tl.pointer_type(tl.bfloat16))
        number_OI += _widened(minimums, place_O, is_O, i, inputs, "bf16", GROUP, OUTPUTS, INPUTS, EVEN)
    elif CODE == "int2" or CODE == "int3" or CODE == "int4" or CODE == "int8":
        half: tl.constexpr = 2 if CODE == "int2" else 4 if CODE == "int3" else 8 if CODE == "int4" else 128
        number_OI = (value_OI - half) * scale_OI
    if not EVEN:  # x is zero past the last column, but a number may be none
        number_OI = tl.where((i + tl.arange(0, INPUTS) < inputs)[None, :], number_OI, 0.0)
    return number_OI


@triton.jit
def _values(numbers, output_O, is_O, i, inputs, row, CODE: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr):
    """What the codes of a tile are, in float32."""
    byte_O1 = numbers + (output_O * row)[:, None]
    if CODE == "int3":  # eight in three bytes
        input_I = i + tl.arange(0, INPUTS)
        bit_I = 3 * input_I
        is_OI = is_O[:, None] & (input_I < inputs)[None, :]
        low_OI = tl.load(byte_O1 + (bit_I // 8)[None, :], mask=is_OI, other=0).to(tl.int32)
        is_OI = is_OI & (bit_I % 8 > 5)[None, :]
        high_OI = tl.load(byte_O1 + (bit_I // 8 + 1)[None, :], mask=is_OI, other=0).to(tl.int32)
        value_OI = (((low_OI | (high_OI << 8)) >> (bit_I % 8)[None, :]) & 7).to(tl.float32)
    else:
        EACH: tl.constexpr = 4 if CODE == "int2" else 2 if (CODE == "int4" or CODE == "e2m1") else 1
        byte_I = tl.arange(0, INPUTS // EACH) + i // EACH
        is_OI = is_O[:, None]
        if not EVEN:
            is_OI = is_OI & (byte_I < tl.cdiv(inputs, EACH))[None, :]
        code_OI = tl.load(byte_O1 + byte_I[None, :], mask=is_OI, other=0)
        if CODE == "e4m3":
            value_OI = code_OI.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        elif CODE == "s8":
            value_OI = code_OI.to(tl.int8, bitcast=True).to(tl.float32)
        elif CODE == "int2":
            even_OI = tl.interleave(code_OI & 3, (code_OI >> 4) & 3)
            odd_OI = tl.interleave((code_OI >> 2) & 3, code_OI >> 6)
            value_OI = tl.interleave(even_OI, odd_OI).to(tl.float32)
        elif CODE == "int4":
            value_OI = tl.interleave(code_OI & 15, code_OI >> 4).to(tl.float32)
        elif CODE == "e2m1":
            value_OI = tl.interleave(_e2m1(code_OI & 15), _e2m1(code_OI >> 4))
        else:
            value_OI = code_OI.to(tl.float32)
    return value_OI


@triton.jit
def _e2m1(code):
    """Sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    code = code.to(tl.int32)
    exponent, mantissa = (code >> 1) & 3, code & 1
    twice = tl.where(exponent == 0, mantissa, (2 | mantissa) << tl.maximum(exponent - 1, 0))
    return twice.to(tl.float32) * tl.where(code > 7, -0.5, 0.5)


@triton.jit
def _widened(
    scales,
    place_O,
    is_O,
    i,
    inputs,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The scales of a tile in float32, [O, 1] where it lies in one group, else [O, I]; each is read once."""
    HELD: tl.constexpr = 1 if GROUP >= INPUTS else INPUTS // GROUP
    group_H = tl.arange(0, HELD) + i // GROUP
    is_OH = is_O[:, None]
    if not EVEN:
        is_OH = is_OH & (group_H < tl.cdiv(inputs, GROUP))[None, :]
    scale_OH = tl.load(scales + place_O[:, None] + group_H[None, :], mask=is_OH, other=0)
    if SCALE == "e8m0":
        bits_OH = scale_OH.to(tl.int32) << 23
        scale_OH = tl.where(bits_OH == 0, 1 << 22, bits_OH).to(tl.float32, bitcast=True)  # 2^-127 is subnormal
    elif SCALE == "e4m3":
        scale_OH = scale_OH.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        scale_OH = scale_OH.to(tl.float32)
    if HELD > 1:
        scale_OH = tl.reshape(tl.broadcast_to(scale_OH[:, :, None], [OUTPUTS, HELD, GROUP]), [OUTPUTS, INPUTS])
    return scale_OH
