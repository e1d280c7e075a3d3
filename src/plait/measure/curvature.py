"""The curvature of the training loss: its eigenvalues, and how those of a small batch differ from those of all data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from plait.batch import Batch, weighted_sum
from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.layers import evaluating
from plait.math.curvature import Operator, gauss_newton, hessian
from plait.math.lanczos import Density, lanczos, probe, spectral_density
from plait.math.logits import dense
from plait.measure.base import curve, mean_misfit, trained
from plait.method import Method, Now, method

Matrix = Literal["hessian", "gauss-newton"]


def curvature(
    model: nn.Module, now: Now, batches: Sequence[Batch], matrix: Matrix = "hessian", where: str = ".*"
) -> tuple[Operator, int]:
    """Return products with the Hessian, or the Gauss-Newton matrix, of the mean misfit of batches, and its size."""
    parameters = trained(model, where)

    def output(batch: Batch) -> Tensor:
        now.batch = batch
        made: Tensor = dense(now.call(model, batch.inputs))
        return made

    def misfit(batch: Batch, made: Tensor) -> Tensor:
        now.batch = batch
        return weighted_sum(now.misfit(made, batch.target, now), batch.weight) / batch.mass().clamp_min(1)

    if matrix == "hessian":
        operator = hessian([partial(mean_misfit, model, batch, now) for batch in batches], parameters)
    else:
        operator = gauss_newton([(partial(output, batch), partial(misfit, batch)) for batch in batches], parameters)
    return operator, sum(p.numel() for p in parameters)


def drawn(found: Density) -> dict[str, Any]:
    """Return the curve of a density of eigenvalues."""
    places, density = found.smoothed()
    floor = float(density.max()) * 1e-8
    return curve(places, {"density": density.clamp_min(floor)}, across="eigenvalue", along="density", log="y")


@paper("ghorbani2019investigation", key="hessian-spectrum", kind="ground")
@method
class HessianSpectrum(Method):
    """(1 / size) sum_i delta(t - lambda_i) of the Hessian of the training loss, by stochastic Lanczos quadrature.

    From `probes` runs of `iterations` products each, on `batches` batches of training data in evaluation mode, over the
    trained parameters that `where` names. matrix: "hessian", or "gauss-newton" (J^T A J, without the curvature of the
    network). A product costs about two gradients; memory: `iterations` vectors of the parameters' size.

    Returns {"largest", "smallest" (eigenvalues, approached from inside), "trace", "frobenius" (root of the sum of their
    squares), "density": a curve}. The trace is Hutchinson's estimate, unbiased; more probes make it and the norm surer.
    Raises BadInput where nothing that matches is trained, without training data, and for a curvature that is not
    finite.

    >>> HessianSpectrum(iterations=10)
    HessianSpectrum(iterations=10)
    """

    batches: Count = 1
    iterations: Count = 20
    probes: Count = 1
    matrix: Matrix = "hessian"

    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return the spectrum's figures at the present weights."""
        found = self.spectrum(model, now)
        ends = {"largest": float(found.values.max()), "smallest": float(found.values.min())}
        return {**ends, "trace": found.trace, "frobenius": found.frobenius, "density": drawn(found)}

    def spectrum(self, model: nn.Module, now: Now) -> Density:
        """Return the density of eigenvalues as point masses."""
        with evaluating(model):
            operator, size = curvature(model, now, list(now.calibration(self.batches)), self.matrix, self.where)
            device = next(model.parameters()).device
            return spectral_density(operator, size, now.generator, self.probes, self.iterations, device)


def effective_batch(batch_size: float, examples: float) -> float:
    """b = B / (1 - B / N): the size of a batch drawn from infinitely many examples with the noise of B out of N."""
    return math.inf if batch_size >= examples else batch_size / (1 - batch_size / examples)


def extreme_of_batch(value: float, noise: float, batch: float) -> float:
    """Return the largest eigenvalue of a batch's Hessian: lambda + s^2 / (b lambda) if lambda > s / sqrt(b), else the
    edge of the noise, 2 s / sqrt(b).

    value: lambda, the largest eigenvalue over all data; noise: s = sqrt(P) sigma, for P parameters and the standard
    deviation sigma of an entry of one example's Hessian; batch: b, the effective batch. The smallest one is the
    negative of this for the negative.

    >>> extreme_of_batch(2.0, 1.0, 4.0), extreme_of_batch(0.1, 1.0, 4.0), extreme_of_batch(2.0, 1.0, math.inf)
    (2.125, 1.0, 2.0)
    """
    edge = noise / math.sqrt(batch)
    return value + edge**2 / value if value > edge else 2 * edge


def scaled_learning_rate(rate: float, batch_size: float, new_batch_size: float, rule: Literal["sgd", "adam"]) -> float:
    """rate (B' / B) for SGD, rate sqrt(B' / B) for Adam and others that divide by a root of squared gradients.

    Holds while the noise decides the largest eigenvalue: below the critical batch size that BatchCurvature reports.

    >>> scaled_learning_rate(0.1, 32, 128, "sgd"), scaled_learning_rate(1e-3, 32, 128, "adam")
    (0.4, 0.002)
    """
    return rate * math.pow(new_batch_size / batch_size, 1.0 if rule == "sgd" else 0.5)


def heavy_ball(largest: float, smallest: float) -> tuple[float, float]:
    """Return Polyak's learning rate (2 / (sqrt(L) + sqrt(m)))^2 and momentum, the same with sqrt(L) - sqrt(m) above.

    >>> heavy_ball(9.0, 1.0)
    (0.25, 0.25)
    """
    high, low = math.sqrt(largest), math.sqrt(smallest)
    return (2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2


@paper("granziol2022learning", key="lr-batch-rmt", kind="probe")
@method
class BatchCurvature(Method):
    """lambda'_1 = lambda_1 + P sigma^2 / (b lambda_1) if lambda_1 > sqrt(P / b) sigma, else 2 sqrt(P / b) sigma, with
    b = B / (1 - B / N): the largest eigenvalue of the Hessian of B out of N examples, from that of all of them.

    The Hessian of a batch is that of all data plus noise, taken as a symmetric matrix of independent entries of
    variance sigma^2 / b. Then P sigma^2 / b is the mean of |(H_batch - H) v|^2 for every unit vector v. It is measured
    at the eigenvector of lambda_1: real noise is no such matrix, and there the formula is also what second-order
    perturbation gives. (At random v, as the mean variance of an entry would have it, the noise of networks all but
    vanishes.) N are the examples of the `batches` batches that are measured. While noise decides, 1 / lambda'_1 grows
    like B: so may SGD's learning rate, and Adam's like sqrt(B) (`scaled_learning_rate`).

    Returns {"largest" (lambda_1), "predicted" (lambda'_1 at this run's batch size B), "measured" (mean over batches),
    "noise" (sqrt(P) sigma), "critical batch size" (where lambda_1 = noise / sqrt(B)), "largest rate" (2 / predicted,
    where plain SGD diverges on the quadratic), "rate" and "momentum" (heavy ball from `predicted` and the mean size of
    an eigenvalue in Lanczos' quadrature, a choice of ours), "by batch size": a curve}. Costs batches + 1 runs of
    Lanczos' method. Raises BadInput for fewer than two examples, where nothing that matches is trained, and for a
    curvature that is not finite.

    >>> BatchCurvature(batches=8)
    BatchCurvature(batches=8)
    """

    batches: Count = 4
    iterations: Count = 15
    matrix: Matrix = "hessian"

    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return the largest eigenvalue over all data and over a batch, predicted and measured."""
        batches = self.parts(now)
        size, device = len(batches[0]), next(model.parameters()).device
        examples = size * len(batches)
        with evaluating(model):
            whole, count = curvature(model, now, batches, self.matrix, self.where)
            each = [curvature(model, now, [batch], self.matrix, self.where)[0] for batch in batches]
            start = probe(count, now.generator, device)
            found = lanczos(whole, start, self.iterations)
            top, along = max(float(found.values[-1]), 1e-12), found.vectors[-1]
            mean = whole(along)
            spread = sum(float((operator(along) - mean).square().sum()) for operator in each) / (len(each) - 1)
            noise = math.sqrt(size * spread)
            tops = [float(lanczos(operator, start, self.iterations).values[-1]) for operator in each]
        predicted = extreme_of_batch(top, noise, effective_batch(size, examples))
        bulk = float(found.values.abs() @ found.weights)
        rate, momentum = heavy_ball(predicted, min(max(bulk, 1e-12), predicted))
        sizes = sorted({2**k for k in range(int(math.log2(examples)) + 1)} | {size, examples})
        by_size = [extreme_of_batch(top, noise, effective_batch(b, examples)) for b in sizes]
        measured = sum(tops) / len(tops)
        lines = {"predicted": by_size, "measured": [measured if b == size else math.nan for b in sizes]}
        return {
            "largest": top,
            "predicted": predicted,
            "measured": measured,
            "noise": noise,
            "critical batch size": (noise / top) ** 2,
            "largest rate": 2 / predicted,
            "rate": rate,
            "momentum": momentum,
            "by batch size": curve(sizes, lines, across="batch size", along="largest eigenvalue", log="xy"),
        }

    def parts(self, now: Now) -> list[Batch]:
        """Return the batches, equal in size and without a common example where there are enough."""
        (first,) = now.calibration(1)
        known = now.examples // len(first) if now.examples else self.batches
        count = min(self.batches, known)
        batches = list(now.calibration(count)) if count > 1 else list(first.split(2))
        if len(batches) < 2 or len(batches[0]) != len(batches[-1]):
            batches = [batch for batch in batches if len(batch) == len(batches[0])]
        if len(batches) < 2:
            raise BadInput("BatchCurvature compares batches: give it at least two examples.")
        return batches
