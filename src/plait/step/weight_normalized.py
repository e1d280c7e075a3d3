"""Low-rank steps of a weight that is trained as the length and the direction of each row: GradNormLoRP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plait.catalogue import paper
from plait.fields import Positive
from plait.math.update_rule import exact
from plait.method import method
from plait.step.low_rank import GaLore


@paper("huang2025gradnormlorp", key="gradnormlorp")
@method
class GradNormLoRP(GaLore):
    """W = diag(g) V / |V|: g [m] steps by Adam, V [m, n] by Adam on P^T grad V, with |V| the lengths of its rows.

    grad g = rowsum(G * V / |V|) and grad V = diag(g / |V|) (G - diag(grad g) V / |V|), for the gradient G of W. Huang
    et al. normalize the weight, so that the gradient's scale does not depend on its length, and project the gradient,
    so that its moments need rank / m of Adam's memory; with states="8bit" they take a quarter of that. Rows are those
    of W as it is stored. `weight_decay` shrinks g, and so W. `scale` and the rest: see `GaLore`.

    V is kept as its lengths alone, since W / g is its direction. A row of zeros has none: it steps as GaLore's would
    until it has one. Two departures from the authors' code, to the equations: there g is set back to |V| at every step,
    so that its own steps are lost, and grad V keeps the part along V. The paper projects both sides of the gradient,
    its code and this the side of fewer rows. For adapters the authors use DoRA and project the gradients of its
    factors, which is [*DoRA(rank=8), GaLore(rank=4)] here. Raises BadInput where no matrix is larger than its rank, and
    for a pattern that matches no weight.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    >>> rule = GradNormLoRP([w], lr=0.1, rank=1, scale=1.0)
    >>> w.grad = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> rule.step()
    >>> w.detach()
    tensor([[1.9000, 0.0000],
            [0.0000, 1.0000]])
    """

    scale: Positive = 1.0

    def keeps(self, weight: Tensor) -> tuple[str, ...]:
        """Return what GaLore does not keep, too."""
        return (*super().keeps(weight), "magnitude", "length")

    def step_whole(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], number: int
    ) -> None:
        """Step a matrix in place, through its lengths and directions."""
        precise = exact(weight.dtype)
        held, gradient = weight.to(precise), gradient.to(precise)
        norms = torch.linalg.vector_norm(held, dim=1, keepdim=True)
        if "magnitude" not in state:
            state["magnitude"], state["length"] = norms, norms.clone()
            state["magnitude_avg"], state["magnitude_avg_sq"] = torch.zeros_like(norms), torch.zeros_like(norms)
        magnitude, length = state["magnitude"], state["length"]
        moved = (norms - magnitude.abs()).abs() > 4 * torch.finfo(
            weight.dtype
        ).eps * norms  # by others since the last step
        magnitude.copy_(torch.where(moved, norms.copysign(magnitude), magnitude))
        lives = (magnitude != 0) & (length > 0)
        unit = torch.where(lives, held / magnitude, 0.0)
        along = (gradient * unit).sum(1, keepdim=True)
        across = torch.where(lives, magnitude / length, 1.0) * (gradient - along * unit)
        start = magnitude.clone(), length.clone()
        directions = unit * length
        super().step_whole(directions, across, state, {**group, "weight_decay": 0.0}, number)

        beta1, beta2 = group["betas"]
        state["magnitude_avg"].lerp_(along, 1 - beta1)
        state["magnitude_avg_sq"].mul_(beta2).addcmul_(along, along, value=1 - beta2)
        rate, step = float(group["lr"]), state["step"]
        corrected = rate * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        magnitude.mul_(1 - rate * group["weight_decay"])
        magnitude.addcdiv_(
            state["magnitude_avg"], state["magnitude_avg_sq"].sqrt().add_(group["eps"]), value=-corrected
        )
        torch.linalg.vector_norm(directions, dim=1, keepdim=True, out=length)
        magnitude.copy_(torch.where(lives, magnitude, length))
        made = torch.where(length > 0, magnitude / length, 0.0) * directions
        stays = (magnitude == start[0]) & (directions == unit * start[1]).all(1, keepdim=True)
        weight.copy_(torch.where(stays, held, made))  # g V / |V| of a row that stays would differ by its rounding
