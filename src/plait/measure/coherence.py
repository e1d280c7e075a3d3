"""Whether examples help each other: the coherence of per-example gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.layers import evaluating
from plait.math.per_example import per_example_gradients
from plait.measure.base import trained
from plait.method import Method, Now, method


def m_coherence(gradients: Iterable[tuple[Tensor, ...]]) -> tuple[float, int]:
    """Return (m ||mean_i g_i||^2 / mean_i ||g_i||^2, m), summed over tensors in float64, one gradient held at a time.

    The number of examples that a small step along one example's gradient helps on average: 1 for orthogonal gradients,
    m for equal ones, 0 if they cancel. 0 as well if all are 0.

    >>> m_coherence([(torch.tensor([1.0, 0.0]),), (torch.tensor([0.0, 1.0]),)])
    (1.0, 2)
    """
    total: list[Tensor] = []
    squares, count = 0.0, 0
    for gradient in gradients:
        squares += sum(float(g.double().square().sum()) for g in gradient)
        total = (
            [g.double() for g in gradient] if not total else [t.add_(g) for t, g in zip(total, gradient, strict=True)]
        )
        count += 1
    if not count:
        raise BadInput("coherence needs at least one example.")
    together = sum(float(t.square().sum()) for t in total)
    return (together / squares if squares else 0.0), count


@paper("chatterjee2022generalization", key="coherence", kind="probe")
@method
class Coherence(Method):
    """alpha = ||E g||^2 / E ||g||^2 over per-example gradients g, and m-coherence = m alpha.

    m-coherence is how many of m examples a small step along the gradient of one helps on average: 1 if every example is
    fitted on its own, m if all agree. It is high on real labels early in training and low on random ones. Reported from
    `batches` batches of training data, in evaluation mode, over the trained parameters that `where` names.

    Returns {"coherence": alpha, "m-coherence": m alpha, "examples": m}. Costs one backward pass an example. Raises
    BadInput where nothing that matches is trained, and without training data.

    >>> Coherence(batches=2)
    Coherence(batches=2)
    """

    batches: Count = 1

    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return the coherence of the gradients at the present weights."""
        parameters, batches = trained(model, self.where), now.calibration(self.batches)
        with evaluating(model), torch.enable_grad():
            every = (g for batch in batches for g in per_example_gradients(model, batch, now, parameters))
            coherent, count = m_coherence(every)
        return {"coherence": coherent / count, "m-coherence": coherent, "examples": count}
