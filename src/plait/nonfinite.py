"""NaN and infinity: seen in the objective, the gradients and the weights, and said in one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from plait.errors import NonFinite
from plait.method import Now
from plait.sharding import full


def finite(objective: Tensor, model: nn.Module) -> bool:
    """Say whether the objective and every gradient are finite."""
    return bool(torch.isfinite(objective)) and _all_finite(p.grad for p in model.parameters() if p.grad is not None)


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    sums = [full(t.detach().sum(dtype=torch.float32)) for t in tensors]
    return all(bool(torch.isfinite(s)) for s in sums)


def require_finite_weights(model: nn.Module, now: Now, folder: str | Path | None) -> None:
    """Raise NonFinite if a trained weight is not finite: such weights are not worth keeping, nor going on from."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not _all_finite(trained) and not all(bool(full(torch.isfinite(p.detach()).all())) for p in trained):
        raise NonFinite(
            f"a weight became NaN or infinite by step {now.step}, after gradients that were finite; {_kept(folder)}. "
            "Lower the learning rate."
        )


def explain(now: Now, folder: str | Path | None) -> str:
    """Return the sentence for a step whose objective or gradient is not finite."""
    what = "a gradient" if now.objective is not None and bool(torch.isfinite(now.objective)) else "the objective"
    examples = now.batch.index.tolist()
    more = f" and {len(examples) - 32} more" if len(examples) > 32 else ""
    return (
        f"{what} became NaN or infinite at step {now.step}, on the examples {examples[:32]}{more}; {_kept(folder)}. "
        "Look at these examples, lower the learning rate, or set nonfinite to 'skip'."
    )


def _kept(folder: str | Path | None) -> str:
    from plait.checkpoint import last_step

    good = None if folder is None else last_step(folder)
    return "no checkpoint was kept" if good is None else f"the last good checkpoint is of step {good} in {folder}"
