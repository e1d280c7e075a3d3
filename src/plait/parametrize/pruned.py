"""Low-rank and sparse updates of a frozen weight that is pruned on the way: DSEE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Fraction, Positive, Probability
from plait.layers import is_transformers_conv1d, matrix, matrix_shape, own_weight
from plait.math.selection import nth_smallest
from plait.math.svd import exact_svd, sketched_svd
from plait.method import Method, Now, method
from plait.parametrize.base import Adapter, Parametrization, stack
from plait.parametrize.low_rank import LowRank, check_rank
from plait.parametrize.refusals import refuse_nonfinite
from plait.parametrize.sparse import low_rank_and_sparse, places, recomputed_output, trained

By = Literal["update", "sum", "weight"]
ALTERNATIONS = 4


@torch.no_grad()
def where_low_rank_fails(weight: Tensor, rank: int, count: int) -> Tensor:
    """Return where S [out, in] has its `count` entries in min |W - L - S|_F over L of that rank, by turns.

    L is the nearest of that rank to W - S, S the largest entries of W - L; no turn makes the distance larger.
    """
    decompose = exact_svd if min(weight.shape) <= max(64, 4 * rank) else sketched_svd
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    sparse = torch.zeros_like(wide)
    for _ in range(ALTERNATIONS):
        u, s, vh = decompose(wide - sparse, rank)
        rest = wide - u * s @ vh
        chosen = rest.abs().flatten().topk(count).indices
        sparse = torch.zeros_like(rest).flatten().index_copy(0, chosen, rest.flatten()[chosen]).view_as(rest)
    return chosen.sort().values


class PrunedUpdate(Parametrization):
    """W -> M * W + scale * (B A + S), or M * (W + scale * (B A + S)) where whole rows are pruned,  A: [rank, in],
    B: [out, rank], S: [out, in] with values [n] on a fixed support [n], M: [out, in] or [out, 1] of zeros and ones.
    """

    made_by = "DSEE"
    of_weight = True

    support: Tensor
    mask: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float, count: int, rows: bool) -> None:
        super().__init__()
        start = LowRank(weight, rank, scale)
        self.scale, self.rows, self.A, self.B = scale, rows, start.A, start.B
        self.values = nn.Parameter(self.A.new_zeros(count))
        self.register_buffer("support", places(where_low_rank_fails(weight, rank, count), weight))
        shape = (weight.shape[0], 1) if rows else tuple(weight.shape)
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))

    @torch.no_grad()
    def update(self) -> Tensor:
        """Return B A + S."""
        return low_rank_and_sparse(self.A, self.B, self.values, self.support, 1.0)

    def dense(self, weight: Tensor) -> Tensor:
        """Return the weight, rounded once to the precision of W."""
        wide = weight.to(self.A.dtype)
        update = low_rank_and_sparse(self.A, self.B, self.scale * self.values, self.support, self.scale)
        made = self.mask * (wide + update) if self.rows else self.mask * wide + update
        return made.to(weight.dtype)

    def dense_bias(self, bias: Tensor) -> Tensor:
        """Return the bias, without that of a row that is pruned."""
        return bias * self.mask[:, 0] if self.rows else bias

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return the output, forming the weight anew for the backward pass, for linear layers."""
        if not (isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)) or stack(layer)[0] is not self:
            return None
        output = recomputed_output(
            layer,
            inputs,
            self.scale * self.values,
            self.support,
            weight=matrix(layer, own_weight(layer)),
            mask=None if self.rows else self.mask,
            A=self.A,
            B=self.B,
            scale=self.scale,
            bias=layer.bias,
        )
        return output * self.mask[:, 0] if output is not None and self.rows else output


@paper("chen2023dsee", key="dsee")
@method
class DSEE(Adapter):
    """W' = M * W + (alpha / rank) (B A + S): W is frozen and pruned by M in the course of the run; trained are B A, of
    low rank, and the values of S, sparse: sparsity in the update and in the weight.

    S [out, in] has `entries` entries, where W is furthest from low rank: those of min |W - L - S|_F over L of the rank
    and S of that many entries, by turns. B [out, rank] and S start at zero, A [rank, in] is Gaussian. After the part
    `at` of the run M becomes zero where the score is smallest, and training goes on. score: "update" is |B A + S| (the
    authors' choice), "sum" |W + (alpha / rank) (B A + S)|, "weight" |W|. pattern: "entries" prunes the part `sparsity`
    of all entries of the targets, ranked together (ties at the border stay); "heads" cuts the rows of each target into
    `heads` equal parts and prunes int(sparsity * heads) of them, W', update and bias alike, those with the smallest
    sums of scores over all targets of one block (the same parent): of queries and values, whole attention heads.

    Written from the authors' code and abstracts. Their code sets the places by a decomposition of a rank that grows to
    500, in place of the adapter's, and prunes the layers that have no adapter by |W|; here none but targets are pruned.

    rank: at most min(out, in). alpha: numerator of the scale, of B A and S alike. entries: of S in each matrix.
    sparsity: in [0, 1); 0 prunes nothing. at: in [0, 1]. where: the authors take queries and values. Raises BadInput
    for a rank above the smaller side of a target, for more entries than a matrix has, and for heads that do not divide
    its outputs or of which the sparsity prunes none.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> DSEE(rank=2, entries=3).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('0.plait.dsee.A', (2, 6)), ('0.plait.dsee.B', (4, 2)), ('0.plait.dsee.values', (3,))]
    """

    idle: ClassVar[dict[str, float]] = {}

    rank: Count = 16
    alpha: Positive = 32.0
    entries: Count = 64
    sparsity: Probability = 0.2
    at: Fraction = 0.5
    score: By = "update"
    pattern: Literal["entries", "heads"] = "entries"
    heads: Count = 12

    def build(self, layer: nn.Module, weight: Tensor) -> PrunedUpdate:
        """Return the update of one weight."""
        return PrunedUpdate(weight, self.rank, self.alpha / self.rank, self.entries, self.pattern == "heads")

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse ranks, numbers of entries and of heads that do not fit."""
        check_rank(self, self.rank, model)
        refuse_nonfinite("DSEE", self.targets(model))
        for name, layer in self.targets(model):
            out, into = matrix_shape(layer)
            if self.entries > out * into:
                raise BadInput(f"DSEE.entries is {self.entries}, but '{name}' has {out} x {into} entries: give fewer.")
            if self.pattern == "heads" and out % self.heads:
                raise BadInput(f"DSEE.heads is {self.heads}, which does not divide the {out} outputs of '{name}'.")
        if self.pattern == "heads" and self.sparsity and int(self.sparsity * self.heads) == 0:
            raise BadInput(
                f"DSEE.sparsity is {self.sparsity}, which prunes none of {self.heads} heads: give more, or 0."
            )

    @torch.no_grad()
    def constrain(self, model: nn.Module, now: Now) -> None:
        """Prune, once."""
        if not self.sparsity:
            return
        now.timed, state = True, now.of(self)  # it prunes at a part of the run
        if "pruned" in state or now.step + 1 < self.at * now.steps:
            return
        state["pruned"] = torch.tensor(now.step)
        found = trained(self, model, PrunedUpdate)
        if self.pattern == "heads":
            self._prune_heads(found)
        else:
            self._prune_entries(found)

    def _score(self, layer: nn.Module, part: PrunedUpdate) -> Tensor:
        weight = own_weight(layer)
        flat = matrix(layer, weight).detach()
        if self.score == "weight":
            return flat.abs()
        update = part.update()
        return (update if self.score == "update" else flat + part.scale * update).abs()

    def _prune_entries(self, found: list[tuple[str, nn.Module, PrunedUpdate]]) -> None:
        def scores() -> Iterator[Tensor]:
            return (self._score(layer, part) for _, layer, part in found)

        count = int(self.sparsity * sum(part.mask.numel() for _, _, part in found))
        border = nth_smallest(scores, count + 1)
        for _, layer, part in found:
            part.mask.copy_(self._score(layer, part).float() >= border)

    def _prune_heads(self, found: list[tuple[str, nn.Module, PrunedUpdate]]) -> None:
        blocks: dict[str, list[tuple[nn.Module, PrunedUpdate]]] = {}
        for name, layer, part in found:
            blocks.setdefault(name.rpartition(".")[0], []).append((layer, part))
        for block in blocks.values():
            sums = [self._score(layer, part).float().sum(1).view(self.heads, -1).sum(1) for layer, part in block]
            least = torch.stack(sums).sum(0).topk(int(self.sparsity * self.heads), largest=False).indices
            for _, part in block:
                part.mask.view(self.heads, -1)[least] = False
