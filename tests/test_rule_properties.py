"""Properties of the rules on drawn weights and gradients: symmetries, zeros, extremes, float64."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plait.step.adagrad import AdaGrad, AdaGradNorm
from plait.step.adam import AdaBelief, Adam, AdamW
from plait.step.base import Rule
from plait.step.dct import DCTAdam
from plait.step.difference import MARS, Adan
from plait.step.factored import Adafactor
from plait.step.friction import DiffGrad
from plait.step.gauss_newton import EGN
from plait.step.layer_sampling import HFT, LISA, RoundsOptimizer
from plait.step.layerwise import LAMB, LARS
from plait.step.low_rank import Fira, GaLore
from plait.step.momentum import SGD, SGDW, Lion
from plait.step.natural import NaturalGaLore
from plait.step.normalized import ADOPT, LaProp
from plait.step.orthogonal import Muon
from plait.step.scale_invariant import SGDP, AdamP
from plait.step.signed import NormalizedSGD, SignSGD
from plait.step.weight_normalized import GradNormLoRP
from plait.train import train
from rules import RULES as CATALOGUE
from rules import Weights, made

settings.register_profile(
    "rules", max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("rules")

FIELDS: dict[type[Rule], dict[str, Any]] = {
    rule: {"lr": 0.02}
    for rule in (
        *(Adam, AdamW, AdaBelief, DiffGrad, AdamP, Adafactor, AdaGrad, AdaGradNorm, SGD, SGDW, SGDP, Lion, SignSGD),
        *(NormalizedSGD, LAMB, LARS, EGN, Adan, MARS, LaProp, ADOPT),
    )
}
FIELDS |= {rule: {"lr": 0.02, "rank": 2} for rule in (GaLore, Fira, NaturalGaLore, DCTAdam, GradNormLoRP)}
FIELDS |= {rule: {"lr": 0.02, "period": 2, "where": "layers.[0-9]"} for rule in (LISA, HFT)}
FIELDS |= {Muon: {"lr": 0.02, "iterations": 0}}
RULES = list(FIELDS)

# What a rule has that its fellows have not; the rest is asked of all.
BLIND_TO_SCALE = [Adam, AdamW, AdamP, AdaGrad, AdaGradNorm, Lion, SignSGD, NormalizedSGD, LAMB, LARS, Adafactor, Muon]
BLIND_TO_SCALE += [LISA, HFT, GaLore, Fira, NaturalGaLore, DCTAdam, GradNormLoRP, Adan, LaProp, ADOPT]
"""c g in place of g, c > 0: the same steps, where eps and damping are 0 or beyond notice."""
LINEAR = [SGD, SGDW, SGDP, EGN]
"""c g: c times the step, without decay; of EGN, what it makes of its solution."""
ELEMENT_BY_ELEMENT = [Adam, AdamW, AdaBelief, DiffGrad, AdaGrad, SGD, SGDW, Lion, SignSGD, EGN, Adan, LaProp, ADOPT]
"""An element's way depends on no other's."""
TURNING = [GaLore, Fira, NaturalGaLore]
"""Q W under Q G, Q orthogonal on the side of fewer rows: Q times the steps, where P is found exactly."""
LAYER_BY_LAYER = [LAMB, LARS, Adafactor]
"""c w with the same gradients: c times the steps, without decay."""


@st.composite
def problems(draw: Any) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights (a matrix with distinct singular values, a kernel, a vector, a scalar) and a few steps of gradients."""
    seed, steps = draw(st.integers(0, 2**31)), draw(st.integers(1, 4))
    rows, columns = draw(st.integers(3, 5)), draw(st.integers(3, 6))
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, columns), (2, 3, 2, 2), (columns,), ()]

    def numbers(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [numbers(s) for s in shapes], [[numbers(s) for s in shapes] for _ in range(steps)]


def stepped(
    rule: type[Rule],
    weights: list[Tensor],
    gradients: list[list[Tensor]],
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> list[Tensor]:
    """The weights after the steps, each a layer of its own; nothing that was given is written to."""
    held = [nn.Parameter(w.to(dtype).clone()) for w in weights]
    optimizer = rule(**{**FIELDS[rule], **more}).optimizer([(f"layers.{i}.weight", p) for i, p in enumerate(held)])
    if isinstance(optimizer, RoundsOptimizer):  # rounds of one draw, whatever the weights are
        optimizer.param_groups[0]["seed"] = 0
        optimizer.begin()
    for step in gradients:
        for p, g in zip(held, step, strict=True):
            p.grad = g.to(dtype) if p.requires_grad else None
        optimizer.step()
    return [p.detach() for p in held]


def close(one: list[Tensor], other: list[Tensor], tolerance: float = 1e-8) -> bool:
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(one, other, strict=True))


def without_eps(rule: type[Rule]) -> dict[str, Any]:
    if rule is AdaGradNorm:
        return {"initial": 1e-30}
    names = rule.__dataclass_fields__
    return {name: least for name, least in {"eps": 1e-60, "damping": 1e-40}.items() if name in names}


@pytest.mark.parametrize("rule", BLIND_TO_SCALE)
@given(problem=problems(), scale=st.sampled_from([1e-6, 0.3, 7.0, 1e6]))
def test_the_scale_of_the_loss_changes_nothing(rule: type[Rule], problem: Any, scale: float) -> None:
    weights, gradients = problem
    larger = [[scale * g for g in step] for step in gradients]
    more = without_eps(rule)
    assert close(stepped(rule, weights, gradients, **more), stepped(rule, weights, larger, **more))


@pytest.mark.parametrize("rule", LINEAR)
@given(problem=problems(), scale=st.sampled_from([1e-3, 0.3, 7.0, 1e3]))
def test_steps_are_as_large_as_the_loss(rule: type[Rule], problem: Any, scale: float) -> None:
    """Where the weights stay where they are; a projection turns with the weights."""
    weights, gradients = problem
    fields: dict[str, Any] = {"weight_decay": 0.0, "lr": 1e-3}
    first, larger = gradients[:1], [[scale * g for g in gradients[0]]]
    plain, scaled = stepped(rule, weights, first, **fields), stepped(rule, weights, larger, **fields)
    for w, a, b in zip(weights, plain, scaled, strict=True):
        assert torch.allclose(scale * (a - w), b - w, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("rule", LAYER_BY_LAYER)
@given(problem=problems(), scale=st.sampled_from([0.25, 3.0, 50.0]))
def test_steps_are_as_large_as_the_layer(rule: type[Rule], problem: Any, scale: float) -> None:
    weights, gradients = problem
    more: dict[str, Any] = {"weight_decay": 0.0} | ({"least": 0.0} if rule is Adafactor else {})
    larger = stepped(rule, [scale * w for w in weights], gradients, **more)
    assert close(larger, [scale * w for w in stepped(rule, weights, gradients, **more)])


@pytest.mark.parametrize("rule", RULES)
@given(problem=problems(), seed=st.integers(0, 99))
def test_the_order_of_rows_and_columns_changes_nothing(rule: type[Rule], problem: Any, seed: int) -> None:
    """A permutation of a matrix's rows and columns, and of a kernel's outputs and inputs, permutes the step alike.

    DCT-Adam transforms along the side of fewer rows, whose order counts.
    """
    weights, gradients = problem
    generator = torch.Generator().manual_seed(seed)
    orders = [[torch.randperm(n, generator=generator) for n in w.shape[:2]] for w in weights]
    if rule is DCTAdam:
        fewer = int(weights[0].shape[0] > weights[0].shape[1])
        orders[0][fewer] = torch.arange(weights[0].shape[fewer])

    def permuted(tensors: list[Tensor]) -> list[Tensor]:
        result = []
        for t, order in zip(tensors, orders, strict=True):
            for axis, o in enumerate(order):
                t = t.index_select(axis, o)
            result.append(t)
        return result

    more: dict[str, Any] = {"weight_decay": 0.1}
    there = stepped(rule, permuted(weights), [permuted(step) for step in gradients], **more)
    assert close(there, permuted(stepped(rule, weights, gradients, **more)), 1e-6)


@pytest.mark.parametrize("rule", TURNING)
@given(problem=problems(), seed=st.integers(0, 99))
def test_what_is_turned_steps_as_before(rule: type[Rule], problem: Any, seed: int) -> None:
    weights, gradients = [problem[0][0]], [step[:1] for step in problem[1]]
    fewer = min(weights[0].shape)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(fewer, fewer, generator=generator, dtype=torch.float64)).Q
    lies = weights[0].shape[0] == fewer

    def turned(tensors: list[Tensor]) -> list[Tensor]:
        return [turn @ t if lies else t @ turn for t in tensors]

    more: dict[str, Any] = {"weight_decay": 0.1, "subspace": "exact"}
    there = stepped(rule, turned(weights), [turned(step) for step in gradients], **more)
    assert close(there, turned(stepped(rule, weights, gradients, **more)), 1e-6)


@given(seed=st.integers(0, 99), damping=st.sampled_from([1e-3, 1.0]))
def test_a_gauss_newton_step_turns_with_the_inputs(seed: int, damping: float) -> None:
    """Inputs x Q in place of x, weights W Q: the same way, and none where the residual is 0, damped or not."""
    draw = torch.Generator().manual_seed(seed)
    x, w, y = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((7, 4), (3, 4), (7, 3)))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=draw, dtype=torch.float64)).Q

    def after(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        model = nn.Linear(4, 3, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(w)
        return train(model, (x, y), methods=[EGN(damping=damping)], steps=2, batch_size=7).model.weight.detach()

    assert close([after(x @ turn, w @ turn, y)], [after(x, w, y) @ turn])
    assert torch.equal(after(x, w, nn.functional.linear(x, w)), w)


@pytest.mark.parametrize("rule", ELEMENT_BY_ELEMENT)
@given(problem=problems(), place=st.integers(0, 8))
def test_an_element_goes_its_own_way(rule: type[Rule], problem: Any, place: int) -> None:
    weights, gradients = problem
    alone = stepped(rule, [weights[0].flatten()[place]], [[step[0].flatten()[place]] for step in gradients])
    assert close(alone, [stepped(rule, weights, gradients)[0].flatten()[place]], 1e-12)


@pytest.mark.parametrize("rule", RULES)
@given(problem=problems())
def test_signs_turn_with_the_signs(rule: type[Rule], problem: Any) -> None:
    """-w under the gradients of the mirrored loss: the way there is mirrored too, decay included."""
    weights, gradients = problem
    more: dict[str, Any] = {"weight_decay": 0.1}
    mirrored = stepped(rule, [-w for w in weights], [[-g for g in step] for step in gradients], **more)
    assert close(mirrored, [-w for w in stepped(rule, weights, gradients, **more)], 1e-7)


@pytest.mark.parametrize("rule", RULES)
@given(problem=problems())
def test_ascending_is_descending_the_negative(rule: type[Rule], problem: Any) -> None:
    weights, gradients = problem
    up = stepped(rule, weights, gradients, maximize=True)
    assert close(up, stepped(rule, weights, [[-g for g in step] for step in gradients]), 1e-7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(problem=problems())
def test_gradients_of_zero_move_nothing(rule: type[Rule], dtype: torch.dtype, problem: Any) -> None:
    """Without decay and before anything was seen; nor do they make what follows NaN."""
    weights, gradients = problem
    zeros = [[torch.zeros_like(w) for w in weights]] * 2
    still = stepped(rule, weights, zeros, dtype, weight_decay=0.0)
    assert all(torch.equal(a, w.to(dtype)) for a, w in zip(still, weights, strict=True))
    after = stepped(rule, weights, zeros + gradients + zeros, dtype)
    assert all(torch.isfinite(t).all() for t in after)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule is not NaturalGaLore])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(problem=problems(), sizes=st.permutations([1e30, 1.0, 1e-30]))
def test_huge_and_tiny_gradients_leave_finite_weights(
    rule: type[Rule], dtype: torch.dtype, problem: Any, sizes: list[float]
) -> None:
    weights, gradients = problem
    steps = [[size * g for g in gradients[0]] for size in sizes]
    assert all(torch.isfinite(t).all() for t in stepped(rule, weights, steps, dtype))
    mixed = [[size * g for size, g in zip([*sizes, 1.0], gradients[0], strict=True)]] * 2
    assert all(torch.isfinite(t).all() for t in stepped(rule, weights, mixed, dtype))


@pytest.mark.parametrize("rule", RULES)
@given(problem=problems())
def test_float32_follows_float64(rule: type[Rule], problem: Any) -> None:
    """But for what is decided by a sign or a comparison, on which the two may differ where it is close."""
    weights, gradients = problem
    fine = stepped(rule, weights, gradients)
    coarse = stepped(rule, weights, gradients, torch.float32)
    assert all(a.dtype == torch.float64 for a in fine)
    assert close([t.double() for t in coarse], fine, 2e-4)


# -- every rule of the catalogue
# --------------------------------------------------------------------------------------------
LEAVES_FLOAT32 = {
    "egn": "asks for derivatives of its own, in plait.train",
    "riemannlora": "steps the factors of adapters alone, see test_fixed_rank.py",
    "natural-galore": "keeps inner products of gradients, which beyond 1e19 are beyond float32",
}


@pytest.mark.parametrize("key", [key for key in CATALOGUE if key not in LEAVES_FLOAT32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", list(permutations([1e30, 1.0, 1e-30])), ids=str)
def test_no_rule_turns_huge_or_tiny_gradients_into_nan(key: str, dtype: torch.dtype, sizes: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    model, draw = Weights(dtype), torch.Generator().manual_seed(1)
    optimizer = made(key, model)
    for size in (*sizes, 1.0):
        for p in model.parameters():
            p.grad = (size * torch.randn(p.shape, generator=draw)).to(dtype)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
