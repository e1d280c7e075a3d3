"""Two learning rates for the two factors of a low-rank adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Positive
from plait.layers import matches
from plait.method import Ask, Method, Now, method
from plait.parametrize.base import Parametrize, attached
from plait.parametrize.low_rank import LowRank


@paper("hayou2024loraplus", key="lora-plus", kind="ground")
@method
class LoRAPlus(Method):
    """A <- A - lr * step_A,  B <- B - ratio * lr * step_B: the factor that starts at zero is stepped further.

    Hayou et al. show that for wide layers no common rate lets both factors learn; they advise a ratio of 2^4. Whatever
    the optimizer, the step that it took on B is multiplied by `ratio`, which for rates that multiply the step (all of
    plait's and torch's) is a rate of its own, weight decay included. Clipping sees the gradient, not the step.

    ratio: greater than 0; 1 changes nothing and is refused. where: names of the adapted layers. Raises BadInput where
    no LoRA adapter that matches is trained.

    >>> from plait import LoRA, SGD, train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 4), (x, x[:, :4]), methods=[LoRA(rank=2), LoRAPlus(ratio=4.0), SGD(lr=0.1)], steps=2)
    >>> bool(run.model.plait.lora.B.abs().max() > 0)
    True
    """

    ratio: Positive = 16.0

    idle: ClassVar[dict[str, float]] = {"ratio": 1}

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a recipe without low-rank adapters."""
        if not any(isinstance(m, Parametrize) for m in methods) and not list(self._factors(model)):
            raise BadInput("LoRAPlus steps the factors of LoRA adapters, but the model has none: add LoRA before it.")

    def _factors(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        for number, (name, _, adapter) in enumerate(attached(model, LowRank)):
            if matches(self.where, name):
                yield str(number), adapter.B

    def gradient(self, ask: Ask) -> Ask:
        """Take note of B before the step; one call."""

        def asked(model: nn.Module, now: Now) -> Tensor:
            value = ask(model, now)
            plain = model if now.model is None else now.model
            factors = list(self._factors(plain))
            if not any(factor.requires_grad for _, factor in factors):
                raise BadInput(
                    f"LoRAPlus(where={self.where!r}) finds no LoRA adapter that is trained: add LoRA, or change where."
                )
            for number, factor in factors:
                if factor.requires_grad and number not in now.of(self):  # a method around this may ask again elsewhere
                    now.of(self)[number] = factor.detach().clone()
            return value

        return asked

    @torch.no_grad()
    def constrain(self, model: nn.Module, now: Now) -> None:
        """Lengthen the step that was just taken on B."""
        state = now.of(self)
        for number, factor in self._factors(model):
            before = state.pop(number, None)
            if before is not None:
                factor.copy_(before + self.ratio * (factor - before))
