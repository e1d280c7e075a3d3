"""Parametrizations that stand in the place of a layer's weight: it is not read, and nothing of its size is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from plait import LOST
from plait.parametrize.base import Adapter
from plait.parametrize.low_rank_sparse import SLTrain

X = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[LOST(rank=2, density=0.1), SLTrain(rank=2, density=0.05)], ids=["lost", "sltrain"])
def layer(request: pytest.FixtureRequest) -> nn.Module:
    method: Adapter = request.param
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(40, 30))
    method.parametrize(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    return model[0]


def test_the_layers_weight_is_neither_trained_nor_used(layer: nn.Module) -> None:
    output, other = layer(X), copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.fill_(float("nan"))
    assert torch.equal(other(X), output)
    output.sum().backward()
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad


def test_nothing_of_its_size_is_kept_for_the_backward_pass(layer: nn.Module) -> None:
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        layer(X)
    trained = [p.numel() for p in layer.plait.parameters()]  # type: ignore[union-attr]
    assert max(kept) <= max(*trained, X.numel()) < layer.weight.numel() / 4  # type: ignore[operator]
