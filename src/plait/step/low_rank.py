"""Adam in a low-rank subspace of the gradient: GaLore, and Fira, which also follows what lies outside of it.

A matrix lies here so that its fewer rows come first: W, G [m, n], m <= n. The columns of P [m, rank] span a subspace
that holds most of the gradient, found anew every `period` steps; the states are those of R = P^T G [rank, n], so they
need rank / m of Adam's memory, and P itself. Vectors, convolutions and matrices of at most `rank` rows are stepped by
AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput, did_you_mean
from plait.fields import Count, CountByName, NonNegative, Positive, Probability, Range, ScheduledNonNegative, SizeByName
from plait.layers import matches_weight
from plait.math.moments import step_moments
from plait.math.products import product
from plait.math.subspace import cosine_matrix, cosine_rows, exact_rows, ranged_rows, tracked_rows
from plait.math.svd import OVERSAMPLE, leading_rows
from plait.math.update_rule import exact
from plait.method import Method, method
from plait.step.adam import AdamW, corrections
from plait.step.base import Rule, as_groups
from plait.step.states import opened

GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples fall evenly between 0 and 1, however many there are."""
TURNS = 20
"""Over how many steps the refreshes of all matrices are spread."""


def is_projected(weight: Tensor, rank: int) -> bool:
    """Say whether a weight is a matrix with more than `rank` > 0 rows and columns."""
    return rank > 0 and weight.dim() == 2 and min(weight.shape) > rank


@method
class LowRank(Rule):
    """Adam on R = P^T G, with N = m / (sqrt(v) + eps) and the correction c = sqrt(1 - b2^t) / (1 - b1^t) in the rate.

    rank: of the subspace; a weight of rank 0 is stepped by AdamW. period: steps between two refreshes of P. Both may
    be given by name, as in rank={"q_proj|k_proj": 64, ".*": 128}: the first pattern that matches counts, and a weight
    that no pattern of rank matches has rank 0. where: names of the matrices that are projected; the others have rank 0.

    subspace: how P is found. "exact": the leading left singular vectors of G, as published. "sketched": about the same
    by a randomized decomposition of `sketch` iterations. "tracked": one power step from the last P, which is cheapest
    of those that follow G, and keeps the meaning of each coordinate, and so of its states, from refresh to refresh;
    the first P is sketched. "cosines": the `rank` columns of the discrete cosine transform that hold most of G; their
    numbers are kept in place of P. `plait.measure.subspace.SubspaceAngle` reports how far P is from the exact one. A
    matrix whose smaller side is at most rank + 8 is decomposed exactly in place of a sketch or a power step.

    spread: let the first P be the range of a sketch of one pass (not for "cosines", which cost less than that), and
    refresh each matrix at a time of its own within the next 20 steps and then every `period` steps, so that no step,
    the first included, bears the cost of all decompositions. Without it all are refreshed together, at step 1 and every
    `period` steps, as published.
    """

    rank: SizeByName = 128
    period: CountByName = 200
    subspace: Literal["exact", "sketched", "tracked", "cosines"] = "tracked"
    spread: bool = True
    sketch: Count = 1
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: NonNegative = 1e-6
    weight_decay: ScheduledNonNegative = 0.0

    direction = AdamW.direction
    scalars = staticmethod(corrections)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a rank or a pattern that leaves nothing to project."""
        self.stepped(list(model.named_parameters()))

    def stepped(self, given: list[Any]) -> list[Any]:
        """Return all parameters, in groups of equal rank and period."""
        inside, outside = self.parted(given)
        groups = self.grouped([*inside, *({**group, "rank": 0} for group in outside)])
        largest = 0
        for group in groups:
            for p in (one[1] if isinstance(one, tuple) else one for one in group["params"]):
                if is_projected(p, group["rank"]):
                    return groups
                largest = max(largest, min(p.shape) if p.dim() == 2 else 0)
        cure = f"use a rank below {largest}" if largest > 1 else "use AdamW"
        raise BadInput(f"{type(self).__name__}(rank={self.rank}) finds no matrix that is larger than its rank: {cure}.")

    def grouped(self, given: list[Any]) -> list[dict[str, Any]]:
        """Return the parameters in groups of equal rank and period; those that a group has of its own go before."""
        groups, made = as_groups(given), []
        names = [one[0] for group in groups for one in group["params"] if isinstance(one, tuple)]
        for group in groups:
            own = replace(self, **{name: group[name] for name in ("rank", "period") if name in group})
            parts: dict[tuple[int, int], list[Any]] = {}
            for one in group["params"]:
                parts.setdefault((own.for_name("rank", one, names), own.for_name("period", one, names)), []).append(one)
            made += [
                {**group, "params": held, "rank": rank, "period": period} for (rank, period), held in parts.items()
            ]
        return made

    def for_name(self, field: str, one: Any, names: list[str]) -> int:
        """Return the rank or the period of one weight, a (name, parameter) pair where these are by name."""
        value: int | dict[str, int] = getattr(self, field)
        if not isinstance(value, dict):
            return value
        if not isinstance(one, tuple):
            raise BadInput(
                f"{type(self).__name__} has a rank or a period by name: give it model.named_parameters(), or each "
                "parameter group a number of its own."
            )
        for pattern in value:
            if not any(matches_weight(pattern, known) for known in names):
                ends = {part for known in names for part in known.split(".") if not part.isdigit()}
                raise BadInput(
                    f"{type(self).__name__}.{field} has the pattern {pattern!r}, which matches no trained weight"
                    f"{did_you_mean(pattern, ends)}."
                )
        missing = 0 if field == "rank" else type(self).__dataclass_fields__["period"].default
        return next((number for pattern, number in value.items() if matches_weight(pattern, one[0])), missing)

    @classmethod
    def rounds(cls) -> bool:
        """Say that the states may be rounded."""
        return True

    def takes_whole(self, weight: Tensor, group: Mapping[str, Any]) -> bool:
        """Say whether a weight is projected."""
        return is_projected(weight, group["rank"])

    def keeps(self, weight: Tensor) -> tuple[str, ...]:
        """Return what AdamW does not keep."""
        return ("number", "exp_avg", "exp_avg_sq")

    def step_whole(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], number: int
    ) -> None:
        """Step a matrix in place."""
        precise, step = exact(weight.dtype), state["step"]
        held, gradient = weight.to(precise), gradient.to(precise)
        if held.shape[0] > held.shape[1]:
            lying, gradient = held.T, gradient.T
        else:
            lying = held
        number = state.setdefault("number", number)  # kept: a resumed run may have its parameters in another order
        with opened(state, ("exp_avg", "exp_avg_sq"), group["states"], precise):
            inside = self.project(gradient, state, group, number)
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = inside.new_zeros(inside.shape)
            beta1, beta2 = group["betas"]
            normalized = step_moments(inside, state["exp_avg"], state["exp_avg_sq"], group["betas"], group["eps"])
            rate = float(group["lr"]) * math.sqrt(1 - beta2**step) / (1 - beta1**step)
            if group["weight_decay"]:
                lying.mul_(1 - float(group["lr"]) * group["weight_decay"])
            self.move(lying, gradient, inside, normalized, rate, state, group)
        if held is not weight:
            weight.copy_(held)

    def refreshes(self, step: int, group: Mapping[str, Any], number: int) -> bool:
        """Say whether the subspace of the optimizer's parameter `number` is chosen anew at its step 1, 2, ..."""
        period: int = group["period"]
        if not group["spread"]:
            return (step - 1) % period == 0
        turn = int(number * GOLDEN % 1 * min(period, TURNS))
        return step == 1 or (step - 2 - turn) % period == 0

    def project(self, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], number: int) -> Tensor:
        """Return R = P^T G [rank, n] of a gradient [m, n], after choosing P anew where it is time to."""
        if not self.refreshes(state["step"], group, number):
            return product(self.projector(gradient, state).T, gradient)
        rank, kind = group["rank"], group["subspace"]
        if kind == "cosines":
            state["columns"], inside = cosine_rows(gradient, rank)
            return inside
        if len(gradient) <= rank + OVERSAMPLE:
            projector, inside = exact_rows(gradient, rank)
        elif "projector" not in state and group["spread"]:
            projector, inside = ranged_rows(gradient, rank)
        elif kind == "exact":
            projector, inside = exact_rows(gradient, rank)
        elif kind == "sketched" or "projector" not in state:
            projector, inside = leading_rows(gradient, rank, group["sketch"])
        else:
            projector, inside = tracked_rows(gradient, self.projector(gradient, state))
        state["projector"] = column_after_column(projector)
        return inside

    def projector(self, matrix: Tensor, state: dict[str, Any]) -> Tensor:
        """Return P [m, rank] for a matrix of m rows."""
        if "columns" in state:
            return cosine_matrix(len(matrix), matrix.dtype, matrix.device)[:, state["columns"]]
        if not state["projector"].T.is_contiguous():
            state["projector"] = column_after_column(state["projector"])
        kept: Tensor = state["projector"]
        return kept

    def move(
        self,
        weight: Tensor,
        gradient: Tensor,
        inside: Tensor,
        normalized: Tensor,
        rate: float,
        state: dict[str, Any],
        group: Mapping[str, Any],
    ) -> None:
        """Subtract rate * the update from the weight [m, n], in place; inside = R, normalized = N, both [rank, n]."""
        raise NotImplementedError


@paper("zhao2024galore", key="galore", kind="ground")
@method
class GaLore(LowRank):
    """w <- w - lr c (scale * P N) - lr * weight_decay * w: Adam on P^T G [rank, n], and back.

    Zhao et al. The states are kept as they are when P is refreshed, as the authors do. See `LowRank` for the fields.
    Raises BadInput where no matrix is larger than its rank, and for a pattern that matches no weight.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.eye(4))
    >>> rule = GaLore([w], lr=0.1, rank=2)
    >>> w.grad = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    >>> rule.step()
    >>> (w.detach() - torch.eye(4)).diagonal()
    tensor([ 0.0000,  0.0000, -0.0250, -0.0250])
    """

    scale: Positive = 0.25

    def move(
        self,
        weight: Tensor,
        gradient: Tensor,
        inside: Tensor,
        normalized: Tensor,
        rate: float,
        state: dict[str, Any],
        group: Mapping[str, Any],
    ) -> None:
        """Subtract rate * scale * P N."""
        weight.addmm_(self.projector(weight, state), normalized, alpha=-rate * group["scale"])


@paper("chen2024fira", key="fira")
@method
class Fira(LowRank):
    """w <- w - lr c (scale * P N + S) - lr * weight_decay * w, S = (G - P R) diag(s), s_j = ||N_j|| / ||R_j||.

    Chen et al.: what lies outside the subspace is stepped too, each column j scaled as Adam scaled it inside. The
    limiter shortens S to `growth` times its last length when it would grow faster; growth is at least 1, for below it S
    would vanish. S is never formed: scale P N + S = P (scale N - R diag(s)) + G diag(s), and ||S||^2 = sum_j s_j^2
    (||G_j||^2 - ||R_j||^2), since P is orthonormal.

    Two departures. A residual of length 0 does not become the length to grow from: by the letter, one zero gradient
    would keep S near 0 for thousands of steps. The residual is the published G - P R; the authors' code takes G - scale
    * P R, which is the same at scale 1, the default. Raises BadInput for a growth below 1, where no matrix is larger
    than its rank, and for a pattern that matches no weight.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.eye(4))
    >>> rule = Fira([w], lr=0.1, rank=2)
    >>> w.grad = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    >>> rule.step()
    >>> (w.detach() - torch.eye(4)).diagonal()
    tensor([ 0.0000,  0.0000, -0.1000, -0.1000])
    """

    scale: Positive = 1.0
    growth: Annotated[float, AfterValidator(Range(1, closed="[)"))] = 1.01

    def move(
        self,
        weight: Tensor,
        gradient: Tensor,
        inside: Tensor,
        normalized: Tensor,
        rate: float,
        state: dict[str, Any],
        group: Mapping[str, Any],
    ) -> None:
        """Subtract rate * (scale * P N + S), with two matrix products in place of three."""
        inside_squares = _column_squares(inside)
        scaling = (_column_squares(normalized) / inside_squares).sqrt_().where(inside_squares > 0, 0.0)
        outside = _column_squares(gradient).sub_(inside_squares).clamp_(min=0)
        norm = (scaling.square() * outside).sum().sqrt()
        before = state.get("residual_norm", torch.zeros_like(norm))
        most = group["growth"] * before
        shorter = torch.where((before > 0) & (norm > most), most / norm, 1.0)
        state["residual_norm"] = torch.where(norm > 0, norm * shorter, before)
        scaling = scaling * shorter
        normalized = normalized.mul_(group["scale"]).addcmul_(inside, scaling, value=-1)
        weight.addmm_(self.projector(weight, state), normalized, alpha=-rate)
        weight.addcmul_(gradient, scaling, value=-rate)


def column_after_column(matrix: Tensor) -> Tensor:
    """Return a matrix whose columns lie one after another in memory, as both products read P.

    A checkpoint may bring them back row after row, and products round by where their numbers lie.
    """
    return matrix.T.contiguous().T


def _column_squares(matrix: Tensor) -> Tensor:
    # torch's norm along the columns of a row-major matrix takes ten times as long
    return matrix.square().sum(0)
