"""Penalties that keep a network trainable: singular values near one, or weights distributed as at the start."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from plait.catalogue import paper
from plait.fields import Count, ScheduledNonNegative
from plait.layers import layers, matrix, own_bias
from plait.math.spectral import power_iteration
from plait.method import Now, method
from plait.parametrize.base import dense_weight
from plait.penalty.base import WeightPenalty

COLD = 15
"""Power iterations at the first step, when there is no vector to go on from."""


def gains_and_biases(model: nn.Module, where: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the trained gains of normalization layers and the trained biases of all layers that match."""
    gains: list[Tensor] = []
    biases: list[Tensor] = []
    for _, layer in layers(model, where, nn.Module):
        weight, bias = getattr(layer, "weight", None), own_bias(layer)
        norm = isinstance(layer, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) or "Norm" in type(layer).__name__
        if norm and isinstance(weight, nn.Parameter) and weight.requires_grad and weight.dim() == 1:
            gains.append(weight)
        if isinstance(bias, nn.Parameter) and bias.requires_grad:
            biases.append(bias)
    return gains, biases


@paper("lewandowski2025spectral", key="spectral-reg")
@method
class SpectralRegularization(WeightPenalty):
    """sum_l (sigma_max(W_l)^k - 1)^2 + sum_l (max|gamma_l|^k - 1)^2 + sum_l |b_l|_2^(2k).

    W_l: weights as [out, in * kernel]; gamma_l: gains of normalization layers, whose map diag(gamma) has the largest
    singular value max|gamma|; b_l: biases, which start at 0. sigma_max is u^T W v after `iterations` of the power
    method, from the vectors of the step before (15 at the first); its gradient u v^T is exact at the limit.
    Two products with W per iteration and two more for the value: memory bound, nothing is decomposed. Raises BadInput
    where no linear map matches.

    The paper's full text was not at hand: the term of the weights agrees with a summary of it; the terms of gains and
    biases, and the range of strengths (1e-5 to 1e-2, with k = 2), are from memory and to be checked.

    >>> model = nn.Linear(2, 2)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.diag(torch.tensor([2.0, 0.5]))), model.bias.zero_()
    >>> round(SpectralRegularization(strength=1.0).penalty(model, Now()).item(), 4)
    9.0
    """

    strength: ScheduledNonNegative = 1e-3
    k: Count = 2
    iterations: Count = 1

    def value(self, weight: Tensor) -> Tensor:
        """Return (sigma_max^k - 1)^2 of [out, in] by a full decomposition: the definition, for tests and small work."""
        sigma: Tensor = torch.linalg.svdvals(weight)[0]
        return (sigma**self.k - 1).square()

    def value_of(self, name: str, layer: nn.Module, now: Now) -> Tensor:
        """Return (sigma_max^k - 1)^2 of one weight by warm-started power iteration, once a step."""
        weight, memory = matrix(layer, dense_weight(layer)), now.of(self)
        fresh = name not in memory
        if fresh:
            memory[name] = torch.randn(weight.shape[1], generator=now.generator)
        held = memory[name].to(weight)
        turns = COLD if fresh else self.iterations * int(memory.get(f"{name}/step", torch.tensor(-1)) != now.step)
        u, v = power_iteration(weight.detach(), held, turns)
        memory[name], memory[f"{name}/step"] = v, torch.tensor(now.step)
        sigma = torch.mv(weight, v) @ u
        return (sigma**self.k - 1).square()

    def penalty(self, model: nn.Module, now: Now) -> Tensor | float:
        """Return strength * the sum over weights, gains and biases."""
        weights, strength = super().penalty(model, now), now.at(self.strength)
        if strength == 0:
            return 0.0
        gains, biases = gains_and_biases(model, self.where)
        terms = [(gain.abs().max() ** self.k - 1).square() for gain in gains]
        terms += [bias.square().sum() ** self.k for bias in biases]
        return weights + strength * sum(terms)


@paper("lewandowski2024wasserstein", key="wasserstein-init", kind="ground")
@method
class WassersteinToStart(WeightPenalty):
    """sum_l |sort(W_l) - sort(W_l(0))|_2^2: n times the squared 2-Wasserstein distance of a layer's n weights to those
    that it started with.

    Weights may permute freely: only their distribution is held, which regularizing towards the start itself does not
    allow. The sorted start is kept in memory, one copy of what is trained. Raises BadInput where no linear map matches.

    >>> model, now = nn.Linear(3, 1), Now()
    >>> penalty = WassersteinToStart(strength=1.0)
    >>> _ = penalty.penalty(model, now)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(model.weight.flip(1))
    >>> penalty.penalty(model, now).item()
    0.0
    """

    def value_of(self, name: str, layer: nn.Module, now: Now) -> Tensor:
        """Return the squared distance of one layer's sorted weights to their sorted start."""
        ordered, memory = dense_weight(layer).flatten().sort().values, now.of(self)
        start = memory.setdefault(name, ordered.detach().clone())
        return (ordered - start.to(ordered)).square().sum()
