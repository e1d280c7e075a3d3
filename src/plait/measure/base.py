"""Measures watch and never touch: training goes on bitwise as if they had not been called.

What a measure returns is a dict of figures. A number is drawn over the steps of the run; a `curve` (a density, a sweep)
is drawn as it is, in the report, as the run left it.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from plait.batch import Batch, weighted_sum
from plait.errors import BadInput
from plait.layers import matches_weight
from plait.method import Method, Now
from plait.sharding import full


def curve(
    x: Sequence[float] | Tensor,
    lines: Mapping[str, Sequence[float] | Tensor],
    *,
    across: str,
    along: str,
    log: str = "",
) -> dict[str, Any]:
    """Return a figure that is a curve: `lines`, name -> values at the places `x`, all of one length.

    across, along: what the axes show. log: the axes that are logarithmic: "", "x", "y" or "xy". What is not finite
    becomes a gap. The result is plain JSON, as results.json holds it and the report draws it.

    >>> curve([1, 2], {"loss": [0.5, math.inf]}, across="step", along="loss")["lines"]
    {'loss': [0.5, None]}
    """

    def plain(values: Sequence[float] | Tensor) -> list[float | None]:
        numbers = values.tolist() if isinstance(values, Tensor) else values
        return [float(v) if math.isfinite(v) else None for v in numbers]

    made = {name: plain(values) for name, values in lines.items()}
    return {"x": plain(x), "lines": made, "across": across, "along": along, "log": log}


class NothingTrained(BadInput):
    """What a measure is to look at holds no weight that is trained."""


def trained_by_name(model: nn.Module, where: str = ".*") -> dict[str, nn.Parameter]:
    """Return the parameters that are trained and whose own or whose layer's name matches; refuse if there are none."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and matches_weight(where, name)}
    if not found:
        raise NothingTrained(f"where={where!r} matches no parameter that is trained: change it, or leave it out.")
    return found


def trained(model: nn.Module, where: str = ".*") -> list[nn.Parameter]:
    """Return the parameters that are trained and whose own or whose layer's name matches; refuse if there are none."""
    return list(trained_by_name(model, where).values())


def remember(model: nn.Module, where: str, held: dict[str, Tensor]) -> None:
    """Keep in `held` a copy of each parameter that is trained at the start, as "start/NAME"."""
    held |= {f"start/{name}": full(p.detach()).clone() for name, p in trained_by_name(model, where).items()}


def remembered(model: nn.Module, held: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return the parameters of which `remember` kept a copy, by name: also those that rest, where layers take turns."""
    return {name: p for name, p in model.named_parameters() if f"start/{name}" in held}


def mean_misfit(model: nn.Module, batch: Batch, now: Now) -> Tensor:
    """Return the mean misfit of a batch, as a scalar that can be differentiated."""
    now.batch = batch
    misfit = now.misfit(now.call(model, batch.inputs), batch.target, now)
    return weighted_sum(misfit, batch.weight) / batch.mass().clamp_min(1)


def learning_rate_of(method: Method, given: float | None, now: Now) -> float:
    """Return the learning rate that a measure judges: the one it was given, or else the run's own, which a schedule may
    bring to 0.
    """
    if given is None and now.optimizer is None and not now.learning_rate:
        raise BadInput(f"{type(method).__name__} knows no learning rate here: give it one (lr=...).")
    return now.learning_rate if given is None else given


@contextlib.contextmanager
def untouched(model: nn.Module, now: Now, own: set[str]) -> Iterator[None]:
    """Put back what a measure may change: gradients, modes, buffers, random states, the batch, others' memory."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    modes = [(layer, layer.training) for layer in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    memory = {name: {k: t.clone() for k, t in held.items()} for name, held in now.memory.items() if name not in own}
    seen = now.batch, now.output, now.parts, now.features, now.share
    back: list[Callable[[], Any]] = [
        partial(now.generator.set_state, now.generator.get_state()),
        partial(numpy.random.set_state, numpy.random.get_state()),
        partial(random.setstate, random.getstate()),
    ]
    try:
        devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for restore in back:
            restore()
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        for layer, training in modes:
            layer.training = training
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)
        for name in [n for n in now.memory if n not in own]:
            now.memory[name].clear()  # in place: a method may hold on to its own
            now.memory[name].update(memory.get(name, {}))
            if name not in memory:
                del now.memory[name]
        now.batch, now.output, now.parts, now.features, now.share = seen


def observe(model: nn.Module, methods: Sequence[Method], now: Now, into: dict[str, list[dict[str, Any]]]) -> None:
    """Append each measure's figures to `into`; nothing that training, or the next measure, depends on is different.

    Where layers take turns, all that a measure looks at may rest: then it has nothing to say of this step.
    """
    watching = [m for m in methods if type(m).measure is not Method.measure]
    if not watching:
        return
    for m in watching:
        with untouched(model, now, {repr(other) for other in watching}):
            for parameter in model.parameters():
                parameter.grad = None
            try:
                figures = m.measure(model, now)
            except NothingTrained:
                if not now.resting:
                    raise
                warnings.warn(f"{m!r} says nothing of steps in which all that it looks at rests.", stacklevel=2)
                continue
        into.setdefault(repr(m), []).append({"step": now.step, **figures})
