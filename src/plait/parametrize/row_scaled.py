"""LoRA whose rows learn at rates of their own: the longer a row of a factor, the smaller its gradient is made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Count, Positive
from plait.method import Method, method
from plait.parametrize.base import Adapter
from plait.parametrize.low_rank import LowRank, check_rank


def row_rates(rows: Tensor, eta: float) -> Tensor:
    """Return 1 / sqrt(|row| + 1 / eta^2) for each row of a matrix [n, m], as a constant: [n, 1].

    >>> row_rates(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), 2.0).flatten()
    tensor([2.0000, 0.4364])
    """
    norms = torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True)
    return torch.rsqrt(norms + eta**-2)


def rows_scaled(rows: Tensor, eta: float) -> Tensor:
    """Return a matrix, bitwise, the gradients of whose rows are multiplied by `row_rates`."""
    constant = rows.detach()
    return constant + row_rates(rows, eta) * (rows - constant)


class RowScaledLowRank(LowRank):
    """W -> W + B A, in whose backward pass each row of A [rank, in] and of B [out, rank] has a rate of its own."""

    made_by = "ALLoRA"

    def __init__(self, weight: Tensor, rank: int, eta: float) -> None:
        super().__init__(weight, rank, 1.0)
        self.eta = eta

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B as the layer uses them."""
        return rows_scaled(self.A, self.eta), rows_scaled(self.B, self.eta)


@paper("huang2024allora", key="allora")
@method
class ALLoRA(Adapter):
    """W' = W + B A without a scale and without dropout; each row p of A [rank, in] and of B [out, rank] is trained by
    its gradient times 1 / sqrt(|p| + 1 / eta^2), with |p| the length of the row before the step.

    B = 0 starts with eta times its gradient and so leaves 0 sooner; long rows slow down. The factors are applied in the
    adapter's own backward pass: they hold in every loop, under accumulation and in any optimizer (one whose step does
    not depend on the gradient's size, such as Adam, undoes constant factors and sees only their change). Of the paper
    only the abstract could be read; the formula is that of a third party's optimizer which cites it.

    rank: rows of A, at most min(out, in). eta: the factor of a row of zeros; larger than 0. Raises BadInput for a rank
    above the smaller side of a target.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> ALLoRA(rank=2).parametrize(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.plait.allora.A', '0.plait.allora.B']
    """

    rank: Count = 8
    eta: Positive = 2.0

    def build(self, layer: nn.Module, weight: Tensor) -> RowScaledLowRank:
        """Return the low-rank update of one weight."""
        return RowScaledLowRank(weight, self.rank, self.eta)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a rank above a target's."""
        check_rank(self, self.rank, model)
