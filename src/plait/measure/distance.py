"""How far training has moved the weights, and after which law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.measure.base import curve, remember, remembered
from plait.method import Method, Now, method
from plait.sharding import full


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return (slope, intercept, R^2) of the least-squares line through points; R^2 is 1 where y is constant.

    >>> fit([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    (2.0, 1.0, 1.0)
    """
    xs, ys = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    spread, rises = xs - xs.mean(), ys - ys.mean()
    slope = float((spread @ rises) / (spread @ spread)) if float(spread @ spread) > 0 else 0.0
    left = rises - slope * spread
    explained = 1.0 - float((left @ left) / (rises @ rises)) if float(rises @ rises) > 0 else 1.0
    return slope, float(ys.mean() - slope * xs.mean()), explained


def power(steps: Sequence[float], distances: Sequence[float]) -> float:
    """Return a of the law distance ~ t^a that fits best, in logarithms: 1/2 is a random walk, 1 a straight line."""
    return fit([math.log(t) for t in steps], [math.log(d) for d in distances])[0]


@paper("hoffer2017train", key="weight-distance", kind="probe")
@method
class WeightDistance(Method):
    """|w_t - w_0|_2 of all weights together that are trained at the start, and how well a + b log t describes it:
    ultra-slow diffusion.

    In the first phase of training, at a constant high learning rate, the distance grows with the logarithm of the
    number of steps, as a random walk does in a landscape whose barriers are as deep as it is wide; batches of all sizes
    share one slope b if the learning rate grows with the square root of the batch.

    where: names of weights or of their layers. The weights are copied when training starts (that many bytes are kept,
    and saved with checkpoints). Returns "distance"; from the third measurement on also "slope", b, "log_fit", the R^2
    of a + b log t over all measurements so far, "root_fit", that of a + b sqrt(t), which an ordinary random walk
    follows, and "exponent", a of t^a; and the curve. Raises BadInput where nothing that matches is trained, and where
    it has not seen the start.

    >>> from plait import train
    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 1), (x, x[:, 0]), methods=[WeightDistance()], steps=8, measure_every=2)
    >>> sorted(run.measures["WeightDistance()"][-1])
    ['curve', 'distance', 'exponent', 'log_fit', 'root_fit', 'slope', 'step']
    """

    @torch.no_grad()
    def initialize(self, model: nn.Module, now: Now) -> None:
        """Copy the weights."""
        remember(model, self.where, now.of(self))

    def distance(self, model: nn.Module, held: dict[str, Tensor]) -> float:
        """Return |w_t - w_0|, of differences in float32 at least."""
        squares, named = 0.0, remembered(model, held)
        if not named:
            raise BadInput("WeightDistance has not seen the start: put it in the list of methods before training.")
        for name, p in named.items():
            weight, start = full(p.detach()), held[f"start/{name}"]
            precise = torch.promote_types(weight.dtype, torch.float32)
            squares += float((weight.to(precise) - start.to(precise)).double().square().sum())
        return math.sqrt(squares)

    @torch.no_grad()
    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return the distance, and the laws that fit all distances so far."""
        held = now.of(self)
        distance = self.distance(model, held)
        seen = held.get("seen", torch.zeros(0, 2, dtype=torch.float64))
        if now.step > 0 and distance > 0 and not bool((seen[:, 0] == now.step).any()):
            seen = torch.cat([seen, torch.tensor([[now.step, distance]], dtype=torch.float64)])
            held["seen"] = seen
        if len(seen) < 3:
            return {"distance": distance}
        steps, distances = seen[:, 0].tolist(), seen[:, 1].tolist()
        slope, start, log_fit = fit([math.log(t) for t in steps], distances)
        line = [start + slope * math.log(t) for t in steps]
        return {
            "distance": distance,
            "slope": slope,
            "log_fit": log_fit,
            "root_fit": fit([math.sqrt(t) for t in steps], distances)[2],
            "exponent": power(steps, distances),
            "curve": curve(
                steps, {"distance": distances, "a + b log t": line}, across="step", along="|w - w_0|", log="x"
            ),
        }
