"""Losses whose targets are the model's own earlier predictions, remembered for each example of the data set."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.batch import IGNORE
from plait.catalogue import paper
from plait.fields import NonNegative, Probability, ScheduledFraction
from plait.loss.base import AddedTerm, Loss, own_predictions, remembered, require_logits
from plait.method import Misfit, Now, method
from plait.schedule import Linear


@paper("liu2020early", key="elr")
@method
class ELR(AddedTerm):
    """+ strength * log(1 - <p_i, t_i>), with p = softmax(z) and t_i <- decay * t_i + (1 - decay) * p_i held constant.

    Early-learning regularization: t_i, an average of the example's own predictions (0 at first), remembers what the
    model believed before it began to memorize wrong labels, and the term's gradient holds it there. An example that is
    asked about twice in a step (SAM) is averaged in once. The logarithm's argument is kept above 1e-4, as the authors'
    clamp of p does. In several processes each remembers what it has seen itself.

    z: logits [n, classes], target [n]; `now.batch.index` [n] says which examples they are. Returns [n]. strength: at
    least 0 (the authors: 3 for 10 classes, 7 for 100). decay: in [0, 1) (0.7; 0.9). Raises BadInput for outputs of
    another shape, for regression, and where `now.batch` is not the batch of these targets.

    >>> from plait.batch import Batch
    >>> now = Now(batch=Batch.of(torch.zeros(1, 2), torch.tensor([0])))
    >>> ELR(strength=1.0, decay=0.5)(torch.zeros(1, 2), now.batch.target, now)
    tensor([0.4055])
    """

    remembers: ClassVar[bool] = True
    strength: NonNegative = 3.0
    decay: Probability = 0.7

    def term(self, output: Any, target: Tensor, now: Now) -> Tensor:
        """Return strength * log(1 - <p, t>) and average the predictions in."""
        p, index = own_predictions(self, output, target, now)
        memory = now.of(self)
        average = remembered(memory, "average", p.detach(), index)
        seen = remembered(memory, "step", index, index, fill=-1)
        with torch.no_grad():
            new = (seen[index] != now.step).unsqueeze(-1)
            mixed = self.decay * average[index] + (1 - self.decay) * p
            average[index] = torch.where(new, mixed, average[index]).to(average.dtype)
            seen[index] = now.step
        return self.strength * (1 - (p * average[index]).sum(-1)).clamp_min(1e-4).log()


@paper("kim2021self", key="ps-kd")
@method
class PSKD(Loss):
    """target_i -> (1 - alpha) * onehot(target_i) + alpha * p_i of the epoch before: progressive self-distillation.

    p_i = softmax(z_i) as it was when example i was last visited in an earlier epoch; before that, the label itself. Of
    an example that is asked about twice in a step (SAM), the first answer is remembered, which is the model's own.
    alpha grows from 0 to 0.8 with the run (the paper raises it once an epoch, to alpha_T t / T in epoch t of T, which
    is where this schedule stands at that epoch's end). In several processes each remembers what it has seen itself.

    z: logits [n, classes]; target [n] of classes, or [n, classes] of probabilities; `now.batch.index` [n] says which
    examples they are. Returns [n]. alpha: in [0, 1], 0 is the plain misfit.

    >>> from plait.batch import Batch
    >>> now = Now(batch=Batch.of(torch.zeros(1, 2), torch.tensor([0])))
    >>> loss = PSKD(alpha=0.5)
    >>> first = loss(torch.zeros(1, 2), now.batch.target, now)
    >>> now.epoch = 1
    >>> first, loss(torch.tensor([[2.0, 0.0]]), now.batch.target, now)
    (tensor([0.6931]), tensor([0.6269]))
    """

    remembers: ClassVar[bool] = True

    idle: ClassVar[dict[str, float]] = {"alpha": 0}
    alpha: ScheduledFraction = Linear(start=0.0, end=0.8)

    def loss(self, misfit: Misfit) -> Misfit:
        """Return the misfit to softened targets."""

        def softened(output: Any, target: Tensor, now: Now) -> Tensor:
            require_logits(self, output, target, misfit)
            p, index = own_predictions(self, output, target, now)
            p = p.detach()
            memory = now.of(self)
            latest = remembered(memory, "latest", p, index)
            earlier = remembered(memory, "earlier", p, index)
            epoch = remembered(memory, "epoch", index, index, fill=-1)
            step = remembered(memory, "step", index, index, fill=-1)
            hard = target if target.is_floating_point() else F.one_hot(target.clamp_min(0), p.shape[-1]).to(p.dtype)
            never = (epoch[index] < 0).unsqueeze(-1)
            moved = (epoch[index] != now.epoch).unsqueeze(-1)
            past = torch.where(moved, torch.where(never, hard, latest[index]), earlier[index])
            again = ~moved & (step[index] == now.step).unsqueeze(-1)
            latest[index] = torch.where(again, latest[index], p).to(latest.dtype)
            earlier[index], epoch[index], step[index] = past.to(earlier.dtype), now.epoch, now.step
            alpha = now.at(self.alpha)
            soft = (1 - alpha) * hard + alpha * past
            value = misfit(output, soft, now)
            return value if target.is_floating_point() else torch.where(target == IGNORE, 0.0, value)

        return softened
