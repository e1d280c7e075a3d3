"""How the running states of an update rule are kept between steps: float32, bfloat16, or 8 bit; in torch's own calls.

bfloat16 and 8 bit are rounded at random, up or down, so that the expected value is the number itself: a mean that moves
by a thousandth per step would never move if it were rounded to nearest. The random bits are a hash of the step and the
element's index: nothing has to be kept or drawn, and a resumed run rounds as the uninterrupted one.

8 bit is the block-wise dynamic tree code of Dettmers et al. (2022), "8-bit optimizers via block-wise quantization":
each run of 256 elements of a row is divided by its largest magnitude, which is kept in float32; the leading zeros of
the byte are the exponent, the bits after the leading one a linear fraction. Three departures. The base of the
exponent is a power of two, not 10, so that coding is arithmetic in place of a search through a table: 8 where a block
has two signs (7 bits beside the sign), 16 where it has one (8 bits; such are running squares, whose range is twice
that of what was squared). The fraction joins one exponent's range to the next without a gap, so that rounding at
random is without bias. And in a block without a sign nothing positive becomes 0: it would be divided by.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("float32", "bfloat16", "8bit")
"""How states can be kept; float64 weights keep float64 in place of float32."""
BLOCK = 256
"""Elements of a row that share a scale."""
SMALLEST = 4096
"""Weights of fewer elements keep float32 in place of 8 bit, as do vectors and rows shorter than 64."""
MASK = 0xFFFFFFFF
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
STRIDE = 0x9E3779B9
UNIFORM = (1 - 1 / 1024) / 65536
"""What 16 random bits are multiplied by: less than 1 in all, so that the largest code stays the largest."""


def kind_for(wanted: str, shape: torch.Size | tuple[int, ...]) -> str:
    """Return how the states of a weight of that shape are kept, where `wanted` is asked for."""
    small = len(shape) < 2 or math.prod(shape) < SMALLEST or math.prod(shape[1:]) < 64
    return "float32" if wanted == "8bit" and small else wanted


def blocks(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the scales of a weight: its rows, and the blocks in each."""
    return shape[0], -(-math.prod(shape[1:]) // BLOCK)


def scramble(x: int) -> int:
    """Return a hash of 32 bits of a number of 32 bits: the same as `bits_at`'s, of one number."""
    x = (x ^ (x >> 16)) * MULTIPLIERS[0] & MASK
    x = (x ^ (x >> 15)) * MULTIPLIERS[1] & MASK
    return x ^ (x >> 16)


def key_of(step: int) -> int:
    """Return the random key of a rule's step 1, 2, ..."""
    return scramble((step * STRIDE) & MASK)


def bits_at(key: int, index: Tensor, state: int) -> Tensor:
    """Return 16 random bits (int64) for each index; states 0 and 1, 2 and 3, ... share a number of 32 bits."""
    x = (index + scramble((key + state // 2) & MASK)) & MASK
    x = ((x ^ (x >> 16)) * MULTIPLIERS[0]) & MASK
    x = ((x ^ (x >> 15)) * MULTIPLIERS[1]) & MASK
    x = x ^ (x >> 16)
    return x >> 16 if state % 2 else x & 0xFFFF


def to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with the probability that keeps the mean; what is not finite stays as it is."""
    moved = (values.view(torch.int32).long() + bits).to(torch.int32) & -65536
    return torch.where(torch.isfinite(values), moved.view(torch.float32), values).to(torch.bfloat16)


def _code(signed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (exponents, bits per exponent, base) of the code of each block."""
    exponents, shift = torch.where(signed, 6, 7), torch.where(signed, 3, 4)
    return exponents, shift, torch.exp2(shift.float())


def _in_blocks(values: Tensor) -> Tensor:
    """[rows, ...] -> [rows, blocks, 256], filled up with zeros."""
    rows = values.reshape(values.shape[0], -1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).view(rows.shape[0], -1, BLOCK)


def _out_of_blocks(blocked: Tensor, shape: torch.Size) -> Tensor:
    return blocked.flatten(1)[:, : math.prod(shape[1:])].reshape(shape)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values of 8-bit codes [rows, ...] and scales [rows, blocks]; a scale below 0 says: signed."""
    scale = scales[..., None]
    signed = torch.signbit(scale)
    exponents, _, base = _code(signed)
    stored = _in_blocks(codes).long()
    code = torch.where(signed, stored & 127, stored)
    k = torch.floor(torch.log2(code.clamp(min=1).float()))
    fraction = code / torch.exp2(k) - 1
    size = torch.where(code > 0, base ** (k - exponents) * (1 / base + (1 - 1 / base) * fraction), 0.0)
    negative = signed & (stored > 127)
    return _out_of_blocks(torch.where(negative, -size, size) * scale.abs(), codes.shape)


def encode(values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8-bit codes [rows, ...] of float32 values [rows, ...], and scales [rows, blocks]; bits as of `bits_at`.

    A block that is not finite becomes NaN.
    """
    blocked, drawn = _in_blocks(values), _in_blocks(bits)
    most = blocked.abs().amax(2, keepdim=True)
    most = torch.where(torch.isfinite(most), most, torch.nan)
    signed = (blocked < 0).any(2, keepdim=True)
    exponents, shift, base = _code(signed)
    top = 1 - (1 - 1 / base) * torch.exp2(-exponents.float())  # the value of the largest code
    size = torch.where(most > 0, blocked.abs() * (top / most), 0.0)
    _, power = torch.frexp(size)  # size in [2^(power - 1), 2^power)
    k = torch.div(power - 1 + shift * (exponents + 1), shift, rounding_mode="floor")
    inside = torch.exp2(k.float()) * (base / (base - 1) * base ** (exponents - k) * size + 1 - 1 / (base - 1))
    place = torch.where((k < 0) | (size == 0), size * base ** (exponents + 1), inside)
    code = torch.floor(place + drawn * UNIFORM).nan_to_num(0).clamp(max=torch.exp2(exponents + 1.0) - 1)
    code = torch.where(~signed & (blocked != 0), code.clamp(min=1), code).to(torch.uint8)
    code = torch.where(signed & torch.signbit(blocked), code | 128, code)
    scale = torch.where(signed, -most / top, most / top).squeeze(2)
    return _out_of_blocks(code, values.shape), scale
