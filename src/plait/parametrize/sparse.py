"""Trained sparse matrices: what is added to a weight at some of its places, which a buffer names.

A linear layer forms the weight that it uses anew in each pass and keeps none for the backward pass, in which the
gradient of the whole matrix lives for one layer at a time, and only its entries at those places stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.errors import BadInput
from plait.layers import is_transformers_conv1d, matches, matrix, matrix_shape, own_weight
from plait.method import Method
from plait.parametrize.base import Parametrization, attached, stack
from plait.parametrize.lean import sources_of
from plait.parametrize.low_rank import adapter_dtype, fusible
from plait.sharding import is_sharded

Seen = Callable[[Tensor], None]
"""Is shown the gradient [out, in] of a whole weight in a backward pass, and must not keep it."""


def places(support: Tensor, weight: Tensor) -> Tensor:
    """Return places in a matrix, of its rows laid in line, in the smallest kind of number that can count its entries.

    Every place stands once.
    """
    return support.to(torch.int32 if weight.numel() < 2**31 else torch.int64)


def random_places(weight: Tensor, count: int) -> Tensor:
    """Return that many places in a matrix, in order, drawn with equal chances."""
    return places(torch.randperm(weight.numel())[:count].sort().values, weight)


def at(matrix: Tensor, support: Tensor) -> Tensor:
    """Return the entries [n] of a matrix at places [n] of its rows laid in line."""
    return matrix.reshape(-1)[support.long()]


def placed(weight: Tensor, values: Tensor, support: Tensor) -> Tensor:
    """Return W + S, S zero but for `values` [n] at the places `support` [n]; each sum is rounded once."""
    where = support.long()
    sums = (at(weight, where) + values).to(weight.dtype)
    return weight.reshape(-1).index_copy(0, where, sums).view(weight.shape)


def low_rank_and_sparse(A: Tensor, B: Tensor, values: Tensor, support: Tensor, scale: float) -> Tensor:
    """Return scale * B A + S, S [out, in] with `values` [n] at the places `support` [n] of its rows laid in line."""
    product = scale * (B @ A).to(values.dtype)  # autocast multiplies in less
    return product.view(-1).index_add(0, support.long(), values).view_as(product)


def _formed(
    weight: Tensor | None,
    mask: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    values: Tensor,
    support: Tensor,
    scale: float,
    shape: tuple[int, int],
) -> Tensor:
    """Return mask * W + scale * B A + S; what is None is left out."""
    if weight is not None and mask is not None:
        weight = weight * mask
    if A is None or B is None:
        return placed(values.new_zeros(shape) if weight is None else weight, values, support)
    update = low_rank_and_sparse(A, B, values, support, scale)
    return update if weight is None else (weight + update).to(weight.dtype)


class _Recomputed(torch.autograd.Function):
    """y = x W'^T + bias for W' = mask * W + scale * B A + S with W frozen, which is formed in each pass, and kept for
    the backward pass by none. The backward pass can be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        mask: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        values: Tensor,
        support: Tensor,
        scale: float,
        shape: tuple[int, int],
        seen: Seen | None,
    ) -> Tensor:
        ctx.again, sources = sources_of(x)
        ctx.save_for_backward(weight, mask, A, B, values, support, *sources)
        ctx.scale, ctx.shape, ctx.seen, ctx.biased = scale, shape, seen, None if bias is None else bias.dtype
        made = _formed(weight, mask, A, B, values, support, scale, shape).to(x.dtype)
        return F.linear(x, made, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask, A, B, values, support, *sources = ctx.saved_tensors
        x = sources[0] if ctx.again is None else ctx.again(*sources)
        flat, rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = grad_bias = grad_A = grad_B = grad_values = None
        if ctx.needs_input_grad[0]:
            made = _formed(weight, mask, A, B, values, support, ctx.scale, ctx.shape)
            grad_x = (rows @ made.to(rows.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_bias = rows.sum(0).to(ctx.biased)
        if any(ctx.needs_input_grad[4:7]):
            whole = rows.t() @ flat.to(rows.dtype)
            if ctx.seen is not None:
                ctx.seen(whole.detach())
            grad_values = at(whole, support).to(values.dtype)
            if A is not None:
                whole = whole.to(A.dtype)
                grad_A, grad_B = ctx.scale * (B.t() @ whole), ctx.scale * (whole @ A.t())
        return grad_x, grad_bias, None, None, grad_A, grad_B, grad_values, None, None, None, None


def recomputed_output(
    layer: nn.Module,
    inputs: Tensor,
    values: Tensor,
    support: Tensor,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    bias: Any = None,
    seen: Seen | None = None,
) -> Tensor | None:
    """Return (mask * W + scale * B A + S) x + bias for W [out, in] or none, with S of `values` [n] at the places
    `support` [n]; None where this layer has no such path.
    """
    if not (isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)) or not fusible(layer, inputs):
        return None
    if torch.is_autocast_enabled(inputs.device.type):
        inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
    output: Tensor = _Recomputed.apply(  # type: ignore[no-untyped-call]
        inputs, bias, weight, mask, A, B, values, support, scale, matrix_shape(layer), seen
    )
    return output


class SparseDelta(Parametrization):
    """W -> W + S,  S: [out, in], zero but for values [n] at the places `support` [n] of its rows laid in line.

    seen: is shown the gradient of the whole weight in the coming backward passes, where that is set. reads_weight:
    whether S depends on W.
    """

    reads_weight: ClassVar[bool] = False
    support: Tensor
    seen: Seen | None = None

    def __init__(self, weight: Tensor, support: Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.values = nn.Parameter(torch.zeros(len(support), dtype=adapter_dtype(weight)))
        self.register_buffer("support", places(support, weight))

    def delta(self, weight: Tensor) -> Tensor:
        """Return the values [n] that are added to the weight [out, in]."""
        return self.values

    def dense(self, weight: Tensor) -> Tensor:
        """Return W + S, rounded once to the precision of W."""
        made = placed(weight, self.delta(weight), self.support)
        if self.seen is not None and made.requires_grad:
            made.register_hook(self._show)
        return made

    def _show(self, gradient: Tensor) -> None:
        if self.seen is not None:
            self.seen(gradient.detach())

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return (W + S) x + bias, keeping no weight for the backward pass, for linear layers."""
        if not (isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)):
            return None
        own = own_weight(layer)
        weight = matrix(layer, own)
        if stack(layer)[0] is self:
            bias = layer.bias
            return recomputed_output(
                layer, inputs, self.delta(weight), self.support, weight=weight, bias=bias, seen=self.seen
            )
        if self.reads_weight:
            return None
        branch = recomputed_output(layer, inputs, self.delta(weight), self.support, seen=self.seen)
        if branch is None:
            return None
        base = below()
        return base + branch.to(base.dtype)


@contextmanager
def shown(parts: Sequence[tuple[str, SparseDelta]], see: Callable[[str, SparseDelta, Tensor], None]) -> Iterator[None]:
    """Show see(name, part, gradient) the gradients [out, in] of the whole weights in the passes inside."""
    for name, part in parts:
        part.seen = partial(see, name, part)
    try:
        yield
    finally:
        for _, part in parts:
            part.seen = None


S = TypeVar("S", bound=Parametrization)


def trained(method: Method, model: nn.Module, kind: type[S]) -> list[tuple[str, nn.Module, S]]:
    """Return (name, layer, parametrization) of the method's own that are trained now; refuse those that are sharded."""
    every = [found for found in attached(model, kind) if matches(method.where, found[0])]
    held = [found for found in every if all(p.requires_grad for p in found[2].parameters())]
    if any(is_sharded(p) for _, _, part in held for p in part.parameters()):
        title = type(method).__name__
        raise BadInput(f"{title} looks at single entries, and these are sharded over processes: use sharding='none'.")
    return held
