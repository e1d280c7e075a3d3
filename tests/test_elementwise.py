"""Rules that step an element, a row or all weights together, against their papers' equations written slowly in numpy.

The same fifty steps as other implementations take stand in test_golden.py, properties in test_rule_properties.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plait.math.update_rule import Whole, perpendicular_rows
from plait.step.adagrad import AdaGrad, AdaGradNorm
from plait.step.adam import AdamW
from plait.step.base import Rule
from plait.step.difference import MARS, Adan
from plait.step.factored import Adafactor
from plait.step.friction import DiffGrad
from plait.step.normalized import ADOPT, LaProp
from plait.step.scale_invariant import SGDP, AdamP
from plait.step.signed import NormalizedSGD, SignSGD
from plait.step.together import Together

SHAPES = [(4, 3), (3, 2, 2, 2), (5,), ()]
Weights = list[np.ndarray]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs((a * b).sum()) / (np.linalg.norm(a) * np.linalg.norm(b)))


def tangent(w: np.ndarray, g: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, float]:
    """Heo et al.'s projection and the factor of the decay, row by row, then for the whole weight."""
    if w.ndim < 2:
        return p, 1.0
    if all(cosine(a, b) < 0.1 / np.sqrt(a.size) for a, b in zip(w, g, strict=True)):
        rows = [q - (a * q).sum() / (a * a).sum() * a for a, q in zip(w, p, strict=True)]
        return np.stack(rows), 0.1
    if cosine(w, g) < 0.1 / np.sqrt(w.size):
        return p - (w * p).sum() / (w * w).sum() * w, 0.1
    return p, 1.0


def oracle_adamp(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    m, v = [np.zeros_like(w) for w in ws], [np.zeros_like(w) for w in ws]
    for t, step in enumerate(gs, 1):
        for i, g in enumerate(step):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            p = m[i] / (1 - 0.9**t) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
            q, ratio = tangent(ws[i], g, p)
            ws[i] = ws[i] - lr * (q + ratio * decay * ws[i])
    return ws


def oracle_sgdp(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    m = [np.zeros_like(w) for w in ws]
    for step in gs:
        for i, g in enumerate(step):
            m[i] = 0.9 * m[i] + g
            q, ratio = tangent(ws[i], g, m[i])
            ws[i] = ws[i] - lr * (q + ratio * decay / 0.1 * ws[i])
    return ws


def oracle_diffgrad(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    m, v, last = ([np.zeros_like(w) for w in ws] for _ in range(3))
    for t, step in enumerate(gs, 1):
        for i, given in enumerate(step):
            g = given + decay * ws[i]
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            friction = 1 / (1 + np.exp(-abs(last[i] - g)))
            last[i] = g
            ws[i] = ws[i] - lr * friction * m[i] / (1 - 0.9**t) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
    return ws


def oracle_adagrad(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    s = [np.zeros_like(w) for w in ws]
    for step in gs:
        for i, given in enumerate(step):
            g = given + decay * ws[i]
            s[i] = s[i] + g**2
            ws[i] = ws[i] - lr * g / (np.sqrt(s[i]) + 1e-10)
    return ws


def oracle_adagrad_norm(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    b = 0.1**2
    for step in gs:
        b += sum((g**2).sum() for g in step)
        ws = [w - lr * (g / np.sqrt(b) + decay * w) for w, g in zip(ws, step, strict=True)]
    return ws


def oracle_signsgd(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    m = [np.zeros_like(w) for w in ws]
    for step in gs:
        m = [0.9 * old + 0.1 * g for old, g in zip(m, step, strict=True)]
        ws = [w - lr * (np.sign(new) + decay * w) for w, new in zip(ws, m, strict=True)]
    return ws


def oracle_normalized_sgd(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    m = [np.zeros_like(w) for w in ws]
    for step in gs:
        m = [0.9 * old + 0.1 * g for old, g in zip(m, step, strict=True)]
        length = np.sqrt(sum((new**2).sum() for new in m))
        ws = [w - lr * (new / length + decay * w) for w, new in zip(ws, m, strict=True)]
    return ws


def oracle_adafactor(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    """Algorithms 4 and 5, sums of rows and columns as the paper has them, each image of a kernel factored alone."""
    rows, columns = [0.0] * len(ws), [0.0] * len(ws)
    for t, step in enumerate(gs, 1):
        kept = 1 - t**-0.8
        for i, g in enumerate(step):
            squares = g**2 + 1e-30
            if g.ndim > 1:
                rows[i] = kept * rows[i] + (1 - kept) * squares.sum(-1)
                columns[i] = kept * columns[i] + (1 - kept) * squares.sum(-2)
                v = rows[i][..., :, None] * columns[i][..., None, :] / rows[i].sum(-1)[..., None, None]
            else:
                v = rows[i] = kept * rows[i] + (1 - kept) * squares
            u = g / np.sqrt(v)
            u = u / max(1.0, np.sqrt((u**2).mean()))
            rate = max(1e-3, np.sqrt((ws[i] ** 2).mean())) * min(lr, 1 / np.sqrt(t))
            ws[i] = ws[i] - lr * decay * ws[i] - rate * u
    return ws


def oracle_laprop(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    m, v = [np.zeros_like(w) for w in ws], [np.zeros_like(w) for w in ws]
    for t, step in enumerate(gs, 1):
        for i, g in enumerate(step):
            v[i] = 0.999 * v[i] + 0.001 * g**2
            m[i] = 0.9 * m[i] + 0.1 * g / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-15)
            ws[i] = ws[i] - lr * (m[i] / (1 - 0.9**t) + decay * ws[i])
    return ws


def oracle_adopt(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    """The final version's algorithm as it is printed: v_0 = g_0^2, m_0 = 0, then t = 1, 2, ..."""
    m, v = [np.zeros_like(w) for w in ws], [g**2 for g in gs[0]]
    for t, step in enumerate(gs[1:], 1):
        for i, g in enumerate(step):
            m[i] = 0.9 * m[i] + 0.1 * np.clip(g / np.maximum(np.sqrt(v[i]), 1e-6), -(t**0.25), t**0.25)
            ws[i] = ws[i] - lr * (m[i] + decay * ws[i])
            v[i] = 0.9999 * v[i] + 0.0001 * g**2
    return ws


def oracle_adan(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    """Means that start at zero and are divided by what has been given out of their weight."""
    m, v, n = ([np.zeros_like(w) for w in ws] for _ in range(3))
    last = gs[0]
    for t, step in enumerate(gs, 1):
        for i, g in enumerate(step):
            change = g - last[i]
            m[i], v[i] = 0.98 * m[i] + 0.02 * g, 0.92 * v[i] + 0.08 * change
            n[i] = 0.99 * n[i] + 0.01 * (g + 0.92 * change) ** 2
            ahead = m[i] / (1 - 0.98**t) + 0.92 * v[i] / (1 - 0.92**t)
            ws[i] = (ws[i] - lr * ahead / (np.sqrt(n[i] / (1 - 0.99**t)) + 1e-8)) / (1 + lr * decay)
        last = step
    return ws


def oracle_mars(ws: Weights, gs: list[Weights], lr: float, decay: float) -> Weights:
    m, v = [np.zeros_like(w) for w in ws], [np.zeros_like(w) for w in ws]
    last = gs[0]
    for t, step in enumerate(gs, 1):
        for i, g in enumerate(step):
            c = g + 0.025 * 0.95 / 0.05 * (g - last[i])
            c = c / np.linalg.norm(c) if np.linalg.norm(c) > 1 else c
            m[i], v[i] = 0.95 * m[i] + 0.05 * c, 0.99 * v[i] + 0.01 * c**2
            found = m[i] / (1 - 0.95**t) / (np.sqrt(v[i] / (1 - 0.99**t)) + 1e-8)
            ws[i] = ws[i] - lr * (found + decay * ws[i])
        last = step
    return ws


ORACLES: dict[type[Rule], Callable[..., Weights]] = {
    AdamP: oracle_adamp,
    SGDP: oracle_sgdp,
    DiffGrad: oracle_diffgrad,
    LaProp: oracle_laprop,
    ADOPT: oracle_adopt,
    Adan: oracle_adan,
    MARS: oracle_mars,
    AdaGrad: oracle_adagrad,
    AdaGradNorm: oracle_adagrad_norm,
    SignSGD: oracle_signsgd,
    NormalizedSGD: oracle_normalized_sgd,
    Adafactor: oracle_adafactor,
}


def drawn(seed: int, steps: int = 12) -> tuple[Weights, list[Weights]]:
    """Weights, and gradients some of which are orthogonal to where the weights start: in rows, or only as a whole."""
    draw = np.random.default_rng(seed)
    ws = [draw.normal(size=shape) for shape in SHAPES]
    gs = [[np.asarray(draw.normal(size=shape)) for shape in SHAPES] for _ in range(steps)]
    for step in gs[::2]:
        step[0] -= (step[0] * ws[0]).sum(1, keepdims=True) / (ws[0] ** 2).sum(1, keepdims=True) * ws[0]
        step[1] -= (step[1] * ws[1]).sum() / (ws[1] ** 2).sum() * ws[1]
    return ws, gs


@pytest.mark.parametrize("rule", ORACLES)
@pytest.mark.parametrize("grouped", [False, True])
def test_follows_the_papers_equations(rule: type[Rule], grouped: bool) -> None:
    """Also where the weights stand in two groups, which rules that take them together must not notice."""
    ws, gs = drawn(0)
    weights = [nn.Parameter(torch.tensor(w)) for w in ws]
    groups = [{"params": weights[:1]}, {"params": weights[1:]}] if grouped else weights
    optimizer = rule(groups, lr=0.02, weight_decay=0.1)
    for step in gs:
        for p, g in zip(weights, step, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    for p, expected in zip(weights, ORACLES[rule](ws, gs, 0.02, 0.1), strict=True):
        assert np.allclose(p.detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_nesterov_looks_ahead() -> None:
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    rule = SGDP([w], lr=1.0, momentum=0.5, nesterov=True)
    for _ in range(2):
        w.grad = torch.ones(1, dtype=torch.float64)
        rule.step()
    assert float(w.detach()) == -(1 + 0.5) - (1 + 0.5 * 1.5)


# -- what each is for
# -------------------------------------------------------------------------------------------------------
def lengths(rule: type[Rule], **fields: Any) -> tuple[float, float]:
    """The length of a weight that only its direction matters of, before and after 100 steps on a target."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, 8, dtype=torch.float64))
    before, target = float(w.detach().norm()), torch.nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64))
    optimizer = rule([w], **fields)
    for _ in range(100):
        optimizer.zero_grad()
        (torch.nn.functional.normalize(w) * target).sum().neg().backward()
        optimizer.step()
    return before, float(w.detach().norm())


@pytest.mark.parametrize(("rule", "lr"), [(SGDP, 0.1), (AdamP, 0.02)])
def test_a_weight_whose_scale_means_nothing_keeps_its_length(rule: type[Rule], lr: float) -> None:
    """But for lr^2 ||q||^2 a step, which is what moving along a tangent costs; without the projection it grows more."""
    before, after = lengths(rule, lr=lr)
    _, plainly = lengths(rule, lr=lr, delta=0.0)
    assert after < 1.2 * before
    assert plainly - before > 1.5 * (after - before)


def tangent_rows(weight: Tensor, gradient: Tensor, delta: float = 0.1) -> int:
    return perpendicular_rows(AdamP.rule(), weight, gradient, {"delta": delta}, Whole(weight.shape[1:].numel()))


def test_rows_are_tried_before_the_whole() -> None:
    w = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert tangent_rows(w, torch.tensor([[0.0, 1.0], [1.0, 0.0]])) == 2
    assert tangent_rows(w, torch.tensor([[2.0, 1.0], [1.0, -1.0]])) == 1  # <w, g> is 0 for the whole only
    assert tangent_rows(w, w) == 0
    assert tangent_rows(w, torch.zeros(2, 2)) == 2
    assert tangent_rows(w, torch.zeros(2, 2), delta=0.0) == 0


def test_friction_halves_the_step_where_the_gradient_stays() -> None:
    w = nn.Parameter(torch.zeros(2))
    rule = DiffGrad([w], lr=1.0)
    for _ in range(2):
        before = w.detach().clone()
        w.grad = torch.tensor([20.0, 0.0])
        rule.step()
    assert torch.allclose(w.detach() - before, torch.tensor([-0.5, 0.0]), atol=1e-5)


# -- normalized before they enter the mean
# ----------------------------------------------------------------------------------
def longest(rule: type[Rule], gradients: list[float], **fields: Any) -> float:
    """The longest step of a weight along these gradients, lr = 1."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer, steps = rule([w], lr=1.0, **fields), []
    for g in gradients:
        before = float(w.detach())
        w.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        steps.append(abs(float(w.detach()) - before))
    return max(steps)


def test_no_step_of_laprop_exceeds_its_bound_whatever_the_betas() -> None:
    """A gradient a million times the later ones: Adam's mean remembers it longer than the square it is divided by."""
    gradients = [1.0] * 5 + [1e6] + [1.0] * 200
    fields: dict[str, Any] = {"betas": (0.99, 0.5), "weight_decay": 0.0}
    assert longest(LaProp, gradients, **fields) <= 1 / math.sqrt(1 - 0.5)
    assert longest(AdamW, gradients, **fields) > 1000


def test_laprop_without_a_mean_of_squares_is_the_mean_of_signs() -> None:
    draw, w = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(5, dtype=torch.float64))
    rule, mean = LaProp([w], lr=0.1, betas=(0.9, 0.0)), torch.zeros(5, dtype=torch.float64)
    for t in range(1, 6):
        w.grad = torch.randn(5, generator=draw, dtype=torch.float64)
        mean, before = 0.9 * mean + 0.1 * w.grad.sign(), w.detach().clone()
        rule.step()
        assert torch.allclose(w.detach() - before, -0.1 * mean / (1 - 0.9**t))


@pytest.mark.parametrize("clipped", [True, False])
def test_adopt_moves_nothing_at_first_and_is_held_to_a_growing_bound_after(clipped: bool) -> None:
    w = nn.Parameter(torch.ones(1))
    rule = ADOPT([w], lr=1.0, betas=(0.0, 0.5), clipped=clipped, weight_decay=0.1)
    for t, found in ((0, 0.0), (1, 2.0), (16, 1.5)):
        rule.state[w].update(step=t, exp_avg=torch.zeros(1), exp_avg_sq=torch.ones(1))
        w.grad = torch.full((1,), found or 3.0)
        before = float(w.detach())
        rule.step()
        step = 0.1 * before + (min(found, t**0.25) if clipped else found) if t else 0.0
        assert before - float(w.detach()) == pytest.approx(step)
        assert float(rule.state[w]["exp_avg_sq"]) == pytest.approx(0.5 + 0.5 * found**2 if t else 9.0)


# -- the change of the gradient
# ---------------------------------------------------------------------------------------------
def test_adan_starts_at_the_first_gradient_where_one_asks_for_the_algorithm_as_printed() -> None:
    """m_0 = g_0, v_0 = 0, v_1 = g_1 - g_0, n_0 = g_0^2, and no corrections."""
    ws, gs = drawn(1)
    weights = [nn.Parameter(torch.tensor(w)) for w in ws]
    optimizer = Adan(weights, lr=0.02, weight_decay=0.1, corrected=False)
    m, v, n = gs[0], [0 * g for g in gs[0]], [g**2 for g in gs[0]]
    for k, step in enumerate(gs):
        for p, g in zip(weights, step, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        if k > 0:
            change = [g - last for g, last in zip(step, gs[k - 1], strict=True)]
            m = [0.98 * a + 0.02 * g for a, g in zip(m, step, strict=True)]
            v = change if k == 1 else [0.92 * a + 0.08 * d for a, d in zip(v, change, strict=True)]
            n = [0.99 * a + 0.01 * (g + 0.92 * d) ** 2 for a, g, d in zip(n, step, change, strict=True)]
        for i in range(len(ws)):
            ws[i] = (ws[i] - 0.02 * (m[i] + 0.92 * v[i]) / (np.sqrt(n[i]) + 1e-8)) / (1 + 0.02 * 0.1)
    for p, expected in zip(weights, ws, strict=True):
        assert np.allclose(p.detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_adan_is_adam_where_the_change_counts_for_nothing() -> None:
    ws, gs = drawn(2)
    found = []
    for rule, fields in ((Adan, {"betas": (0.9, 0.0, 0.999)}), (AdamW, {})):
        weights = [nn.Parameter(torch.tensor(w)) for w in ws]
        optimizer = rule(weights, lr=0.02, weight_decay=0.0, **fields)
        for step in gs:
            for p, g in zip(weights, step, strict=True):
                p.grad = torch.tensor(g)
            optimizer.step()
        found.append(weights)
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_mars_without_gamma_is_adamw_on_clipped_gradients(size: float) -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(6, 5, generator=draw)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mars, adamw = MARS([one], lr=0.02, gamma=0.0), AdamW([other], lr=0.02, betas=(0.95, 0.99), weight_decay=0.0)
    for _ in range(5):
        one.grad = size * torch.rand(1, generator=draw) * torch.randn(6, 5, generator=draw)
        other.grad = one.grad / one.grad.norm().clamp(min=1.0)
        mars.step()
        adamw.step()
    assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_of_the_whole_tensor_however_it_is_kept(states: str, dtype: torch.dtype) -> None:
    """Of more than one block of the kernel, and of rows that fill no block."""
    draw = torch.Generator().manual_seed(0)
    ends = []
    for fused in (True, False):
        w = nn.Parameter(torch.zeros(70, 300, dtype=dtype))
        rule = MARS([w], lr=0.02, gamma=0.5, states=states)
        rule.fused = fused
        draw.manual_seed(0)
        for size in (1.0, 1e-4, 3.0):
            w.grad = (size * torch.randn(70, 300, generator=draw)).to(dtype)
            rule.step()
        assert rule.fused == fused
        ends.append(w.detach().float())
    differ = (ends[0] - ends[1]).abs() > 2e-5 + (2**-7 * ends[1].abs() if dtype == torch.bfloat16 else 0)
    assert float(differ.float().mean()) <= 2e-3


def test_adafactor_keeps_a_row_and_a_column() -> None:
    weights = [nn.Parameter(torch.ones(30, 20)), nn.Parameter(torch.ones(4, 3, 5, 5)), nn.Parameter(torch.ones(7))]
    rule = Adafactor(weights)
    for p in weights:
        p.grad = torch.ones_like(p)
    rule.step()
    sizes = [sum(t.numel() for t in rule.state[p].values() if isinstance(t, Tensor)) for p in weights]
    assert sizes == [30 + 20, 4 * 3 * (5 + 5), 7]


def test_adafactor_takes_a_rate_of_ones_own() -> None:
    w = nn.Parameter(torch.full((3, 2), 100.0))
    rule = Adafactor([w], lr=0.5, relative=False)
    w.grad = torch.ones(3, 2)
    rule.step()
    assert torch.allclose(w.detach(), torch.full((3, 2), 99.5))


# -- rules that look at all weights together
# --------------------------------------------------------------------------------
TOGETHER: list[type[Together]] = [NormalizedSGD, AdaGradNorm]


@pytest.mark.parametrize("rule", TOGETHER)
def test_how_a_vector_is_cut_into_weights_changes_nothing(rule: type[Together]) -> None:
    draw = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(10, generator=draw), torch.randn(5, 10, generator=draw)
    found = []
    for cuts in ([10], [3, 7], [1, 2, 3, 4]):
        weights = [nn.Parameter(part.clone()) for part in start.split(cuts)]
        optimizer = rule(weights, lr=0.1)
        for g in gradients:
            for p, part in zip(weights, g.split(cuts), strict=True):
                p.grad = part.clone()
            optimizer.step()
        found.append(torch.cat([p.detach() for p in weights]))
    assert torch.allclose(found[0], found[1], rtol=1e-6)
    assert torch.allclose(found[0], found[2], rtol=1e-6)


@pytest.mark.parametrize("rule", TOGETHER)
def test_the_length_goes_on_from_a_saved_state(rule: type[Together]) -> None:
    """States are keyed by name: the weights may stand in another order."""
    draw = torch.Generator().manual_seed(0)
    start = {name: torch.randn(4, generator=draw) for name in "abc"}
    gradients = [{name: torch.randn(4, generator=draw) for name in "abc"} for _ in range(6)]

    def steps(optimizer: Any, weights: dict[str, nn.Parameter], which: list[dict[str, Tensor]]) -> None:
        for step in which:
            for name, p in weights.items():
                p.grad = step[name].clone() if name != "b" or step is not gradients[1] else None
            optimizer.step()

    whole = {name: nn.Parameter(t.clone()) for name, t in start.items()}
    through = rule(whole.items(), lr=0.1)
    steps(through, whole, gradients)
    first = {name: nn.Parameter(t.clone()) for name, t in start.items()}
    before = rule(first.items(), lr=0.1)
    steps(before, first, gradients[:3])
    second = {name: nn.Parameter(first[name].detach().clone()) for name in "cab"}
    after = rule(second.items(), lr=0.1)
    after.load_state_dict(before.state_dict())
    steps(after, second, gradients[3:])
    assert all(torch.equal(whole[name], second[name]) for name in "abc")


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_normalized_step_has_its_length_however_the_mean_is_kept(kept: str, fused: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(64, 80, generator=draw)), nn.Parameter(torch.randn(7, generator=draw))]
    rule = NormalizedSGD(weights, lr=0.5, states=kept)
    rule.fused = fused
    for _ in range(4):
        before = [p.detach().clone() for p in weights]
        for p in weights:
            p.grad = torch.randn(p.shape, generator=draw)
        rule.step()
        moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(weights, before, strict=True)])
        assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)


def test_a_closure_is_called_once_and_before_the_gradients_are_read() -> None:
    w = nn.Parameter(torch.tensor([3.0]))
    rule, calls = NormalizedSGD([w], lr=0.5), []

    def closure() -> Tensor:
        calls.append(0)
        rule.zero_grad()
        value = w.square().sum()
        value.backward()
        return value

    assert float(rule.step(closure).detach()) == 9.0
    assert len(calls) == 1
    assert float(w.detach()) == 2.5
