"""Weights as a function of what is trained: how a parametrization is attached to a layer, run, folded and removed.

A parametrization knows one weight as a matrix [out, in]. Its `dense` is its definition. It may add a `fast` path, which
a law binds to the definition. Several stand on one layer as a stack, in the order of the recipe:
W -> first.dense(W) -> second.dense(...). The layer's own weight keeps its name and its place in the state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.errors import BadInput
from plait.layers import (
    CONVOLUTIONS,
    is_transformers_conv1d,
    layers,
    matrix,
    own_bias,
    own_weight,
    refuse_names_of_others,
    require_layers,
    require_weights,
    unmatrix,
)
from plait.math.packed import Packed, quantized_elsewhere, readable, unrounded
from plait.math.products import linear
from plait.method import Method, method
from plait.parametrize.refusals import read_by_others, refuse_weight

P = TypeVar("P", bound="Parametrization")

LEFT = "start_left"
"""The buffer of an adapter that says that a start made it: the digest of the weight that the start left under it."""


class Parametrization(nn.Module):
    """W' = dense(W), for the matrix W [out, in] of one layer; its parameters are what is trained.

    replaces: whether W' has nothing of W, so that what is under this parametrization has no effect. of_weight: whether
    it holds something of W as it was when attached (norms, singular vectors, places). linear: whether it makes a weight
    at all; if not, it acts `after` all those that do, and no weight can hold it.
    """

    replaces: ClassVar[bool] = False
    of_weight: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    made_by: ClassVar[str] = ""
    """The method that users know it by, where other methods look for it."""

    def dense(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer uses: [out, in] -> [out, in]. The definition, and the oracle."""
        raise NotImplementedError

    def sample(self, weight: Tensor) -> Tensor:
        """Return the weight of one training pass, where that is random; its mean over passes is `dense(weight)`."""
        return self.dense(weight)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return the layer's output without forming W', or None if there is no such path here.

        `below()` is the layer's output with everything under this parametrization.
        """
        return None

    def after(self, layer: nn.Module, outputs: Tensor) -> Tensor:
        """Return what stands in the place of the layer's outputs [..., out] (a convolution's [n, out, ...])."""
        return outputs

    def low_rank(self) -> tuple[nn.Parameter, nn.Parameter, float] | None:
        """Return (A, B, scale) if this is the update scale * B A of the weight, A [rank, in], B [out, rank]."""
        return None

    def shift(self) -> Tensor | None:
        """Return what is added to the layer's bias, [out], or None; a layer without a bias has no use for it."""
        return None

    def dense_bias(self, bias: Tensor) -> Tensor:
        """Return the bias that the layer uses in place of what everything below makes of it: [out] -> [out]."""
        shift = self.shift()
        return bias if shift is None else bias + shift

    def learned(self) -> bool:
        """Say whether training made it other than it was when attached, where that shows."""
        low = self.low_rank()
        return low is not None and bool(low[0].any()) and bool(low[1].any())

    def taken(self) -> Tensor | None:
        """Return what a start took out of the layer's own weight, [out, in], or None if it left that alone."""
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return  # a checkpoint of the base model: it has none of the adapters' tensors
        # A start may have changed the rank (EVA) or left a record (start_*): what is loaded decides the shape.
        for key in [key for key in state_dict if key.startswith(f"{prefix}start_")]:
            device = next(self.parameters()).device
            self.register_buffer(key.removeprefix(prefix), torch.empty_like(state_dict[key], device=device))
        if f"{prefix}{LEFT}" not in state_dict:  # what is loaded is of no start, or older than this record
            self._buffers.pop(LEFT, None)
        for name, parameter in self.named_parameters(recurse=False):
            loaded = state_dict.get(prefix + name)
            if loaded is not None and loaded.shape != parameter.shape:
                parameter.data = parameter.data.new_empty(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Stack(nn.ModuleDict):
    """The parametrizations of one layer, by name, bottom first."""


def run(layer: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the output of a linear layer with another weight, in the layer's own shape, and perhaps another bias."""
    bias = own_bias(layer) if bias is None else bias
    if isinstance(layer, nn.Linear):
        return linear(inputs, weight, bias)
    if isinstance(layer, nn.Embedding):
        return F.embedding(
            inputs, weight, layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq, layer.sparse
        )
    if isinstance(layer, CONVOLUTIONS):
        output: Tensor = layer._conv_forward(inputs, weight, bias)
        return output
    if is_transformers_conv1d(layer):
        flat = inputs.reshape(-1, inputs.shape[-1])
        product = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return product.view(*inputs.shape[:-1], weight.shape[1])
    raise BadInput(f"a {type(layer).__name__} cannot be parametrized: it must be a Linear, Conv, Embedding or Conv1D.")


def stack(layer: nn.Module) -> list[Parametrization]:
    """Return the parametrizations of a layer, bottom first."""
    held = getattr(layer, "plait", None)
    return list(held.values()) if isinstance(held, Stack) else []  # type: ignore[arg-type]


def dense_weight(layer: nn.Module, parametrizations: list[Parametrization] | None = None) -> Tensor:
    """Return the weight that a layer uses, in the layer's own shape: the composition of its parametrizations."""
    return _compose(layer, stack(layer) if parametrizations is None else parametrizations, sampled=False)


def untouched_weight(layer: nn.Module) -> Tensor:
    """Return the weight that a layer had before any start moved part of it into an adapter, in the layer's own shape.

    Where no start took anything this is the weight itself; otherwise what was taken is added back, up to one rounding.
    """
    weight = own_weight(layer)
    flat, taken = matrix(layer, weight), [part for part in (p.taken() for p in stack(layer)) if part is not None]
    return unmatrix(layer, (flat + torch.stack(taken).sum(0)).to(weight.dtype), weight) if taken else weight


def refuse_made(what: str, layer: nn.Module) -> None:
    """Refuse to write a weight that a layer makes of others in each pass: what is written would be gone by the next."""
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        raise BadInput(
            f"{what} is made of others in each pass (weight norm, pruning), so that nothing can be written into it: "
            "make it plain first, as torch.nn.utils.parametrize.remove_parametrizations does, or leave it out of where."
        )


@torch.no_grad()
def set_weight(layer: nn.Module, flat: Tensor) -> None:
    """Write a matrix [out, in] into a layer's own weight, whatever its shape and memory format.

    A quantized weight is rounded once, from what it was before it was quantized; refused where that is not held.
    """
    refuse_made(f"the weight of a {type(layer).__name__}", layer)
    weight = own_weight(layer)
    if quantized_elsewhere(weight):
        raise BadInput("a weight that another library quantized cannot be changed: quantize it with Quantize instead.")
    if isinstance(weight, Packed) and weight.original is None:
        raise BadInput(
            "a quantized weight would be rounded a second time, for what it was before is held no longer: put Quantize "
            "and what changes the weight into one run, or give it keep='always'."
        )
    weight.copy_(unmatrix(layer, flat, weight))


def _compose(layer: nn.Module, chosen: list[Parametrization], sampled: bool) -> Tensor:
    weight = own_weight(layer)
    if not chosen:
        return weight
    weight = readable(weight)
    flat = matrix(layer, weight)
    for parametrization in chosen:
        flat = parametrization.sample(flat) if sampled else parametrization.dense(flat)
    return unmatrix(layer, flat, weight)


def _output(layer: nn.Module, inputs: Tensor, chosen: list[Parametrization]) -> Tensor:
    if chosen:
        fast = chosen[-1].fast(layer, inputs, lambda: _output(layer, inputs, chosen[:-1]))
        if fast is not None:
            return fast
    return run(layer, inputs, _compose(layer, chosen, layer.training), dense_bias(layer, chosen))


def dense_bias(layer: nn.Module, parametrizations: list[Parametrization] | None = None) -> Tensor | None:
    """Return the bias that a layer uses, with what its parametrizations make of it; None if it has none."""
    bias = own_bias(layer)
    if bias is None:
        return None
    made = bias
    for parametrization in stack(layer) if parametrizations is None else parametrizations:
        made = parametrization.dense_bias(made)
    return made.to(bias.dtype)


def _forward(layer: nn.Module, inputs: Tensor) -> Tensor:
    every = stack(layer)
    output = _output(layer, inputs, [part for part in every if part.linear])
    for part in every:
        output = output if part.linear else part.after(layer, output)
    return output


def _called(layer: nn.Module, inputs: Any) -> None:
    """Do nothing: nn.TransformerEncoderLayer calls a layer, and does not just read its weight, if it has a hook."""


def be_called(layer: nn.Module) -> None:
    """Let torch's fast paths call a layer, whose `forward` is not its own, in place of reading its weights."""
    layer._forward_pre_hooks[id(_called)] = _called


def be_read(layer: nn.Module) -> None:
    """Undo `be_called`."""
    layer._forward_pre_hooks.pop(id(_called), None)


def attach(layer: nn.Module, name: str, parametrization: Parametrization) -> None:
    """Put a parametrization on top of a layer's stack."""
    weight = own_weight(layer)
    if not isinstance(getattr(layer, "plait", None), Stack):
        layer.plait = Stack()
        layer.forward = partial(_forward, layer)  # a bound method could not be pickled
        be_called(layer)
    held: Stack = layer.plait  # type: ignore[assignment]
    free = name if name not in held else next(f"{name}_{n}" for n in range(2, 10_000) if f"{name}_{n}" not in held)
    held[free] = parametrization.to(weight.device).train(layer.training)


def replace(layer: nn.Module, old: Parametrization, name: str, new: Parametrization) -> None:
    """Put a parametrization into another's place in a layer's stack."""
    held: Stack = layer.plait  # type: ignore[assignment]
    parts = list(held.items())
    held.clear()
    for key, part in parts:
        if part is old:
            attach(layer, name, new)
        else:
            attach(layer, key, part)  # type: ignore[arg-type]


def detach(layer: nn.Module) -> None:
    """Remove a layer's stack; its weight stays as it is."""
    if isinstance(getattr(layer, "plait", None), Stack):
        del layer.plait
        del layer.__dict__["forward"]
        be_read(layer)


@contextmanager
def without_stacks(model: nn.Module) -> Iterator[None]:
    """Let every layer run as if nothing were attached to it."""
    held = [(layer, layer.__dict__.pop("forward")) for layer in model.modules() if stack(layer)]
    try:
        yield
    finally:
        for layer, forward in held:
            layer.__dict__["forward"] = forward


def attached(model: nn.Module, kind: type[P]) -> Iterator[tuple[str, nn.Module, P]]:
    """Yield (name, layer, parametrization) of all parametrizations of a kind in a model."""
    for name, layer in model.named_modules():
        for parametrization in stack(layer):
            if isinstance(parametrization, kind):
                yield name, layer, parametrization


def refuse_shared(method: Parametrize, model: nn.Module) -> None:
    """Refuse targets whose weight another layer uses too: for methods that move part of a weight into an adapter."""
    targets = {id(layer): name for name, layer in method.targets(model)}
    users: dict[int, list[nn.Module]] = {}
    for layer in model.modules():
        if isinstance(layer._parameters.get("weight"), nn.Parameter):
            users.setdefault(id(layer.weight), []).append(layer)
    for layers_of_one in users.values():
        shared = [targets[id(layer)] for layer in layers_of_one if id(layer) in targets]
        if shared and len(layers_of_one) > 1:
            raise BadInput(
                f"{type(method).__name__} rewrites the weight of '{shared[0]}', which another layer shares: leave it "
                "out of where, or untie the two."
            )


@method
class Parametrize(Method):
    """A method that makes weights a function of what is trained; the base weights stay trained."""

    def build(self, layer: nn.Module, weight: Tensor) -> Parametrization:
        """Return the parametrization of one layer, whose weight is the matrix [out, in]."""
        raise NotImplementedError

    def left_out(self, model: nn.Module) -> set[str]:
        """Return the names of layers that `where=".*"` does not mean."""
        return set()

    def targets(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the layers that this method acts on."""
        found, unreached = require_layers(self, model, self.where), read_by_others(model)
        refuse_names_of_others(self, model, self.where)
        title, dropped = type(self).__name__, unreached
        if self.where == ".*":
            dropped = unreached | self.left_out(model)
        chosen = [(name, layer) for name, layer in found if name not in dropped]
        blind = [name for name, _ in found if name in unreached]
        if blind and (self.where != ".*" or not chosen):
            raise BadInput(
                f"{title} cannot act on '{blind[0]}': nn.MultiheadAttention reads its weight without calling it; leave "
                "it out of where."
            )
        if not chosen:
            raise BadInput(
                f"{title} finds only layers that are new with the task, or embeddings: name them in where, or drop it."
            )
        for name, layer in chosen:
            refuse_weight(title, name, layer)
        return chosen

    def prepare(self, model: nn.Module) -> None:
        """Change the model before the first parametrization is attached."""

    def parametrize(self, model: nn.Module) -> None:
        """Attach one parametrization to each target."""
        self.check(model, [self])
        targets = self.targets(model)
        self.prepare(model)
        for _, layer in targets:
            weight = matrix(layer, readable(unrounded(own_weight(layer))))
            attach(layer, type(self).__name__.lower(), self.build(layer, weight))

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse targets that match nothing."""
        self.targets(model)


def new_or_at_the_ends(model: nn.Module) -> set[str]:
    """Return the names of fresh layers, and of a transformers model's embeddings and output layer."""
    from plait.parametrize.freeze import is_fresh

    ends = set()
    for part in model.modules():
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            try:
                ends.add(id(getattr(part, getter)()))
            except (AttributeError, NotImplementedError, TypeError):
                continue  # not a transformers model, or one without such a layer
    tables = any(hasattr(part, "get_input_embeddings") for part in model.modules())
    return {
        name
        for name, layer in layers(model)
        if id(layer) in ends or is_fresh(model, name) or (tables and isinstance(layer, nn.Embedding))
    }


@method
class Adapter(Parametrize):
    """A parametrization that is trained in place of the model: everything else is frozen, but for heads that are new
    (`plait.models.fresh`), other adapters, and the layers or parameters that `train` names ("" none, "head|bias", ...).

    `where=".*"` means every linear map but those new heads and a transformers model's embeddings and output layer, of
    which the first and the last are often one tensor; name these in `where` to adapt them.
    """

    train: str = ""

    def left_out(self, model: nn.Module) -> set[str]:
        """Return fresh layers (trained as they are), and a transformers model's embeddings and output layer."""
        return new_or_at_the_ends(model)

    def prepare(self, model: nn.Module) -> None:
        """Freeze the model, and let it keep less for the backward pass."""
        from plait.parametrize.freeze import freeze
        from plait.parametrize.lean import spare
        from plait.parametrize.origin import record_origin

        require_weights(f"{type(self).__name__}.train", self.train, model)
        record_origin(model)
        freeze(model, self.train)
        spare(model)
