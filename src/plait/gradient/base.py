"""Methods that change what is asked of the gradient oracle: ask(model, now) fills `.grad`, returns the objective."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.layers import matches_weight
from plait.method import Ask, Method, Now, method
from plait.passes import frozen_statistics, kept, rewind
from plait.sharding import full

TINY = 1e-12
"""Keeps a direction finite where the gradient is 0."""
LEAST = 1e-15
"""The squares of what a shorter vector holds are too small for float32."""


@method
class Gradient(Method):
    """A method of the gradient place: `gradient(ask)` returns another oracle. `calls` says how often it asks."""

    calls: ClassVar[int] = 1
    first: ClassVar[bool] = False
    """Whether it differentiates past the oracle that it is given: then it stands before all other gradient methods."""

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse what stands before a method that must be first."""
        before = methods[: next((i for i, m in enumerate(methods) if m is self), 0)]
        for other in before if self.first else []:
            if hasattr(other, "calls") or hasattr(other, "first"):  # it is of the gradient place
                one, two = type(self).__name__, type(other).__name__
                raise BadInput(
                    f"{one} takes gradients of its own, which {two} would not change: put {one} before {two}."
                )

    def parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters whose name, or whose layer's name, matches `where`."""
        yield from ((name, parameter) for name, parameter in self.named(model) if parameter.requires_grad)

    def named(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters, trained or not, whose name, or whose layer's name, matches `where`."""
        for name, parameter in model.named_parameters():
            if matches_weight(self.where, name):
                yield name, parameter

    def gradients(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients of those parameters, where there are any."""
        for name, parameter in self.parameters(model):
            if parameter.grad is not None:
                yield name, parameter.grad


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all entries together, in float32 at least; in float64 if squares leave its range.

    >>> norm([torch.tensor([3.0]), torch.tensor([[4.0]])]), norm([torch.tensor([3e30]), torch.tensor([4e30])])
    (tensor(5.), tensor(5.0000e+30, dtype=torch.float64))
    """
    held = list(tensors)
    if not held:
        return torch.zeros(())

    def total(least: torch.dtype) -> Tensor:
        norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, least)) for t in held]
        return full(torch.linalg.vector_norm(torch.stack(norms)))

    found = total(torch.float32)
    return found if LEAST < float(found) < math.inf else total(torch.float64)  # which costs a copy of each tensor


def along(direction: list[Tensor], length: Tensor | float) -> list[Tensor]:
    """Return the vector of that length in a direction, over all tensors together; 0 where the direction is 0."""
    scale = length / (norm(direction) + TINY)
    return [d * scale for d in direction]


def ask_again(ask: Ask, model: nn.Module, now: Now) -> None:
    """Fill `.grad` anew, at weights that a method has moved; the running statistics and `now.parts` stay."""
    parts, batch = now.parts, now.batch
    for parameter in model.parameters():
        parameter.grad = None
    with frozen_statistics(model):
        ask(model, now)
    now.parts, now.batch = parts, batch


class Neighbourhood:
    """The oracle's gradients at the weights and at points near them: `value` and `here` at the weights themselves.

    All are asked on the same micro-batches with the same random numbers (the same dropout), since they are of one
    function; running statistics of normalization come from the first call alone. `here` and what `at` returns hold the
    gradients of those `parameters` that the objective reaches.
    """

    def __init__(self, ask: Ask, model: nn.Module, now: Now, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.ask, self.model, self.now, self.back = ask, model, now, rewind(now)
        self.value = ask(model, now)
        self.parameters = [p for _, p in parameters if p.grad is not None]
        self.here = [p.grad for p in self.parameters if p.grad is not None]
        self.others = [(p, p.grad) for p in model.parameters() if p.requires_grad]

    def at(self, *offsets: list[Tensor]) -> list[Tensor]:
        """Return the gradients at the weights plus the offsets, and leave them, of all parameters, in `.grad`.

        The weights are put back from copies, bitwise.
        """
        with kept(self.parameters):
            with torch.no_grad():
                for offset in offsets:
                    for parameter, change in zip(self.parameters, offset, strict=True):
                        parameter.add_(change.to(parameter.dtype))
            self.back()
            ask_again(self.ask, self.model, self.now)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def leave(self, gradients: list[Tensor]) -> None:
        """Leave these in `.grad`; all other parameters have their gradient at the weights themselves."""
        for parameter, gradient in self.others:
            parameter.grad = gradient
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
