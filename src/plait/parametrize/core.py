"""Adapters whose outer factors stay as they started: only a small matrix between them is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Count, NonNegative, Positive
from plait.math.svd import exact_svd, sketched_svd
from plait.method import Method, method
from plait.parametrize.base import Adapter, Parametrization
from plait.parametrize.low_rank import adapter_dtype, check_rank, low_rank_output
from plait.parametrize.refusals import refuse_nonfinite


class Core(Parametrization):
    """W -> W + scale * B R A,  B: [out, rank] and A: [rank, in] frozen, R: [rank, rank] trained."""

    made_by = "LoRAXS"
    of_weight = True

    def __init__(self, a: Tensor, b: Tensor, core: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("A", a.contiguous())
        self.register_buffer("B", b.contiguous())
        self.R = nn.Parameter(core.contiguous())
        self.drawn = core.detach().cpu().clone()

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.R.shape[0]

    @torch.no_grad()
    def set(self, a: Tensor, b: Tensor, core: Tensor) -> None:
        """Set A [rank, in], B [out, rank] and R [rank, rank]; the rank may be another one."""
        kind = self.R.dtype
        self.A, self.B = a.detach().to(kind).contiguous(), b.detach().to(kind).contiguous()
        self.R.data = core.detach().to(kind).contiguous()

    def learned(self) -> bool:
        """Say whether R is neither 0 nor what was drawn for it, up to rounding to 16 bits."""
        now = self.R.detach().cpu().to(self.drawn.dtype)
        return bool(now.any()) and bool((now - self.drawn).abs().max() > 0.01 * self.drawn.abs().max())

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return the factors (A, B R) of the update of the weight."""
        return self.get_buffer("A"), (self.get_buffer("B") @ self.R).detach()

    def dense(self, weight: Tensor) -> Tensor:
        """Return W + scale * B R A, rounded once to the precision of W."""
        outer = self.get_buffer("B") @ self.R
        return torch.addmm(weight.to(outer.dtype), outer, self.get_buffer("A"), alpha=self.scale).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return W x + scale * B (R (A x)), which forms no matrix of the weight's size."""
        outer = self.get_buffer("B") @ self.R
        return low_rank_output(self, layer, inputs, below, self.get_buffer("A"), outer, self.scale)


@paper("balazy2024loraxs", key="lora-xs", kind="ground")
@method
class LoRAXS(Adapter):
    """W' = W + (alpha / rank) B R A with B = U_r diag(S_r) and A = V_r^T from W = U S V^T, both frozen; only R
    [rank, rank] is trained, from N(0, deviation^2).

    The number of trained parameters, rank^2 a layer, does not depend on the layer's width. As in the authors' code the
    singular values stand with B. Large matrices are decomposed by a seeded sketch.

    rank: at most min(out, in). alpha: numerator of the scale. deviation: of R's start, at least 0; 0 starts exactly
    at W, and R has a gradient there all the same. Raises BadInput for a rank above the smaller side of a target.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> LoRAXS(rank=2).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('0.plait.loraxs.R', (2, 2))]
    """

    rank: Count = 16
    alpha: Positive = 16.0
    deviation: NonNegative = 1e-5

    @torch.no_grad()
    def build(self, layer: nn.Module, weight: Tensor) -> Core:
        """Return the adapter on the largest triplets of one weight."""
        decompose = exact_svd if min(weight.shape) <= max(64, 4 * self.rank) else sketched_svd
        u, s, vh = (part.to(adapter_dtype(weight)) for part in decompose(weight.detach(), self.rank))
        core = self.deviation * torch.randn(self.rank, self.rank, dtype=u.dtype).to(u)
        return Core(vh, u * s, core, self.alpha / self.rank)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a rank above a target's, and what has no decomposition."""
        check_rank(self, self.rank, model)
        refuse_nonfinite(type(self).__name__, self.targets(model))
