"""Bilevel loops between training steps: the training problem is solved, and the numbers follow its solution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.constrain.base import Constraint
from plait.errors import BadInput
from plait.fields import Count, Size
from plait.layers import evaluating
from plait.loops.base import Flat, Problem
from plait.loops.tensors import losses, training_batches, validation_misfit
from plait.loops.tuning import FURTHEST, DerivativeTuner, Knob, knobs
from plait.method import Method, Now, method


@method
class SolvingTuner(DerivativeTuner):
    """A tuner that solves the training problem every so often, and moves the raw numbers by how its solution moves.

    The problem is the objective (loss and penalties) on the data as they are, in evaluation mode: without dropout, at
    the running statistics, the same at every call. Training steps go on in between, and are its warm start; the model
    takes the solution over. warmup: steps before the first time. every: steps from one time to the next. batches: how
    many batches of the training and of the validation set the problem is of, held in memory together; 0 for all.
    iterations: of one solve, and of one linear system, at most.
    """

    warmup: Size = 100
    every: Count = 50
    batches: Size = 0
    iterations: Count = 100

    reports: ClassVar[tuple[str, ...]] = ()
    """What `measure` tells of the memory, beside the numbers and the cost."""

    def iterate(self, problem: Problem, x: Tensor, lam: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the weights and raw numbers after one iteration, whose state is in `memory`."""
        raise NotImplementedError

    def tune(self, model: nn.Module, now: Now) -> None:
        """Iterate once, at the steps at which that is due; the model takes over the weights that were found."""
        if now.step < self.warmup or (now.step - self.warmup) % self.every:
            return
        memory, found = self.state(model, now), knobs(model, now.methods)
        trained = dict(now.trained(model))
        with evaluating(model), second_derivatives(type(self).__name__):
            pair = losses(model, now, found, training_batches(now, self.batches), validation_misfit(now, self.batches))
            problem = Problem(*pair, Flat(trained, "the model"), Flat(memory["raw"], "the numbers"))
            x = problem.params.start.to(torch.promote_types(problem.params.start.dtype, torch.float32))
            if "evaluations" in memory:
                problem.evaluations, problem.scale = int(memory["evaluations"]), float(memory["scale"])
            else:
                self._look(problem, x, memory["raw"], found)
            x, raw = self.iterate(problem, x, memory["raw"], memory)
        memory["raw"] = raw.clamp(-FURTHEST, FURTHEST)
        memory["evaluations"] = torch.tensor(problem.evaluations)
        memory["scale"] = torch.tensor(problem.scale, dtype=torch.float64)
        with torch.no_grad():
            for name, value in problem.params.back(x).items():
                trained[name].copy_(value)

    def _look(self, problem: Problem, x: Tensor, lam: Tensor, found: list[Knob]) -> None:
        """Refuse numbers in which the objective has no derivative, and models without second derivatives."""
        x, lam = x.clone().requires_grad_(), lam.clone().requires_grad_()
        slope, direct = torch.autograd.grad(
            problem.inner(x, lam), (x, lam), create_graph=True, allow_unused=True, materialize_grads=True
        )
        self.require_derivatives(direct, found)
        self.require_second_derivatives(slope)

    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return the tuned numbers by name, how the last iteration went, and what all of them cost.

        "evaluations" counts gradients of the objective and products with its second derivatives.
        """
        memory = now.of(self)
        shown = [name for name in (*self.reports, "evaluations") if name in memory]
        return super().measure(model, now) | {name: memory[name].item() for name in shown}

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a list in which nothing is to be tuned, or in which weights are bound."""
        super().check(model, methods)
        for m in methods:
            if isinstance(m, Constraint):
                raise BadInput(
                    f"{type(self).__name__} solves the training problem without the constraint of {type(m).__name__}: "
                    "drop it, or tune with STN."
                )


@contextlib.contextmanager
def second_derivatives(title: str) -> Iterator[None]:
    """Say in one sentence that a part of the model cannot be differentiated twice."""
    try:
        yield
    except RuntimeError as problem:
        if "derivative for" not in str(problem):  # torch says for which of its functions
            raise
        raise BadInput(
            f"{title} needs second derivatives, and a part of the model has none ({problem}): tune with STN."
        ) from None
