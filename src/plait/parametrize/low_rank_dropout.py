"""LoRA whose update is sparse at random in each training pass, and an ensemble of such passes at test time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Probability, Size
from plait.method import Method, Now, Predictor, method
from plait.parametrize.base import attached
from plait.parametrize.low_rank import LoRA, LowRank, low_rank_output


class DroppedLowRank(LowRank):
    """W -> W + scale * diag(b) B A diag(a) / (1 - p)^2 in a training pass, a and b ~ Bernoulli(1 - p)."""

    def __init__(self, weight: Tensor, rank: int, scale: float, p: float) -> None:
        super().__init__(weight, rank, scale)
        self.p = p

    def drawn(self) -> tuple[Tensor, Tensor]:
        """Return A without some of its columns and B without some of its rows, so that the mean of B A stays."""
        keep = 1 - self.p
        a = self.A.new_empty(self.A.shape[1]).bernoulli_(keep) / keep
        b = self.B.new_empty(len(self.B), 1).bernoulli_(keep) / keep
        return self.A * a, self.B * b

    def sample(self, weight: Tensor) -> Tensor:
        """Return the weight of one training pass."""
        a, b = self.drawn()
        return torch.addmm(weight.to(a.dtype), b, a, alpha=self.scale).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return the layer's output without forming B A."""
        a, b = self.drawn() if self.training and self.p else (self.A, self.B)
        return low_rank_output(self, layer, inputs, below, a, b, self.scale)


@paper("lin2024loradropout", key="lora-dropout")
@method
class LoRADropout(LoRA):
    """W' = W + scale * diag(b) B A diag(a) / (1 - p)^2 in each training pass, a [in] and b [out] ~ Bernoulli(1 - p):
    whole inputs and whole outputs of the update are dropped, never its rank. At test time the mean, W + scale * B A, or
    with `members` the mean of the predictions of that many draws.

    The masks of a pass are the same for all its examples. The division keeps the mean at LoRA's update, so that starts
    and folding stay exact; the paper has none, which amounts to another scale. p in [0, 1). members: draws of the
    ensemble at test time, 0 for the mean weights. Other fields as LoRA's. Raises BadInput for `members` while p is 0,
    and for a rank above the smaller side of a target.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> LoRADropout(rank=2, p=0.5).parametrize(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.plait.loradropout.A', '0.plait.loradropout.B']
    """

    p: Probability = 0.5
    members: Size = 0

    idle: ClassVar[dict[str, float]] = {}

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse an ensemble of equal members."""
        super().check(model, methods)
        if self.members and not self.p:
            raise BadInput("LoRADropout.members draws nothing while p is 0: give p, or leave members at 0.")

    def build(self, layer: nn.Module, weight: Tensor) -> DroppedLowRank:
        """Return the low-rank update of one weight."""
        return DroppedLowRank(weight, self.rank, self.scale, self.p)

    def predict(self, predictor: Predictor) -> Predictor:
        """Return the predictor of the ensemble; always the same draws."""
        if not self.members:
            return predictor

        def ensemble(model: nn.Module, inputs: Any, now: Now) -> Tensor:
            parts = [held for _, layer, part in attached(model, DroppedLowRank) for held in (layer, part)]
            modes = [part.training for part in parts]
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    for part in parts:
                        part.training = True  # the layer too: it decides where its whole weight is formed
                    outputs = [predictor(model, inputs, now) for _ in range(self.members)]
            finally:
                for part, mode in zip(parts, modes, strict=True):
                    part.training = mode
            return torch.stack(outputs).mean(0)

        return ensemble
