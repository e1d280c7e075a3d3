"""Adam in the cosines that hold most of the gradient: low-rank without any decomposition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from plait.catalogue import paper
from plait.fields import CountByName, NonNegative, Positive
from plait.method import method
from plait.step.low_rank import GaLore


@paper("modoranu2025svdfree", key="dct-adam")
@method
class DCTAdam(GaLore):
    """w <- w - lr c (scale * D_I N) - lr * weight_decay * w, N = m / (sqrt(v) + eps) from R = D_I^T (G + E), where D is
    the matrix of the discrete cosine transform and I the `rank` columns of it that hold most of G + E.

    Modoranu et al. D [m, m] is the same for all matrices of a size and never learned, so of a projector `rank` numbers
    are kept. I is chosen anew every `period` steps, by default every step, since a fast transform costs less than the
    product with a projector; c and the rest are `LowRank`'s. When I changes, the means turn with it, m <- D_I^T D_J m
    and v likewise, J being the columns before: D's columns are orthonormal, so this keeps the means of the columns that
    stay and starts those of new ones at 0. The authors' code multiplies in place, into what it reads, which gives
    zeros on a CPU.

    Columns are ranked by their Euclidean norm, which makes what is left out smallest; the authors' code sums magnitudes
    unless told otherwise. Of equal columns the slower cosines are taken, and I is kept ascending: the authors' order
    is top-k's. feedback: add what was left out, E <- G + E - D_I R, to the next gradient; it costs [m, n] numbers,
    which the authors keep in 8 bits. Shapes as in `plait.step.low_rank`. Raises BadInput where no matrix is larger than
    its rank, for a pattern that matches no weight, and for another `subspace`.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(4, 4))
    >>> rule = DCTAdam([w], lr=0.1, rank=1)
    >>> w.grad = torch.ones(4, 4)
    >>> rule.step()
    >>> w.detach()[0], rule.state[w]["columns"]
    (tensor([-0.0500, -0.0500, -0.0500, -0.0500]), tensor([0]))
    """

    period: CountByName = 1
    subspace: Literal["cosines"] = "cosines"
    spread: bool = False
    eps: NonNegative = 1e-8
    scale: Positive = 1.0
    feedback: bool = False

    def project(self, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], number: int) -> Tensor:
        """Return R [rank, n], after choosing columns and turning the means where it is time to."""
        if group["feedback"] and "left_out" in state:
            gradient = gradient + state["left_out"]
        before = state.get("columns")
        inside = super().project(gradient, state, group, number)
        if before is not None and state["columns"] is not before:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = turned(state[name], before, state["columns"])
        if group["feedback"]:
            state["left_out"] = torch.addmm(gradient, self.projector(gradient, state), inside, alpha=-1)
        return inside


def turned(rows: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return the rows [rank, n] that belong to the numbers `before` where those of `after` stand; 0 for new numbers.

    >>> turned(torch.tensor([[1.0], [2.0]]), torch.tensor([3, 5]), torch.tensor([4, 5])).flatten()
    tensor([0., 2.])
    """
    place = torch.searchsorted(before, after).clamp(max=len(before) - 1)
    stays = before[place] == after
    return torch.where(stays[:, None], rows[place], 0.0)
