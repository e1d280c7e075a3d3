"""A model, its methods and its data as the two losses of tensors that bilevel loops solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from plait.batch import Batch, weighted_sum
from plait.engine import as_data, call_model, default_loss
from plait.errors import BadInput
from plait.loops.tuning import Knob, knobs, raw_starts, set_numbers
from plait.method import Method, Now
from plait.passes import frozen_statistics, rewind


class _Wrapped(nn.Module):
    """Values of a model, as a module, so that its weights can be given from outside."""

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
    now = Now(model=model.eval(), methods=list(methods))
    now.misfit, now.call = default_loss(train), call_model
    for m in methods:
        now.misfit = m.loss(now.misfit)

    def misfit(module: nn.Module) -> Tensor:
        output = call_model(module, judged.inputs)
        value: Tensor = weighted_sum(default_loss(held)(output, judged.target, now), judged.weight) / judged.mass()
        return value

    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return *losses(model, now, found, [whole], misfit), weights, raw_starts(found)


def losses(
    model: nn.Module,
    now: Now,
    found: Sequence[Knob],
    batches: Sequence[Batch],
    misfit: Callable[[nn.Module], Tensor],
) -> tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], Tensor]]:
    """Return the objective on batches as a function of (weights, raw numbers), and a misfit as one of weights.

    weights: by name, in the model's place. Each pass draws the same random numbers, where it draws any.
    """
    wrapped, again = _Wrapped(model), rewind(now)

    def at(weights: dict[str, Tensor], value: Callable[[nn.Module], Tensor]) -> Tensor:
        # Penalties look for weights that are trained: those that the gradient is not asked of are made such.
        asked = {name: w if w.requires_grad else w.detach().requires_grad_() for name, w in weights.items()}
        named = {f"model.{name}": w for name, w in asked.items()}
        answer: Tensor = functional_call(wrapped, named, (value,))
        again()
        return answer

    def inner(weights: dict[str, Tensor], raw: Tensor) -> Tensor:
        set_numbers(now, found, raw, differentiable=True)
        return at(weights, lambda module: objective(module, now, batches))

    return inner, lambda weights: at(weights, misfit)


def objective(model: nn.Module, now: Now, batches: Sequence[Batch] = ()) -> Tensor:
    """Return loss + penalties on `now.batch`, or on several batches as one, which can be differentiated twice.

    Running statistics stay. A penalty that reads the batch is averaged over several, as over micro-batches.
    """
    batch, output = now.batch, now.output
    parts = batches or [batch]
    mass = torch.stack([part.mass() for part in parts]).sum().clamp_min(1e-12)
    examples, value = sum(map(len, parts)), torch.zeros((), device=mass.device)
    with frozen_statistics(model), sdpa_kernel(SDPBackend.MATH):
        for part in parts:
            now.batch, now.output = part, now.call(model, part.inputs)
            value = value + weighted_sum(now.misfit(now.output, part.target, now), part.weight) / mass
            for m in now.methods:
                value = value + len(part) / examples * m.penalty(model, now)
    now.batch, now.output = batch, output
    return value


def training_batches(now: Now, count: int) -> list[Batch]:
    """Return the first `count` batches of a run's training data; with 0 all of the data, each example once."""
    if not count and not now.steps_per_epoch:
        raise BadInput("how many training data there are is not known here: say how many batches to take (batches=4).")
    whole = now.steps_per_epoch
    every = not count or 0 < whole <= count
    found = list(now.calibration(whole if every else count))
    if every:  # the last one was filled up with examples of the first
        found[-1] = found[-1].take(slice(0, now.examples - sum(map(len, found[:-1]))))
    return found


def validation_misfit(now: Now, count: int) -> Callable[[nn.Module], Tensor]:
    """Return the mean misfit on the first `count` batches of a run's validation set, or on all of it, of a model."""
    if not count:
        return lambda model: now.validate(model, None)
    return lambda model: torch.stack([now.validate(model, number) for number in range(count)]).mean()


def _refuse_others(model: nn.Module, methods: Sequence[Method]) -> None:
    """Refuse methods that would have no part in the two losses."""
    for m in methods:
        if type(m).loss is Method.loss and type(m).penalty is Method.penalty:
            raise BadInput(f"{type(m).__name__} is no loss and no penalty: leave it out, or tune with STN.")
        m.check(model, list(methods))
