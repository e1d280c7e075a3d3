"""What no parametrization can act on: weights that are not there yet or not finite, or are read without their layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from plait.errors import BadInput, NonFinite
from plait.layers import own_weight
from plait.math.packed import readable, unrounded


def refuse_absent(title: str, what: str, weight: Tensor) -> None:
    """Refuse a weight that has no shape or no memory yet; `what` names it, as in "the weight of 'head'"."""
    if isinstance(weight, nn.UninitializedParameter):
        raise BadInput(f"{what} has no shape before its first input: run the model once before {title}.")
    if weight.is_meta:
        raise BadInput(f"{what} is on the meta device: load the model's weights before {title}.")


def refuse_weight(title: str, name: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight cannot be parametrized."""
    weight, what = own_weight(layer), f"the weight of '{name}'"
    refuse_absent(title, what, weight)
    if not weight.is_floating_point():
        raise BadInput(f"{what} is {weight.dtype}: {title} needs a floating-point weight.")
    if weight.dtype.itemsize < 2:
        raise BadInput(f"{what} is {weight.dtype}: convert it to 16 or more bits before {title}.")
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise BadInput(f"'{name}' rewrites its own weight (max_norm): set max_norm to None, or leave it out of where.")


def read_by_others(model: nn.Module) -> set[str]:
    """Return the names of layers whose weight is read without calling them, so that a parametrization does nothing."""
    attentions = [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return {f"{name}.out_proj" if name else "out_proj" for name in attentions}


def require_finite(numbers: Tensor, where: str) -> None:
    """Refuse what has no decomposition."""
    total = numbers.sum(dtype=torch.float32)  # takes no memory, but may overflow
    if not bool(torch.isfinite(total)) and not bool(torch.isfinite(numbers).all()):
        raise NonFinite(f"{where} that is NaN or infinite: mend what it comes from, or leave the layer out with where.")


def refuse_nonfinite(title: str, targets: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse layers whose weights a method decomposes, and cannot."""
    for name, layer in targets:
        require_finite(
            readable(unrounded(own_weight(layer).detach())), f"{title} found a number in the weight of '{name}'"
        )
