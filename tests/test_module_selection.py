"""DiffoRA: by the letter of its equation, how modules are selected, and what the others share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from plait import SGD, DiffoRA, train
from plait.errors import BadInput
from plait.integrations.peft import load_adapter, save_adapter
from plait.method import Now
from plait.parametrize.base import attached, dense_weight, run
from plait.parametrize.folding import fold
from plait.parametrize.module_selection import GatedLowRank
from plait.sharding import refuse_shared

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), (3, 6)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, (2, 3), stride=2), (2, 3, 6, 8)),
    "Conv2d with groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "Embedding": (lambda: nn.Embedding(7, 5, padding_idx=0), ()),
}


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def parts_of(model: nn.Module) -> list[GatedLowRank]:
    return [part for _, _, part in attached(model, GatedLowRank)]


def stirred(model: nn.Module, gates: list[float], **fields: Any) -> tuple[nn.Module, list[GatedLowRank]]:
    """The model under DiffoRA, with these gates and every number of its adapters drawn anew."""
    DiffoRA(**{"rank": 3, "shared_rank": 2, "alpha": 6.0} | fields).parametrize(model)
    parts, draw = parts_of(model), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in dict.fromkeys(p for part in parts for p in part.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        for part, gate in zip(parts, gates, strict=True):
            part.gate.fill_(gate)
            part.common.fill_(gate == 0)
    return model, parts


@pytest.mark.parametrize(("gate", "common"), [(0.0, 1.0), (0.3, 0.0), (1.0, 0.0)])
def test_by_the_letter(gate: float, common: float) -> None:
    """W + s (g B A + h B_s A_s), one entry at a time: h = 0 in the search, then 1 - g."""
    model, (part, *_) = stirred(net(), [gate, 0.5, 0.5])
    part.common.fill_(common)
    a, b, c, d = (p.tolist() for p in (part.A, part.B, part.shared_A, part.shared_B))
    weight = net()[0].weight.tolist()
    for i in range(8):
        for j in range(8):
            own = sum(b[i][r] * a[r][j] for r in range(3))
            shared = sum(d[i][r] * c[r][j] for r in range(2))
            weight[i][j] += 2.0 * (gate * own + common * shared)
    torch.testing.assert_close(dense_weight(model[0]), torch.tensor(weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_fast_dense_and_folded_are_one_on_every_kind_of_layer(kind: str, dtype: torch.dtype) -> None:
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.ModuleList([build(), build()]).to(dtype)
    model, parts = stirred(model, [0.3, 0.6], rank=2, shared_rank=1)
    parts[1].common.fill_(0.5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) if shape else torch.arange(7)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 5e-2, "atol": 2e-1}
    plain, gradients = fold(copy.deepcopy(model)), []
    for layer, folded in zip(model, plain, strict=True):
        for output in (layer(x), run(layer, x, dense_weight(layer))):
            torch.testing.assert_close(output, folded(x), **tolerance)
            model.zero_grad()
            output.square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    if dtype == torch.float64:
        for fast, dense in ((gradients[0], gradients[1]), (gradients[2], gradients[3])):
            for one, other in zip(fast, dense, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_training_starts_at_the_weights_and_modules_of_one_shape_share() -> None:
    model = net()
    model.append(nn.Linear(8, 5))
    DiffoRA(rank=2).parametrize(model)
    for _, layer, part in attached(model, GatedLowRank):
        assert torch.equal(dense_weight(layer), layer.weight)
        assert part.gate == 0.5
    first, second, third, other = parts_of(model)
    assert first.shared_A is second.shared_A is third.shared_A is not other.shared_A
    assert first.A is not second.A


def test_copies_and_checkpoints_keep_what_is_shared() -> None:
    model, _ = stirred(net(), [0.2, 0.4, 0.9])
    twin = copy.deepcopy(model)
    first, second, _ = parts_of(twin)
    assert first.shared_B is second.shared_B is not parts_of(model)[0].shared_B
    other, _ = stirred(net(), [0.5, 0.5, 0.5])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


# -- selection ---------------------------------------------------------------------------------------------------------
def now_with(slopes: Tensor, progress: float) -> Now:
    """A run at that point, whose validation misfit is slopes . gates."""
    now = Now(step=round(100 * progress), steps=100)

    def validate(model: nn.Module, number: int) -> Tensor:
        return (torch.stack([part.gate for part in parts_of(model)]) * slopes).sum()

    now.validate = validate
    return now


def test_the_relaxed_gates_follow_the_validation_gradient() -> None:
    """u <- u - lr (1 - p) h / |h| sqrt(n), h_l = slope_l sigmoid'(u_l), p = 0.1 / 0.5; g = sigmoid(u)."""
    model = net()
    method = DiffoRA(rank=2, search=0.5, lr=0.2)
    method.parametrize(model)
    now, slopes = now_with(torch.tensor([1.0, -3.0, 2.0]), 0.1), torch.tensor([1.0, -3.0, 2.0])
    raw = torch.zeros(3)
    for _ in range(3):
        method.constrain(model, now)
        h = slopes * raw.sigmoid() * (1 - raw.sigmoid())
        raw = raw - 0.2 * 0.8 * h / h.norm() * 3**0.5
    for part, gate in zip(parts_of(model), raw.sigmoid(), strict=True):
        torch.testing.assert_close(part.gate, gate)
        assert not part.gate.requires_grad


@pytest.mark.parametrize(("ratio", "expected"), [(0.34, [0, 1, 0]), (0.67, [1, 1, 0])])
def test_then_the_largest_become_one_and_the_others_zero_for_good(ratio: float, expected: list[int]) -> None:
    model = net()
    method = DiffoRA(rank=2, search=0.5, ratio=ratio)
    method.parametrize(model)
    now = now_with(torch.tensor([1.0, -3.0, 2.0]), 0.1)
    method.constrain(model, now)
    now.step = 50
    method.constrain(model, now)
    assert [int(part.gate) for part in parts_of(model)] == expected
    assert [int(part.common) for part in parts_of(model)] == [1 - gate for gate in expected]
    now.validate = None  # type: ignore[assignment]  # it is not asked any more
    now.step = 51
    method.constrain(model, now)
    assert [int(part.gate) for part in parts_of(model)] == expected


def test_without_a_gradient_no_gate_moves() -> None:
    model = net()
    method = DiffoRA(rank=2)
    method.parametrize(model)
    method.constrain(model, now_with(torch.zeros(3), 0.0))
    assert [float(part.gate) for part in parts_of(model)] == [0.5, 0.5, 0.5]


def test_a_run_selects_the_module_that_the_target_needs_and_goes_on_bitwise(tmp_path: Path) -> None:
    """Only the first layer of the net that made the targets differs from the net that is adapted."""
    other = net()
    with torch.no_grad():
        other[0].weight.add_(0.8 * torch.randn(8, 8, generator=torch.Generator().manual_seed(4)))
        target = other(X)
    methods = [DiffoRA(rank=4, ratio=0.34, search=0.5), SGD(lr=0.05, momentum=0.0)]

    def go(folder: str, stop: int = 0) -> Any:
        options = {"steps": 60, "batch_size": 24, "validation": (X, target), "folder": tmp_path / folder}
        return train(net(), (X, target), methods=methods, on_step=lambda now: now.step == stop, **options)

    whole = go("whole")
    assert [float(part.gate) for part in parts_of(whole.model)] == [1.0, 0.0, 0.0]
    for stop in (20, 45):
        go(f"halves{stop}", stop=stop)
        again = go(f"halves{stop}").model.state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.model.state_dict().items())


def test_a_peft_file_has_the_rank_that_each_module_has(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, _ = stirred(net(), [0.0, 1.0, 0.0])
    save_adapter(model, tmp_path)
    ranks = {name: len(t) for name, t in load_file(str(tmp_path / "adapter_model.safetensors")).items() if "_A" in name}
    assert sorted(ranks.values()) == [2, 2, 3]
    torch.testing.assert_close(load_adapter(net(), tmp_path)(X), model(X), rtol=1e-4, atol=1e-5)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match=r"DiffoRA\.ratio is 0\.9: of 3 modules that is all; give less, or use LoRA"):
        DiffoRA(rank=2, ratio=0.9).parametrize(net())
    with pytest.raises(BadInput, match=r"DiffoRA\.rank is 9, but '0' has a \(8, 8\) weight: use at most 8"):
        DiffoRA(rank=9).parametrize(net())
    with pytest.raises(BadInput, match="needs a validation set"):
        train(net(), (X, Y), methods=[DiffoRA(rank=2)], steps=2)
    model = nn.Sequential(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    DiffoRA(rank=2).parametrize(model)
    with pytest.raises(BadInput, match="which several blocks share: leave out what shares it"):
        refuse_shared(model)
    other = nn.Sequential(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    DiffoRA(rank=2, shared_rank=0).parametrize(other)
    refuse_shared(other)
