"""A full-rank update from random bases that are never trained: only how they are combined is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Count, Positive, Size
from plait.layers import is_transformers_conv1d, matrix_shape
from plait.method import Method, method
from plait.parametrize.base import Adapter, Parametrization
from plait.parametrize.low_rank import adapter_dtype, check_rank, low_rank_output


class Bases:
    """A [rank, small] and B_1 ... B_n [n, large, rank], uniform with variance 1; the B_j lie side by side in memory."""

    def __init__(self, seed: int, rank: int, small: int, large: int) -> None:
        draw, count = torch.Generator().manual_seed(seed), math.ceil(small / rank)
        self.a, drawn = (
            math.sqrt(3) * (2 * torch.rand(*shape, generator=draw) - 1)
            for shape in ((rank, small), (count, large, rank))
        )
        self._beside = drawn.transpose(0, 1).flatten(1)
        self.b = self._beside.view(large, count, rank).transpose(0, 1)
        self._moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def like(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return A [rank, small] and [B_1 ... B_n] [large, n * rank], placed and typed like a tensor; moved once."""
        key = (tensor.device, tensor.dtype)
        if key not in self._moved:
            with torch.inference_mode(False):  # they are kept for training too
                self._moved[key] = self.a.to(*key), self._beside.to(*key)
        return self._moved[key]


_SHARED: WeakValueDictionary[tuple[int, int, int, int], Bases] = WeakValueDictionary()
"""Layers of the same size share their bases, as long as one of them lives."""


def bases(seed: int, rank: int, small: int, large: int) -> Bases:
    """Return the bases of a seed, a rank and a size; always the same numbers."""
    key = (seed, rank, small, large)
    found = _SHARED.get(key)
    if found is None:
        found = _SHARED[key] = Bases(*key)
    return found


class _Scaled(torch.autograd.Function):
    """diag(l_j) A diag(g_j) for all j, [n * rank, small], which keeps no more than l, g and A for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(l: Tensor, a: Tensor, g: Tensor) -> Tensor:
        return (l.unsqueeze(2) * a * g.unsqueeze(1)).flatten(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        l, a, g = ctx.saved_tensors
        moved = grad.view(*l.shape, -1) * a
        return (moved * g.unsqueeze(1)).sum(2), None, (moved * l.unsqueeze(2)).sum(1)


class RandomBases(Parametrization):
    """W -> W + scale * sum_j B_j diag(l_j) A diag(g_j), or its transpose if out < in; l: [n, rank], g: [n, small]."""

    def __init__(self, weight: Tensor, rank: int, scale: float, seed: int) -> None:
        super().__init__()
        (small, large), kind = sorted(weight.shape), adapter_dtype(weight)
        self.scale, self.tall = scale, weight.shape[0] >= weight.shape[1]
        self._bases, count = bases(seed, rank, small, large), math.ceil(small / rank)
        self.l = nn.Parameter(torch.zeros(count, rank, dtype=kind))
        self.g = nn.Parameter(torch.full((count, small), 1 / max(count, small), dtype=kind))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the update as a product of [B_1 ... B_n] [large, n * rank] and the scaled A [n * rank, small]."""
        a, b = self._bases.like(self.l)
        scaled: Tensor = _Scaled.apply(self.l, a, self.g)  # type: ignore[no-untyped-call]
        return b, scaled

    def dense(self, weight: Tensor) -> Tensor:
        """Return W plus the sum over the bases, as one product."""
        b, scaled = self.factors()
        update = b @ scaled
        return (weight.to(update.dtype) + self.scale * (update if self.tall else update.t())).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return W x + scale * B (S x) for the two factors of the update, where few tokens make that the cheaper way.

        Forming the weight takes 2 L s^2 + t L s products for t tokens and sides L >= s, this t s (2 L + 3 s), and keeps
        no weight for the backward pass: it may take half as much again.
        """
        if not (isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)):
            return None
        small, large = sorted(matrix_shape(layer))
        if inputs.numel() // inputs.shape[-1] * (large + 6 * small) > 6 * large * small:
            return None
        b, scaled = self.factors()
        a, b = (scaled, b) if self.tall else (b.t(), scaled.t())
        return low_rank_output(self, layer, inputs, below, a, b, self.scale)


@paper("albert2025randlora", key="randlora")
@method
class RandLoRA(Adapter):
    """W' = W + (alpha / rank) sum_j B_j diag(l_j) A diag(g_j), j = 1 ... n, n = ceil(min(out, in) / rank): A [rank, in]
    and B_j [out, rank] are random and frozen, l_j [rank] (zeros at the start) and g_j [in] are trained. Where out < in
    the update is the transpose of such a sum, so that g_j is of the smaller side.

    n * (rank + min(out, in)) numbers are trained a layer, and the update can be of full rank: a larger rank trains
    FEWER. A stands once, the B_j are each their own; layers of the same size share them, and they are drawn anew from
    `seed`, not saved. Base j goes with row j of l and g throughout (peft's flattening pairs them otherwise), and the
    bases are float32 (bfloat16 there). With many tokens in a batch the weight is formed at each step: n * rank is
    no less than its smaller side. Raises BadInput for a rank above the smaller side of a target.

    >>> model = nn.Sequential(nn.Linear(6, 8))
    >>> RandLoRA(rank=3).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('0.plait.randlora.l', (2, 3)), ('0.plait.randlora.g', (2, 6))]
    """

    rank: Count = 32
    alpha: Positive = 640.0
    seed: Size = 0

    def build(self, layer: nn.Module, weight: Tensor) -> RandomBases:
        """Return the combination for one weight."""
        return RandomBases(weight, self.rank, self.alpha / self.rank, self.seed)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a rank above a target's."""
        check_rank(self, self.rank, model)
