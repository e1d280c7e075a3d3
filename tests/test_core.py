"""Adapters of which only a core is trained, and the start from a full step: against the equations, written plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait import AdamW, LoRAXS, train
from plait.errors import BadInput
from plait.initialize.full_step import LoRASB
from plait.method import Now
from plait.parametrize.base import attached, dense_weight
from plait.parametrize.core import Core
from plait.parametrize.folding import fold

X = torch.randn(48, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randn(48, 5, generator=torch.Generator().manual_seed(1))
STEP = 0.01


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5))


def cores(model: nn.Module) -> list[Core]:
    return [core for _, _, core in attached(model, Core)]


def test_the_frozen_factors_are_the_largest_triplets() -> None:
    model, weight = net(), net()[0].weight.detach()
    LoRAXS(rank=3, deviation=0.0).parametrize(model)
    core = cores(model)[0]
    u, s, vh = torch.linalg.svd(weight)
    principal = u[:, :3] * s[:3] @ vh[:3]
    torch.testing.assert_close(core.B @ core.A, principal, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(core.B.norm(dim=0), s[:3], rtol=1e-5, atol=1e-6)
    assert torch.equal(dense_weight(model[0]), weight)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 9


def started(**fields: Any) -> nn.Module:
    """The model as training begins: no step is taken that counts."""
    model = net()
    methods = [LoRAXS(rank=3), LoRASB(batches=3, step_size=STEP, **fields), AdamW(lr=1e-12)]
    return train(model, (X, Y), methods=methods, steps=1, batch_size=16).model


def first_steps() -> list[Tensor]:
    """-step * sign(sum of the gradients of all batches) for both weights, by the letter."""
    model = net()
    loss = 0.5 * (model(X) - Y).square().sum(1).mean()  # three batches of 16 are all 48 examples
    grads = torch.autograd.grad(loss, [model[0].weight, model[2].weight])
    return [-STEP * grad.sign() for grad in grads]


def test_the_start_is_the_best_approximation_of_the_first_step() -> None:
    for core, step in zip(cores(started()), first_steps(), strict=True):
        u, s, vh = torch.linalg.svd(step)
        best = u[:, :3] * s[:3] @ vh[:3]
        torch.testing.assert_close(core.scale * core.B @ core.R @ core.A, best, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(core.A @ core.A.T, torch.eye(3), rtol=0, atol=1e-5)
        torch.testing.assert_close(core.B.T @ core.B, torch.eye(3), rtol=0, atol=1e-5)


def test_the_start_does_not_depend_on_alpha_nor_on_how_layers_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.initialize import full_step

    whole = [dense_weight(layer) for layer in (started()[0], started()[2])]
    monkeypatch.setattr(full_step, "SHARE", 1.0)  # one group
    model = net()
    methods = [LoRAXS(rank=3, alpha=1.0), LoRASB(batches=3, step_size=STEP), AdamW(lr=1e-12)]
    other = train(model, (X, Y), methods=methods, steps=1, batch_size=16).model
    for weight, layer in zip(whole, (other[0], other[2]), strict=True):
        torch.testing.assert_close(dense_weight(layer), weight, rtol=1e-6, atol=1e-7)


def test_the_gradient_of_the_core_is_the_full_gradient_in_its_span() -> None:
    model = started()
    core, weight = cores(model)[0], dense_weight(model[0]).detach().requires_grad_(True)
    torch.nn.functional.linear(X, weight, model[0].bias).tanh().sum().backward()
    model.zero_grad()
    model[0](X).tanh().sum().backward()
    assert weight.grad is not None
    expected = core.scale * core.B.T @ weight.grad @ core.A.T
    torch.testing.assert_close(core.R.grad, expected, rtol=1e-4, atol=1e-4)


def test_accumulation_gives_the_same_start() -> None:
    whole = train(
        net(), (X, Y), methods=[LoRAXS(rank=3), LoRASB(batches=3), AdamW(lr=1e-12)], steps=1, batch_size=16
    ).model
    parts = train(
        net(), (X, Y), methods=[LoRAXS(rank=3), LoRASB(batches=3), AdamW(lr=1e-12)],
        steps=1, batch_size=16, accumulate=4,
    ).model  # fmt: skip
    for a, b in zip(cores(whole), cores(parts), strict=True):
        torch.testing.assert_close(a.B @ a.R @ a.A, b.B @ b.R @ b.A, rtol=1e-4, atol=1e-8)


def test_it_goes_on_from_a_checkpoint_bitwise(tmp_path: Path) -> None:
    def run(steps: int, folder: Path) -> nn.Module:
        methods = [LoRAXS(rank=3), LoRASB(batches=2), AdamW(lr=1e-2)]
        return train(net(), (X, Y), methods=methods, steps=steps, batch_size=16, folder=folder, save_every=2).model

    run(4, tmp_path / "cut")
    cut, whole = run(8, tmp_path / "cut"), run(8, tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(cut.state_dict().values(), whole.state_dict().values(), strict=True))


def test_folding_keeps_the_function() -> None:
    model = started()
    expected = model(X)
    torch.testing.assert_close(fold(model)(X), expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_start() -> None:
    model = net()
    with pytest.raises(BadInput, match="LoRASB starts LoRAXS adapters, but the model has none"):
        train(model, (X, Y), methods=[LoRASB()], steps=1)
    LoRAXS(rank=2).parametrize(model)
    with pytest.raises(BadInput, match="LoRASB needs gradients"):
        LoRASB().initialize(model, Now())

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = nn.Linear(12, 5), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    with pytest.raises(BadInput, match="LoRASB got no gradient for 'spare'"):
        train(Unused(), (X, Y), methods=[LoRAXS(rank=2), LoRASB()], steps=1)
