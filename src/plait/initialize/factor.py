"""Which factor of an adapter starts at random, and which at zero."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from plait.catalogue import paper
from plait.initialize.base import Start, low_rank
from plait.method import method
from plait.parametrize.base import Parametrization


@paper("hayou2024init", key="lora-init-ab")
@method
class RandomFactor(Start):
    """Init[A]: A ~ N(0, 1 / in), B = 0; Init[B]: A = 0, B ~ N(0, 1 / rank). Both start at W.

    Hayou, Ghosh and Yu: in wide layers Init[A] stays stable at larger learning rates, of order in^(-1/2) against
    in^(-1), and learns features better for it; at those rates its inner activations A x grow with the width. LoRA's own
    start is Init[A].

    factor: the one that is drawn. Raises BadInput where the model has no low-rank adapters.

    >>> from plait import LoRA
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> LoRA(rank=2).parametrize(model)
    >>> RandomFactor(factor="B").initialize(model, None)
    >>> bool(model[0].plait.lora.A.any())
    False
    """

    factor: Literal["A", "B"] = "B"

    def start(self, weight: Tensor, adapter: Parametrization) -> None:
        """Draw one factor and clear the other."""
        low = low_rank(adapter)
        a, b = torch.zeros_like(low.A), torch.zeros_like(low.B)
        if self.factor == "A":
            a.normal_(std=1 / math.sqrt(a.shape[1]))
        else:
            b.normal_(std=1 / math.sqrt(low.rank))
        low.set(a, b)
