"""Adapters without a start of their own, on a small problem: they learn, and what was saved is what was trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks import net
from plait import LOST, AdamW, LoRA, train
from plait.method import Method
from plait.parametrize.block import Bone
from plait.parametrize.low_rank_sparse import SLTrain
from plait.parametrize.random_bases import RandLoRA
from plait.parametrize.sequential import Hydra

X = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
TARGET = torch.randn(10, 20, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("method", "left"),
    [
        (Bone(rank=4), 0.8),
        (Bone(rank=5, kind="shared"), 0.8),
        (RandLoRA(rank=3), 0.8),
        (Hydra(rank=3), 0.8),
        (LOST(rank=3, density=0.2), 0.6),  # these two train the bulk of what they stand for
        (SLTrain(rank=3, density=0.2), 0.6),
    ],
)
def test_it_learns_and_saves(method: Method, left: float, tmp_path: Any) -> None:
    methods = [method, AdamW(lr=1e-2)]
    run = train(net(), (X, TARGET), methods=methods, steps=120, batch_size=10, folder=tmp_path)
    assert run.history[-1]["objective"] < left * run.history[0]["objective"]
    again = train(net(), (X, TARGET), methods=methods, steps=120, batch_size=10, folder=tmp_path)
    assert torch.equal(again.model(X), run.model(X))


class OneOfTwo(nn.Module):
    """A model of which the loss sees one branch only."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


def test_what_no_gradient_reaches_is_named() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with pytest.warns(
        UserWarning, match=r"no gradient ever reached 'unused.plait.lora.A' and 1 more: the loss does not"
    ):
        train(OneOfTwo(), (x, x.sum(1, keepdim=True)), methods=[LoRA(rank=1)], steps=2)
    train(OneOfTwo(), (x, x.sum(1, keepdim=True)), methods=[LoRA(rank=1, where="used")], steps=2)
