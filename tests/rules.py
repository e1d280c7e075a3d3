"""The rules of the catalogue, and how each is tried: a new rule needs no line here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from plait import catalogue
from plait.step.base import Rule, RuleOptimizer

RULES: dict[str, type[Rule]] = {
    key: entry.make
    for key, entry in catalogue.load().items()
    if isinstance(entry.make, type) and issubclass(entry.make, Rule)
}

SMALL = {"rank": 2, "period": 3, "layers": 1}
"""Fields that a rule gets, if it has them, so that it acts on small weights within a few steps."""

SHAPES = {"large": (18, 300), "matrix": (8, 6), "row": (1, 9), "vector": (9,), "scalar": (), "kernel": (3, 2, 3, 3)}


class Weights(nn.Module):
    """Weights of every shape, and layers that repeat."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 8) for _ in range(3)])
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw))
        self.to(dtype)

    def loss(self) -> Tensor:
        """A smooth loss that every weight enters."""
        return sum((torch.cos(p).sum() + 0.1 * p.square().sum() for p in self.parameters()), torch.zeros(()))


def given(kind: type[Rule], **more: Any) -> dict[str, Any]:
    """The fields that a rule is tried with: of `more` those that it has, and as many betas as it has."""
    known = {f.name: f.default for f in fields(kind)}
    found = {name: value for name, value in {**SMALL, **more}.items() if name in known}
    return found | ({"betas": found["betas"][: len(known["betas"])]} if "betas" in found else {})


def made(key: str, model: nn.Module, **more: Any) -> RuleOptimizer:
    """The rule's optimizer over a model's named weights."""
    kind = RULES[key]
    return kind(list(model.named_parameters()), **given(kind, **more))


def gradients(model: nn.Module, draw: torch.Generator) -> None:
    """Draw a gradient for every weight that asks for one."""
    for p in model.parameters():
        drawn = torch.randn(p.shape, generator=draw).to(p.dtype)
        p.grad = drawn if p.requires_grad else None


def stepped(
    key: str, *, steps: int = 5, dtype: torch.dtype = torch.float32, fused: bool = True, **more: Any
) -> Weights:
    """Fresh weights after some steps along drawn gradients."""
    torch.manual_seed(0)  # for rules that draw
    model, draw = Weights(dtype), torch.Generator().manual_seed(1)
    optimizer = made(key, model, **more)
    optimizer.fused = fused
    for _ in range(steps):
        gradients(model, draw)
        optimizer.step()
    assert optimizer.fused == fused
    return model
