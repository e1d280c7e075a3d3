"""Masks of attention, drawn in training."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import ScheduledProbability
from plait.forward.base import Forward
from plait.layers import layers
from plait.method import Method, Now, method


def is_attention(layer: nn.Module) -> bool:
    """Say whether a layer is an innermost attention of transformers: it is called with an `attention_mask`."""

    def takes_mask(module: nn.Module) -> bool:
        named = "Attention" in type(module).__name__
        return named and "attention_mask" in inspect.signature(type(module).forward).parameters

    return takes_mask(layer) and not any(takes_mask(m) for m in layer.modules() if m is not layer)


def token_mask(allowed: Tensor, chosen: Tensor, alone: Tensor) -> Tensor:
    """Return who may attend to whom, [n, 1, T, T], once some tokens are masked.

    allowed: [n, 1, T, T], what the model allows. chosen: [n, T], the masked tokens; alone: [n, T], those of them that
    see only themselves (siblings-masking), while the other masked ones see all but themselves (self-masking). Tokens
    that are not chosen see no chosen one. A row that would see nothing sees itself; one that saw nothing before stays.

    >>> all_of = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    >>> token_mask(all_of, torch.tensor([[True, False, False]]), torch.tensor([[True, True, True]]))[0, 0].int()
    tensor([[1, 0, 0],
            [0, 1, 1],
            [0, 1, 1]], dtype=torch.int32)
    """
    itself = torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
    rows, columns = chosen[:, None, :, None], chosen[:, None, None, :]
    seen = torch.where(rows, torch.where(alone[:, None, :, None], itself, ~itself), ~columns) & allowed
    nothing = ~seen.any(-1, keepdim=True) & allowed.any(-1, keepdim=True)
    return torch.where(nothing, itself & allowed | (allowed & ~(itself & allowed).any(-1, keepdim=True)), seen)


@paper("wu2023tlm", key="tlm")
@method
class TLM(Forward):
    """softmax(Q K^T / sqrt(d) + log M) V with a mask M drawn per example and layer: each token is chosen with the
    probability `rate`; siblings-masking lets a chosen token attend to itself alone, self-masking to all but itself; the
    others attend to no chosen token.

    "both" draws one of the two for each chosen token, as the authors' code does. That code lets a self-masked token
    attend to padding; here what the model itself forbids (padding, the future) stays forbidden. Acts in training only;
    encoders and decoders of transformers with "eager" or "sdpa" attention. Cost: one mask [n, 1, T, T] per layer.

    rate: in [0, 1), or a schedule; 0 is the plain model. where: the attention layers. Raises BadInput where no
    attention of transformers matches, where it is neither "eager" nor "sdpa", and in a run
    for a rate that stays 0.

    >>> TLM(rate=0.2, strategy="self")
    TLM(rate=0.2, strategy='self')
    """

    rate: ScheduledProbability = 0.1
    strategy: Literal["siblings", "self", "both"] = "both"

    idle: ClassVar[dict[str, float]] = {"rate": 0}

    def draw(self, shape: tuple[int, int], rate: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return which tokens [n, T] are chosen, and which of them see only themselves."""
        chosen = torch.rand(shape, device=device) < rate
        if self.strategy == "both":
            return chosen, torch.rand(shape, device=device) < 0.5
        return chosen, torch.full(shape, self.strategy == "siblings", device=device)

    def forward(self, model: nn.Module, now: Now) -> None:
        """Attach a hook to each attention that replaces its mask."""
        for _, layer in self.targets(model):
            self.attach(layer, now)

    def attach(self, layer: nn.Module, now: Now) -> None:
        """Replace the mask of one attention at each training pass."""
        names = list(inspect.signature(type(layer).forward).parameters)[1:]

        def masked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            rate = now.at(self.rate)
            given = dict(zip(names, args, strict=False)) | kwargs
            crossing = given.get("encoder_hidden_states", given.get("key_value_states")) is not None
            if rate == 0 or crossing or not self.active(module, now):
                return None
            hidden = given["hidden_states"]
            allowed = allowed_of(module, given.get("attention_mask"), hidden)
            if allowed.shape[-1] != hidden.shape[1]:
                return None
            seen = token_mask(allowed, *self.draw(tuple(hidden.shape[:2]), rate, hidden.device))
            mask = seen if implementation(module) == "sdpa" else additive(seen, hidden.dtype)
            position = names.index("attention_mask")
            if position < len(args):
                return (*args[:position], mask, *args[position + 1 :]), kwargs
            return args, {**kwargs, "attention_mask": mask}

        layer.register_forward_pre_hook(masked, with_kwargs=True)

    def targets(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the attention layers, or say why there are none."""
        found = list(layers(model, self.where, is_attention))
        if not found:
            raise BadInput(f"TLM(where={self.where!r}) matches no attention of transformers: drop it, or where.")
        return found

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse models without attention, or with one that takes no mask of pairs."""
        for _, layer in self.targets(model):
            if implementation(layer) not in ("eager", "sdpa"):
                raise BadInput(
                    "TLM needs a mask for each pair of tokens: load the model with attn_implementation='sdpa'."
                )


def implementation(layer: nn.Module) -> str:
    """Return how the layer computes attention."""
    return str(getattr(getattr(layer, "config", None), "_attn_implementation", "eager"))


def allowed_of(layer: nn.Module, mask: Tensor | None, hidden: Tensor) -> Tensor:
    """Return a layer's mask, in whatever form it came, as booleans [n, 1, T, T]."""
    count, length = hidden.shape[:2]
    if mask is None:
        full = torch.ones(length, length, dtype=torch.bool, device=hidden.device)
        return (full.tril() if getattr(layer, "is_causal", False) else full).expand(count, 1, length, length)
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.expand(count, *allowed.shape[1:-2], length, allowed.shape[-1])


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where seen and the dtype's lowest number elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)
