"""Adapters whose form is chosen layer by layer: a low-rank update, a sparse one, or none; SPT chooses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plait.layers import CONVOLUTIONS, is_transformers_conv1d, matrix, own_bias, own_weight
from plait.parametrize.base import Parametrization, stack
from plait.parametrize.low_rank import adapter_dtype, low_rank_output
from plait.parametrize.sparse import placed, places, recomputed_output

Seen = Callable[[str, Tensor], None]
"""Is shown ("weight", the gradient [out, in]) and ("bias", the gradient [out]) of a layer in a backward pass."""


class Allocated(Parametrization):
    """W -> W + B A, or W -> W + S, or W -> W, and b -> b + s; nothing at all until `allocate`.

    A: [rank, in], B: [out, rank]. S and s are zero but for values [n] at the places `support` [n], for S those of its
    rows laid in line. seen: is shown the gradients of W and b in the coming passes, where that is set.
    """

    support: Tensor
    bias_support: Tensor
    seen: Seen | None = None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        (self.out, self.into), kind = weight.shape, adapter_dtype(weight)
        self.A, self.B = (
            nn.Parameter(torch.empty(0, self.into, dtype=kind)),
            nn.Parameter(torch.empty(self.out, 0, dtype=kind)),
        )
        self.values = nn.Parameter(torch.empty(0, dtype=kind))
        self.bias_values = nn.Parameter(torch.empty(0, dtype=kind))
        self.register_buffer("support", places(torch.empty(0), weight))
        self.register_buffer("bias_support", torch.empty(0, dtype=torch.int32))
        self._train_what_there_is()

    @torch.no_grad()
    def allocate(self, a: Tensor | None, support: Tensor | None, bias_support: Tensor | None) -> None:
        """Begin a low-rank update at A = a [rank, in] and B = 0, or sparse ones at zero at some places."""
        if a is not None:
            self.A.data = a.to(self.A).clone()
            self.B.data = self.B.new_zeros(self.out, len(a))
        if support is not None:
            self.support = support.to(self.support)
            self.values.data = self.values.new_zeros(len(support))
        if bias_support is not None:
            self.bias_support = bias_support.to(self.bias_support)
            self.bias_values.data = self.bias_values.new_zeros(len(bias_support))
        self._train_what_there_is()

    def _train_what_there_is(self) -> None:
        """Let only parameters with numbers in them be trained: several processes wait for the gradients of all."""
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.numel() > 0)

    def low_rank(self) -> tuple[nn.Parameter, nn.Parameter, float] | None:
        """Return (A, B, 1) where the update is low-rank."""
        return (self.A, self.B, 1.0) if len(self.A) else None

    def dense(self, weight: Tensor) -> Tensor:
        """Return W + B A, W + S or W, rounded once to the precision of W."""
        if self.seen is not None:
            return self._shown("weight", weight)
        if len(self.A):
            return torch.addmm(weight.to(self.A.dtype), self.B, self.A).to(weight.dtype)
        return placed(weight, self.values, self.support) if len(self.values) else weight

    def dense_bias(self, bias: Tensor) -> Tensor:
        """Return b + s."""
        return super().dense_bias(bias if self.seen is None else self._shown("bias", bias))

    def shift(self) -> Tensor | None:
        """Return s, [out], or None if the bias has no update."""
        if not len(self.bias_values):
            return None
        return self.bias_values.new_zeros(self.out).index_add(0, self.bias_support.long(), self.bias_values)

    def _shown(self, name: str, tensor: Tensor) -> Tensor:
        leaf, seen = tensor.detach().requires_grad_(), self.seen
        leaf.register_hook(lambda gradient: None if seen is None else seen(name, gradient.detach()))
        return leaf

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return W x + B (A x) or (W + S) x, and s; no weight is kept for the backward pass."""
        if self.seen is not None:
            return None
        made: Tensor | None
        if len(self.A):
            made = low_rank_output(self, layer, inputs, below, self.A, self.B, 1.0)
        elif len(self.values):
            made = self._sparse(layer, inputs, below)
        else:
            made = below()
        shift = self.shift()
        if made is None or shift is None or own_bias(layer) is None:
            return made
        ones = (1,) * len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else ()
        return made + shift.to(made.dtype).view(-1, *ones)

    def _sparse(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        if not (isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)):
            return None
        if stack(layer)[0] is self:
            weight = matrix(layer, own_weight(layer))
            return recomputed_output(layer, inputs, self.values, self.support, weight=weight, bias=layer.bias)
        branch = recomputed_output(layer, inputs, self.values, self.support)
        return None if branch is None else (base := below()) + branch.to(base.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("support", "bias_support"):
            if (loaded := state_dict.get(prefix + name)) is not None:
                setattr(self, name, self.get_buffer(name).new_empty(loaded.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._train_what_there_is()
