"""Knowing when to abstain: confidences that rank right predictions above wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Positive
from plait.math.selective import aurc
from plait.method import Method, Now, Predictor, method


@paper("xia2025towards", key="logit-norm-sc")
@method
class LogitNormalization(Method):
    """confidence = max_k (z_k - mean z) / ||z - mean z||_p: the largest logit, normalized.

    Label smoothing pushes the largest logit down where the model is right more than where it is wrong, so that the
    largest probability no longer ranks predictions well; dividing by the norm undoes it. `confidence` gives the score,
    in [0, 1]. In a recipe, `predict` returns probabilities whose largest entry is (1 + confidence) / 2, the others
    sharing the rest as before: the predicted class stays, and thresholds and risk-coverage curves see the new ranking.
    They are no calibrated probabilities.

    p: greater than 0; the paper chooses it on a validation set, as `tuned` does. Raises BadInput for another p.

    >>> LogitNormalization(p=2.0).confidence(torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]]))
    tensor([0.7071, 0.0000])
    """

    p: Positive = 3.0

    def confidence(self, logits: Tensor) -> Tensor:
        """Return the confidence [...] of logits, or log probabilities, [..., classes]; 0 where all are equal."""
        centered = logits - logits.mean(-1, keepdim=True)
        scale = centered.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(centered.dtype).tiny)
        centered = centered / scale  # so that no power under- or overflows
        norm = centered.norm(p=self.p, dim=-1)
        return centered.amax(-1) / torch.where(norm > 0, norm, torch.ones_like(norm))

    @classmethod
    def tuned(
        cls, logits: Tensor, target: Tensor, choices: Sequence[float] = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
    ) -> LogitNormalization:
        """Return the method with the p that has the least area under the risk-coverage curve on validation logits."""
        error = (logits.argmax(-1) != target).float()
        return min((cls(p=p) for p in choices), key=lambda m: aurc(m.confidence(logits), error))

    def predict(self, predictor: Predictor) -> Predictor:
        """Return the predictor whose largest probability ranks by this confidence."""

        def normalized(model: nn.Module, inputs: Any, now: Now) -> Tensor:
            given = predictor(model, inputs, now)
            # log p is z up to a constant, which centering removes; what underflowed stands at the smallest float
            confidence = self.confidence(given.clamp_min(torch.finfo(given.dtype).tiny).log())
            top, chosen = given.max(-1, keepdim=True)
            new = (1 + confidence.unsqueeze(-1)) / 2
            left = 1 - top
            share = torch.where(left > 0, given / torch.where(left > 0, left, 1.0), 1 / max(given.shape[-1] - 1, 1))
            return ((1 - new) * share).scatter(-1, chosen, new)

        return normalized
