"""An update rule, written once as the mathematics of one element of a weight; and the plain loop that follows it.

A rule is `direction(weight, gradient, *states, *, scalars) -> (direction, *new states)`, and the weight becomes
weight - rate * direction. A rule that also looks at a whole tensor adds `trust(weight_norm, direction_norm, *,
scalars)`, and the weight becomes weight - rate * trust * direction. A rule that turns a weight without lengthening it
adds `perpendicular(inner, weight_norm, gradient_norm, count, *, scalars)`, which is asked of the weight and its
gradient, and `radial(inner, weight_norm, *, scalars)`, which is given <weight, direction>: the weight becomes
weight - rate * (direction + radial * weight), row by row if all rows are perpendicular to their gradients, else as a
whole if it is, else without `radial`. A rule that reads a norm before it steps adds `normed(weight, gradient, *states,
*, scalars)`, of whose numbers the norm over the tensor is the keyword `norm` of its direction. A rule has one of these
at most. Norms and inner products are float64, in which no square of a float32 is lost. The names of the states and the
scalars stand in the signature and nowhere else. The same text is run on tensors here, and compiled to one pass over
memory in `plait.math.kernels`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

sqrt: Callable[[Any], Any] = torch.sqrt
sign: Callable[[Any], Any] = torch.sign
exp: Callable[[Any], Any] = torch.exp


def where(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`."""
    return torch.where(condition, yes, no)


def maximum(value: Any, least: Any) -> Any:
    """The larger of a value and a scalar."""
    return torch.clamp(value, min=least)


def minimum(value: Any, most: Any) -> Any:
    """The smaller of a value and a scalar."""
    return torch.clamp(value, max=most)


FUNCTIONS = ("sqrt", "sign", "exp", "where", "maximum", "minimum", "abs")
"""What a rule may call, beside arithmetic and comparisons."""

NORM = "norm"
"""The keyword of a direction that is no scalar: the norm of what the rule has `normed`."""


def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


@dataclass(frozen=True)
class UpdateRule:
    """The functions of a rule, and the names that their signatures give."""

    direction: Callable[..., Any]
    trust: Callable[..., Any] | None = None
    normed: Callable[..., Any] | None = None
    perpendicular: Callable[..., Any] | None = None
    radial: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        several = [f for f in (self.trust, self.normed, self.radial) if f is not None]
        assert len(several) < 2, "a rule looks at whole tensors in one way only"

    @property
    def whole(self) -> bool:
        """Say whether the rule looks at a whole tensor before it steps an element of it."""
        return self.normed is not None or bool(self.of_whole)

    @property
    def of_whole(self) -> dict[str, Callable[..., Any]]:
        """The functions, by name, that are asked once for a whole weight or row: of numbers."""
        asked = {"trust": self.trust, "perpendicular": self.perpendicular, "radial": self.radial}
        return {name: f for name, f in asked.items() if f is not None}

    @cached_property
    def states(self) -> tuple[str, ...]:
        """The names of the running states, each a tensor in the weight's shape that starts at zero."""
        parameters = inspect.signature(self.direction).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)[2:]

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        """The names of the numbers that are the same for all elements of a tensor, but for the rate."""
        functions = [self.direction, *self.of_whole.values(), *([self.normed] if self.normed else [])]
        return tuple(dict.fromkeys(name for f in functions for name in _keywords(f) if name != NORM))


def inner_of_rows(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product of each row in float64; of a vector or a number that of the whole.

    >>> inner_of_rows(torch.tensor([[3.0, 4.0], [1e30, 0.0]]), torch.tensor([[3.0, 4.0], [1e30, 1.0]]))
    tensor([2.5000e+01, 1.0000e+60], dtype=torch.float64)
    """
    axes = tuple(range(1, one.dim())) or None
    if one is other:  # without a copy in float64
        norms: Tensor = torch.linalg.vector_norm(one, dim=axes, dtype=torch.float64)
        return norms.square()
    return (one.double() * other.double()).sum(dim=axes)


@dataclass(frozen=True)
class Whole:
    """What a step must know of a whole tensor, of which a share may be at hand.

    width: elements of a row. first_row: of the share's. inner(one, other): the inner products of all rows, from shares.
    """

    width: int
    first_row: int = 0
    inner: Callable[[Tensor, Tensor], Tensor] = inner_of_rows


def plain_step(
    rule: UpdateRule,
    weight: Tensor,
    gradient: Tensor,
    states: Mapping[str, Tensor],
    scalars: Mapping[str, float],
    whole: Whole | None = None,
) -> None:
    """Take one step in place, in torch's own calls: the oracle of the kernels, and what runs where they cannot.

    Computes in the dtype of the states (float32, or float64 for a float64 weight) and rounds to the weight's dtype
    last. whole: of the tensor, where only a share of it is at hand.

    >>> w, buffer = torch.ones(1), torch.zeros(1)
    >>> def momentum(weight, gradient, buffer, *, beta):
    ...     buffer = beta * buffer + gradient
    ...     return buffer, buffer
    >>> plain_step(UpdateRule(momentum), w, torch.ones(1), {"buffer": buffer}, {"rate": 0.5, "beta": 0.9})
    >>> w, buffer
    (tensor([0.5000]), tensor([1.]))
    """
    precise = exact(weight.dtype)
    held, gradient = weight.to(precise), gradient.to(precise)
    whole = whole or Whole(weight.shape[1:].numel())
    numbers: dict[str, Any] = dict(scalars)
    if rule.normed is not None:
        part = rule.normed(held, gradient, *states.values(), **_given(rule.normed, numbers))
        numbers[NORM] = whole.inner(part, part).sum().sqrt()
    direction, *new = rule.direction(held, gradient, *states.values(), **_given(rule.direction, numbers))
    rate = numbers["rate"]
    if rule.trust is not None:
        norms = [whole.inner(x, x).sum().sqrt() for x in (held, direction)]
        rate = rate * rule.trust(*norms, **_given(rule.trust, scalars))
        rate = rate.clamp(max=torch.finfo(precise).max)  # the direction may be so short that the ratio is beyond
    if rule.perpendicular is not None:
        direction = _turned(rule, held, gradient, direction, scalars, whole)
    weight.copy_(held - rate * direction)
    for state, value in zip(states.values(), new, strict=True):
        state.copy_(value)


def _turned(
    rule: UpdateRule, weight: Tensor, gradient: Tensor, direction: Tensor, scalars: Mapping[str, float], whole: Whole
) -> Tensor:
    """Return direction + radial * weight where a weight's rows, or all of it, are perpendicular to the gradient."""
    assert rule.radial is not None
    rows = perpendicular_rows(rule, weight, gradient, scalars, whole)
    if rows == 0:
        return direction
    along, square = whole.inner(weight, direction), whole.inner(weight, weight)
    if rows == 1:
        along, square = along.sum(), square.sum()
    radial: Tensor = rule.radial(along, square.sqrt(), **_given(rule.radial, scalars)).to(weight.dtype)
    if rows > 1:
        own = radial[whole.first_row : whole.first_row + len(weight)]
        radial = own.view(-1, *[1] * (weight.dim() - 1))
    return direction + radial * weight


def perpendicular_rows(
    rule: UpdateRule, weight: Tensor, gradient: Tensor, scalars: Mapping[str, float], whole: Whole
) -> int:
    """Return in how many rows a weight is perpendicular to its gradient: all that it has, or 1 as a whole, or 0."""
    assert rule.perpendicular is not None
    given, zero = _given(rule.perpendicular, scalars), torch.zeros((), dtype=torch.float64)
    if not rule.perpendicular(zero, zero, zero, zero + 1, **given):
        return 0  # where not even zeros are, nothing is, and nothing need be read
    products, squares, others = (whole.inner(a, b) for a, b in ((weight, gradient), (weight, weight), (gradient,) * 2))
    width, rows = (torch.tensor(n, dtype=torch.float64) for n in (whole.width, products.numel()))
    if bool(rule.perpendicular(products, squares.sqrt(), others.sqrt(), width, **given).all()):
        return products.numel()
    norms = (squares.sum().sqrt(), others.sum().sqrt())
    return int(rule.perpendicular(products.sum(), *norms, width * rows, **given))


def _given(function: Callable[..., Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: numbers[name] for name in _keywords(function)}


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the states and the arithmetic for a weight of that dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
