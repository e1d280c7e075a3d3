"""Low-rank branches in parallel with a layer and in sequence after it: Hydra."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Count, Positive
from plait.method import Method, method
from plait.parametrize.base import Adapter, Parametrization
from plait.parametrize.low_rank import adapter_dtype, check_rank, low_rank_branch, over_channels, without_padding


class TwoBranches(Parametrization):
    """W -> W + scale * (B A + D C W) and b -> b + scale * D C b,  A: [rank, in], B: [out, rank], C: [rank, out],
    D: [out, rank].
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.scale, kind = scale, adapter_dtype(weight)
        out, into = weight.shape
        self.A = nn.Parameter(torch.randn(rank, into, dtype=kind) / math.sqrt(into))
        self.B = nn.Parameter(torch.zeros(out, rank, dtype=kind))
        self.C = nn.Parameter(torch.randn(rank, out, dtype=kind) / math.sqrt(out))
        self.D = nn.Parameter(torch.zeros(out, rank, dtype=kind))

    def dense(self, weight: Tensor) -> Tensor:
        """Return W + scale * (B A + D C W), rounded once to the precision of W."""
        wide = weight.to(self.A.dtype)
        return (wide + self.scale * (self.B @ self.A + self.D @ (self.C @ wide))).to(weight.dtype)

    def dense_bias(self, bias: Tensor) -> Tensor:
        """Return b + scale * D C b: the sequential branch reads what the layer puts out, its bias included."""
        wide = bias.to(self.A.dtype)
        return wide + self.scale * (self.D @ (self.C @ wide))

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return y + scale * (B (A x) + D (C y)) for y = W x + b, which forms no matrix of the weight's size."""
        parallel = low_rank_branch(layer, inputs, self.A, self.B, self.scale)
        if parallel is None:
            return None
        output = below()
        sequential = over_channels(layer, self.scale * over_channels(layer, output, self.C), self.D)
        return output + parallel.to(output.dtype) + without_padding(layer, inputs, sequential)


@paper("kim2024hydra", key="hydra")
@method
class Hydra(Adapter):
    """W' = W + s (B A + D C W), b' = b + s D C b: y + s B A x + s D C y for y = W x + b. A parallel branch, which may
    leave the span of W's columns, and a sequential one, which combines what the layer puts out; W and b are frozen.

    A [rank, in] and C [rank, out] are Gaussian, B and D [out, rank] zero at the start. After convolutions C and D act
    on the channels. The definition is that of the authors' code, whose folding gives the same W' and b'; the paper's
    own text could not be read for this. Their code for images adds biases inside its branches (that for language has
    none) and, folding, writes the feed-forward layer's weight into the attention's output layer; here each layer is
    folded into its own.

    rank: of each of the two branches, at most min(out, in); LoRA of twice that rank trains as much where out = in.
    scale: s, above 0; the factor itself, not a numerator. Raises BadInput for a rank above the smaller side of a
    target.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> Hydra(rank=2).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad][2:]
    [('0.plait.hydra.C', (2, 4)), ('0.plait.hydra.D', (4, 2))]
    """

    rank: Count = 4
    scale: Positive = 1.0

    def build(self, layer: nn.Module, weight: Tensor) -> TwoBranches:
        """Return the branches of one layer."""
        return TwoBranches(weight, self.rank, self.scale)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a rank above a target's."""
        check_rank(self, self.rank, model)
