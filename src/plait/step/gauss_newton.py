"""The Gauss-Newton step, exactly: what curvature a batch shows is inverted, in as many equations as it has outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.batch import Batch, weighted_sum
from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import ScheduledNonNegative, ScheduledPositive, ScheduledProbability
from plait.layers import matches_weight, refuse_batch_norm
from plait.math.gauss_newton import gauss_newton
from plait.math.logits import dense
from plait.math.per_example import per_example_jacobians
from plait.method import Ask, Method, Now, method
from plait.passes import reversible
from plait.sharding import world_size
from plait.step.base import Rule

MOST = 16384
"""Equations that a step solves at most: their matrix takes 2 GiB."""


def slopes(outputs: Tensor, batch: Batch, now: Now) -> tuple[Tensor, Tensor]:
    """Return the first and second derivatives [n, c] and [n, c, c] of the objective with respect to the outputs.

    The second are made of their eigenvectors with positive eigenvalues: all of them, if the loss is convex.
    """
    held = outputs.detach().double().requires_grad_()
    with torch.enable_grad():
        misfit = now.misfit(held, batch.target, now)
        objective = weighted_sum(misfit, batch.weight) / batch.mass().clamp_min(torch.finfo(torch.float32).tiny)
        (first,) = torch.autograd.grad(objective, held, create_graph=True)
        columns = first.reshape(len(first), -1)
        second = [torch.zeros_like(columns)] * columns.shape[1]
        if columns.requires_grad:
            second = [
                torch.autograd.grad(column.sum(), held, retain_graph=True)[0].reshape(columns.shape)
                for column in columns.unbind(1)
            ]
    values, vectors = torch.linalg.eigh(torch.stack(second, 1))
    return columns.detach(), (vectors * values.clamp_min(0)[:, None]) @ vectors.mT


@paper("korbit2024exact", key="egn")
@method
class EGN(Rule):
    """w <- w - lr (m + weight_decay * w), m <- momentum * m + (1 - momentum) d, (H + damping * I) d = gradient.

    H = J^T Q J is the Gauss-Newton matrix of the batch: J [n c, weights] the derivatives of the c outputs of each of n
    examples, Q the second derivatives of the misfit with respect to the outputs (cross entropy: diag(p) - p p^T; half
    the squared error: I), weighted as the objective is. d is exact: by the Duncan-Guttman identity, with r the first
    derivatives of the misfit, d = J^T (Q J J^T + damping * I)^-1 r, a system of n c equations (Korbit et al.). Any
    misfit will do, with what loss methods make of it; of one that is not convex, the convex part of Q is kept. A
    penalty's gradient is multiplied by (H + damping * I)^-1 too, H being the misfit's alone.

    damping > 0: the larger, the shorter the step and the nearer to plain descent at the rate lr / damping; small
    batches know little of H and need more of it. lr 1 is Newton's step. The paper's line search and its adaptive
    damping are not here: `damping` and `lr` may be schedules.

    A step costs about 1 + c times the passes of a plain one, n c products of gradients, and a system of n c equations;
    it holds n c gradients. Measured with c = 10 and 1810 weights (benchmarks/second_order.py): 6, 17 and 136 times
    AdamW's training step at batches of 8, 32 and 128. So it is for small batches and few outputs, and is refused above
    16384 equations. Examples must not mix in the model (no batch normalization in training mode). It asks for
    derivatives of its own, so it works inside `plait.train`, on one process, before other gradient methods, which then
    act on d; in your own loop use `plait.math.gauss_newton`. The authors' first solver for cross entropy decomposed a
    matrix that is not symmetric by Cholesky; the system above is solved as it is. Raises BadInput in other loops, on
    several processes, behind another gradient method, for a model with batch normalization, and above that number of
    equations.

    >>> from plait import train
    >>> x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(3, 1), (x, x.sum(1)), methods=[EGN(damping=1e-6)], steps=2, batch_size=32)
    >>> run.history[1]["objective"] < 1e-6
    True
    """

    lr: ScheduledPositive = 1.0
    damping: ScheduledPositive = 1.0
    momentum: ScheduledProbability = 0.0
    weight_decay: ScheduledNonNegative = 0.0

    first: ClassVar[bool] = True

    def __new__(cls, parameters: Any = None, /, *rest: Any, **given: Any) -> Any:
        """Return the method; there is no optimizer without the derivatives that `plait.train` provides."""
        if parameters is not None:
            raise BadInput(
                "EGN takes derivatives of each example: use it in plait.train, or plait.math.gauss_newton with SGD."
            )
        return super().__new__(cls)

    @staticmethod
    def direction(weight: Any, gradient: Any, exp_avg: Any, *, momentum: float, weight_decay: float) -> tuple[Any, ...]:
        """Return (direction, m); the gradient is d."""
        exp_avg = momentum * exp_avg + (1 - momentum) * gradient
        return exp_avg + weight_decay * weight, exp_avg

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse what changes gradients that are not used, and layers that mix examples."""
        super().check(model, methods)
        for other in methods[: next((i for i, m in enumerate(methods) if m is self), 0)]:
            if hasattr(other, "calls"):  # a method of the gradient place
                name = type(other).__name__
                raise BadInput(
                    f"EGN takes derivatives of its own, which {name} would not change: put EGN before {name}."
                )
        refuse_batch_norm(self, model)

    def gradient(self, ask: Ask) -> Ask:
        """Put d in place of the gradient."""

        def asked(model: nn.Module, now: Now) -> Tensor:
            value = ask(model, now)
            plain = getattr(model, "_orig_mod", model)
            parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad and self.steps(name)}
            parameters = {name: p for name, p in parameters.items() if p.grad is not None}
            with torch.no_grad():
                penalties = self.penalties(ask, model, parameters, now) if len(now.parts) > 1 else None
                for p, d in zip(parameters.values(), self.solved(plain, parameters, penalties, now), strict=True):
                    p.grad = d.view(p.shape).to(p.dtype)
            return value

        return asked

    def steps(self, name: str) -> bool:
        """Say whether a parameter of that name is stepped."""
        return matches_weight(self.where, name)

    def penalties(self, ask: Ask, model: nn.Module, parameters: Mapping[str, nn.Parameter], now: Now) -> list[Tensor]:
        """Return the gradients of all but the misfit: those of the batch with no weight on any example."""
        held, parts, batch = [(p, p.grad) for p in model.parameters()], now.parts, now.batch
        restore = reversible(model, now)
        model.zero_grad(set_to_none=True)
        now.batch = batch.uncounted()
        with torch.enable_grad():
            ask(model, now)
        found = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters.values()]
        now.batch, now.parts = batch, parts
        restore()
        for p, gradient in held:
            p.grad = gradient
        return found

    def solved(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], penalties: list[Tensor] | None, now: Now
    ) -> list[Tensor]:
        """Return d of the batch, in the order of the parameters, each flat."""
        if world_size() > 1:
            raise BadInput("EGN solves one system for the whole batch: run it on one process.")
        restore = reversible(model, now)  # a loss may remember each time that it is called
        count = len(now.batch)
        each = dense(now.call(model, now.batch.take(slice(0, 1)).inputs)).numel()
        if count * each > MOST:
            raise BadInput(
                f"EGN would solve {count * each} equations, one for each output of each example: use "
                f"{f'batches of at most {MOST // each}' if each <= MOST else 'another step'}."
            )
        jacobians, outputs = per_example_jacobians(model, parameters, now.batch, now)
        residual, curvature = slopes(outputs, now.batch, now)
        restore()
        pieces = [jacobians[name] for name in parameters]
        return gauss_newton(pieces, curvature, residual.flatten(), float(now.at(self.damping)), penalties)
