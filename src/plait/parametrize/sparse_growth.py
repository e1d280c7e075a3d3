"""Sparse fine-tuning whose places move: those that change least are dropped, others grow in their stead."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Fraction
from plait.layers import matrix_shape
from plait.method import Ask, Method, Now, method
from plait.parametrize.base import Adapter
from plait.parametrize.sparse import SparseDelta, random_places, shown, trained
from plait.sharding import averaged, world_size

State = dict[str, Tensor]
Grown = tuple[Tensor, Tensor, State]
"""Which entries [m] are dropped, the places [m] that grow in their stead, and means of their gradients."""


class Growing(SparseDelta):
    """W -> W + S, the places of S may move."""

    made_by = "SpIEL"


def begin_anew(rule: torch.optim.Optimizer | None, parameter: nn.Parameter, entries: Tensor, means: State) -> None:
    """Set an optimizer's running states of some entries to what their means are known to be, others to zero.

    means: "exp_avg" and "exp_avg_sq", as Adam names its running mean and running square, without the bias that Adam
    takes out of them again: here it is put in.
    """
    while rule is not None and hasattr(rule, "optimizer"):
        rule = rule.optimizer  # accelerate's wrapper
    held = {} if rule is None else rule.state.get(parameter, {})
    adam = {"exp_avg", "exp_avg_sq", "step"} <= held.keys()
    groups = [] if rule is None else rule.param_groups
    betas = next((g.get("betas") for g in groups if any(p is parameter for p in g["params"])), None)
    for name, state in held.items():
        if not isinstance(state, Tensor) or state.shape != parameter.shape or not state.is_floating_point():
            continue
        state[entries] = 0.0
        if adam and betas is not None and name in means:
            beta = betas[("exp_avg", "exp_avg_sq").index(name)]
            state[entries] = ((1 - beta ** float(held["step"])) * means[name]).to(state.dtype)


@paper("ansell2024scaling", key="sft")
@method
class SpIEL(Adapter):
    """W' = W + S, W frozen, S [out, in] zero but for a share `density` of its entries, which start at zero and are
    trained. In rounds of `every` steps the part rho_t of the entries with the smallest |S_ij| is dropped, and as many
    of those outside grow, at zero: rho_t = rate * (1 - t / T) after t of T steps, but 1 in the first round, for the
    places are random until then. An entry that would be dropped and grown at once stays as it is.

    growth: "gradients" (the paper's accumulated gradients) takes as candidates the entries whose gradient is largest in
    the round's first pass, as many as S has, adds up their gradients over `estimate` steps, and grows those with the
    largest sums; what Adam's means would be over these steps is where the means of a grown entry start. "momenta" (its
    momentum approximation) grows where the product r_i c_j of SM3's accumulators is largest: in each step
    u_ij = min(r_i, c_j) + g_ij^2 over the entries of S, r_i <- max_j u_ij and c_j <- max_i u_ij; here it goes with any
    optimizer. "none" keeps the random places: sparse fine-tuning with a fixed mask.

    Nothing of a matrix's size is held from one pass to the next, or kept for the backward pass of a linear layer. The
    gradient of a pretrained weight for a new task can be largest in a few rows, to which growth then keeps: where all
    of a matrix must change in few steps, fixed random places are better (see the claims). Written from the authors'
    code and the abstract; the paper's text could not be read. Their code begins all but the first estimation a step
    early, and divides a grown entry's means by a correction that is one step too young. With several processes the
    first step counts the first process' share alone.

    density: in (0, 1], at least one entry a matrix. every: at least `estimate`. rate: in [0, 1]. where: as for LoRA.
    Raises BadInput for a density that leaves a matrix no entry, and, unless growth is "none", for an `every` below
    `estimate`.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> SpIEL(density=0.25).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('0.plait.spiel.values', (6,))]
    """

    density: Fraction = 0.01
    growth: Literal["gradients", "momenta", "none"] = "gradients"
    every: Count = 20
    estimate: Count = 5
    rate: Fraction = 0.2

    def build(self, layer: nn.Module, weight: Tensor) -> SparseDelta:
        """Return the sparse matrix on top of one weight, at random places."""
        return Growing(weight, random_places(weight, int(self.density * weight.numel())))

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a round that is over before its time of estimation, and a density that leaves a matrix no entry."""
        if self.every < self.estimate and self.growth != "none":
            raise BadInput(f"SpIEL.every must be at least estimate, {self.estimate}, not {self.every}.")
        for name, layer in self.targets(model):
            out, into = matrix_shape(layer)
            if int(self.density * out * into) == 0:
                raise BadInput(
                    f"SpIEL.density is {self.density}, no entry of the {out} x {into} matrix of '{name}': give more."
                )

    def gradient(self, ask: Ask) -> Ask:
        """Watch the gradients where something is to grow; one call."""

        def asked(model: nn.Module, now: Now) -> Tensor:
            parts = self._parts(model if now.model is None else now.model)
            state, place = now.of(self), now.step % self.every
            size = 0 if now.batch is None else len(now.batch)
            if self.growth != "gradients" or place >= self.estimate:
                value = ask(model, now)
                if self.growth == "momenta":
                    for name, part in parts:
                        accumulate(state, name, part)
                return value
            if place == 0:
                state.clear()
            with shown(parts, lambda name, part, whole: candidates(state, name, part, whole, now.share * size or 1.0)):
                value = ask(model, now)
            for name, _ in parts:
                if f"{name} places" in state:
                    _agree(state, name, first=place == 0)
                    take_in(state, name)
            return value

        return asked

    @torch.no_grad()
    def constrain(self, model: nn.Module, now: Now) -> None:
        """Drop and grow, where the step that was taken ends a time of estimation."""
        if self.growth == "none" or now.step % self.every != self.estimate - 1:
            return
        part_moved = 1.0 if now.step < self.every else self.rate * max(1 - now.progress - 1 / max(now.steps, 1), 0.0)
        for name, part in self._parts(model):
            choose = grown_by_gradients if self.growth == "gradients" else grown_by_momenta
            grown = choose(now.of(self), name, part, int(part_moved * len(part.values)))
            if grown is not None:
                dropped, (places, order) = grown[0].sort().values, grown[1].sort()  # whatever the order of ties
                means = {key: mean[order] for key, mean in grown[2].items()}
                part.support[dropped], part.values[dropped] = places.to(part.support.dtype), 0.0
                begin_anew(now.optimizer, part.values, dropped, means)
        if self.growth == "gradients":
            now.of(self).clear()

    def _parts(self, model: nn.Module) -> list[tuple[str, Growing]]:
        return [(name, part) for name, _, part in trained(self, model, Growing)]


@torch.no_grad()
def candidates(state: State, name: str, part: SparseDelta, whole: Tensor, scale: float) -> None:
    """Add a pass' gradient [out, in] of a weight up where something may grow: where it is largest in the first pass."""
    flat = whole.reshape(-1)
    if f"{name} places" not in state:
        state[f"{name} places"] = flat.abs().topk(len(part.values)).indices
        state[f"{name} pending"] = part.values.new_zeros(len(part.values))
    state[f"{name} pending"] += flat[state[f"{name} places"]].to(part.values.dtype) / scale


def take_in(state: State, name: str) -> None:
    """Add the gradient of a step to the sums of gradients and of squares."""
    step = state.pop(f"{name} pending")
    state[f"{name} pending"] = torch.zeros_like(step)
    for key, value in (("sum", step), ("square", step * step), ("steps", step.new_ones(()))):
        held = state.get(f"{name} {key}")
        state[f"{name} {key}"] = value if held is None else held + value


def _agree(state: State, name: str, first: bool) -> None:
    """Let all processes have the same sums: in the first step those of the first one, later their mean."""
    if not first:
        averaged(state[f"{name} pending"])
    elif world_size() > 1:
        torch.distributed.broadcast(state[f"{name} places"], 0)
        torch.distributed.broadcast(state[f"{name} pending"], 0)


@torch.no_grad()
def accumulate(state: State, name: str, part: SparseDelta) -> None:
    """Take a step's gradient into SM3's accumulators, of the rows and of the columns of a weight."""
    if part.values.grad is None:
        return
    out, into = part.shape
    r = state.setdefault(f"{name} rows", part.values.new_zeros(out))
    c = state.setdefault(f"{name} columns", part.values.new_zeros(into))
    row, column = part.support.long() // into, part.support.long() % into
    update = torch.minimum(r[row], c[column]) + part.values.grad.square()
    r.scatter_reduce_(0, row, update, "amax")
    c.scatter_reduce_(0, column, update, "amax")


def grown_by_gradients(state: State, name: str, part: SparseDelta, count: int) -> Grown | None:
    """Return which of the candidates grow: those with the largest sums of gradients."""
    if f"{name} sum" not in state or count == 0:
        return None  # no gradient has reached it
    dropped = part.values.abs().topk(count, largest=False).indices
    leaving = part.support[dropped].long()
    stay = torch.ones_like(part.values, dtype=torch.bool).index_fill_(0, dropped, False)
    free = ~torch.isin(state[f"{name} places"], part.support[stay].long())
    spots, sums, squares = (state[f"{name} {key}"][free] for key in ("places", "sum", "square"))
    best = sums.abs().topk(min(count, len(sums))).indices
    dropped = dropped[~torch.isin(leaving, spots[best])]
    best = best[~torch.isin(spots[best], leaving)]
    dropped, steps = dropped[: len(best)], state[f"{name} steps"]
    return dropped, spots[best], {"exp_avg": sums[best] / steps, "exp_avg_sq": squares[best] / steps}


def grown_by_momenta(state: State, name: str, part: SparseDelta, count: int) -> Grown | None:
    """Return which entries outside grow: those with the largest products of SM3's accumulators."""
    if f"{name} rows" not in state or count == 0:
        return None
    product = torch.outer(state[f"{name} rows"], state[f"{name} columns"]).view(-1)
    product[part.support.long()] = -1.0
    count = min(count, len(product) - len(part.values))
    dropped = part.values.abs().topk(count, largest=False).indices
    return dropped, product.topk(count).indices, {}
