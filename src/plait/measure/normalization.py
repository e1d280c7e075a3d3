"""The learning rate that weights in front of a normalization layer really feel."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.batch import Batch
from plait.catalogue import paper
from plait.fields import Positive
from plait.layers import layers
from plait.math.logits import dense
from plait.measure.base import curve, learning_rate_of, mean_misfit
from plait.method import Method, Now, method
from plait.passes import frozen_statistics, kept, rewind


def scale_invariant_layers(
    model: nn.Module, batch: Batch, now: Now, where: str = ".*", tolerance: float = 1e-2
) -> dict[str, nn.Parameter]:
    """Return the trained weights, by layer, whose length does not matter: doubled, they change the model's output by no
    more than `tolerance` of its norm. In training mode, for batch norm, with the same dropout each time.
    """
    found, again = {}, rewind(now)

    def output() -> Tensor:
        again()
        made: Tensor = dense(now.call(model, batch.inputs))
        return made.double()

    now.batch = batch
    model.train()
    with frozen_statistics(model), torch.no_grad():
        before = output()
        for name, layer in layers(model, where):
            weight = layer.weight
            if isinstance(weight, nn.Parameter) and weight.requires_grad:
                with kept([weight]):
                    weight.mul_(2)
                    change = torch.linalg.vector_norm(output() - before)
                if change <= tolerance * torch.linalg.vector_norm(before):
                    found[name] = weight
    return found


@paper("vanlaarhoven2017l2", key="effective-learning-rate", kind="ground")
@method
class EffectiveLearningRate(Method):
    """eta / |w|^2 for SGD, eta / |w| for Adam, of each weight w whose length does not change the loss: L(a w) = L(w).

    In front of batch, layer or weight normalization only the direction w / |w| matters; it moves as if the learning
    rate were that. L2 regularization acts there by the length alone: without it |w| grows and learning slows down; with
    it SGD comes to rest at |w|^4 = eta |g|^2 / (2 lambda), g the gradient at w / |w|. Such weights are found by
    doubling each, which must change no output by more than `tolerance` of the norm of all, in training mode: one
    forward pass a layer on a batch.

    lr: the run's own, unless given. rule: "sgd" or "adam". Returns {"layers" (how many are invariant)} and, if there
    are any, the geometric means over them of {"weight norm", "effective rate", "gradient norm" (|g|)}, and "by layer":
    a curve. Raises BadInput where no learning rate is known, and without training data.

    >>> EffectiveLearningRate(rule="adam")
    EffectiveLearningRate(rule='adam')
    """

    lr: Positive | None = None
    rule: Literal["sgd", "adam"] = "sgd"
    tolerance: Positive = 1e-2

    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return the effective learning rate at the present weights."""
        rate = learning_rate_of(self, self.lr, now)
        (batch,) = now.calibration(1)
        found = scale_invariant_layers(model, batch, now, self.where, self.tolerance)
        if not found:
            return {"layers": 0}
        weights = list(found.values())
        with frozen_statistics(model), torch.enable_grad():
            gradients = torch.autograd.grad(mean_misfit(model, batch, now), weights, materialize_grads=True)
        norms = [float(torch.linalg.vector_norm(w.detach(), dtype=torch.float64)) for w in weights]
        slopes = [float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in gradients]
        slopes = [max(slope * norm, 1e-300) for slope, norm in zip(slopes, norms, strict=True)]
        factors = [norm ** (-2 if self.rule == "sgd" else -1) for norm in norms]
        rates = [rate * factor for factor in factors]

        def typical(values: list[float]) -> float:
            return math.exp(sum(map(math.log, values)) / len(values))

        return {
            "layers": len(found),
            "weight norm": typical(norms),
            "effective rate": rate * typical(factors),  # a warmup's first rate is 0
            "gradient norm": typical(slopes),
            "by layer": curve(
                range(len(rates)), {"effective rate": rates}, across="layer", along="effective rate", log="y"
            ),
        }
