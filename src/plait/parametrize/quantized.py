"""A frozen base in 8 or 4 bits, on which adapters stand."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Size
from plait.layers import is_transformers_conv1d, own_weight
from plait.math.packed import Packed, forget_originals, hold, pack, packed_weight, page_out
from plait.math.quantization import Form
from plait.method import Method, Now, method
from plait.parametrize.base import Adapter, Parametrize, new_or_at_the_ends
from plait.parametrize.low_rank import LoRA


@paper("dettmers2023qlora", key="quantize", kind="ground")
@method
class Quantize(Parametrize):
    """W -> dequantize(quantize(W)), frozen and kept in codes. int: w = s q (8 bit), w = s (q - z) (4 bit); nf4:
    w = c t[q] with the 16 NormalFloat levels t. s, z and c are shared by `group` consecutive inputs of an output.

    Linear, convolution, Embedding and Conv1D weights hold 8 or about 4.1 (nf4, group 64, `double`) bits a number, and
    read as ordinary tensors: an adapter, a start, a measure sees the numbers that the codes stand for, which are made
    layer by layer when they are needed and again in the backward pass. It stands first in the list, adapters follow.
    `fold` gives floating-point weights: what the adapters make of the dequantized ones, with no further rounding.

    bits: 8 or 4. format: None is "nf4" for 4 bits, "int" for 8. group: None is 64 for 4 bits, whole rows (0) for 8.
    double: whether nf4's scales are rounded to 8 bits too (QLoRA's double quantization; linear codes here, its 8-bit
    floats there). keep: how long the unrounded weights are held: until training begins ("start": LoftQ, PiSSA and other
    starts that rewrite the weight round it once, from there), "always" (Requantize then rounds once, too), or "never".
    Outside plait.train, `forget_originals(model)` ends "start". where: by default every such layer but new heads and a
    transformers model's embeddings and output layer. Raises BadInput beside methods that train the weights themselves.

    >>> model = nn.Sequential(nn.Linear(64, 64, bias=False))
    >>> Quantize(bits=4, keep="never").parametrize(model)
    >>> {name: t.numel() * t.element_size() for name, t in model.state_dict().items()}
    {'0.weight.codes': 2048, '0.weight.scales': 64, '0.weight.second': 4, '0.weight.centre': 4}
    """

    bits: Literal[8, 4] = 4
    format: Literal["nf4", "int"] | None = None
    group: Size | None = None
    double: bool = True
    keep: Literal["start", "always", "never"] = "start"

    def __post_init__(self) -> None:
        if self.bits == 8 and self.format == "nf4":
            raise BadInput("Quantize.format 'nf4' has 4 bits: give bits=4, or format='int'.")

    @property
    def form(self) -> Form:
        """How the numbers are coded."""
        return form_of(self.bits, self.format, self.group, self.double)

    def left_out(self, model: nn.Module) -> set[str]:
        """Return fresh layers (trained as they are), and a transformers model's embeddings and output layer."""
        return new_or_at_the_ends(model)

    @torch.no_grad()
    def parametrize(self, model: nn.Module) -> None:
        """Quantize each target's weight; one that several targets share stays one."""
        self.check(model, [self])
        quantize(self.targets(model), self.form, keep=self.keep != "never")

    def forward(self, model: nn.Module, now: Now) -> None:
        """Let go of the unrounded weights: no start is to come."""
        if self.keep == "start":
            forget_originals(model)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse weights that are quantized, methods that train or replace weights, and adapters that come before."""
        for name, layer in self.targets(model):
            if packed_weight(layer) is not None:
                raise BadInput(f"the weight of '{name}' is quantized already: drop Quantize, or leave it out of where.")
        mine = methods.index(self)
        for number, other in enumerate(methods):
            title, kind = type(other).__name__, type(other)
            if isinstance(other, Quantize):
                continue
            if isinstance(other, Parametrize) and not isinstance(other, Adapter):
                raise BadInput(
                    f"{title} trains or replaces the weights themselves, which Quantize freezes: drop {title}, or "
                    "Quantize."
                )
            if other.freezes:
                raise BadInput(f"{title} trains weights in turn, and a quantized one cannot be trained: drop Quantize.")
            if number < mine and kind.parametrize is not Method.parametrize and isinstance(other, Parametrize):
                raise BadInput(f"Quantize makes the base that {title} stands on: put it before {title}.")


def form_of(bits: int, format: str | None, group: int | None, double: bool) -> Form:
    """Return how numbers are coded, with what is None told by the bits."""
    format = format or ("nf4" if bits == 4 else "int")
    group = (64 if bits == 4 else 0) if group is None else group
    return Form(bits, format, group, double and format == "nf4")


def quantize(targets: list[tuple[str, nn.Module]], form: Form, keep: bool = False) -> None:
    """Replace the weights of layers by quantized, frozen ones, layer by layer; groups run along a layer's inputs."""
    made: dict[int, nn.Parameter] = {}
    taken: list[Tensor] = []  # held, so that identities stay unique
    for _, layer in targets:
        weight = own_weight(layer)
        if id(weight) not in made:
            packed = pack(weight.detach(), form, turned=is_transformers_conv1d(layer), keep=keep)
            if not keep:
                page_out(weight.detach())
            made[id(weight)] = nn.Parameter(packed, requires_grad=False)
            taken.append(weight)
        hold(layer, made[id(weight)])


@paper("dettmers2023qlora", key="qlora", kind="ground")
def QLoRA(
    rank: int = 8,
    alpha: float = 16.0,
    bits: Literal[8, 4] = 4,
    format: Literal["nf4", "int"] | None = None,
    group: int | None = None,
    double: bool = True,
    where: str = ".*",
    train: str = "",
) -> list[Method]:
    """y = dequantize(W_nf4) x + (alpha / rank) B A x: LoRA on a frozen base of 4 bits whose scales take 8.

    Returns [Quantize, LoRA]; a start (LoftQ, PiSSA, ...) stands after them. Fields: see the two. Paged optimizer states
    are no part of it: `states="8bit"` of the optimizer makes an adapter's small states smaller still. Raises BadInput
    for "nf4" with 8 bits, weights that are quantized already, and a rank above the smaller side of a target.

    >>> model = nn.Sequential(nn.Linear(64, 4))
    >>> for part in QLoRA(rank=2):
    ...     part.parametrize(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.plait.lora.A', '0.plait.lora.B']
    """
    return [
        Quantize(bits=bits, format=format, group=group, double=double, where=where),
        LoRA(rank=rank, alpha=alpha, where=where, train=train),
    ]


__all__ = ["Packed", "QLoRA", "Quantize", "forget_originals", "form_of", "quantize"]
