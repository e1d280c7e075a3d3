"""Averages of the weights along the way: the mean over a run's end, or one in which old weights fade."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Fraction, Probability
from plait.layers import evaluating, matches_weight
from plait.math.update_rule import exact
from plait.method import Method, Now, method
from plait.sharding import averaged, full


@method
class Average(Method):
    """a <- a + share (w - a) every `every` steps from the part `begin` of the run on; the run ends with a, not w.

    The average is float32 (float64 of float64 weights) and starts at the first weights that it takes in; the last step
    is taken in if no other was. In the end the running statistics of normalization layers, which belong to other
    weights, are gathered anew on as many batches as an epoch has. where: names of the weights that are averaged.
    Training itself goes on as it would.
    """

    begin: Fraction = 0.0
    every: Count = 1

    def share(self, seen: int) -> float:
        """Return how much of the average the weights are that come after `seen` others."""
        raise NotImplementedError

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse an average of adapters that no longer stand when it is put in place, and two of the same weights."""
        name, place = type(self).__name__, next((i for i, m in enumerate(methods) if m is self), 0)
        if any(type(m).__name__ == "Fold" for m in methods[:place]):
            raise BadInput(f"{name} averages adapters, which Fold removes before it: put {name} before Fold.")
        if any(isinstance(m, Average) and m.where == self.where for m in methods[place + 1 :]):
            raise BadInput(f"{name} is followed by another average of the same weights, which would replace its own.")

    def weights(self, model: nn.Module, now: Now) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained weights that are averaged."""
        for name, p in now.trained(model):
            if matches_weight(self.where, name):
                yield name, p

    @torch.no_grad()
    def constrain(self, model: nn.Module, now: Now) -> None:
        """Take the weights in, after a step; they are left as they are."""
        memory = now.of(self)
        seen = int(memory.get("seen", torch.tensor(0)))
        due = (now.step + 1) % self.every == 0 and (self.begin == 0 or now.progress >= self.begin)
        if not due and not (seen == 0 and now.step + 1 == now.steps):
            return
        memory["seen"] = torch.tensor(seen + 1)
        for name, p in self.weights(model, now):
            weight, key = full(p.detach()).to(exact(p.dtype)), f"average.{name}"
            if seen == 0:
                memory[key] = weight.clone()
            else:
                memory[key].lerp_(weight, self.share(seen))

    @torch.no_grad()
    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Put the average in place of the weights."""
        memory = now.of(self)
        for name, p in model.named_parameters():
            if f"average.{name}" in memory:
                p.copy_(memory[f"average.{name}"])
        gather_statistics(model, now)
        return model


@paper("izmailov2018averaging", key="swa", kind="ground")
@method
class SWA(Average):
    """a <- a + (w - a) / (n + 1), the mean of the weights after every `every`-th step of the last part of the run.

    Izmailov et al.'s stochastic weight averaging; Polyak & Juditsky's average with begin=0. The rate should stay large
    enough that the weights move: constant from `begin` on, or a cosine of as many cycles as its ends are averaged, with
    `every` the steps of a cycle. See `Average`. Raises BadInput after Fold, and before another average of the same
    weights.

    >>> method, model, now = SWA(begin=0.0), nn.Linear(1, 1, bias=False), Now(steps=3)
    >>> for now.step, weight in enumerate((1.0, 2.0, 6.0)):
    ...     _ = nn.init.constant_(model.weight, weight)
    ...     method.constrain(model, now)
    >>> method.finish(model, now).weight.item()
    3.0
    """

    begin: Fraction = 0.75

    def share(self, seen: int) -> float:
        """Return 1 / (n + 1)."""
        return 1 / (seen + 1)


@paper("polyak1992acceleration", key="ema", kind="ground")
@method
class EMA(Average):
    """a <- decay * a + (1 - decay) w after each step; at first, while n < decay / (1 - decay), the mean of all n + 1.

    The exponential moving average of the weights, without the long memory of where training started. decay: in [0, 1).
    Over the last 1 / (1 - decay) steps the average follows; it wants a smaller decay in a short run. See `Average`.
    Raises BadInput after Fold, before another average of the same weights, and in a run for a decay of 0.

    >>> method, model, now = EMA(decay=0.5), nn.Linear(1, 1, bias=False), Now(steps=3)
    >>> for now.step, weight in enumerate((1.0, 3.0, 6.0)):
    ...     _ = nn.init.constant_(model.weight, weight)
    ...     method.constrain(model, now)
    >>> method.finish(model, now).weight.item()
    4.0
    """

    decay: Probability = 0.999

    idle: ClassVar[dict[str, float]] = {"decay": 0}

    def share(self, seen: int) -> float:
        """Return 1 - decay, or more at first."""
        return max(1 - self.decay, 1 / (seen + 1))


def gather_statistics(model: nn.Module, now: Now) -> None:
    """Gather the running statistics of normalization layers anew: plain means over an epoch's batches."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if not norms:
        return
    momenta: list[float | None] = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.training = True
        for number, batch in enumerate(now.calibration(max(now.steps_per_epoch, 1)), 1):
            for norm in norms:
                norm.momentum = 1 / number  # a momentum of None is a mean to batch norms, but 0 to instance norms
            now.call(model, batch.inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            for statistic in (norm.running_mean, norm.running_var):
                if statistic is not None:
                    averaged(statistic)  # each process sees its share of the batches
