"""ALLoRA: LoRA without a scale whose rows' gradients are multiplied by a function of their length."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from plait import SGD, ALLoRA, LoRA, train
from plait.errors import BadInput
from plait.method import Now
from plait.parametrize.folding import fold

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))


def pair(size: float = 0.3, eta: float = 2.0) -> tuple[nn.Module, nn.Module]:
    """The same layer with the same factors, under ALLoRA and under LoRA of scale 1."""
    models = []
    for method in (ALLoRA(rank=3, eta=eta), LoRA(rank=3, alpha=3.0)):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(6, 5))
        method.parametrize(model)
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for factor in factors(model):
                factor.copy_(size * torch.randn(factor.shape, generator=draw))
            factors(model)[1][2] = 0.0  # a row of zeros
        models.append(model)
    return models[0], models[1]


def factors(model: nn.Module) -> tuple[Tensor, Tensor]:
    (part,) = model[0].plait.values()
    return part.A, part.B


def type_of(model: nn.Module) -> str:
    (name,) = model[0].plait
    return name


def gradients(model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad((model(X) - Y).square().mean(), factors(model)))


def scaled(gradient: Tensor, parameter: Tensor, eta: float) -> list[list[float]]:
    """The rule, one number at a time."""
    rows = []
    for row, step in zip(parameter.tolist(), gradient.tolist(), strict=True):
        length = math.sqrt(sum(number**2 for number in row))
        rows.append([number / math.sqrt(length + 1 / eta**2) for number in step])
    return rows


@pytest.mark.parametrize("eta", [0.5, 2.0, 10.0])
def test_each_row_of_both_factors_by_the_letter(eta: float) -> None:
    ours, plain = pair(eta=eta)
    assert torch.equal(ours(X), plain(X))
    for got, gradient, parameter in zip(gradients(ours), gradients(plain), factors(plain), strict=True):
        torch.testing.assert_close(got, torch.tensor(scaled(gradient, parameter, eta)))


def test_a_row_of_zeros_learns_at_eta_times_the_rate_and_a_long_one_slower() -> None:
    for size, factor in ((0.0, 2.0), (1e4, None)):
        ours, plain = pair(size)
        b, expected = gradients(ours)[1], gradients(plain)[1]
        if factor is not None:
            torch.testing.assert_close(b, factor * expected)
        else:
            assert (b[:2].norm(dim=1) < 0.02 * expected[:2].norm(dim=1)).all()


def test_inputs_and_outputs_have_their_plain_gradients() -> None:
    """Only the factors' own gradients are scaled, never what goes on to other layers."""
    seen = []
    for model in pair():
        x = X.clone().requires_grad_()
        (model(x) - Y).square().mean().backward()
        seen.append(x.grad)
    assert torch.equal(*seen)


def test_accumulated_gradients_are_scaled_once() -> None:
    ours, _ = pair()
    whole = gradients(ours)
    for half in (slice(0, 12), slice(12, 24)):
        ((ours(X[half]) - Y[half]).square().mean() / 2).backward()
    for got, expected in zip(factors(ours), whole, strict=True):
        torch.testing.assert_close(got.grad, expected)


def test_gradient_descent_follows_the_rule() -> None:
    ours, plain = pair()
    weight, bias = plain[0].weight.detach(), plain[0].bias.detach()
    a, b = (factor.detach().clone() for factor in factors(plain))
    for _ in range(3):
        error = 2 * (X @ (weight + b @ a).t() + bias - Y) / 5 / len(X)  # of the mean over 24 examples of 5 numbers
        whole = error.t() @ X
        step_a, step_b = (torch.tensor(scaled(g, p, 2.0)) for g, p in ((b.t() @ whole, a), (whole @ a.t(), b)))
        a, b = a - 0.1 * step_a, b - 0.1 * step_b

    def mean_square(output: Tensor, target: Tensor, now: Now) -> Tensor:
        return (output - target).square().mean(1)

    done = train(ours, (X, Y), mean_square, methods=[SGD(lr=0.1, momentum=0.0)], steps=3, batch_size=24)
    for got, expected in zip(factors(done.model), (a, b), strict=True):
        torch.testing.assert_close(got.detach(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_single_examples_follow_the_rule() -> None:
    ours, _ = pair()
    key = f"0.plait.{type_of(ours)}.B"

    def loss(b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (torch.func.functional_call(ours, {key: b}, (x,)) - y).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(factors(ours)[1], X, Y)
    torch.testing.assert_close(each.mean(0), gradients(ours)[1])


def test_compiled_it_computes_the_same() -> None:
    ours, _ = pair()
    (ours(X) - Y).square().mean().backward()
    expected = [factor.grad.clone() for factor in factors(ours)]
    ours.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    (compiled(X) - Y).square().mean().backward()
    for got, want in zip(factors(ours), expected, strict=True):
        torch.testing.assert_close(got.grad, want)


def test_folding_forgets_the_rule() -> None:
    ours, plain = pair()
    torch.testing.assert_close(fold(ours)(X), plain(X))


def test_bad_input() -> None:
    with pytest.raises(BadInput, match=r"ALLoRA\.eta must be greater than 0, not 0"):
        ALLoRA(eta=0.0)
    with pytest.raises(BadInput, match=r"ALLoRA\.rank is 6, but '0' has a \(5, 6\) weight: use at most 5"):
        ALLoRA(rank=6).parametrize(nn.Sequential(nn.Linear(6, 5)))
