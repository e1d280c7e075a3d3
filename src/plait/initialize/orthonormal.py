"""A start from the QR decomposition of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.catalogue import paper
from plait.initialize.base import Start, low_rank, move
from plait.math.svd import wide
from plait.method import method
from plait.parametrize.base import Parametrization


@paper("buyukakyuz2024olora", key="olora", kind="ground")
@method
class OLoRA(Start):
    """B = Q_r, A = R_r, and the frozen weight becomes W - scale * B A, where W = Q R and Q_r, R_r are the first r
    columns of Q and rows of R.

    Only the first r columns of W are decomposed: Q_r is theirs, and R_r = Q_r^T W.
    The columns of B are orthonormal. As in peft the factors are not divided by the scale, so at scale s the part
    s Q_r R_r is moved. The function is the base model's, up to rounding. Signs are those with a positive diagonal of R.
    Raises BadInput without LoRA adapters before it, and for weights that layers share.

    >>> from plait import LoRA
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    >>> LoRA(rank=2).parametrize(model)
    >>> OLoRA().initialize(model, None)
    >>> torch.allclose(model[0].plait.lora.B.T @ model[0].plait.lora.B, torch.eye(2), atol=1e-5)
    True
    """

    moves = True

    def start(self, weight: Tensor, adapter: Parametrization) -> None:
        """Move the first rows of R into the adapter."""
        low, whole = low_rank(adapter), wide(weight)
        q, r = torch.linalg.qr(whole[:, : low.rank])
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
        move(weight, low, q.T @ whole, q)
