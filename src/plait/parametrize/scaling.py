"""Adapters that only scale: the outputs of some layers, the inputs of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.layers import CONVOLUTIONS, is_transformers_conv1d, own_weight
from plait.method import Method, method
from plait.parametrize.base import Adapter, Parametrization, run, stack
from plait.parametrize.low_rank import adapter_dtype, without_padding


class OutputScale(Parametrization):
    """W -> diag(l) W and b -> l * b,  l: [out], ones at the start."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(weight.shape[0], dtype=adapter_dtype(weight)))

    def dense(self, weight: Tensor) -> Tensor:
        """Return diag(l) W."""
        return (self.l.unsqueeze(1) * weight).to(weight.dtype)

    def dense_bias(self, bias: Tensor) -> Tensor:
        """Return l * b."""
        return self.l * bias

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return l * (W x + b), which forms no weight."""
        output = below()
        ones = (1,) * len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else ()
        return without_padding(layer, inputs, self.l.to(output.dtype).view(-1, *ones) * output)


class InputScale(Parametrization):
    """W -> W diag(l),  l: [in], ones at the start."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(weight.shape[1], dtype=adapter_dtype(weight)))

    def dense(self, weight: Tensor) -> Tensor:
        """Return W diag(l)."""
        return (weight * self.l).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return W (l * x) + b, which forms no weight, for linear layers that hold nothing below."""
        if stack(layer)[0] is not self or not (isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)):
            return None
        return run(layer, self.l.to(inputs.dtype) * inputs, own_weight(layer))


@method
class IA3Scale(Adapter):
    """y = l * (W x + b) for side "output", y = W (l * x) + b for "input": l starts at ones, all else is frozen."""

    side: Literal["output", "input"] = "output"

    def build(self, layer: nn.Module, weight: Tensor) -> Parametrization:
        """Return the scale of one layer."""
        return (OutputScale if self.side == "output" else InputScale)(weight)


@paper("liu2022ia3", key="ia3", kind="ground")
def IA3(
    outputs: str = "k_proj|v_proj|key|value",
    inputs: str = r"down_proj|fc2|wo|layer\.\d+\.output\.dense",
    train: str = "",
) -> list[Method]:
    """k = l_k * (W_k x), v = l_v * (W_v x), and W_down (l_f * activation): learned vectors, ones at the start, scale
    the keys, the values and the inner activations of each feed-forward block.

    outputs, inputs: names of the layers whose outputs, whose inputs are scaled; the defaults fit Llama, BERT, ViT, OPT
    and T5. A bias is scaled with its output, as in peft. Raises BadInput where `outputs` or `inputs` matches no linear
    map.

    >>> model = nn.ModuleDict({"k_proj": nn.Linear(3, 2), "fc2": nn.Linear(4, 3)})
    >>> for part in IA3():
    ...     part.parametrize(model)
    >>> [(name, len(p)) for name, p in model.named_parameters() if p.requires_grad]
    [('k_proj.plait.ia3scale.l', 2), ('fc2.plait.ia3scale.l', 4)]
    """
    return [IA3Scale(where=outputs, side="output", train=train), IA3Scale(where=inputs, side="input", train=train)]
