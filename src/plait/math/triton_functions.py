"""What the Triton kernels of the update rules read and write with: the functions of `plait.math.kernel_functions`.

Import this module only where it is needed: it loads Triton. bfloat16 is read and written as 16 bits, so that rounding
is the same on every device and in Triton's interpreter, which knows Triton's own functions under `tl` only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plait.math.storage import UNIFORM as _UNIFORM

UNIFORM = tl.constexpr(_UNIFORM)


@triton.jit
def sqrt(x: tl.tensor) -> tl.tensor:
    """Return the square root."""
    return tl.sqrt(x)


@triton.jit
def exp(x: tl.tensor) -> tl.tensor:
    """Return e^x."""
    return tl.exp(x)


@triton.jit
def abs(x: tl.tensor) -> tl.tensor:
    """Return the magnitude."""
    return tl.abs(x)


@triton.jit
def maximum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Return the larger of two; NaN stays NaN."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Return the smaller of two; NaN stays NaN."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def where(condition: tl.tensor, yes: tl.tensor, no: tl.tensor) -> tl.tensor:
    """Return `yes` where the condition holds, else `no`."""
    return tl.where(condition, yes, no)


@triton.jit
def sign(x: tl.tensor) -> tl.tensor:
    """Return -1, 0 or 1; NaN stays NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def hashed(key: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Return 32 random bits for each element: two states take 16 of them each."""
    x = key + index.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def widened(stored: tl.tensor) -> tl.tensor:
    """Return the float32 of a bfloat16, held as uint16."""
    return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def narrowed(number: tl.tensor) -> tl.tensor:
    """Return the nearest bfloat16, ties to even, as uint16."""
    bits = number.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return (tl.where(finite, bits + 0x7FFF + ((bits >> 16) & 1), bits) >> 16).to(tl.uint16)


@triton.jit
def drawn(number: tl.tensor, random: tl.tensor) -> tl.tensor:
    """Return the bfloat16 below or above, at random (16 bits), as uint16."""
    bits = number.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return (tl.where(finite, bits + random, bits) >> 16).to(tl.uint16)


@triton.jit
def decode(stored: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return what 8-bit codes [n, 256] mean; a scale [n, 1] below 0 says that they have signs."""
    signed = scale.to(tl.int32, bitcast=True) < 0
    stored = stored.to(tl.int32)
    code = tl.where(signed, stored & 127, stored)
    bits = code.to(tl.float32).to(tl.int32, bitcast=True)
    k = tl.maximum((bits >> 23) - 127, 0)
    power = tl.where(signed, 3 * (k - 6), 4 * (k - 7)) + 127
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    size = tl.abs(scale)
    start = tl.where(signed, 0.125, 0.0625) * size
    value = (power << 23).to(tl.float32, bitcast=True) * (start + (size - start) * fraction)
    value = tl.where(code > 0, value, 0.0 * size)
    return tl.where(signed & (stored > 127), -value, value)


@triton.jit
def encode(value: tl.tensor, inside: tl.tensor, random: tl.tensor) -> tl.tensor:
    """Return 8-bit codes and scales [n, 1] of values [n, 256], rounded by 16 random bits; `inside` a row.

    As whole numbers, bits are in the order of magnitudes, and NaN's are the largest. What is not finite has no code.
    """
    magnitude = tl.where(inside, tl.abs(value), 0.0)
    most = tl.max(magnitude.to(tl.int32, bitcast=True), axis=1, keep_dims=True).to(tl.float32, bitcast=True)
    most = most + (most - most)
    signed = tl.max(tl.where(inside & (value < 0), 1, 0), axis=1, keep_dims=True) > 0
    top = tl.where(signed, 1 - 0.875 / 64, 1 - 0.9375 / 128)
    base = tl.where(signed, 8.0, 16.0)
    size = magnitude * tl.where(most > 0, top / most, 0.0)
    steps = (size.to(tl.int32, bitcast=True) >> 23) - tl.where(signed, 127 - 21, 127 - 32)
    above = tl.maximum(steps, 0)
    k = tl.where(signed, (above * 86) >> 8, above >> 2)
    two = ((k + 127) << 23).to(tl.float32, bitcast=True)
    up = ((tl.where(signed, 3 * (6 - k), 4 * (7 - k)) + 127) << 23).to(tl.float32, bitcast=True)
    place = two * (base / (base - 1.0) * up * size + (1.0 - 1.0 / (base - 1.0)))
    place = tl.where(steps >= 0, place, size * tl.where(signed, 2097152.0, 4294967296.0))
    code = (place + random.to(tl.float32) * UNIFORM).to(tl.int32)
    negative = value.to(tl.int32, bitcast=True) < 0
    positive_code = tl.where(magnitude > 0, tl.maximum(code, 1), 0)
    code = tl.where(signed, code | tl.where(negative, 128, 0), positive_code)
    return code.to(tl.uint8), tl.where(signed, -most, most) / top
