"""A frozen weight that is kept as 8- or 4-bit codes and seen as the floating-point tensor that they stand for."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from plait.errors import BadInput
from plait.math.quantization import Form, Parts, decode, encode, scales_of

aten = torch.ops.aten
MADV_PAGEOUT = 21
"""Linux's number for it; a kernel that does not know it says so and does nothing."""


class Packed(Tensor):
    """A weight in codes: its shape and type are those of the numbers, its memory that of `parts`.

    Every operation reads the numbers, which are made for it and let go; what autograd keeps for the backward pass are
    the codes. `copy_` codes anew what is written; all other changes in place are refused.

    turned: whether the matrix that was coded is the transpose of this one. original: the numbers before they were
    rounded, while somebody may still ask for them.

    >>> packed = pack(torch.tensor([[1.0, -0.5], [0.25, 2.0]]), Form(bits=8, format="int", group=0))
    >>> packed @ torch.eye(2)
    tensor([[ 1.0000, -0.5039],
            [ 0.2520,  2.0000]])
    """

    form: Form
    parts: Parts
    turned: bool
    original: Tensor | None

    @staticmethod
    def __new__(
        cls,
        parts: Parts,
        form: Form,
        shape: torch.Size,
        dtype: torch.dtype,
        turned: bool = False,
        original: Tensor | None = None,
    ) -> Packed:
        """Make the tensor that holds nothing itself."""
        made: Packed = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts["codes"].device)
        return made

    def __init__(
        self,
        parts: Parts,
        form: Form,
        shape: torch.Size,
        dtype: torch.dtype,
        turned: bool = False,
        original: Tensor | None = None,
    ) -> None:
        self.parts, self.form, self.turned, self.original = parts, form, turned, original

    # As in torch's own subclasses, whose stubs type the two as methods of an instance.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Packed({tuple(self.shape)}, {self.form})"

    # -- the numbers -----------------------------------------------------------------------------------------------
    def dequantize(self) -> Tensor:
        """Return the numbers that the codes stand for."""
        parts, coded = self.parts, torch.Size(reversed(self.shape)) if self.turned else self.shape
        scales = scales_of(parts, self.form)
        flat = decode(parts["codes"], scales, parts.get("zeros"), self.form, coded[1:].numel())
        return (flat.reshape(coded).t() if self.turned else flat.reshape(coded)).to(self.dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Return the numbers of some rows, [*index, ...], of a weight that is not turned."""
        flat, zeros = index.flatten(), self.parts.get("zeros")
        chosen = decode(
            self.parts["codes"][flat],
            scales_of(self.parts, self.form)[flat],
            None if zeros is None else zeros[flat],
            self.form,
            self.shape[1:].numel(),
        )
        return chosen.view(*index.shape, *self.shape[1:]).to(self.dtype)

    # -- copies and changes ----------------------------------------------------------------------------------------
    def like(self, parts: Parts, original: Tensor | None = None, **changed: Any) -> Packed:
        """Return a weight of the same kind with other codes."""
        shape, dtype = changed.get("shape", self.shape), changed.get("dtype", self.dtype)
        return Packed(parts, self.form, shape, dtype, changed.get("turned", self.turned), original)

    def moved(self, device: Any = None, dtype: torch.dtype | None = None, copy: bool = False) -> Packed:
        """Return the weight on another device, standing for numbers of another type, or a copy of it."""
        parts = {name: t.to(device=device, copy=copy) for name, t in self.parts.items()}
        original = None if self.original is None else self.original.to(device=device, copy=copy)
        return self.like(parts, original, dtype=dtype or self.dtype)

    def flipped(self) -> Packed:
        """Return the transpose; it holds the same codes."""
        original = None if self.original is None else self.original.t()
        return self.like(self.parts, original, shape=torch.Size(reversed(self.shape)), turned=not self.turned)

    def write(self, source: Tensor) -> Packed:
        """Take over another weight's codes, or code numbers anew."""
        if not isinstance(source, Packed):
            coded = source.t() if self.turned else source
            made = encode(coded.flatten(1), self.form)
            original: Tensor | None = source.detach().to(self.dtype)
        else:
            if source.form != self.form or source.turned != self.turned or source.shape != self.shape:
                raise BadInput(
                    f"a weight of {tuple(source.shape)} quantized as {source.form} does not fit one of "
                    f"{tuple(self.shape)} quantized as {self.form}: quantize both alike."
                )
            made, original = source.parts, source.original
            if original is None and all(torch.equal(made[name], t) for name, t in self.parts.items()):
                original = self.original
        for name, tensor in self.parts.items():
            tensor.copy_(made[name])
        if self.original is not None:
            self.original = None if original is None else original.clone()
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the numbers, or on the codes where that is the same."""
        kwargs, first = kwargs or {}, args[0] if args else None
        if func.is_view and torch.is_inference_mode_enabled() and not args[0].is_inference():
            with torch.inference_mode(False):  # a view of an ordinary tensor must be one too
                return cls.__torch_dispatch__(func, types, args, kwargs)
        if isinstance(first, Packed):
            if func in (aten.detach.default, aten.alias.default):
                return first.like(first.parts, first.original)
            if func is aten.clone.default:
                return first.moved(copy=True)
            if func is aten.t.default or (func is aten.transpose.int and first.dim() == 2 and args[1] != args[2]):
                return first.flipped()
            if func is aten._to_copy.default and (kwargs.get("dtype") or first.dtype).is_floating_point:
                return first.moved(kwargs.get("device"), kwargs.get("dtype"))
            if func is aten.embedding.default and not first.turned:
                return first.rows(args[1])
            if func is aten.copy_.default:
                return first.write(args[1])
            if func._schema.is_mutable and func._schema.arguments[0].is_write:
                raise BadInput(
                    f"a quantized weight cannot be changed in place ({func.__name__}): train an adapter on it, or "
                    "leave its layer out of Quantize with where."
                )
        dense = tree_map_only(Packed, Packed.dequantize, (args, kwargs))
        return func(*dense[0], **dense[1])

    # -- what torch asks of tensors that are made of others --------------------------------------------------------
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Return the names of the tensors inside, and the rest."""
        names = list(self.parts) + (["original"] if self.original is not None else [])
        return names, (self.form, self.dtype, self.turned)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], rest: Any, size: Any, stride: Any) -> Packed:
        """Undo `__tensor_flatten__`."""
        form, dtype, turned = rest
        original = inner.get("original")
        return Packed({name: inner[name] for name in form.names}, form, torch.Size(size), dtype, turned, original)

    def __getattr__(self, name: str) -> Tensor:
        """Return a part by name."""
        parts = self.__dict__.get("parts", {})
        if name in parts:
            part: Tensor = parts[name]
            return part
        raise AttributeError(f"a Packed has no {name}")


def pack(weight: Tensor, form: Form, turned: bool = False, keep: bool = False) -> Packed:
    """Return a weight in codes; turned: code its transpose, by whose rows a group runs. keep: hold the weight too."""
    coded = weight.t() if turned else weight
    original = weight.detach() if keep else None
    return Packed(encode(coded.flatten(1), form), form, weight.shape, weight.dtype, turned, original)


def packed_weight(layer: nn.Module) -> Packed | None:
    """Return a layer's weight if it is quantized."""
    weight = layer._parameters.get("weight")
    return weight if isinstance(weight, Packed) else None


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Packed]]:
    """Yield (name, layer, weight) of the layers whose weight is quantized."""
    for name, layer in model.named_modules():
        if (weight := packed_weight(layer)) is not None:
            yield name, layer, weight


def quantized_elsewhere(weight: Tensor) -> bool:
    """Say whether a weight was quantized by another library, such as torchao: it can be read, and is never written."""
    kind = type(weight)
    return kind not in (Tensor, nn.Parameter, Packed) and kind.dequantize is not Tensor.dequantize


def numbers(weight: Tensor) -> Tensor:
    """Return an ordinary tensor: the weight itself, or what a quantized one (ours, torchao's) stands for."""
    return weight.dequantize() if isinstance(weight, Packed) or quantized_elsewhere(weight) else weight


def readable(weight: Tensor) -> Tensor:
    """Return a weight that every operation can read: ours do so themselves, those of other libraries are made plain."""
    return numbers(weight) if quantized_elsewhere(weight) else weight


def unrounded(weight: Tensor) -> Tensor:
    """Return the numbers of a weight before they were rounded, where these are held; otherwise the weight itself."""
    original = weight.original if isinstance(weight, Packed) else None
    return weight if original is None else original.to(weight.dtype)


# -- the layer that holds one --------------------------------------------------------------------------------------
def hold(layer: nn.Module, weight: nn.Parameter) -> None:
    """Put a quantized weight into a layer, whose state dict then has the codes: weight.codes, weight.scales, ..."""
    layer.weight = weight
    if _save not in layer._state_dict_hooks.values():
        layer.register_state_dict_post_hook(_save)
        layer.register_load_state_dict_pre_hook(_load)


def release(layer: nn.Module, weight: nn.Parameter) -> None:
    """Put an ordinary weight into a layer that held a quantized one."""
    layer.weight = weight
    for key in [key for key, hook in layer._state_dict_hooks.items() if hook is _save]:
        del layer._state_dict_hooks[key]
    hooks = layer._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _load]:
        del hooks[key]


def _save(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    held = state.get(f"{prefix}weight")
    if isinstance(held, Packed):
        del state[f"{prefix}weight"]
        original = {} if held.original is None else {"original": held.original}
        state |= {f"{prefix}weight.{name}": part for name, part in (held.parts | original).items()}


def _load(layer: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    own = packed_weight(layer)
    given = {name: f"{prefix}weight.{name}" for name in (*own.parts, "original")} if own is not None else {}
    parts = {name: state.pop(key) for name, key in given.items() if key in state}
    if own is None or not parts:
        return
    original = parts.pop("original", None)
    if any(name not in parts or parts[name].shape != t.shape for name, t in own.parts.items()):
        raise BadInput(
            f"the file's '{prefix}weight' is not quantized as the model's ({own.form}): give Quantize the fields that "
            "the file was written with."
        )
    state[f"{prefix}weight"] = own.like(parts, original)


def unpack(model: nn.Module, originals: bool = False) -> nn.Module:
    """Give each layer whose weight is quantized the numbers that it stands for; a weight that layers share stays one.

    originals: give it what the numbers were before they were rounded, where these are held.
    """
    made: dict[int, nn.Parameter] = {}
    for _, layer, weight in list(packed_layers(model)):
        if id(weight) not in made:
            dense = numbers(unrounded(weight) if originals else weight)
            made[id(weight)] = nn.Parameter(dense, requires_grad=weight.requires_grad)
        release(layer, made[id(weight)])
    return model


def forget_originals(model: nn.Module) -> nn.Module:
    """Let go of what quantized weights were before they were rounded."""
    for _, _, weight in packed_layers(model):
        if weight.original is not None:
            page_out(weight.original)
        weight.original = None
    return model


def page_out(tensor: Tensor) -> None:
    """Tell the system that a tensor will not be read again soon; nothing is lost.

    Weights that were loaded are often pages of a file, which stay in memory as long as anything of that file is used.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - first
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), MADV_PAGEOUT)
