"""The tracks of a study: what "the same size" means when methods are compared.

parameters: each method trains as many parameters as the reference, as nearly as its size allows. memory: each method
takes the largest size whose weights, gradients, optimizer state and activations together stay within the reference's.
A method without a size (`$size` in its lines) stands in both tracks as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from plait.errors import BadInput
from plait.workbench.writing import Values

if TYPE_CHECKING:
    from torch import nn

    from plait.recipe import Recipe
    from plait.workbench.study import Study

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384)
"""The sizes that a track chooses from: steps of a fifth to a third, as ranks are usually written."""


def sizes(study: Study, track: str, task: str) -> dict[str, Values]:
    """Return, by method, the size that the track gives it and what that size amounts to.

    {"size": ..., "amount": parameters or bytes, "fits": whether the amount is the reference's, to the step of the size}
    """
    from plait.workbench.run import load

    reference = study.recipe(study.reference, task)
    model = load(reference).model
    measure = trained if track == "parameters" else held
    budget = measure(reference, model)
    if budget is None:
        raise BadInput(f"{study.reference} does not work on {task}: see it by `plait run`, or take another reference.")
    found, known = {}, dict[str, int | None]()
    for name in study.methods:

        def amount(size: int, name: str = name) -> int | None:
            recipe = study.recipe(name, task, size)
            key = what_counts(recipe) if track == "parameters" else str(recipe.seeded(0))
            if key not in known:
                known[key] = measure(recipe, model)
            return known[key]

        if name == study.reference or not study.sized(name, task):
            size, counted = None, budget if name == study.reference else amount(0)
        else:
            size, counted = nearest(amount, budget) if track == "parameters" else largest(amount, budget)
        fits = counted is not None and (counted <= budget if track == "memory" else near(counted, budget))
        found[name] = {"size": size, "amount": counted, "fits": fits}
    return found


def near(counted: int, budget: int) -> bool:
    """Say whether two numbers of parameters are as alike as a step of the size makes them: a quarter at most."""
    return abs(math.log(max(counted, 1) / max(budget, 1))) <= math.log(1.25)


def nearest(amount: Callable[[int], int | None], budget: int) -> tuple[int | None, int | None]:
    """Return the size whose amount is nearest to the budget in proportion, and that amount.

    >>> nearest(lambda size: 10 * size, 65)
    (6, 60)
    """
    least = amount(SIZES[0])
    tried = list(SIZES)
    if least is not None and least <= budget:  # else more size may be fewer parameters: look at every size
        below = largest(amount, budget)[0] or 1
        tried = [size for size in SIZES if size >= below][:2]
    found = {size: n for size in tried if (n := amount(size)) is not None and n > 0}
    if not found:
        return None, None
    best = min(found, key=lambda size: abs(math.log(found[size] / budget)))
    return best, found[best]


def largest(amount: Callable[[int], int | None], budget: int) -> tuple[int | None, int | None]:
    """Return the size that comes nearest to the budget without passing it, by bisection, and its amount.

    A larger size may amount to more or to less; where none is within the budget, the one with the least is returned.

    >>> largest(lambda size: 10 * size, 65)
    (6, 60)
    >>> largest(lambda size: 384 // size, 65)
    (6, 64)
    """
    ends = {size: n for size in (SIZES[0], SIZES[-1]) if (n := amount(size)) is not None}
    order = SIZES if ends.get(SIZES[-1], math.inf) > ends.get(SIZES[0], math.inf) else SIZES[::-1]
    low, high, best = 0, len(order) - 1, order[0]
    while low <= high:
        middle = (low + high + 1) // 2
        counted = amount(order[middle])
        if counted is not None and counted <= budget:
            best, low = order[middle], middle + 1
        else:
            high = middle - 1
    return best, amount(best)


def what_counts(recipe: Recipe) -> str:
    """Return what the number of trained parameters depends on: the methods that parametrize."""
    from plait.method import Method

    return repr([m for m in recipe.build() if type(m).parametrize is not Method.parametrize])


def trained(recipe: Recipe, model: nn.Module) -> int | None:
    """Return how many parameters a recipe trains on a copy of the model; None where it is refused."""
    made = copy.deepcopy(model)
    methods = recipe.build()
    try:
        recipe.check(made)
        for m in methods:
            m.parametrize(made)
    except BadInput:
        return None
    return sum(p.numel() for p in made.parameters() if p.requires_grad)


def held(recipe: Recipe, model: nn.Module) -> int | None:
    """Return the bytes that a recipe's parts hold at most, counted in a few steps; None where it is refused."""
    from plait.workbench.plan import probe

    examples = math.ceil(recipe.train.batch_size / recipe.train.accumulate)
    try:
        recipe.check(copy.deepcopy(model))
        counted: Mapping[str, int] = probe(recipe, examples, steps=2)["memory"]
    except BadInput:
        return None
    return sum(counted[part] for part in ("weights", "gradients", "optimizer", "activations"))
