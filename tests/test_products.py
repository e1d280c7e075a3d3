"""Products by oneDNN agree with torch's own, in values and gradients of first and second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.math.products import WORTH_FROM, linear, product
from plait.parametrize.folding import fold
from plait.parametrize.low_rank import LoRA


def large(*, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=source) for shape in ((2, 96, 192), (256, 192), (256,)))
    assert x.numel() * len(weight) >= WORTH_FROM
    return x.to(dtype).requires_grad_(), weight.to(dtype) / 14, bias.to(dtype).requires_grad_()


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_product_agrees_in_either_layout(layout: str) -> None:
    x, weight, bias = large()
    matrix = weight.t() if layout == "rows" else weight.t().contiguous()
    exact = torch.addmm(bias.double(), x.flatten(0, 1).double(), matrix.double())
    with torch.no_grad():
        made = product(x.flatten(0, 1), matrix, bias)
    assert made.is_contiguous()
    assert torch.allclose(made.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:TF32")  # torch's own flags warn of what they do not change
def test_a_large_frozen_product_is_ours_and_a_small_or_trained_one_torchs() -> None:
    x, weight, bias = large()

    def made_by(*given: Tensor) -> str:
        return type(linear(*given).grad_fn).__name__

    assert made_by(x, weight, bias) == "_FrozenLinearBackward"
    assert made_by(x[:, :2], weight, bias) != "_FrozenLinearBackward"
    assert made_by(x, weight.clone().requires_grad_(), bias) != "_FrozenLinearBackward"
    with torch.backends.mkldnn.flags(enabled=False):
        assert made_by(x, weight, bias) != "_FrozenLinearBackward"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_agree(dtype: torch.dtype) -> None:
    x, weight, bias = large(dtype=dtype)
    slope = torch.randn(2, 96, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = torch.autograd.grad(linear(x, weight, bias), (x, bias), slope)
    theirs = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), slope)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-4)


def test_an_expanded_gradient_and_a_second_order_one_agree() -> None:
    x, weight, bias = large()
    seconds = []
    for function in (linear, F.linear):
        (first,) = torch.autograd.grad(function(x, weight, bias).sum(), x)
        (slope,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        seconds.append((first, torch.autograd.grad(slope.square().sum(), x)[0]))
    for our, their in zip(*seconds, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch.func.jvp's own first use
def test_transforms_and_compilation_see_torchs_product() -> None:
    x, weight, bias = large()
    through = torch.func.vmap(lambda row: linear(row, weight, bias))(x)
    torch.testing.assert_close(through, F.linear(x, weight, bias))
    _, pushed = torch.func.jvp(lambda inputs: linear(inputs, weight), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(pushed, F.linear(torch.ones_like(x), weight))
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))


def test_an_adapted_large_layer_agrees_with_its_dense_definition() -> None:
    layer = nn.Sequential(nn.Linear(192, 256))
    x, _, _ = large()
    LoRA(rank=4).parametrize(layer)
    with torch.no_grad():
        next(p for name, p in layer.named_parameters() if name.endswith("B")).normal_()
    slope = torch.randn(2, 96, 256, generator=torch.Generator().manual_seed(1))
    dense = F.linear(x, layer[0].plait["lora"].dense(layer[0].weight), layer[0].bias)  # type: ignore[operator, index, union-attr, arg-type]
    given = [x, *(p for p in layer.parameters() if p.requires_grad)]
    ours, theirs = (torch.autograd.grad(output, given, slope) for output in (layer(x), dense))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-3)


def test_layers_beside_an_adapter_multiply_by_it_until_the_adapter_is_folded() -> None:
    model = nn.Sequential(nn.Linear(192, 192), nn.Linear(192, 256))
    x, _, _ = large()
    plain = model(x)
    LoRA(rank=4, where="0").parametrize(model)
    adapted = model(x)
    assert type(adapted.grad_fn).__name__ == "_FrozenLinearBackward"
    torch.testing.assert_close(adapted, plain, rtol=1e-5, atol=1e-5)
    fold(model)
    assert not any("forward" in part.__dict__ for part in model.modules())
