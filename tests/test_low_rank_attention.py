"""Chained low-rank attention against autograd through softmax, and the norms that decide whether it is cheap."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait import BadInput, LoRA, Now, train
from plait.batch import Batch
from plait.math.low_rank_attention import (
    attention,
    chained_gradients,
    degree_for,
    factors,
    lora_gradients,
    monomials,
    rank_of,
)
from plait.measure.efficiency import EfficiencyThreshold


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("degree", [0, 1, 2, 5])
def test_monomials_make_the_taylor_polynomial(degree: int) -> None:
    x, y = drawn(0, 4, 3), drawn(1, 5, 3)
    expected = [
        [sum(float(a @ b) ** j / math.factorial(j) for j in range(degree + 1)) for b in y] for a in x
    ]  # term by term
    phi = monomials(x, degree)
    assert phi.shape == (4, rank_of(3, degree))
    torch.testing.assert_close(phi @ monomials(y, degree).T, torch.tensor(expected, dtype=torch.float64))


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    output = F.softmax(leaves[0] @ leaves[1].T / math.sqrt(q.shape[1]), -1) @ leaves[2]
    return (output.detach(), *torch.autograd.grad(output, leaves, grad))


def slow(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, degree: int) -> tuple[Tensor, ...]:
    """The same with the [tokens, tokens] matrix of the polynomial written out, and the derivative of softmax."""
    logits = q @ k.T / math.sqrt(q.shape[1])
    raw = sum(logits**j / math.factorial(j) for j in range(degree + 1))
    f = raw / raw.sum(1, keepdim=True)
    s = f * (grad @ v.T)
    s = s - s.sum(1, keepdim=True) * f
    return f @ v, s @ k / math.sqrt(q.shape[1]), s.T @ q / math.sqrt(q.shape[1]), f.T @ grad


@pytest.mark.parametrize("degree", [2, 4])
def test_the_chains_are_the_dense_products(degree: int) -> None:
    q, k, v, grad = drawn(0, 7, 3), drawn(1, 9, 3), drawn(2, 9, 4), drawn(3, 7, 4)
    found = attention(q, k, v, degree), *chained_gradients(q, k, v, grad, degree)
    for one, expected in zip(found, slow(q, k, v, grad, degree), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-11)


def test_rows_are_probabilities() -> None:
    u, v = factors(3 * drawn(0, 6, 3), 3 * drawn(1, 8, 3), 2)
    weights = u @ v.T
    assert float(weights.min()) > 0
    torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))
    with pytest.raises(BadInput, match="must be even"):
        factors(drawn(0, 6, 3), drawn(1, 8, 3), 3)


def test_the_error_falls_with_the_degree_to_autograd() -> None:
    q, k, v, grad = 0.4 * drawn(0, 30, 4), 0.4 * drawn(1, 30, 4), drawn(2, 30, 4), drawn(3, 30, 4)
    reference = exact(q, k, v, grad)
    errors = []
    for degree in (2, 4, 6, 8):
        found = attention(q, k, v, degree), *chained_gradients(q, k, v, grad, degree)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True)))
    assert errors[0] < 0.5
    assert errors[-1] < 1e-3
    assert all(later < earlier / 3 for earlier, later in pairwise(errors))


def test_the_degree_that_is_asked_for_suffices() -> None:
    for bound, tolerance in ((0.0, 1e-2), (0.5, 1e-3), (2.0, 1e-2), (5.0, 1e-4)):
        degree = degree_for(bound, tolerance)
        x = torch.linspace(-bound, bound, 201, dtype=torch.float64)
        polynomial = sum(x**j / float(math.factorial(j)) for j in range(degree + 1))
        assert float(((polynomial - x.exp()) / x.exp()).abs().max()) <= tolerance
        assert degree % 2 == 0


def test_an_adapters_gradients_through_attention() -> None:
    """LoRA on queries and values, of one head: the whole chain against autograd through softmax."""
    x, wq, wk, wv = (0.5 * drawn(i, *shape) for i, shape in enumerate([(20, 6), (4, 6), (4, 6), (4, 6)]))
    aq, bq, av, bv = (0.5 * drawn(10 + i, *shape) for i, shape in enumerate([(2, 6), (4, 2), (2, 6), (4, 2)]))
    leaves = [t.clone().requires_grad_() for t in (aq, bq, av, bv)]
    q = x @ (wq + 0.5 * leaves[1] @ leaves[0]).T
    v = x @ (wv + 0.5 * leaves[3] @ leaves[2]).T
    k, target = x @ wk.T, drawn(20, 20, 4)
    output = F.softmax(q @ k.T / 2, -1) @ v
    expected = torch.autograd.grad((output - target).square().sum() / 2, leaves)
    degree = 12
    grad = attention(q, k, v, degree).detach() - target
    dq, _, dv = chained_gradients(q.detach(), k, v.detach(), grad, degree)
    found = *lora_gradients(x, aq, bq, 0.5, dq), *lora_gradients(x, av, bv, 0.5, dv)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class Projections(nn.Module):
    """What attention begins with, and a sum of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 6) for _ in range(3))

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[n, tokens, 4] -> [n, 6]."""
        return (self.q_proj(inputs) * self.k_proj(inputs) + self.v_proj(inputs)).mean(1)


def at(inputs: object, count: int) -> Now:
    now = Now(batch=Batch.of(inputs, torch.zeros(count)))
    now.call = lambda model, given: model(**given) if isinstance(given, dict) else model(given)
    now.calibration = lambda batches: iter([now.batch])
    return now


def test_norms_are_the_largest_entries() -> None:
    model, x = Projections(), drawn(0, 3, 9, 4).float()
    figures = EfficiencyThreshold().measure(model, at(x, 3))
    norms = [float(layer(x).detach().abs().max()) for layer in (model.q_proj, model.k_proj, model.v_proj)]
    assert figures["norm"] == pytest.approx(max(norms))
    assert figures["threshold"] == pytest.approx(math.sqrt(math.log(9)))
    assert figures["norm / threshold"] == pytest.approx(max(norms) / math.sqrt(math.log(9)))
    assert figures["part below"] == pytest.approx(sum(n < math.sqrt(math.log(9)) for n in norms) / 3)
    assert figures["adapter norm"] == 0.0


def test_hidden_tokens_do_not_count() -> None:
    model, x = Projections(), drawn(0, 2, 9, 4).float()
    mask = torch.ones(2, 9)
    mask[:, 5:] = 0
    far = x.clone()
    far[:, 5:] *= 1000
    figures = [EfficiencyThreshold().measure(model, at({"inputs": t, "attention_mask": mask}, 2)) for t in (x, far)]
    assert figures[0] == figures[1]
    assert figures[0]["threshold"] == pytest.approx(math.sqrt(math.log(5)))


def test_adapters_are_part_of_the_norm() -> None:
    model, x = Projections(), drawn(0, 3, 9, 4).float()
    LoRA(rank=2, where="q_proj|v_proj").parametrize(model)
    for name, p in model.named_parameters():
        if name.endswith("lora.B"):
            nn.init.normal_(p, std=2.0)
    found = EfficiencyThreshold().measure(model, at(x, 3))
    largest = 0.0
    for layer in (model.q_proj, model.v_proj):
        low = layer.plait.lora
        largest = max(largest, float((low.scale * x @ low.A.T @ low.B.T).abs().max().detach()))
    assert found["adapter norm"] == pytest.approx(largest, rel=1e-5)
    assert found["norm"] == pytest.approx(max(float(m(x).abs().max().detach()) for m in (model.q_proj, model.v_proj)))


def test_a_model_without_projections_is_refused() -> None:
    with pytest.raises(BadInput, match="EfficiencyThreshold"):
        train(nn.Linear(4, 2), (torch.zeros(4, 4), torch.zeros(4, 2)), methods=[EfficiencyThreshold()], steps=1)
