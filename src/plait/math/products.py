"""Products with a frozen float32 matrix on a CPU, by oneDNN: a tenth faster than the library that torch asks (measured
on AMD Zen 4; elsewhere the two may be level).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.math.tracing import traced

WORTH_FROM = 2**22
"""How many multiplications make oneDNN's start worth it; below, torch's own product runs."""


@cache
def _onednn() -> Any | None:
    """Return oneDNN's linear layer; None where this torch was built without it."""
    built: bool = torch.backends.mkldnn.is_available()
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if built else None


def _fits(x: Tensor, matrix: Tensor, bias: Tensor | None) -> bool:
    for tensor in (x, matrix) if bias is None else (x, matrix, bias):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
        if not plain or tensor.dtype != torch.float32:
            return False
    return x.numel() * matrix.shape[1] >= WORTH_FROM and torch._C._get_mkldnn_enabled() and _onednn() is not None


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x M + bias for x [n, k] and M [k, m] in any layout; where gradients are recorded, by torch's own product.

    >>> product(torch.ones(2, 3), torch.ones(3, 1))
    tensor([[3.],
            [3.]])
    """
    if not torch.is_grad_enabled() and not traced() and _fits(x, matrix, bias) and (linear := _onednn()):
        made: Tensor = linear(x.contiguous(), matrix.t(), bias, "none", [], "")
        return made
    return x @ matrix if bias is None else torch.addmm(bias, x, matrix)


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + bias with W frozen: nothing but W is kept. The backward pass can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x.reshape(-1, x.shape[-1]), weight.t(), bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        flat, grad_x = grad.reshape(-1, grad.shape[-1]), None
        if ctx.needs_input_grad[0]:
            grad_x = product(flat, weight).view(*grad.shape[:-1], weight.shape[1])
        return grad_x, None, flat.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return torch's linear(x, weight, bias), by oneDNN where the weight [out, in] is frozen and the product is large.

    >>> linear(torch.ones(2, 3), torch.ones(1, 3))
    tensor([[3.],
            [3.]])
    """
    if weight.requires_grad or traced() or torch.is_autocast_enabled("cpu") or not _fits(x, weight.t(), bias):
        return F.linear(x, weight, bias)
    made: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return made
