"""plait's methods inside Lightning: `Trainer(callbacks=[PlaitCallback(LoRA(rank=8), PiSSA(), AMP())])`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from plait.batch import Batch
from plait.engine import check, optimizer_for, schedule_rates
from plait.errors import BadInput
from plait.measure.base import observe
from plait.method import Ask, Method, Now
from plait.schedule import Schedule


def _no_misfit(output: Any, target: Tensor, now: Now) -> Tensor:
    raise BadInput(
        "this needs the loss of each example, which a LightningModule keeps to itself: set the callback's now.misfit "
        "to a function (output, target, now) -> loss per example before training, or use plait.train."
    )


class PlaitCallback(lightning.Callback):  # type: ignore[misc]
    """Methods at their places in Lightning's automatic optimization.

    The module's own `training_step` computes the objective, so methods of the loss and data places are called there
    (`MaxSup()(logits, target)`); all others act from here: adapters are attached in `setup`, starts run before the
    first step, penalties are added to the gradient, gradient methods ask Lightning's closure as often as they need, the
    step method replaces `configure_optimizers`, constraints follow each step, and `finish` leaves a plain model in
    `self.model`. Running state is in Lightning's checkpoint.

    model: the attribute of the module that holds the network ("" for the module itself).

    Raises BadInput for methods of the loss and data places, and for methods that ask several times a step together
    with `accumulate_grad_batches`, whose earlier micro-batches Lightning does not keep.
    """

    def __init__(self, *methods: Method, model: str = "model") -> None:
        self.methods, self.attribute, self.now = list(methods), model, Now(misfit=_no_misfit)
        self.measures: dict[str, list[dict[str, Any]]] = {}
        self.model: nn.Module | None = None
        self._module: Any = None
        self._optimizer_step: Any = None
        self._starts, self._forwards = list(self.methods), list(self.methods)
        for m in self.methods:
            for place in ("loss", "batch", "batch_size", "examples"):
                if getattr(type(m), place) is not getattr(Method, place):
                    raise BadInput(
                        f"{type(m).__name__} changes the {'loss' if place == 'loss' else 'data'}, which is computed in "
                        f"your training_step: call {type(m).__name__}()(output, target) there, or use plait.train."
                    )

    def network(self, module: Any) -> nn.Module:
        """Return the network inside the Lightning module."""
        found = getattr(module, self.attribute, None) if self.attribute else module
        if not isinstance(found, nn.Module):
            raise BadInput(
                f"{type(module).__name__} has no network '{self.attribute}': name its attribute, as in "
                "PlaitCallback(..., model='net')."
            )
        return found

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the methods, attach adapters, take over the optimizer."""
        if stage != "fit" or pl_module is self._module:
            return
        if self._module is not None:
            raise BadInput("this PlaitCallback acts on another module already: make a new one for each module.")
        self._module = pl_module
        network = self.model = self.network(pl_module)
        check(network, self.methods)
        several = [m for m in self.methods if getattr(m, "calls", 1) != 1]
        if several and trainer.accumulate_grad_batches > 1:
            raise BadInput(
                f"{type(several[0]).__name__} asks for several gradients a step, which Lightning cannot do together "
                "with accumulate_grad_batches: use a larger batch, or plait.train."
            )
        for m in self.methods:
            m.parametrize(network)
        if self.methods and not any(p.requires_grad for p in network.parameters()):
            raise BadInput(
                f"{type(self.methods[0]).__name__} leaves nothing to train before its start, and Lightning asks for "
                "the optimizer before that: use plait.train or transformers' Trainer for it."
            )
        if any(type(m).optimizer is not Method.optimizer for m in self.methods):
            pl_module.configure_optimizers = lambda: optimizer_for(self.methods, self.network(pl_module))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Run the starts, attach what changes activations, wrap the oracle."""
        network, now = self.network(pl_module), self.now
        now.steps = self._steps(trainer)

        def plain(model: nn.Module, now: Now) -> Tensor:
            loss = pl_module.training_step(now.batch.inputs, 0)
            loss = loss["loss"] if isinstance(loss, dict) else loss
            loss.backward()
            return loss.detach()  # type: ignore[no-any-return]

        def calibration(count: int) -> Iterator[Batch]:
            for number, rows in enumerate(trainer.train_dataloader):
                if number == count:
                    return
                rows = trainer.strategy.batch_to_device(rows)
                size = len(rows[0]) if isinstance(rows, list | tuple) else len(next(iter(rows.values())))
                yield Batch.of(rows, torch.zeros(size, dtype=torch.long))

        now.ask, now.calibration = plain, calibration
        now.call = lambda model, rows: model(rows[0] if isinstance(rows, list | tuple) else rows)
        # A fit after the first one goes on: what was started stays, and what changes activations stands once.
        if trainer.global_step == 0:
            while self._starts:
                m = self._starts[0]
                before = {id(p) for p in network.parameters() if p.requires_grad}
                m.initialize(network, now)
                if late := [n for n, p in network.named_parameters() if p.requires_grad and id(p) not in before]:
                    raise BadInput(
                        f"{type(m).__name__} decides what is trained ('{late[0]}') at its start, after Lightning has "
                        "asked for the optimizer: use plait.train or transformers' Trainer for it."
                    )
                self._starts.pop(0)
        self._starts.clear()
        while self._forwards:
            self._forwards.pop(0).forward(network, now)
        self._wrap_step(pl_module)

    def _steps(self, trainer: Any) -> int:
        """Return the number of steps of the run; where nobody knows it, refuse what is scheduled over it."""
        steps = trainer.estimated_stepping_batches
        if math.isfinite(steps):
            return int(steps)
        for m in self.methods:
            if timed := [f.name for f in fields(m) if isinstance(getattr(m, f.name), Schedule)]:
                raise BadInput(
                    f"{type(m).__name__}.{timed[0]} follows a schedule, and this Trainer does not know how many steps "
                    "it will take: give it max_steps or max_epochs, or the field a number."
                )
        return sys.maxsize

    def _wrap_step(self, pl_module: Any) -> None:
        network = self.network(pl_module)
        original = self._optimizer_step = self._optimizer_step or pl_module.optimizer_step

        def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            lowest: list[Any] = []
            self.now.epoch = epoch

            def ask_closure(model: nn.Module, now: Now) -> Tensor:
                lowest.append(optimizer_closure())  # Lightning's closure clears, runs and differentiates
                value = lowest[-1]
                return value.detach() if isinstance(value, Tensor) else torch.zeros(())

            ask: Ask = ask_closure
            for m in self.methods:
                ask = m.gradient(ask)

            def closure() -> Any:
                # Gradients stay: those of earlier micro-batches are in them, and Lightning's closure clears in time.
                schedule_rates(getattr(optimizer, "optimizer", optimizer), self.methods, self.now)
                network.train()
                self.now.objective = ask(network, self.now)
                return lowest[0]

            original(epoch, batch_idx, optimizer, closure)
            for m in self.methods:
                m.constrain(network, self.now)
            self.now.step += 1

        pl_module.optimizer_step = optimizer_step

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Add the gradients of the penalties."""
        network, now = self.network(pl_module), self.now
        share = 1.0 / trainer.accumulate_grad_batches
        for m in self.methods:
            value = m.penalty(network, now)
            if isinstance(value, Tensor) and value.requires_grad:
                (share * value).backward()
                now.parts[type(m).__name__] = float(value.detach())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, then finish: a plain model is left in `self.model` and in the module."""
        network = self.network(pl_module)
        observe(network, self.methods, self.now, self.measures)
        for m in self.methods:
            network = m.finish(network, self.now)
        self.model = network
        if self.attribute:
            setattr(pl_module, self.attribute, network)

    def state_dict(self) -> dict[str, Any]:
        """Return the methods' memory, for Lightning's checkpoint."""
        return {"step": self.now.step, "memory": self.now.memory, "generator": self.now.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the methods' memory from Lightning's checkpoint."""
        self.now.step, self.now.memory = state_dict["step"], state_dict["memory"]
        self.now.generator.set_state(state_dict["generator"])
