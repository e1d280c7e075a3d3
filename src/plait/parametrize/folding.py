"""Folding: what adapters make of the weights they stand on is written into them, and a plain model is left."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.layers import own_bias, own_weight
from plait.math.packed import Packed, numbers, quantized_elsewhere, release, unpack
from plait.parametrize.bank import settle_copies
from plait.parametrize.base import dense_bias, dense_weight, detach, refuse_made, stack
from plait.parametrize.lean import restore
from plait.parametrize.prompt import refuse_prompts


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Write each layer's dense weight into its own weight and remove all stacks: a plain model comes out.

    A weight that several layers share is untied where it is folded: each of them gets its own, and a transformers
    model's `config.tie_word_embeddings` becomes False, so that saving and loading keep both. Quantized weights become
    floating-point ones: what the adapters make of the numbers that the codes stand for. Where a model also reads an
    adapted weight without calling its layer (`F.linear(x, embedding.weight)`), it finds the folded one there, and its
    outputs are others.
    """
    uses: dict[int, int] = {}
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    refuse_prompts(model, "folded")
    for name, layer in model.named_modules():
        if bent := [part.made_by for part in stack(layer) if not part.linear]:
            raise BadInput(f"{bent[0]} acts on what '{name}' puts out, which no weight can hold: leave out folding.")
        if stack(layer):
            refuse_made(f"the weight of '{name}'", layer)
    settle_copies(model)
    untied = False
    for layer in list(model.modules()):
        if not stack(layer):
            continue
        weight = own_weight(layer)
        folded = numbers(dense_weight(layer)).to(weight.dtype).contiguous()
        _fold_bias(layer, uses)
        shared = uses[id(weight)] > 1
        if shared or isinstance(weight, Packed) or quantized_elsewhere(weight):
            uses[id(weight)] -= 1
            release(layer, nn.Parameter(folded, requires_grad=weight.requires_grad))
            untied = untied or shared
        else:
            weight.copy_(folded)
        detach(layer)
    if untied:
        say_untied(model)
    restore(model)
    return unpack(model)


def _fold_bias(layer: nn.Module, uses: dict[int, int]) -> None:
    """Write what adapters make of a layer's bias into it, or into one of its own where layers share it."""
    made, bias = dense_bias(layer), own_bias(layer)
    if made is None or not isinstance(bias, Tensor) or torch.equal(made, bias):
        return
    if uses[id(bias)] > 1:
        uses[id(bias)] -= 1
        layer.bias = nn.Parameter(made.clone(), requires_grad=bias.requires_grad)
    else:
        bias.copy_(made)


def say_untied(model: nn.Module) -> None:
    """Tell a transformers model that its input and output embeddings are no longer one tensor."""
    for part in model.modules():
        config = getattr(part, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]
        if getattr(part, "all_tied_weights_keys", None):
            part.all_tied_weights_keys = {}  # type: ignore[assignment]
