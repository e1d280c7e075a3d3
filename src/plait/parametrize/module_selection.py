"""Low-rank adapters on the modules that turn out to need them: DiffoRA."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Positive, Probability, Size
from plait.layers import matches, matrix, matrix_shape, own_weight
from plait.method import Method, Now, method
from plait.parametrize.base import Adapter, attach, attached
from plait.parametrize.low_rank import Factored, adapter_dtype, check_rank

Pair = tuple[nn.Parameter, nn.Parameter]


class GatedLowRank(Factored):
    """W -> W + scale * (gate B A + common B_s A_s), where modules of one shape share A_s and B_s."""

    made_by = "DiffoRA"
    gate: Tensor
    common: Tensor

    def __init__(self, own: Pair, shared: Pair, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.A, self.B = own
        self.shared_A, self.shared_B = shared
        self.register_buffer("gate", torch.tensor(0.5, dtype=self.A.dtype))
        self.register_buffer("common", torch.tensor(0.0, dtype=self.A.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return [A; A_s] and [gate B, common B_s]."""
        b = torch.cat([self.gate * self.B, self.common * self.shared_B], dim=1)
        return torch.cat([self.A, self.shared_A]), b

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return the factors (A, B) of the update of the weight, once it is settled only those that it has."""
        if self.common == 1:
            return self.shared_A.detach(), self.shared_B.detach()
        return self.A.detach(), (self.gate * self.B).detach()


def factors(weight: Tensor, rank: int) -> Pair:
    """Return a Gaussian A [rank, in] and B = 0 [out, rank]."""
    out, into = weight.shape
    kind, device = adapter_dtype(weight), weight.device
    a = torch.randn(rank, into, dtype=kind) / into**0.5
    return nn.Parameter(a.to(device)), nn.Parameter(torch.zeros(out, rank, dtype=kind, device=device))


@paper("jiang2025diffora", key="diffora")
@method
class DiffoRA(Adapter):
    """W_l' = W_l + (alpha / rank) (g_l B_l A_l + (1 - g_l) B_s A_s) with g in {0, 1}^n, the differential adaptation
    matrix: which of the n modules get a low-rank adapter A_l [rank, in], B_l [out, rank] of their own.

    For the share `search` of the run g is relaxed to (0, 1)^n, without the shared term: g = sigmoid(u), u = 0 at first.
    After every step of the adapters on a training batch, u is stepped on a batch of the validation set:
    u <- u - lr (1 - p) h / |h| sqrt(n), h its gradient there, p the part of the search that lies behind. Then the
    round(ratio * n) modules with the largest g get g = 1, the others 0. Adapters keep what they have learned. Modules
    without one of their own share A_s [shared_rank, in] and B_s [out, shared_rank], from B_s = 0 on, with all others of
    their shape; with shared_rank = 0 they have none.

    Written from the abstract, which tells relaxation, discretization and weight sharing but not these formulas: that
    the sigmoid relaxes, how u is stepped, and what is shared, are ours. It needs a validation set.

    rank: at most min(out, in). ratio, search: in (0, 1). lr: of u. Raises BadInput for a rank or shared_rank above the
    smaller side of a target, a ratio that takes all modules, and without a validation set.

    >>> model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    >>> DiffoRA(rank=2, shared_rank=1).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model[0].plait.named_parameters()]
    [('diffora.A', (2, 6)), ('diffora.B', (4, 2)), ('diffora.shared_A', (1, 6)), ('diffora.shared_B', (4, 1))]
    """

    rank: Count = 8
    alpha: Positive = 16.0
    ratio: Probability = 0.5
    search: Probability = 0.3
    lr: Positive = 0.1
    shared_rank: Size = 1

    idle: ClassVar[dict[str, float]] = {"ratio": 0, "search": 0}

    def parametrize(self, model: nn.Module) -> None:
        """Attach a gated adapter to each target."""
        self.check(model, [self])
        targets = self.targets(model)
        self.prepare(model)
        shared: dict[tuple[int, int], Pair] = {}
        for _, layer in targets:
            weight = matrix(layer, own_weight(layer))
            if matrix_shape(layer) not in shared:
                shared[matrix_shape(layer)] = factors(weight, self.shared_rank)
            pair, own = shared[matrix_shape(layer)], factors(weight, self.rank)
            attach(layer, "diffora", GatedLowRank(own, pair, self.alpha / self.rank))

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Refuse a run that has no validation set."""
        with torch.no_grad():
            now.validate(model, 0)

    def constrain(self, model: nn.Module, now: Now) -> None:
        """Step the relaxed gates, or settle them."""
        parts = [part for name, _, part in attached(model, GatedLowRank) if matches(self.where, name)]
        state = now.of(self)
        raw = state.setdefault("raw", torch.zeros(len(parts)))
        if "settled" in state:
            return
        if now.progress < self.search:
            rate = self.lr * (1 - now.progress / self.search)
            raw = state["raw"] = raw - rate * self._direction(model, parts, now).to(raw)
            gates = raw.sigmoid()
        else:
            state["settled"] = torch.ones((), dtype=torch.bool)
            gates = torch.zeros(len(parts))
            gates[raw.topk(self.chosen(len(parts))).indices] = 1.0
        for part, gate in zip(parts, gates, strict=True):
            part.gate = gate.to(part.A)
            part.common.fill_("settled" in state and not gate)

    @torch.enable_grad()
    def _direction(self, model: nn.Module, parts: list[GatedLowRank], now: Now) -> Tensor:
        """Return the gradient of the validation misfit in u, with a mean square of 1; 0 where there is none."""
        raw = now.of(self)["raw"].to(parts[0].A, copy=True).requires_grad_()
        for part, gate in zip(parts, raw.sigmoid(), strict=True):
            part.gate = gate
        (gradient,) = torch.autograd.grad(now.validate(model, now.step), raw)
        size = gradient.square().mean().sqrt()
        return torch.where(size > 0, gradient / size, 0.0)

    def chosen(self, count: int) -> int:
        """Return how many of so many modules get an adapter of their own."""
        return max(round(self.ratio * count), 1)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a rank above a target's, and a ratio that leaves no choice."""
        count = len(self.targets(model))
        if self.chosen(count) == count:
            raise BadInput(f"DiffoRA.ratio is {self.ratio}: of {count} modules that is all; give less, or use LoRA.")
        check_rank(self, max(self.rank, self.shared_rank), model)
