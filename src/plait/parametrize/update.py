"""What training did to a base: a low-rank update of each layer, and the layers that were trained whole.

Adapters whose update is low rank give their factors, others their folded weight minus the base's, cut off at a rank:
Delta = U diag(S) V, of which B = U_r diag(S_r)^(1/2) and A = diag(S_r)^(1/2) V_r are kept, the nearest of that rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.layers import is_linear_map, matrix, matrix_shape, own_weight, unwrapped
from plait.math.packed import Packed, numbers, unrounded
from plait.math.svd import exact_svd, gram_svd
from plait.parametrize.base import Parametrization, dense_bias, dense_weight, stack, untouched_weight
from plait.parametrize.freeze import is_fresh
from plait.parametrize.low_rank import RowNorms, Shift, adapter_dtype, row_norms
from plait.parametrize.origin import Origin, compared, digest, left_alone, moved_buffers, origin_of
from plait.parametrize.prompt import refuse_prompts
from plait.parametrize.refusals import require_finite

EXACT = 1024
"""The smaller side up to which a matrix is decomposed itself; above, the eigenvectors of its Gram matrix are taken."""


@dataclass
class Factors:
    """W + scale * B A, A: [rank, in], B: [out, rank]; magnitude [out]: DoRA's; shift [out]: added to the bias."""

    a: Tensor
    b: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None
    shift: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.a)


@dataclass
class Update:
    """What training did, by the names of layers (factors) and of parameters and buffers (whole)."""

    factors: dict[str, Factors] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    origin: Origin = field(default_factory=dict)
    lost: dict[str, tuple[float, float]] = field(default_factory=dict)
    """|Delta - scale B A|^2 and |Delta|^2 of the layers whose update was cut off."""

    @property
    def error(self) -> float:
        """The relative error of what was cut off, |Delta - scale B A| / |Delta| over all those layers."""
        left, size = (sum(pair[side] for pair in self.lost.values()) for side in (0, 1))
        return math.sqrt(left / size) if size else 0.0

    def says(self) -> str:
        """Return a line about what was cut off; empty where nothing was."""
        if not self.lost:
            return ""
        worst, (left, size) = max(self.lost.items(), key=lambda item: item[1][0] / max(item[1][1], 1e-300))
        return (
            f"relative error of the truncated update: {self.error:.3g} over {len(self.lost)} layers "
            f"({math.sqrt(left / max(size, 1e-300)):.3g} at most, in '{worst}')"
        )


def update_of(model: nn.Module, base: nn.Module | None = None, rank: int | None = None) -> Update:
    """Return what training made of a base.

    base: the model before training, of the same kind; needed where its own weights were trained or folded into. rank:
    where to cut off what is of a higher rank. Without it what was trained whole beside adapters is kept whole, and
    another update that is no low-rank one raises BadInput.
    """
    model, base = unwrapped(model), None if base is None else unwrapped(base)
    refuse_prompts(model, "written as low-rank updates")
    if rank is not None and rank < 1:
        raise BadInput(f"rank is {rank}: give at least 1.")
    made = Update(origin=origin_of(model) if base is None else origin_of(base))
    whole = [] if base is None else changed_beside(model, base, cut=rank is not None)
    same = {} if base is None else compared(origin_of(model), origin_of(base))
    moved = moved_weights(model) if base is None else set()
    adapted = any(stack(layer) for layer in model.modules())
    for name, layer in model.named_modules():
        if not is_linear_map(layer) or any(name == part or name.startswith(f"{part}.") for part in whole):
            continue
        under = None if base is None else part_of(base, name)
        trained = own_weight(layer).requires_grad or _moved_weight(layer, under, moved)
        exact = adapted and not trained and same.get(f"{name}.weight", True)
        found = factors_of(name, layer, under, rank, exact, trained)
        if found is None:
            continue
        factors, left, size = found
        if factors.rank or factors.shift is not None:
            made.factors[name] = factors
        if size:
            made.lost[name] = left, size
    for name in trained_beside(model, moved) if base is None else whole:
        made.whole |= {f"{name}.{key}": t for key, t in model.get_submodule(name).state_dict().items()}
    made.origin = {name: value for name, value in made.origin.items() if name not in made.whole}
    return made


def part_of(base: nn.Module, name: str) -> nn.Module:
    """Return the layer of a name in the base, or refuse the base."""
    part: nn.Module | None = dict(base.named_modules()).get(name)
    if part is None or not is_linear_map(part):
        raise BadInput(f"the base is another model: {type(base).__name__} has no layer '{name}'.")
    return part


@torch.no_grad()
def factors_of(
    name: str, layer: nn.Module, base: nn.Module | None, rank: int | None, exact: bool, trained: bool
) -> tuple[Factors, float, float] | None:
    """Return (factors, |what was cut off|^2, |Delta|^2) of one layer, the last two 0 where the factors are exact by
    construction; None if nothing was done to it. exact: whether adapters were put on the base's own weights, whatever
    the types that these are held in now. trained: whether its own weight was trained too.
    """
    held = stack(layer)
    weight = own_weight(layer)
    if bent := [part for part in held if not part.linear]:
        raise BadInput(f"{bent[0].made_by} acts on what '{name}' puts out: no low-rank update can hold it.")
    if base is not None and weight.shape != (before := own_weight(base).shape):
        raise BadInput(
            f"the base is another model: its '{name}' is {list(before)}, the trained one {list(weight.shape)}."
        )
    rounded = isinstance(weight, Packed) and any(part.taken() is not None for part in held)
    if rounded and base is None:
        raise BadInput(
            f"the weight of '{name}' was quantized after a start took part of it, so that the adapter fits no other "
            "base: give the base and a rank, or fold the model and save it."
        )
    if exact and not rounded:
        plain = plain_factors(held) if held else _no_factors(layer)
        if plain is not None and (rank is None or (plain.rank <= rank and plain.magnitude is None)):
            if base is not None and _moved(*(getattr(one, "bias", None) for one in (layer, base))) is not None:
                plain.shift = _shift(layer, base)
            return plain, 0.0, 0.0
    if base is None:
        if not held:
            return None
        if trained or any(part.replaces for part in held):
            raise BadInput(
                f"the parametrization of '{name}' ({_kinds(held)}) is no low-rank update: give the base and a rank to "
                "cut it off at, or fold the model and save it."
            )
    delta, shift = _change(layer, base), _shift(layer, base)
    if not delta.any() and shift is None:
        return None
    rounding = 8 * torch.finfo(weight.dtype).eps * float(numbers(weight).float().square().sum().sqrt())
    require_finite(delta, f"the update of '{name}' has a number")
    factors, left, size = truncated(delta, rank, rounding)
    if rank is None and rounded:
        raise BadInput(
            f"the weight of '{name}' was quantized after a start took part of it, so that the base lacks what rounding "
            "changed and its update is no low-rank one: give a rank to cut it off at."
        )
    if rank is None and factors.rank * sum(delta.shape) >= delta.numel():
        raise BadInput(
            f"the parametrization of '{name}' ({_kinds(held)}) is no low-rank update: give a rank to cut it off at, or "
            "fold the model and save it."
        )
    factors.shift = shift
    return factors, left, size


def _kinds(held: list[Parametrization]) -> str:
    return ", ".join(type(part).__name__ for part in held) or "its own weight was trained"


def _no_factors(layer: nn.Module) -> Factors:
    out, into = matrix_shape(layer)
    device = own_weight(layer).device
    return Factors(torch.zeros(0, into, device=device), torch.zeros(out, 0, device=device))


def plain_factors(held: list[Parametrization]) -> Factors | None:
    """Return the factors of a stack that is a low-rank update of the untouched weight, or DoRA; None if it is not."""
    magnitude = held[-1].magnitude.detach() if isinstance(held[-1], RowNorms) else None
    under = held[:-1] if magnitude is not None else held
    low = [part for part in under if not isinstance(part, Shift)]
    if not low or not all(callable(getattr(part, "plain", None)) for part in low):
        return None
    shifts = [shift.detach() for part in under if (shift := part.shift()) is not None]
    pairs = [(*part.plain(), float(getattr(part, "scale", 1.0))) for part in low]  # type: ignore[operator]
    if len(pairs) == 1:
        a, b, scale = pairs[0]
    else:
        a, b, scale = torch.cat([a for a, _, _ in pairs]), torch.cat([s * b for _, b, s in pairs], dim=1), 1.0
    return Factors(a, b, scale, magnitude, torch.stack(shifts).sum(0) if shifts else None)


def _change(layer: nn.Module, base: nn.Module | None) -> Tensor:
    """Return what was added to a layer's matrix [out, in]."""
    after = matrix(layer, numbers(dense_weight(layer)))
    before = matrix(layer, numbers(unrounded(untouched_weight(layer) if base is None else own_weight(base))))
    kind = adapter_dtype(after)
    return after.to(kind) - before.to(kind)


def _shift(layer: nn.Module, base: nn.Module | None) -> Tensor | None:
    """Return what was added to a layer's bias [out]; None if nothing was."""
    return _moved(dense_bias(layer), getattr(layer if base is None else base, "bias", None))


def _moved(bias: Tensor | None, before: Tensor | None) -> Tensor | None:
    """Return how far a bias is from what it was; None where the two are one."""
    if bias is None or before is None:
        return None
    kind = adapter_dtype(bias)
    return None if _alike(bias, before) else bias.to(kind) - before.to(kind)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors are one, as seen in the coarser of their types."""
    coarse = min(one.dtype, other.dtype, key=lambda kind: kind.itemsize)
    return torch.equal(one.to(coarse), other.to(coarse))


def truncated(delta: Tensor, rank: int | None, noise: float = 0.0) -> tuple[Factors, float, float]:
    """Return (factors, |Delta - B A|^2, |Delta|^2) for the nearest matrix of a rank, or without one of the smallest
    rank that leaves no more than `noise`.

    >>> factors, left, size = truncated(torch.diag(torch.tensor([3.0, 4.0, 0.0])), 1)
    >>> factors.rank, left, size
    (1, 9.0, 25.0)
    """
    u, s, vh = (exact_svd if min(delta.shape) <= EXACT else gram_svd)(delta)
    tails = s.square().flip(0).cumsum(0).flip(0)  # what is left when the triplets from here on are cut off
    if rank is None or rank > len(s):
        rank = int((tails > noise**2).sum()) if rank is None else len(s)
    rank = min(rank, int((s > 0).sum()))
    root = s[:rank].sqrt()
    left = float(tails[rank]) if rank < len(s) else 0.0
    return Factors(root[:, None] * vh[:rank], u[:, :rank] * root), left, float(s.square().sum())


@torch.no_grad()
def cut_off(update: Update, base: nn.Module, rank: int) -> Update:
    """Return an update of at most a rank: what is of a higher one, and DoRA's, is cut off."""
    made = Update({}, update.whole, update.origin)
    for name, factors in update.factors.items():
        if factors.magnitude is None and factors.rank <= rank:
            made.factors[name] = factors
            continue
        layer = base.get_submodule(name)
        weight = matrix(layer, numbers(unrounded(own_weight(layer))))
        weight = weight.to(adapter_dtype(weight))
        delta = factors.scale * (factors.b @ factors.a).to(weight)
        if factors.magnitude is not None:
            moved = weight + delta
            delta = factors.magnitude.to(weight)[:, None] * moved / row_norms(moved)[:, None] - weight
        require_finite(delta, f"the update of '{name}' has a number")
        made.factors[name], *lost = truncated(delta, rank)
        made.factors[name].shift, made.lost[name] = factors.shift, (lost[0], lost[1])
    return made


def moved_weights(model: nn.Module) -> set[int]:
    """Return the identities of frozen parameters that are not what they were under the adapters, by their digests: what
    was trained stays trained though a model is frozen to be served.
    """
    noted: Origin = getattr(unwrapped(model), "_plait_origin", {})
    frozen = {name: p for name, p in model.named_parameters() if name in noted and not p.requires_grad}
    now = {name: value for name, p in frozen.items() if (value := digest(p)) is not None}
    return {id(frozen[name]) for name, alike in compared(now, noted).items() if not alike}


def _moved_weight(layer: nn.Module, base: nn.Module | None, moved: set[int]) -> bool:
    """Say whether a layer's own weight is not the base's, other than by what a start took out of it; not known of
    quantized weights, which cannot be trained.
    """
    if any(part.taken() is not None for part in stack(layer)):
        return not left_alone(layer)
    weight = own_weight(layer)
    if base is None:
        other = id(weight) in moved
    else:
        plain = all(type(each) in (Tensor, nn.Parameter) for each in (weight, own_weight(base)))
        other = plain and not _alike(weight, own_weight(base))
    return other


def trained_beside(model: nn.Module, moved: set[int]) -> list[str]:
    """Return the smallest layers that hold trained parameters which belong to no adapter, or running statistics that
    moved; of a weight that layers share all of them, for peft gives each a weight of its own. moved: `moved_weights`.
    """
    names: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, kind = name.rpartition(".")
        trained = parameter.requires_grad or id(parameter) in moved
        if not trained or ".plait." in f".{name}" or owner in names:
            continue
        adapted = stack(model.get_submodule(owner))
        if adapted and kind == "weight":
            continue  # judged with its adapter
        if not owner or adapted:
            raise BadInput(
                f"'{name}' is trained, and PEFT's files cannot hold it beside the adapter: freeze it, or fold."
            )
        _refuse_adapters_inside(model, name)
        names.append(owner)
    for name in moved_buffers(model):
        owner = name.rpartition(".")[0]
        if not owner:
            raise BadInput(
                f"'{name}' changed in training, and PEFT's files cannot hold it: fold the model and save it."
            )
        if owner not in names:
            _refuse_adapters_inside(model, name)
            names.append(owner)
    return names


def _refuse_adapters_inside(model: nn.Module, name: str) -> None:
    """Refuse a tensor that changed whose module would come along whole, and with it adapted layers inside."""
    owner = name.rpartition(".")[0]
    inside = next((part for part, m in model.get_submodule(owner).named_modules(prefix=owner) if stack(m)), None)
    if inside is not None:
        raise BadInput(
            f"'{name}' was trained, and PEFT's files hold a '{owner}' only whole, not beside the adapter of '{inside}' "
            "in it: freeze the one, leave the other out of where, or fold the model and save it."
        )


def changed_beside(model: nn.Module, base: nn.Module, cut: bool = True) -> list[str]:
    """Return the smallest layers which hold something that the base has not, other than linear maps whose update is
    of low rank: not those that are new, nor, unless it is to be cut off, those that were trained whole beside adapters.
    """
    before, names = dict(_tensors(base)), []
    beside = [] if cut else _trained_whole(model, base)
    for name, tensor in _tensors(model):
        owner = name.rpartition(".")[0]
        linear = is_linear_map(model.get_submodule(owner)) and not is_fresh(model, name) and owner not in beside
        if owner in names or linear:
            continue
        if name not in before or before[name].shape != tensor.shape:
            raise BadInput(f"the base is another model: {type(base).__name__} has no such '{name}'.")
        if _alike(before[name], tensor):
            continue
        if not owner:
            raise BadInput(f"'{name}' was trained, and PEFT's files cannot hold it: fold the model and save it.")
        _refuse_adapters_inside(model, name)
        names.append(owner)
    return names


def _trained_whole(model: nn.Module, base: nn.Module) -> list[str]:
    """Return the linear maps without adapters whose weights were trained, where other layers have adapters; not those
    that were others before, as where an adapter was folded into them.
    """
    before, same = dict(base.named_modules()), compared(origin_of(model), origin_of(base))
    layers = [(name, layer) for name, layer in model.named_modules() if is_linear_map(layer)]

    def trained(name: str, layer: nn.Module) -> bool:
        if own_weight(layer).requires_grad:
            return True
        under = before.get(name, layer)
        return is_linear_map(under) and same.get(f"{name}.weight", True) and _moved_weight(layer, under, set())

    whole = [name for name, layer in layers if not stack(layer) and trained(name, layer)]
    return whole if any(stack(layer) for _, layer in layers) else []


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if ".plait." not in f".{name}":
            yield name, tensor.detach()
