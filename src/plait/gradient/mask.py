"""Which entries of a gradient are used at all."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Range
from plait.gradient.base import Gradient
from plait.method import Ask, Now, method
from plait.sharding import full


def keep_largest(gradients: list[Tensor], keep: float) -> None:
    """Set all but the ceil(keep * n) of all n entries of largest magnitude to zero, in place; ties at the threshold
    are kept.

    >>> g = torch.tensor([1.0, -4.0, 2.0, -3.0])
    >>> keep_largest([g], 0.5)
    >>> g.tolist()
    [0.0, -4.0, 0.0, -3.0]
    """
    count = sum(g.numel() for g in gradients)
    dropped = count - min(count, -int(-keep * count // 1))
    if dropped <= 0:
        return
    every = [full(g.abs()).flatten() for g in gradients]
    threshold = (every[0] if len(every) == 1 else torch.cat(every)).kthvalue(dropped + 1).values
    for gradient in gradients:
        gradient.masked_fill_(gradient.abs().to(threshold.dtype) < threshold, 0.0)


@paper("li2025gmt", key="gmt")
@method
class GradientMaskTuning(Gradient):
    """g_ij <- g_ij if |g_ij| >= T, else 0, where T is the magnitude of the entry at rank keep * n among n.

    g is the mean gradient of the whole step, as in the paper's equation: micro-batches are added up before the mask is
    made, which is made anew at each step. One call. A step with momentum goes on moving an entry that is masked now; in
    the equation, which is plain gradient descent, it stays.

    The equation does not say over what T ranks, the authors' code was not found, and public implementations differ:
    some rank all entries at once, one each parameter apart (and masks each micro-batch, against the equation).

    keep: the part of the entries that is used, in (0, 1]; 1 is plain training. over: "parameter" ranks each parameter
    apart; "model" all that `where` names at once, with a copy of all their gradients. Raises BadInput for a keep
    outside (0, 1], and in a run for a keep of 1.

    >>> from plait import train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 1), (x, x[:, 0]), methods=[GradientMaskTuning(keep=0.5)], steps=20)
    >>> run.history[-1]["objective"] < run.history[0]["objective"]
    True
    """

    idle: ClassVar[dict[str, float]] = {"keep": 1}
    keep: Annotated[float, AfterValidator(Range(0, 1, "(]"))] = 0.6
    over: Literal["parameter", "model"] = "parameter"

    def gradient(self, ask: Ask) -> Ask:
        """Mask the gradients; one call."""

        def asked(model: nn.Module, now: Now) -> Tensor:
            value = ask(model, now)
            with torch.no_grad():
                gradients = [gradient for _, gradient in self.gradients(model)]
                for ranked in [gradients] if self.over == "model" else [[g] for g in gradients]:
                    keep_largest(ranked, self.keep)
            return value

        return asked
