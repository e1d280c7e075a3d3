"""The states of an optimizer's parameter: made, read and written as they are kept, whole or one process's share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from plait.errors import BadInput
from plait.math.storage import bits_at, blocks, decode, encode, key_of, kind_for, to_bfloat16
from plait.math.update_rule import Whole, exact, inner_of_rows
from plait.sharding import full, is_sharded

DTYPES = {torch.uint8: "8bit", torch.bfloat16: "bfloat16"}


def own(tensor: Any) -> Tensor:
    """Return the share of a tensor that this process holds."""
    held: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return held


def share(p: Any) -> tuple[Tensor, Tensor, int]:
    """Return this process's share of a sharded weight and of its gradient, and its first element's index."""
    gradient = p.grad if p.grad.placements == p.placements else p.grad.redistribute(placements=p.placements)
    return own(p), own(gradient), first_index(p)


def scale_of(name: str) -> str:
    """Return the name of the state that holds the scales of an 8-bit state."""
    return f"{name}_scale"


def as_precise(value: Tensor, weight: torch.dtype) -> Tensor:
    """Return a state that is not rounded as a weight of that dtype wants it: it may be of another model's, or of a time
    when the weight had another precision.
    """
    return value.to(exact(weight)) if value.dtype in (torch.float32, torch.float64) else value


def make(state: dict[str, Any], names: tuple[str, ...], p: Tensor, wanted: str) -> str:
    """Make the states that are missing, zero; return how they are kept, which a loaded state decides for itself."""
    kind = "" if names else "float32"
    for name in names:
        if name in state:
            kind = DTYPES.get(state[name].dtype, "float32")
            state[name] = as_precise(state[name], p.dtype)
            if state[name].shape != p.shape or state[name].device != p.device:  # a kernel would read what is not there
                raise BadInput(
                    f"a weight of shape {tuple(p.shape)} on {p.device} has a state '{name}' of shape "
                    f"{tuple(state[name].shape)} on {state[name].device}: make a new optimizer, after the model has "
                    "its shapes and its device."
                )
            continue
        kind = kind or ("float32" if p.dtype == torch.float64 else kind_for(wanted, p.shape))
        if kind == "8bit":
            state[name] = torch.zeros_like(p, dtype=torch.uint8, memory_format=torch.contiguous_format)
            state[scale_of(name)] = share_of_rows(torch.zeros(blocks(own(p).shape), device=p.device), p)
        else:
            state[name] = torch.zeros_like(p, dtype=torch.bfloat16 if kind == "bfloat16" else exact(p.dtype))
    return kind


def share_of_rows(own_rows: Tensor, p: Any) -> Tensor:
    """Return scales of this process's rows of `p` as a tensor that is spread over processes as `p` is."""
    if not is_sharded(p):
        return own_rows
    from torch.distributed.tensor import DTensor

    if any(placement.is_shard() and placement.dim != 0 for placement in p.placements):
        raise BadInput("8-bit states need weights that are sharded along their first dimension: use states='bfloat16'.")
    shape = torch.Size(blocks(p.shape))
    spread: Tensor = DTensor.from_local(
        own_rows,
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=shape,
        stride=(shape[1], 1),
    )
    return spread


def rows_of(all_rows: Tensor, p: Tensor) -> Tensor:
    """Return this process's rows of a tensor with one row for each of `p`, spread as `p` is."""
    start = first_row(p)
    return share_of_rows(all_rows[start : start + own(p).shape[0]].clone(), p)


def first_index(p: Any) -> int:
    """Return the index, in the whole tensor, of the first element that this process holds."""
    if not is_sharded(p):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return int(offset[0]) * math.prod(p.shape[1:]) if offset else 0


def first_row(p: Any) -> int:
    """Return the number, in the whole tensor, of the first row that this process holds."""
    width: int = p.shape[1:].numel()
    return first_index(p) // max(width, 1)


def whole(p: Any) -> Whole:
    """Return what a step must know of all of a weight, of which this process may hold a share."""
    width = p.shape[1:].numel()
    if not is_sharded(p):
        return Whole(width)
    from torch.distributed.tensor import DTensor, Partial, Replicate

    rows = p.shape[:1] if p.dim() > 1 else torch.Size()

    def of_rows(placement: Any) -> Any:
        if not placement.is_shard():
            return Replicate()
        return placement if rows and placement.dim == 0 else Partial()

    def inner(one: Tensor, other: Tensor) -> Tensor:
        products, placements = inner_of_rows(one, other), [of_rows(placement) for placement in p.placements]
        stride = (1,) * len(rows)
        return full(DTensor.from_local(products, p.device_mesh, placements, run_check=False, shape=rows, stride=stride))

    return Whole(width, first_row(p), inner)


def read(state: dict[str, Any], names: Iterable[str], kind: str) -> dict[str, Tensor]:
    """Return this process's share of the states as the numbers that a rule computes with."""
    if kind == "8bit":
        return {name: decode(own(state[name]), own(state[scale_of(name)])) for name in names}
    return {name: own(state[name]).float() if kind == "bfloat16" else own(state[name]) for name in names}


def write(state: dict[str, Any], values: dict[str, Tensor], kind: str, step: int, first: int) -> None:
    """Round the new states of step 1, 2, ... and put them where they are kept; first: of this process's elements."""
    if kind == "float32":
        return  # they were stepped in place
    for number, (name, value) in enumerate(values.items()):
        index = first + torch.arange(value.numel(), device=value.device).view(value.shape)
        bits = bits_at(key_of(step), index, number)
        if kind == "bfloat16":
            own(state[name]).copy_(to_bfloat16(value.contiguous(), bits))
        else:
            codes, scales = encode(value, bits)
            own(state[name]).copy_(codes)
            own(state[scale_of(name)]).copy_(scales)


@contextlib.contextmanager
def opened(state: dict[str, Any], names: tuple[str, ...], wanted: str, precise: torch.dtype) -> Iterator[None]:
    """Let a rule that makes its states itself compute with them, `precise`; they are rounded as `wanted`, or as loaded,
    after.
    """
    held = [name for name in names if name in state]
    kind = DTYPES.get(state[held[0]].dtype, "float32") if held else ""
    state.update({name: value.to(precise) for name, value in read(state, held, kind).items()})
    yield
    for number, name in enumerate(names):
        value = state[name]
        kind = kind or ("float32" if value.dtype == torch.float64 else kind_for(wanted, value.shape))
        if kind == "float32":
            return
        index = torch.arange(value.numel(), device=value.device).view(value.shape)
        bits = bits_at(key_of(state["step"]), index, number)
        if kind == "bfloat16":
            state[name] = to_bfloat16(value.float().contiguous(), bits)
        else:
            state[name], state[scale_of(name)] = encode(value.float(), bits)
