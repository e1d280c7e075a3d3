"""Finding a model's layers by name, and seeing each kind of layer's weight as one matrix [out, in]."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from plait.errors import BadInput, did_you_mean

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Kinds = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool]
"""Which layers: those of a type, of one of several types, or those of which a predicate is true."""


def is_transformers_conv1d(layer: nn.Module) -> bool:
    """Say whether a layer is transformers' Conv1D: a linear map that stores its weight as [in, out]."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_linear_map(layer: nn.Module) -> bool:
    """Say whether a layer is a linear map of its input with one weight: Linear, convolution, Embedding, Conv1D."""
    return isinstance(layer, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) or is_transformers_conv1d(layer)


def matches(where: str, name: str) -> bool:
    """Say whether a pattern matches a whole dotted name, or its end after a dot.

    >>> matches("q_proj|v_proj", "layers.0.attn.q_proj"), matches("proj", "layers.0.attn.q_proj")
    (True, False)
    """
    return _pattern(where).fullmatch(name) is not None


def matches_weight(where: str, name: str) -> bool:
    """Say whether a pattern matches the dotted name of a weight, or that of its layer.

    >>> matches_weight("q_proj", "layers.0.q_proj.weight"), matches_weight("bias", "layers.0.q_proj.bias")
    (True, True)
    """
    return matches(where, name) or matches(where, name.rpartition(".")[0])


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model itself, without what torch.compile and data parallelism wrap around it, whose names go before
    those of its parts.
    """
    while isinstance(inner := getattr(model, "_orig_mod", None) or _replicated(model), nn.Module):
        model = inner
    return model


def _replicated(model: nn.Module) -> nn.Module | None:
    return model.module if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else None


def within(where: str, name: str) -> bool:
    """Say whether a pattern matches the name of a parameter, or of a part of the model that holds it.

    >>> within("head", "head.weight"), within("head|bias", "body.0.bias"), within("head", "overhead.weight")
    (True, True, False)
    """
    parts = name.split(".")
    return any(matches(where, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


@cache
def _pattern(where: str) -> re.Pattern[str]:
    try:
        re.compile(where)
        return re.compile(rf"(?:.*\.)?(?:{where})")
    except re.error as problem:
        raise BadInput(f"where is {where!r}, which is no regular expression ({problem}): mend it.") from None


def layers(model: nn.Module, where: str = ".*", kinds: Kinds = is_linear_map) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) of the layers of some kinds whose name matches, in the model's order."""
    for name, layer in model.named_modules():
        fits = isinstance(layer, kinds) if isinstance(kinds, type | tuple) else kinds(layer)
        if fits and matches(where, name) and ".plait" not in f".{name}":
            yield name, layer


def require_layers(
    method: object, model: nn.Module, where: str = ".*", kinds: Kinds = is_linear_map
) -> list[tuple[str, nn.Module]]:
    """Return the layers that match, or raise BadInput naming the nearest names that would."""
    found = list(layers(model, where, kinds))
    if found:
        return found
    known = sorted({name.rpartition(".")[2] for name, _ in layers(model, ".*", kinds)} - {""})
    title = type(method).__name__
    if not known:
        raise BadInput(f"{title} finds no layer that it is defined for in {type(model).__name__}: drop it.")
    refuse_others(method, model, where, known)
    near = get_close_matches(where.rpartition(".")[2], known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"its layers are called {', '.join(known[:8])}."
    raise BadInput(f"{title}(where={where!r}) matches no layer that it is defined for; {hint}")


def refuse_others(method: object, model: nn.Module, where: str, known: list[str]) -> None:
    """Raise BadInput if a pattern names a layer of the model, for which the method is not defined; `known` is what to
    name in its place.
    """
    other = next(layers(model, where, nn.Module), None) if where != ".*" else None
    if other is not None and other[0]:
        name, layer = other
        raise BadInput(
            f"{type(method).__name__} is not defined for the {type(layer).__name__} '{name}': name layers such as "
            f"{', '.join(known[:8])} in where."
        )


def refuse_names_of_others(method: object, model: nn.Module, where: str) -> None:
    """Raise BadInput if one name in a list of names ("q_proj|norm") names layers of the model of which none is a linear
    map, so that it would silently do nothing; a name that the model does not have may be another model's.
    """
    if "|" not in where or re.search(r"[()\[\]]", where):
        return
    for name in where.split("|"):
        if not any(True for _ in layers(model, name)):
            refuse_others(method, model, name, sorted({layer.rpartition(".")[2] for layer, _ in layers(model)} - {""}))


def refuse_batch_norm(method: object, model: nn.Module) -> None:
    """Raise BadInput if a layer of the model mixes the examples of a batch, each of which a method looks at alone."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            raise BadInput(
                f"{type(method).__name__} needs each example alone, and '{name}' mixes them: use GroupNorm or "
                "LayerNorm."
            )


def require_weights(field: str, pattern: str, model: nn.Module) -> None:
    """Raise BadInput for a pattern of what is to be trained that matches no weight and no layer that holds one."""
    names = [name for name, _ in model.named_parameters()]
    if pattern and not any(within(pattern, name) for name in names):
        known = {part for name in names for part in name.split(".") if not part.isdigit()}
        hint = did_you_mean(pattern.rpartition(".")[2], known)
        raise BadInput(f"{field}={pattern!r} matches no weight of {type(model).__name__}{hint}: change it, or drop it.")


Layers = dict[str, list[str]]
"""Layers that are alike, by name, each with the names of its parameters."""


def repeated_layers(shapes: Mapping[str, Any]) -> Layers:
    """Return the members of lists (`layers.0`, `layers.1`, ...) whose parameters have the same names and shapes.

    Of each list the largest such set counts, if it has two members. Lists inside a member belong to it.

    >>> shapes = {"in.weight": (4, 2), "layers.0.weight": (4, 4), "layers.1.weight": (4, 4), "out.weight": (2, 4)}
    >>> repeated_layers(shapes)
    {'layers.0': ['layers.0.weight'], 'layers.1': ['layers.1.weight']}
    """
    members: dict[str, Layers] = defaultdict(lambda: defaultdict(list))
    for name in shapes:
        if place := re.match(r"((?:[^.]*\.)*?\d+)\.", name):
            layer = place[1]
            members[layer.rpartition(".")[0]][layer].append(name)
    found: Layers = {}
    for layers in members.values():
        alike: dict[Any, list[str]] = defaultdict(list)
        for layer, names in layers.items():
            alike[tuple((name.removeprefix(layer), tuple(shapes[name])) for name in names)].append(layer)
        largest = max(alike.values(), key=len)
        found |= {layer: layers[layer] for layer in largest if len(largest) > 1}
    return found


def own_weight(layer: nn.Module) -> Tensor:
    """Return a layer's own weight, in its own shape, without what parametrizations make of it.

    It is `layer.weight`, with its type: to a type checker any attribute of a module may be a module.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def own_bias(layer: nn.Module) -> Tensor | None:
    """Return a layer's own bias, or None where it has none."""
    bias: Tensor | None = getattr(layer, "bias", None)
    return bias


def matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's weight as a matrix [out, in * kernel], a view where possible.

    Linear [out, in]; Conv [out, in/groups, *kernel] -> [out, in/groups * kernel]; Conv1D [in, out] -> [out, in];
    Embedding [vocabulary, d] -> [d, vocabulary], the map from one-hot tokens to vectors.
    """
    if isinstance(layer, nn.Embedding) or is_transformers_conv1d(layer):
        return weight.t()
    return weight.flatten(1)


def unmatrix(layer: nn.Module, flat: Tensor, like: Tensor) -> Tensor:
    """Undo `matrix`: a matrix [out, in * kernel] in the shape of the weight `like`."""
    if isinstance(layer, nn.Embedding) or is_transformers_conv1d(layer):
        return flat.t()
    return flat.reshape(like.shape)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (out, in * kernel), the shape of `matrix(layer, layer.weight)`."""
    rows, columns = matrix(layer, own_weight(layer)).shape
    return rows, columns


def weight_identity(layer: nn.Module) -> int:
    """Return the identity of a layer's weight; the layer's own, if the weight is made anew at each reading."""
    weight = layer.weight
    kept = isinstance(weight, nn.Parameter) or weight is layer._parameters.get("weight")  # as functional_call puts it
    return id(weight if kept else layer)


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks for a block of code: remove them after it, whatever happens in it.

    >>> import torch
    >>> layer, seen = nn.Linear(2, 1), []
    >>> with hooked([layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))]):
    ...     output = layer(torch.zeros(2))
    >>> len(seen), len(layer._forward_hooks)
    (1, 0)
    """
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and every layer's own mode back after."""
    modes = [(layer, layer.training) for layer in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


def inputs_divide_by(layer: nn.Module, size: int) -> bool:
    """Say whether a layer is a linear map, but no Embedding, whose number of inputs (channels) `size` divides."""
    if not (isinstance(layer, (nn.Linear, *CONVOLUTIONS)) or is_transformers_conv1d(layer)):
        return False
    return inputs_last(layer, own_weight(layer)).shape[-1] % size == 0


def inputs_last(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return the view of a weight whose last dimension runs over the layer's inputs (a convolution's channels)."""
    if isinstance(layer, CONVOLUTIONS):
        return weight.movedim(1, -1)
    return weight.t() if is_transformers_conv1d(layer) else weight
