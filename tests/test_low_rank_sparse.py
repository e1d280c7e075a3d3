"""SLTrain: by the letter of its equation, beside the authors' code, and what it holds while it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from networks import net
from plait import LoRA, train
from plait.errors import BadInput
from plait.initialize.weight_svd import PiSSA
from plait.method import Method
from plait.parametrize.base import attached, dense_weight
from plait.parametrize.folding import fold
from plait.parametrize.low_rank_sparse import LowRankSparse, SLTrain

X = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))


def one(**fields: Any) -> tuple[nn.Module, LowRankSparse]:
    """Return the first layer of the net under SLTrain of rank 3 and scale 2, every number drawn anew."""
    model = net()
    SLTrain(**{"rank": 3, "alpha": 6.0, "density": 0.25, "where": "0"} | fields).parametrize(model)
    ((_, layer, part),) = attached(model, LowRankSparse)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in (part.A, part.B, part.values, layer.bias):
            p.copy_(torch.randn(p.shape, generator=draw))
        part.support.copy_(torch.randperm(96, generator=draw)[: len(part.values)].sort().values)
    return layer, part


def test_sltrain_by_the_letter() -> None:
    layer, part = one()
    a, b, values, support = (t.tolist() for t in (part.A, part.B, part.values, part.support))
    weight = [[2.0 * sum(b[i][r] * a[r][j] for r in range(3)) for j in range(12)] for i in range(8)]
    for value, place in zip(values, support, strict=True):
        weight[place // 12][place % 12] += value
    torch.testing.assert_close(dense_weight(layer), torch.tensor(weight), rtol=1e-5, atol=1e-5)
    expected = X @ torch.tensor(weight).t() + layer.bias
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fold(nn.Sequential(layer))(X), expected, rtol=1e-5, atol=1e-5)


def test_sltrain_computes_what_the_authors_code_does() -> None:
    """SpLoRaLinear(12, 8, r=3, sp_ratio=0.25, lora_alpha=6) with its C++ extension built, the same numbers in it."""
    layer, part = one()
    x = X.clone().requires_grad_()
    output = layer(x)
    output.square().sum().backward()
    theirs = [-12.783497, 17.815269, 8.201913, -10.906900, -24.571558, -11.022648, 0.471159, -12.258426]
    assert output[0].tolist() == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert output.norm().item() == pytest.approx(80.507042, rel=1e-5)
    norms = [p.grad.norm().item() for p in (part.A, part.B, part.values, layer.bias, x)]
    assert norms == pytest.approx([4322.886548, 2975.833205, 279.324107, 108.970360, 3701.377080], rel=1e-5)
    assert part.values.grad[:4].tolist() == pytest.approx([30.281866, 13.973604, 43.702370, 10.031180], rel=1e-5)


def test_the_start() -> None:
    """B is zero, all else uniform within 1 / sqrt(in); the support has the share of entries asked for, each once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300))
    SLTrain(rank=16, density=0.03).parametrize(model)
    ((_, layer, part),) = attached(model, LowRankSparse)
    assert not part.B.any()
    for drawn in (part.A, part.values):
        assert drawn.abs().max() <= 400**-0.5
        assert drawn.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.03)
    assert len(part.support.unique()) == len(part.values) == 3600
    rows = torch.bincount(part.support // 400, minlength=300).double()
    assert rows.var().item() == pytest.approx(12, rel=0.35)  # as of places drawn without regard to rows
    assert dense_weight(layer).count_nonzero() == 3600


def test_it_can_be_differentiated_twice() -> None:
    layer, part = one()
    layer, x = layer.double(), X[:3].double().requires_grad_()
    inputs = [part.A, part.B, part.values]

    def output(x: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
        made = dict(zip(("plait.sltrain.A", "plait.sltrain.B", "plait.sltrain.values"), held, strict=True))
        result: torch.Tensor = torch.func.functional_call(layer, made, (x,))
        return result

    drawn = [p.detach().requires_grad_() for p in inputs]
    assert torch.autograd.gradcheck(output, (x, *drawn))
    assert torch.autograd.gradgradcheck(output, (x, *drawn))


def test_a_transformer_is_trained_with_its_ends() -> None:
    from plait.models.small import llama_tiny

    model = llama_tiny()
    SLTrain(rank=2, density=0.1).parametrize(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.rsplit(".", 2)[1] for name in frozen} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    assert len(list(attached(model, LowRankSparse))) == len(frozen)


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([SLTrain(rank=9)], "SLTrain.rank is 9, but '0' has a (8, 12) weight: use at most 8."),
        ([SLTrain(rank=2, density=1.0)], "SLTrain.density must be in (0, 1), not 1.0."),
        (
            [SLTrain(rank=2, density=0.01)],
            "SLTrain.density is 0.01, no entry of the 8 x 12 matrix of '0': give more.",
        ),
        (
            [LoRA(rank=2), SLTrain(rank=2, density=0.2)],
            "SLTrain replaces the weight of '0': put it first in the list.",
        ),
        (
            [SLTrain(rank=2, density=0.2), LoRA(rank=2), PiSSA()],
            "PiSSA would move part of the weight of '0', but that is not in use: drop PiSSA.",
        ),
    ],
)
def test_what_does_not_fit(methods: list[Method], says: str) -> None:
    with pytest.raises(BadInput) as problem:
        train(net(), (X, torch.zeros(10, 20)), methods=methods, steps=1)
    assert str(problem.value) == says
