"""DCT-Adam, Natural GaLore and GradNormLoRP, against their equations with every matrix formed; states in fewer bits."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plait.step.base import Rule
from plait.step.dct import DCTAdam
from plait.step.low_rank import Fira, GaLore
from plait.step.natural import NaturalGaLore
from plait.step.orthogonal import Muon
from plait.step.weight_normalized import GradNormLoRP

RULES: list[type[Rule]] = [DCTAdam, NaturalGaLore, GradNormLoRP]
SHAPES = [(4, 7), (7, 4), (5, 5)]


def lying(x: np.ndarray) -> np.ndarray:
    return x.T if x.shape[0] > x.shape[1] else x


def leading(g: np.ndarray, rank: int) -> np.ndarray:
    """The leading left singular vectors, each with the sign that makes its row's largest entry positive."""
    u = np.linalg.svd(g, full_matrices=False)[0][:, :rank]
    rows = u.T @ g
    return u * np.sign(rows[np.arange(rank), np.abs(rows).argmax(1)])


class Adam:
    """The means of Adam, and the quotient with the correction that all rules here share."""

    def __init__(self, eps: float) -> None:
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.eps, self.t = eps, 0

    def step(self, g: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
        correction = np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        return correction * self.m / (np.sqrt(self.v) + self.eps)


def run(rule: type[Rule], w: np.ndarray, gradients: list[np.ndarray], **fields: Any) -> np.ndarray:
    p = nn.Parameter(torch.tensor(w))
    optimizer = rule([p], **fields)
    for g in gradients:
        p.grad = torch.tensor(g)
        optimizer.step()
    return p.detach().numpy()


def drawn(shape: tuple[int, int], steps: int = 11) -> tuple[np.ndarray, list[np.ndarray]]:
    draw = np.random.default_rng(1)
    return draw.normal(size=shape), list(draw.normal(size=(steps, *shape)))


def oracle_dct(w: np.ndarray, gs: list[np.ndarray], period: int, feedback: bool) -> np.ndarray:
    """The basis written out, the means turned by the product of the two bases."""
    size = len(w)
    k, i = np.meshgrid(np.arange(size), np.arange(size))
    D = np.sqrt(2 / size) * np.cos(np.pi * (2 * i + 1) * k / (2 * size))
    D[:, 0] /= np.sqrt(2)
    adam, E, basis = Adam(1e-8), np.zeros_like(w), None
    for t, g in enumerate(gs):
        g = g + E
        if t % period == 0:
            before = basis
            basis = D[:, np.argsort(-np.linalg.norm(D.T @ g, axis=1))[:2]]
            if before is not None:
                turn = basis.T @ before
                adam.m, adam.v = turn @ adam.m, np.abs(turn @ adam.v)
        inside = basis.T @ g
        if feedback:
            E = g - basis @ inside
        w = w - 0.02 * (basis @ adam.step(inside)) - 0.02 * 0.1 * w
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("feedback", [False, True])
def test_dct_adam_follows_its_equations(shape: tuple[int, int], period: int, feedback: bool) -> None:
    w, gs = drawn(shape)
    found = run(DCTAdam, w, gs, lr=0.02, rank=2, period=period, feedback=feedback, weight_decay=0.1)
    assert np.allclose(lying(found), oracle_dct(lying(w), [lying(g) for g in gs], period, feedback), atol=1e-9)


def oracle_natural(w: np.ndarray, gs: list[np.ndarray], history: int, damping: float) -> np.ndarray:
    """The Fisher matrix of the subspace formed and solved."""
    adam, seen = Adam(1e-6), []
    for t, g in enumerate(gs):
        if t % 5 == 0:
            basis, seen = leading(g, 2), []
        vector = (basis.T @ g).ravel()
        seen = [*seen, vector][-history:]
        fisher = damping * np.eye(len(vector)) + sum(np.outer(s, s) for s in seen)
        natural = np.linalg.solve(fisher, vector).reshape(2, -1)
        w = w - 0.02 * 0.25 * (basis @ adam.step(natural)) - 0.02 * 0.1 * w
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("history", [1, 3, 20])
@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_natural_galore_follows_its_equations(shape: tuple[int, int], history: int, damping: float) -> None:
    w, gs = drawn(shape)
    fields = {"history": history, "damping": damping, "subspace": "exact", "spread": False, "period": 5}
    found = run(NaturalGaLore, w, gs, lr=0.02, rank=2, weight_decay=0.1, **fields)
    expected = oracle_natural(lying(w), [lying(g) for g in gs], history, damping)
    assert np.allclose(lying(found), expected, rtol=1e-7, atol=1e-8)


def oracle_weight_normalized(w: np.ndarray, gs: list[np.ndarray]) -> np.ndarray:
    """V and g kept as they are, their gradients by autograd of W = g V / |V|."""
    V, g = torch.tensor(w), torch.tensor(np.linalg.norm(w, axis=1, keepdims=True))
    of_V, of_g = Adam(1e-6), Adam(1e-6)
    for t, gradient in enumerate(gs):
        V, g = V.detach().requires_grad_(), g.detach().requires_grad_()
        made = g * V / torch.linalg.vector_norm(V, dim=1, keepdim=True)
        grad_V, grad_g = torch.autograd.grad((made * torch.tensor(gradient)).sum(), (V, g))
        flat = lying(grad_V.numpy())
        if t % 5 == 0:
            basis = leading(flat, 2)
        step = basis @ of_V.step(basis.T @ flat)
        V = V.detach() - 0.02 * torch.tensor(step if flat.shape == grad_V.shape else step.T)
        g = (1 - 0.02 * 0.1) * g.detach() - 0.02 * torch.tensor(of_g.step(grad_g.numpy()))
    made = g * V / torch.linalg.vector_norm(V, dim=1, keepdim=True)
    return made.numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradnormlorp_follows_its_equations(shape: tuple[int, int]) -> None:
    w, gs = drawn(shape)
    fields: dict[str, Any] = {"subspace": "exact", "spread": False, "period": 5, "weight_decay": 0.1}
    found = run(GradNormLoRP, w, gs, lr=0.02, rank=2, **fields)
    assert np.allclose(found, oracle_weight_normalized(w, gs), rtol=1e-7, atol=1e-9)


def test_a_row_of_zeros_finds_a_direction() -> None:
    w, gs = drawn((4, 7))
    w[1] = 0.0
    fields: dict[str, Any] = {"subspace": "exact", "spread": False, "lr": 0.02, "rank": 2}
    once = run(GradNormLoRP, w, gs[:1], **fields)
    assert np.linalg.norm(once[1]) > 0
    assert np.isfinite(run(GradNormLoRP, w, gs, **fields)).all()
    assert not np.allclose(run(GradNormLoRP, np.zeros((4, 7)), gs, **fields), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_zero_leaves_lengths_and_directions_bitwise(dtype: torch.dtype) -> None:
    """Though |w| (w / |w|) is not w to the last bit."""
    w = nn.Parameter(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(dtype))
    before, rule = w.detach().clone(), GradNormLoRP([w], rank=4)
    for _ in range(5):
        w.grad = torch.zeros_like(w)
        rule.step()
    assert torch.equal(w, before)


# -- as the authors' code does
# Made outside the repository in float64. DCT-Adam: dct_adamw.py of github.com/IST-DASLab/ISTA-DASLab-Optimizers at
# 4c98e6e, sim_type="makhoul", rank 2, twenty steps, rotate_subspace with the product written to a new tensor (in place
# it gives zeros), Euclidean norms, the transform's matrix and factors in float64; the first row of the weight, without
# and with error feedback. They put eps beside the corrected moment: 2e-6. Natural GaLore: the fifth result of
# `_natural_gradient_transform` of galore_projector_tensor.py of github.com/selfsupervised-ai/Natural-GaLore, history 3
# and damping 0.5: all digits written.
# ------------------------------------------------------------------------------------------------
AUTHORS_DCT = {
    False: [0.323312263, 0.70611037, 0.337680212, -1.202570054, 0.835875934, 0.420134699, -0.449097039],
    True: [0.264964843, 0.713830331, 0.332912902, -1.232925572, 0.899155137, 0.350076064, -0.484304989],
}
AUTHORS_NATURAL = [
    0.261384116561,
    0.182549580242,
    0.157237849705,
    -0.059519422353,
    -0.071331919883,
    0.162718514484,
    -0.227814823299,
    -0.07583473732,
]


@pytest.mark.parametrize("feedback", [False, True])
def test_twenty_steps_agree_with_the_authors_dct_adam(feedback: bool) -> None:
    w, gs = drawn((4, 7), 20)
    found = run(DCTAdam, w, gs, lr=0.02, weight_decay=0.1, rank=2, feedback=feedback)
    assert found[0].tolist() == pytest.approx(AUTHORS_DCT[feedback], abs=2e-6)


def test_the_natural_gradient_agrees_with_the_authors() -> None:
    rule = NaturalGaLore(rank=2, history=3, damping=0.5, spread=False)
    state: dict[str, Any] = {"number": 0, "projector": torch.eye(3, dtype=torch.float64)[:, :2]}
    group = {"rank": 2, "history": 3, "damping": 0.5, "spread": False, "period": 200, "subspace": "exact"}
    for step, g in enumerate(np.random.default_rng(2).normal(size=(5, 2, 4)), 2):
        gradient = torch.cat([torch.tensor(g), torch.ones(1, 4, dtype=torch.float64)])
        state["step"] = step
        natural = rule.project(gradient, state, group, 0)
    assert natural.flatten().tolist() == pytest.approx(AUTHORS_NATURAL, abs=1e-11)


# -- laws of all three, and states in fewer bits
# ------------------------------------------------------------------------
def gradients(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=draw).to(dtype) for _ in range(count)]


def go(w: nn.Parameter, rule: torch.optim.Optimizer, some: list[Tensor]) -> None:
    for g in some:
        w.grad = g.clone()
        rule.step()
        assert torch.equal(w.grad, g)


FIELDS: dict[type[Rule], list[dict[str, Any]]] = {
    DCTAdam: [{"rank": 4, "period": 3}, {"rank": 4, "feedback": True}],
    NaturalGaLore: [{"rank": 4, "period": 3}],
    GradNormLoRP: [{"rank": 4, "period": 3, "weight_decay": 0.1}],
    GaLore: [{"rank": 4, "period": 3}],
    Fira: [{"rank": 4, "period": 3}],
    Muon: [{}],
}


@pytest.mark.parametrize("rule", FIELDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
def test_resumed_is_bitwise_uninterrupted(rule: type[Rule], dtype: torch.dtype, states: str) -> None:
    shape = (64, 1100) if states == "8bit" else (8, 70)
    some = gradients(6, shape, dtype)
    for fields in FIELDS[rule]:
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        whole, half = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        go(whole, rule([whole], lr=0.01, states=states, **fields), some)
        first = rule([half], lr=0.01, states=states, **fields)
        go(half, first, some[:4])
        held = io.BytesIO()
        torch.save(first.state_dict(), held)
        held.seek(0)
        again = rule([half], lr=0.01, states=states, **fields)
        again.load_state_dict(torch.load(held, weights_only=True))
        go(half, again, some[4:])
        assert torch.equal(whole, half)
        name = "momentum_buffer" if rule is Muon else "exp_avg"
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}
        assert again.state[half][name].dtype == kinds[states]


@pytest.mark.parametrize("rule", FIELDS)
@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_fewer_bits_step_nearly_as_many_do(rule: type[Rule], states: str) -> None:
    """Eight steps along one noisy direction; the ends lie within a tenth of the way."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(64, 1100, generator=draw)
    some = [common + 0.5 * torch.randn(64, 1100, generator=draw) for _ in range(8)]
    ends = []
    for kind in ("float32", states):
        w = nn.Parameter(torch.ones(64, 1100))
        fields = FIELDS[rule][0] | ({} if rule is Muon else {"period": 100})
        go(w, rule([w], **{"lr": 0.01, "states": kind, "weight_decay": 0.0} | fields), some)
        ends.append(w.detach())
    assert not torch.equal(*ends)
    assert float((ends[0] - ends[1]).norm()) < 0.1 * float((ends[0] - 1).norm())


@pytest.mark.parametrize("rule", RULES)
def test_maximize_is_minimizing_the_negative(rule: type[Rule]) -> None:
    ends = []
    for up in (False, True):
        w = nn.Parameter(torch.linspace(-1, 1, 36).reshape(6, 6))
        optimizer = rule([w], maximize=up, rank=2)
        for _ in range(3):
            w.grad = torch.sin(w.detach() * 5) * (-1 if up else 1)
            optimizer.step()
        ends.append(w.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("rule", RULES)
def test_solves_a_matrix_quadratic(rule: type[Rule]) -> None:
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(8, 12, generator=draw)
    w = nn.Parameter(0.1 * torch.randn(8, 12, generator=draw))
    fields = {DCTAdam: {"period": 1}, NaturalGaLore: {"damping": 1.0, "scale": 1.0, "period": 10}}
    optimizer = rule([w], lr=0.1, rank=2, **fields.get(rule, {"period": 10}))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        optimizer.zero_grad()
        (0.5 * (w - target).square().sum()).backward()
        optimizer.step()
        scheduler.step()
    assert float((w - target).detach().norm()) < 0.03 * float(target.norm())


def test_what_the_states_take() -> None:
    """[576, 1536] at rank 128: bytes beside AdamW's 7.1 MB. GradNormLoRP in 8 bits needs a tenth of them."""
    taken = {}
    for rule, fields in ((GaLore, {}), (DCTAdam, {}), (NaturalGaLore, {}), (GradNormLoRP, {"states": "8bit"})):
        w = nn.Parameter(torch.randn(576, 1536))
        optimizer = rule([w], rank=128, **fields)
        w.grad = torch.randn(576, 1536)
        optimizer.step()
        taken[rule] = sum(t.numel() * t.element_size() for t in optimizer.state[w].values() if isinstance(t, Tensor))
    adamw = 2 * 4 * 576 * 1536
    basis, moment = 4 * 576 * 128, 4 * 128 * 1536
    assert taken[GaLore] == basis + 2 * moment
    assert taken[DCTAdam] == 8 * 128 + 2 * moment
    assert taken[NaturalGaLore] == basis + (2 + 4) * moment + 4 * 16
    assert taken[GradNormLoRP] < 0.11 * adamw
