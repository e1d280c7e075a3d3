"""Text classification: a text in, a class out; loss, accuracy, macro F1 and calibration error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait.errors import BadInput
from plait.models.pretrained import load_tokenizer, load_transformers
from plait.models.small import byte_tokenizer, llama_tiny
from plait.parametrize.freeze import mark_fresh
from plait.tasks.base import Options, Task
from plait.tasks.classes import classification, labelled, name_classes
from plait.tasks.reading import texts
from plait.tasks.sets import Texts

OTHER_KINDS = ("mlp", "cnn", "vit", "efficientnet-lite0")


def tokenizer_of(options: Options) -> Any:
    """Return the tokenizer that was given, or the model's own."""
    if options.tokenizer is not None:
        given = options.tokenizer
        tokenizer = load_tokenizer(given) if isinstance(given, str | Path) else given
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    if isinstance(options.model, nn.Module):
        raise BadInput(f"a {type(options.model).__name__} given as a module needs its tokenizer: give tokenizer=.")
    if str(options.model) in OTHER_KINDS:
        raise BadInput(f"the model '{options.model}' does not read text: use minilm, smollm2-135m or llama-tiny.")
    return byte_tokenizer() if str(options.model) == "llama-tiny" else load_tokenizer(options.model)


def _model(options: Options, tokenizer: Any, classes: list[str]) -> nn.Module:
    if isinstance(options.model, nn.Module):
        return options.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if str(options.model) == "llama-tiny":
            model = mark_fresh(llama_tiny(len(tokenizer), outputs=len(classes)), "score")
        else:
            model = load_transformers(options.model, options.task, outputs=len(classes))
    config = name_classes(model, classes)
    config.pad_token_id = tokenizer.pad_token_id
    return model


def require_length(model: nn.Module, length: int) -> None:
    """Raise BadInput when a model has fewer positions than the texts have tokens."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise BadInput(f"length must be at most {most}, the positions that {type(model).__name__} has, not {length}.")


def build(options: Options) -> Task:
    """Return the task: the model with a fresh head of as many classes as the training labels show."""
    parts, classes, coded = labelled(options)
    tokenizer, cut, sets = tokenizer_of(options), 0, {}
    for part, table in parts.items():
        tokens = tokenizer(texts(table, options.text, "text"), truncation=True, max_length=options.length)["input_ids"]
        rows = [torch.tensor(row or [tokenizer.pad_token_id]) for row in tokens]
        cut += sum(len(row) == options.length for row in tokens)
        sets[part] = Texts(rows, torch.tensor(coded[part]), tokenizer.pad_token_id)
    model = _model(options, tokenizer, classes)
    require_length(model, options.length)
    notes = [f"{cut} texts reach the limit of {options.length} tokens and may be cut"] if cut else []

    def save(folder: str | Path) -> None:
        tokenizer.save_pretrained(folder)

    return classification(options, model, sets, classes, save, tokenizer=tokenizer, notes=tuple(notes))
