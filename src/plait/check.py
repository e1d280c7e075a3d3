"""The check of a list of methods against a model, before any training: each refusal is a sentence with the cure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from plait.errors import BadInput, did_you_mean
from plait.schedule import Schedule, Tuned

if TYPE_CHECKING:
    from torch import nn

    from plait.method import Method


def check(methods: Sequence[Method], model: nn.Module) -> None:
    """Raise BadInput, in one sentence that names the cure, for methods that cannot work on this model or together."""
    from plait.method import Method

    for m in methods:
        if isinstance(m, type) and issubclass(m, Method):
            raise BadInput(f"{m.__name__} is a class: write {m.__name__}().")
        if not isinstance(m, Method):
            given = f"an object of the class {type(m).__name__}" if "\n" in repr(m) else repr(m)
            raise BadInput(f"{given} is no method: give methods such as LoRA(rank=8), a function's list unpacked.")
        _refuse_idle(m)
    _refuse_order(methods)
    _refuse_untuned(methods)
    steps = [type(m).__name__ for m in methods if type(m).optimizer is not Method.optimizer]
    if len(steps) > 1:
        raise BadInput(f"{' and '.join(steps)} are both optimizers: keep one.")
    for m in methods:
        _refuse_lost(m, model)
        m.check(model, list(methods))
    adds = any(type(m).parametrize is not Method.parametrize for m in methods)
    if not adds and not any(p.requires_grad for p in model.parameters()):
        raise BadInput("nothing is trained: every parameter of the model is frozen; add an adapter, or unfreeze some.")


def _refuse_order(methods: Sequence[Method]) -> None:
    """Refuse methods that stand twice, lack what they build on, stand before it, or exclude each other."""
    seen: list[Method] = []
    for m in methods:
        name = type(m).__name__
        if m in seen:
            raise BadInput(f"{m!r} stands twice in the list: remove one.")
        if m.after and not any(kind.__name__ in m.after for s in seen for kind in type(s).__mro__):
            later = any(kind.__name__ in m.after for s in methods if s is not m for kind in type(s).__mro__)
            cure = "put it before" if later else "add one before"
            raise BadInput(f"{name} builds on {' or '.join(m.after)}: {cure} {name}.")
        for other in seen:
            if type(other).__name__ in m.excludes or name in other.excludes:
                raise BadInput(f"{name} and {type(other).__name__} exclude each other: remove one.")
        seen.append(m)


def _refuse_untuned(methods: Sequence[Method]) -> None:
    """Refuse numbers that are to be tuned where nothing tunes them, and those that no tuning can reach."""
    from plait.method import Method

    tuned = [(m, f.name) for m in methods for f in fields(m) if isinstance(getattr(m, f.name), Tuned)]
    for m, name in tuned:
        if not any(getattr(other, "tunes", False) for other in methods):
            raise BadInput(f"{type(m).__name__}.{name} is to be tuned, and nothing tunes it: add STN() to the methods.")
        if type(m).optimizer is not Method.optimizer:
            raise BadInput(
                f"{type(m).__name__}.{name} cannot be tuned, for an optimizer's step is no part of the objective: give "
                "a number there, and tune the strength of L2 in place of a decay."
            )


def _refuse_idle(m: Method) -> None:
    """Refuse a method that would silently do nothing."""
    from plait.method import places

    name = type(m).__name__
    if not places(type(m)):
        raise BadInput(f"{name} acts at no place: override one, such as penalty, or drop it.")
    for f in fields(m):
        value = getattr(m, f.name)
        numbers = list(value.extremes()) if isinstance(value, Schedule) else [value]
        if f.name in m.idle and all(number == m.idle[f.name] for number in numbers):
            raise BadInput(f"{name} does nothing while {f.name} is {m.idle[f.name]:g}: change it, or drop {name}.")


def _refuse_lost(m: Method, model: nn.Module) -> None:
    """Refuse a pattern that is no regular expression, or that matches no layer and no weight."""
    from plait.layers import layers as linear_maps
    from plait.layers import matches, require_weights

    name = type(m).__name__
    try:
        re.compile(m.where)
    except re.error as problem:
        raise BadInput(f"{name}.where is no regular expression ({problem}): {m.where!r}.") from None
    layers = [layer for layer, _ in model.named_modules() if layer]
    weights = [weight for weight, _ in model.named_parameters()]
    if isinstance(trained := getattr(m, "train", ""), str):
        require_weights(f"{name}.train", trained, model)
    if m.where == ".*":
        return
    if not any(matches(m.where, known) for known in [*layers, *weights]):
        ends = {layer.rpartition(".")[2] for layer in layers}
        hint = did_you_mean(m.where.rpartition(".")[2], {end for end in ends if not end.isdigit()})
        maps = dict.fromkeys(
            known for layer, _ in linear_maps(model) if not (known := layer.rpartition(".")[2]).isdigit()
        )
        called = ", ".join(list(maps)[:8] or layers[:8])
        hint = hint or (f"; its layers are called {called}" if called else ", which is one layer without a name")
        raise BadInput(f"{name}(where={m.where!r}) matches no layer and no weight of {type(model).__name__}{hint}.")
