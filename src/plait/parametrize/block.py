"""Adapters made of blocks that a weight's own blocks share: Bone, and MiSS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.layers import matrix_shape
from plait.method import Method, method
from plait.parametrize.base import Adapter, Parametrization
from plait.parametrize.low_rank import adapter_dtype


class BlockAffine(Parametrization):
    """W_oi -> W_oi + W_oi B_o + B_o for each r x r block of W,  B: [out / r, r, r], zeros at the start."""

    def __init__(self, weight: Tensor, size: int) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.zeros(weight.shape[0] // size, size, size, dtype=adapter_dtype(weight)))

    def dense(self, weight: Tensor) -> Tensor:
        """Return W with each block moved by an affine map of itself."""
        size = self.B.shape[-1]
        blocks = weight.to(self.B.dtype).view(-1, size, weight.shape[1] // size, size).transpose(1, 2)
        return (
            (blocks + blocks @ self.B.unsqueeze(1) + self.B.unsqueeze(1))
            .transpose(1, 2)
            .reshape(weight.shape)
            .to(weight.dtype)
        )


class SharedBlock(Parametrization):
    """W -> W + [B B ... B],  B: [out, r] repeated along the inputs (cut at the end), zeros at the start."""

    def __init__(self, weight: Tensor, size: int) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.zeros(weight.shape[0], size, dtype=adapter_dtype(weight)))

    def dense(self, weight: Tensor) -> Tensor:
        """Return W + [B B ... B]."""
        times = -(-weight.shape[1] // self.B.shape[1])
        return (weight.to(self.B.dtype) + self.B.repeat(1, times)[:, : weight.shape[1]]).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return W x + B (the sum of the blocks of x), for linear layers."""
        if not isinstance(layer, nn.Linear):
            return None
        size, width = self.B.shape[1], inputs.shape[-1]
        padded = F.pad(inputs, (0, -width % size))
        summed = padded.view(*padded.shape[:-1], padded.shape[-1] // size, size).sum(-2)
        return below() + F.linear(summed, self.B.to(summed.dtype))


@paper("kang2024bone", key="bone")
@method
class Bone(Adapter):
    """kind "affine": W'_oi = W_oi + W_oi B_o + B_o for the r x r blocks W_oi of W, B_o [r, r] shared along a row of
    blocks; "shared": W' = W + [B B ... B] with B [out, r] repeated along the inputs (MiSS). B is zero at the start.

    Either trains out * rank numbers a layer, half of what LoRA of that rank has in a square layer, and is of full rank.
    "affine" is guided by the frozen weight and forms the weight at each step; "shared" does not. The definitions are
    those that peft and its conversion script for Bone carry out; the paper's own text could not be read for this.

    rank: the side r of a block; "affine" needs both sides of the weight to be multiples of it. Raises BadInput for
    sides that are no such multiples, and for a rank above a layer's inputs.

    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> Bone(rank=2).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('0.plait.bone.B', (2, 2, 2))]
    """

    rank: Count = 32
    kind: Literal["affine", "shared"] = "affine"

    def build(self, layer: nn.Module, weight: Tensor) -> Parametrization:
        """Return the blocks of one weight."""
        return (BlockAffine if self.kind == "affine" else SharedBlock)(weight, self.rank)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse blocks that do not fit."""
        for name, layer in self.targets(model):
            out, into = matrix_shape(layer)
            if self.kind == "affine" and (out % self.rank or into % self.rank):
                raise BadInput(
                    f"Bone.rank is {self.rank}, but '{name}' has a {out} x {into} matrix: give a divisor of both "
                    "sides, or kind='shared'."
                )
            if self.rank > into:
                raise BadInput(f"Bone.rank is {self.rank}, but '{name}' has {into} inputs: use at most {into}.")
