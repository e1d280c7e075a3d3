"""The training loop: one function that reads from top to bottom like the picture in the documentation.

examples -> [data] -> batch -> [parametrize, forward] -> output -> [loss] + [penalty] -> objective
objective -> backward -> [gradient] -> grads -> [step] -> weights -> [constrain]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from plait.batch import Batch
from plait.errors import BadInput, NonFinite
from plait.method import Method, Misfit, Now
from plait.oracle import oracle


@dataclass
class Run:
    """What training leaves: the model, the curve of the objective, the figures of measures, and the last `now`."""

    model: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    measures: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    now: Now = field(default_factory=Now)
    skipped: list[int] = field(default_factory=list)
    stopped: bool = False
    """Whether `on_step` stopped it: then the model is not finished."""


def train(
    model: nn.Module,
    data: Any,
    loss: Misfit | None = None,
    methods: Sequence[Method] = (),
    *,
    steps: int = 100,
    batch_size: int = 32,
    accumulate: int = 1,
    seed: int = 0,
    call: Callable[[nn.Module, Any], Any] | None = None,
    validation: Any = None,
    device: str | None = None,
    precision: str = "float32",
    compile: bool = False,
    sharding: str = "none",
    folder: str | Path | None = None,
    save_every: int = 0,
    measure_every: int = 0,
    nonfinite: str = "stop",
    on_start: Callable[[Now], None] | None = None,
    on_step: Callable[[Now], bool | None] | None = None,
) -> Run:
    """Train a model with methods that each act at their place; return the finished model and what was seen.

    data: (inputs, targets) tensors, a sequence of (input, target) pairs, or anything with `len` and `batch(positions)`.
    loss: (output, target, now) -> misfit per example, unreduced; unless given, cross entropy for whole-number targets
    and for rows of probabilities, squared error for other real ones. folder: where checkpoints go, `save_every` steps;
    a run that finds one of itself there goes on from it, to the bitwise same weights, also with more steps than before
    where nothing is scheduled over them. nonfinite: "stop" raises NonFinite, "skip" leaves the step out, and what it
    changed in buffers and memory; weights that are not finite raise it in any case, and are not kept. on_start: called
    once, before the first step. on_step: called after each step; when it returns True the run stops there, after a
    checkpoint, and is not finished. Raises BadInput, before any training, for what cannot work.

    >>> import torch
    >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(3, 1), (x, x.sum(1)), steps=200)
    >>> run.history[-1]["objective"] < run.history[0]["objective"]
    True
    """
    from plait.checkpoint import resume, resume_weights, save, signature
    from plait.engine import Engine, as_data, check, check_options, optimizer_for, prepared
    from plait.measure.base import observe
    from plait.nonfinite import explain, finite, require_finite_weights
    from plait.passes import reversible

    options = {"batch_size": batch_size, "accumulate": accumulate, "precision": precision, "sharding": sharding}
    check_options(seed, device, steps=steps, save_every=save_every, measure_every=measure_every, nonfinite=nonfinite,
                  compile=compile, **options)  # fmt: skip
    check(model, methods)
    data = as_data(data)
    engine = Engine(seed=seed, device=device, precision=precision, sharding_by=sharding, call=call, methods=methods)
    now = engine.start(model, data, loss, steps, batch_size, validation)
    now.methods = methods
    run = Run(model, now=now)
    fits = signature(model, methods, seed=seed, examples=len(data), processes=engine.processes, **options)
    for m in methods:
        m.parametrize(model)
    engine.place(model)
    for m in methods:
        now.misfit = m.loss(now.misfit)
    ask = now.ask = oracle(engine, now.misfit, methods, accumulate)
    if not resume_weights(folder, model, now, fits):
        for m in methods:
            m.initialize(model, now)
    for m in methods:
        m.forward(model, now)
    for m in methods:
        ask = m.gradient(ask)
    trained = engine.distribute(model, compile, methods)
    rule = optimizer_for(methods, model)
    sampler = engine.sampler(len(data), batch_size, methods)
    resume(folder, model, now, fits, rule, sampler, run)
    if on_start is not None:
        on_start(now)
    while now.step < steps:
        with prepared(model, rule, methods, now):
            now.batch = engine.batch(data, sampler.next(now))
            for m in methods:
                now.batch = m.batch(now.batch, now)
            leave_out = reversible(model, now) if nonfinite == "skip" else None
            now.objective = ask(trained, now)
            engine.unreached.look(model)
            if finite(now.objective, model):
                rule.step()
                for m in methods:
                    m.constrain(model, now)
            elif leave_out is not None:
                leave_out()
                run.skipped.append(now.step)
            else:
                raise NonFinite(explain(now, folder))
        run.history.append({"step": now.step, "objective": float(now.objective), **now.parts})
        now.step += 1
        if measure_every and now.step % measure_every == 0:
            observe(engine.whole(model), methods, now, run.measures)
        stopped = on_step is not None and on_step(now) is True
        if folder is not None and (stopped or (save_every and now.step % save_every == 0)):
            require_finite_weights(model, now, folder)
            save(folder, model, now, fits, rule, sampler, run)
        if stopped:
            run.stopped = True
            return run
    engine.unreached.warn()
    require_finite_weights(model, now, folder)
    if folder is not None:
        save(folder, model, now, fits, rule, sampler, run)
    model = engine.whole(model)
    if not measure_every or now.step % measure_every:
        observe(model, methods, now, run.measures)
    for m in methods:
        model = m.finish(model, now)
    run.model = model
    return run


__all__ = ["BadInput", "Batch", "Run", "oracle", "train"]
