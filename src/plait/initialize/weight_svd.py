"""Starts from the singular value decomposition of the weight itself."""

from __future__ import annotations

from torch import Tensor

from plait.catalogue import paper
from plait.fields import Count
from plait.initialize.base import Start, low_rank, move
from plait.math.svd import gram_svd, sketched_svd
from plait.method import method
from plait.parametrize.base import Parametrization


@paper("meng2024pissa", key="pissa")
@method
class PiSSA(Start):
    """B = U_r (S_r / scale)^(1/2), A = (S_r / scale)^(1/2) V_r^T, and the frozen weight becomes W - scale * B A, where
    W = U S V^T and r is the adapter's rank: the principal part of the weight is trained, the residual is frozen.

    The function is the base model's, up to rounding. `to_plain_lora` gives the untouched base back with plain LoRA of
    twice the rank.

    iterations: of the sketched decomposition, at least 1; None for the exact one. With 3, the residual of
    SmolLM2-135M's weights at rank 16 is 0.5 % above the smallest possible one. Raises BadInput without LoRA adapters
    before it, and for weights that layers share.

    >>> from plait import LoRA
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    >>> before = model[0].weight.clone()
    >>> LoRA(rank=2).parametrize(model)
    >>> PiSSA(iterations=None).initialize(model, None)
    >>> int(torch.linalg.matrix_rank(model[0].weight.double(), rtol=1e-5))
    2
    >>> torch.allclose(model(torch.eye(4)), before.T, atol=1e-6)
    True
    """

    moves = True

    iterations: Count | None = 3

    def start(self, weight: Tensor, adapter: Parametrization) -> None:
        """Move the principal part of the weight into the adapter."""
        low = low_rank(adapter)
        if self.iterations is None:
            u, s, vh = gram_svd(weight, low.rank)
        else:
            u, s, vh = sketched_svd(weight, low.rank, self.iterations)
        root = (s / low.scale).sqrt()
        move(weight, low, root[:, None] * vh, u * root)
