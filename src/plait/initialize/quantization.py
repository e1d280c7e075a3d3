"""A start that gives adapters the rounding error of a quantized base."""

from __future__ import annotations

import torch
from torch import nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.initialize.base import Start, low_rank
from plait.layers import matrix
from plait.math.packed import Packed, packed_weight
from plait.math.svd import gram_svd, sketched_svd
from plait.method import Now, method
from plait.parametrize.base import set_weight
from plait.parametrize.low_rank import LowRank
from plait.parametrize.origin import record_left
from plait.parametrize.refusals import require_finite


@paper("li2023loftq", key="loftq", kind="ground")
@method
class LoftQ(Start):
    """Q_t = quantize(W - s B_{t-1} A_{t-1}), s B_t A_t = the best approximation of W - Q_t of the adapter's rank, for
    t = 1 ... rounds from B_0 A_0 = 0; the base is Q_rounds, frozen, and training begins near W in place of at Q_1.

    W is the weight before Quantize rounded it, s the adapter's scale, by which the factors are divided (peft's are not,
    so that at s other than 1 its sum is not W's approximation). B = U (S / s)^(1/2), A = (S / s)^(1/2) V^T. With one
    round the base is what Quantize made, and the adapter fits any base that is quantized so; with more it is not.

    rounds: at least 1. iterations: of the sketched decomposition, at least 1; None for the exact one. Put it after
    Quantize and LoRA. Raises BadInput for a base that is not quantized, or whose unrounded weights are held no longer.

    >>> from plait import LoRA
    >>> from plait.parametrize.quantized import Quantize
    >>> model = nn.Sequential(nn.Linear(64, 64, bias=False))
    >>> before = model(torch.eye(64))
    >>> Quantize(bits=4).parametrize(model)
    >>> LoRA(rank=8).parametrize(model)
    >>> far = (model(torch.eye(64)) - before).norm()
    >>> LoftQ(rounds=2).initialize(model, None)
    >>> bool((model(torch.eye(64)) - before).norm() < 0.9 * far)
    True
    """

    moves = True

    rounds: Count = 1
    iterations: Count | None = 3

    @torch.no_grad()
    def initialize(self, model: nn.Module, now: Now) -> None:
        """Start each adapter, and quantize its base anew where there are several rounds."""
        for name, layer, adapter in self.found(model):
            packed = packed_weight(layer)
            if packed is None or packed.original is None:
                what = "is not quantized" if packed is None else "is quantized, and what it was before is not held"
                raise BadInput(f"LoftQ needs the rounding error, but the weight of '{name}' {what}: add Quantize().")
            require_finite(packed.original, f"LoftQ found a number in the weight of '{name}'")
            self._start(layer, packed, low_rank(adapter), matrix(layer, packed.original).clone())
            packed.original = None  # what the base was rounded from lacks what the adapter now holds
            record_left(layer, adapter)

    def _start(self, layer: nn.Module, packed: Packed, adapter: LowRank, whole: torch.Tensor) -> None:
        wide = whole.to(adapter.A.dtype)
        for number in range(self.rounds):
            if number:
                set_weight(layer, wide - adapter.scale * (adapter.B @ adapter.A))
                adapter.record_start()
            error = wide - matrix(layer, packed.dequantize()).to(wide.dtype)
            if self.iterations is None:
                u, s, vh = gram_svd(error, adapter.rank)
            else:
                u, s, vh = sketched_svd(error, adapter.rank, self.iterations)
            root = (s / adapter.scale).sqrt()
            adapter.set(root[:, None] * vh, u * root)
