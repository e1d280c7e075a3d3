"""What gradient regularization, full batches, clipped pixels and kept error signals must reach."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.claims.base import claim
from plait.claims.digits import error, fitted
from plait.claims.gradient import error_after_wrong_labels
from plait.gradient.clip import Clip
from plait.gradient.pixel import PixelwiseGradientClipping
from plait.gradient.recurrent import VanishingGradientRegularizer
from plait.gradient.regularize import FullBatch, GradientRegularization
from plait.loss.base import squared_error
from plait.method import Method
from plait.step.momentum import SGD
from plait.train import train


# -- gradient regularization ---------------------------------------------------------------------------------------
@claim(
    "gradient-reg",
    says="A penalty on the gradient's norm, by forward differences, misreads fewer digits after wrong labels.",
    baseline="AdamW alone, the same batches",
    figure="test error after training with 30 % random labels",
    better="lower",
    seeds=5,
)
def gradient_regularization_resists_wrong_labels(seed: int) -> tuple[float, float]:
    """500 training digits, one hidden layer, 400 steps."""
    regularization = GradientRegularization(strength=0.1, ascent=0.1)
    return error_after_wrong_labels(seed, [regularization]), error_after_wrong_labels(seed, [])


class Diagonal(nn.Module):
    """The diagonal linear network: x -> sum_j (u_j^2 - v_j^2) x_j, the solvable model of the paper."""

    def __init__(self, inputs: int, start: float) -> None:
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.full((inputs,), start)) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, inputs] -> [n]."""
        return inputs @ (self.u.square() - self.v.square())


def _sparse_error(seed: int, *methods: Method) -> float:
    """Return |beta - teacher|^2 after fitting 40 equations of a 5-sparse teacher with 100 unknowns.

    The inputs have a mean, as the theory wants it: what the penalty takes off each unknown's start grows with the
    gradient there, and would else be largest where the teacher is.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, teacher = 1 + torch.randn(40, 100, generator=generator), torch.zeros(100)
    teacher[:5] = 1.0
    every = [SGD(lr=0.003, momentum=0.0), *methods]
    run = train(Diagonal(100, 0.2), (inputs, inputs @ teacher), methods=every, batch_size=40, steps=1500, seed=seed)
    beta: Tensor = run.model.u.detach().square() - run.model.v.detach().square()  # type: ignore[operator]
    return float((beta - teacher).square().sum())


@claim(
    "gradient-reg",
    says="Forward differences bias a diagonal linear network more to sparse solutions than backward ones.",
    baseline="backward differences with the same strength and step, the same start",
    figure="squared distance to a sparse teacher, known by fewer equations than unknowns",
    better="lower",
    seeds=5,
)
def forward_differences_find_the_sparse_teacher(seed: int) -> tuple[float, float]:
    """Gradient descent from 0.2, where the plain network is far from sparse; a step at which both converge."""
    forward = GradientRegularization(strength=0.05, ascent=0.02)
    backward = GradientRegularization(strength=0.05, ascent=0.02, difference="backward")
    return _sparse_error(seed, forward), _sparse_error(seed, backward)


@claim(
    "gradient-reg",
    says="Gradient regularization comes nearer to a sparse teacher than gradient descent.",
    baseline="gradient descent alone, the same start and steps",
    figure="squared distance to a sparse teacher, known by fewer equations than unknowns",
    better="lower",
    seeds=5,
)
def regularization_finds_the_sparse_teacher(seed: int) -> tuple[float, float]:
    """Gradient descent from 0.2, where the plain network is far from sparse."""
    return _sparse_error(seed, GradientRegularization(strength=0.05, ascent=0.05)), _sparse_error(seed)


# -- full batches --------------------------------------------------------------------------------------------------
def _full(seed: int, methods: Sequence[Method], batch_size: int, mislabelled: float) -> float:
    """Return the test error after 200 clipped steps on 500 digits."""
    every = [SGD(lr=0.4, momentum=0.9), *methods, Clip(norm=0.25)]
    return error(fitted(seed, every, count=500, steps=200, batch_size=batch_size, mislabelled=mislabelled), seed)


@claim(
    "full-batch",
    says="Full-batch descent with the regularization of small batches made explicit misreads fewer digits.",
    baseline="full-batch gradient descent, clipped alike, the same number of steps",
    figure="test error after training with 30 % random labels",
    better="lower",
    seeds=5,
)
def regularized_full_batches_generalize(seed: int) -> tuple[float, float]:
    """500 training digits in blocks of 125, strength as in the authors' settings."""
    return _full(seed, [FullBatch(block=125)], 500, 0.3), _full(seed, [], 500, 0.3)


@claim(
    "full-batch",
    says="Regularized full-batch descent generalizes as well as stochastic training, to one percent.",
    baseline="SGD with batches of 125, clipped alike, the same number of steps",
    figure="test error",
    better="lower",
    margin=-0.01,
    seeds=5,
)
def full_batches_match_stochastic_training(seed: int) -> tuple[float, float]:
    """500 training digits with true labels, as in the paper's experiments."""
    return _full(seed, [FullBatch(block=125)], 500, 0.0), _full(seed, [], 125, 0.0)


# -- clipped pixels ------------------------------------------------------------------------------------------------
class _Picture(nn.Module):
    """A trained picture, read by a frozen random encoder."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.pixels = nn.Parameter(torch.zeros(3, 12, 12))
        self.shown = nn.Identity()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 4, 1)
        )
        for layer in self.encoder:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)  # latents about as large as the picture
        self.encoder.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """[n] -> latents [n, 4 * 12 * 12]."""
        shown: Tensor = self.shown(self.pixels.expand(len(inputs), -1, -1, -1))
        return self.encoder(shown).flatten(1)  # type: ignore[no-any-return]


def _latent_error(seed: int, rate: float, methods: Sequence[Method]) -> float:
    """Return the squared error of the latents after learning from latents with heavy-tailed noise, one at a time."""
    model, generator = _Picture(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        truth = model.encoder(3 * F.avg_pool2d(torch.randn(1, 3, 14, 14, generator=generator), 3, 1)).flatten(1)
    chi = torch.randn(64, 1, 576, generator=generator).square()
    noise = 0.03 * torch.randn(64, 576, generator=generator) / chi.mean(1).sqrt()  # Cauchy: no mean, no variance
    data = torch.arange(64.0), (truth + noise)
    every = [SGD(lr=rate, momentum=0.0), *methods]
    train(model, data, loss=squared_error, methods=every, batch_size=1, steps=192, seed=seed)
    with torch.no_grad():
        return float((model(torch.zeros(1)) - truth).square().mean())


@claim(
    "pgc",
    says="Clipping the gradient at each pixel learns a picture through a frozen encoder that scores it noisily.",
    baseline="one bound on the whole gradient's norm, at the best of two bounds and two rates",
    figure="squared error of the noiseless latents",
    better="lower",
    seeds=5,
)
def clipped_pixels_survive_heavy_tails(seed: int) -> tuple[float, float]:
    """Batches of one latent with Cauchy noise; ours too at the best of two bounds and two rates."""
    rates, bounds = (0.05, 0.2), (0.3, 1.0)
    pixels = [
        _latent_error(seed, r, [PixelwiseGradientClipping(where="shown", bound=b)]) for r in rates for b in bounds
    ]
    # A pixel's bound b allows a norm of 12 b of the whole picture.
    whole = [_latent_error(seed, r, [Clip(norm=12 * b)]) for r in rates for b in bounds]
    return min(pixels), min(whole)


# -- kept error signals --------------------------------------------------------------------------------------------
class _Reader(nn.Module):
    """A recurrent net that answers after the last symbol; its start lets errors vanish."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rnn, self.head = nn.RNN(6, 32, batch_first=True), nn.Linear(32, 4)
        for p in self.parameters():
            nn.init.normal_(p, std=0.1 if p.dim() > 1 else 0.0)

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, steps, 6] -> [n, 4]."""
        return self.head(self.rnn(inputs)[0][:, -1])  # type: ignore[no-any-return]


def _first_symbol(count: int, seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return sequences that open with one of four symbols, the class, and go on with two others, at random."""
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(4, 6, (count, steps), generator=generator)
    symbols[:, 0] = torch.randint(0, 4, (count,), generator=generator)
    return F.one_hot(symbols, 6).float(), symbols[:, 0]


@claim(
    "rnn-clip",
    says="With errors that keep their norm, a recurrent net learns to remember over 30 steps; clipping alone does not.",
    baseline="SGD with clipping alone, at the better of the rates 0.03 and 0.1",
    figure="error on new sequences, four classes",
    better="lower",
    margin=0.1,
    seeds=5,
)
def kept_errors_reach_far_back(seed: int) -> tuple[float, float]:
    """The first symbol of 30, from a small start; 32 tanh units, 300 steps of 32 sequences; ours at the rate 0.1."""
    data, (inputs, target) = _first_symbol(2000, seed, 30), _first_symbol(1000, 1000 + seed, 30)

    def reached(rate: float, methods: list[Method]) -> float:
        every = [SGD(lr=rate, momentum=0.0), *methods, Clip(norm=1.0)]
        model = train(_Reader(seed), data, methods=every, batch_size=32, steps=300, seed=seed).model
        with torch.no_grad():
            return float((model(inputs).argmax(-1) != target).float().mean())

    return reached(0.1, [VanishingGradientRegularizer(strength=0.1)]), min(reached(rate, []) for rate in (0.03, 0.1))
