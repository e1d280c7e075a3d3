"""Adapter folders that are damaged, each in one way: one sentence says which file, and what of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait import LoRA
from plait.adapters import Adapters
from plait.errors import BadInput
from plait.integrations.peft import load_adapter, save_adapter

KEY = "base_model.model.0.lora_A.weight"


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = base()
    LoRA(rank=2).parametrize(model)
    nn.init.ones_(model[0].plait.lora.B)
    save_adapter(model, tmp_path)
    return tmp_path


def config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(make: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(make(load_file(path)), path)

    return change


def text(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (text("adapter_config.json", b"[]"), "adapter_config.json is damaged: it must hold a mapping, not []."),
        (text("adapter_config.json", b"\xff{}"), "adapter_config.json is truncated or damaged ("),
        (config(lora_alpha=None), "lora_alpha of '0' is None in adapter_config.json: it must be a number."),
        (config(lora_alpha="16"), "lora_alpha of '0' is '16' in adapter_config.json: it must be a number."),
        (config(alpha_pattern={"(": 3}), "alpha_pattern in adapter_config.json is damaged ("),
        (config(alpha_pattern=[3]), "alpha_pattern in adapter_config.json is damaged ("),
        (tensors(lambda held: {key: t[:0] if "A" in key else t[:, :0] for key, t in held.items()}), "another model"),
        (tensors(lambda held: held | {KEY: held[KEY].flatten().clone()}), "another model"),
        (tensors(lambda held: {k: t * torch.nan for k, t in held.items()}), "holds numbers that are not finite, in"),
        (tensors(lambda held: {}), "holds no adapter: its adapter_model.safetensors is empty."),
        (text("plait_base.json", b'{"base": {"0.weight": 3}}'), "its 'base' must be a mapping of names to digests."),
        (text("plait_base.json", b'{"base": [1]}'), "its 'base' must be a mapping of names to digests."),
        (text("plait_base.json", b"\xff"), "plait_base.json is truncated or damaged ("),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    load_adapter(base(), folder)
    damage(folder)
    for read in (lambda: load_adapter(base(), folder), lambda: Adapters(base()).add("a", folder)):
        with pytest.raises(BadInput) as caught:
            read()
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_adapter_is_not_loaded_onto_another(folder: Path) -> None:
    model = load_adapter(base(), folder)
    with pytest.raises(BadInput, match="'0' has an adapter already: fold the model first, or keep several with plait"):
        load_adapter(model, folder)
