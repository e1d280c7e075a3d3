"""Dropout and stochastic depth whose rate changes over the run."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Fraction, Probability, ScheduledProbability
from plait.forward.base import Forward
from plait.layers import layers, require_layers
from plait.method import Method, Now, method
from plait.schedule import Linear, Schedule, Switch


def drop_path(inputs: Tensor, output: Tensor, rate: float) -> Tensor:
    """Return x + keep / (1 - rate) * (output - x), keep ~ Bernoulli(1 - rate) for each example, of [n, ...].

    >>> drop_path(torch.zeros(2, 1), torch.ones(2, 1), 0.0)
    tensor([[1.],
            [1.]])
    """
    if rate == 0:
        return output
    shape = (len(inputs), *[1] * (inputs.dim() - 1))
    keep = (torch.rand(shape, device=inputs.device) >= rate).to(output.dtype)
    return inputs + keep / (1 - rate) * (output - inputs)


@method
class Drops(Forward):
    """Dropout at `probability`: of the model's own dropout layers, and at the output of others that `where` names."""

    @property
    def probability(self) -> float | Schedule:
        """The rate over the run."""
        raise NotImplementedError

    def rate_at(self, number: int, now: Now) -> float:
        """Return the rate of the target with that number; where a rate is tuned for each layer, it has its own."""
        rate = now.at(self.probability)
        if isinstance(rate, Tensor):
            rate = rate.detach()
            return float(rate[number] if rate.dim() else rate)
        return rate

    def targets(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the layers that are dropped from."""
        if self.where != ".*":
            return require_layers(self, model, self.where, nn.Module)
        own = list(layers(model, ".*", _DropoutNd))
        if not own:
            title = type(self).__name__
            raise BadInput(f"{title} finds no dropout in the model: name in where the layers to drop from.")
        return own

    def forward(self, model: nn.Module, now: Now) -> None:
        """Attach what sets the rates, and drops."""
        targets = self.targets(model)
        own = [(number, name) for number, (name, layer) in enumerate(targets) if isinstance(layer, _DropoutNd)]

        def set_rates(module: nn.Module, _: Any) -> None:
            # On the whole model, not on the layer: attention reads its dropout's p without calling it. Layers are
            # found by name, so that a copy of the model sets its own.
            if self.active(module, now):
                for number, name in own:
                    module.get_submodule(name).p = self.rate_at(number, now)  # type: ignore[assignment]

        if own:
            model.register_forward_pre_hook(set_rates)
        for number, (_, layer) in enumerate(targets):
            if not isinstance(layer, _DropoutNd):
                self.drop_output(layer, number, now)

    def drop_output(self, layer: nn.Module, number: int, now: Now) -> None:
        """Let a layer's output pass through dropout."""

        def dropped(module: nn.Module, _: Any, output: Any) -> Any:
            if not self.active(module, now):
                return output
            first = output[0] if isinstance(output, tuple) else output
            first = nn.functional.dropout(first, self.rate_at(number, now), True)
            return (first, *output[1:]) if isinstance(output, tuple) else first

        layer.register_forward_hook(dropped)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse targets that match nothing."""
        self.targets(model)


@paper("srivastava2014dropout", key="dropout", kind="ground")
@method
class Dropout(Drops):
    """x -> keep / (1 - rate) * x, keep ~ Bernoulli(1 - rate) for each entry, while training.

    The model's own dropout layers get the rate, at each pass; other layers that `where` names get a dropout at their
    output, of any shape. rate: in [0, 1); it may be a schedule, or tuned, for each layer too. Raises BadInput where the
    model has no dropout layer and `where` names none to drop from.

    >>> Dropout(rate=0.3).rate_at(0, Now())
    0.3
    """

    idle: ClassVar[dict[str, float]] = {"rate": 0}
    rate: ScheduledProbability = 0.1

    @property
    def probability(self) -> float | Schedule:
        """The field."""
        return self.rate


@paper("liu2023dropout", key="early-dropout", theme="optim")
@method
class EarlyDropout(Drops):
    """Dropout at the rate p_t: early, p_t = rate (1 - t / c) (linear) or rate (constant) for t < c, then 0;
    late, 0 for t < c, then rate. c = cutoff * steps.

    Early dropout makes gradients of different batches agree more while training begins, and so lets a network that
    underfits fit better; late dropout regularizes one that overfits.

    drops="activations": the model's own dropout layers get the rate, at each pass; other layers that `where` names get
    a dropout at their output. drops="blocks": stochastic depth, the blocks that `where` names keep x alone with
    probability p_t l / (L - 1) per example, l = 0 ... L - 1 in the model's order, and their change is scaled by
    1 / (1 - p) otherwise; a block maps a tensor, or a tuple's first, to one of the same shape.

    rate: in [0, 1), 0.1 in the paper. cutoff: in [0, 1], 50 of 300 epochs there. After the run dropout layers stay at
    the last rate. Raises BadInput where there is no dropout layer and `where` names none to drop from, and for blocks
    that `where` does not name or that change the shape.

    >>> EarlyDropout(rate=0.4, cutoff=0.5).schedule.at(0.25)
    0.2
    """

    rate: Probability = 0.1
    cutoff: Fraction = 50 / 300
    when: Literal["early", "late"] = "early"
    shape: Literal["linear", "constant"] = "linear"
    drops: Literal["activations", "blocks"] = "activations"

    @property
    def schedule(self) -> Schedule:
        """The rate over the run."""
        if self.when == "late":
            return Switch(first=0.0, then=self.rate, at_progress=self.cutoff)
        if self.shape == "constant":
            return Switch(first=self.rate, then=0.0, at_progress=self.cutoff)
        return Linear(start=self.rate, end=0.0, until=self.cutoff)

    @property
    def probability(self) -> Schedule:
        """The schedule."""
        return self.schedule

    def targets(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the layers that are dropped from, or the blocks."""
        if self.where == ".*" and self.drops == "blocks":
            raise BadInput("EarlyDropout(drops='blocks') needs the residual blocks: name them in where.")
        return super().targets(model)

    def forward(self, model: nn.Module, now: Now) -> None:
        """Attach what sets the rates, and drops."""
        if self.drops == "activations":
            super().forward(model, now)
            return
        targets = self.targets(model)
        for number, (name, layer) in enumerate(targets):
            self.drop_block(name, layer, number / max(len(targets) - 1, 1), now)

    def drop_block(self, name: str, block: nn.Module, depth: float, now: Now) -> None:
        """Let a residual block be skipped, by example."""

        def skipped(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not self.active(module, now):
                return output
            inputs = args[0] if args else next(iter(kwargs.values()))
            first = output[0] if isinstance(output, tuple) else output
            if first.shape != inputs.shape:
                raise BadInput(f"'{name}' is no residual block: it maps {tuple(inputs.shape)} to {tuple(first.shape)}.")
            first = drop_path(inputs, first, depth * now.at(self.schedule))
            return (first, *output[1:]) if isinstance(output, tuple) else first

        block.register_forward_hook(skipped, with_kwargs=True)
