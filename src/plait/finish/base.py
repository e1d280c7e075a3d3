"""Methods that act when training is over: merge, average, prune, quantize, fold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.tensors import State


def matching(model: nn.Module, state: State, source: str) -> State:
    """Return the entries of `state` for the model's own weights; refuse one that is missing or of another shape.

    Of a weight that the model has under several names `state` may hold one, as files do.
    """
    own = model.state_dict(keep_vars=True)
    held = {id(tensor): state[name] for name, tensor in own.items() if name in state}
    state = {name: held[id(tensor)] for name, tensor in own.items() if id(tensor) in held}
    for name, tensor in own.items():
        if name not in state:
            raise BadInput(f"{source} lacks '{name}': only models of the same architecture can be merged.")
        if state[name].shape != tensor.shape:
            raise BadInput(
                f"'{name}' is {tuple(state[name].shape)} in {source} and {tuple(tensor.shape)} here: only models of "
                "the same architecture can be merged."
            )
    return {name: state[name].to(tensor.device) for name, tensor in own.items()}


def weighted(states: Sequence[State], weights: Sequence[Tensor | float | State]) -> State:
    """Return sum_i weight_i state_i / sum_i weight_i, accumulated in float32; whole-number tensors are the first's.

    weights: one number for each state, or one tensor of the same shape for each of its tensors.
    """
    merged: State = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            merged[name] = first.clone()
            continue
        total = torch.zeros_like(first, dtype=torch.float32)
        mass: Tensor | float = torch.zeros_like(total)
        for state, weight in zip(states, weights, strict=True):
            share = weight[name] if isinstance(weight, dict) else weight
            total += share * state[name].float()
            mass = mass + share
        merged[name] = (total / mass).to(first.dtype)
    return merged
