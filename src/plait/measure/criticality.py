"""How signals grow or shrink from layer to layer, beside what the theory of wide networks predicts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.layers import evaluating, hooked, layers, matrix, own_bias, require_layers
from plait.math.criticality import activation_of, recursion, susceptibilities
from plait.measure.base import curve
from plait.method import Method, Now, method
from plait.parametrize.base import dense_weight


def is_map(layer: nn.Module) -> bool:
    """Say whether a layer is a linear map of activations."""
    return isinstance(layer, nn.Linear)


@paper("roberts2022principles", key="criticality", kind="ground")
@method
class SignalPropagation(Method):
    """K_l = mean of z_l^2 over neurons and inputs, of the preactivations z_l of each linear layer l, beside the
    prediction K_(l+1) = C_b + C_W <s(z)^2>_K + corrections of order 1 / width, from C_W = inputs * mean(W^2) and C_b =
    mean(b^2) as they are.

    The prediction is for a chain of linear layers with one activation s between them, at random weights: training
    leaves it. Measured in evaluation mode on a batch.

    activation: see CriticalInit. batches: of training data. Returns {"layers", "depth / width" (of the hidden layers),
    "last variance" (K of the last layer), "predicted", "ratio" (of the two), "fluctuation" (V / (n K^2): the squared
    relative deviation of K from draw to draw, predicted), "chi parallel" and "chi perpendicular" (geometric means over
    layers of what multiplies a deviation; 1 at criticality), "by layer": a curve}. Raises BadInput for fewer than two
    linear layers.

    >>> SignalPropagation(activation="relu")
    SignalPropagation(activation='relu')
    """

    activation: str = "auto"
    batches: Count = 1

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a model with fewer than two linear layers, and an activation that is not known."""
        if len(require_layers(self, model, self.where, is_map)) < 2:
            raise BadInput("SignalPropagation follows a signal from layer to layer: the model needs two linear layers.")
        activation_of(model, self.activation)

    @torch.no_grad()
    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return the variances layer by layer."""
        seen: dict[str, list[float]] = {}

        def keep(_: nn.Module, __: Any, output: Tensor, name: str) -> None:
            seen.setdefault(name, []).append(float(output.double().square().mean()))

        chain = dict(layers(model, self.where, is_map))
        hooks = (layer.register_forward_hook(partial(keep, name=name)) for name, layer in chain.items())
        with hooked(hooks), evaluating(model):
            for batch in now.calibration(self.batches):
                now.call(model, batch.inputs)
        found = [sum(values) / len(values) for values in seen.values()]
        return self.compared(model, [chain[name] for name in seen], found)

    def compared(self, model: nn.Module, chain: list[nn.Module], found: list[float]) -> dict[str, Any]:
        """Return observed variances beside the predictions that start from the first of them."""
        activation = activation_of(model, self.activation)
        flat = [matrix(layer, dense_weight(layer)).double() for layer in chain]
        weights = [float(w.square().mean()) * w.shape[1] for w in flat]
        owned = [own_bias(layer) for layer in chain]
        biases = [0.0 if bias is None else float(bias.double().square().mean()) for bias in owned]
        widths = [w.shape[0] for w in flat]
        predicted = recursion(activation, weights[1:], biases[1:], widths, found[0])
        both = [susceptibilities(activation, c, p.variance) for c, p in zip(weights[1:], predicted, strict=False)]
        along, across = (float(torch.tensor(chi).log().mean().exp()) for chi in zip(*both, strict=True))
        expected = [layer.variance + layer.correction for layer in predicted]
        hidden = widths[:-1]
        return {
            "layers": len(found),
            "depth / width": len(hidden) * sum(1 / n for n in hidden) / len(hidden),
            "last variance": found[-1],
            "predicted": expected[-1],
            "ratio": found[-1] / expected[-1],
            "fluctuation": predicted[-1].fluctuation,
            "chi parallel": along,
            "chi perpendicular": across,
            "by layer": curve(
                range(1, len(found) + 1),
                {"observed": found, "predicted": expected},
                across="layer",
                along="mean square of preactivations",
                log="y",
            ),
        }
