"""Whether SGD can stay where it is: conditions of linear stability for a learning rate and a batch size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Count, Positive
from plait.layers import evaluating
from plait.math.curvature import gauss_newton_factors
from plait.math.lanczos import spectral_density
from plait.measure.base import learning_rate_of, trained
from plait.measure.curvature import Matrix, curvature
from plait.method import Method, Now, method


def batch_size_of(given: int | None, now: Now) -> int:
    """Return the batch size that a measure judges: the one it was given, or else that of the step before."""
    return given or (len(now.batch) if now.batch is not None else 1)


@paper("wu2023implicit", key="sgd-stability", kind="probe")
@method
class DynamicalStability(Method):
    """A minimum at which SGD of learning rate eta is stable has eta tr(H) <= 2 (batches of one example), where gradient
    descent only needs eta lambda_1(H) <= 2, and a loss that does not grow eta |H|_F <= sqrt(B).

    For batches of B out of N examples the noise is that of one example divided by B (N - 1) / (N - B): the trace
    condition becomes eta tr(H) <= 2 B (N - 1) / (N - B), and so the other. The norm's condition takes the noise to be
    aligned with the curvature as 2 L(w) H, which holds for squared error near a minimum that fits all data. H is the
    Gauss-Newton matrix (the Hessian, at such a minimum), or the Hessian. The conditions are about plain SGD: for
    momentum or Adam the figures are only a scale. They are derived for one output an example; of C outputs with errors
    alike, each direction gets a C-th of the noise, and up to C times the trace can be stable.

    lr, size (of a batch): the run's own, unless given. Returns {"trace", "frobenius", "largest", and each as a part of
    what is allowed, above 1 unstable: "trace / allowed", "frobenius / allowed", "largest / allowed"}. Raises BadInput
    where no learning rate is known, where nothing that matches is trained, and for a curvature that is not finite.

    >>> DynamicalStability(lr=0.1)
    DynamicalStability(lr=0.1)
    """

    lr: Positive | None = None
    size: Count | None = None
    batches: Count = 1
    iterations: Count = 20
    probes: Count = 2
    matrix: Matrix = "gauss-newton"

    def measure(self, model: nn.Module, now: Now) -> dict[str, float]:
        """Return the sharpness in three norms, beside what the learning rate allows."""
        rate, size = learning_rate_of(self, self.lr, now), batch_size_of(self.size, now)
        noisy = size * (now.examples - 1) / max(now.examples - size, 1e-9) if now.examples > 1 else float(size)
        with evaluating(model):
            operator, count = curvature(model, now, list(now.calibration(self.batches)), self.matrix, self.where)
            device = next(model.parameters()).device
            found = spectral_density(operator, count, now.generator, self.probes, self.iterations, device)
        largest = float(found.values.max())
        return {
            "trace": found.trace,
            "frobenius": found.frobenius,
            "largest": largest,
            "trace / allowed": rate * found.trace / (2 * noisy),
            "frobenius / allowed": rate * found.frobenius / math.sqrt(noisy),
            "largest / allowed": rate * largest / 2,
        }


def coherence_of(factors: list[Tensor]) -> tuple[float, float, float]:
    """Return (sigma, lambda_1(H), max_i lambda_1(H_i)) for H_i = K_i^T K_i [size, size], H their mean.

    sigma = lambda_1(S) / max_i lambda_1(H_i), S_ij = |H_i^(1/2) H_j^(1/2)|_F = |K_i K_j^T|_F: from 1, where the
    examples bend the loss in different directions, to n, where in the same one. 0 if all are 0.

    >>> coherence_of([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
    (1.0, 0.5, 1.0)
    """
    together = torch.cat(factors).double()
    inner, sizes = together @ together.T, [len(k) for k in factors]
    blocks = [torch.split(row, sizes, 1) for row in torch.split(inner, sizes)]
    largest = max(float(torch.linalg.eigvalsh(row[i])[-1]) for i, row in enumerate(blocks))
    norms = torch.stack([torch.stack([torch.linalg.matrix_norm(b) for b in row]) for row in blocks])
    mean = float(torch.linalg.eigvalsh(inner)[-1]) / len(factors)
    return (float(torch.linalg.eigvalsh(norms)[-1]) / largest if largest > 0 else 0.0), mean, largest


@paper("dexter2024precise", key="sgd-coherence", kind="probe")
@method
class HessianCoherence(Method):
    """SGD diverges from a minimum if lambda_1(H) > 2 / eta or lambda_1(H) > (sigma / eta) (n / B - 1)^(-1/2), with the
    coherence sigma = lambda_1(S) / max_i lambda_1(H_i), S_ij = |H_i^(1/2) H_j^(1/2)|_F, of the examples' Hessians H_i.

    The less the examples' curvatures align, the noisier is a batch's, and the flatter a minimum must be. There are
    Hessians of each sigma for which SGD converges as long as lambda_1(H) < 2 sigma / (eta (sigma + n / B - 1)). H_i is
    the Gauss-Newton matrix of example i (the Hessian, where the loss is fitted); with more than 64 outputs an example
    it is drawn, see `gauss_newton_factors`. The examples measured stand for all, n: measure more of them than a batch
    holds, or only 2 / eta remains. Holds (examples x outputs) gradients in memory.

    lr, size (of a batch): the run's own, unless given; count: measure at most so many examples. Returns {"coherence",
    "largest" (lambda_1(H)), "largest of an example", "diverges above", "may converge below", "largest / allowed"}.
    Raises BadInput where no learning rate is known, where nothing that matches is trained, and for real targets of more
    than 64 outputs an example.

    >>> HessianCoherence(count=32)
    HessianCoherence(count=32)
    """

    lr: Positive | None = None
    size: Count | None = None
    count: Count = 64
    draws: Count = 8

    def measure(self, model: nn.Module, now: Now) -> dict[str, float]:
        """Return the coherence and the conditions that follow from it."""
        rate, size = learning_rate_of(self, self.lr, now), batch_size_of(self.size, now)
        parameters, factors = trained(model, self.where), list[Tensor]()
        with evaluating(model):
            for batch in now.calibration(1_000_000):
                room = min(self.count, now.examples or self.count) - len(factors)
                factors += gauss_newton_factors(model, batch.take(slice(0, room)), now, parameters, self.draws)
                if len(batch) >= room:
                    break
        sigma, largest, alone = coherence_of(factors)
        above, below = stability_limits(sigma, rate, size, len(factors))
        return {
            "coherence": sigma,
            "largest": largest,
            "largest of an example": alone,
            "diverges above": above,
            "may converge below": below,
            "largest / allowed": largest / above,
        }


def stability_limits(coherence: float, rate: float, batch_size: int, examples: int) -> tuple[float, float]:
    """Return the lambda_1(H) above which SGD diverges, and that below which it converges for some H of that coherence.

    >>> stability_limits(2.0, 0.1, 1, 7)
    (8.16496580927726, 5.0)
    """
    if rate == 0:
        return math.inf, math.inf
    noise = max(examples / batch_size - 1, 0.0)
    above = 2 / rate if noise == 0 else min(2 / rate, coherence / (rate * math.sqrt(noise)))
    return above, 2 * coherence / (rate * (coherence + noise)) if coherence else 2 / rate
