"""The natural gradient inside a low-rank subspace: Natural GaLore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plait.catalogue import paper
from plait.fields import Count, Positive
from plait.method import method
from plait.step.low_rank import GaLore


@paper("das2024natural", key="natural-galore")
@method
class NaturalGaLore(GaLore):
    """GaLore on F^-1 g in place of g = vec(P^T G), F = damping * I + sum of g_i g_i^T over the last `history` steps.

    Das. F is the empirical Fisher matrix of the subspace; the sum has this step's gradient in it. By Woodbury's
    identity F^-1 g = (g - H (damping * I + H^T H)^-1 H^T g) / damping, H [rank n, history] being the gradients side by
    side. Since g is a column of H, g = H e, that is H (damping * I + H^T H)^-1 e: one small system, and no difference
    of nearly equal numbers.

    damping > 0 stands beside squared gradient norms. Well above them nothing changes, since Adam's steps do not depend
    on a common factor. Well below, all that remains of g is what the last gradients do not share with it: where
    gradients hardly change from step to step that is noise, and training nearly stops. 1e-3 is the authors'.

    The history starts anew with each refresh of P, because its gradients are coordinates in that subspace; the authors'
    code keeps it. Their code also projects both sides of G; the paper, and this, one. [history, rank, n] numbers are
    kept beside GaLore's states, and read twice: a step takes 1.1 times GaLore's with a history of 4, 1.4 times with 20
    (benchmarks/second_order.py), which is 10 and 12 times AdamW's. The authors' history is 20: that is more memory
    than AdamW's states where rank > m / 10, and the paper's "no additional memory" does not hold. Raises BadInput where
    no matrix is larger than its rank, for a pattern that matches no weight, and for a damping that is not above 0.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.eye(4))
    >>> rule = NaturalGaLore([w], lr=0.1, rank=2)
    >>> w.grad = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    >>> rule.step()
    >>> (w.detach() - torch.eye(4)).diagonal()
    tensor([ 0.0000,  0.0000, -0.0250, -0.0250])
    """

    history: Count = 4
    damping: Positive = 1e-3

    def keeps(self, weight: Tensor) -> tuple[str, ...]:
        """Return what GaLore does not keep, too."""
        return (*super().keeps(weight), "history", "gram")

    def project(self, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], number: int) -> Tensor:
        """Return F^-1 g as a matrix [rank, n]."""
        inside = super().project(gradient, state, group, number)
        size = group["history"]
        if "seen" not in state or self.refreshes(state["step"], group, state["number"]):
            state["seen"] = 0
            state["history"] = inside.new_zeros(size, *inside.shape)
            state["gram"] = inside.new_zeros(size, size)
        place = state["seen"] % size
        state["seen"] += 1
        past, gram = state["history"], state["gram"]
        past[place] = inside
        gram[place] = gram[:, place] = past.flatten(1) @ inside.flatten()
        unit = torch.zeros(size, dtype=torch.float64, device=gram.device)
        unit[place] = 1.0
        system = gram.double() + group["damping"] * torch.eye(size, dtype=torch.float64, device=gram.device)
        weights = torch.linalg.solve(system, unit).to(inside.dtype)
        natural: Tensor = (weights @ past.flatten(1)).view_as(inside)
        return natural
