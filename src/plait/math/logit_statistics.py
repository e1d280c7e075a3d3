"""Four statistics of a row of logits z from which losses are algebra of size [n]: one pass forward, one backward.

log_sum = log sum_k exp(z_k - max z),  target = z_target,  mean = mean_k z_k,  maximum = max_k z_k.

Cross entropy is log_sum + maximum - target; label smoothing adds eps (target - mean), MaxSup eps (maximum - mean),
z-loss eps (maximum + log_sum)^2. log_sum is kept apart from the maximum so that nothing cancels at extreme logits.
"""

from __future__ import annotations

import weakref
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.batch import IGNORE
from plait.errors import BadInput
from plait.math.threads import over_rows
from plait.math.tracing import traced

KERNEL_FROM = 2**17
"""How many logits make the CPU kernel worth its start; below, torch's own operations run."""


class LogitStatistics(NamedTuple):
    """Tensors of the target's shape, in float32 (float64 for float64 logits); 0 where the target is IGNORE."""

    log_sum: Tensor
    target: Tensor
    mean: Tensor
    maximum: Tensor

    @property
    def logsumexp(self) -> Tensor:
        """log sum_k exp(z_k)."""
        return self.maximum + self.log_sum

    @property
    def cross_entropy(self) -> Tensor:
        """-log softmax(z)_target, exact to rounding however large the logits."""
        return self.log_sum + (self.maximum - self.target)


@cache
def _kernels() -> ModuleType | None:
    try:
        from plait.math import logit_kernels
    except (ImportError, RuntimeError):  # no numba for this platform, or nowhere to keep what it compiled
        return None
    return logit_kernels


def kernel_fits(logits: Tensor) -> bool:
    """Say whether the CPU kernel runs on these logits."""
    plain = type(logits) in (Tensor, torch.nn.Parameter) and logits.device.type == "cpu"
    sized = logits.dtype in (torch.float32, torch.bfloat16) and logits.numel() >= KERNEL_FROM
    return plain and sized and _kernels() is not None


def forward(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (statistics [n, 4] in the order of LogitStatistics, argmax [n]) of logits [n, classes]."""
    if kernel_fits(z) and (kernels := _kernels()):
        out, argmax = torch.empty(len(z), 4), torch.empty(len(z), dtype=torch.long)
        over_rows(kernels.forward, z, target, IGNORE, out, argmax)
        return out, argmax
    wide = z.double() if z.dtype == torch.float64 else z.float()
    counts = target != IGNORE
    maximum, argmax = wide.max(-1)
    log_sum = (wide - maximum.unsqueeze(-1)).exp_().sum(-1).log()
    at_target = wide.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    out = torch.stack([log_sum, at_target, wide.mean(-1), maximum], -1)
    return torch.where(counts.unsqueeze(-1), out, torch.zeros_like(out)), argmax


def backward(z: Tensor, target: Tensor, out: Tensor, argmax: Tensor, slopes: Tensor, inside: bool = False) -> Tensor:
    """Return the gradient in z of sum(slopes * out); with `inside` it overwrites z."""
    if kernel_fits(z) and (kernels := _kernels()):
        into = z if inside else torch.empty_like(z)
        over_rows(kernels.backward, z, target, IGNORE, out, argmax, slopes, into, inside)
        return into
    return _composed(z, target, out[:, 3], out[:, 0], argmax, slopes)


def _composed(z: Tensor, target: Tensor, top: Tensor, log_sum: Tensor, argmax: Tensor, slopes: Tensor) -> Tensor:
    counts = (target != IGNORE).unsqueeze(-1)
    slopes = torch.where(counts, slopes, torch.zeros_like(slopes))
    scale, at_target, level, at_top = slopes.unbind(-1)
    share = (z.to(slopes.dtype) - top.unsqueeze(-1) - log_sum.unsqueeze(-1)).exp()
    share = torch.where(counts, share, torch.zeros_like(share))
    slope = scale.unsqueeze(-1) * share + (level / z.shape[-1]).unsqueeze(-1)
    slope = slope.scatter_add(-1, argmax.unsqueeze(-1), (at_top - scale).unsqueeze(-1))
    return slope.scatter_add(-1, target.clamp_min(0).unsqueeze(-1), at_target.unsqueeze(-1)).to(z.dtype)


_recent: tuple[Any, ...] | None = None
"""The last logits and target (weakly), what they were like, and their statistics: several losses share one pass."""


def like(*tensors: Tensor) -> tuple[Any, ...]:
    """Return what changes when a tensor is written to, or asked about under another gradient mode."""
    versions = [None if t.is_inference() else t._version for t in tensors]
    return torch.is_grad_enabled(), *versions, *(t.requires_grad for t in tensors)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        out, argmax = forward(z, target)
        ctx.save_for_backward(z, target, out, argmax)
        return tuple(column.contiguous() for column in out.unbind(-1))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        global _recent
        _recent = None  # its graph is spent
        z, target, out, argmax = ctx.saved_tensors
        stacked = torch.stack(slopes, -1)
        if torch.is_grad_enabled():  # a gradient that is differentiated again (Hessian products, gradient penalties)
            wide = z.to(stacked.dtype)
            top = wide.gather(-1, argmax.unsqueeze(-1)).squeeze(-1)
            log_sum = torch.logsumexp(wide - top.unsqueeze(-1), -1)
            return _composed(z, target, top, log_sum, argmax, stacked), None
        return backward(z, target, out, argmax, stacked), None


def require_classes(target: Tensor, classes: int) -> None:
    """Refuse targets that are no class."""
    if target.numel() and target.device.type == "cpu":
        low, high = (int(bound) for bound in torch.aminmax(torch.where(target == IGNORE, 0, target)))
        if low < 0 or high >= classes:
            odd = low if low < 0 else high
            raise BadInput(
                f"a target is {odd}, but the model has {classes} outputs: targets must be 0 to {classes - 1}."
            )


def logit_statistics(logits: Tensor, target: Tensor) -> LogitStatistics:
    """Return the statistics of logits [..., classes] at targets [...] of classes; each has the target's shape.

    Asked again about the same tensors before the backward pass, it answers from what it has, so that losses compose
    freely. A tie for the maximum gives its gradient to the first. Differentiable twice, also under torch.func.

    >>> s = logit_statistics(torch.tensor([[1.0, 3.0]]), torch.tensor([0]))
    >>> s.mean, s.maximum, s.cross_entropy
    (tensor([2.]), tensor([3.]), tensor([2.1269]))
    """
    if logits.shape[:-1] != target.shape:
        raise BadInput(
            f"logits of shape {tuple(logits.shape)} need targets of shape {tuple(logits.shape[:-1])}, not "
            f"{tuple(target.shape)}."
        )
    if traced():
        return _differentiable(logits, target)
    global _recent
    state = like(logits, target)
    if _recent is not None and _recent[0]() is logits and _recent[1]() is target and _recent[2] == state:
        known: LogitStatistics = _recent[3]
        return known
    require_classes(target, logits.shape[-1])
    z, aim = logits.reshape(-1, logits.shape[-1]).contiguous(), target.reshape(-1).long().contiguous()
    made = LogitStatistics(*(part.view(target.shape) for part in _Statistics.apply(z, aim)))  # type: ignore[no-untyped-call]
    if not (logits.is_leaf and logits.requires_grad):  # a parameter may be written to unseen, through .data
        _recent = weakref.ref(logits), weakref.ref(target), state, made
    return made


def _differentiable(logits: Tensor, target: Tensor) -> LogitStatistics:
    """Compose the statistics from torch's operations, for transforms that cannot see through our function."""
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    maximum = wide.gather(-1, wide.argmax(-1, keepdim=True)).squeeze(-1)
    log_sum = torch.logsumexp(wide, -1) - maximum
    at_target = wide.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    parts = (log_sum, at_target, wide.mean(-1), maximum)
    return LogitStatistics(*(torch.where(target == IGNORE, torch.zeros_like(part), part) for part in parts))
