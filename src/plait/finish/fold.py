"""Folding: adapters are written into the weights they stand on, and a plain model is left."""

from __future__ import annotations

from torch import nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.method import Method, Now, method
from plait.parametrize.base import Parametrize, stack
from plait.parametrize.folding import fold


@paper("hu2022lora", key="fold", kind="ground")
@method
class Fold(Method):
    """W <- dense(W): each layer's weight becomes what its adapters make of it, and the adapters are removed.

    The folded model gives the same output as the adapted one, to rounding (relative 1e-5 in float32), and costs what
    the model cost before it was adapted. Raises BadInput where there is no adapter, beside soft prompts, and for
    adapters that no weight can hold, as Compacter's.

    >>> from plait.parametrize.low_rank import LoRA
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> LoRA(rank=2).parametrize(model)
    >>> sorted(Fold().finish(model, Now()).state_dict())
    ['0.bias', '0.weight']
    """

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a recipe in which nothing adds what there is to fold."""
        if not any(isinstance(m, Parametrize) for m in methods) and not any(stack(layer) for layer in model.modules()):
            raise BadInput("Fold finds no adapter to fold: add one such as LoRA, or drop Fold.")

    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Return the plain model."""
        return fold(model)
