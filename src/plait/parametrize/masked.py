"""Masks of zeros and ones on frozen weights, which are all that is trained: R-AMT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from plait.batch import IGNORE, weighted_sum
from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Number, Positive, Range, ScheduledFraction, ScheduledNonNegative
from plait.layers import evaluating, matrix_shape
from plait.math.logits import dense
from plait.method import Ask, Method, Misfit, Now, method
from plait.parametrize.base import Adapter
from plait.parametrize.sparse import SparseDelta, at, places, random_places, shown, trained
from plait.passes import call_again, rewind
from plait.sharding import gather

TINY = 1e-8


class BinaryMask(SparseDelta):
    """W -> M * W,  M: [out, in], zero at those of the places `support` [n] whose value [n] is at most the threshold,
    one elsewhere. In the backward pass M is taken for the values themselves.

    off: whether M is all ones. total: what the misfits of the step under way are divided by, where its general gradient
    is asked for.
    """

    reads_weight: ClassVar[bool] = True
    made_by = "RAMT"
    off, total = False, 0.0

    def __init__(self, weight: Tensor, support: Tensor, start: float, threshold: float) -> None:
        super().__init__(weight, support)
        self.threshold = threshold
        nn.init.constant_(self.values, start)

    def kept(self) -> Tensor:
        """Return which places [n] are not masked."""
        return self.values.detach() > self.threshold

    def delta(self, weight: Tensor) -> Tensor:
        """Return (M - 1) * W at the places."""
        entries = at(weight, self.support)
        if self.off:
            return torch.zeros_like(self.values)
        mask = self.kept().to(self.values.dtype) + (self.values - self.values.detach())
        return (mask - 1) * entries


@contextmanager
def unmasked(parts: list[tuple[str, BinaryMask]]) -> Iterator[None]:
    """Let the model be the one without masks."""
    for _, part in parts:
        part.off = True
    try:
        yield
    finally:
        for _, part in parts:
            part.off = False


def kept_with_probability(task: Tensor, general: Tensor) -> Tensor:
    """Return (1 + sign(a) (a + b) / (|a| + |b|)) / 2 for the gradients a of a task and b of general knowledge: 1 where
    they agree, and less the more b outweighs an a that it opposes.
    """
    return (1 + task.sign() * (task + general) / (task.abs() + general.abs() + TINY)) / 2


@paper("zheng2023ramt", key="r-amt")
@method
class RAMT(Adapter):
    """W' = M * W, W frozen, M_ij = 1 if v_ij > threshold else 0; v is trained, by the gradient that M would have:
    dL/dv_ij = dL/dM_ij = W_ij dL/dW'_ij. Gradient dropout: with a = dL/dv and b = dK/dv, K the cross entropy from the
    probabilities of the model without masks to those of the model, v is stepped by ((1 - l) + l * [P > U]) * a, where
    P = (1 + sign(a) (a + b) / (|a| + |b|)) / 2 and U is uniform in [0, 1]: what would undo general knowledge is often
    left out.

    M is on the part `share` of each target's entries, those with the largest |dL/dW_ij| on one batch at the start; all
    others are kept. v starts at `start`, so that nothing is masked. The objective gains decay * sum over targets of
    |v|_2, as in the authors' code; their masks are on all weights of attention, which their analysis of gradients finds
    most important: share 1 and where, here. Written from that code and the abstract. One call; each pass runs the model
    without masks too, in evaluation mode, and goes back through the masked one twice. n entries cost n numbers that are
    trained and n places. For outputs that are logits of classes.

    drop: l, in [0, 1]; 0 is mask tuning without regularization. threshold: below start. Raises BadInput for another
    threshold, a share that leaves a matrix no entry, and, unless drop is 0, for outputs of fewer than two classes.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> RAMT(share=0.5).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('0.plait.ramt.values', (12,))]
    """

    idle: ClassVar[dict[str, float]] = {}

    share: Annotated[float, AfterValidator(Range(0, 1, "(]"))] = 1.0
    start: Positive = 1e-2
    threshold: Number = 5e-3
    drop: ScheduledFraction = 1.0
    decay: ScheduledNonNegative = 1e-4

    def build(self, layer: nn.Module, weight: Tensor) -> BinaryMask:
        """Return the mask of one weight."""
        return BinaryMask(weight, random_places(weight, int(self.share * weight.numel())), self.start, self.threshold)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse masks that are closed from the start, or empty."""
        if self.start <= self.threshold:
            raise BadInput(f"RAMT.threshold must be below start, {self.start}, not {self.threshold}.")
        for name, layer in self.targets(model):
            out, into = matrix_shape(layer)
            if int(self.share * out * into) == 0:
                raise BadInput(
                    f"RAMT.share is {self.share}, no entry of the {out} x {into} matrix of '{name}': give more."
                )

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Put the masks where the gradient of the weights is largest, on one batch; its first part, if it has parts."""
        if self.share == 1:
            return
        chosen: dict[str, Tensor] = {}

        def see(name: str, part: SparseDelta, whole: Tensor) -> None:
            if name not in chosen:
                found = whole.abs().flatten().topk(len(part.values)).indices.sort().values
                chosen[name] = places(found, whole)

        parts, back = self._parts(model), rewind(now)
        before = now.batch, now.parts, now.output
        with evaluating(model), shown(parts, see):
            now.batch = next(iter(now.calibration(1)))
            now.ask(model, now)
        now.batch, now.parts, now.output = before
        back()
        for parameter in model.parameters():
            parameter.grad = None
        for name, part in parts:
            if name in chosen:
                part.support.copy_(gather(chosen[name])[0])

    def loss(self, misfit: Misfit) -> Misfit:
        """Take the general gradient where it is asked for; the misfit stays."""

        def watched(output: Any, target: Tensor, now: Now) -> Tensor:
            parts = [] if now.model is None else self._parts(now.model)
            if any(part.total for _, part in parts) and torch.is_grad_enabled():
                self._take_general(dense(output), target, now, parts)
            return misfit(output, target, now)

        return watched

    def _take_general(self, logits: Tensor, target: Tensor, now: Now, parts: list[tuple[str, BinaryMask]]) -> None:
        if logits.dim() < 2 or logits.shape[-1] < 2:
            raise BadInput("RAMT.drop compares probabilities of classes, and this model puts out none: give drop=0.")
        with torch.no_grad(), evaluating(now.model), unmasked(parts):
            teacher = dense(call_again(now.model, now.batch.inputs, now)).float().softmax(-1)
        apart = -(teacher * logits.float().log_softmax(-1)).sum(-1)
        if not target.is_floating_point() and target.shape == apart.shape:
            apart = apart * (target != IGNORE)
        general = weighted_sum(apart, now.batch.weight) / parts[0][1].total
        if not general.requires_grad:
            return  # no mask has an effect on it, which is told where the loss is differentiated
        wanted = [part.values for _, part in parts]
        found = torch.autograd.grad(general, wanted, retain_graph=True, allow_unused=True)
        for (name, _), gradient in zip(parts, found, strict=True):
            if gradient is not None:
                now.of(self)[name] = now.of(self).get(name, 0.0) + gradient

    def gradient(self, ask: Ask) -> Ask:
        """Leave out what would undo general knowledge, at random; one call."""

        def asked(model: nn.Module, now: Now) -> Tensor:
            if now.model is None:
                now.model = getattr(model, "module", model)  # in somebody else's loop
            drop, parts = now.at(self.drop), self._parts(now.model)
            if not drop:
                return ask(model, now)
            general = now.of(self)
            general.clear()
            for _, part in parts:
                part.total = max(float(now.batch.mass()), TINY)
            try:
                value = ask(model, now)
            finally:
                for _, part in parts:
                    part.total = 0.0
            for name, part in parts:
                task = part.values.grad
                if task is not None and name in general:
                    every = gather(general[name])
                    chance = kept_with_probability(task, torch.stack(every).mean(0).to(task))
                    uniform = torch.rand(task.shape, generator=now.generator).to(task)
                    task.mul_((1 - drop) + drop * (chance > uniform))
            general.clear()
            return value

        return asked

    def penalty(self, model: nn.Module, now: Now) -> Tensor | float:
        """Return decay * the sum of the norms of what is trained."""
        decay = now.at(self.decay)
        norms = [torch.linalg.vector_norm(part.values) for _, part in self._parts(model)] if decay else []
        return decay * torch.stack(norms).sum() if norms else 0.0

    def _parts(self, model: nn.Module) -> list[tuple[str, BinaryMask]]:
        return [(name, part) for name, _, part in trained(self, model, BinaryMask)]
