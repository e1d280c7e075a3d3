"""PEFT's adapter files: `adapter_config.json` and `adapter_model.safetensors`, written and read.

What is written, the installed peft loads with the same outputs; what peft has written is read the same way: LoRA, its
rank-stabilized scaling and DoRA, on Linear, Conv1D, Embedding and convolutions, with different ranks and scales from
layer to layer, and with whole layers that were trained beside the adapters (`modules_to_save`). peft itself is not
needed. Soft prompts (prompt and prefix tuning) are read and written by `plait.integrations.peft_prompts`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.integrations.peft_files import ORIGIN, read_files, read_origin
from plait.integrations.peft_prompts import KINDS as SOFT
from plait.integrations.peft_prompts import load_prompt, save_prompt, untie_from_others, whole_layers
from plait.layers import (
    CONVOLUTIONS,
    is_linear_map,
    is_transformers_conv1d,
    matrix_shape,
    own_bias,
    own_weight,
    unwrapped,
)
from plait.parametrize.base import Parametrization, attach, stack
from plait.parametrize.freeze import freeze, mark_fresh
from plait.parametrize.lean import spare
from plait.parametrize.low_rank import LowRank, RowNorms, Shift, adapter_dtype
from plait.parametrize.origin import digest, origin_of, record_origin, refuse_another_base
from plait.parametrize.prompt import soft_prompts
from plait.parametrize.update import Factors, Update, moved_weights, trained_beside, update_of
from plait.tensors import write_tensors

PREFIX = "base_model.model."
BASE, BASE_BIAS = ".base_layer.weight", ".base_layer.bias"
"""How the names end of the frozen embeddings, and of the trained biases, that peft writes beside adapters."""
TWICE = re.compile(r"\.(modules_to_save|original_module)\.")
"""In the names of biases that peft's `bias="all"` writes again, of layers that it holds whole under their own names."""


# -- writing -----------------------------------------------------------------------------------------------------------
def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base_model: str | None = None,
    *,
    base: nn.Module | None = None,
    rank: int | None = None,
) -> Path:
    """Write the low-rank adapters of a model, and what else is trained in it, as PEFT's files; return the folder.

    base_model: the name or path of the base model, for the configuration. An adapter whose start took part of the
    weight (PiSSA, SORSA, ...) is written as one of twice the rank for the untouched base. rank: where to cut off
    updates of a higher rank; base: the model before training, where its own weights were trained (`update_of` returns
    how much is lost). Raises BadInput for an adapter that is no low-rank update if no rank is given, and for what
    PEFT's convolutions cannot do (groups, dilation, padding modes).
    """
    model = unwrapped(model)
    if any(True for _ in soft_prompts(model)):
        made = save_prompt(model, Path(folder), base_model, trained_beside(model, moved_weights(model)))
        (made / ORIGIN).write_text(json.dumps({"base": dict(origin_of(model))}, indent=1))
        return made
    return write_update(update_of(model, base, rank), model, folder, base_model)


def write_update(update: Update, model: nn.Module, folder: str | Path, base_model: str | None = None) -> Path:
    """Write what training did to a model, or to its base, as PEFT's files; return the folder."""
    model = unwrapped(model)
    found = {name: _of_some_rank(factors) for name, factors in update.factors.items()}
    if not found:
        raise BadInput(f"{type(model).__name__} has no low-rank adapter to save: add LoRA or DoRA, or save the model.")
    dora = {name for name, factors in found.items() if factors.magnitude is not None}
    shifted = {name for name, factors in found.items() if factors.shift is not None}
    if dora and dora != set(found):
        plain = sorted(set(found) - dora)[0]
        raise BadInput(
            f"PEFT's files hold DoRA on all adapted layers or on none, but '{plain}' has none: fold, or add it."
        )
    if dora and shifted:
        raise BadInput(
            f"PEFT's DoRA cannot hold the trained bias of '{min(shifted)}': give a rank to cut the update off at, "
            "or fold the model and save it."
        )
    tensors: dict[str, Tensor] = {f"{PREFIX}{name}": tensor for name, tensor in update.whole.items()}
    for name, factors in found.items():
        layer = model.get_submodule(name)
        _refuse_what_peft_lacks(name, layer, bool(shifted))
        tensors |= _to_peft(f"{PREFIX}{name}", layer, factors, bool(shifted))
    owners = {name.rpartition(".")[0] for name in update.whole}
    inside = {name for name in owners if any(name.startswith(f"{owner}.") for owner in owners)}
    whole = sorted(owners - inside)  # peft takes all of a module that it is to save
    _refuse_names_peft_misses(model, [*found, *whole])
    config = _config(model, found, whole, base_model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    (folder / ORIGIN).write_text(json.dumps({"base": dict(update.origin)}, indent=1))
    return folder


def _of_some_rank(factors: Factors) -> Factors:
    """Return factors of rank 1 for those of rank 0, which PEFT does not know: only the bias was moved."""
    if factors.rank:
        return factors
    return replace(factors, a=factors.a.new_zeros(1, factors.a.shape[1]), b=factors.b.new_zeros(len(factors.b), 1))


def _refuse_names_peft_misses(model: nn.Module, names: list[str]) -> None:
    """Refuse a layer without a name, and one that stands in several places, in the first of which peft wraps it."""
    places = Counter(id(part) for owner in model.modules() for part in owner._modules.values())
    for name in names:
        if not name:
            raise BadInput(
                f"PEFT adapts layers inside a model, and this {type(model).__name__} is the whole model: put it into "
                "an nn.Sequential before it is adapted, or fold it and save it."
            )
        layer = model.get_submodule(name)
        if places[id(layer)] > 1:
            both = [other for other, part in model.named_modules(remove_duplicate=False) if part is layer]
            raise BadInput(
                f"peft would adapt the one layer '{both[0]}' and '{both[1]}' under its first name alone: give each "
                "name a layer of its own, or fold the model and save it."
            )


def _refuse_what_peft_lacks(name: str, layer: nn.Module, shifted: bool) -> None:
    if isinstance(layer, CONVOLUTIONS) and (
        layer.groups != 1 or layer.padding_mode != "zeros" or any(d != 1 for d in layer.dilation)
    ):
        raise BadInput(
            f"PEFT cannot adapt '{name}', a convolution with groups, dilation or padding mode: fold instead."
        )
    if shifted and isinstance(layer, nn.Embedding):
        raise BadInput(f"PEFT cannot adapt '{name}', an embedding, beside layers whose bias was trained: fold instead.")


def _to_peft(key: str, layer: nn.Module, factors: Factors, shifted: bool) -> dict[str, Tensor]:
    ones = (1,) * len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else ()
    a, b = factors.a, factors.b
    if isinstance(layer, nn.Embedding):
        made = {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
    else:
        shape = (len(a), layer.in_channels, *layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else a.shape
        made = {f"{key}.lora_A.weight": a.reshape(shape), f"{key}.lora_B.weight": b.reshape(*b.shape, *ones)}
        if shifted:
            shift = b.new_zeros(len(b)) if factors.shift is None else factors.shift
            made[f"{key}.lora_B.bias"] = shift / factors.scale  # PEFT scales it with the rest
    if factors.magnitude is not None:
        shape = (1, len(factors.magnitude), *ones) if ones else factors.magnitude.shape
        made[f"{key}.lora_magnitude_vector"] = factors.magnitude.reshape(shape)
    return made


def _whole_number(value: float) -> float | int:
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _config(model: nn.Module, found: dict[str, Factors], whole: list[str], base_model: str | None) -> dict[str, Any]:
    ranks = {name: (factors.rank, factors.scale) for name, factors in found.items()}
    plain = {name: _whole_number(scale * rank) for name, (rank, scale) in ranks.items()}
    rooted = {name: _whole_number(scale * math.sqrt(rank)) for name, (rank, scale) in ranks.items()}
    stabilized = all(isinstance(a, int) for a in rooted.values()) and not all(
        isinstance(a, int) for a in plain.values()
    )
    alphas = rooted if stabilized else plain
    rank = Counter(rank for rank, _ in ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    own = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base_model or own or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(name): r for name, (r, _) in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(name): a for name, a in alphas.items() if a != alpha},
        "use_rslora": stabilized,
        "use_dora": any(factors.magnitude is not None for factors in found.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": any(factors.shift is not None for factors in found.values()),
        "fan_in_fan_out": any(is_transformers_conv1d(model.get_submodule(name)) for name in found),
        "init_lora_weights": True,
        "target_modules": _target_modules(model, set(ranks)),
        "modules_to_save": whole or None,
    }


def _pattern(name: str) -> str:
    return f"^{re.escape(name)}"


def _target_modules(model: nn.Module, names: set[str]) -> list[str] | str:
    """Return the last parts of the names if these mean no other layer, or else one regular expression."""
    ends = {name.rpartition(".")[2] for name in names}
    meant = {name for name, m in model.named_modules() if is_linear_map(m) and name.rpartition(".")[2] in ends}
    others = {n for n, m in model.named_modules() if not is_linear_map(m) and n.rpartition(".")[2] in ends}
    if meant == names and not others:
        return sorted(ends)
    return "|".join(re.escape(name) for name in sorted(names))


# -- reading -----------------------------------------------------------------------------------------------------------
def load_adapter(model: nn.Module, folder: str | Path, *, any_base: bool = False) -> nn.Module:
    """Attach the adapters of PEFT's files to the base model that they were made for; return the model.

    Everything but the adapters and the layers saved whole is frozen, as when they were trained. Raises BadInput, with
    the model as it was, for a kind of adapter that LoRA and DoRA cannot express, a file of another model (names or
    shapes), one of another base (digests of the weights, where plait wrote them) unless any_base, and truncated files.
    Dropout of the adapter's input, if the configuration has it, is not applied.
    """
    given, model = model, unwrapped(model)
    config, tensors = read_files(Path(folder))
    if config["peft_type"] in SOFT:
        whole = whole_layers(tensors)
        _check_whole(model, whole, folder)
        if not any_base:
            refuse_another_base(model, read_origin(Path(folder)), f"the adapter in {folder}", whole)
        record_origin(model)
        load_prompt(model, config, tensors, Path(folder))
        return given
    update = _update_from(model, config, tensors, Path(folder), any_base)
    held = next((name for name in update.factors if stack(model.get_submodule(name))), None)
    if held is not None:
        raise BadInput(
            f"'{held}' has an adapter already: fold the model first, or keep several with plait.adapters.Adapters."
        )
    record_origin(model)
    freeze(model)
    spare(model)
    for name, factors in update.factors.items():
        layer = model.get_submodule(name)
        for title, parametrization in _parametrizations(layer, factors):
            attach(layer, title, parametrization)
    untie_from_others(model, update.whole)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in update.whole.items():
            own[name].copy_(tensor)
    mark_fresh(model, *dict.fromkeys(name.rpartition(".")[0] for name in update.whole))
    for name, parameter in model.named_parameters():
        if name in update.whole:
            parameter.requires_grad_(True)
    return given


def read_update(model: nn.Module, folder: str | Path, *, any_base: bool = False) -> Update:
    """Return what PEFT's files hold for a base model, which stays as it is; raise BadInput as `load_adapter` does."""
    config, tensors = read_files(Path(folder))
    if config["peft_type"] in SOFT:
        raise BadInput(f"{folder} holds a soft prompt, which is no update of weights: load it with load_adapter.")
    return _update_from(unwrapped(model), config, tensors, Path(folder), any_base)


def _update_from(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path, any_base: bool
) -> Update:
    parts, update = dict(model.named_modules()), Update()
    grouped: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, kind = _split(key)
        if TWICE.search(name):
            continue
        if kind is None and name.endswith(BASE):
            _refuse_another_table(model, name.removesuffix(BASE), tensor, folder, any_base)
        elif kind is None and name.endswith(BASE_BIAS):
            biases[name.removesuffix(BASE_BIAS)] = tensor
        elif kind is None:
            update.whole[name] = tensor
        else:
            grouped.setdefault(name, {})[kind] = tensor
    for name, held in grouped.items():
        if name not in parts or not is_linear_map(parts[name]):
            raise BadInput(f"{folder} is an adapter of another model: {type(model).__name__} has no layer '{name}'.")
        update.factors[name] = _from_peft(name, parts[name], held, config)
    for name, bias in biases.items():
        _move_bias(name, parts.get(name), bias, update, folder)
    if not update.factors and not update.whole:
        raise BadInput(f"{folder} holds no adapter: its adapter_model.safetensors is empty.")
    _check_whole(model, update.whole, folder)
    update.origin = read_origin(folder)
    if not any_base:
        refuse_another_base(model, update.origin, f"the adapter in {folder}", update.whole)
    return update


def _move_bias(name: str, layer: nn.Module | None, bias: Tensor, update: Update, folder: Path) -> None:
    """Add to an update that the bias of an adapted layer was trained beside the adapter (peft's `bias="lora_only"`)."""
    own: Tensor | None = getattr(layer, "bias", None)
    if own is None or name not in update.factors or own.shape != bias.shape:
        raise BadInput(
            f"{folder} is an adapter of another model: it was made for a bias {list(bias.shape)} of '{name}'."
        )
    factors = update.factors[name]
    moved = bias.to(own) - own.detach()
    factors.shift = moved if factors.shift is None else factors.shift.to(moved) + moved


def _refuse_another_table(model: nn.Module, name: str, tensor: Tensor, folder: Path, any_base: bool) -> None:
    """Refuse a file whose embedding, which peft writes beside the adapter of one, is not the model's."""
    own = dict(model.named_parameters(remove_duplicate=False)).get(f"{name}.weight")
    if own is None or own.shape != tensor.shape:
        what = "has no such layer" if own is None else f"has {list(own.shape)}"
        raise BadInput(
            f"{folder} is an adapter of another model: it was made for '{name}' of {list(tensor.shape)}, "
            f"{type(model).__name__} {what}."
        )
    if not any_base and (given := digest(tensor)) is not None:
        refuse_another_base(model, {f"{name}.weight": given}, f"the adapter in {folder}")


KINDS = re.compile(r"\.(lora_B\.bias|lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?=(?:\.weight)?$))")


def _split(key: str) -> tuple[str, str | None]:
    """Return (layer, kind of tensor) for a tensor of an adapter, or (parameter, None) for another."""
    name = key.removeprefix(PREFIX)
    found = KINDS.search(name)
    return (name, None) if found is None else (name[: found.start()], found.group(1).replace("embedding_", ""))


def _from_peft(name: str, layer: nn.Module, held: Mapping[str, Tensor], config: dict[str, Any]) -> Factors:
    if "lora_A" not in held or "lora_B" not in held:
        raise BadInput(f"the adapter of '{name}' lacks one of its two factors: the file is incomplete.")
    a, b = (held[side].flatten(1) if held[side].dim() > 1 else held[side].unsqueeze(0) for side in ("lora_A", "lora_B"))
    out, into = matrix_shape(layer)
    if a.shape[1] != into or b.shape[0] != out or a.shape[0] != b.shape[1] or not len(a):
        raise BadInput(
            f"the adapter is of another model: '{name}' has a [{out}, {into}] weight, the adapter's factors are "
            f"{list(b.shape)} and {list(a.shape)}."
        )
    rank = len(a)
    alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise BadInput(f"lora_alpha of '{name}' is {alpha!r} in adapter_config.json: it must be a number.")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    magnitude, bias = held.get("lora_magnitude_vector"), held.get("lora_B.bias")
    bias = bias if bias is not None and bias.any() else None
    if bias is not None and own_bias(layer) is None:
        raise BadInput(f"the adapter moves the bias of '{name}', which has none: merge the adapter with peft first.")
    return Factors(
        a, b, scale, None if magnitude is None else magnitude.flatten(), None if bias is None else scale * bias
    )


def _parametrizations(layer: nn.Module, factors: Factors) -> Iterator[tuple[str, Parametrization]]:
    weight = own_weight(layer)
    shape = (len(factors.b), factors.a.shape[1])
    low = LowRank(torch.empty(shape, dtype=weight.dtype, device="meta"), 1, factors.scale).to(weight.device)
    low.set(factors.a, factors.b)
    yield "lora", low
    if factors.magnitude is not None:
        norms = RowNorms(torch.ones(shape[0], 1, dtype=weight.dtype, device=weight.device))
        with torch.no_grad():
            norms.magnitude.copy_(factors.magnitude)
        yield "magnitude", norms
    if factors.shift is not None:
        yield "shift", Shift(factors.shift.to(adapter_dtype(weight)))


def _by_pattern(patterns: dict[str, Any], name: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that matches a name or its end, as PEFT looks it up."""
    try:
        return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)
    except (re.error, AttributeError) as problem:
        raise BadInput(f"alpha_pattern in adapter_config.json is damaged ({problem}): {patterns!r}.") from None


def _check_whole(model: nn.Module, whole: dict[str, Tensor], folder: str | Path) -> None:
    own = model.state_dict()
    for name, tensor in whole.items():
        if name not in own:
            raise BadInput(f"{folder} holds '{name}', which {type(model).__name__} does not have: load its own model.")
        if own[name].shape != tensor.shape:
            raise BadInput(
                f"{folder} holds '{name}' as {list(tensor.shape)}, but the model's is {list(own[name].shape)}: load "
                "the model that it was made for."
            )
