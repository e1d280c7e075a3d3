"""Hydra: by the letter of its equations, beside the authors' code, and folded under and over other adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from networks import net
from plait import LoRA, train
from plait.errors import BadInput
from plait.method import Method
from plait.parametrize.base import attached
from plait.parametrize.folding import fold
from plait.parametrize.scaling import IA3Scale
from plait.parametrize.sequential import Hydra, TwoBranches

X = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))


def attach(model: nn.Module, *methods: Method, seed: int = 7, size: float = 1.0) -> nn.Module:
    for method in methods:
        method.parametrize(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(size * torch.randn(p.shape, generator=draw))
    return model


def test_hydra_by_the_letter() -> None:
    """y_i + s sum_r B_ir sum_j A_rj x_j + s sum_r D_ir sum_k C_rk y_k, one example and one unit at a time."""
    model = attach(net(), Hydra(rank=3, scale=0.5))
    ((_, layer, part), _) = attached(model, TwoBranches)
    got = layer(X).tolist()
    a, b, c, d = (t.tolist() for t in (part.A, part.B, part.C, part.D))
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    for n, x in enumerate(X.tolist()):
        y = [sum(weight[i][j] * x[j] for j in range(12)) + bias[i] for i in range(8)]
        for i in range(8):
            parallel = sum(b[i][r] * sum(a[r][j] * x[j] for j in range(12)) for r in range(3))
            sequential = sum(d[i][r] * sum(c[r][k] * y[k] for k in range(8)) for r in range(3))
            assert got[n][i] == pytest.approx(y[i] + 0.5 * parallel + 0.5 * sequential, rel=1e-4, abs=1e-4)


# The authors' vtab1k/hydra.py (Hydra_layer, forward_vit_hydra_ffn, reparameterize) on net()[0] and X, rank 3, scale
# 0.5, the biases of its branches zero, A, B, C, D drawn in this order as `attach` does; float32, hence 1e-5.
THEIR_OUTPUT = [-4.892610, 5.378663, 0.279403, -2.030982, -6.437830, -2.720003, 0.404261, -4.615566]
THEIR_NORM = 25.025381
THEIR_GRADIENTS = [
    369.046276,
    207.584116,
    130.371407,
    91.908167,
]  # norms of the gradients of the sum of squares of the output
THEIR_WEIGHT = [
    *(1.066197, -0.524227, -1.709291, 0.305656, 1.005660, -0.880064),
    *(0.301939, 1.197039, -1.079244, 2.771187, 3.152000, 1.758924),
]  # the first row of what they fold
THEIR_WEIGHT_NORM = 9.010965
THEIR_BIAS = [-0.005502, -0.046705, -0.290895, 0.073964, 0.183918, 0.082551, 0.254468, -0.179864]


def test_hydra_computes_and_folds_what_the_authors_code_does() -> None:
    model = attach(net(), Hydra(rank=3, scale=0.5, where="0"))
    ((_, layer, part),) = attached(model, TwoBranches)
    output = layer(X)
    assert output[0].tolist() == pytest.approx(THEIR_OUTPUT, rel=1e-5, abs=1e-5)
    assert output.norm().item() == pytest.approx(THEIR_NORM, rel=1e-5)
    output.square().sum().backward()
    assert [p.grad.norm().item() for p in (part.A, part.B, part.C, part.D)] == pytest.approx(THEIR_GRADIENTS, rel=1e-5)
    plain = fold(model)[0]
    assert plain.weight[0].tolist() == pytest.approx(THEIR_WEIGHT, rel=1e-5, abs=1e-5)
    assert plain.weight.norm().item() == pytest.approx(THEIR_WEIGHT_NORM, rel=1e-5)
    assert plain.bias.tolist() == pytest.approx(THEIR_BIAS, rel=1e-5, abs=1e-5)


LAYERS: dict[str, Any] = {
    "Linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 4, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(4, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), lambda: torch.randn(3, 4, 6)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, (2, 3), stride=2, padding=1), lambda: torch.randn(2, 3, 6, 8)),
    "one image": (lambda: nn.Conv2d(3, 4, 2), lambda: torch.randn(3, 5, 5)),
    "Embedding": (lambda: nn.Embedding(7, 5, padding_idx=0), lambda: torch.tensor([[0, 3, 3], [6, 0, 1]])),
}


@pytest.mark.parametrize("below", [[], [LoRA(rank=1)], [IA3Scale()]], ids=["alone", "on lora", "on a scale"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_fast_path_is_the_definition_in_values_and_gradients(layer: str, below: list[Method]) -> None:
    torch.manual_seed(0)
    make, draw = LAYERS[layer]
    model = attach(nn.Sequential(make()).double(), *below, Hydra(rank=2, scale=0.7), size=0.4)
    x, seen = draw(), []
    x = x.double() if x.is_floating_point() else x
    for fast in (True, False):
        run = copy.deepcopy(model)
        ((_, target, part),) = attached(run, TwoBranches)
        if not fast:
            part.fast = lambda *_: None
        output = target(x)
        (output * torch.linspace(-1, 2, output.numel()).view(output.shape)).sum().backward()
        seen.append((output.detach(), {n: p.grad for n, p in run.named_parameters() if p.requires_grad}))
    (ours, ours_g), (theirs, theirs_g) = seen
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    for name, gradient in ours_g.items():
        assert isinstance(gradient, Tensor), name
        torch.testing.assert_close(gradient, theirs_g[name], rtol=1e-10, atol=1e-11)


def test_the_sequential_branch_reaches_only_what_the_layer_puts_out() -> None:
    """With B = 0 every column of W' - W lies in the span of W's columns: on a layer of rank 1 they stay parallel."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.randn(5), torch.randn(6)))
    before, model = layer.weight.clone(), attach(nn.Sequential(layer), Hydra(rank=2))
    ((_, _, part),) = attached(model, TwoBranches)
    with torch.no_grad():
        part.B.zero_()
    moved = part.dense(before) - before
    assert torch.linalg.matrix_rank(moved) == 1
    assert torch.linalg.matrix_rank(torch.cat([moved, before]), rtol=1e-5) == 1  # the same inputs are read


def test_the_bias_of_a_stack_is_composed() -> None:
    """Two output scales multiply a bias, as they multiply the output."""
    model = attach(nn.Sequential(nn.Linear(6, 5)), IA3Scale(), IA3Scale(), Hydra(rank=2), IA3Scale(), size=0.5)
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fold(copy.deepcopy(model))(inputs), model(inputs), rtol=1e-5, atol=1e-6)


def test_a_rank_above_the_weights() -> None:
    with pytest.raises(BadInput) as problem:
        train(net(), (X, torch.zeros(10, 20)), methods=[Hydra(rank=9)], steps=1)
    assert str(problem.value) == "Hydra.rank is 9, but '0' has a (8, 12) weight: use at most 8."
