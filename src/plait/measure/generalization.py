"""How far the loss on new data will be from that on the training data, told from gradients alone."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from plait.batch import Batch
from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Fraction, Positive, Range
from plait.layers import evaluating
from plait.math.per_example import per_example_gradients
from plait.measure.base import learning_rate_of, remember, remembered, trained
from plait.method import Method, Now, method
from plait.passes import kept


@paper("roberts2021sgd", key="sgd-gen-gap", kind="probe")
@method
class GeneralizationGap(Method):
    """The gap between test and training loss grows by eta tr(C) / N in a step of learning rate eta, C the covariance of
    the gradients of single examples, N the number of training examples; on average over training sets.

    The training loss falls by eta (|g|^2 + tr(C) / N), the test loss by eta |g|^2, g the mean gradient: to first order
    in eta and for weights that do not yet depend on the examples, so it is a forecast for early in training, for SGD
    (with or without batches; momentum mu makes it 1 / (1 - mu) times as much). The predicted gap is summed over the
    run, the change between two measurements by the trapezoidal rule: set measure_every.

    lr: the run's own, unless given. where: the weights whose part of the gap is told. C is estimated without bias from
    `batches` batches. Returns {"trace of covariance", "gradient norm" (|g|^2, without bias), "change per step",
    "predicted gap"}. Costs one backward pass an example. Raises BadInput for fewer than two examples, where nothing
    that matches is trained, and where no learning rate is known.

    >>> GeneralizationGap(lr=0.1, batches=4)
    GeneralizationGap(lr=0.1, batches=4)
    """

    lr: Positive | None = None
    batches: Count = 1

    def measure(self, model: nn.Module, now: Now) -> dict[str, float]:
        """Return the gap's change in a step, and its sum so far."""
        rate, examples = learning_rate_of(self, self.lr, now), now.examples
        parameters, total, squares, count = trained(model, self.where), None, 0.0, 0
        with evaluating(model), torch.enable_grad():
            for batch in now.calibration(self.batches):
                for gradient in per_example_gradients(model, batch, now, parameters):
                    one = torch.cat([g.double().flatten() for g in gradient])
                    total = one if total is None else total.add_(one)
                    squares, count = squares + float(one.square().sum()), count + 1
        if total is None or count < 2:
            raise BadInput("GeneralizationGap needs the gradients of at least two examples: measure more batches.")
        mean = float((total / count).square().sum())
        trace = (squares - count * mean) / (count - 1)
        change = rate * trace / (examples or count)
        held = now.of(self)
        step, before, gap = held.get("so far", torch.tensor([0.0, change, 0.0], dtype=torch.float64)).tolist()
        gap += (now.step - step) * (before + change) / 2
        held["so far"] = torch.tensor([now.step, change, gap], dtype=torch.float64)
        norm = mean - trace / count
        return {"trace of covariance": trace, "gradient norm": norm, "change per step": change, "predicted gap": gap}


def gradient_term(losses: Tensor, slopes: Tensor, ratio: float, variance: float = 1.0, points: int = 65) -> float:
    """(v / 2) int_0^r E[exp(-a l) |dl/dx|^2] / E[exp(-a l)] da: what the moments of the risk add to the bound, for one
    choice of weights; losses l and squared slopes |dl/dx|^2 [n], r = lambda / m, trapezoidal rule.

    >>> gradient_term(torch.ones(3), torch.full((3,), 2.0), 0.5)
    0.5
    """
    places = torch.linspace(0, ratio, points, dtype=torch.float64)
    weights = torch.softmax(-places[:, None] * losses.double(), 1)
    return variance / 2 * float(torch.trapezoid(weights @ slopes.double(), places))


@paper("gat2022importance", key="gradnorm-pac", kind="probe")
@method
class GradientNormBound(Method):
    """E_q L <= E_q L_S + (KL(q, p) + ln(1 / delta) + ln E_p exp(lambda G(w))) / lambda with probability 1 - delta, and
    G(w) = (v / 2) int_0^(lambda / m) E[exp(-a l) |dl/dx|^2] / E[exp(-a l)] da: the gradient of the loss in the inputs
    takes the place of a bound on the loss.

    A PAC-Bayes bound on the risk L of weights drawn from q = N(w, s^2), from the risk L_S on m examples; p = N(w_0,
    s^2) is centred at the start of training, which must not depend on the examples; KL = |w - w_0|^2 / (2 s^2). G
    follows from the logarithmic Sobolev inequality of the inputs, with the constant v: for Gaussian inputs the largest
    eigenvalue of their covariance. Expectations are means over the examples measured and over `draws` of weights, so
    the figure is an estimate of the bound, and as loose as such bounds are.

    deviation: s. power: lambda = m^power. delta: in (0, 1). Put it in the list before training: it notes the start.
    Returns {"bound", "empirical risk" (E_q L_S), "divergence" (KL), "gradient term" (ln E_p exp(lambda G) / lambda),
    "gradient norm" (mean |dl/dx|^2 at w)}. Raises BadInput for another delta, and where inputs are not one tensor of
    real numbers.

    >>> GradientNormBound(deviation=0.05)
    GradientNormBound(deviation=0.05)
    """

    deviation: Positive = 0.03
    power: Fraction = 0.5
    delta: Annotated[float, AfterValidator(Range(0, 1, closed="()"))] = 0.05
    variance: Positive = 1.0
    draws: Count = 4
    batches: Count = 4

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Note where training starts."""
        remember(model, self.where, now.of(self))

    def measure(self, model: nn.Module, now: Now) -> dict[str, float]:
        """Return the bound at the present weights."""
        held = now.of(self)
        named = remembered(model, held)
        if not named:
            raise BadInput("GradientNormBound has not seen the start: put it in the list of methods before training.")
        batches = list(now.calibration(self.batches))
        examples = now.examples or sum(len(b) for b in batches)
        strength = examples**self.power
        start, parameters = [held[f"start/{name}"] for name in named], list(named.values())
        own = [p.detach().clone() for p in parameters]
        apart = sum(float((p - q).double().square().sum()) for p, q in zip(own, start, strict=True))
        divergence = apart / (2 * self.deviation**2)
        with evaluating(model), kept(parameters):
            risks = [float(loss.mean()) for loss, _ in self.drawn(model, now, parameters, own, batches)]
            terms = [gradient_term(*pair, strength / examples, self.variance)
                     for pair in self.drawn(model, now, parameters, start, batches)]  # fmt: skip
        _, slopes = losses_and_slopes(model, now, batches)
        moments = torch.tensor(terms, dtype=torch.float64) * strength
        term = (float(torch.logsumexp(moments, 0)) - math.log(len(terms))) / strength
        risk = sum(risks) / len(risks)
        return {
            "bound": risk + (divergence + math.log(1 / self.delta)) / strength + term,
            "empirical risk": risk,
            "divergence": divergence,
            "gradient term": term,
            "gradient norm": float(slopes.mean()),
        }

    def drawn(
        self, model: nn.Module, now: Now, parameters: list[nn.Parameter], centre: list[Tensor], batches: list[Batch]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the losses and squared slopes of all examples for each of `draws` weights around a centre."""
        found = []
        for _ in range(self.draws):
            with torch.no_grad():
                for parameter, middle in zip(parameters, centre, strict=True):
                    noise = torch.randn(parameter.shape, generator=now.generator).to(parameter)
                    parameter.copy_(middle + self.deviation * noise)
            found.append(losses_and_slopes(model, now, batches))
        return found


def losses_and_slopes(model: nn.Module, now: Now, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Return, for each example, its loss and the squared norm of the loss's gradient in the input, both [n]."""
    losses, slopes = [], []
    for batch in batches:
        if not isinstance(batch.inputs, Tensor) or not batch.inputs.is_floating_point():
            raise BadInput("GradientNormBound needs inputs that are one tensor of real numbers: drop it for this data.")
        now.batch = batch
        inputs = batch.inputs.detach().clone().requires_grad_()
        with torch.enable_grad():
            misfit = now.misfit(now.call(model, inputs), batch.target, now)
            (slope,) = torch.autograd.grad(misfit.reshape(len(batch), -1).mean(1).sum(), inputs)
        losses.append(misfit.detach().reshape(len(batch), -1).mean(1))
        slopes.append(slope.flatten(1).square().sum(1))
    return torch.cat(losses), torch.cat(slopes)
