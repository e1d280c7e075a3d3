"""Which base an adapter was made for: a digest of each weight, taken before an adapter or a start touches any of them.

A digest is of the shape and of at most 4096 evenly spaced numbers, rounded to bfloat16, so that a base is the same one
whether it is loaded in float32 or in bfloat16, and taking it costs no time. (Numbers that were rounded to float16 first
may round otherwise; such bases are not compared.) The digest of a quantized weight ends in how it is quantized: an
adapter that was trained on rounded weights has learned what their rounding lost, so two quantized bases must be rounded
alike. A quantized and a plain one are not told apart: an adapter of the one is often put on the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.layers import matrix, own_weight, unmatrix, unwrapped
from plait.math.packed import Packed, unrounded
from plait.parametrize.base import LEFT, Parametrization, attached, stack

SAMPLE = 4096
"""How many numbers of a weight are looked at."""

COMPARED = (torch.float64, torch.float32, torch.bfloat16)
"""The types whose numbers are the same ones in bfloat16."""

Origin = Mapping[str, str]
"""Digests by the names of the parameters."""


def digest(weight: Tensor) -> str | None:
    """Return the digest of a weight, "NUMBERS", "NUMBERS FORM" or " FORM"; None where it has neither part.

    NUMBERS: empty where the numbers are of another type, or not at hand (quantized and let go, sharded, on the meta
    device). FORM: how a weight of plait's own is quantized.

    >>> digest(torch.ones(3)) == digest(torch.ones(3, dtype=torch.bfloat16)) != digest(torch.zeros(3))
    True
    """
    form = str(weight.form) if isinstance(weight, Packed) else ""
    return f"{_numbers(unrounded(weight.detach()))} {form}".rstrip() or None


def _numbers(numbers: Tensor) -> str:
    if type(numbers) not in (Tensor, nn.Parameter) or numbers.is_meta or numbers.dtype not in COMPARED:
        return ""
    spaced = numbers.reshape(-1)[:: max(numbers.numel() // SAMPLE, 1)][:SAMPLE].contiguous()
    made = hashlib.sha256(f"{tuple(numbers.shape)}\n".encode())
    made.update(spaced.to(torch.bfloat16).cpu().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:16]


def record_left(layer: nn.Module, part: Parametrization) -> None:
    """Note in an adapter that a start made it, and which weight that left; empty where it has no digest."""
    _note(part, own_weight(layer))


def _note(part: Parametrization, weight: Tensor) -> None:
    noted = list(bytes.fromhex(_numbers(unrounded(weight.detach()))))
    part.register_buffer(LEFT, torch.tensor(noted, dtype=torch.uint8, device=weight.device))


def started(part: Parametrization) -> bool:
    """Say whether a start made an adapter what it is."""
    return LEFT in part._buffers or part.taken() is not None


def drop_record(part: Parametrization) -> None:
    """Forget that a start made an adapter: it is a plain one."""
    for name in [name for name in part._buffers if name.startswith("start_")]:
        delattr(part, name)


def left_alone(layer: nn.Module) -> bool:
    """Say whether a layer's weight is still the one that the last start left; so it is where nobody can tell."""
    made = _numbers(unrounded(own_weight(layer).detach()))
    noted = [part._buffers.get(LEFT) for part in stack(layer) if part.taken() is not None]
    known = [bytes(left.tolist()).hex() for left in noted if left is not None and left.numel()]
    return not made or len(known) < len(noted) or made in known


def _now(model: nn.Module) -> dict[str, str]:
    made = {name: digest(p) for name, p in model.named_parameters() if ".plait." not in f".{name}"}
    return {name: value for name, value in made.items() if value is not None}


def _buffers(model: nn.Module) -> dict[str, str | None]:
    """Return the digests of what a model saves beside its parameters, such as running statistics."""
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: digest(tensor)
        for name, tensor in model.state_dict().items()
        if name not in own and ".plait." not in f".{name}" and isinstance(tensor, Tensor)
    }


def _adapted(model: nn.Module) -> bool:
    return any(isinstance(getattr(layer, "plait", None), nn.ModuleDict) for layer in model.modules())


def record_origin(model: nn.Module) -> None:
    """Note what the base is, before the first adapter is put on it."""
    model = unwrapped(model)
    if not _adapted(model):
        if not hasattr(model, "_plait_origin"):
            model.register_load_state_dict_pre_hook(_loading)
        model._plait_origin = _now(model)  # type: ignore[assignment]
        model._plait_buffers = _buffers(model)  # type: ignore[assignment]


def _loading(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Note the digests of another base whose weights are loaded under the adapters, and take out of these weights what
    starts took out of those that were there.
    """
    if any(".plait." in f".{name}" for name in state_dict):
        return  # an adapted model's: starts may have taken part of its weights out
    origin: dict[str, str] = model._plait_origin  # type: ignore[assignment]
    for name in origin.keys() & {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}:
        form = origin[name].partition(" ")[2]
        origin[name] = f"{_numbers(state_dict[prefix + name])} {form}".rstrip()
    for at, layer, part in attached(model, Parametrization):
        taken, name = part.taken(), f"{prefix}{at}.weight" if at else f"{prefix}weight"
        if taken is None:
            continue
        if any(key.startswith(f"{name}.") for key in state_dict):
            raise BadInput(
                f"a start took part of '{name}', and out of the quantized weight of a checkpoint it cannot be taken "
                "again: load the checkpoint before the start, or give plain weights."
            )
        given, own = state_dict.get(name), own_weight(layer)
        if given is not None and given.shape == own.shape:
            residual = matrix(layer, given.to(taken)) - taken
            state_dict[name] = unmatrix(layer, residual, own).to(own.dtype)
            _note(part, state_dict[name].to(own.device))


def moved_buffers(model: nn.Module) -> list[str]:
    """Return the names of the buffers, such as running statistics, that are not what they were under the adapters."""
    noted: dict[str, str | None] = getattr(model, "_plait_buffers", {})
    return [name for name, value in _buffers(model).items() if name in noted and noted[name] != value]


def origin_of(model: nn.Module) -> Origin:
    """Return the digests of the base under a model's adapters; empty where nobody took them in time."""
    noted: Origin = getattr(model, "_plait_origin", {})
    return noted if _adapted(model) else _now(model)


def compared(own: Origin, origin: Origin) -> dict[str, bool]:
    """Return, by the names of the parameters, whether two bases have the same numbers, where both have digests."""
    pairs = {name: (own[name].partition(" ")[0], origin[name].partition(" ")[0]) for name in origin if name in own}
    return {name: mine == given for name, (mine, given) in pairs.items() if mine and given}


def refuse_another_base(model: nn.Module, origin: Origin, source: str, beside: Collection[str] = ()) -> None:
    """Refuse an adapter that was made for a base with other weights than a model's.

    beside: parameters that the adapter brings along itself. What one side has no digest of is not compared.
    """
    own = origin_of(model)
    origin = {name: value for name, value in origin.items() if name in own and name not in beside}
    same = compared(own, origin)
    other = [name for name, alike in same.items() if not alike]
    if other:
        raise BadInput(
            f"{source} was made for another base: {len(other)} of {len(same)} weights, '{other[0]}' first, are not "
            "those it was trained on; load that model, or give any_base=True if you mean this one."
        )
    for name, value in origin.items():
        mine, given = own[name].partition(" ")[2], value.partition(" ")[2]
        if mine and given and mine != given:
            raise BadInput(
                f"{source} was made for a base that is quantized otherwise: '{name}' as {given}, here as {mine}; "
                "quantize this one alike, or give any_base=True if you mean this one."
            )
