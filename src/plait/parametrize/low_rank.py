"""Low-rank updates of a frozen weight: LoRA and what scales or decomposes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Positive
from plait.layers import CONVOLUTIONS, is_transformers_conv1d, matrix, own_bias, own_weight
from plait.math.packed import Packed
from plait.math.products import product
from plait.math.tracing import traced
from plait.method import Method, method
from plait.parametrize.base import Adapter, Parametrization, Parametrize, dense_bias, dense_weight, stack
from plait.parametrize.lean import sources_of


class _LowRankLinear(torch.autograd.Function):
    """y = x W^T + bias + scale (x A^T) B^T with W frozen. Saved for the backward pass: x A^T and x, which layers that
    read the same x share, or what gives x again; formed: neither B A nor the gradient of W. The backward pass can be
    differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        flat, kind = x.reshape(-1, x.shape[-1]), x.dtype
        y = product(flat, weight.to(kind).t(), None if bias is None else bias.to(kind))
        inner = flat @ A.to(kind).t()
        y.addmm_(inner, B.to(kind).t(), alpha=scale)
        ctx.again, sources = sources_of(x)
        ctx.save_for_backward(weight, A, B, inner, *sources)
        ctx.scale, ctx.biased = scale, None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, inner, *sources = ctx.saved_tensors
        x = sources[0] if ctx.again is None else ctx.again(*sources)
        grad, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        kind, scale = grad.dtype, ctx.scale
        if torch.is_grad_enabled():
            inner = flat @ A.to(kind).t()  # differentiated again: the saved product has no history
        outer = scale * (grad @ B.to(kind))
        grad_x = grad_A = grad_B = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight.to(kind)).addmm_(outer, A.to(kind)).view(x.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(ctx.biased)
        if ctx.needs_input_grad[3]:
            grad_A = (outer.t() @ flat).to(A.dtype)
        if ctx.needs_input_grad[4]:
            grad_B = (scale * (inner.t() @ grad)).t().to(B.dtype)  # in this order the product is twice as fast
        return grad_x, None, grad_bias, grad_A, grad_B, None


def fusible(layer: nn.Module, inputs: Tensor) -> bool:
    """Say whether the fused function is right here: a frozen plain weight, inputs that the layer itself would take, and
    nothing that traces or transforms.
    """
    weight = own_weight(layer)
    bias = own_bias(layer)
    kinds = {inputs.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype}
    return (
        not weight.requires_grad
        and (len(kinds) == 1 or torch.is_autocast_enabled(inputs.device.type))
        and type(weight) in (Tensor, nn.Parameter, Packed)
        and not traced()
    )


def low_rank_output(
    parametrization: Parametrization,
    layer: nn.Module,
    inputs: Tensor,
    below: Callable[[], Tensor],
    A: Tensor,
    B: Tensor,
    scale: float,
) -> Tensor | None:
    """Return W x + scale * B (A x) for W x = below(), never forming B A; None where the layer has no such path."""
    linear = isinstance(layer, nn.Linear)
    if linear or is_transformers_conv1d(layer):
        if torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
        if stack(layer)[0] is parametrization and fusible(layer, inputs):
            weight = own_weight(layer)
            output: Tensor = _LowRankLinear.apply(  # type: ignore[no-untyped-call]
                inputs, weight if linear else weight.t(), layer.bias, A, B, scale
            )
            return output
    branch = low_rank_branch(layer, inputs, A, B, scale)
    if branch is None:
        return None
    base = below()
    return base + branch.to(base.dtype)


def low_rank_branch(layer: nn.Module, inputs: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor | None:
    """Return scale * B (A x), which joins the output of the layer; None where the layer has no such path."""
    if isinstance(layer, nn.Linear) or is_transformers_conv1d(layer):
        kind = inputs.dtype
        return F.linear(scale * F.linear(inputs, A.to(kind)), B.to(kind))
    if isinstance(layer, nn.Embedding) and not layer.scale_grad_by_freq:
        return without_padding(layer, inputs, F.linear(scale * F.embedding(inputs, A.t()), B))
    if isinstance(layer, CONVOLUTIONS) and layer.groups == 1 and len(A):
        narrow = A.to(inputs.dtype).view(A.shape[0], layer.in_channels, *layer.kernel_size)
        return over_channels(layer, scale * layer._conv_forward(inputs, narrow, None), B)
    return None


def over_channels(layer: nn.Module, outputs: Tensor, matrix: Tensor) -> Tensor:
    """Return M y for the outputs y of a layer, [..., out] or [..., out, *spatial], and a matrix M [any, out]."""
    matrix = matrix.to(outputs.dtype)
    if not isinstance(layer, CONVOLUTIONS):
        return F.linear(outputs, matrix)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
    return convolve(outputs, matrix.view(*matrix.shape, *(1,) * len(layer.kernel_size)))


def without_padding(layer: nn.Module, inputs: Tensor, vectors: Tensor) -> Tensor:
    """Return an Embedding's vectors [..., d] with those of its padding index constant: padding has no gradient."""
    if not isinstance(layer, nn.Embedding) or layer.padding_idx is None:
        return vectors
    return torch.where((inputs == layer.padding_idx).unsqueeze(-1), vectors.detach(), vectors)


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Return the precision in which an adapter of this weight is trained: float32 for 16-bit weights."""
    return torch.promote_types(weight.dtype, torch.float32)


class Factored(Parametrization):
    """W -> W + scale * B A, for the factors A [rank, in] and B [out, rank] that are made of what is trained."""

    scale: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B."""
        raise NotImplementedError

    def dense(self, weight: Tensor) -> Tensor:
        """Return W + scale * B A, rounded once to the precision of W."""
        a, b = self.factors()
        return torch.addmm(weight.to(a.dtype), b, a, alpha=self.scale).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return W x + scale * B (A x), which never forms B A."""
        return low_rank_output(self, layer, inputs, below, *self.factors(), self.scale)


class LowRank(Factored):
    """W -> W + scale * B A,  W: [out, in], A: [rank, in], B: [out, rank]."""

    made_by = "LoRA"

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        out, into = weight.shape
        kind = adapter_dtype(weight)
        self.A = nn.Parameter(torch.randn(rank, into, dtype=kind) / math.sqrt(into))
        self.B = nn.Parameter(torch.zeros(out, rank, dtype=kind))

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.A.shape[0]

    @torch.no_grad()
    def set(self, a: Tensor, b: Tensor) -> None:
        """Set A [rank, in] and B [out, rank]; the rank may be another one, 0 included."""
        for parameter, value in ((self.A, a), (self.B, b)):
            if value.shape == parameter.shape:
                parameter.copy_(value)
            else:
                parameter.data = value.detach().to(parameter).clone(memory_format=torch.contiguous_format)

    def record_start(self) -> None:
        """Keep the factors as they are now: a start took scale * B A out of the weight."""
        self.register_buffer("start_A", self.A.detach().clone())
        self.register_buffer("start_B", self.B.detach().clone())

    def low_rank(self) -> tuple[nn.Parameter, nn.Parameter, float]:
        """Return (A, B, scale)."""
        return self.A, self.B, self.scale

    def taken(self) -> Tensor | None:
        """Return scale * B0 A0, where a start took that out of the weight."""
        if "start_A" not in self._buffers:
            return None
        return self.scale * (self.get_buffer("start_B") @ self.get_buffer("start_A"))

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return the factors (A, B) of the update of the untouched weight.

        These are A and B themselves, or [A; A0] and [B, -B0], of twice the rank, where a start took scale * B0 A0 out
        of the weight: W - scale * B0 A0 + scale * B A = W + scale * [B, -B0] [A; A0].
        """
        if "start_A" not in self._buffers:
            return self.A.detach(), self.B.detach()
        a, b = self.get_buffer("start_A"), self.get_buffer("start_B")
        return torch.cat([self.A.detach(), a]), torch.cat([self.B.detach(), -b], dim=1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B, which are trained themselves."""
        return self.A, self.B


class Shift(Parametrization):
    """b -> b + shift,  shift: [out]; the weight stays."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.added = nn.Parameter(shift)

    def dense(self, weight: Tensor) -> Tensor:
        """Return W."""
        return weight

    def shift(self) -> Tensor | None:
        """Return what joins the bias."""
        return self.added

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return the output with the shift added to it, without forming what is below."""
        output = below()
        ones = (1,) * len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else ()
        return output + self.added.to(output.dtype).view(-1, *ones)


@paper("hu2022lora", key="lora", kind="ground")
@method
class LoRA(Adapter):
    """W + (alpha / rank) * B A, with W frozen, A Gaussian and B = 0 at the start.

    `scaling="rank-stabilized"` uses alpha / sqrt(rank) (rsLoRA, kalajdzievski2023rslora), under which the update's size
    does not shrink as the rank grows.

    rank: rows of A, at most min(out, in). alpha: the numerator of the scale. Raises BadInput for a rank above the
    smaller side of a target, and for layers named in `where` that are no linear maps.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> LoRA(rank=2).parametrize(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.plait.lora.A', '0.plait.lora.B']
    """

    rank: Count = 8
    alpha: Positive = 16.0
    scaling: Literal["standard", "rank-stabilized"] = "standard"

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def build(self, layer: nn.Module, weight: Tensor) -> LowRank:
        """Return the low-rank update of one weight."""
        return LowRank(weight, self.rank, self.scale)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a rank above a target's."""
        check_rank(self, self.rank, model)


def check_rank(method: Parametrize, rank: int, model: nn.Module) -> None:
    """Refuse a rank above the smaller side of a target's matrix."""
    for name, layer in method.targets(model):
        weight = own_weight(layer)
        full = min(weight.flatten(1).shape)
        if rank > full:
            raise BadInput(
                f"{type(method).__name__}.rank is {rank}, but '{name}' has a {tuple(weight.shape)} weight: use at most "
                f"{full}."
            )


class RowNorms(Parametrization):
    """W -> diag(m) W / |W|, |W| the norms of the rows of W: [out], held constant in the backward pass."""

    made_by = "DoRA"
    of_weight = True

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(row_norms(weight.to(adapter_dtype(weight))))

    def factor(self, norms: Tensor) -> Tensor:
        """Return m / |W|: [out]; a row of zeros stays zero."""
        return self.magnitude / norms.to(self.magnitude.dtype).clamp_min(torch.finfo(torch.float32).tiny)

    def dense(self, weight: Tensor) -> Tensor:
        """Return diag(m / |W|) W."""
        wide = weight.to(self.magnitude.dtype)
        return (self.factor(row_norms(wide)).unsqueeze(1) * wide).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return (m / |W|) (W x) + bias, which keeps no weight for the backward pass."""
        every = stack(layer)
        under = every[: every.index(self)]
        with torch.no_grad():
            norms = row_norms(matrix(layer, dense_weight(layer, under)))
        output = below()
        factor = self.factor(norms).to(output.dtype)
        bias = dense_bias(layer, under)
        if isinstance(layer, CONVOLUTIONS):
            ones = (1,) * len(layer.kernel_size)
            factor, bias = factor.view(-1, *ones), None if bias is None else bias.view(-1, *ones)
        if bias is None:
            return without_padding(layer, inputs, factor * output)
        bias = bias.to(output.dtype)
        return bias + factor * (output - bias)  # which is the bias for a row of zeros, whose factor is huge


def row_norms(weight: Tensor) -> Tensor:
    """Return the norm of each row of a matrix, as a constant."""
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=1)
    return norms


@method
class Magnitude(Adapter):
    """W -> diag(m) W / |W|: each row's length m is trained apart from its direction. m = |W| when attached.

    The norms |W| change with what is under it but are a constant in the backward pass (DoRA, section 4.3), so the
    gradient of W lacks the part along its rows.
    """

    def build(self, layer: nn.Module, weight: Tensor) -> RowNorms:
        """Return the decomposition of the weight as everything attached before makes it."""
        with torch.no_grad():
            return RowNorms(matrix(layer, dense_weight(layer)))


@paper("liu2024dora", key="dora", kind="ground")
def DoRA(
    rank: int = 8,
    alpha: float = 16.0,
    scaling: Literal["standard", "rank-stabilized"] = "standard",
    where: str = ".*",
    train: str = "",
) -> list[Method]:
    """W' = m * (W + s B A) / |W + s B A|, with m [out] = |W| and B = 0 at the start: direction and length of each row
    are trained apart. The norm is a constant in the backward pass, as the paper proposes in its section 4.3.

    Returns [LoRA, Magnitude]; a start (PiSSA, EVA, ...) stands after them. Fields: see LoRA. Raises BadInput where LoRA
    does, as for a rank above the smaller side of a target.

    >>> model = nn.Sequential(nn.Linear(4, 4, bias=False))
    >>> for part in DoRA(rank=2):
    ...     part.parametrize(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.plait.lora.A', '0.plait.lora.B', '0.plait.magnitude.magnitude']
    """
    return [
        LoRA(rank=rank, alpha=alpha, scaling=scaling, where=where, train=train),
        Magnitude(where=where, train=train),
    ]
