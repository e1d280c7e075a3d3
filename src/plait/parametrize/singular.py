"""Adapters in the singular coordinates of the pretrained weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Count, ScheduledNonNegative
from plait.math.svd import exact_svd, sketched_svd
from plait.method import Method, Now, method
from plait.parametrize.base import Adapter, Parametrization, attached, refuse_shared, set_weight
from plait.parametrize.low_rank import adapter_dtype, check_rank, low_rank_output
from plait.parametrize.origin import record_left
from plait.parametrize.refusals import refuse_nonfinite


class SingularTriplets(Parametrization):
    """R -> R + U diag(S) V,  R: the residual [out, in], U: [out, rank], S: [rank], V: [rank, in]."""

    made_by = "SORSA"
    of_weight = True

    def __init__(self, u: Tensor, s: Tensor, v: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.U = nn.Parameter(u.to(dtype).contiguous())
        self.S = nn.Parameter(s.to(dtype).contiguous())
        self.V = nn.Parameter(v.to(dtype).contiguous())
        self.register_buffer("start_A", self.V.detach().clone())
        self.register_buffer("start_B", (self.U * self.S).detach())

    def taken(self) -> Tensor | None:
        """Return U0 diag(S0) V0."""
        return self.get_buffer("start_B") @ self.get_buffer("start_A")

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return the factors (A, B) of the update of the untouched weight, of twice the rank:
        R + U diag(S) V = W + [U diag(S), -U0 diag(S0)] [V; V0].
        """
        b = torch.cat([(self.U * self.S).detach(), -self.get_buffer("start_B")], dim=1)
        return torch.cat([self.V.detach(), self.get_buffer("start_A")]), b

    def dense(self, weight: Tensor) -> Tensor:
        """Return R + U diag(S) V, rounded once to the precision of R."""
        return torch.addmm(weight.to(self.U.dtype), self.U * self.S, self.V).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return R x + U (S * (V x)), which never forms U diag(S) V."""
        return low_rank_output(self, layer, inputs, below, self.V, self.U * self.S, 1.0)

    def unorthonormality(self) -> Tensor:
        """Return |U^T U - I|_F + |V V^T - I|_F, a scalar."""
        return _distance_to_identity(self.U.t() @ self.U) + _distance_to_identity(self.V @ self.V.t())


def _distance_to_identity(gram: Tensor) -> Tensor:
    """Return |gram - I|_F, constant where it is not above the rounding error of the product: its gradient, of norm 1 in
    any direction however small the distance, would be noise there.
    """
    distance = torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    rounding = 8 * torch.finfo(gram.dtype).eps * len(gram)
    return torch.where(distance > rounding, distance, distance.detach())


@paper("cao2024sorsa", key="sorsa")
@method
class SORSA(Adapter):
    """W' = (W - U0 S0 V0) + U diag(S) V, where U0 S0 V0 are the `rank` largest singular triplets of W, U, S and V start
    from them and are trained, the residual is frozen; the objective gains
    strength * sum over adapters of (|U^T U - I|_F + |V V^T - I|_F).

    U [out, rank], S [rank], V [rank, in]. The triplets of large matrices come from a seeded sketch; the residual makes
    the start exact whatever they are. The factors are not divided by a scale. At the exact start the norms are rounding
    noise and have no gradient here (the published code follows a random direction of length 1).

    strength: at least 0. The paper steps by -lr grad L - gamma grad (the sum above), so strength = gamma / lr. Its code
    takes the mean over the 2n factors of n adapters in place of the sum: our strength is its gamma / (2 n lr), which
    for its Llama 2 7B (gamma 4e-4, lr 3e-5, n = 224) is the default. Raises BadInput for a rank above the smaller side
    of a target, and for weights that layers share.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> SORSA(rank=2).parametrize(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.plait.sorsa.U', '0.plait.sorsa.S', '0.plait.sorsa.V']
    """

    rank: Count = 8
    idle: ClassVar[dict[str, float]] = {}
    strength: ScheduledNonNegative = 0.03

    @torch.no_grad()
    def build(self, layer: nn.Module, weight: Tensor) -> SingularTriplets:
        """Move the largest triplets of one weight from the weight into an adapter."""
        decompose = exact_svd if min(weight.shape) <= max(64, 4 * self.rank) else sketched_svd
        made = SingularTriplets(*decompose(weight.detach(), self.rank), dtype=adapter_dtype(weight))
        principal = (made.U * made.S) @ made.V
        set_weight(layer, weight.to(principal.dtype) - principal)
        record_left(layer, made)
        return made

    def penalty(self, model: nn.Module, now: Now) -> Tensor | float:
        """Return strength * the sum over adapters of their factors' distances from orthonormal."""
        strength = now.at(self.strength)
        held = [triplets.unorthonormality() for _, _, triplets in attached(model, SingularTriplets)]
        return strength * torch.stack([h.float() for h in held]).sum() if held and strength else 0.0

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a rank above a target's, and weights that several layers share: the residual would be both layers'."""
        check_rank(self, self.rank, model)
        refuse_shared(self, model)
        refuse_nonfinite(type(self).__name__, self.targets(model))


class SingularScales(Parametrization):
    """W -> W + U diag(S - S0) V,  U: [out, rank], S0: [rank] and V: [rank, in] frozen, S: [rank] trained from S0 on."""

    made_by = "SVFit"
    of_weight = True

    def __init__(self, u: Tensor, s: Tensor, v: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("U", u.to(dtype).contiguous())
        self.register_buffer("V", v.to(dtype).contiguous())
        self.register_buffer("S0", s.to(dtype).contiguous())
        self.S = nn.Parameter(self.get_buffer("S0").clone())

    def scaled(self) -> Tensor:
        """Return U diag(S - S0): [out, rank]."""
        return self.get_buffer("U") * (self.S - self.get_buffer("S0"))

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return the factors (A, B) of the update of the weight."""
        return self.get_buffer("V"), self.scaled().detach()

    def dense(self, weight: Tensor) -> Tensor:
        """Return W + U diag(S - S0) V, rounded once to the precision of W."""
        v = self.get_buffer("V")
        return torch.addmm(weight.to(v.dtype), self.scaled(), v).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return W x + U ((S - S0) * (V x)), which forms no matrix of the weight's size."""
        return low_rank_output(self, layer, inputs, below, self.get_buffer("V"), self.scaled(), 1.0)


@paper("sun2024svfit", key="svfit")
@method
class SVFit(Adapter):
    """W' = U_r diag(S) V_r + (W - U_r diag(S_r) V_r) = W + U_r diag(S - S_r) V_r, with U_r [out, rank], S_r [rank] and
    V_r [rank, in] the largest singular triplets of W: only the singular values S are trained, from S_r on.

    `rank` numbers are trained in a layer, LoRA's rank * (in + out): with S at full rank, as many as LoRA of rank 1/2
    in a square matrix. W keeps its own place, so that training starts exactly at W whatever the precision, and the
    base's checkpoint stays valid; weight decay draws S to 0 as in the first form. Large matrices are decomposed by a
    seeded sketch. Written from the abstract and summaries of the paper.

    rank: at most min(out, in). The learning rate is in units of singular values: larger than LoRA's. Raises BadInput
    for a rank above the smaller side of a target.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> SVFit(rank=3).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('0.plait.svfit.S', (3,))]
    """

    rank: Count = 64

    @torch.no_grad()
    def build(self, layer: nn.Module, weight: Tensor) -> SingularScales:
        """Return the adapter on the largest triplets of one weight."""
        decompose = exact_svd if min(weight.shape) <= max(64, 4 * self.rank) else sketched_svd
        return SingularScales(*decompose(weight.detach(), self.rank), dtype=adapter_dtype(weight))

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a rank above a target's, and what has no decomposition."""
        check_rank(self, self.rank, model)
        refuse_nonfinite(type(self).__name__, self.targets(model))
