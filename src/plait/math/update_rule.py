"""An update rule, written once as the mathematics of one element of a weight; and the plain loop that follows it.

A rule is `direction(weight, gradient, *states, *, scalars) -> (direction, *new states)`, and the weight becomes
weight - rate * direction. A rule that also looks at a whole tensor adds `trust(weight_norm, direction_norm, *,
scalars)`, and the weight becomes weight - rate * trust * direction; or `normed(weight, gradient, *states, *,
scalars)`, of whose numbers the norm over the tensor is the keyword `norm` of its direction. The names of the states and
the scalars stand in the signature and nowhere else. The same text is run on tensors here, and compiled to one pass over
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

    def __post_init__(self) -> None:
        assert self.trust is None or self.normed is None, "a rule looks at whole tensors in one way only"

    @cached_property
    def states(self) -> tuple[str, ...]:
        """The names of the running states, each a tensor in the weight's shape that starts at zero."""
        parameters = inspect.signature(self.direction).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)[2:]

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        """The names of the numbers that are the same for all elements of a tensor, but for the rate."""
        functions = [f for f in (self.direction, self.trust, self.normed) if f is not None]
        return tuple(dict.fromkeys(name for f in functions for name in _keywords(f) if name != NORM))

    @property
    def whole(self) -> bool:
        """Say whether the rule looks at a whole tensor before it steps an element of it."""
        return self.trust is not None or self.normed is not None


def plain_step(
    rule: UpdateRule,
    weight: Tensor,
    gradient: Tensor,
    states: Mapping[str, Tensor],
    scalars: Mapping[str, float],
    norm: Callable[[Tensor], Tensor] = torch.linalg.vector_norm,
) -> None:
    """Take one step in place, in torch's own calls: the oracle of the kernels, and what runs where they cannot.

    Computes in the dtype of the states (float32, or float64 for a float64 weight) and rounds to the weight's dtype
    last. norm: of a whole tensor, where only a part of it is at hand.

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
    numbers: dict[str, Any] = dict(scalars)

    def called(function: Callable[..., Any], *elements: Tensor) -> Any:
        return function(*elements, **{name: numbers[name] for name in _keywords(function)})

    if rule.normed is not None:
        numbers[NORM] = norm(called(rule.normed, held, gradient, *states.values()))
    direction, *new = called(rule.direction, held, gradient, *states.values())
    rate = numbers["rate"]
    if rule.trust is not None:
        rate = rate * called(rule.trust, norm(held), norm(direction))
    weight.copy_(held - rate * direction)
    for state, value in zip(states.values(), new, strict=True):
        state.copy_(value)


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the states and the arithmetic for a weight of that dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
