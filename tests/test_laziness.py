"""The measures of rich and lazy learning against loops over examples and outputs, and the authors' figures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from plait import SGD, AdamW, BadInput, LoRA, Now, train
from plait.batch import Batch
from plait.loss.base import squared_error
from plait.measure.base import observe
from plait.measure.laziness import Laziness, alignment, effective_rank


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3))


def slow_kernel(model: nn.Module, inputs: Tensor) -> Tensor:
    """[n * outputs, n * outputs], one derivative after the other."""
    rows = []
    for x in inputs:
        output = model(x[None])[0]
        for one in output:
            gradients = torch.autograd.grad(one, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradients]).double())
    return torch.stack([torch.stack([a @ b for b in rows]) for a in rows])


def slow_alignment(one: Tensor, other: Tensor) -> float:
    pairs = list(zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))
    return sum(a * b for a, b in pairs) / math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))


def test_the_figures_are_the_equations() -> None:
    model, x = net(), drawn(0, 10, 5).float()
    model.eval()
    before = [slow_kernel(model, x), model[:2](x).detach(), [p.detach().clone() for p in model.parameters()]]
    now = Now(batch=Batch.of(x, x[:, 0]), model=model, examples=10)
    now.calibration = lambda count: iter([Batch.of(x[:6], x[:6, 0]), Batch.of(x[6:], x[6:, 0])])
    probe = Laziness(count=10)
    model.train()
    probe.initialize(model, now)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    figures = probe.measure(model, now)
    model.eval()
    kernel, hidden = slow_kernel(model, x), model[:2](x).detach()
    assert figures["kernel alignment"] == pytest.approx(slow_alignment(before[0], kernel), rel=1e-5)
    similar = slow_alignment(before[1] @ before[1].T, hidden @ hidden.T)
    assert figures["representation alignment"] == pytest.approx(similar, rel=1e-5)
    assert figures["sign similarity"] == pytest.approx(float((hidden.sign() == before[1].sign()).float().mean()))
    moved = sum(float((p.detach() - q).square().sum()) for p, q in zip(model.parameters(), before[2], strict=True))
    assert figures["weight change"] == pytest.approx(math.sqrt(moved), rel=1e-5)
    start = sum(float(q.square().sum()) for q in before[2])
    assert figures["relative change"] == pytest.approx(math.sqrt(moved / start), rel=1e-5)
    assert 0.2 < figures["kernel alignment"] < 0.99


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    weight = drawn(0, 4, 6)
    values = torch.linalg.svd(weight).S.tolist()
    shares = [v / sum(values) for v in values]
    assert effective_rank(weight) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-12)
    assert effective_rank(drawn(1, 6, 2) @ drawn(2, 2, 9)) < 2.0001
    assert effective_rank(torch.zeros(3, 3)) == 0.0


class Recurrent(nn.Module):
    """h <- relu(W x + b + V h), the output a linear map of the last h."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.h2h, self.fc = (
            nn.Linear(3, 8, bias=False),
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 2, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, steps, 3] -> [n, 2]."""
        hidden = x.new_zeros(len(x), 8)
        for step in x.unbind(1):
            hidden = torch.relu(self.inputs(step) + self.h2h(hidden))
        output: Tensor = self.fc(hidden)
        return output


def test_the_authors_code_gives_the_same_figures() -> None:
    """Helena-Yuhan-Liu/BioRNN_RichLazy acf25c3, the network and the lines of main.py that measure (its "sMNIST" branch,
    outputs at the last step), on these weights before and after this change, in float64. Tolerance: float64 rounding.
    """
    model = Recurrent().double()
    with torch.no_grad():
        model.inputs.weight.copy_(drawn(1, 8, 3))
        model.h2h.weight.copy_(0.5 * drawn(2, 8, 8))
        model.fc.weight.copy_(drawn(3, 2, 8))
    x = drawn(4, 4, 6, 3).transpose(0, 1).contiguous()
    now = Now(batch=Batch.of(x, x[:, 0, 0]), model=model)
    now.calibration = lambda count: iter([now.batch])
    probe = Laziness(count=6, where="h2h", layer="fc")
    probe.initialize(model, now)
    with torch.no_grad():
        model.h2h.weight.add_(0.3 * drawn(5, 8, 8))
    figures = probe.measure(model, now)
    assert figures["kernel alignment"] == pytest.approx(0.7128114332710743, rel=1e-9)
    assert figures["representation alignment"] == pytest.approx(0.8805755621831349, rel=1e-9)
    assert figures["sign similarity"] == pytest.approx(0.7916666666666666, rel=1e-9)


def test_a_linear_model_is_lazy_and_a_deep_one_is_not() -> None:
    x = drawn(0, 40, 5).float()
    data, methods = (x, x[:, :3] ** 2), [SGD(lr=0.02), Laziness(count=12)]
    flat, deep = (
        train(model, data, squared_error, methods, steps=150).measures[repr(methods[1])][-1]
        for model in (nn.Linear(5, 3), net())
    )
    assert flat["kernel alignment"] == pytest.approx(1.0, abs=1e-9)
    assert flat["representation alignment"] == pytest.approx(1.0, abs=1e-9)
    assert deep["kernel alignment"] < 0.98


def test_it_sees_the_weight_that_adapters_make() -> None:
    x = drawn(0, 16, 5).float()
    probe = Laziness(count=8)
    run = train(net(), (x, x[:, :3]), methods=[LoRA(rank=1), AdamW(lr=1e-2), probe], steps=10)
    figures = run.measures[repr(probe)][-1]
    assert figures["weight change"] > 0
    assert figures["effective rank at start"] > 2
    assert figures["part of full rank at start"] <= 1


@pytest.mark.filterwarnings("ignore:no gradient ever reached 'none'")
def test_a_weight_without_elements_changes_nothing() -> None:
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for empty in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        if empty:
            model.register_parameter("none", nn.Parameter(torch.zeros(0, 3)))
        run = train(model, (x, x), methods=[SGD(lr=0.1), Laziness(count=4)], steps=2)
        found.append(run.measures["Laziness(count=4)"])
    assert found[0] == found[1]


def test_what_cannot_work_is_refused() -> None:
    x = drawn(0, 8, 5).float()
    with pytest.raises(BadInput, match="name one layer"):
        train(net(), (x, x[:, :3]), methods=[Laziness(layer="0|3")], steps=1)
    with pytest.raises(BadInput, match="32 examples times 300 outputs"):
        train(nn.Linear(5, 300), (x, torch.zeros(8, 300)), methods=[Laziness()], steps=1)
    with pytest.raises(BadInput, match="did not see the start"):
        observe(net(), [Laziness()], Now(batch=Batch.of(x, x), calibration=lambda count: iter([Batch.of(x, x)])), {})
    assert alignment(torch.zeros(2, 2), torch.eye(2)) == 0.0
