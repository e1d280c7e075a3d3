"""Matrices in 8 or 4 bits: groups of a row share a scale, by which their codes are multiplied to get numbers back.

int, 8 bit: w = s q, q in -127 ... 127, s = max |w| / 127 of the group.
int, 4 bit: w = s (q - z), q in 0 ... 15, s = (max - min) / 15 of the group (0 among its values), z whole, in 0 ... 15.
nf4: w = c t[q], t the 16 levels of NormalFloat (Dettmers et al., 2023, "QLoRA"), c = max |w| of the group. With
`double` the c of all groups are themselves rounded: their mean is kept, and what is left in 8 bits, 256 groups to a
scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.errors import BadInput
from plait.math.threads import over_rows

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Levels whose neighbours a normal variable, scaled into [-1, 1], meets about equally often; 0 is one of them."""
SECOND = 256
"""How many groups' scales share a scale of their own."""
KERNEL_FROM = 2**15
"""How many codes make a CPU kernel worth its start; below, torch's own operations run."""

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """How numbers are coded: bits 8 or 4, format "int" or "nf4" (4 bit only), group 0 for whole rows."""

    bits: int
    format: str
    group: int
    double: bool = False

    def __str__(self) -> str:
        """Say it in words.

        >>> print(Form(bits=4, format="nf4", group=64, double=True))
        4-bit nf4 in groups of 64, its scales quantized too
        """
        where = f"in groups of {self.group}" if self.group else "by rows"
        return f"{self.bits}-bit {self.format} {where}{', its scales quantized too' if self.double else ''}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that hold a coded matrix."""
        if self.format == "nf4":
            return ("codes", "scales", "second", "centre") if self.double else ("codes", "scales")
        return ("codes", "scales") if self.bits == 8 else ("codes", "scales", "zeros")

    def width(self, columns: int) -> int:
        """Return how many numbers of a row of that many share a scale."""
        return min(self.group or columns, columns)


def encode(matrix: Tensor, form: Form) -> Parts:
    """Return the codes and scales of a matrix [rows, columns]; the last group of a row may be a shorter one.

    codes: int8 [rows, groups, width], or uint8 [rows, groups, ceil(width / 2)], two codes in a byte, the first in its
    upper half. scales: [rows, groups], float32 (bfloat16 for int in 4 bits, int8 with `double`). zeros: uint8
    [rows, groups]. Raises BadInput for what is not finite.
    """
    rows, columns = matrix.shape
    width = form.width(columns)
    groups = F.pad(matrix.float(), (0, -columns % width)).contiguous().view(rows, -1, width)
    if not bool(torch.isfinite(groups.sum())) and not bool(torch.isfinite(groups).all()):
        raise BadInput(
            "a weight that is to be quantized holds NaN or infinite numbers: load the model's weights first."
        )
    if form.format == "nf4":
        return _encode_normal(groups, form)
    return _encode_signed(groups) if form.bits == 8 else _encode_between(groups)


def _encode_signed(groups: Tensor) -> Parts:
    scales = groups.abs().amax(2) / 127
    codes = (groups * _inverse(scales)[..., None]).round_().clamp_(-127, 127).to(torch.int8)
    return {"codes": codes, "scales": scales}


def _encode_between(groups: Tensor) -> Parts:
    low, high = groups.amin(2).clamp_max_(0), groups.amax(2).clamp_min_(0)
    scales = ((high - low) / 15).to(torch.bfloat16)
    inverse = _inverse(scales.float())
    zeros = (-low * inverse).round_().clamp_(0, 15)
    codes = (groups * inverse[..., None]).round_().add_(zeros[..., None]).clamp_(0, 15)
    return {"codes": _two_in_a_byte(codes.to(torch.uint8)), "scales": scales, "zeros": zeros.to(torch.uint8)}


def _encode_normal(groups: Tensor, form: Form) -> Parts:
    scales, levels = groups.abs().amax(2), torch.tensor(NF4, device=groups.device)
    between = (levels[1:] + levels[:-1]) / 2
    if (kernels := _kernels_for(groups)) is not None:
        codes = torch.empty(groups.shape, dtype=torch.uint8)
        over_rows(kernels.nearest, groups, _inverse(scales), between, codes, least=KERNEL_FROM)
    else:
        codes = torch.bucketize(groups * _inverse(scales)[..., None], between, out_int32=True).to(torch.uint8)
    packed = {"codes": _two_in_a_byte(codes)}
    if not form.double:
        return packed | {"scales": scales}
    mean = scales.mean()
    blocks = F.pad((scales - mean).flatten(), (0, -scales.numel() % SECOND)).view(-1, SECOND)
    second = blocks.abs().amax(1) / 127
    rounded = (blocks * _inverse(second)[:, None]).round_().to(torch.int8)
    return packed | {
        "scales": rounded.flatten()[: scales.numel()].view(scales.shape),
        "second": second,
        "centre": mean,
    }


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, 1 / scales, 0.0)


def _two_in_a_byte(codes: Tensor) -> Tensor:
    even = F.pad(codes, (0, codes.shape[-1] % 2))
    return (even[..., ::2] << 4) | even[..., 1::2]


def scales_of(parts: Parts, form: Form) -> Tensor:
    """Return the scales [rows, groups] of a coded matrix in float32."""
    scales = parts["scales"].float()
    if not (form.format == "nf4" and form.double):
        return scales
    second = parts["second"].repeat_interleave(SECOND)[: scales.numel()].view(scales.shape)
    return (scales * second + parts["centre"]).clamp_min_(0)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor | None, form: Form, columns: int) -> Tensor:
    """Return the numbers [rows, columns] in float32; codes, zeros as `encode` gives them, scales as `scales_of`."""
    width, scale = form.width(columns), scales[..., None]
    if form.bits == 8:
        numbers = codes * scale
    else:
        pairs = _pairs(form.format, codes.device)
        whole = columns % width == 0 and width % 2 == 0
        if whole and (kernels := _kernels_for(codes, scales, zeros)) is not None:
            made = torch.empty(len(codes), columns)
            empty = torch.empty(0, 0, dtype=torch.uint8) if zeros is None else zeros
            over_rows(kernels.numbers, made, codes, scales, empty, pairs, least=KERNEL_FROM)
            return made
        numbers = F.embedding(codes.int(), pairs).flatten(2)[..., :width]
        numbers = numbers.mul_(scale) if zeros is None else numbers.sub_(zeros[..., None]).mul_(scale)
    return numbers.flatten(1)[:, :columns]


@cache
def _kernels() -> ModuleType | None:
    try:
        from plait.math import quantization_kernels
    except (ImportError, RuntimeError):  # no numba for this platform, or nowhere to keep what it compiled
        return None
    return quantization_kernels


def _kernels_for(first: Tensor, *rest: Tensor | None) -> ModuleType | None:
    """Return the compiled kernels where they run on these tensors: plain ones, on a CPU, and not small."""
    plain = all(
        type(t) is Tensor and t.device.type == "cpu" and t.is_contiguous() for t in (first, *rest) if t is not None
    )
    if not plain or first.numel() < KERNEL_FROM or torch.compiler.is_compiling():
        return None
    return _kernels()


def _pairs(format: str, device: torch.device) -> Tensor:
    """Return the two numbers that each byte stands for, [256, 2]."""
    levels = torch.tensor(NF4) if format == "nf4" else torch.arange(16.0)
    byte = torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1).to(device)
