"""Soft prompts that small networks write anew for each text, from the instruction that it begins with: IAPT."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.method import Method, method
from plait.parametrize.low_rank import adapter_dtype
from plait.parametrize.prompt import PromptMethod, SoftPrompt, SoftPrompts, attached_to, layers_of

GELU = ((-0.00485, 0.5, 0.425497, 0.135557, 0.0203113, 0.00143717, 3.85389e-5), (0.0, 0.271084, 0.0, 0.00287343, 0.0))
"""Coefficients of a rational function of degrees 6 and 5 that is GELU to 5e-3 on [-10, 10]; fitted by least squares."""


class Rational(nn.Module):
    """R(x) = (a_0 + a_1 x + ... + a_6 x^6) / (1 + |b_1 x + ... + b_5 x^5|), a and b trained; GELU at the start.

    >>> x = torch.linspace(-4, 4, 9)
    >>> bool((Rational()(x) - nn.functional.gelu(x)).abs().max() < 5e-3)
    True
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(given, dtype=dtype)) for given in GELU)

    def forward(self, x: Tensor) -> Tensor:
        """Return R(x), entry by entry."""
        above = torch.zeros_like(x)
        for coefficient in self.a.flip(0):
            above = above * x + coefficient
        below = torch.zeros_like(x)
        for coefficient in self.b.flip(0):
            below = (below + coefficient) * x
        return above / (1 + below.abs())


class Generator(nn.Module):
    """H [n, T, d] -> P [n, length, d]: U = H down, S = softmax over the T of (U pool)^T U, P = R(S) up + bias."""

    def __init__(self, size: int, width: int, length: int, like: Tensor) -> None:
        super().__init__()
        kind, deviation = adapter_dtype(like), float(like.float().std())
        self.down = nn.Parameter(torch.randn(size, width, dtype=kind) / math.sqrt(size))
        self.pool = nn.Parameter(torch.randn(width, length, dtype=kind) / math.sqrt(width))
        self.up = nn.Parameter(torch.randn(width, size, dtype=kind) * deviation / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(size, dtype=kind))
        self.activation = Rational(kind)

    def forward(self, hidden: Tensor, instruction: Tensor) -> Tensor:
        """Return P from the places of the hidden states where `instruction` [n, T] is true."""
        narrow = hidden.to(self.down.dtype) @ self.down
        scores = (narrow @ self.pool).masked_fill(~instruction.unsqueeze(-1), -math.inf)
        pooled = scores.softmax(1).transpose(1, 2) @ narrow
        made: Tensor = self.activation(pooled) @ self.up + self.bias
        return made.to(hidden.dtype)


class Written(SoftPrompt):
    """Vectors before the tokens, written anew before each layer from the instruction's hidden states there."""

    def __init__(self, generators: list[Generator], length: int, until: tuple[int, ...]) -> None:
        super().__init__()
        self.generators, self.length, self.until = nn.ModuleList(generators), length, until
        self.instruction: Tensor | None = None

    def write(self, number: int, hidden: Tensor) -> Tensor:
        """Return the vectors before a layer from the tokens' hidden states there, [n, T, d]; the last forgets what the
        instruction is.
        """
        made: Tensor = self.generators.get_submodule(str(number))(hidden, self.instruction)
        if number == len(self.generators) - 1:
            self.instruction = None
        return made

    def vectors(self, embedded: Tensor, mask: Tensor, ids: Tensor | None) -> Tensor:
        """Return those before the first layer, [n, length, d]."""
        self.instruction = mask.bool() & self._before_the_end(ids, mask)
        return self.write(0, embedded)

    def _before_the_end(self, ids: Tensor | None, mask: Tensor) -> Tensor:
        """Return which tokens belong to the instruction, [n, T]: all up to the first mark of its end."""
        if not self.until:
            return torch.ones_like(mask, dtype=torch.bool)
        if ids is None:
            raise BadInput("IAPT looks for the end of the instruction among the tokens: give input_ids.")
        mark, width = torch.tensor(self.until, device=ids.device), len(self.until)
        found = (
            (ids.unfold(1, width, 1) == mark).all(-1) if ids.shape[1] >= width else ids.new_zeros(len(ids), 1).bool()
        )
        if not bool(found.any(1).all()):
            raise BadInput(
                f"a text has no mark {list(self.until)} of where its instruction ends: give IAPT.until the tokens that "
                "every text has there."
            )
        last = found.int().argmax(1) + width - 1
        return torch.arange(ids.shape[1], device=ids.device) <= last.unsqueeze(1)


def _renew(held: SoftPrompts, prompt: Written, number: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """Write the prompt anew in the hidden states that a layer reads."""
    if held.added == 0 or prompt.instruction is None:
        return None
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    made, start = prompt.write(number, hidden[:, held.added :]), held.before(prompt)
    hidden = torch.cat([hidden[:, :start], made, hidden[:, start + prompt.length :]], 1)
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def generates(model: nn.Module) -> bool:
    """Say whether a model of transformers is a language model that goes on with a text."""
    return any(getattr(part, "can_generate", bool)() for part in model.modules())


@paper("zhu2024iapt", key="iapt")
@method
class IAPT(PromptMethod):
    """[P_l; H_l] before every layer l, P_l = R_l(softmax(U_l Q_l)^T U_l) W_l + c_l with U_l = H_l D_l at the places of
    the instruction: `tokens` soft tokens that a generator of each layer writes for each text. D [d, width],
    Q [width, tokens], W [width, d], c [d] and the coefficients of the rational function R of each layer are trained.

    The prompt of one layer takes the place of that of the layer before. R begins as GELU. The instruction is the whole
    text, or its beginning up to the first mark `until` and with it (the tokens of the chat template before an answer),
    which language models need: places in the instruction see all of it, so that targets there must not count. In
    generation the prompt is written once, when the text is first read. The paper's text could not be read: the parts
    are those of its abstract, their order and sizes are chosen here.

    tokens: soft tokens. width: of the bottleneck. until: tokens, one after the other, that every text has. Raises
    BadInput for models that are no encoder or decoder of transformers, for a language model without `until`, and for a
    text that lacks it.

    >>> from plait.models.small import llama_tiny
    >>> model = llama_tiny(outputs=2)
    >>> IAPT(width=8).parametrize(model)
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    2264
    >>> model(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 2])
    """

    tokens: Count = 4
    width: Count = 32
    until: tuple[int, ...] = ()

    def build(self, backbone: Any) -> Written:
        """Return a generator for each layer."""
        table: Tensor = backbone.get_input_embeddings().weight
        made = [Generator(table.shape[1], self.width, self.tokens, table) for _ in layers_of(backbone)]
        return Written(made, self.tokens, self.until)

    def attach(self, backbone: Any, prompt: SoftPrompt) -> None:
        """Put the generators before the layers."""
        super().attach(backbone, prompt)
        assert isinstance(prompt, Written)
        for number, layer in enumerate(layers_of(backbone)):
            if number > 0:
                hook = partial(_renew, attached_to(backbone), prompt, number)
                layer.register_forward_pre_hook(hook, with_kwargs=True)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a language model without a mark of where the instruction ends: it would see what it should predict."""
        super().check(model, methods)
        if generates(model) and not self.until:
            raise BadInput(
                "IAPT would show a language model the words that it should predict: give until, the tokens with which "
                "every instruction ends."
            )
