"""A start from what the first step of full fine-tuning would do to each weight."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, NonNegative, Positive
from plait.initialize.base import (
    SHARE,
    Found,
    Start,
    groups,
    model_bytes,
    refuse_sharers,
    refuse_stacked,
    undisturbed,
)
from plait.layers import matrix, matrix_shape, own_weight
from plait.math.svd import exact_svd, sketched_svd
from plait.method import Now, method
from plait.parametrize.core import Core
from plait.parametrize.origin import record_left
from plait.parametrize.refusals import require_finite
from plait.sharding import averaged


@paper("ponkshe2024lorasb", key="lora-sb")
@method
class LoRASB(Start):
    """B = U_r, A = V_r^T, R = diag(S_r) / scale, where -step_size * sign(G) = U S V^T is the first step that Adam would
    take on the weight [out, in] under the gradient G, summed over `batches` calibration batches.

    Put it after LoRAXS, whose factors it replaces: B and A are orthonormal and stay frozen, R is trained. Then the
    gradient of R is B^T (dL/dW) A^T, the best approximation of the full gradient in their span, at any scale: alpha
    does not matter. Training starts at W + U_r S_r V_r^T, the best rank-r form of that first step.

    The sign needs a layer's whole gradient, which a sketch cannot give: layers are taken in groups whose gradients
    together are below the part `memory` of the model (or one layer), each group with its own pass over the batches;
    they are summed in float32 as the backward pass reaches them, and all of them are taken at W, with R = 0.
    Micro-batches and processes give what one batch in one process gives, up to rounding where an entry of G is about 0.
    The factors are not rounded to bfloat16, as the authors' code does.

    step_size: the learning rate of the first step, greater than 0; the authors take lr / (number of warmup steps).
    memory: at least 0, what gradients may take at once, in units of the model's size; with room for all of them, 1 in
    float32 and 2 in bfloat16, the batches are passed over once.
    Raises BadInput where no gradient arrives.

    >>> from plait import LoRAXS, train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 4), (x, x[:, :4]), methods=[LoRAXS(rank=2), LoRASB()], steps=2)
    >>> torch.allclose(run.model.plait.loraxs.A @ run.model.plait.loraxs.A.T, torch.eye(2), atol=1e-5)
    True
    """

    starts = Core

    batches: Count = 4
    step_size: Positive = 1e-4
    memory: NonNegative = SHARE

    def found(self, model: nn.Module) -> list[Found]:
        """Return the adapters; a weight that several layers share has one gradient for all of them and is refused."""
        chosen = super().found(model)
        refuse_sharers(self, model, chosen)
        refuse_stacked(self, chosen)
        return chosen

    @torch.no_grad()
    def initialize(self, model: nn.Module, now: Now) -> None:
        """Start each adapter from its layer's gradient, group by group; R stays 0 until all gradients were taken, so
        that every gradient is the one at W.
        """
        if now.ask is None:
            raise BadInput("LoRASB needs gradients: use it inside plait.train, or set now.ask.")
        chosen = self.found(model)
        for _, _, adapter in chosen:
            cast(Core, adapter).R.zero_()
        cores = []
        for group in groups(
            chosen, lambda found: 4 * math.prod(matrix_shape(found[1])), self.memory * model_bytes(model)
        ):
            gradients = self._gradients(model, now, group)
            for name, layer, adapter in group:
                cores.append(self._start(name, layer, cast(Core, adapter), gradients))
        for (_, layer, adapter), core in zip(chosen, cores, strict=True):
            cast(Core, adapter).R.copy_(core)
            record_left(layer, adapter)

    def _start(self, name: str, layer: nn.Module, adapter: Core, gradients: dict[str, Tensor]) -> Tensor:
        """Set A and B of one layer, and return its R."""
        gradient = averaged(gradients.pop(name)) if name in gradients else torch.zeros(())
        if not bool(gradient.any()):
            raise BadInput(
                f"LoRASB got no gradient for '{name}': nothing of the loss depends on it; leave it out of the adapters "
                "with where."
            )
        require_finite(gradient, f"LoRASB got a gradient for '{name}'")
        step = matrix(layer, gradient).sign_().mul_(-self.step_size)
        decompose = exact_svd if min(step.shape) <= max(64, 4 * adapter.rank) else sketched_svd
        u, s, vh = decompose(step, adapter.rank)
        adapter.set(vh, u, torch.zeros_like(adapter.R))
        return torch.diag(s) / adapter.scale

    def _gradients(self, model: nn.Module, now: Now, group: list[Found]) -> dict[str, Tensor]:
        """Return the sum over the batches of each layer's gradient, in float32; one is added at a time."""
        sums: dict[str, Tensor] = {}

        def add(parameter: Tensor, *, name: str) -> None:
            grad, parameter.grad = parameter.grad, None
            if grad is None:
                return
            dense = grad.to_dense() if grad.is_sparse else grad
            if name in sums:
                sums[name] += dense
            else:
                sums[name] = dense.float()

        with undisturbed(model, now), ExitStack() as hooks:
            for name, layer, _ in group:
                weight = own_weight(layer)
                weight.requires_grad_(True)
                hooks.enter_context(weight.register_post_accumulate_grad_hook(partial(add, name=name)))
            for batch in now.calibration(self.batches):
                now.batch = batch
                try:
                    with torch.enable_grad():
                        now.ask(model, now)
                except RuntimeError as problem:  # nothing of the loss depends on this group
                    if "does not require grad" not in str(problem):
                        raise
        return sums
