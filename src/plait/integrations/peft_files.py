"""The files of PEFT's that hold an adapter: read, and refused where they are damaged or of a kind unknown here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.errors import BadInput
from plait.integrations.peft_prompts import KINDS as SOFT
from plait.parametrize.origin import Origin
from plait.tensors import read_tensors

ORIGIN = "plait_base.json"
"""The file beside PEFT's that holds digests of the base's weights."""
UNSUPPORTED = (
    *("use_qalora", "alora_invocation_tokens", "layer_replication", "target_parameters", "use_bdlora"),
    *(
        "arrow_config",
        "kasa_config",
        "velora_config",
        "monteclora_config",
        "trainable_token_indices",
        "megatron_config",
    ),
)
"""Fields of PEFT's configuration that change what an adapter computes in a way that plain LoRA and DoRA do not."""
STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` under which PEFT leaves the base weights as they are."""


def read_origin(folder: Path) -> Origin:
    """Return the digests of the base that an adapter was made for; empty where peft wrote the files."""
    path = folder / ORIGIN
    if not path.exists():
        return {}  # peft notes no more of the base than its name
    try:
        origin: Origin = json.loads(path.read_text())["base"]
    except (ValueError, KeyError, TypeError) as problem:
        raise BadInput(f"{path} is truncated or damaged ({problem}).") from None
    if not isinstance(origin, dict) or not all(isinstance(value, str) for value in origin.values()):
        raise BadInput(f"{path} is damaged: its 'base' must be a mapping of names to digests.")
    return origin


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of an adapter's folder."""
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not path.exists():
        raise BadInput(f"{folder} has no adapter_config.json: give the folder that PEFT's save_pretrained wrote.")
    if not weights.exists():
        raise BadInput(f"{folder} has no adapter_model.safetensors: save the adapter with safetensors.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise BadInput(f"{path} is truncated or damaged ({problem}).") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path} is damaged: it must hold a mapping, not {config!r}.")
    kind = config.get("peft_type")
    if kind != "LORA" and kind not in SOFT:
        raise BadInput(
            f"{path} holds a {kind} adapter; only LORA (with or without DoRA), PROMPT_TUNING and PREFIX_TUNING can be "
            "loaded."
        )
    for name in UNSUPPORTED:
        if config.get(name):
            raise BadInput(f"{path} uses {name}, which plait's LoRA does not have: merge the adapter with peft first.")
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise BadInput(
            f"{path} has init_lora_weights {start!r}, which changed the base weights: save it again with peft's "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA."
        )
    tensors = read_tensors(weights)
    odd = next((name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())), None)
    if odd is not None:
        raise BadInput(f"{weights} holds numbers that are not finite, in '{odd}': save the adapter of a sound run.")
    return config, tensors
