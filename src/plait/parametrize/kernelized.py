"""Low-rank factors that a kernel merges: entries compete within each weight, and the weights for their entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Positive, Probability
from plait.layers import is_transformers_conv1d, matches
from plait.math.tracing import traced
from plait.method import Method, Now, method
from plait.parametrize.base import Adapter, Parametrization, attached
from plait.parametrize.low_rank import adapter_dtype, check_rank
from plait.sharding import full


def distances(b: Tensor, a: Tensor) -> Tensor:
    """Return the Euclidean distances of the rows of b [out, width] from those of a [in, width]: [out, in].

    Squares that rounding makes smaller than what it leaves are held at a floor, so that second derivatives are finite.
    """
    squares = torch.addmm(b.square().sum(1, keepdim=True) + a.square().sum(1), b, a.mT, alpha=-2)
    return squares.clamp_min(1e-12).sqrt()


def merged(scale: float, a: Tensor, b: Tensor, mixing: Tensor, temperature: Tensor, offset: Tensor) -> Tensor:
    """Return K = D + mixing * softmax over outputs of (D / temperature) + offset, [out, in], where D is scale times the
    difference of two distances between the rows of a [2, in, width] and b [2, out, width].
    """
    near, far = (distances(b[n], a[n]) for n in (0, 1))
    distance = scale * (near - far)
    return distance + mixing * F.softmax(distance / temperature, dim=0) + offset


def strongest(kernel: Tensor, kept: int) -> Tensor:
    """Return a matrix with all but its entries of largest magnitude zero; those as large as the last one stay."""
    if kept >= kernel.numel():
        return kernel
    if kept == 0:
        return torch.zeros_like(kernel)
    size = kernel.detach().abs()
    least = size.flatten().kthvalue(size.numel() - kept + 1).values
    return torch.where(size >= least, kernel, 0.0)


class KernelDelta(Parametrization):
    """W -> W + M * K, K [out, in] the kernel of A [2, in, width] and B [2, out, width], M: 1 at its `kept` largest."""

    kept: Tensor

    def __init__(self, weight: Tensor, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        kind = adapter_dtype(weight)

        def twice(rows: int) -> nn.Parameter:
            bound = (rows * width) ** -0.5
            return nn.Parameter(torch.empty(rows, width, dtype=kind).uniform_(-bound, bound).repeat(2, 1, 1))

        self.A, self.B = twice(weight.shape[1]), twice(weight.shape[0])
        self.mixing = nn.Parameter(torch.zeros(1, dtype=kind))
        self.temperature = nn.Parameter(torch.ones(1, dtype=kind))
        self.offset = nn.Parameter(torch.zeros(1, dtype=kind))
        self.register_buffer("kept", torch.tensor(weight.numel()))

    def factors(self) -> tuple[float, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return what `merged` takes."""
        return self.scale, self.A, self.B, self.mixing, self.temperature, self.offset

    def kernel(self) -> Tensor:
        """Return K: [out, in]."""
        return merged(*self.factors())

    def delta(self) -> Tensor:
        """Return M * K."""
        return strongest(self.kernel(), int(self.kept))

    def dense(self, weight: Tensor) -> Tensor:
        """Return W + M * K, rounded once to the precision of W."""
        delta = self.delta()
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return W x + (M * K) x, which keeps no matrix for the backward pass but forms M * K in it again."""
        if traced() or not (isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)):
            return None
        given = (inputs, int(self.kept), *self.factors())  # by hand: the module may hold other tensors by then
        branch: Tensor = checkpoint(_branch, *given, use_reentrant=False, preserve_rng_state=False)
        output = below()
        return output + branch.to(output.dtype)


def _branch(inputs: Tensor, kept: int, scale: float, *factors: Tensor) -> Tensor:
    return F.linear(inputs, strongest(merged(scale, *factors), kept).to(inputs.dtype))


def allotted(scores: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Return how many of `total` each weight gets: in proportion to its score, at most its size, all of them given out.

    >>> allotted([3.0, 1.0, 0.0], [4, 100, 10], 12)
    [4, 8, 0]
    """
    total, shares = min(total, sum(sizes)), [0.0] * len(sizes)
    scores = [1.0] * len(sizes) if sum(scores) <= 0 else scores
    open_, left = list(range(len(sizes))), float(total)
    while open_:
        mass = sum(scores[i] for i in open_)
        weights = {i: scores[i] / mass if mass > 0 else sizes[i] / sum(sizes[j] for j in open_) for i in open_}
        filled = [i for i in open_ if left * weights[i] >= sizes[i]]
        for i in filled or open_:
            shares[i] = float(sizes[i]) if filled else left * weights[i]
        if not filled:
            break
        open_, left = [i for i in open_ if i not in filled], left - sum(sizes[i] for i in filled)
    counts = [int(share) for share in shares]
    for i in sorted(range(len(sizes)), key=lambda i: counts[i] - shares[i])[: total - sum(counts)]:
        counts[i] += 1
    return counts


@paper("shen2025snella", key="snella")
@method
class SNELLA(Adapter):
    """W' = W + M * K; K_ji = D_ji + a softmax_j(D_ji / c) + b with D_ji = s (|A_0i - B_0j| - |A_1i - B_1j|): the
    difference of two distances merges the rows of A [2, in, rank / 2] and B [2, out, rank / 2], with which K [out, in]
    may have any rank. A, B and the numbers a, b, c are trained. M keeps the entries of K of largest magnitude.

    How many entries a weight keeps is settled while training: all of them up to `warmup` of the run, then
    N = share + (1 - share) (1 - p)^3 of all weights' entries together, p in [0, 1] the part of the way to `settle`
    before the end, share = 1 - sparsity. They are allotted to weights in proportion to the mean over A plus that over B
    of I * U, with I <- d I + (1 - d) |theta g| the sensitivity of each number after the step, U <- e U + (1 - e)
    ||theta g| - I| its uncertainty, d = `sensitivity_decay`, e = `uncertainty_decay`; no weight gets more than it has.

    Training starts at W: both distances are equal, a = b = 0 (in the authors' code they differ and a = 1). Kept entries
    are those of K (their code multiplies them by their own magnitude). Linear layers form K anew in the backward pass.
    Written from the abstract, a summary and the authors' code.

    rank: even, at most min(out, in). scale: s; 0.1 is the authors', for large vision transformers, and more lets small
    networks learn faster. sparsity, decays: in [0, 1). warmup + settle: below 1. period: steps between two
    allotments. Raises BadInput for an odd rank or a rank above the smaller side of a target, and for a warmup + settle
    of 1 or more.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> SNELLA(rank=2).parametrize(model)
    >>> [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    [(2, 6, 1), (2, 4, 1), (1,), (1,), (1,)]
    """

    rank: Count = 8
    scale: Positive = 0.1
    sparsity: Probability = 0.8
    warmup: Probability = 0.1
    settle: Probability = 0.2
    sensitivity_decay: Probability = 0.85
    uncertainty_decay: Probability = 0.85
    period: Count = 1

    def build(self, layer: nn.Module, weight: Tensor) -> KernelDelta:
        """Return the kernelized update of one weight."""
        return KernelDelta(weight, self.rank // 2, self.scale)

    def volume(self, progress: float, entries: int) -> int:
        """Return how many of all entries are kept after that part of the run."""
        behind = min(max((progress - self.warmup) / (1 - self.warmup - self.settle), 0.0), 1.0)
        return round(entries * (1 - self.sparsity + self.sparsity * (1 - behind) ** 3))

    @torch.no_grad()
    def constrain(self, model: nn.Module, now: Now) -> None:
        """Take note of what mattered in this step, and allot the entries that are left."""
        parts = [part for name, _, part in attached(model, KernelDelta) if matches(self.where, name)]
        scores = [self._score(part, str(number), now) for number, part in enumerate(parts)]
        if now.step % self.period:
            return
        sizes = [part.A.shape[1] * part.B.shape[1] for part in parts]
        for part, count in zip(parts, allotted(scores, sizes, self.volume(now.progress, sum(sizes))), strict=True):
            part.kept.fill_(count)

    def _score(self, part: KernelDelta, number: str, now: Now) -> float:
        """Return the importance of one weight, with the step under way in it."""
        state, score = now.of(self), 0.0
        for name, factor in (("A", part.A), ("B", part.B)):
            mean, spread = f"{number}.{name}.sensitivity", f"{number}.{name}.uncertainty"
            if factor.grad is not None:
                here = full(factor * factor.grad).abs()
                before = state.get(mean, torch.zeros_like(here))
                state[mean] = torch.lerp(here, before, self.sensitivity_decay)
                away = (here - state[mean]).abs()
                state[spread] = torch.lerp(away, state.get(spread, torch.zeros_like(here)), self.uncertainty_decay)
            if mean in state:
                score += float((state[mean] * state[spread]).mean())
        return score

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse odd ranks, ranks above a target's, and a schedule without room."""
        if self.rank % 2:
            raise BadInput(f"SNELLA.rank is {self.rank}: give an even number, for two distances.")
        if self.warmup + self.settle >= 1:
            raise BadInput(f"SNELLA.warmup + settle is {self.warmup + self.settle:g}: leave part of the run to them.")
        check_rank(self, self.rank, model)
