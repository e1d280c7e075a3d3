"""The plain gradient oracle: the gradient of loss + penalties on a batch. Gradient methods wrap it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.batch import IGNORE, Batch, weighted_sum
from plait.errors import BadInput
from plait.method import Ask, Method, Misfit, Now
from plait.nonfinite import finite
from plait.passes import reversible, rewind
from plait.sharding import scalar

PATIENCE, HIGHEST = 1000, 24
"""float16: after so many finite gradients the scale is doubled, to at most 2 to that power."""


def oracle(engine: Any, misfit: Misfit, methods: Sequence[Method], accumulate: int) -> Ask:
    """Return the plain gradient oracle: it fills `.grad` with the gradient of loss + penalties and returns the value.

    A batch is worked through in `accumulate` micro-batches whose gradients add up to exactly the whole batch's: every
    misfit is divided by the mass of the whole batch, over all processes.
    """

    def ask(model: nn.Module, now: Now) -> Tensor:
        whole, total = now.batch, engine.total(now.batch.mass())
        parts = engine.parts(whole, accumulate)
        value = torch.zeros((), device=whole.weight.device)
        figures: dict[str, float] = {"loss": 0.0}
        now.share = engine.scale / max(len(whole), 1)
        _say_uncounted(whole, now)
        for number, (part, share) in enumerate(parts, 1):
            with engine.synchronized(model, last=number == len(parts)), engine.watching(model, methods, now):
                now.batch, now.output = part, engine.call(model, part.inputs)
                loss = weighted_sum(misfit(now.output, part.target, now), part.weight) / total
                added = [(m, scalar(m.penalty(engine.plain(model), now))) for m in methods]
                _refuse_constants(added, methods, now)
                _refuse_untrained(loss, now)
                engine.backward(loss * engine.processes + share * sum(p for _, p in added))
            value += loss.detach() * engine.processes
            figures["loss"] += float(loss.detach()) * engine.processes
            for m, p in added:
                if isinstance(p, Tensor) or p != 0.0:
                    name, figure = type(m).__name__, share * float(p.detach() if isinstance(p, Tensor) else p)
                    figures[name] = figures.get(name, 0.0) + figure
                    value += figure
            now.parts = dict(figures)
        now.batch, now.output, now.share = whole, None, 0.0
        _refuse_sparse(model, methods, now)
        mean: Tensor = engine.mean(value)
        return mean

    return scaled(engine, ask) if engine.lower is torch.float16 else ask


def _say_uncounted(batch: Batch, now: Now) -> None:
    """Warn where every target of a run's first batch is the one that is left out: such a batch teaches nothing."""
    if now.step == 0 and not batch.target.is_floating_point() and bool((batch.target == IGNORE).all()):
        warnings.warn(
            f"every target of the first batch is {IGNORE}, which is left out, so its loss is 0: see that "
            "answers are not cut off by the length.",
            stacklevel=2,
        )


def _refuse_constants(added: list[tuple[Method, Any]], methods: Sequence[Method], now: Now) -> None:
    """Refuse, in the first step, a penalty of weights none of which is trained, unless weights take turns."""
    if now.step or now.optimizer is None or not torch.is_grad_enabled() or any(m.freezes for m in methods):
        return
    for m, penalty in added:
        if isinstance(penalty, Tensor) and not penalty.requires_grad:
            raise BadInput(
                f"{type(m).__name__} finds no weight that is trained: drop it, or what freezes the weights it is of."
            )


def _refuse_untrained(loss: Tensor, now: Now) -> None:
    """Refuse, in the first step, a loss on which nothing that is trained has any effect."""
    if now.step == 0 and now.optimizer is not None and torch.is_grad_enabled() and not loss.requires_grad:
        raise BadInput(
            "nothing that is trained has an effect on the loss: the layers that the methods name (where, train) are "
            "not used in a pass; name others."
        )


def _refuse_sparse(model: nn.Module, methods: Sequence[Method], now: Now) -> None:
    """Refuse, in the first step, a sparse gradient: what steps or changes gradients needs dense ones."""
    if now.step or not (sparse := [n for n, p in model.named_parameters() if p.grad is not None and p.grad.is_sparse]):
        return
    for m in methods:
        if type(m).gradient is not Method.gradient or type(m).optimizer is not Method.optimizer:
            raise BadInput(
                f"{type(m).__name__} needs dense gradients, and that of '{sparse[0]}' is sparse: build the embedding "
                "with sparse=False."
            )


def scaled(engine: Any, ask: Ask) -> Ask:
    """Return the oracle for float16, whose small gradients would vanish: it differentiates the objective times 2^k.

    Where a gradient overflows, k is lowered and the question is asked again, as if for the first time; after many good
    answers it is raised. What `.grad` holds in the end is unscaled. k is in the memory, and so in every checkpoint.
    """

    def asking(model: nn.Module, now: Now) -> Tensor:
        state = now.memory.get("float16") or {"k": torch.tensor(15), "good": torch.tensor(0)}
        power, good = int(state["k"]), int(state["good"]) + 1
        held = [(p, p.grad) for p in model.parameters() if p.requires_grad]
        random, rest = rewind(now), reversible(model, now)
        while True:
            for parameter, _ in held:
                parameter.grad = None
            engine.scale = 2.0**power
            value = ask(model, now)
            engine.scale = 1.0
            if power == 0 or finite(value, model) or not torch.isfinite(value):
                break
            power, good = power - 1, 0
            random()
            rest()
        for parameter, before in held:
            if parameter.grad is not None:
                parameter.grad.div_(2.0**power)
            if before is not None:
                parameter.grad = before if parameter.grad is None else before + parameter.grad
        raised = good >= PATIENCE and power < HIGHEST
        now.memory["float16"] = {"k": torch.tensor(power + raised), "good": torch.tensor(0 if raised else good)}
        return value

    return asking
