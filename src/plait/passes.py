"""Further passes through a model within one step, that leave no trace in statistics, random states, weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from plait.method import Method, Now
from plait.sharding import is_sharded, local_share, world_size


def without_what_methods_read(
    call: Callable[[nn.Module, Any], Any], methods: Iterable[Method]
) -> Callable[[nn.Module, Any], Any]:
    """Return a call of the model that keeps from it the inputs that are for methods alone."""
    apart = tuple(m.reads for m in methods if m.reads)

    def called(model: nn.Module, inputs: Any) -> Any:
        if isinstance(inputs, dict):
            inputs = {name: given for name, given in inputs.items() if not name.startswith(apart)}
        return call(model, inputs)

    return called if apart else call


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of normalization layers as they are; in training they still use the batch's own."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        # An instance norm updates whatever it holds; a momentum of 0 makes that update nothing.
        if isinstance(norm, _InstanceNorm):
            norm.momentum = 0.0
        else:
            norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.track_running_stats = momentum, True


def rewind(now: Now) -> Callable[[], None]:
    """Return a function that puts the random states back to where they are: the next pass sees the same dropout."""
    cpu, drawn = torch.get_rng_state(), now.generator.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def back() -> None:
        torch.set_rng_state(cpu)
        now.generator.set_state(drawn)
        if devices:
            torch.cuda.set_rng_state_all(devices)

    return back


def reversible(model: nn.Module, now: Now) -> Callable[[], None]:
    """Return a function that puts the model's buffers and the methods' memory back to where they are."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    memory = {name: {key: t.detach().clone() for key, t in held.items()} for name, held in now.memory.items()}

    def back() -> None:
        with torch.no_grad():
            for buffer, held in buffers:
                buffer.copy_(held)
        for name, state in now.memory.items():
            state.clear()  # in place: a method may hold on to its own
            state.update(memory.get(name, {}))

    return back


@contextlib.contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put tensors back, bitwise, after they were changed in place."""
    held = [(t, t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in held:
                tensor.copy_(copy)


@contextlib.contextmanager
def swapped(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Run the model with other values of some parameters, while graphs through its own values stay valid.

    The shares of sharded parameters are overwritten and put back: what gathers them reads them where they lie.
    """
    parameters = dict(model.named_parameters())
    whole = [name for name in values if not is_sharded(parameters[name])]
    own = {name: parameters[name].data for name in whole}
    shares = [(local_share(parameters[name]), local_share(values[name])) for name in values if name not in own]
    with kept([share for share, _ in shares]):
        try:
            with torch.no_grad():
                for share, value in shares:
                    share.copy_(value)
            for name in whole:
                parameters[name].data = values[name]
            yield
        finally:
            for name, value in own.items():
                parameters[name].data = value


def call_again(model: nn.Module, inputs: Any, now: Now) -> Any:
    """Return the model's output on other inputs; statistics and `now.features` are those of the pass before."""
    features = now.features
    now.features = {}
    try:
        with frozen_statistics(model):
            return now.call(model, inputs)
    finally:
        now.features = features


class _Enough(BaseException):
    """Every layer that a pass was to reach has been reached; no error that a model would catch to go on otherwise."""


class ShortPasses:
    """Passes through a model of which some layers' inputs are read, each no longer than that takes.

    The first pass goes to its end and shows in which order the layers are reached. A later one ends at the last layer
    that is `needed`, if all layers were reached and it took the same way until there. On several processes, which may
    hold a share of the model each, no pass is cut short.
    """

    def __init__(self) -> None:
        self.way: list[str] = []
        self.reached: list[str] = []
        self.end = 0

    def reach(self, name: str) -> None:
        """Say that a layer was reached, and what is to be read of it was read."""
        self.reached.append(name)
        if len(self.reached) == self.end and self.reached == self.way[: self.end]:
            raise _Enough

    @contextlib.contextmanager
    def to(self, needed: Collection[str]) -> Iterator[None]:
        """Run a pass as far as the layers of these names; of the first pass, of all that will ever be needed."""
        known = set(needed) <= set(self.way) and world_size() == 1
        self.end = 1 + max(place for place, name in enumerate(self.way) if name in needed) if known else 0
        self.reached = []
        with contextlib.suppress(_Enough):
            yield
        self.way = self.way or self.reached
