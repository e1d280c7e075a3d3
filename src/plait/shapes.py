"""Why a model cannot take an input: the layer that refused it, what it takes, and what it was given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.layers import CONVOLUTIONS, hooked, is_linear_map, is_transformers_conv1d, own_bias


@contextlib.contextmanager
def naming_the_layer(model: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """Turn torch's error about a shape or an index into a sentence about the layer that it arose in.

    run: what is done inside, done once more to see which layer it reaches; an error of another kind stays as it is.

    >>> model, x = nn.Sequential(nn.Linear(3, 2)), torch.ones(4, 5)
    >>> with naming_the_layer(model, lambda: model(x)):
    ...     model(x)
    Traceback (most recent call last):
    ...
    plait.errors.BadInput: the layer '0' takes inputs of width 3, not of shape (4, 5): give data of that width, or ...
    """
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as problem:
        if type(problem) not in (RuntimeError, IndexError, ValueError):
            raise  # out of memory, and others that are not about the input
        said = _refusal(model, run)
        if said is None:
            raise
        raise BadInput(said) from None


def _refusal(model: nn.Module, run: Callable[[], Any]) -> str | None:
    entered: list[tuple[str, nn.Module, Any]] = []

    def enter(layer: nn.Module, given: tuple[Any, ...], name: str) -> None:
        entered.append((name, layer, given[0] if given else None))

    def leave(layer: nn.Module, given: Any, output: Any) -> None:
        entered.pop()

    maps = [(name, layer) for name, layer in model.named_modules() if is_linear_map(layer)]
    with (
        hooked(layer.register_forward_pre_hook(partial(enter, name=name)) for name, layer in maps),
        hooked(layer.register_forward_hook(leave) for _, layer in maps),
        torch.no_grad(),
        contextlib.suppress(RuntimeError, IndexError, ValueError),
    ):
        run()
    return _sentence(*entered[-1]) if entered else None


def _sentence(name: str, layer: nn.Module, given: Any) -> str | None:
    if not isinstance(given, Tensor):
        return None
    shape, cure = tuple(given.shape), "or a model for this data"
    if isinstance(layer, nn.Embedding):
        most = layer.num_embeddings
        if given.numel() and not given.is_floating_point() and not 0 <= int(given.min()) <= int(given.max()) < most:
            odd = int(given.max()) if int(given.max()) >= most else int(given.min())
            return f"the layer '{name}' has {most} rows, and an input asks for row {odd}: give smaller indices, {cure}."
        return None
    if isinstance(layer, CONVOLUTIONS):
        dimensions = len(layer.kernel_size)
        if given.dim() not in (dimensions + 1, dimensions + 2):
            wanted = ("width", "height, width", "depth, height, width")[dimensions - 1]
            return (
                f"the layer '{name}' takes inputs [examples, channels, {wanted}], not of shape {shape}: {_give(cure)}"
            )
        if given.shape[-dimensions - 1] != layer.in_channels:
            return f"the layer '{name}' takes {layer.in_channels} channels, not those of shape {shape}: {_give(cure)}"
        return None
    weight: Any = layer.weight
    width = weight.shape[0] if is_transformers_conv1d(layer) else weight.shape[-1]
    if given.dim() == 0 or given.shape[-1] != width:
        return (
            f"the layer '{name}' takes inputs of width {width}, not of shape {shape}: give data of that width, {cure}."
        )
    if given.dtype != weight.dtype and not torch.is_autocast_enabled(given.device.type):
        return f"the layer '{name}' is {weight.dtype} and its input {given.dtype}: convert one of the two."
    bias = own_bias(layer)
    if bias is not None and bias.dtype != weight.dtype and not torch.is_autocast_enabled(given.device.type):
        return f"the layer '{name}' has a weight of {weight.dtype} and a bias of {bias.dtype}: convert one of the two."
    return None


def _give(cure: str) -> str:
    return f"give inputs of that shape, {cure}."
