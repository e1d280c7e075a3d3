"""LOST: by the letter of its equation, what it starts from, and what it holds while it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from networks import net
from plait import LOST, LoRA, train
from plait.errors import BadInput
from plait.method import Method
from plait.parametrize.base import attached, dense_weight
from plait.parametrize.folding import fold
from plait.parametrize.low_rank_channels import LowRankChannels

X = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))


def one(layer: nn.Module | None = None, **fields: Any) -> tuple[nn.Module, LowRankChannels]:
    model = net() if layer is None else nn.Sequential(layer)
    LOST(**{"rank": 3, "share": 0.7, "density": 0.25, "where": "0"} | fields).parametrize(model)
    ((_, adapted, part),) = attached(model, LowRankChannels)
    return adapted, part


def test_by_the_letter() -> None:
    """W' = share * B A + (1 - share) * S, one entry at a time, and what comes of it for the layer's output."""
    layer, part = one()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in part.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    a, b, values, kept = (t.tolist() for t in (part.A, part.B, part.values, part.channels))
    weight = [[0.7 * sum(b[i][r] * a[r][j] for r in range(3)) for j in range(12)] for i in range(8)]
    for i in range(8):
        for place, j in enumerate(kept):
            weight[i][j] += 0.3 * values[i][place]
    torch.testing.assert_close(dense_weight(layer), torch.tensor(weight), rtol=1e-5, atol=1e-5)
    expected = X @ torch.tensor(weight).t() + layer.bias
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fold(nn.Sequential(layer))(X), expected, rtol=1e-5, atol=1e-5)


def test_the_start_divides_the_weight_by_its_singular_values() -> None:
    """B A is its best approximation, split evenly; S has the weight's own columns where the rest of it is largest."""
    _, part = one()
    weight = net()[0].weight.detach()
    u, s, vh = torch.linalg.svd(weight)
    best = u[:, :3] * s[:3] @ vh[:3]
    torch.testing.assert_close(part.B @ part.A, best, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part.B.norm(dim=0), part.A.norm(dim=1), rtol=1e-5, atol=1e-6)
    lengths = [(sum((weight - best)[i, j].item() ** 2 for i in range(8)), j) for j in range(12)]
    kept = sorted(j for _, j in sorted(lengths)[-3:])
    assert part.channels.tolist() == kept
    assert torch.equal(part.values, weight[:, kept])


def test_an_embedding_is_looked_up_under_autocast() -> None:
    model, part = one(nn.Embedding(12, 8))
    tokens = torch.arange(12)
    expected = dense_weight(model)[tokens]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0.05 * float(part.values.detach().abs().max()))


def test_a_convolutions_channels_come_whole() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    weight = layer.weight.detach().clone()
    layer, part = one(layer, rank=2, density=0.5)
    assert part.values.shape == (6, 2 * 9)
    torch.testing.assert_close(part.values.view(6, 2, 3, 3), weight[:, part.channels])
    left_over = weight - (part.B @ part.A).view_as(weight)
    assert set(left_over.square().sum((0, 2, 3)).topk(2).indices.tolist()) == set(part.channels.tolist())
    image = torch.randn(2, 4, 5, 5)
    expected = nn.functional.conv2d(image, dense_weight(layer), layer.bias, padding=1)
    torch.testing.assert_close(layer(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([LOST(rank=9)], "LOST.rank is 9, but '0' has a (8, 12) weight: use at most 8."),
        ([LOST(rank=2, density=1.0)], "LOST.density must be in (0, 1), not 1.0."),
        ([LOST(rank=2, share=1.0)], "LOST.share must be in (0, 1), not 1.0."),
        ([LOST(rank=2, density=0.05)], "LOST.density is 0.05, none of the 12 inputs of '0': give more."),
        ([LoRA(rank=2), LOST(rank=2, density=0.2)], "LOST replaces the weight of '0': put it first in the list."),
    ],
)
def test_what_does_not_fit(methods: list[Method], says: str) -> None:
    with pytest.raises(BadInput) as problem:
        train(net(), (X, torch.zeros(10, 20)), methods=methods, steps=1)
    assert str(problem.value) == says
