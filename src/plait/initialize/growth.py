"""Growing a network: its weights are combinations of templates, and what a wider one adds are new combinations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, NonNegative
from plait.layers import is_linear_map, matrix_shape, own_weight
from plait.method import Method, Now, method
from plait.parametrize.base import Parametrization, Parametrize, attach, refuse_shared, stack
from plait.parametrize.low_rank import adapter_dtype
from plait.tensors import State, read_state

NAME = "mixture"


class Mixture(Parametrization):
    """W = [W_rc],  W_rc = sum_k c_rc,k T_s(rc),k: a grid of blocks, each a combination of K templates of one set.

    coefficients: [rows * columns, K]; templates of each set: [K, out / rows, in / columns], shared between layers.
    """

    replaces = True
    made_by = "MixtureGrowth"

    def __init__(self, templates: Sequence[nn.Parameter], coefficients: Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.templates = nn.ParameterList(templates)
        self.coefficients = nn.Parameter(coefficients)
        self.sets = sets_of(grid, len(templates))

    def dense(self, weight: Tensor) -> Tensor:
        """Return the grid of combinations, which has nothing of W."""
        rows, columns = self.grid
        blocks = [
            torch.tensordot(c.to(self.templates[s].dtype), self.templates[s], 1)
            for c, s in zip(self.coefficients, self.sets, strict=True)
        ]
        whole = torch.cat([torch.cat(blocks[row * columns : (row + 1) * columns], 1) for row in range(rows)])
        return whole.to(weight.dtype)


def sets_of(grid: tuple[int, int], members: int) -> list[int]:
    """Return which set of templates each block of the grid combines, row by row: first and last block are members, the
    others take turns.

    >>> sets_of((2, 2), 2)
    [0, 0, 1, 1]
    """
    rows, columns = grid
    new = iter(range(rows * columns))
    last = rows * columns - 1 if members > 1 else 0
    return [0 if b == 0 else 1 if b == last else next(new) % members for b in range(rows * columns)]


def new_coefficients(members: Sequence[Tensor], grid: tuple[int, int], scale: float) -> Tensor:
    """Return the coefficients of all blocks: those of the members in the first and the last, and between them, in turn,
    a vector of length `scale` that is orthogonal to all before it; where K are there already, the one that they have
    least of.
    """
    count, known = grid[0] * grid[1], [c.double() for c in members]
    made: dict[int, Tensor] = {0: known[0]}
    if len(members) > 1 and count > 1:
        made[count - 1] = known[1]
    for block in range(count):
        if block not in made:
            vector = torch.linalg.svd(torch.stack(known)).Vh[-1]
            vector = vector * torch.where(vector[vector.abs().argmax()] < 0, -1.0, 1.0)
            known.append(vector)
            made[block] = scale * vector
    return torch.stack([made[block] for block in range(count)]).to(members[0].dtype)


@paper("pham2024mixturegrowth", key="mixture-growth")
@method
class MixtureGrowth(Parametrize):
    """W = sum_k c_k T_k; grown: [[sum_k c_k T_k, sum_k d_k T_k], [sum_k e_k T'_k, sum_k c'_k T'_k]], with d and e
    orthogonal to the coefficients c, c' that were trained.

    Without `sources` the weights of a network are trained as combinations of templates, which layers of one shape
    share: `share` layers a set of share * templates; coefficients begin orthonormal within a set, templates as
    Gaussians of the weight's size. Save its `state_dict()`: that of one network, or of two that were trained apart.

    With `sources`, the files of one or two such networks, a network that is a whole number of times as wide starts from
    them: they are its blocks on the diagonal (the first, and the last), every other block is a new combination of one
    of their sets, in turn. Biases, norms and embeddings stand side by side; the output layer's inputs are joined, so
    that with scale = 0 the grown network gives the sum of the members' outputs. Everything is trained on, as
    combinations; `Fold` leaves plain weights.

    Blocks, sets and orthogonal directions follow the authors' code, where all but the first new block are orthogonal;
    here that one is too. Where a network grows more than twofold, members' biases and norms are repeated in the middle.

    templates, share: at least 1. scale: length of the new coefficients, at least 0. where: layers; unless given, all
    but embeddings and what shares their weight. Raises BadInput for sources that do not fit, and for shared weights.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    >>> MixtureGrowth(templates=2).parametrize(model)
    >>> model[2].plait.mixture.templates[0] is model[4].plait.mixture.templates[0]
    True
    >>> model[2].plait.mixture.templates[0].shape
    torch.Size([4, 6, 6])
    """

    templates: Count = 2
    share: Count = 2
    sources: tuple[str, ...] = ()
    scale: NonNegative = 1.0

    def left_out(self, model: nn.Module) -> set[str]:
        """Return embeddings, and layers that share the weight of one."""
        maps = [(name, layer) for name, layer in model.named_modules() if is_linear_map(layer)]
        tables = {id(layer.weight) for _, layer in maps if isinstance(layer, nn.Embedding)}
        return {name for name, layer in maps if id(layer.weight) in tables}

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse shared weights, layers with adapters, and sources that do not fit."""
        refuse_shared(self, model)
        for name, layer in self.targets(model):
            if stack(layer):
                raise BadInput(f"MixtureGrowth replaces the weight of '{name}': put it first in the list.")
        if len(self.sources) > 2:
            raise BadInput(f"MixtureGrowth grows from one or two networks, not from {len(self.sources)}.")
        if self.sources:
            states = self.read()
            self.starts(model, states)

    def read(self) -> list[State]:
        """Return the weights of the sources."""
        return [read_state(source) for source in self.sources]

    def grids(self, model: nn.Module, states: list[State]) -> dict[str, tuple[int, int]]:
        """Return how many blocks each layer has, by name."""
        found = {}
        for name, layer in self.targets(model):
            shapes = set()
            for state, source in zip(states, self.sources, strict=True):
                held = state.get(f"{name}.plait.{NAME}.templates.0")
                if held is None or f"{name}.plait.{NAME}.templates.1" in state:
                    what = "no templates" if held is None else "grown templates"
                    raise BadInput(
                        f"{source} has {what} of '{name}': train a small network with MixtureGrowth() first."
                    )
                shapes.add(tuple(held.shape))
            if len(shapes) > 1:
                raise BadInput(f"the sources of MixtureGrowth have templates of two shapes for '{name}': {shapes}.")
            _, *small = shapes.pop()
            whole = matrix_shape(layer)
            if any(size % part for size, part in zip(whole, small, strict=True)):
                raise BadInput(
                    f"'{name}' is {whole} here and {tuple(small)} in the sources of MixtureGrowth: widen each side a "
                    "whole number of times."
                )
            found[name] = (whole[0] // small[0], whole[1] // small[1])
        if len(states) > 1 and all(grid == (1, 1) for grid in found.values()):
            raise BadInput("MixtureGrowth joins two networks into a wider one: give one source for a network as wide.")
        return found

    def build(self, layer: nn.Module, weight: Tensor) -> Mixture:
        """Return a combination of templates of its own."""
        return self.mixtures([("", layer)])[0]

    def parametrize(self, model: nn.Module) -> None:
        """Put a combination in place of each target's weight, which is frozen."""
        self.check(model, [self])
        targets = self.targets(model)
        made = self.grown(model, targets) if self.sources else self.mixtures(targets)
        for (_, layer), mixture in zip(targets, made, strict=True):
            attach(layer, NAME, mixture)
            layer.weight.requires_grad_(False)

    def mixtures(self, targets: list[tuple[str, nn.Module]]) -> list[Mixture]:
        """Return combinations at the start: `share` layers of the same shape, one after another, have one set."""
        made: dict[int, Mixture] = {}
        groups: dict[Any, list[int]] = {}
        for number, (_, layer) in enumerate(targets):
            groups.setdefault(matrix_shape(layer), []).append(number)
        for shape, numbers in groups.items():
            for first in range(0, len(numbers), self.share):
                group = numbers[first : first + self.share]
                weight = own_weight(targets[group[0]][1])
                kind, count = adapter_dtype(weight), len(group) * self.templates
                drawn = torch.randn(count, *shape, dtype=kind, device=weight.device)
                size = float(weight.detach().float().std()) if weight.numel() > 1 else 0.0
                shared = nn.Parameter(drawn * (size or 1 / math.sqrt(shape[1])))
                directions = nn.init.orthogonal_(torch.empty(len(group), count))
                for number, direction in zip(group, directions, strict=True):
                    made[number] = Mixture([shared], direction[None].to(kind).clone(), (1, 1))
        return [made[number] for number in range(len(targets))]

    def grown(self, model: nn.Module, targets: list[tuple[str, nn.Module]]) -> list[Mixture]:
        """Return the combinations of a wider network; layers share templates where they did."""
        states = self.read()
        grids, made = self.grids(model, states), []
        sets: list[tuple[list[Tensor], list[nn.Parameter]]] = []
        for name, layer in targets:
            at, grid = f"{name}.plait.{NAME}", grids[name]
            held = [state[f"{at}.templates.0"] for state in states]
            shared = next((used for known, used in sets if all(map(torch.equal, known, held))), [])
            if not shared:
                weight = own_weight(layer)
                shared = [nn.Parameter(t.to(weight.device, adapter_dtype(weight))) for t in held]
                sets.append((held, shared))
            members = [state[f"{at}.coefficients"][0] for state in states]
            coefficients = members[0][None] if grid == (1, 1) else new_coefficients(members, grid, self.scale)
            made.append(Mixture(shared, coefficients.to(shared[0]), grid))
        return made

    def starts(self, model: nn.Module, states: list[State]) -> dict[str, Tensor]:
        """Return what the tensors that are no combinations start as: the members' side by side."""
        grids, found = self.grids(model, states), dict[str, Tensor]()
        for name, value in model.state_dict().items():
            layer, _, leaf = name.rpartition(".")
            parts = [state[name].double() for state in states if name in state]
            if ".plait." in name or (leaf == "weight" and layer in grids) or not value.is_floating_point():
                continue
            if len(parts) < len(states) or value.dim() != parts[0].dim():
                continue
            grown = [d for d in range(value.dim()) if value.shape[d] != parts[0].shape[d]]
            if not grown:
                rows, columns = grids.get(layer, (1, 1))
                joins = rows == 1 and columns > 1  # a bias after inputs that are joined
                found[name] = torch.stack(parts).sum(0) if joins else torch.stack(parts).mean(0)
                continue
            times, rest = divmod(value.shape[grown[0]], parts[0].shape[grown[0]])
            if len(grown) > 1 or rest:
                raise BadInput(
                    f"MixtureGrowth cannot grow '{name}' from {tuple(parts[0].shape)} to {tuple(value.shape)}: name "
                    "its layer in where, in both trainings."
                )
            middle = [parts[n % len(parts)] for n in range(times - 1)]
            found[name] = torch.cat([*middle, parts[-1]], grown[0])
        return found

    @torch.no_grad()
    def initialize(self, model: nn.Module, now: Now) -> None:
        """Put the members' other tensors side by side."""
        if self.sources:
            own = model.state_dict(keep_vars=True)
            for name, value in self.starts(model, self.read()).items():
                own[name].copy_(value)
