"""Low-rank adapters whose ranks grow while they are trained, where training makes most of them: TriAdaptLoRA."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Positive, Probability
from plait.layers import matches
from plait.method import Method, Now, method
from plait.parametrize.base import Adapter, attached
from plait.parametrize.low_rank import Factored, adapter_dtype, check_rank
from plait.sharding import full, like


class GrowingLowRank(Factored):
    """W -> W + scale * B (I + C) A of the first `active` rows of A [most, in], columns of B [out, most] and both of
    C [most, most].
    """

    made_by = "TriAdaptLoRA"
    active: Tensor

    def __init__(self, weight: Tensor, first: int, most: int, scale: float) -> None:
        super().__init__()
        self.scale, kind = scale, adapter_dtype(weight)
        out, into = weight.shape
        self.A = nn.Parameter(torch.zeros(most, into, dtype=kind))
        self.B = nn.Parameter(torch.zeros(out, most, dtype=kind))
        self.C = nn.Parameter(torch.zeros(most, most, dtype=kind))
        self.register_buffer("active", torch.tensor(0))
        self.grow(first, None)

    @property
    def rank(self) -> int:
        """How many rows of A are in use."""
        return int(self.active)

    @torch.no_grad()
    def grow(self, count: int, generator: torch.Generator | None) -> None:
        """Put so many more rows of A in use, with Gaussian numbers; what the adapter computes does not change."""
        before, whole = self.rank, full(self.A.detach()).clone()
        drawn = torch.randn(count, whole.shape[1], generator=generator, dtype=whole.dtype) / whole.shape[1] ** 0.5
        whole[before : before + count] = drawn.to(whole.device)
        self.A.copy_(like(whole, self.A))
        self.active.add_(count)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [rank, in] and B (I + C) [out, rank]."""
        rank = self.rank
        b = self.B[:, :rank]
        return self.A[:rank], torch.addmm(b, b, self.C[:rank, :rank])

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return the factors (A, B (I + C)) of the update of the weight."""
        a, b = self.factors()
        return a.detach(), b.detach()


@paper("liang2025triadaptlora", key="triadaptlora")
@method
class TriAdaptLoRA(Adapter):
    """W' = W + (alpha / rank) B (I + C) A, C = L + U: with each rank that a weight gains, A [r, in] gains a row, B
    [out, r] a column, the lower triangle L a row and the upper triangle U a column. B, L and U start at 0.

    Every `period` steps after `warmup`, while the ranks together are below `rank` times the number of weights, by some
    gap, those n weights gain `growth` ranks whose importance is highest: n = gap * t ("linear") or gap^t
    ("exponential"), at least 1, with t in [0, 1] the part of the run after the warmup. The importance of a weight is by
    how much |C| / r (Frobenius norm) has risen since the time before.

    A rank is gained without a change of what is computed: its row of A is Gaussian, its entries of B and C are 0. I is
    ours: from B = C = 0 no factor of B C A would ever move. The scale does not fall as ranks grow. Room for `most`
    ranks is there from the start, since optimizers keep a state for what they are given. Written from the abstract and
    an implementation that cites the paper.

    first: rank at the start. rank: mean rank in the end, at most min(out, in). most: highest rank of one weight, at
    most min(out, in) of it. alpha: numerator of the scale. Raises BadInput unless first < rank <= most, and for a rank
    above the smaller side of a target.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> TriAdaptLoRA(rank=2, most=3).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('0.plait.triadaptlora.A', (3, 6)), ('0.plait.triadaptlora.B', (4, 3)), ('0.plait.triadaptlora.C', (3, 3))]
    """

    rank: Count = 8
    first: Count = 1
    most: Count = 32
    growth: Count = 1
    period: Count = 10
    warmup: Probability = 0.1
    threshold: Literal["linear", "exponential"] = "linear"
    alpha: Positive = 16.0

    def build(self, layer: nn.Module, weight: Tensor) -> GrowingLowRank:
        """Return the growing update of one weight."""
        return GrowingLowRank(weight, self.first, min(self.most, *weight.shape), self.alpha / self.rank)

    def gaining(self, gap: int, progress: float) -> int:
        """Return how many weights gain ranks, where the ranks together lack `gap`."""
        behind = max(progress - self.warmup, 0.0) / (1 - self.warmup)
        count = gap * behind if self.threshold == "linear" else gap**behind
        return max(int(count + 1e-9), 1)  # 0.5 may be 0.4999...

    @torch.no_grad()
    def constrain(self, model: nn.Module, now: Now) -> None:
        """Let the weights of highest importance gain ranks."""
        if now.step == 0 or now.step % self.period or now.progress < self.warmup:
            return
        parts = [part for name, _, part in attached(model, GrowingLowRank) if matches(self.where, name)]
        gap = self.rank * len(parts) - sum(part.rank for part in parts)
        if gap <= 0:
            return
        rises = [self._rise(part, str(number), now) for number, part in enumerate(parts)]
        free = [i for i, part in enumerate(parts) if part.rank < len(part.A)]
        for i in sorted(free, key=lambda i: -rises[i])[: self.gaining(gap, now.progress)]:
            count = min(self.growth, len(parts[i].A) - parts[i].rank, gap)
            parts[i].grow(count, now.generator)
            gap -= count

    def _rise(self, part: GrowingLowRank, number: str, now: Now) -> float:
        """Return by how much |C| / r has risen since the time before."""
        state, size = now.of(self), torch.linalg.matrix_norm(full(part.C)) / part.rank
        before = state.get(number, torch.zeros_like(size))
        state[number] = size
        return float(size - before)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse ranks that do not fit each other or a target."""
        if not self.first <= self.rank <= self.most:
            given = f"first={self.first}, rank={self.rank} and most={self.most}"
            raise BadInput(f"TriAdaptLoRA needs first <= rank <= most, not {given}.")
        if self.first == self.rank:
            raise BadInput(f"TriAdaptLoRA.first is {self.first}, and so is rank: give a smaller first, or use LoRA.")
        check_rank(self, self.rank, model)
