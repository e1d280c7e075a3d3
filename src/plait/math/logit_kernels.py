"""CPU kernels of the logit statistics: one pass over each row, vectorized exponentials, float32 or bfloat16 (as int16).

Import this module only where it is needed: it loads numba. Each row is worked through in blocks that stay in the first
cache, so the maximum, the sum and the sum of exponentials cost one reading of the logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from plait.math.kernel_functions import bits_of, float_of

BLOCK = 4096
SHIFT = np.int32(23)
LOG2_E = np.float32(1.4426950408889634)
ROUNDER = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to a whole number, whose bits then stand lowest
ROUNDER_BITS = np.int32(127 - 0x4B400000)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# exp(r) = 1 + r + r^2 q(r) for |r| <= ln(2) / 2: the minimax polynomial q of Cephes' expf, highest power first
Q5, Q4, Q3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
Q2, Q1, Q0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
LOWEST, ZERO, ONE = np.float32(-87.0), np.float32(0), np.float32(1)
NOTHING: Any = np.float32(-np.inf)


@intrinsic
def _read(context: Any, stored: Any) -> Any:
    """Return a stored number as float32; an int16 holds a bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        wide = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(stored), generate


@intrinsic
def _stored(context: Any, number: Any, like: Any) -> Any:
    """Return a float32 in the type of `like`, rounded to the nearest bfloat16 (ties to even) for an int16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[1] == types.float32:
            return arguments[0]
        word = ir.IntType(32)
        bits, sixteen = builder.bitcast(arguments[0], word), ir.Constant(word, 16)
        odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(word, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, sixteen), ir.IntType(16))

    return like(types.float32, like), generate


@njit(error_model="numpy", fastmath={"contract"}, cache=True)
def exp_below_zero(x: Any) -> Any:
    """exp(x) for x <= 0 within 1e-7 relative, never below exp(-87); NaN stays NaN."""
    x = LOWEST if x < LOWEST else x
    shifted = x * LOG2_E + ROUNDER
    whole = shifted - ROUNDER
    r = x - whole * LN2_HIGH - whole * LN2_LOW
    q = ((((Q5 * r + Q4) * r + Q3) * r + Q2) * r + Q1) * r + Q0
    return (q * (r * r) + r + ONE) * float_of((bits_of(shifted) + ROUNDER_BITS) << SHIFT)


@njit(error_model="numpy", cache=True)
def _ordered(bits: Any) -> Any:
    """Map float bits to integers of the same order, and back: whole numbers have a vectorized maximum."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"}, nogil=True, cache=True)
def forward(first: int, last: int, z: Any, target: Any, ignore: int, out: Any, argmax: Any) -> None:
    """Fill out[i] = (log sum exp(z_i - max z_i), z_i[target_i], mean z_i, max z_i) and argmax; 0 where ignored."""
    classes = z.shape[1]
    for i in range(first, last):
        argmax[i] = 0
        if target[i] == ignore:
            out[i, :] = ZERO
            continue
        row = z[i]
        top, total, best = NOTHING, ZERO, 0
        mean: Any = 0.0
        for start in range(0, classes, BLOCK):
            block = row[start : min(start + BLOCK, classes)]
            highest, added = np.int32(-(2**31)), ZERO
            for j in range(block.size):
                v = _read(block[j])
                highest = max(highest, _ordered(bits_of(v)))
                added += v
            peak = float_of(_ordered(highest))
            mean += added
            if peak == NOTHING:  # a block of masked classes
                continue
            if not peak <= top:  # also when it is NaN
                total *= exp_below_zero(top - peak)
                top, best = peak, start
            exponentials = ZERO
            for j in range(block.size):
                exponentials += exp_below_zero(_read(block[j]) - top)
            total += exponentials
        for j in range(best, min(best + BLOCK, classes)):
            if _read(row[j]) == top:
                argmax[i] = j
                break
        out[i, 0], out[i, 1] = np.log(total), _read(row[target[i]])
        out[i, 2], out[i, 3] = mean / classes, top


@njit(error_model="numpy", fastmath={"contract"}, nogil=True, cache=True)
def backward(
    first: int, last: int, z: Any, target: Any, ignore: int, out: Any, argmax: Any, slopes: Any, into: Any, inside: bool
) -> None:
    """Fill into[i] with the gradient in the logits of sum_k slopes[i, k] out[i, k]; `inside`: into is z itself."""
    classes = z.shape[1]
    for i in range(first, last):
        row = into[i]
        scale, level = slopes[i, 0], slopes[i, 2] / np.float32(classes)
        if target[i] == ignore or (scale == 0 and level == 0):
            for j in range(classes):
                row[j] = _stored(ZERO, row[j])
            at_target = at_top = ZERO
        if target[i] == ignore:
            continue
        top, log_sum, hot, aim = out[i, 3], out[i, 0], argmax[i], target[i]
        at_top = scale * exp_below_zero(_read(z[i, hot]) - top - log_sum) + level + (slopes[i, 3] - scale)
        at_target = scale * exp_below_zero(_read(z[i, aim]) - top - log_sum) + level + slopes[i, 1]
        if hot == aim:
            at_top = at_target = at_top + slopes[i, 1]
        if not (scale == 0 and level == 0):
            for start in range(0, classes, BLOCK):
                block = row[start : min(start + BLOCK, classes)]
                if not inside:  # through the cache: an in-place loop has no aliasing to fear
                    block[:] = z[i, start : start + block.size]
                for j in range(block.size):
                    block[j] = _stored(scale * exp_below_zero(_read(block[j]) - top - log_sum) + level, block[j])
        row[hot], row[aim] = _stored(at_top, row[hot]), _stored(at_target, row[aim])
