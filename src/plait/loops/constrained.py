"""Numbers and radii of balls that move with every training step, by first derivatives alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from plait.catalogue import paper
from plait.constrain.norm import NormBall
from plait.errors import BadInput, NonFinite
from plait.fields import Positive, Range
from plait.loops.base import Flat, Loss, Problem, as_tensors, from_tensors
from plait.loops.proximal import Saddle, Sizes, bounded, lagrangian, slopes
from plait.loops.tensors import losses
from plait.loops.tuning import FURTHEST, DerivativeTuner, Knob, knobs, link, set_numbers, unlink
from plait.math.projections import ball, cone
from plait.method import Ask, Method, Now, method
from plait.schedule import Tuned

Growth = Annotated[float, AfterValidator(Range(0, 0.5, closed="()"))]
"""A number in (0, 0.5)."""


@paper("yao2024constrained", key="lv-hba", theme="bilevel")
@method
class LVHBA(DerivativeTuner):
    """theta <- theta - eta (f_w(x, theta) + l g_w(x, theta) + (theta - w) / gamma_1), l <- [l + eta (g(x, theta) -
    (l - z) / gamma_2)]_+; x <- x - alpha (f_x(x, w) - f_x(x, theta) - l g_x(x, theta)), the optimizer's step of w by
    F_w / c_k + f_w(x, w) - (w - theta) / gamma_1, (x, w) <- project; z <- z + beta (l - z) / gamma_2.

    Each training step is one step of `lv_hba`, of the training objective f and the validation loss F, each on a batch;
    nothing is solved and no second derivative is taken. The bounds g are those of each `NormBall` whose radius is
    `Tuned`: |W|_F - r <= 0 of each of its layers, with the radii r in x; the projection is onto the cone of (r, W), and
    other weights are free. The rest of x are the raw numbers (logarithms, logits) of other fields that are `Tuned`, in
    which f must have a derivative: strengths of penalties, label smoothing and other terms of the loss. A radius moves
    only while its ball is in the way of its weight: start from small ones. F pulls at the weights themselves too: those
    that are left have learned from the validation set; where it has to stay apart, train anew under what was found.

    The step of w is the run's own: with SGD(lr=alpha, momentum=0) on whole batches it is the paper's. step_size: alpha;
    z_step_size: beta; lower_step_size: eta; proximity: (gamma_1, gamma_2); first_weight, growth: of c_k = first_weight
    (k + 1)^growth; multiplier_bound: of z. warmup: steps before the first. A step costs three further gradients and one
    of F. Keeps theta: one further copy of the trained weights. Stands before the balls in the list. Raises BadInput
    without a validation set, on several processes, and for a number in which f has no derivative.

    >>> from plait import train
    >>> from plait.constrain.norm import NormBall
    >>> from plait.schedule import Tuned
    >>> from plait.step.momentum import SGD
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> data, tuner = (x, x.sum(1)), LVHBA(step_size=0.1, lower_step_size=0.1)
    >>> methods = [tuner, NormBall(radius=Tuned(start=0.5)), SGD(lr=0.1, momentum=0.0)]
    >>> run = train(torch.nn.Linear(3, 1), data, methods=methods, validation=data, steps=100)
    >>> run.measures[repr(tuner)][-1]["NormBall.radius"] > 1.0
    True
    """

    step_size: Positive = 0.01
    z_step_size: Positive = 0.01
    lower_step_size: Positive = 0.01
    proximity: tuple[Positive, Positive] = (10.0, 10.0)
    first_weight: Positive = 1.0
    growth: Growth = 0.3
    multiplier_bound: Positive = 1000.0

    @property
    def sizes(self) -> Sizes:
        """The numbers of the method."""
        steps, bounds = (self.step_size, self.z_step_size, self.lower_step_size), (0.0, self.multiplier_bound)
        return Sizes(*steps, self.proximity, self.first_weight, self.growth, bounds)

    def state(self, model: nn.Module, now: Now) -> dict[str, Tensor]:
        """Return the memory; "x" holds the raw numbers, and radii as they are."""
        state = super().state(model, now)
        if "x" not in state:
            state["x"] = state["raw"].clone()
            for knob in self.radii(now, knobs(model, now.methods)):
                state["x"][knob.rows] = knob.tuned.start
        return state

    def radii(self, now: Now, found: Sequence[Knob]) -> list[Knob]:
        """Return the knobs that are radii of balls."""
        tuned = [m.radius for m in now.methods if isinstance(m, NormBall)]
        return [knob for knob in found if knob.tuned in tuned]

    def balls(self, model: nn.Module, now: Now, found: Sequence[Knob]) -> dict[int, list[Tensor]]:
        """Return the weights that each radius bounds, by its row in x."""
        bounds: dict[int, list[Tensor]] = {}
        radii = {knob.tuned: knob for knob in self.radii(now, found)}
        for m in now.methods:
            if isinstance(m, NormBall) and isinstance(m.radius, Tuned):
                first, step = radii[m.radius].rows.start, int(m.radius.each_layer)
                for i, (_, _, weight) in enumerate(m.targets(model, now)):
                    bounds.setdefault(first + i * step, []).append(weight)
        return bounds

    def tune(self, model: nn.Module, now: Now) -> None:
        """Move (theta, l), and keep what x and the gradient of w get in this step."""
        if now.step < self.warmup:
            return
        memory, found, sizes = self.state(model, now), knobs(model, now.methods), self.sizes
        number, trained, x = self.validation_batch(memory), dict(now.trained(model)), memory["x"]
        balls = {
            row: [_name(weight, trained) for weight in held] for row, held in self.balls(model, now, found).items()
        }

        def excess(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            values = [
                torch.linalg.vector_norm(weights[name].to(y.dtype)) - x[row]
                for row, held in balls.items()
                for name in held
            ]
            return torch.stack(values) if values else y.new_zeros(0)

        if "theta" not in memory:
            self._enter(model, now, found, x)
        pair = losses(model, now, found, [now.batch], lambda module: now.validate(module, number))
        problem = Problem(*pair, Flat(trained, "the model"), Flat(x, "the numbers"))
        y = problem.params.start.to(torch.promote_types(problem.params.start.dtype, torch.float32))
        if "theta" not in memory:
            self._begin(memory, problem, excess, x, y, found, now)
        saddle = from_tensors(Saddle, {n: t.to(y) if t.dim() else t for n, t in memory.items()})
        _, slope, values = lagrangian(problem, excess, saddle, x)
        saddle = saddle.follow(y, slope, values, sizes)
        below, _, _ = lagrangian(problem, excess, saddle, x)
        at, w = x.clone().requires_grad_(), y.clone().requires_grad_()
        value = problem.inner(y, at)
        (in_x,), (upper,) = slopes(value, at), slopes(problem.outer(w, x), w)
        if not torch.isfinite(value):
            return  # the run itself says which examples these are, or leaves them out
        still = torch.zeros_like(x), torch.zeros_like(y)  # F does not depend on x; the run itself asks for f_w
        in_x, in_w = saddle.directions(y, (still[0], upper), (in_x, still[1]), below, sizes)
        if not (torch.isfinite(in_x).all() and torch.isfinite(in_w).all()):
            raise NonFinite("LVHBA left the numbers: lower step_size and lower_step_size.")
        memory |= as_tensors(saddle) | {"direction": in_x, "addition": in_w}

    @torch.no_grad()
    def _enter(self, model: nn.Module, now: Now, found: Sequence[Knob], x: Tensor) -> None:
        """Bring the weights into their balls."""
        for row, weights in self.balls(model, now, found).items():
            for weight in weights:
                weight.copy_(ball(weight, float(x[row])))

    def _begin(
        self,
        memory: dict[str, Tensor],
        problem: Problem,
        excess: Loss,
        x: Tensor,
        y: Tensor,
        found: Sequence[Knob],
        now: Now,
    ) -> None:
        """Refuse numbers in which the objective has no derivative, and begin."""
        at, radii = x.clone().requires_grad_(), self.radii(now, found)
        (direct,) = slopes(problem.inner(y, at), at)
        self.require_derivatives(direct, [knob for knob in found if knob not in radii])
        values = bounded(problem, excess, x, y)
        memory |= as_tensors(Saddle(y, torch.zeros_like(values), torch.zeros_like(values)))

    def gradient(self, ask: Ask) -> Ask:
        """Add F_w / c_k - (w - theta) / gamma_1."""

        def asking(model: nn.Module, now: Now) -> Tensor:
            value, memory = ask(model, now), now.of(self)
            if "addition" in memory:
                trained = dict(now.trained(now.model))
                for name, part in Flat(trained, "the model").back(memory["addition"]).items():
                    p = trained[name]
                    if p.requires_grad:
                        p.grad = part if p.grad is None else p.grad + part
            return value

        return asking

    @torch.no_grad()
    def constrain(self, model: nn.Module, now: Now) -> None:
        """Move x, bring it and the weights to the nearest that are allowed, and end the step."""
        memory, found = self.state(model, now), knobs(model, now.methods)
        if "direction" not in memory:
            return
        memory.pop("addition")
        x = memory["x"] - self.step_size * memory.pop("direction")
        for row, weights in self.balls(model, now, found).items():
            nearest, radius = cone(weights, float(x[row]))
            for weight, moved in zip(weights, nearest, strict=True):
                weight.copy_(moved)
            x[row] = radius
        raw, radii = x.clone(), self.radii(now, found)
        for knob in radii:
            raw[knob.rows] = unlink(knob.tuned, x[knob.rows].clamp(knob.tuned.low, knob.tuned.high))
        raw = memory["raw"] = raw.clamp(-FURTHEST, FURTHEST)
        memory["x"] = raw.clone()
        for knob in radii:
            memory["x"][knob.rows] = link(knob.tuned, raw[knob.rows])
        saddle = from_tensors(Saddle, memory).relax(self.sizes)
        if not torch.isfinite(memory["x"]).all():
            raise NonFinite("LVHBA left the numbers: lower step_size and lower_step_size.")
        memory |= as_tensors(saddle)
        set_numbers(now, found, raw)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a list in which nothing is to be tuned, or in which a ball would act before its radius moves."""
        super().check(model, methods)
        for m in methods[: methods.index(self)]:
            if isinstance(m, NormBall):
                raise BadInput("LVHBA moves weights and radii together, before NormBall acts: put LVHBA first.")


def _name(weight: Tensor, trained: dict[str, nn.Parameter]) -> str:
    """Return the name of a weight."""
    return next(name for name, p in trained.items() if p is weight)
