"""What the passes of a frozen model can do without: norms and gated activations are computed again from less, and
linear layers multiply by `plait.math.products`.

Under adapters nothing of a frozen layer needs a gradient but its input. A root-mean-square norm then keeps its input
and one number a token, not three copies of it; a gated activation act(g) * u keeps g and u, and the layer after it,
which an adapter makes keep its input, computes that input again. Values and gradients stay the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.layers import own_weight
from plait.math.products import linear
from plait.math.threads import over_rows
from plait.math.tracing import traced

KERNEL_FROM = 2**16
"""How many numbers make a CPU kernel worth its start; below, torch's own operations run."""


class Again:
    """Computes a tensor again in the backward pass, once for all the layers that read it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.readers, self.asked = function, 0, 0
        self.made: Tensor | None = None

    def __call__(self, *sources: Tensor) -> Tensor:
        """Return function(*sources); the last reader lets it go."""
        if torch.is_grad_enabled():
            return self.function(*sources)  # differentiated again: with its history, for each reader
        made = self.function(*sources) if self.made is None else self.made
        self.made, self.asked = made, self.asked + 1
        if self.asked >= self.readers:
            self.made, self.asked = None, 0
        return made


def again_from(made: Tensor, function: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Note on a tensor that function(*sources) gives it again, from tensors that are kept anyway."""
    made._plait_again = (Again(function), sources, made._version)  # type: ignore[attr-defined]
    return made


def sources_of(made: Tensor) -> tuple[Again | None, tuple[Tensor, ...]]:
    """Return what a reader keeps in place of a tensor, and how it gets it back: (None, the tensor) if there is none, or
    none any more because the tensor was changed in place.
    """
    noted: tuple[Again, tuple[Tensor, ...], int] | None = getattr(made, "_plait_again", None)
    if noted is None or noted[2] != made._version:
        return None, (made,)
    noted[0].readers += 1
    return noted[:2]


class _RootMeanSquare(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps), which keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if (kernels := kernels_for(x, weight)) is not None:
            y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
            _over_rows(kernels.norm, _rows(x), weight, eps, _rows(y), inverse.flatten())
            inverse = inverse.unsqueeze(-1)
        else:
            inverse = _inverse(_wide(x), eps)
            y = _scaled(x, weight, inverse)
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        wide = _wide(x)
        if torch.is_grad_enabled():
            inverse = _inverse(wide, ctx.eps)  # differentiated again: the saved one has no history
        grad_x = grad_weight = None
        kernels = None if torch.is_grad_enabled() else kernels_for(grad, x, weight)
        if ctx.needs_input_grad[0] and kernels is not None:
            grad_x = torch.empty_like(x)
            _over_rows(kernels.norm_backward, _rows(grad), _rows(x), weight, inverse.flatten(), _rows(grad_x))
        elif ctx.needs_input_grad[0]:
            scaled = _wide(grad) * _wide(weight)
            along = (scaled * wide).sum(-1, keepdim=True) * (inverse.pow(3) / wide.shape[-1])
            grad_x = (scaled * inverse).addcmul(wide, along, value=-1).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (wide * inverse).to(grad.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    y = _wide(x) * inverse
    return y.mul_(weight) if y.dtype == x.dtype == weight.dtype else weight * y.to(x.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not torch.is_grad_enabled() and (kernels := kernels_for(x, weight)) is not None:
        y = torch.empty_like(x)
        _over_rows(kernels.norm, _rows(x), weight, eps, _rows(y), x.new_empty(x.shape[:-1]).flatten())
        return y
    return _scaled(x, weight, _inverse(_wide(x), eps))


def _inverse(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class _Gated(torch.autograd.Function):
    """silu(gate) * up, which keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            half = torch.sigmoid(gate)
            return grad * up * half * (1 + gate * (1 - half)), grad * F.silu(gate)
        if (kernels := kernels_for(grad, gate, up)) is not None:
            grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
            _over_rows(kernels.gated_backward, *map(_rows, (grad, gate, up, grad_gate, grad_up)))
            return grad_gate, grad_up
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _product(gate: Tensor, up: Tensor) -> Tensor:
    differentiated = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if not differentiated and (kernels := kernels_for(gate, up)) is not None:
        y = torch.empty_like(gate)
        _over_rows(kernels.gated, *map(_rows, (gate, up, y)))
        return y
    return F.silu(gate).mul_(up)


@cache
def _kernels() -> ModuleType | None:
    try:
        from plait.math import activation_kernels
    except (ImportError, RuntimeError):  # no numba for this platform, or nowhere to keep what it compiled
        return None
    return activation_kernels


def kernels_for(first: Tensor, *rest: Tensor) -> ModuleType | None:
    """Return the compiled kernels where they run on these tensors: float32, on a CPU, and not small."""
    for tensor in (first, *rest):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
        if not (plain and tensor.dtype == torch.float32 and tensor.is_contiguous()):
            return None
    return _kernels() if first.numel() >= KERNEL_FROM else None


def _over_rows(kernel: Callable[..., None], *given: Any) -> None:
    over_rows(kernel, *given, least=KERNEL_FROM)


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _keeps_history() -> bool:
    """Say whether an ordinary backward pass will follow, not a trace or a transform."""
    return (
        torch.is_grad_enabled()
        and not traced()
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
    )


def _norm(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    if not _keeps_history():
        plain: Tensor = type(layer).forward(layer, hidden_states)
        return plain
    weight = own_weight(layer)
    eps = _epsilon(layer)
    made: Tensor = _RootMeanSquare.apply(hidden_states, weight, eps)  # type: ignore[no-untyped-call]
    return again_from(made, partial(_normed, eps=eps), hidden_states, weight)


def _gated(block: nn.Module, x: Tensor) -> Tensor:
    if not _keeps_history():
        plain: Tensor = type(block).forward(block, x)
        return plain
    gate, up = block.gate_proj(x), block.up_proj(x)  # type: ignore[operator]
    product: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
    made: Tensor = block.down_proj(again_from(product, _product, gate, up))  # type: ignore[operator]
    return made


def _linear(layer: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, layer.weight, layer.bias)


def _epsilon(layer: nn.Module) -> float:
    return float(getattr(layer, "variance_epsilon", getattr(layer, "eps", None) or 0.0))


def _is_norm(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return "RMSNorm" in type(layer).__name__ and weight is not None and weight.dim() == 1 and _epsilon(layer) > 0


def _is_gated(block: nn.Module) -> bool:
    parts = dict(block.named_children())
    activation = parts.pop("act_fn", None)
    smooth = isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    return smooth and set(parts) == {"gate_proj", "up_proj", "down_proj"}


@torch.enable_grad()
def _agrees(part: nn.Module, forward: Any, width: int, like: Tensor) -> bool:
    """Say whether a forward pass gives what the part's own gives, on a small random input."""
    x = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        ours, theirs = forward(part, x), type(part).forward(part, x)
        return ours.shape == theirs.shape and torch.allclose(
            ours, theirs, rtol=1e-2 if like.dtype.itemsize < 4 else 1e-4
        )
    except (RuntimeError, TypeError, AttributeError):
        return False


def spare(model: nn.Module) -> None:
    """Let a model's norms and gated activations keep less, and its linear layers take less time while they are frozen.

    Parts whose own code computes something else are left.
    """
    for part in model.modules():
        if "forward" in part.__dict__ or next(iter(part.parameters()), torch.empty(0)).is_meta:
            continue
        if _is_norm(part) and _agrees(part, _norm, len(own_weight(part)), own_weight(part)):
            part.forward = partial(_norm, part)
        elif _is_gated(part):
            weight = own_weight(part.get_submodule("gate_proj"))
            if weight.dim() == 2 and _agrees(part, _gated, weight.shape[1], weight):
                part.forward = partial(_gated, part)
        elif type(part) is nn.Linear:
            part.forward = partial(_linear, part)  # type: ignore[method-assign]


def restore(model: nn.Module) -> None:
    """Undo `spare`."""
    for part in model.modules():
        held = part.__dict__.get("forward")
        if getattr(held, "func", None) in (_norm, _gated, _linear):
            del part.__dict__["forward"]
