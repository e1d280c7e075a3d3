"""Muon: against its equations, torch's and the exact polar factor; the symmetric products that it is made of."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.math.orthogonal import QUINTIC, newton_schulz, polar_factor, symmetric_product
from plait.step.adam import AdamW
from plait.step.orthogonal import Muon


def quintic(m: np.ndarray, iterations: int = 5) -> np.ndarray:
    """Jordan et al.'s iteration, word for word, on X itself."""
    a, b, c = QUINTIC
    x = m / max(np.linalg.norm(m), 1e-7)
    for _ in range(iterations):
        g = x @ x.T
        x = a * x + (b * g + c * g @ g) @ x
    return x


def falling(rows: int, columns: int, power: float, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall as 1 / k^power."""
    draw = torch.Generator().manual_seed(seed)
    u, s, vh = torch.linalg.svd(torch.randn(rows, columns, generator=draw, dtype=torch.float64), full_matrices=False)
    return (u * torch.arange(1, len(s) + 1) ** -power) @ vh


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (300, 310), (300, 420), (420, 257)])
@pytest.mark.parametrize("iterations", [1, 2, 4, 5, 9])
def test_newton_schulz_follows_the_iteration(shape: tuple[int, int], iterations: int) -> None:
    matrix = falling(*shape, power=0.7)
    expected = torch.tensor(quintic(matrix.numpy(), iterations))
    assert torch.allclose(newton_schulz(matrix, iterations), expected, atol=1e-10)
    single = newton_schulz(matrix.float(), iterations, dtype=torch.float32)
    assert float((single - expected).norm()) < 1e-3 * float(expected.norm())


def test_newton_schulz_of_a_batch_is_that_of_each() -> None:
    batch = torch.stack([falling(6, 11, 0.5, seed) for seed in range(4)])
    assert torch.allclose(newton_schulz(batch), torch.stack([newton_schulz(m) for m in batch]), atol=1e-12)
    assert torch.equal(newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4, dtype=newton_schulz(torch.ones(1, 1)).dtype))


@pytest.mark.parametrize("size", [1e-37, 1e-22, 1e18, 1e25, 1e37])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_scale_of_a_matrix_changes_nothing_in_all_of_float32(size: float, batch: tuple[int, ...]) -> None:
    matrix = torch.randn(*batch, 5, 7, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(size * matrix, dtype=torch.float32)
    assert torch.allclose(found, newton_schulz(matrix, dtype=torch.float32), atol=1e-5)
    matrix[0] = 0.0  # a row, or one matrix of the batch
    assert torch.isfinite(newton_schulz(size * matrix)).all()
    assert (newton_schulz(0 * matrix) == 0).all()
    assert newton_schulz(torch.zeros(*batch, 0, 7)).numel() == 0


@pytest.mark.parametrize("rows", [7, 256, 301])
def test_symmetric_products_are_plain_products(rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, 40, generator=draw, dtype=torch.float64)
    gram = x @ x.mT
    assert torch.allclose(symmetric_product(x, x.mT), gram)
    made = symmetric_product(gram, gram, gram, -2.0, 0.5)
    assert torch.allclose(made, 0.5 * gram @ gram - 2.0 * gram)


@pytest.mark.parametrize("shape", [(256, 256), (64, 192), (320, 128), (128, 320)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.5])
def test_sixteen_bits_are_as_near_to_the_equations_as_torchs(shape: tuple[int, int], power: float) -> None:
    """Both round to bfloat16 after every product; ours is within 2 % of float64, or 1.5 times torch's distance."""
    matrix = falling(*shape, power=power)
    exact = torch.tensor(quintic(matrix.numpy()))
    p = nn.Parameter(torch.zeros(shape))
    p.grad = matrix.float()
    torch.optim.Muon([p], lr=1 / max(1, shape[0] / shape[1]) ** 0.5, weight_decay=0.0).step()
    ours = newton_schulz(matrix.float(), dtype=torch.bfloat16).double()
    error, theirs = float((ours - exact).norm()), float((-p.detach().double() - exact).norm())
    assert error < max(1.5 * theirs, 0.02 * float(exact.norm()))


def oracle(w: np.ndarray, gs: list[np.ndarray], fields: dict[str, Any]) -> np.ndarray:
    """The equations in float64, on arrays; a kernel is a matrix [out, in * kernel]."""
    m, shape = np.zeros_like(w), w.shape
    rows, columns = shape[0], math.prod(shape[1:])
    s = {"shape": max(1, rows / columns) ** 0.5, "rms": 0.2 * max(rows, columns) ** 0.5, "none": 1.0}
    for g in gs:
        m = 0.95 * m + 0.05 * g
        ahead = (0.05 * g + 0.95 * m if fields.get("nesterov", True) else m).reshape(rows, columns)
        if fields.get("iterations", 5):
            step = quintic(ahead)
        else:
            u, _, vh = np.linalg.svd(ahead, full_matrices=False)
            step = u @ vh
        w = (1 - 0.02 * 0.1) * w - 0.02 * s[fields.get("scale", "shape")] * step.reshape(shape)
    return w


FIELDS: list[dict[str, Any]] = [{}, {"nesterov": False}, {"scale": "rms"}, {"scale": "none"}, {"iterations": 0}]


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (8, 2, 3, 1)])
@pytest.mark.parametrize("fields", FIELDS)
def test_follows_the_papers_equations(shape: tuple[int, ...], fields: dict[str, Any]) -> None:
    draw = np.random.default_rng(0)
    w, gradients = draw.normal(size=shape), list(draw.normal(size=(10, *shape)))
    p = nn.Parameter(torch.tensor(w))
    rule = Muon([p], lr=0.02, weight_decay=0.1, **fields)
    for g in gradients:
        p.grad = torch.tensor(g)
        rule.step()
    assert np.allclose(p.detach().numpy(), oracle(w, gradients, fields), atol=1e-9)


@pytest.mark.parametrize(("theirs", "ours"), [("original", "shape"), ("match_rms_adamw", "rms")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_torchs_to_sixteen_bits(theirs: str, ours: str, nesterov: bool) -> None:
    """Ten steps; torch rounds each to bfloat16, so a step may differ by 3 % of its length."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(40, 24, generator=draw)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    same: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    mine, torchs = Muon([one], scale=ours, **same), torch.optim.Muon([other], adjust_lr_fn=theirs, **same)
    for _ in range(10):
        one.grad = torch.randn(40, 24, generator=draw)
        other.grad = one.grad.clone()
        mine.step()
        torchs.step()
    apart, moved = float((one - other).detach().norm()), float((other.detach() - start).norm())
    assert apart < 0.03 * moved


def test_a_step_is_the_best_one_in_its_trust_region() -> None:
    """<m, d> is least, over matrices of spectral norm 1, at -U V^T, where it is minus the sum of singular values."""
    gradient = falling(6, 9, 0.8)
    p = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    p.grad = gradient.clone()
    Muon([p], lr=1.0, iterations=0, weight_decay=0.0).step()
    step = p.detach()
    assert float(torch.linalg.matrix_norm(step, 2)) == pytest.approx(1.0)
    assert float((step * gradient).sum()) == pytest.approx(-float(torch.linalg.svdvals(gradient).sum()))


def test_the_polar_factor_leaves_out_what_is_zero() -> None:
    low = falling(6, 9, 0.5)[:, :1] @ torch.ones(1, 9, dtype=torch.float64)
    assert torch.linalg.svdvals(polar_factor(low)).round(decimals=9).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert torch.equal(polar_factor(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_what_is_no_matrix_is_stepped_by_adamw() -> None:
    draw = torch.Generator().manual_seed(0)
    start = {name: torch.randn(5, 5, generator=draw) for name in ("body.weight", "head.weight")}
    start["body.bias"] = torch.randn(5, generator=draw)
    mine = {name: nn.Parameter(t.clone()) for name, t in start.items()}
    plain = {name: nn.Parameter(t.clone()) for name, t in start.items()}
    rule = Muon(mine.items(), lr=0.02, others=0.5, where="body.weight", weight_decay=0.1)
    adamw = AdamW(plain.values(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        for name in start:
            mine[name].grad = torch.randn(start[name].shape, generator=draw)
            plain[name].grad = mine[name].grad.clone()
        rule.step()
        adamw.step()
    assert torch.equal(mine["head.weight"], plain["head.weight"])
    assert torch.equal(mine["body.bias"], plain["body.bias"])
    assert not torch.allclose(mine["body.weight"], plain["body.weight"])
    assert set(rule.state[mine["body.weight"]]) == {"step", "momentum_buffer"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_is_bitwise_uninterrupted(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(6, 9, generator=draw).to(dtype)
    gradients = [torch.randn(6, 9, generator=draw).to(dtype) for _ in range(6)]

    def go(w: nn.Parameter, rule: torch.optim.Optimizer, some: list[Tensor]) -> None:
        for g in some:
            w.grad = g.clone()
            before = w.grad.clone()
            rule.step()
            assert torch.equal(w.grad, before)

    whole, half = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    go(whole, Muon([whole]), gradients)
    rule = Muon([half])
    go(half, rule, gradients[:3])
    held = io.BytesIO()
    torch.save(rule.state_dict(), held)
    held.seek(0)
    again = Muon([half])
    again.load_state_dict(torch.load(held, weights_only=True))
    go(half, again, gradients[3:])
    assert torch.equal(whole, half)
    assert again.state[half]["momentum_buffer"].dtype == torch.float32


def test_maximize_is_minimizing_the_negative() -> None:
    ends = []
    for up in (False, True):
        w = nn.Parameter(torch.linspace(-1, 1, 36).reshape(6, 6))
        rule = Muon([w], maximize=up)
        for _ in range(3):
            w.grad = torch.sin(w.detach() * 5) * (-1 if up else 1)
            rule.step()
        ends.append(w.detach())
    assert torch.equal(*ends)


def test_solves_a_matrix_quadratic() -> None:
    target = falling(8, 12, 0.0).float() * 3
    w = nn.Parameter(torch.zeros(8, 12))
    rule = Muon([w], lr=0.2, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(rule, 200)
    for _ in range(200):
        rule.zero_grad()
        (0.5 * (w - target).square().sum()).backward()
        rule.step()
        scheduler.step()
    assert float((w - target).detach().norm()) < 0.02 * float(target.norm())


def test_refuses_in_one_sentence() -> None:
    with pytest.raises(BadInput, match=r"^Muon.scale be 'shape', 'rms' or 'none'|^Muon.scale must be"):
        Muon(scale="original")
    with pytest.raises(BadInput, match="matches no trained weight"):
        Muon(nn.Linear(2, 2).named_parameters(), where="wieght")
