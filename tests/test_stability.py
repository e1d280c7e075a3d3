"""Measures of curvature and of stability, against cases solved by hand, simulations, and dense matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait import SGD, Batch, Now, train
from plait.errors import BadInput
from plait.loss.base import squared_error
from plait.math.curvature import gauss_newton_factors
from plait.measure.base import observe
from plait.measure.curvature import BatchCurvature, HessianSpectrum, effective_batch, extreme_of_batch
from plait.measure.generalization import GeneralizationGap
from plait.measure.normalization import EffectiveLearningRate
from plait.measure.stability import DynamicalStability, HessianCoherence, coherence_of, stability_limits
from plait.method import Method, method
from plait.schedule import Cosine


def linear(x: Tensor, y: Tensor | None = None, batch: int | None = None) -> tuple[nn.Module, Now]:
    """A linear map [d] -> [1] without bias and a `now` whose batches cut the examples in order."""
    torch.manual_seed(0)
    model, now = nn.Linear(x.shape[1], 1, bias=False), Now(examples=len(x))
    y = x @ torch.ones(x.shape[1], 1) if y is None else y
    size = batch or len(x)
    now.misfit, now.model = squared_error, model
    now.calibration = lambda count: (Batch.of(x[i : i + size], y[i : i + size]) for i in range(0, count * size, size))
    return model, now


def test_the_spectrum_of_least_squares() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.1])
    true = 2 * x.T @ x / 40
    values = torch.linalg.eigvalsh(true)
    for matrix in ("hessian", "gauss-newton"):
        found = HessianSpectrum(iterations=6, probes=400, matrix=matrix).measure(*linear(x))
        assert found["largest"] == pytest.approx(float(values[-1]), rel=1e-4)
        assert found["smallest"] == pytest.approx(float(values[0]), abs=1e-4)
        assert found["trace"] == pytest.approx(float(true.trace()), rel=0.1)
        assert found["frobenius"] == pytest.approx(float(values.square().sum().sqrt()), rel=0.1)
        assert len(found["density"]["x"]) == len(found["density"]["lines"]["density"])


def test_where_restricts_the_curvature_to_some_parameters() -> None:
    x, (_, now) = torch.eye(4), linear(torch.eye(4), torch.zeros(4, 2))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False))
    found = HessianSpectrum(where="1", iterations=10, probes=50).measure(model, now)
    hidden = x @ model[0].weight.detach().T
    assert found["trace"] == pytest.approx(2 * 2 * float(hidden.square().sum()) / 4, rel=0.3)
    with pytest.raises(BadInput, match="matches no parameter that is trained"):
        HessianSpectrum(where="2").measure(model, now)


def test_the_largest_eigenvalue_of_a_batch_is_that_of_a_noisy_matrix() -> None:
    """A spike above and one below the threshold, in symmetric noise of 600 x 600 independent entries."""
    size, sigma, batch = 600, 0.5, 16.0
    generator, noise = torch.Generator().manual_seed(0), sigma * math.sqrt(600)
    drawn = torch.randn(size, size, generator=generator).double()
    wigner = (drawn + drawn.T) / math.sqrt(2) * sigma / math.sqrt(batch)
    for spike in (1.4 * noise / math.sqrt(batch), 3 * noise / math.sqrt(batch), 0.3 * noise / math.sqrt(batch)):
        matrix = wigner.clone()
        matrix[0, 0] += spike
        top = float(torch.linalg.eigvalsh(matrix)[-1])
        assert extreme_of_batch(spike, noise, batch) == pytest.approx(top, rel=0.03)
    assert effective_batch(8, 32) == pytest.approx(8 / 0.75)
    assert effective_batch(32, 32) == math.inf


def test_the_noise_of_a_batch_is_the_variance_over_batches() -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(3))
    model, now = linear(x, batch=10)
    found = BatchCurvature(batches=6, iterations=5).measure(model, now)
    each = [2 * part.T @ part / 10 for part in x.split(10)]
    mean = torch.stack(each).mean(0)
    top = torch.linalg.eigh(mean)[1][:, -1]
    spread = sum(float(((h - mean) @ top).square().sum()) for h in each) / 5
    assert found["noise"] == pytest.approx(math.sqrt(10 * spread), rel=1e-3)
    assert found["largest"] == pytest.approx(float(torch.linalg.eigvalsh(mean)[-1]), rel=1e-4)
    assert found["measured"] == pytest.approx(sum(float(torch.linalg.eigvalsh(h)[-1]) for h in each) / 6, rel=1e-4)
    assert found["predicted"] == pytest.approx(extreme_of_batch(found["largest"], found["noise"], 12.0))
    assert found["largest"] < found["predicted"]
    assert found["largest rate"] == pytest.approx(2 / found["predicted"])


def test_batches_are_compared_only_where_there_are_two_examples() -> None:
    model, now = linear(torch.ones(1, 2))
    with pytest.raises(BadInput, match="at least two examples"):
        BatchCurvature().measure(model, now)


@pytest.mark.parametrize("part", [0.9, 1.1])
def test_sgd_leaves_a_minimum_exactly_where_the_trace_says_so(part: float) -> None:
    """Orthogonal examples of one length r: an example's error is multiplied by 1 - 2 eta r^2 = 1 - eta tr(H)."""
    x, y = 2 * torch.eye(8), torch.full((8, 1), 3.0)
    rate = part * 2 / (2 * 4.0)  # tr(H) = 2 r^2
    done = train(nn.Linear(8, 1, bias=False), (x, y), methods=[SGD(lr=rate, momentum=0.0)], steps=400, batch_size=1)
    settled = done.history[-1]["objective"] < 1e-3 * done.history[0]["objective"]
    figures = DynamicalStability(batches=8).measure(done.model, done.now)
    assert figures["trace / allowed"] == pytest.approx(part, rel=1e-4)
    assert settled == (figures["trace / allowed"] < 1)
    assert figures["largest / allowed"] < 1


def test_stability_takes_what_it_is_given_and_full_batches_have_no_noise() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    model, now = linear(x)
    true = 2 * x.T @ x / 20
    found = DynamicalStability(lr=0.1, size=5, iterations=3, probes=300).measure(model, now)
    assert found["trace / allowed"] == pytest.approx(0.1 * float(true.trace()) / (2 * 5 * 19 / 15), rel=0.1)
    assert found["frobenius / allowed"] == pytest.approx(0.1 * float(true.norm()) / math.sqrt(5 * 19 / 15), rel=0.1)
    assert found["largest / allowed"] == pytest.approx(0.05 * float(torch.linalg.eigvalsh(true)[-1]), rel=1e-3)
    whole = DynamicalStability(lr=0.1, size=20).measure(model, now)
    assert whole["trace / allowed"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(BadInput, match="give it one"):
        DynamicalStability().measure(model, now)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def test_coherence_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(k, 6, generator=generator).double() for k in (1, 3, 2, 2)]
    each = [k.T @ k for k in factors]
    s = torch.tensor([[float(torch.linalg.matrix_norm(root(a) @ root(b))) for b in each] for a in each])
    largest = max(float(torch.linalg.eigvalsh(h)[-1]) for h in each)
    sigma, top, alone = coherence_of(factors)
    assert sigma == pytest.approx(float(torch.linalg.eigvalsh(s)[-1]) / largest, rel=1e-5)
    assert top == pytest.approx(float(torch.linalg.eigvalsh(torch.stack(each).mean(0))[-1]))
    assert alone == pytest.approx(largest)


@pytest.mark.parametrize("aligned", [1, 4, 10, 40])
@pytest.mark.parametrize("batch", [1, 5, 30])
def test_the_limits_of_the_family_with_known_second_moments(aligned: int, batch: int) -> None:
    """`aligned` of n examples bend along one axis, the others along axes of their own, as in the paper's family.

    Where each example is in the batch with probability B / n, E w^2 along that axis is multiplied each step by
    1 - 2 eta h + eta^2 h^2 (1 + (n / B - 1) / aligned), h the largest eigenvalue of the mean.
    """
    n, rate = 40, 0.3
    axes = [0] * aligned + list(range(1, n - aligned + 1))
    factors = [nn.functional.one_hot(torch.tensor([axis]), n).float() for axis in axes]
    sigma, top, alone = coherence_of(factors)
    assert (sigma, top, alone) == (pytest.approx(aligned), pytest.approx(aligned / n), pytest.approx(1.0))
    above, below = stability_limits(sigma, rate, batch, n)

    def growth(h: float) -> float:
        return 1 - 2 * rate * h + (rate * h) ** 2 * (1 + (n / batch - 1) / aligned)

    assert growth(1.001 * above) > 1
    assert growth(0.999 * below) < 1
    assert growth(1.001 * below) > 1
    assert below <= above * (1 + 1e-9)


def test_coherence_inside_a_run_and_on_many_outputs() -> None:
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    done = train(nn.Linear(4, 2), (x, (x[:, 0] > 0).long()), methods=[SGD(lr=0.1), HessianCoherence(count=20)],
                 steps=2, batch_size=8)  # fmt: skip
    figures = done.measures["HessianCoherence(count=20)"][-1]
    assert 1 <= figures["coherence"] <= 20
    factor = figures["largest / allowed"] * figures["diverges above"]
    assert factor == pytest.approx(figures["largest"])
    wide = train(nn.Linear(4, 100), (x, torch.arange(24)), methods=[HessianCoherence(count=4)], steps=1)
    assert 1 <= wide.measures["HessianCoherence(count=4)"][-1]["coherence"] <= 4


@method
class Rude(Method):
    """A measure that does everything that it should not."""

    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Train the model's statistics, draw numbers, leave gradients, modes and notes behind."""
        import random

        import numpy

        (batch,) = now.calibration(1)
        model.train()
        now.misfit(now.call(model, batch.inputs), batch.target, now).sum().backward()
        model.eval()
        now.batch, now.share, now.parts = batch, 7.0, {}
        for notes in now.memory.values():
            for tensor in notes.values():
                tensor.add_(1)
        now.memory["left behind"] = {"note": torch.ones(1)}
        drawn = [torch.rand(3), torch.rand(3, generator=now.generator), numpy.random.rand(3), random.random()]
        return {"drawn": float(len(drawn))}


def test_whatever_a_measure_does_training_is_bitwise_the_same() -> None:
    from plait import ELR

    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))

    def final(extra: list[Method]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        done = train(model, (x, (x[:, 0] > 0).long()), methods=[ELR(), *extra], steps=6, batch_size=8, measure_every=1)
        return {**done.model.state_dict(), **done.now.of(ELR())}

    plain, watched = final([]), final([Rude(), HessianSpectrum(), BatchCurvature(), HessianCoherence()])
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_no_measure_changes_what_the_next_one_sees() -> None:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    def figures(*measures: Method) -> dict[str, list[dict[str, Any]]]:
        torch.manual_seed(0)
        methods = [*measures, SGD(lr=0.1)]
        return train(nn.Linear(4, 2), (x, x[:, :2]), methods=methods, steps=2, batch_size=16).measures

    stability, coherence = DynamicalStability(), HessianCoherence(count=8)
    alone = figures(stability) | figures(coherence)
    assert figures(stability, coherence) == alone
    assert figures(coherence, stability) == alone
    assert figures(Rude(), stability)[repr(stability)] == alone[repr(stability)]


def test_the_factors_of_a_batch_leave_the_batch_as_it_was() -> None:
    model, now = linear(torch.eye(3))
    (batch,) = now.calibration(1)
    now.batch = batch
    assert len(gauss_newton_factors(model, batch, now, list(model.parameters()))) == 3
    assert now.batch is batch


def test_observing_leaves_no_notes_of_others() -> None:
    model, now = linear(torch.eye(3))
    now.of(Rude())["mine"] = torch.zeros(1)
    seen: dict[str, list[dict[str, Any]]] = {}
    observe(model, [Rude()], now, seen)
    assert set(now.memory) == {"Rude()"}
    assert now.of(Rude())["mine"].item() == 1  # a measure's own notes stay
    assert seen["Rude()"][0]["drawn"] == 4


@pytest.mark.parametrize("kind", [DynamicalStability, HessianCoherence, GeneralizationGap, EffectiveLearningRate])
def test_a_rate_of_zero_is_a_rate(kind: Any) -> None:
    """As a warmup begins with, and a decay may end with; where there is no run, the rate must be given."""
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 1))
    rates = Cosine(peak=0.1, warmup=0.5)
    run = train(model, (x, x.sum(1)), methods=[SGD(lr=rates), kind()], steps=4, batch_size=8, measure_every=1)
    first, second, *_ = run.measures[repr(kind())]
    proportional = {"trace / allowed", "largest / allowed", "change per step", "effective rate"} & first.keys()
    assert proportional
    assert all(first[name] == 0 < second[name] for name in proportional)
    with pytest.raises(BadInput, match=rf"{kind.__name__} knows no learning rate here: give it one \(lr=...\)"):
        kind().measure(*linear(x))
