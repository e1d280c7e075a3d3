"""PEFT's files of soft prompts: prompt tuning and prefix tuning, written and read; `plait.integrations.peft` calls it.

PEFT keeps what training left: the vectors before the tokens, [tokens, d], or the keys and values of all layers,
[tokens, layers * 2 * heads * d_head], whether or not a perceptron made them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.parametrize.base import stack
from plait.parametrize.folding import say_untied
from plait.parametrize.freeze import freeze, mark_fresh
from plait.parametrize.lean import spare
from plait.parametrize.prefix import Prefix, keys_values_of
from plait.parametrize.prompt import SoftPrompt, SoftPrompts, Vectors, attach, backbone_of, soft_prompts
from plait.tensors import write_tensors

PREFIX = "base_model."
KINDS = {"PROMPT_TUNING": Vectors, "PREFIX_TUNING": Prefix}
HEADS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


def save_prompt(model: nn.Module, folder: Path, base_model: str | None, beside: list[str]) -> Path:
    """Write the soft prompts of a model and the layers trained `beside` them; BadInput for what PEFT cannot hold."""
    held: SoftPrompts = next(soft_prompts(model))
    prompts = held.prompts()
    kind = next((name for name, made in KINDS.items() if all(type(prompt) is made for prompt in prompts)), None)
    if kind is None or any(stack(layer) for layer in model.modules()):
        raise BadInput(
            "PEFT's files hold one prompt or one prefix and nothing but layers trained whole beside it: save the "
            "model's state_dict."
        )
    made = [prompt.flat() for prompt in prompts if isinstance(prompt, Vectors | Prefix)]
    tensors = {"prompt_embeddings": torch.cat([part.detach() for part in made])}
    for name in beside:
        whole = model.get_submodule(name).state_dict()
        tensors |= {f"{PREFIX}{name}.{key}": t for key, t in whole.items()}
    backbone = backbone_of(kind, model)
    heads = backbone.config.num_attention_heads
    width = backbone.get_input_embeddings().weight.shape[1]
    if isinstance(prompts[0], Prefix):
        heads, width = prompts[0].heads, prompts[0].heads * prompts[0].size
    own = getattr(getattr(model, "config", None), "_name_or_path", None)
    config = {
        "peft_type": kind,
        "task_type": next((t for end, t in HEADS.items() if type(model).__name__.endswith(end)), "FEATURE_EXTRACTION"),
        "base_model_name_or_path": base_model or own or None,
        "inference_mode": True,
        "num_virtual_tokens": held.length,
        "token_dim": width,
        "num_attention_heads": heads,
        "num_layers": backbone.config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "modules_to_save": beside or None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder


def whole_layers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that a file of a soft prompt holds of layers trained whole, by name."""
    return {key.removeprefix(PREFIX): t for key, t in tensors.items() if key != "prompt_embeddings"}


def untie_from_others(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Give a layer that a file holds whole a weight of its own where others share it that the file does not change
    alike, as peft does.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    shared = [names for names in users.values() if len(names) > 1]
    for names in shared:
        held = [name for name in names if name in whole]
        if not held or (len(held) == len(names) and all(torch.equal(whole[held[0]], whole[name]) for name in held)):
            continue
        for name in held:
            owner, _, leaf = name.rpartition(".")
            parameter = model.get_parameter(name)
            made = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(owner), leaf, made)
        say_untied(model)


def load_prompt(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    """Put a soft prompt of PEFT's files before what a model reads, freeze the rest, and return the model."""
    kind = config["peft_type"]
    backbone, made = backbone_of(kind, model), tensors.get("prompt_embeddings")
    if made is None or made.dim() != 2:
        raise BadInput(f"{folder} holds no 'prompt_embeddings': the file is incomplete.")
    width = backbone.get_input_embeddings().weight.shape[1]
    if kind == "PREFIX_TUNING":
        ids = torch.zeros(len(made), dtype=torch.long, device=backbone.get_input_embeddings().weight.device)
        like = keys_values_of(kind, backbone, ids)
        width = like[:, :, :, 0].numel()
    if made.shape[1] != width:
        raise BadInput(
            f"{folder} is a soft prompt of another model: it has {made.shape[1]} numbers a place, "
            f"{type(model).__name__} takes {width}."
        )
    prompt: SoftPrompt = Prefix(like, 0) if kind == "PREFIX_TUNING" else Vectors(made)
    with torch.no_grad():
        prompt.get_parameter("P").copy_(made)
    freeze(model)
    spare(model)
    attach(backbone, "prefixtuning" if kind == "PREFIX_TUNING" else "prompttuning", prompt)
    whole = whole_layers(tensors)
    untie_from_others(model, whole)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in whole.items():
            own[name].copy_(tensor)
    mark_fresh(model, *dict.fromkeys(name.rpartition(".")[0] for name in whole))
    for name, parameter in model.named_parameters():
        if name in whole:
            parameter.requires_grad_(True)
    return model
