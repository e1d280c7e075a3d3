"""Hypergradients by implicit differentiation while the model trains, one product with the Hessian at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import NonFinite
from plait.fields import Count, Positive, Probability, ScheduledPositive, Size
from plait.loops.tensors import objective
from plait.loops.tuning import FURTHEST, DerivativeTuner, knobs, set_numbers
from plait.method import Now, method


@paper("hao2024bilevel", key="bo-rep", theme="bilevel")
@method
class BOREP(DerivativeTuner):
    """z <- z - nu (H z - grad_w F), m <- beta m + (1 - beta) (grad_u F - J^T z), u <- u - lr m / |m|,
    with H = d^2 f / dw^2 and J = d^2 f / dw du of the training objective f, and the validation loss F.

    z follows H^-1 grad_w F by one stochastic step on the linear system for each step of u, m is the momentum of the
    hypergradient, and its length is divided out: F may be as steep as it likes (smoothness that grows with the slope).
    The weights are refined for `warmup` steps before u first moves; then `lower_steps` steps of training alternate with
    `upper_steps` steps of (z, m, u) at the same weights, on the batch at hand and a batch of the validation set. The
    training steps are the run's own, in place of the paper's projected SGD, whose ball the authors' code leaves out
    too; J^T z is taken at the z before its step and on training data (their code: after it, on validation data).

    u are the raw numbers (logarithms, logits) of fields that are `Tuned`. f must be differentiable in them: strengths
    of penalties, label smoothing and other terms of the loss; rates of dropout and noise are STN's. lr: the length of a
    step of u, which may be scheduled. linear_lr: nu, below 2 / the largest eigenvalue of H. momentum: beta. A step of u
    costs about four gradients. Keeps z: one further copy of the trained weights. Raises BadInput without a validation
    set, on several processes, or for a number in which f has no derivative.

    >>> from plait import schedule, train
    >>> from plait.penalty.norm import L2
    >>> from plait.step.adam import AdamW
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> data, tuner = (x, x.sum(1)), BOREP(lr=0.1, linear_lr=0.1, warmup=20)
    >>> methods = [L2(strength=schedule.Tuned(start=0.1)), tuner, AdamW(lr=0.03)]
    >>> run = train(nn.Linear(3, 1), data, methods=methods, validation=data, steps=60)
    >>> run.measures[repr(tuner)][-1]["L2.strength"] < 0.05
    True
    """

    lr: ScheduledPositive = 0.03
    warmup: Size = 100
    momentum: Probability = 0.9
    linear_lr: Positive = 0.01
    lower_steps: Count = 3
    upper_steps: Count = 3

    def tune(self, model: nn.Module, now: Now) -> None:
        """Move z, m and u, at the steps at which that is due."""
        late = now.step - self.warmup
        if late >= 0 and late % self.lower_steps == 0:
            for _ in range(self.upper_steps):
                self.upper_step(model, now)

    def upper_step(self, model: nn.Module, now: Now) -> None:
        """Move z, m and u once."""
        state, found = self.state(model, now), knobs(model, now.methods)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        weights: list[Tensor] = [p for _, p in named]
        raw = state["raw"].clone().requires_grad_()
        set_numbers(now, found, raw, differentiable=True)
        value = objective(model, now)
        *slopes, direct = _gradients(value, [*weights, raw], again=True)
        if "momentum" not in state:
            self.require_derivatives(direct, found)
            self.require_second_derivatives(torch.stack([slope.sum() for slope in slopes]).sum())
        z = [state.setdefault(f"z {name}", torch.zeros_like(p)) for name, p in named]
        across = torch.stack([(slope * part).sum() for slope, part in zip(slopes, z, strict=True)]).sum()
        *products, cross = _gradients(across, [*weights, raw])
        upward = _gradients(now.validate(model, self.validation_batch(state)), weights)
        for (name, _), part, product, slope in zip(named, z, products, upward, strict=True):
            state[f"z {name}"] = part - self.linear_lr * (product - slope)
        momentum = state.get("momentum", torch.zeros_like(cross))
        momentum = state["momentum"] = self.momentum * momentum - (1 - self.momentum) * cross
        length = torch.linalg.vector_norm(momentum)
        if not bool(torch.isfinite(length)):
            raise NonFinite(
                "the hypergradient of BOREP is not finite: lower linear_lr, below 2 / the largest curvature."
            )
        if length > 0:
            state["raw"] = (state["raw"] - now.at(self.lr) * momentum / length).clamp(-FURTHEST, FURTHEST)


def _gradients(value: Tensor, inputs: list[Tensor], again: bool = False) -> list[Tensor]:
    """Return the gradients of a value, 0 where it does not depend on an input; with a graph of their own if `again`."""
    if not value.requires_grad:
        return [torch.zeros_like(each) for each in inputs]
    found = torch.autograd.grad(value, inputs, create_graph=again, allow_unused=True, materialize_grads=True)
    return list(found) if again else [g.detach() for g in found]
