"""What the CPU kernels of the update rules read and write with: float32, bfloat16 (as int16) and the 8-bit tree code.

Import this module only where it is needed: it loads numba. Whole numbers are kept in 32 bits by instructions of their
own, since numba would widen them to 64 and halve the speed. The codes and the hash are those of `plait.math.storage`,
which says what they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from plait.math.storage import UNIFORM

HOW: dict[str, Any] = {"fastmath": {"contract", "arcp", "afn", "nsz", "reassoc"}, "error_model": "numpy"}
"""Reordering and approximate division are allowed; NaN and infinity keep their meaning. With Python's checks for
division by zero the loops would not be vectorized: hence error_model."""

WORD = ir.IntType(32)
ZERO, ONE, TWO = np.int32(0), np.int32(1), np.int32(2)
MULTIPLIER_1, MULTIPLIER_2 = np.int32(0x7FEB352D), np.int32(0x846CA68B - (1 << 32))
HALF, LOW, HIGH = np.int32(16), np.int32(0xFFFF), np.int32(-65536)
MANTISSA = np.int32(23)
FRACTION, UNIT = np.int32(0x7FFFFF), np.int32(0x3F800000)
POSITIVE, INFINITE, SIGN = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(128)
F0, F1, PART = np.float32(0), np.float32(1), np.float32(UNIFORM)


def _address(kind: Any) -> Any:
    """Return a function (address) -> pointer to numbers of that kind."""

    @intrinsic
    def at(context: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), code

    return at


floats_at, halves_at, bytes_at = _address(types.float32), _address(types.int16), _address(types.uint8)


def _word(name: str) -> Any:
    """Return an operation on two words of 32 bits that stays in 32 bits."""

    @intrinsic
    def operation(context: Any, one: Any, other: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(*arguments)

        return types.int32(types.int32, types.int32), code

    return operation


add, subtract, multiply = _word("add"), _word("sub"), _word("mul")
both, either, differ = _word("and_"), _word("or_"), _word("xor")
left, right = _word("shl"), _word("lshr")


@intrinsic
def bits_of(context: Any, number: Any) -> Any:
    """Return the bits of a float32 as an int32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], WORD)

    return types.int32(types.float32), code


@intrinsic
def float_of(context: Any, bits: Any) -> Any:
    """Return the float32 that an int32 holds the bits of."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), code


@intrinsic
def word_of(context: Any, number: Any) -> Any:
    """Return a whole number's lowest 32 bits, zeros before them if it has fewer."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return (builder.trunc if signature.args[0].bitwidth > 32 else builder.zext)(arguments[0], WORD)

    return types.int32(number), code


def _narrow(kind: Any) -> Any:
    """Return a function (word) -> its lowest bits."""

    @intrinsic
    def low(context: Any, word: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.trunc(arguments[0], ir.IntType(kind.bitwidth))

        return kind(types.int32), code

    return low


half_of, byte_of = _narrow(types.int16), _narrow(types.uint8)


@njit(**HOW)
def hashed(key: Any, index: Any) -> Any:
    """Return 32 random bits for an element: two states take 16 of them each."""
    x = add(key, word_of(index))
    x = multiply(differ(x, right(x, HALF)), MULTIPLIER_1)
    x = multiply(differ(x, right(x, np.int32(15))), MULTIPLIER_2)
    return differ(x, right(x, HALF))


@njit(**HOW)
def widened(stored: Any) -> Any:
    """Return the float32 of a bfloat16, held as int16."""
    return float_of(left(word_of(stored), HALF))


@njit(**HOW)
def narrowed(number: Any) -> Any:
    """Return the nearest bfloat16, ties to even, as int16."""
    bits = bits_of(number)
    rounded = add(add(bits, np.int32(0x7FFF)), both(right(bits, HALF), ONE))
    return half_of(right(rounded if both(bits, INFINITE) != INFINITE else bits, HALF))


@njit(**HOW)
def drawn(number: Any, random: Any) -> Any:
    """Return the bfloat16 below or above, at random (16 bits), as int16."""
    bits = bits_of(number)
    return half_of(right(add(bits, random) if both(bits, INFINITE) != INFINITE else bits, HALF))


def _code(signed: bool) -> tuple[int, int, float, float]:
    """Return (exponents, bits per exponent, base, value of the largest code) of a block's code."""
    exponents, shift = (6, 3) if signed else (7, 4)
    return exponents, shift, 2.0**shift, 1 - (1 - 0.5**shift) / 2**exponents


def _exponent(power: int) -> Any:
    """Return a power of two's place in a float32's bits, as a word; sums of such may wrap around."""
    bits = (power << 23) & 0xFFFFFFFF
    return np.int32(bits - (1 << 32) if bits >> 31 else bits)


def _decoder(with_sign: bool) -> Any:
    """Return a function (codes, scale, values) that fills values with what codes mean."""
    exponents, shift, base, _ = _code(with_sign)
    mask, offset = np.int32(127 if with_sign else 255), _exponent(127 - (127 + exponents) * shift)
    part = np.float32(1 / base)

    @njit(**HOW)
    def decode(codes: Any, scale: Any, values: Any) -> None:
        slope = scale - scale * part
        start = scale * part - slope
        for i in range(codes.size):
            stored = word_of(codes[i])
            code = both(stored, mask)
            bits = bits_of(np.float32(code))
            place = both(bits, INFINITE)
            place = add(place, left(place, ONE)) if with_sign else left(place, TWO)  # times shift
            value = float_of(add(place, offset)) * (start + slope * float_of(either(both(bits, FRACTION), UNIT)))
            value = value if code != ZERO else F0
            if with_sign:
                value = float_of(either(bits_of(value), left(both(stored, SIGN), np.int32(24))))
            values[i] = value

    return decode


def _encoder(with_sign: bool) -> Any:
    """Return a function (values, largest magnitude, random words, which 16 bits of them, codes) that fills codes."""
    exponents, shift, base, value_of_largest = _code(with_sign)
    top, small = np.float32(value_of_largest), np.float32(base ** (exponents + 1))
    rise, start = np.float32(base / (base - 1)), np.float32(1 - 1 / (base - 1))
    lowest, high = _exponent(shift * (exponents + 1) - 127), _exponent(shift * exponents + 127)

    @njit(**HOW)
    def encode(values: Any, most: Any, random: Any, which: Any, codes: Any) -> None:
        inverse = top / most if most != F0 else F0
        for i in range(codes.size):
            bits = bits_of(values[i])
            magnitude = both(bits, POSITIVE)
            size = float_of(magnitude) * inverse
            steps = add(bits_of(size), lowest)
            above = np.int32(max(steps, ZERO))
            if with_sign:  # 86 n >> 8 is n // 3
                k = both(left(multiply(right(above, MANTISSA), np.int32(86)), np.int32(15)), INFINITE)
                power = subtract(high, left(k, ONE))
            else:
                k = both(right(above, TWO), INFINITE)
                power = subtract(high, add(k, left(k, ONE)))
            place = rise * float_of(power) * size + start * float_of(add(k, UNIT))
            if with_sign:
                place = place if steps >= ZERO else size * small
            uniform = np.float32(both(right(random[i], which), LOW)) * PART
            code = np.int32(place + uniform)
            if with_sign:
                code = either(code, both(right(bits, np.int32(24)), SIGN))
            else:
                code = np.int32(max(code, ONE))
                code = code if magnitude != ZERO else ZERO
            codes[i] = byte_of(code)

    return encode


decode_signed, decode_positive = _decoder(True), _decoder(False)
encode_signed, encode_positive = _encoder(True), _encoder(False)
TOP_SIGNED, TOP_POSITIVE = np.float32(_code(True)[3]), np.float32(_code(False)[3])


@njit(**HOW)
def unpack(codes: Any, scale: Any, values: Any) -> None:
    """Fill values with what the 8-bit codes of one block mean; a scale below 0 says that they have signs."""
    if bits_of(scale) < ZERO:
        decode_signed(codes, -scale, values)
    else:
        decode_positive(codes, scale, values)


@njit(**HOW)
def extent(values: Any) -> tuple[Any, Any]:
    """Return the largest magnitude of a block, and whether a number in it is below 0."""
    most, below = ZERO, ZERO
    for i in range(values.size):
        bits = bits_of(values[i])
        size = both(bits, POSITIVE)
        most = max(most, size)
        below = either(below, both(bits, subtract(ZERO, size)))
    return float_of(most), below < ZERO


@njit(**HOW)
def draw(key: Any, random: Any) -> None:
    """Fill `random` with the words of consecutive elements, the first of which has that key."""
    for i in range(random.size):
        random[i] = hashed(key, i)


@njit(**HOW)
def pack(values: Any, codes: Any, random: Any, which: Any) -> Any:
    """Fill the 8-bit codes of one block, rounded by 16 of the random bits (from 0 or 16 on); return its scale."""
    most, signed = extent(values)
    if signed:
        encode_signed(values, most, random, which, codes)
        return -most / TOP_SIGNED
    encode_positive(values, most, random, which, codes)
    return most / TOP_POSITIVE


@njit(error_model="numpy", fastmath={"contract"})
def exp(x: Any) -> Any:
    """e^x within 1e-7 as 2^k e^r, |r| <= ln(2) / 2, x held to [-87, 88]: the library's exp would not be vectorized."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    k = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - k * np.float32(0.693359375) - k * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = (p * r + np.float32(8.3334519073e-3)) * r + np.float32(4.1665795894e-2)
    p = (p * r + np.float32(1.6666665459e-1)) * r + np.float32(5.0000001201e-1)
    two_to_k = np.int32((np.int32(k) + np.int32(127)) * np.int32(1 << 23)).view(np.float32)
    return (p * r * r + r + np.float32(1)) * two_to_k
