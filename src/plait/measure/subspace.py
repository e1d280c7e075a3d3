"""How far the subspace that a low-rank optimizer steps in lies from the best one for the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.layers import evaluating
from plait.math.subspace import captured, exact_rows, principal_angles
from plait.measure.base import mean_misfit, trained_by_name
from plait.method import Method, Now, method


def steps_in_a_subspace(method: object) -> bool:
    """Say whether a method of the step place projects gradients, and can tell onto what."""
    return hasattr(method, "projector")


@paper("bjorck1973numerical", key="subspace-angle", kind="ground")
@method
class SubspaceAngle(Method):
    """cos theta_j = sigma_j(P^T U): the angles between the optimizer's subspace P [m, rank] and the exact one, U, the
    leading left singular vectors of the gradient G [m, n] on `batches` batches of training data, without dropout.

    For GaLore, Fira and their kin, over all matrices that they project and `where` names. 0 where the optimizer would
    find the same subspace now; some of it is the age of P and the noise of a batch, the rest the way P is found.

    Returns "angle", the mean of all theta_j in degrees; "largest", the largest; "captured", the mean over matrices of
    ||P^T G||^2 / ||U^T G||^2, the part of the gradient that P keeps of what the best P would; "matrices", how many.
    Raises BadInput if no method of the run steps in a subspace, and for GradNormLoRP, whose P is of another gradient.
    Costs a backward pass a batch, and the eigenvectors of [m, m] a matrix.

    >>> from plait import GaLore, train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> steps = [GaLore(lr=1e-6, rank=2, period=1, spread=False), SubspaceAngle()]
    >>> run = train(nn.Linear(8, 8), (x, -3 * x), methods=steps, steps=2, batch_size=32)
    >>> run.measures["SubspaceAngle()"][-1]["angle"] < 0.1
    True
    """

    batches: Count = 1

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a run whose optimizer steps in no subspace, or in one of another gradient."""
        if not any(steps_in_a_subspace(m) for m in methods):
            raise BadInput("SubspaceAngle watches an optimizer that steps in a subspace: add one, such as GaLore().")
        if any(type(m).__name__ == "GradNormLoRP" for m in methods):
            raise BadInput(
                "SubspaceAngle compares with the gradient of the weights, and GradNormLoRP projects that of their "
                "directions: leave SubspaceAngle out, or step by GaLore()."
            )

    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return the angles at the present weights."""
        with evaluating(model), torch.enable_grad():
            for batch in now.calibration(self.batches):
                mean_misfit(model, batch, now).backward()
        rule: Any = now.optimizer
        whole = trained_by_name(model, self.where)  # of a sharded model, too, whose own weights the optimizer holds
        stepped = model if now.model is None else now.model
        own = {id(p): whole[name] for name, p in stepped.named_parameters() if name in whole}
        angles: list[Tensor] = []
        kept: list[float] = []
        for p in (p for group in rule.param_groups for p in group["params"]):
            state, seen = rule.state.get(p, {}), own.get(id(p))
            if seen is None or seen.grad is None or not ({"projector", "columns"} & state.keys()):
                continue
            gradient = seen.grad.float()
            gradient = gradient.T if gradient.shape[0] > gradient.shape[1] else gradient
            gradient = gradient + state.get("left_out", 0.0)  # what DCTAdam(feedback=True) adds before it projects
            basis = rule.method.projector(gradient, state)
            best, _ = exact_rows(gradient, basis.shape[1])
            angles.append(principal_angles(basis, best))
            kept.append(captured(basis, gradient, best))
        if not angles:
            return {"matrices": 0}
        every = torch.cat(angles)
        found = {"angle": float(every.mean()), "largest": float(every.max()), "captured": sum(kept) / len(kept)}
        return {**found, "matrices": len(kept)}
