"""Logits that are not held: a language model's hidden states and its head, worked through a few tokens at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.batch import IGNORE
from plait.errors import BadInput
from plait.math.logit_statistics import (
    LogitStatistics,
    backward,
    forward,
    like,
    logit_statistics,
    require_classes,
)
from plait.math.products import product
from plait.math.tracing import traced

CHUNK = 3 * 2**21
"""How many logits are held at once: 24 MiB of float32."""


class Logits:
    """hidden @ weight^T + bias, [..., classes], for hidden [..., d], weight [classes, d] and bias [classes] or None.

    `statistics(target)` gives what losses need without ever holding all logits; a frozen head costs no more than dense
    logits would, a trained one is multiplied once more in the backward pass. `dense()` forms the logits; whatever a
    tensor can do and this cannot is done by `dense()`, and torch's functions see `dense()`.

    >>> output = Logits(torch.ones(2, 3), torch.eye(3)[:2])
    >>> output.shape, output.statistics(torch.tensor([0, 1])).mean
    (torch.Size([2, 2]), tensor([1., 1.]))
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if hidden.shape[-1] != weight.shape[-1]:
            raise BadInput(
                f"hidden states of width {hidden.shape[-1]} need a head weight [classes, {hidden.shape[-1]}]."
            )
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self.hidden, self.weight = hidden.to(autocast), weight.to(autocast)
        self.bias = None if bias is None else bias.to(autocast)
        self._dense: Tensor | None = None
        self._known: tuple[Tensor, tuple[Any, ...], LogitStatistics] | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape that the logits would have."""
        return torch.Size((*self.hidden.shape[:-1], len(self.weight)))

    @property
    def dtype(self) -> torch.dtype:
        """The type that the logits would have."""
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """Where the logits would be."""
        return self.hidden.device

    def dim(self) -> int:
        """Return how many dimensions the logits would have."""
        return self.hidden.dim()

    def dense(self) -> Tensor:
        """Return the logits [..., classes]."""
        if self._dense is None:
            self._dense = F.linear(self.hidden, self.weight, self.bias)
        return self._dense

    def statistics(self, target: Tensor) -> LogitStatistics:
        """Return the statistics of the logits at targets [...] of classes, each of the target's shape."""
        if self._dense is not None or traced():
            return logit_statistics(self.dense(), target)
        if target.shape != self.shape[:-1]:
            raise BadInput(f"logits of shape {tuple(self.shape)} do not fit targets of shape {tuple(target.shape)}.")
        state = like(self.hidden, self.weight, target)
        if self._known is None or self._known[0] is not target or self._known[1] != state:
            require_classes(target, len(self.weight))
            self._known = target, state, self._compute(target)
        return self._known[2]

    def _compute(self, target: Tensor) -> LogitStatistics:
        rows = (target != IGNORE).flatten().nonzero().squeeze(-1)
        hidden = self.hidden.flatten(0, -2)
        whole = len(rows) == len(hidden)
        hidden, aim = (hidden, target.flatten()) if whole else (hidden[rows], target.flatten()[rows])
        with torch.autocast(hidden.device.type, enabled=False):
            parts = _LinearStatistics.apply(hidden.contiguous(), self.weight, self.bias, aim.long(), weakref.ref(self))  # type: ignore[no-untyped-call]
        if not whole:
            parts = [part.new_zeros(target.numel()).index_put((rows,), part) for part in parts]
        return LogitStatistics(*(part.view(target.shape) for part in parts))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"Logits has no '{name}'.")
        return getattr(self.dense(), name)

    def __getitem__(self, key: Any) -> Tensor:
        return self.dense()[key]

    def __len__(self) -> int:
        return len(self.hidden)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        opened = [[dense(a) for a in arg] if isinstance(arg, list | tuple) else dense(arg) for arg in args]
        return function(*opened, **{name: dense(value) for name, value in (kwargs or {}).items()})


def dense(output: Any) -> Any:
    """Return an output as a tensor where it is `Logits`; anything else as it is."""
    return output.dense() if isinstance(output, Logits) else output


def wide(logits: Tensor) -> Tensor:
    """Return logits in the precision in which losses are computed: float32, or float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def statistics(output: Any, target: Tensor) -> LogitStatistics:
    """Return the statistics of an output, a tensor of logits or `Logits`, each of the shape of the target's examples.

    target: [...] of classes, or [..., classes] of probabilities q, for which `target` is <q, z>.
    """
    if target.is_floating_point():
        classes = torch.zeros(target.shape[:-1], dtype=torch.long, device=target.device)
        return statistics(output, classes)._replace(target=(target * wide(dense(output))).sum(-1))
    return output.statistics(target) if isinstance(output, Logits) else logit_statistics(output, target)


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their logits)."""
    size = max(CHUNK // len(weight), 1)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        yield rows, product(hidden[rows], weight.t(), bias)


class _LinearStatistics(torch.autograd.Function):
    """The statistics of hidden @ weight^T + bias.

    With g the slopes in (log_sum, target, mean, maximum) and P = softmax - onehot(argmax), the gradient in hidden_i is
    g1 (P_i W) + g2 W_target + g3 mean_k W_k + g4 W_argmax: P W is all that is kept, and needs no g. Only the gradient
    of a trained head, P^T (g1 hidden) + ..., must wait for g, and so forms the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, owner: Any
    ) -> tuple[Tensor, ...]:
        ctx.owner = owner
        ctx.set_materialize_grads(False)  # a statistic that no loss reads costs nothing
        pull = hidden.new_empty(hidden.shape) if ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:]) else None
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        out, argmax = hidden.new_empty(len(hidden), 4, dtype=wide), torch.empty_like(target)
        only_log_sum = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=wide, device=hidden.device)
        for rows, z in _chunks(hidden, weight, bias):
            out[rows], argmax[rows] = forward(z, target[rows])
            if pull is not None:
                slopes = only_log_sum.expand(len(z), 4).contiguous()
                pull[rows] = product(backward(z, target[rows], out[rows], argmax[rows], slopes, True), weight)
        ctx.save_for_backward(hidden, weight, bias, target, out, argmax, pull)
        return tuple(column.contiguous() for column in out.unbind(-1))

    @staticmethod
    def backward(ctx: Any, *given_slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        if (owner := ctx.owner()) is not None:
            owner._known = None  # its graph is spent
        hidden, weight, bias, target, out, argmax, pull = ctx.saved_tensors
        slopes = [out.new_zeros(len(out)) if slope is None else slope for slope in given_slopes]
        if torch.is_grad_enabled():  # a gradient that is differentiated again
            given = [t if t is not None and t.requires_grad else None for t in (hidden, weight, bias)]
            parts = logit_statistics(F.linear(hidden, weight, bias), target)
            found = iter(torch.autograd.grad(parts, [t for t in given if t is not None], slopes, create_graph=True))
            return *(None if t is None else next(found) for t in given), None, None
        stacked = torch.stack(slopes, -1)
        if pull is not None:
            at_sum, at_target, level, at_top = (s.unsqueeze(-1) for s in slopes)
            slope = at_sum * pull + at_target * weight[target] + at_top * weight[argmax]
            if given_slopes[2] is not None:
                slope = slope + level * weight.mean(0, dtype=stacked.dtype)
            return slope.to(hidden.dtype), None, None, None, None
        return *_trained_head(ctx.needs_input_grad, hidden, weight, bias, (target, out, argmax, stacked)), None, None


def _trained_head(
    needs: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients in (hidden, weight, bias), forming the logits of each chunk again."""
    target, out, argmax, slopes = rest
    in_hidden = torch.empty_like(hidden) if needs[0] else None
    in_weight = torch.zeros_like(weight, dtype=slopes.dtype) if needs[1] else None
    in_bias = torch.zeros_like(bias, dtype=slopes.dtype) if bias is not None and needs[2] else None
    for rows, z in _chunks(hidden, weight, bias):
        slope = backward(z, target[rows], out[rows], argmax[rows], slopes[rows].contiguous(), True)
        if in_hidden is not None:
            in_hidden[rows] = product(slope, weight)
        if in_weight is not None and in_weight.dtype == slope.dtype:
            in_weight.addmm_(slope.t(), hidden[rows])
        elif in_weight is not None:
            in_weight += slope.t() @ hidden[rows]
        if in_bias is not None:
            in_bias += slope.sum(0, dtype=in_bias.dtype)
    return in_hidden, *(None if g is None else g.to(weight.dtype) for g in (in_weight, in_bias))
