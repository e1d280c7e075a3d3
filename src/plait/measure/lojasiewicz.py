"""How steep the loss is for its height along a run, and how far the run can therefore travel."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Count, NonNegative
from plait.layers import evaluating
from plait.math.curvature import gradient
from plait.measure.base import curve, mean_misfit, trained
from plait.method import Method, Now, method


def fit_lojasiewicz(losses: Tensor, norms: Tensor, minimum: float) -> tuple[float, float]:
    """Return (theta, c): the slope of ln |grad L| over ln(L - minimum), and the largest c with |grad L| >= c (L -
    minimum)^theta at every point; losses, norms: [n], n >= 2, positive above the minimum.

    >>> height = torch.tensor([4.0, 1.0, 0.25])
    >>> [round(x, 6) for x in fit_lojasiewicz(height, 2 * height.sqrt(), 0.0)]
    [0.5, 2.0]
    """
    x, y = (losses.double() - minimum).log(), norms.double().log()
    centred = x - x.mean()
    slope = float(centred @ y / centred.square().sum())
    return slope, math.exp(float((y - slope * x).min()))


def path_bound(losses: Tensor, norms: Tensor, start: float, minimum: float) -> float:
    """Return the least r = (start - minimum)^(1 - theta) / (c (1 - theta)) over theta in [1/2, 1), c the largest with
    |grad L| >= c (L - minimum)^theta at every point; losses, norms: [n], positive above the minimum.

    >>> height = torch.tensor([4.0, 1.0, 0.25])
    >>> path_bound(height, 2 * height.sqrt(), 4.0, 0.0)
    2.0
    """
    theta = torch.linspace(0.5, 0.98, 97, dtype=torch.float64)
    x, y = (losses.double() - minimum).log(), norms.double().log()
    c = (y - theta[:, None] * x).amin(1).exp()
    return float(((start - minimum) ** (1 - theta) / (c * (1 - theta))).min())


@paper("liu2022optimization", key="uniform-lgi", kind="probe")
@method
class UniformLGI(Method):
    """|grad L(w)| >= c (L(w) - min L)^theta along the run: then gradient flow from w_0 travels at most
    r = (L(w_0) - min L)^(1 - theta) / (c (1 - theta)), and the gap of generalization is of the order r / sqrt(n).

    The Lojasiewicz inequality with constants that hold along one path. As in the authors' code, theta is fitted to the
    logarithms of the losses and gradient norms seen so far, and c lowered until the inequality holds at each. The fit
    often gives theta >= 1, for which r is infinite. But every theta in [1/2, 1) has its c: r is the least over those.
    The loss is that of `batches` batches, in evaluation mode. Set measure_every: three measurements are the least; the
    more, and the smaller the steps, the better. r / sqrt(n) leaves out the constants of the bound (of the network and
    the loss): it compares runs of one model.

    minimum: min L, if known, such as 0; otherwise the lowest loss seen, whose point is left out. Returns {"loss",
    "gradient norm"} and, from the third point on, {"theta", "c", "path" (r), "estimate" (r / sqrt(n)), "inequality": a
    curve}. Raises BadInput where nothing that matches is trained, and without training data.

    >>> UniformLGI(batches=8, minimum=0.0)
    UniformLGI(batches=8, minimum=0.0)
    """

    batches: Count = 4
    minimum: NonNegative | None = None

    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Note the loss and its slope; return the constants that hold so far."""
        held, parameters, batches = now.of(self), trained(model, self.where), list(now.calibration(self.batches))
        with evaluating(model):
            slopes = [gradient(partial(mean_misfit, model, batch, now), parameters) for batch in batches]
            with torch.no_grad():
                loss = sum(float(mean_misfit(model, batch, now)) for batch in batches) / len(batches)
        norm = float(torch.linalg.vector_norm(torch.stack(slopes).mean(0)))
        point = torch.tensor([[float(now.step), loss, norm]], dtype=torch.float64)
        path = held.get("path", point[:0])
        path = torch.cat([path[path[:, 0] < now.step], point])  # the end of a run may be measured twice
        held["path"] = path
        return {"loss": loss, "gradient norm": norm, **self.constants(path, now.examples)}

    def constants(self, path: Tensor, examples: int) -> dict[str, Any]:
        """Return what follows from points (step, loss, norm) [n, 3]."""
        lowest = float(path[:, 1].min()) if self.minimum is None else self.minimum
        used = path[(path[:, 1] > lowest) & (path[:, 2] > 0)]
        if len(used) < 2 or len(path) < 3 or float(used[:, 1].max()) == float(used[:, 1].min()):
            return {}
        theta, c = fit_lojasiewicz(used[:, 1], used[:, 2], lowest)
        bound = path_bound(used[:, 1], used[:, 2], float(path[0, 1]), lowest)
        found: dict[str, Any] = {"theta": theta, "c": c, "path": bound}
        if examples:
            found["estimate"] = bound / math.sqrt(examples)
        height = (used[:, 1] - lowest).sort()
        lines = {"gradient norm": used[height.indices, 2], "c (L - min L)^theta": c * height.values**theta}
        found["inequality"] = curve(height.values, lines, across="L - min L", along="gradient norm", log="xy")
        return found
