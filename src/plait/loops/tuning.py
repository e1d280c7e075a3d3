"""Numbers that are tuned on the validation set while the model trains: which they are, and what they are now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.batch import Batch
from plait.constrain.base import Constraint
from plait.errors import BadInput
from plait.fields import Size
from plait.method import Method, Now, method
from plait.penalty.base import WeightPenalty
from plait.schedule import Tuned
from plait.sharding import world_size
from plait.step.layer_sampling import Rounds

FURTHEST = 20.0
"""How far from 0 a raw number may go: beyond, links are flat in float32."""


def link(tuned: Tuned, raw: Tensor) -> Tensor:
    """Return the number that a raw one, unbounded, stands for: low + e^u, or low + (high - low) sigmoid(u).

    >>> link(Tuned(start=0.5, high=2.0), torch.tensor(0.0))
    tensor(1.)
    """
    if math.isinf(tuned.high):
        return tuned.low + raw.exp()
    return tuned.low + (tuned.high - tuned.low) * raw.sigmoid()


def unlink(tuned: Tuned, number: Tensor) -> Tensor:
    """Return the raw number that stands for one between the ends: the inverse of `link`.

    >>> unlink(Tuned(start=0.5, high=2.0), torch.tensor(1.0))
    tensor(0.)
    """
    above = (number - tuned.low).log()
    return above if math.isinf(tuned.high) else above - (tuned.high - number).log()


def raw_start(tuned: Tuned) -> float:
    """Return the raw number of the start."""
    return float(unlink(tuned, torch.tensor(tuned.start, dtype=torch.float64)))


@dataclass(frozen=True)
class Knob:
    """A tuned number, or the numbers of each layer: its name for reports, and its rows among all raw numbers."""

    tuned: Tuned
    title: str
    rows: slice


def knobs(model: nn.Module, methods: Sequence[Method]) -> list[Knob]:
    """Return what is to be tuned in the fields of methods; raise BadInput where it is not told apart."""
    found: dict[Tuned, Knob] = {}
    for m in methods:
        for f in fields(m):
            tuned = getattr(m, f.name)
            if not isinstance(tuned, Tuned):
                continue
            layer = "" if m.where == ".*" else f"[{m.where}]"
            title = tuned.name or f"{type(m).__name__}{layer}.{f.name}"
            if tuned in found and not tuned.name:
                raise BadInput(
                    f"{found[tuned].title} and {title} are the same {tuned!r}: give each a name of its own, or both "
                    "the same name if they are to be one number."
                )
            start = max((knob.rows.stop for knob in found.values()), default=0)
            count = layers_of(m, f.name, model) if tuned.each_layer else 1
            found.setdefault(tuned, Knob(tuned, title, slice(start, start + count)))
    return list(found.values())


def layers_of(m: Method, name: str, model: nn.Module) -> int:
    """Return on how many layers a method acts, for a number of each of them."""
    targets = getattr(m, "targets", None)
    if targets is None:
        raise BadInput(f"{type(m).__name__}.{name} is one number for all layers: drop each_layer.")
    return len(list(targets(model)))


def raw_starts(found: Sequence[Knob]) -> Tensor:
    """Return all raw numbers, as they start."""
    return torch.tensor([raw_start(knob.tuned) for knob in found for _ in range(knob.rows.stop - knob.rows.start)])


def set_numbers(now: Now, found: Sequence[Knob], raw: Tensor, *, differentiable: bool = False) -> None:
    """Make `now.at` return the numbers that the raw ones stand for; as tensors if the objective is differentiated."""
    for knob in found:
        numbers = link(knob.tuned, raw[knob.rows])
        if not knob.tuned.each_layer:
            numbers = numbers[0]
        plain: Any = numbers.detach() if knob.tuned.each_layer else float(numbers.detach())
        now.tuned[knob.tuned] = numbers if differentiable else plain


def adam_step(state: dict[str, Tensor], name: str, gradient: Tensor, rate: float) -> None:
    """Move state[name] by one step of Adam, whose moments stand beside it."""
    first = state.setdefault(f"{name} first", torch.zeros_like(gradient))
    second = state.setdefault(f"{name} second", torch.zeros_like(gradient))
    steps = state[f"{name} steps"] = state.get(f"{name} steps", torch.zeros((), dtype=torch.long)) + 1
    first = state[f"{name} first"] = 0.9 * first + 0.1 * gradient
    second = state[f"{name} second"] = 0.999 * second + 0.001 * gradient.square()
    unbiased = first / (1 - 0.9 ** int(steps))
    state[name] = state[name] - rate * unbiased / ((second / (1 - 0.999 ** int(steps))).sqrt() + 1e-8)


@method
class Tuner(Method):
    """A method that learns the fields of other methods that are `Tuned`, on the validation set, as the model trains.

    What moves are raw numbers: logarithms of strengths, logits of rates. warmup: the steps before the first of these
    moves. The numbers stand in the figures of `measure`.
    """

    warmup: Size = 0

    tunes: ClassVar[bool] = True

    def state(self, model: nn.Module, now: Now) -> dict[str, Tensor]:
        """Return the memory; "raw" holds all raw numbers."""
        state = now.of(self)
        if "raw" not in state:
            state["raw"] = raw_starts(knobs(model, now.methods))
        return state

    def validation_batch(self, state: dict[str, Tensor]) -> int:
        """Return the number of the next batch of the validation set."""
        seen = state["validated"] = state.get("validated", torch.zeros((), dtype=torch.long)) + 1
        return int(seen) - 1

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Refuse a run that has no validation set, or that does not say which methods it has."""
        if not now.methods:
            raise BadInput(f"{type(self).__name__} works inside plait.train, which gives it the validation set.")
        with torch.no_grad():
            now.validate(model, 0)

    def tune(self, model: nn.Module, now: Now) -> None:
        """Move the raw numbers, before a step."""
        raise NotImplementedError

    def batch(self, batch: Batch, now: Now) -> Batch:
        """Tune, and set the numbers for this step; the batch stays as it is."""
        state = self.state(now.model, now)
        now.batch = batch
        self.tune(now.model, now)
        set_numbers(now, knobs(now.model, now.methods), state["raw"])
        return batch

    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return the tuned numbers by name, `L2.strength`, or `L2.strength 0`, ... for each layer."""
        raw = self.state(model, now)["raw"]
        figures: dict[str, Any] = {}
        for knob in knobs(model, now.methods):
            numbers = link(knob.tuned, raw[knob.rows]).tolist()
            several = knob.tuned.each_layer
            figures |= {f"{knob.title} {i}" if several else knob.title: number for i, number in enumerate(numbers)}
        return figures

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a list in which nothing is to be tuned, or in which data are changed before the numbers are set."""
        title = type(self).__name__
        if not knobs(model, methods):
            raise BadInput(
                f"{title} finds nothing to tune: give a field of another method a Tuned(start=...) for a number."
            )
        of_weights = [m for m in methods if isinstance(m, WeightPenalty | Constraint)]
        each = next((knob.title for knob in knobs(model, of_weights) if knob.tuned.each_layer), "")
        for m in methods:
            if each and isinstance(m, Rounds):
                raise BadInput(
                    f"{each} has a number for each layer, and under {type(m).__name__} layers take turns: drop "
                    "each_layer, or use AdamW."
                )
        if sum(bool(getattr(m, "tunes", False)) for m in methods) > 1:
            raise BadInput(f"{title} and another method would tune the same numbers: keep one.")
        for m in methods[: methods.index(self)]:
            if type(m).batch is not Method.batch and knobs(model, [m]):
                raise BadInput(f"{title} sets the numbers of {type(m).__name__} before it acts: put {title} first.")


@method
class DerivativeTuner(Tuner):
    """A tuner that differentiates the objective itself in the numbers, outside of the step's own pass."""

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Refuse a run without a validation set, or of several processes."""
        super().initialize(model, now)
        if world_size() > 1:
            title = type(self).__name__
            raise BadInput(f"{title} is not defined for several processes: run it on one, or tune with STN.")

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a list in which nothing is to be tuned, or in which a penalty reads features of a pass."""
        super().check(model, methods)
        for m in methods:
            if m.watches:
                title = type(self).__name__
                raise BadInput(f"{title} does not see the features that {type(m).__name__} reads: tune with STN.")

    def require_derivatives(self, slope: Tensor, found: Sequence[Knob]) -> None:
        """Refuse numbers in which the objective has no derivative, given its derivatives in all raw ones."""
        for knob in found:
            if not bool(slope[knob.rows].any()):
                title = type(self).__name__
                raise BadInput(
                    f"the objective has no derivative in {knob.title}: tune it with STN in place of {title}."
                )

    def require_second_derivatives(self, slope: Tensor) -> None:
        """Refuse a model with a part that can be differentiated only once, given a gradient with its graph.

        Autograd would leave that part out of the second derivatives without a word.
        """
        seen: set[Any] = set()
        ahead = [slope.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            if node.name() == "torch::autograd::Error":
                title = type(self).__name__
                raise BadInput(f"{title} needs second derivatives, and a part of the model has none: tune with STN.")
            seen.add(node)
            ahead += [each for each, _ in node.next_functions]
