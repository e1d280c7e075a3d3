"""Whether attention under adapters is in the range where its gradients can be had in less than quadratic time."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Count, Positive
from plait.layers import evaluating, hooked, is_linear_map, is_transformers_conv1d, layers, matrix, require_layers
from plait.math.low_rank_attention import degree_for
from plait.method import Method, Now, method
from plait.parametrize.base import dense_weight, stack, untouched_weight


def is_projection(layer: nn.Module) -> bool:
    """Say whether a layer can project tokens to queries, keys or values."""
    return isinstance(layer, nn.Linear) or (is_linear_map(layer) and is_transformers_conv1d(layer))


@paper("hu2025limits", key="lora-limits", kind="probe")
@method
class EfficiencyThreshold(Method):
    """max_ij |X W'|_ij of each projection W' = W + scale * B A to queries, keys or values, beside sqrt(ln L), L tokens.

    The gradient of LoRA through attention can be approximated in almost linear time by chained low-rank products if the
    largest entries of X W_Q', X W_K' and X W_V' are below a threshold of order sqrt(log L), and not in truly less than
    quadratic time above it, unless the strong exponential time hypothesis is false. The statement is about orders: the
    constant is taken to be 1 here, and figures are to be compared over runs. `plait.math.low_rank_attention` has the
    chained products themselves, for attention without a mask; `degree_for` says of what degree they must be.

    where: the layers that project. batches: of training data, in evaluation mode; tokens that the attention mask hides
    do not count. tolerance: for the degree. Returns {"norm" (the largest entry over all projections), "threshold",
    "norm / threshold" (below 1: efficient), "part below" (of the projections), "adapter norm" (the largest entry of
    X * scale * B A; 0 without adapters), "degree" (of the polynomial that meets `tolerance` at logits of norm^2)}.
    Raises BadInput where no layer matches.

    Only the abstract of the paper could be read; the products follow its statement and are tested against autograd.

    >>> EfficiencyThreshold(batches=2)
    EfficiencyThreshold(batches=2)
    """

    where: str = "q_proj|k_proj|v_proj|query|key|value|q_lin|k_lin|v_lin|c_attn|query_key_value"
    batches: Count = 1
    tolerance: Positive = 1e-2

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a pattern that matches no layer."""
        require_layers(self, model, self.where, is_projection)

    @torch.no_grad()
    def measure(self, model: nn.Module, now: Now) -> dict[str, float]:
        """Return norms and threshold at the present weights."""
        norms: dict[str, float] = {}
        added: dict[str, float] = {}
        seen: dict[str, Any] = {"mask": None, "tokens": 1}
        updates = {
            name: matrix(layer, dense_weight(layer)).float() - matrix(layer, untouched_weight(layer)).float()
            for name, layer in layers(model, self.where, is_projection)
            if stack(layer)
        }

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str) -> None:
            given, mask = inputs[0], seen["mask"]
            if not isinstance(mask, Tensor) or mask.shape != output.shape[:-1]:
                mask = output.new_ones(output.shape[:-1])
            counted = mask.bool()
            seen["tokens"] = max(seen["tokens"], int(counted.sum(-1).max()))
            norms[name] = max(norms.get(name, 0.0), float(output[counted].float().abs().max()))
            if name in updates:
                moved = given[counted].float() @ updates[name].T
                added[name] = max(added.get(name, 0.0), float(moved.abs().max()))

        hooks = (
            layer.register_forward_hook(partial(keep, name=name))
            for name, layer in layers(model, self.where, is_projection)
        )
        with hooked(hooks), evaluating(model):
            for batch in now.calibration(self.batches):
                mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
                seen["mask"] = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
                now.call(model, batch.inputs)
        return self.figures(list(norms.values()), list(added.values()), int(seen["tokens"]))

    def figures(self, norms: list[float], added: list[float], tokens: int) -> dict[str, float]:
        """Return what follows from the norms of the projections and the number of tokens."""
        largest, threshold = max(norms), math.sqrt(math.log(max(tokens, 2)))
        return {
            "norm": largest,
            "threshold": threshold,
            "norm / threshold": largest / threshold,
            "part below": sum(norm < threshold for norm in norms) / len(norms),
            "adapter norm": max(added, default=0.0),
            "degree": degree_for(min(largest**2, 100.0), self.tolerance),
        }
