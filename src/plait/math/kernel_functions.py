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
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic

from plait.math.storage import BLOCK, UNIFORM

HOW: dict[str, Any] = {"fastmath": {"contract", "arcp", "afn", "nsz", "reassoc"}, "error_model": "numpy"}
"""Reordering and approximate division are allowed; NaN and infinity keep their meaning. With Python's checks for
division by zero the loops would not be vectorized: hence error_model."""
INLINE: dict[str, Any] = {**HOW, "forceinline": True}
"""For what is called once a block: a call would cost as much as a dozen elements."""

WORD = ir.IntType(32)
ZERO, ONE, TWO = np.int32(0), np.int32(1), np.int32(2)
MULTIPLIER_1, MULTIPLIER_2 = np.int32(0x7FEB352D), np.int32(0x846CA68B - (1 << 32))
HALF, LOW, HIGH = np.int32(16), np.int32(0xFFFF), np.int32(-65536)
MANTISSA = np.int32(23)
FRACTION, UNIT = np.int32(0x7FFFFF), np.int32(0x3F800000)
POSITIVE, INFINITE, SIGN = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(128)
SMALLEST, LARGEST = np.float32(1e-26), np.float32(3e38)
F0, F1, PART = np.float32(0), np.float32(1), np.float32(UNIFORM)
LEAST = np.float32(2**-126)
"""A smaller number has no inverse in float32."""


def _address(kind: Any) -> Any:
    """Return a function (address) -> pointer to numbers of that kind."""

    @intrinsic
    def at(context: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), code

    return at


floats_at, halves_at, bytes_at = _address(types.float32), _address(types.int16), _address(types.uint8)


def _block(kind: Any) -> Any:
    """Return a function () -> pointer to a block of numbers of that kind, which lasts as long as its caller runs.

    It begins with a line of the cache: whole vectors that straddle two lines are read and written at half the speed.
    """

    @intrinsic
    def block(context: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = alloca_once(builder, ir.ArrayType(context.get_value_type(kind), BLOCK))
            place.align = 64
            return builder.bitcast(place, context.get_value_type(signature.return_type))

        return types.CPointer(kind)(), code

    return block


float_block, word_block = _block(types.float32), _block(types.int32)


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
def unsigned_larger(context: Any, one: Any, other: Any) -> Any:
    """Return the larger of two words, taken as whole numbers without a sign."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.icmp_unsigned(">", *arguments), *arguments)

    return types.int32(types.int32, types.int32), code


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


@intrinsic
def exactly(context: Any, stored: Any) -> Any:
    """Return a float32, or a bfloat16 held as int16, in float64."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (held,) = arguments
        if signature.args[0] == types.int16:
            bits = builder.shl(builder.zext(held, WORD), ir.Constant(WORD, 16))
            held = builder.bitcast(bits, ir.FloatType())
        return builder.fpext(held, ir.DoubleType())

    return types.float64(stored), code


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


def _field(exponent: int) -> Any:
    """Return the bits of a float32 whose exponent is kept as that number, 127 more than it is, as a word."""
    return np.int32(exponent << 23)


def _decoder(with_sign: bool) -> Any:
    """Return a function (codes, scale, values) that fills values with what codes mean.

    With c = code / 2^exponents and p the power of two below it, a code means p^(bits - 1) ((1 - 1/base) c + start p).
    """
    exponents, _, base, _ = _code(with_sign)
    mask, part = np.int32(127 if with_sign else 255), np.float32(1 / base)
    above = 23 - exponents  # the last bit of a float32 of size 2^above is 2^-exponents
    ruler, ruler_bits = np.float32(2.0**above), _field(127 + above)

    @njit(**INLINE)
    def decode(codes: Any, scale: Any, values: Any) -> None:
        slope = scale - scale * part
        start = scale * part - slope
        for i in range(codes.size):
            stored = word_of(codes[i])
            code = float_of(either(both(stored, mask), ruler_bits)) - ruler
            power = float_of(both(bits_of(code), INFINITE))  # 0 where the code is
            value = (slope * code + start * power) * (power * power)
            if with_sign:
                value = float_of(either(bits_of(value), left(both(stored, SIGN), np.int32(24))))
            else:
                value = value * power
            values[i] = value

    return decode


def _signed_encoder() -> Any:
    """Return a function (values, largest magnitude, random words, which 16 bits of them, codes) that fills codes.

    A size of k = floor(log8(size)) + 7 >= 0 has the code 2^k (rise size / 8^(k - 6) + start), a smaller one 8^7 size.
    """
    _, _, base, value_of_largest = _code(True)
    first = 35  # a half of 8^-7, the size at which k = 0, has the exponent 3 * 35
    top, lowest, small = np.float32(value_of_largest / 2), np.float32(base**-7 / 2), np.float32(2 * base**7)
    rise, start = np.float32(2 * base / (base - 1)), np.float32((1 - 1 / (base - 1)) * 2.0 ** (127 - first))
    high, third = _field(127 + 18 + 2 * first), np.int32((1 << 16) // 3 + 1)  # third n >> 16 is n // 3

    @njit(**INLINE)
    def encode(values: Any, most: Any, random: Any, which: Any, codes: Any) -> None:
        scale = top / max(most, LEAST)
        slope = scale * rise
        for i in range(codes.size):
            bits = bits_of(values[i])
            magnitude = float_of(both(bits, POSITIVE))
            half = magnitude * scale
            power = both(multiply(right(bits_of(half), HALF), third), INFINITE)  # an exponent of first + k
            place = magnitude * slope * float_of(subtract(high, add(power, power))) + start * float_of(power)
            place = half * small if half < lowest else place
            code = np.int32(place + np.float32(both(right(random[i], which), LOW)) * PART)
            codes[i] = byte_of(either(code, both(right(bits, np.int32(24)), SIGN)))

    return encode


def _positive_encoder() -> Any:
    """Return a function (values, largest one, random words, which 16 bits of them, codes) that fills codes.

    A size of k = floor(log16(size)) + 8 >= 0 has the code 2^k (rise size / 16^(k - 7) + start), a smaller one 1.
    """
    _, _, base, value_of_largest = _code(False)
    first = 24  # twice 16^-8, the size at which k = 0, has the exponent 4 * 24
    top, lowest = np.float32(2 * value_of_largest), np.float32(2 * base**-8)
    rise = np.float32(base / (base - 1) * base**7 / 2 ** (first + 1))
    start = np.float32((1 - 1 / (base - 1)) / 2**first)
    inside, of_lowest = np.int32((1 << 25) - 1), _field(4 * first)

    @njit(**INLINE)
    def encode(values: Any, most: Any, random: Any, which: Any, codes: Any) -> None:
        scale = top / max(most, LEAST)
        for i in range(codes.size):
            bits = bits_of(max(values[i] * scale, lowest))
            rest = float_of(either(both(bits, inside), of_lowest))  # size / 16^k
            power = both(right(bits, TWO), INFINITE)  # an exponent of first + k
            place = float_of(add(bits_of(rise * rest + start), power))
            code = np.int32(place + np.float32(both(right(random[i], which), LOW)) * PART)
            codes[i] = byte_of(code if values[i] != F0 else ZERO)

    return encode


decode_signed, decode_positive = _decoder(True), _decoder(False)
encode_signed, encode_positive = _signed_encoder(), _positive_encoder()
TOP_SIGNED, TOP_POSITIVE = np.float32(_code(True)[3]), np.float32(_code(False)[3])


@njit(**INLINE)
def unpack(codes: Any, scale: Any, values: Any) -> None:
    """Fill values with what the 8-bit codes of one block mean; a scale below 0 says that they have signs."""
    if bits_of(scale) < ZERO:
        decode_signed(codes, -scale, values)
    else:
        decode_positive(codes, scale, values)


@njit(**INLINE)
def reach(most: Any, least: Any, value: Any) -> tuple[Any, Any]:
    """Return the bits of the largest positive number and of the most negative one, so far: 0 where there is none.

    As whole numbers, bits are in the order of magnitudes, and without a sign those of numbers below 0 are the largest.
    """
    return max(most, bits_of(value)), unsigned_larger(least, bits_of(value))


@njit(**INLINE)
def pack(values: Any, most: Any, least: Any, codes: Any, random: Any, which: Any) -> Any:
    """Fill the 8-bit codes of one block, rounded by 16 of the random bits (from 0 or 16 on); return its scale."""
    below = both(least, POSITIVE) if least < ZERO else ZERO
    largest = float_of(max(most, below))
    if below > ZERO:
        encode_signed(values, largest, random, which, codes)
        return -largest / TOP_SIGNED
    encode_positive(values, largest, random, which, codes)
    return largest / TOP_POSITIVE


@njit(**HOW)
def sums(some: Any, cross: Any, other: Any, one: Any, two: Any) -> tuple[Any, Any, Any]:
    """Return a block's float32 sums of one^2, one * two and two^2 in float64: anew where squares may have left float32.

    Squares too small for float32 are less than 1e-34 in all, which sums above 1e-26 do not notice.
    """
    if SMALLEST < some < LARGEST and SMALLEST < other < LARGEST:
        return np.float64(some), np.float64(cross), np.float64(other)
    a, b, c = 0.0, 0.0, 0.0
    for i in range(two.size):
        x, y = exactly(one[i]), exactly(two[i])
        a += x * x
        b += x * y
        c += y * y
    return a, b, c


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
