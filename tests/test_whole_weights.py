"""Steps that ask something of whole weights or rows, trust ratios and projections: in kernels as in the plain loop.

What they are for stands in test_elementwise.py and test_step.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from plait.math import kernel_source, kernels, storage
from plait.math.update_rule import Whole, perpendicular_rows
from plait.step.base import Rule
from plait.step.layerwise import LAMB, LARS
from plait.step.scale_invariant import SGDP, AdamP

TANGENT: list[type[Rule]] = [AdamP, SGDP]
SHAPES = [(6, 70), (1, 40), (40, 1), (5, 4, 3, 3), (3, 4099), (64, 80)]
"""Also one row, rows of one element, kernels, a tail after whole blocks, and room for 8 bit."""


# -- projections
# ---------------------------------------------------------------------------------------------------------
def turned(weight: Tensor, gradient: Tensor, how: str) -> Tensor:
    """A gradient that is perpendicular to each row of a weight, or to the whole only, or to neither."""
    w, g = weight.double().flatten(1), gradient.double().flatten(1)
    if how == "rows":
        g = g - (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
    elif how == "whole":
        g = g + torch.linspace(-1, 1, len(w), dtype=torch.float64)[:, None] * w
        g = g - (g * w).sum() / w.square().sum() * w
    else:
        g = g + w
    return g.view(gradient.shape).to(gradient.dtype)


def rows(weight: Tensor, gradient: Tensor) -> int:
    return perpendicular_rows(AdamP.rule(), weight, gradient, {"delta": 0.1}, Whole(weight.shape[1:].numel()))


def stepped(
    rule: type[Rule],
    shape: tuple[int, ...],
    how: str,
    *,
    fused: bool = True,
    dtype: torch.dtype = torch.float32,
    steps: int = 5,
    size: float = 1.0,
    layout: Any = lambda w: w,
    **more: Any,
) -> Tensor:
    """The weight after a few steps, with gradients drawn anew for where it is."""
    draw = torch.Generator().manual_seed(0)
    p = nn.Parameter(layout((size * torch.randn(shape, generator=draw)).to(dtype)))
    optimizer = rule([p], **{"lr": 0.05, "weight_decay": 0.1, **more})
    optimizer.fused = fused
    for _ in range(steps):
        p.grad = layout(turned(p.detach(), torch.randn(shape, generator=draw).to(dtype), how))
        optimizer.step()
    assert optimizer.fused == fused
    return p.detach().float()


@pytest.mark.parametrize("rule", TANGENT)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["rows", "whole", "neither"])
def test_a_projected_step_agrees_with_the_plain_loop(rule: type[Rule], shape: tuple[int, ...], how: str) -> None:
    fast, plain = (stepped(rule, shape, how, fused=fused) for fused in (True, False))
    assert torch.allclose(fast, plain, rtol=2e-6, atol=2e-6)


def test_the_gradients_of_these_tests_are_turned_as_they_say() -> None:
    draw = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        w, g = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
        if w[0].numel() > 1:
            assert rows(w, turned(w, g, "rows")) == len(w)
        assert rows(w, turned(w, g, "whole")) == 1
        assert rows(w, turned(w, g, "neither")) == 0


@pytest.mark.parametrize("rule", TANGENT)
@pytest.mark.parametrize("how", ["rows", "whole", "neither"])
@pytest.mark.parametrize("states", storage.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_however_weights_and_states_are_kept(rule: type[Rule], how: str, states: str, dtype: torch.dtype) -> None:
    """One step, so that what is rounded the other way cannot turn a gradient; bfloat16 differs on its borders only."""
    found = [stepped(rule, (64, 80), how, fused=fused, dtype=dtype, states=states, steps=1) for fused in (True, False)]
    fast, plain = found
    if dtype == torch.float32:
        assert torch.allclose(fast, plain, rtol=2e-6, atol=2e-6)
    else:
        assert (fast != plain).float().mean() < 0.001
    free = stepped(rule, (64, 80), how, dtype=dtype, states=states, steps=1, delta=0.0)
    assert (fast == free).all() == (how == "neither")


@pytest.mark.parametrize("rule", TANGENT)
@pytest.mark.parametrize("states", storage.KINDS)
def test_a_weight_larger_than_the_stash_is_turned_alike(
    rule: type[Rule], states: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {how: stepped(rule, (64, 80), how, states=states, steps=1) for how in ("rows", "whole")}
    monkeypatch.setattr(kernels, "_COMPILED", {})
    for stash in (50, 700):  # less than a row, and some rows
        monkeypatch.setattr(kernel_source, "STASH", stash)
        for how, all_kept in found.items():
            assert torch.allclose(stepped(rule, (64, 80), how, states=states, steps=1), all_kept, atol=2e-6)


@pytest.mark.parametrize("rule", TANGENT)
@pytest.mark.parametrize("how", ["rows", "whole", "neither"])
def test_how_a_weight_lies_in_memory_changes_nothing(rule: type[Rule], how: str) -> None:
    def channels_last(w: Tensor) -> Tensor:
        return w.to(memory_format=torch.channels_last)

    def transposed(w: Tensor) -> Tensor:
        return w.transpose(0, 1).contiguous().transpose(0, 1)

    for layout in (channels_last, transposed):
        assert not layout(torch.zeros(5, 4, 3, 3)).is_contiguous()
        other = stepped(rule, (5, 4, 3, 3), how, layout=layout)
        assert torch.allclose(other, stepped(rule, (5, 4, 3, 3), how), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rule", TANGENT)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-22, 1e22, 1e30, 1e36])
def test_a_projected_step_of_any_size_is_the_same_step(rule: type[Rule], fused: bool, size: float) -> None:
    """Weights and rate larger by one factor (for SGDP gradients in place of the rate): so is the step."""
    draw = torch.Generator().manual_seed(0)
    w, g = torch.randn(8, 60, generator=draw), torch.randn(8, 60, generator=draw)
    for how in ("rows", "whole"):
        ends = []
        for scale in (1.0, size):
            p = nn.Parameter(scale * w)
            p.grad = turned(w, g, how) * (scale if rule is SGDP else 1.0)
            optimizer = rule([p], lr=0.05 if rule is SGDP else 0.05 * scale, weight_decay=0.0)
            optimizer.fused = fused
            optimizer.step()
            ends.append(p.detach().double() / scale)
        assert torch.allclose(*ends, rtol=2e-6, atol=2e-6)
        assert float((ends[0] - w).norm()) > 0.1


@pytest.mark.parametrize("rule", TANGENT)
def test_rows_of_zeros_stay_finite(rule: type[Rule]) -> None:
    for fused in (True, False):
        p = nn.Parameter(torch.zeros(4, 50))
        optimizer = rule([p], lr=0.1, weight_decay=0.1)
        optimizer.fused = fused
        p.grad = torch.ones(4, 50)
        p.grad[1] = 0.0
        optimizer.step()
        assert p.detach().isfinite().all()
        assert not p.detach()[1].any()
        assert p.detach()[0].all()


@pytest.mark.parametrize("rule", TANGENT)
def test_vectors_are_never_turned(rule: type[Rule]) -> None:
    ends = []
    for delta in (0.0, 10.0):
        p = nn.Parameter(torch.ones(50))
        optimizer = rule([p], lr=0.1, weight_decay=0.1, delta=delta)
        p.grad = torch.linspace(-1, 2, 50)
        optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("rule", [SGDP, AdamP])
def test_a_bfloat16_weight_is_rounded_once(rule: type[Rule]) -> None:
    """Put right after it was rounded, most of its elements would no longer see the projection."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(64, 64, generator=draw).to(torch.bfloat16)
    g = torch.randn(64, 64, generator=draw)
    g = (g - (g * start).sum(1, keepdim=True) / start.float().square().sum(1, keepdim=True) * start).to(torch.bfloat16)
    fine, coarse = nn.Parameter(start.float()), nn.Parameter(start.clone())
    for p in (fine, coarse):
        p.grad = g.to(p.dtype)
        rule([p], lr=1e-2).step()
    assert float((coarse.detach() == fine.detach().to(torch.bfloat16)).float().mean()) > 0.999


# -- trust ratios
# ---------------------------------------------------------------------------------------------------------
def extreme(kind: str) -> tuple[Tensor, list[Tensor]]:
    """A weight, and gradients whose squares no float32 holds."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(64, 80, generator=draw)
    sizes = {"large": torch.tensor([1e25]), "small": torch.tensor([1e-35]), "mixed": torch.tensor([1e25, 1e-35, 1.0])}
    size = sizes[kind].repeat(64 * 80)[: 64 * 80].view(64, 80)
    return w, [size * torch.randn(64, 80, generator=draw) for _ in range(3)]


def expected(rule: type[Rule], w: Tensor, gradients: list[Tensor]) -> Tensor:
    """The rule's own direction in float32, since what Adam makes of a square beyond float32 is not asked here; else
    float64: w - lr * ||w|| / ||d|| * d.
    """
    weight, formula = w.double(), rule.rule()
    states = [torch.zeros_like(w) for _ in formula.states]
    group = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "norm_range": None, "momentum": 0.9, "lr": 0.01}
    for step, g in enumerate(gradients, 1):
        numbers = {**group, **rule.scalars(step, group)}
        scalars = {n: numbers[n] for n in formula.scalars if n not in ("least", "most")}
        direction, *states = formula.direction(weight.float(), g, *states, **scalars)
        length = direction.double().norm()
        weight = weight - 0.01 * (weight.norm() / length if length else 1.0) * direction.double()
    return weight


def by_trust(rule: type[Rule], kind: str, *, fused: bool = True, steps: int = 3, **more: Any) -> Tensor:
    w, gradients = extreme(kind)
    p = nn.Parameter(w)
    optimizer = rule([p], lr=0.01, weight_decay=0.0, **more)
    optimizer.fused = fused
    for g in gradients[:steps]:
        p.grad = g
        optimizer.step()
    return p.detach()


def agrees(found: Tensor, rule: type[Rule], kind: str, steps: int = 3) -> bool:
    w, gradients = extreme(kind)
    right = expected(rule, w, gradients[:steps])
    moves = rule is LARS or kind != "large"  # Adam's second moment of 1e25 is infinite in float32: LAMB stays
    return torch.allclose(found.double(), right, rtol=1e-5, atol=1e-6) and bool((right != w).any()) == moves


EXTREMES = ["large", "small", "mixed"]


@pytest.mark.parametrize("rule", [LAMB, LARS])
@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("fused", [True, False])
def test_trust_ratios_of_gradients_whose_squares_leave_float32(rule: type[Rule], kind: str, fused: bool) -> None:
    assert agrees(by_trust(rule, kind, fused=fused), rule, kind)


@pytest.mark.parametrize("rule", [LAMB, LARS])
@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_trust_ratios_beside_rounded_states(rule: type[Rule], kind: str, fused: bool, states: str) -> None:
    """Of the first step, which reads no state that was rounded."""
    assert agrees(by_trust(rule, kind, fused=fused, states=states, steps=1), rule, kind, steps=1)


TRITON = """
import json, sys
from plait.math import triton_kernels
triton_kernels.DEVICES.add("cpu")
sys.path.insert(0, sys.argv[1])
from test_whole_weights import *
print(json.dumps([{{"trust": by_trust, "turn": stepped}}["{0}"](*case, **more).tolist() for case, more in {0}_cases()]))
"""


def trust_cases() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What Triton's interpreter steps."""
    rules: list[type[Rule]] = [LAMB, LARS]
    return [
        ((rule, kind), {"steps": 1, "states": states})
        for rule in rules
        for kind in EXTREMES
        for states in storage.KINDS
    ]


def turn_cases() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Each way to turn in every layout, and rows of more than a piece, of more than a thousand, and of one element."""
    found = [
        ((AdamP, (64, 80), how), {"steps": 1, "states": states, "dtype": dtype})
        for how in ("rows", "whole", "neither")
        for states in storage.KINDS
        for dtype in (torch.float32, torch.bfloat16)
    ]
    shapes = [(3, 4099), (1100, 4), (40, 1), (5, 4, 3, 3), (3, 4096)]
    return found + [((SGDP, shape, how), {"steps": 2}) for shape in shapes for how in ("rows", "whole")]


def interpreted(which: str) -> list[Tensor]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-W", "ignore", "-c", TRITON.format(which), os.path.dirname(__file__)]
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.tensor(found) for found in json.loads(done.stdout)]


@pytest.mark.slow
def test_trust_ratios_in_triton() -> None:
    for found, ((rule, kind), _) in zip(interpreted("trust"), trust_cases(), strict=True):
        assert agrees(found, rule, kind, steps=1), (rule, kind)


@pytest.mark.slow
def test_projections_in_triton() -> None:
    for found, (case, more) in zip(interpreted("turn"), turn_cases(), strict=True):
        plain = stepped(*case, fused=False, **more)
        if more.get("dtype") == torch.bfloat16:
            assert (found != plain).float().mean() < 0.001, (case, more)
        else:
            assert torch.allclose(found, plain, rtol=5e-6, atol=5e-6), (case, more)


@given(power=st.integers(-35, 35), fused=st.booleans(), clipped=st.booleans())
def test_a_step_of_lars_is_as_long_as_the_layer_is_large(power: int, fused: bool, clipped: bool) -> None:
    """However large the gradient: lr ||w||, or what the norm is clipped to."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(30, 50, generator=draw)
    p = nn.Parameter(w.clone())
    optimizer = LARS([p], lr=0.1, norm_range=(0.1, 2.0) if clipped else None)
    optimizer.fused = fused
    p.grad = torch.randn(30, 50, generator=draw) * 10.0**power
    optimizer.step()
    length = 2.0 if clipped else float(w.norm())
    assert float((p.detach() - w).norm()) == pytest.approx(0.1 * length, rel=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_the_smallest_gradients_make_no_step_infinite(fused: bool) -> None:
    """A ratio beyond float32 is float32's largest number."""
    p = nn.Parameter(torch.full((30, 50), 100.0))
    optimizer = LARS([p], lr=1.0)
    optimizer.fused = fused
    p.grad = torch.full((30, 50), 1e-43)
    optimizer.step()
    assert p.detach().isfinite().all()
    assert (p.detach() <= 100.0).all()
