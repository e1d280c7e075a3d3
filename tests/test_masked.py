"""R-AMT: masks by the letter, gradient dropout beside the authors' code, and where masks are put."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait import AdamW, LoRA, train
from plait.batch import Batch
from plait.errors import BadInput
from plait.loss.base import cross_entropy
from plait.method import Method, Now
from plait.parametrize.base import attached, dense_weight
from plait.parametrize.folding import fold
from plait.parametrize.masked import RAMT, BinaryMask, kept_with_probability
from plait.schedule import Linear

X = torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 5, (24,), generator=torch.Generator().manual_seed(9))


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))


def test_a_mask_by_the_letter_and_its_gradient() -> None:
    model = net()
    RAMT(share=0.5, where="0").parametrize(model)
    ((_, layer, part),) = attached(model, BinaryMask)
    assert len(part.values) == 48
    assert torch.equal(dense_weight(layer), layer.weight)  # nothing is masked at the start
    with torch.no_grad():
        part.values.copy_(torch.randn(48, generator=torch.Generator().manual_seed(1)))
    mask = torch.ones(96)
    for value, place in zip(part.values.tolist(), part.support.tolist(), strict=True):
        mask[place] = 1.0 if value > 5e-3 else 0.0
    mask = mask.view(8, 12).requires_grad_()
    expected = F.linear(X, mask * layer.weight, layer.bias)
    output = layer(X)
    assert torch.equal(output, expected)
    assert torch.equal(fold(copy.deepcopy(model))[0](X), expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert mask.grad is not None
    torch.testing.assert_close(part.values.grad, mask.grad.flatten()[part.support.long()])


@pytest.mark.parametrize(
    ("task", "general", "chance"),
    [(1.0, 2.0, 1.0), (-1.0, -0.1, 1.0), (1.0, -1.0, 0.5), (1.0, -3.0, 0.25), (-3.0, 1.0, 0.75), (2.0, 0.0, 1.0)],
)
def test_how_likely_a_gradient_is_kept(task: float, general: float, chance: float) -> None:
    assert kept_with_probability(torch.tensor(task), torch.tensor(general)).item() == pytest.approx(chance, abs=1e-6)


def test_gradient_dropout_computes_what_the_authors_code_does() -> None:
    """ElementWiseLinear(12, 8), KLLoss(T=1), RegLoss(., 2) times 1e-4 and graddrop_backward_and_update with lambda_=0.7
    on the same numbers, U from a generator seeded with 5. To 1e-5.
    """
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 12, generator=draw), torch.randint(0, 8, (10,), generator=draw)
    layer = nn.Linear(12, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 12, generator=draw))
        layer.bias.copy_(torch.randn(8, generator=draw))
    method = RAMT(drop=0.7)
    method.parametrize(layer)
    ((_, _, part),) = attached(layer, BinaryMask)
    with torch.no_grad():
        part.values.add_(0.01 * torch.randn(8, 12, generator=draw).flatten())
    assert int((~part.kept()).sum()) == 35
    now = Now(model=layer, batch=Batch.of(x, y), generator=torch.Generator().manual_seed(5))
    misfit = method.loss(cross_entropy)

    def ask(model: nn.Module, now: Now) -> Tensor:
        loss = misfit(model(x), y, now).mean() + method.penalty(model, now)
        loss.backward()
        return loss.detach()

    value = method.gradient(ask)(layer, now)
    assert layer(x)[0, :3].tolist() == pytest.approx([-2.785156, 0.131683, -1.843268], rel=1e-5)
    assert value.item() == pytest.approx(4.425138, rel=1e-5)
    assert part.values.grad.norm().item() == pytest.approx(1.280308, rel=1e-5)
    theirs = [
        *(-0.002028, 0.037369, -0.00538, 0.015071, 0.039011, 0.014816),
        *(0.02869, -0.156856, 0.197896, -0.008097, -0.136522, 0.052057),
    ]
    assert part.values.grad[:12].tolist() == pytest.approx(theirs, abs=2e-6)
    assert not now.of(method)


def test_masks_are_put_where_the_gradient_is_largest() -> None:
    model, seen = net(), {}
    for name, weight in (("0", model[0].weight), ("2", model[2].weight)):
        weight.grad = None
        seen[name] = weight
    cross_entropy(model(X), Y, Now()).mean().backward()
    expected = {n: w.grad.abs().flatten().topk(w.numel() // 4).indices.sort().values.tolist() for n, w in seen.items()}

    def look(now: Now) -> None:
        assert {name: part.support.tolist() for name, _, part in attached(now.model, BinaryMask)} == expected

    train(net(), (X, Y), methods=[RAMT(share=0.25)], steps=2, batch_size=24, on_step=look)


def test_dropout_of_nothing_is_plain_mask_tuning() -> None:
    """Without dropout no random number is drawn, and the gradient is that of the objective."""

    def ends(**fields: Any) -> Tensor:
        methods = [RAMT(**fields), AdamW(lr=3e-3)]
        model = train(net(), (X, Y), methods=methods, steps=8, batch_size=8).model
        return torch.cat([part.values.detach() for _, _, part in attached(model, BinaryMask)])

    assert not torch.equal(ends(), ends(drop=0.0))
    assert torch.equal(ends(drop=Linear(start=0.0, end=0.0)), ends(drop=0.0))


def test_dropout_layers_and_statistics_see_nothing_of_the_model_without_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 5))
    counted: list[int] = []

    def look(now: Now) -> None:
        counted.append(int(now.model[1].num_batches_tracked))

    train(model, (X, Y), methods=[RAMT(where="0")], steps=3, batch_size=12, accumulate=2, on_step=look)
    assert counted == [2, 4, 6]


def test_weights_under_other_adapters_are_masked_as_these_make_them() -> None:
    model = net()
    for method in (LoRA(rank=2, where="0"), RAMT(where="0")):
        method.parametrize(model)
    ((_, layer, part),) = attached(model, BinaryMask)
    with torch.no_grad():
        layer.plait.lora.B.normal_()
        part.values[::2] = 0.0
    whole = (layer.weight + layer.plait.lora.scale * layer.plait.lora.B @ layer.plait.lora.A).flatten()
    whole = torch.where(part.kept(), whole, 0.0).view(8, 12)
    torch.testing.assert_close(layer(X), F.linear(X, whole, layer.bias))


@pytest.mark.parametrize(
    ("methods", "data", "says"),
    [
        ([RAMT(threshold=0.01)], (X, Y), "RAMT.threshold must be below start, 0.01, not 0.01."),
        ([RAMT(share=0.01)], (X, Y), "RAMT.share is 0.01, no entry of the 8 x 12 matrix of '0': give more."),
        (
            [RAMT()],
            (X, torch.randn(24)),
            "RAMT.drop compares probabilities of classes, and this model puts out none: give drop=0.",
        ),
    ],
)
def test_what_does_not_fit(methods: list[Method], data: Any, says: str) -> None:
    model = net() if data[1] is Y else nn.Sequential(nn.Linear(12, 1), nn.Flatten(0))
    with pytest.raises(BadInput) as problem:
        train(model, data, methods=methods, steps=1)
    assert str(problem.value) == says
