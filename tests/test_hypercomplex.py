"""Compacter: by the letter of its equation, beside the authors' code, and layers that no weight can hold."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from plait import AdamW, LoRA, train
from plait.errors import BadInput
from plait.finish.fold import Fold
from plait.method import Method
from plait.models.small import llama_tiny
from plait.parametrize.base import attached, dense_weight
from plait.parametrize.folding import fold
from plait.parametrize.hypercomplex import Compacter, HypercomplexAdapter, kronecker_sum, times_kronecker_sum
from plait.parametrize.random_bases import RandLoRA

X = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def compacter(**fields: Any) -> Compacter:
    return Compacter(**{"factors": 2, "width": 4, "rank": 1, "deviation": 0.5, "where": "0"} | fields)


def stirred(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".plait." in f".{name}":
                p.copy_(torch.randn(p.shape, generator=draw) / 2)
    return model


def test_a_sum_of_kronecker_products_by_the_letter() -> None:
    draw = torch.Generator().manual_seed(0)
    slow, left, right = (torch.randn(s, generator=draw).double() for s in ((3, 3, 3), (3, 2, 1), (3, 1, 4)))
    expected = sum(torch.kron(slow[i], left[i] @ right[i]) for i in range(3))
    torch.testing.assert_close(kronecker_sum(slow, left, right), expected)
    x = torch.randn(2, 5, 6, generator=draw).double()
    torch.testing.assert_close(times_kronecker_sum(x, slow, left, right), x @ expected)
    assert times_kronecker_sum(x[:0], slow, left, right).shape == (0, 5, 12)


def test_the_layer_is_its_equation() -> None:
    model = net()
    compacter().parametrize(model)
    stirred(model)
    ((_, layer, part),) = attached(model, HypercomplexAdapter)
    down, up = part.maps()
    assert (tuple(down.shape), tuple(up.shape)) == ((4, 8), (8, 4))
    y = X @ layer.weight.t() + layer.bias
    expected = y + F.gelu(y @ down.t() + part.down_bias, approximate="tanh") @ up.t() + part.up_bias
    torch.testing.assert_close(layer(X), expected)


def test_it_computes_what_the_authors_code_does() -> None:
    """Two of their PHMLinear, 12 -> 8 -> 12 of 4 factors and rank 1, around gelu_new, the same numbers in them."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, generator=draw).requires_grad_()
    part = HypercomplexAdapter(torch.empty(12, 3), 4, 8, 1, 1.0)
    order = ("A", "down_left", "down_right", "up_left", "up_right", "down_bias", "up_bias")
    with torch.no_grad():
        for name in order:
            held = part.get_parameter(name)
            held.copy_(torch.randn(held.shape, generator=draw))
    y = part.after(nn.Linear(3, 12), x)
    y.square().sum().backward()
    theirs = [-0.704493, -13.848443, 7.962033, -1.209093, -0.079122, 0.325838]
    assert y[0, :6].tolist() == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert y.norm().item() == pytest.approx(47.05312, rel=1e-5)
    norms = [part.get_parameter(name).grad.norm().item() for name in order]
    assert norms == pytest.approx([3707.3533, 3912.6841, 4615.165, 2219.2361, 1891.2949, 829.5521, 113.9128], rel=1e-5)
    assert x.grad.norm().item() == pytest.approx(1607.0013, rel=1e-5)


def test_the_slow_weights_are_shared_and_stay_so() -> None:
    model = net()
    compacter(where="0|2").parametrize(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        first, second = (part for _, _, part in attached(twin, HypercomplexAdapter))
        assert first.A is second.A
        names = [name for name, p in twin.named_parameters() if p.requires_grad]
        assert len(names) == 1 + 6 + 6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2**3 + sum(2 * (d + 4) + d + 4 for d in (8, 4))


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear": lambda: (nn.Linear(6, 8), torch.randn(3, 5, 6)),
    "Conv1D": lambda: (Conv1D(8, 6), torch.randn(3, 5, 6)),
    "Conv1d": lambda: (nn.Conv1d(3, 8, 3), torch.randn(2, 3, 7)),
    "Conv2d": lambda: (nn.Conv2d(3, 8, 3), torch.randn(2, 3, 7, 6)),
    "Embedding": lambda: (nn.Embedding(7, 8), torch.randint(0, 7, (3, 5))),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_stands_behind_every_kind_of_layer(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    model, x = nn.Sequential(layer).to(dtype), x.to(dtype) if x.is_floating_point() else x
    before = model(x)
    Compacter(factors=2, width=4, where="0").parametrize(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)  # all but idle
    output = stirred(model)(x)
    assert output.dtype == dtype
    ((_, _, part),) = attached(model, HypercomplexAdapter)
    down, up = (m.float() for m in part.maps())
    y = (before.movedim(1, -1) if kind.startswith("Conv") and kind != "Conv1D" else before).float()
    expected = y + F.gelu(y @ down.t() + part.down_bias, approximate="tanh") @ up.t() + part.up_bias
    seen = (output.movedim(1, -1) if kind.startswith("Conv") and kind != "Conv1D" else output).float()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert (seen - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("others", [[LoRA(rank=2, where="0")], [RandLoRA(rank=2, where="0")]])
def test_the_order_of_the_list_does_not_matter(others: list[Method]) -> None:
    """What makes weights comes first in any case, whether it has a fast path or not."""
    outputs = []
    for methods in ([compacter(), *others], [*others, compacter()]):
        model = net()
        for m in methods:
            m.parametrize(model)
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if ".plait." in name:
                    p.copy_(torch.randn(p.shape, generator=draw) / 2)
        outputs.append(model(X))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_the_linear_map_under_it_is_the_layers_weight() -> None:
    model = net()
    compacter().parametrize(model)
    assert torch.equal(dense_weight(model[0]), model[0].weight)


def test_it_is_not_folded() -> None:
    says = "Compacter acts on what '0' puts out, which no weight can hold: leave out folding."
    model = stirred(net())
    compacter().parametrize(model)
    output = model(X)
    with pytest.raises(BadInput) as problem:
        fold(model)
    assert str(problem.value) == says
    assert torch.equal(model(X), output)
    with pytest.raises(BadInput, match="Fold"):
        train(net(), (X, X[:, :4]), methods=[compacter(), Fold()], steps=1)


def test_a_transformer_is_adapted_behind_its_parts_with_its_norms() -> None:
    model = llama_tiny()
    Compacter(width=8, train=".*norm.*").parametrize(model)
    found = {name.rpartition(".")[2] for name, _, _ in attached(model, HypercomplexAdapter)}
    assert found == {"o_proj", "down_proj"}
    others = {name for name, p in model.named_parameters() if p.requires_grad and ".plait." not in name}
    assert others
    assert all("norm" in name for name in others)


def test_it_learns_saves_and_goes_on(tmp_path: Any) -> None:
    data = (X, torch.randn(10, 4, generator=torch.Generator().manual_seed(9)))
    methods = [compacter(where="0|2", deviation=1e-2), AdamW(lr=3e-2)]

    def go(steps: int, folder: Any) -> Any:
        return train(net(), data, methods=methods, steps=steps, batch_size=10, folder=folder, save_every=5)

    whole = go(60, tmp_path / "whole")
    assert whole.history[-1]["objective"] < 0.7 * whole.history[0]["objective"]
    go(20, tmp_path / "parts")
    again = go(60, tmp_path / "parts")
    assert torch.equal(again.model(X), whole.model(X))
    other = net()
    compacter(where="0|2").parametrize(other)
    other.load_state_dict(whole.model.state_dict())
    assert torch.equal(other(X), whole.model(X))
    other.load_state_dict(net().state_dict())  # the base model's checkpoint, strictly


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (compacter(factors=3), "Compacter.factors is 3, which does not divide width, 4: choose others."),
        (
            compacter(factors=8, width=8, where="2"),
            "Compacter.factors is 8, which does not divide the outputs of '2', 4",
        ),
        (
            compacter(rank=99),
            "Compacter.rank is 99, but width, 4, divided by 2 factors leave a rank of 2: use at most 2.",
        ),
        (
            compacter(rank=3, width=8, where="2"),
            "Compacter.rank is 3, but the outputs of '2', 4, divided by 2 factors leave a rank of 2: use at most 2.",
        ),
    ],
)
def test_what_does_not_fit(method: Method, says: str) -> None:
    with pytest.raises(BadInput) as problem:
        method.check(net(), [method])
    assert str(problem.value).startswith(says)
