"""A model, its methods and its data as the two losses of tensors that bilevel loops solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plait.batch import weighted_sum
from plait.engine import as_data, call_model, default_loss
from plait.errors import BadInput
from plait.loops.tuning import knobs, raw_start, set_numbers
from plait.method import Method, Now


class _Objective(nn.Module):
    """Loss + penalties of a model, as a module, so that its weights can be given from outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, value: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return a value of the model."""
        return value(self.model)


def bilevel_problem(
    model: nn.Module, data: Any, methods: Sequence[Method], validation: Any
) -> tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], Tensor], dict[str, Tensor], Tensor]:
    """Return (inner loss, outer loss, weights, raw numbers) of a model whose methods have `Tuned` fields.

    The inner loss is the objective on all of the data in evaluation mode: the misfit, changed by the methods' losses,
    plus their penalties. The outer loss is the plain misfit on the validation set. What is learned are the raw numbers
    (logarithms, logits) of the fields, in the order of the methods; `plait.loops.tuning.link` turns them into numbers.
    data, validation: as for `plait.train`. Raises BadInput for methods that are no losses or penalties, and where
    nothing is `Tuned`.

    >>> from plait.loops.hypergradient import hoag
    >>> from plait.penalty.norm import L2
    >>> from plait.schedule import Tuned
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> problem = bilevel_problem(nn.Linear(3, 1), (x, x.sum(1)), [L2(strength=Tuned(start=0.1))], (x, x.sum(1)))
    >>> found = hoag(*problem, steps=5)
    >>> float(found.hyper.exp()) < 0.1
    True
    """
    _refuse_others(model, methods)
    if not (found := knobs(model, methods)):
        raise BadInput(
            "bilevel_problem finds nothing to tune: give a field of a method a Tuned(start=...) for a number."
        )
    train, held = as_data(data), as_data(validation, "validation")
    whole, judged = (each.batch(torch.arange(len(each))) for each in (train, held))
    now, wrapped = Now(model=model, methods=list(methods)), _Objective(model.eval())
    now.misfit, now.batch, now.call = default_loss(train), whole, call_model
    for m in methods:
        now.misfit = m.loss(now.misfit)

    def objective(module: nn.Module) -> Tensor:
        now.output = call_model(module, whole.inputs)
        value: Tensor = weighted_sum(now.misfit(now.output, whole.target, now), whole.weight) / whole.mass()
        for m in methods:
            value = value + m.penalty(module, now)
        return value

    def misfit(module: nn.Module) -> Tensor:
        output = call_model(module, judged.inputs)
        value: Tensor = weighted_sum(default_loss(held)(output, judged.target, now), judged.weight) / judged.mass()
        return value

    def at(weights: dict[str, Tensor], value: Callable[[nn.Module], Tensor]) -> Tensor:
        # Penalties look for weights that are trained: those that the gradient is not asked of are made such.
        asked = {name: w if w.requires_grad else w.detach().requires_grad_() for name, w in weights.items()}
        named = {f"model.{name}": w for name, w in asked.items()}
        answer: Tensor = functional_call(wrapped, named, (value,))
        return answer

    def inner(weights: dict[str, Tensor], raw: Tensor) -> Tensor:
        set_numbers(now, found, raw, differentiable=True)
        return at(weights, objective)

    start = [raw_start(knob.tuned) for knob in found for _ in range(knob.rows.stop - knob.rows.start)]
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return inner, lambda weights: at(weights, misfit), weights, torch.tensor(start)


def _refuse_others(model: nn.Module, methods: Sequence[Method]) -> None:
    """Refuse methods that would have no part in the two losses."""
    for m in methods:
        if type(m).loss is Method.loss and type(m).penalty is Method.penalty:
            raise BadInput(f"{type(m).__name__} is no loss and no penalty: leave it out, or tune with STN.")
        m.check(model, list(methods))
