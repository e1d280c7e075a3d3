"""Losses that keep logits small: label smoothing, its two stages, max suppression, and the z-loss.

All are algebra of the same four statistics of the logits, so that any of them together cost one pass.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import ScheduledFraction, ScheduledNonNegative
from plait.loss.base import AddedTerm
from plait.math.logits import statistics
from plait.method import Method, Now, method
from plait.schedule import Switch


@paper("szegedy2016rethinking", key="label-smoothing", kind="ground")
@method
class LabelSmoothing(AddedTerm):
    """+ smoothing * (z_target - mean_k z_k): the cross entropy with (1 - smoothing) onehot + smoothing / classes.

    z: logits [..., classes]; target [...], or [..., classes] of probabilities q, for which z_target is <q, z>. Returns
    one value for each target. smoothing: in [0, 1]; 0 is the plain misfit. Raises BadInput for outputs that are no
    logits of classes, and for targets that do not fit them.

    >>> import torch
    >>> LabelSmoothing(smoothing=0.2)(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    tensor([0.3269])
    """

    smoothing: ScheduledFraction = 0.1

    def term(self, output: Any, target: Tensor, now: Now) -> Tensor:
        """Return smoothing * (aimed logit - mean logit)."""
        s = statistics(output, target)
        return now.at(self.smoothing) * (s.target - s.mean)


@paper("xu2020towards", key="tsla")
def tsla(smoothing: float = 0.1, until: float = 0.5) -> list[Method]:
    """+ smoothing * (z_target - mean_k z_k) before `until` of the run, nothing from there on: two-stage smoothing.

    smoothing: of the first stage, in [0, 1]. until: the part of the run, in (0, 1), at which smoothing is dropped; the
    paper gives it in epochs and finds it by search. Returns [LabelSmoothing] with a schedule. Raises BadInput for
    values outside these ranges.

    >>> tsla(0.2, until=0.7)
    [LabelSmoothing(smoothing=Switch(first=0.2, then=0.0, at_progress=0.7))]
    """
    if not 0 < until < 1:
        raise BadInput(f"tsla's until must be in (0, 1), not {until!r}: it is the part of the run that is smoothed.")
    return [LabelSmoothing(smoothing=Switch(first=smoothing, then=0.0, at_progress=until))]


@paper("zhou2025maxsup", key="maxsup")
@method
class MaxSup(AddedTerm):
    """+ strength * (max_k z_k - mean_k z_k): label smoothing's term with the largest logit in place of the target's.

    Where the prediction is right it is label smoothing; where it is wrong, smoothing would push the target's logit
    further down, and this pushes down the wrong one. The gradient of a tied maximum goes to the first.

    z: logits [..., classes]; returns the shape of the target. strength: in [0, 1]; the authors raise it from 0.1 to 0.2
    over the run, `Linear(start=0.1, end=0.2)`.

    >>> import torch
    >>> MaxSup(strength=0.2)(torch.tensor([[0.0, 2.0]]), torch.tensor([0]))
    tensor([2.3269])
    """

    strength: ScheduledFraction = 0.1

    def term(self, output: Any, target: Tensor, now: Now) -> Tensor:
        """Return strength * (largest logit - mean logit)."""
        s = statistics(output, target)
        return now.at(self.strength) * (s.maximum - s.mean)


@paper("chowdhery2023palm", key="log-z-loss", kind="ground")
@method
class ZLoss(AddedTerm):
    """+ strength * (log sum_k exp z_k)^2: keeps the softmax's normalizer Z near 1, so that logits do not drift.

    (The "z-loss" of PaLM; the Z-loss of the spherical family is another loss.) z: logits [..., classes]; returns the
    shape of the target. strength: at least 0. Raises BadInput for outputs that are no logits of classes, and for
    targets that do not fit them.

    >>> import torch
    >>> ZLoss(strength=0.5)(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    tensor([0.9334])
    """

    strength: ScheduledNonNegative = 1e-4

    def term(self, output: Any, target: Tensor, now: Now) -> Tensor:
        """Return strength * (log Z)^2."""
        return now.at(self.strength) * statistics(output, target).logsumexp.square()
