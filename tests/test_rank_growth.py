"""TriAdaptLoRA: by the letter of its equation, how ranks grow, and that growing changes nothing that is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait import AdamW, TriAdaptLoRA, train
from plait.errors import BadInput
from plait.integrations.peft import load_adapter, save_adapter
from plait.method import Now
from plait.parametrize.base import attached, dense_weight
from plait.parametrize.folding import fold
from plait.parametrize.rank_growth import GrowingLowRank

X = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6))


def grown(**fields: Any) -> tuple[nn.Module, list[GrowingLowRank]]:
    """The net under the method, every number of it in use drawn anew."""
    model = net()
    TriAdaptLoRA(**{"rank": 3, "first": 2, "most": 5, "alpha": 6.0} | fields).parametrize(model)
    parts = [part for _, _, part in attached(model, GrowingLowRank)]
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for part in parts:
            r = part.rank
            for p in (part.A[:r], part.B[:, :r], part.C[:r, :r]):
                p.copy_(torch.randn(p.shape, generator=draw))
    return model, parts


def test_by_the_letter() -> None:
    """W + s sum_pq B_ip (I + L + U)_pq A_qj, one entry at a time, whatever stands in the room that is not in use."""
    model, parts = grown()
    with torch.no_grad():
        parts[0].C[2:] = 9.0
        parts[0].B[:, 2:] = 9.0
    a, b, c = (p.tolist() for p in (parts[0].A, parts[0].B, parts[0].C))
    weight = net()[0].weight.tolist()
    for i in range(8):
        for j in range(12):
            for p in range(2):
                for q in range(2):
                    lower, upper = (c[p][q] if q <= p else 0.0), (c[p][q] if q > p else 0.0)
                    weight[i][j] += 2.0 * b[i][p] * (float(p == q) + lower + upper) * a[q][j]
    torch.testing.assert_close(dense_weight(model[0]), torch.tensor(weight), rtol=1e-5, atol=1e-5)
    expected = X @ torch.tensor(weight).t() + model[0].bias
    torch.testing.assert_close(model[0](X), expected, rtol=1e-5, atol=1e-5)


def test_a_gained_rank_changes_nothing_and_every_part_of_it_learns() -> None:
    model, parts = grown()
    before = model(X).detach()
    for part in parts:
        part.grow(2, torch.Generator().manual_seed(0))
        assert part.rank == 4
    torch.testing.assert_close(model(X), before, rtol=1e-6, atol=1e-5)
    (model(X) - Y).square().sum().backward()
    for part in parts:
        assert part.B.grad[:, 2:4].abs().max() > 0
        assert part.C.grad[:2, 2:4].abs().max() > 0  # the new columns of U
        assert not part.A.grad[4:].any()
        assert not part.B.grad[:, 4:].any()
    assert {tuple(part.A[4:].unique().tolist()) for part in parts} == {(0.0,)}


def test_the_start_is_the_weight_and_learns() -> None:
    model = net()
    TriAdaptLoRA(rank=3, most=4).parametrize(model)
    for _, layer, part in attached(model, GrowingLowRank):
        assert torch.equal(dense_weight(layer), layer.weight)
        assert part.rank == 1
    (model(X) - Y).square().sum().backward()
    assert all(part.B.grad[:, 0].abs().max() > 0 for _, _, part in attached(model, GrowingLowRank))


@pytest.mark.parametrize(
    ("threshold", "progress", "expected"),
    [("linear", 0.2, 1), ("linear", 0.6, 10), ("linear", 1.0, 20), ("exponential", 0.6, 4), ("exponential", 1.0, 20)],
)
def test_how_many_weights_gain_ranks(threshold: Any, progress: float, expected: int) -> None:
    """int(20 t) and int(20^t), t = (progress - 0.2) / 0.8, at least one."""
    assert TriAdaptLoRA(warmup=0.2, threshold=threshold).gaining(20, progress) == expected


def set_sizes(parts: list[GrowingLowRank], sizes: list[float]) -> None:
    """Give each C that Frobenius norm."""
    with torch.no_grad():
        for part, size in zip(parts, sizes, strict=True):
            part.C.zero_()
            part.C[0, 0] = size


def test_the_weights_whose_norm_over_rank_has_risen_most_gain_ranks() -> None:
    model, parts = grown(growth=2, period=1, warmup=0.0)
    method = TriAdaptLoRA(rank=3, first=2, most=5, growth=2, period=1, warmup=0.0, alpha=6.0)
    now = Now(step=1, steps=10)
    set_sizes(parts, [1.0, 4.0, 2.0])  # over rank 2: 0.5, 2, 1; the ranks lack 3, of which 0.1 * 3 are below one
    method.constrain(model, now)
    assert [part.rank for part in parts] == [2, 4, 2]
    set_sizes(parts, [1.2, 8.4, 2.6])  # 0.6, 2.1, 1.3: the third has risen most; only one rank is left to gain
    method.constrain(model, now)
    assert [part.rank for part in parts] == [2, 4, 3]
    set_sizes(parts, [50.0, 50.0, 50.0])
    method.constrain(model, now)
    assert [part.rank for part in parts] == [2, 4, 3]


def test_a_full_weight_leaves_its_turn_to_the_next() -> None:
    model, parts = grown(rank=4, most=5)
    parts[1].grow(3, None)
    method = TriAdaptLoRA(rank=4, first=2, most=5, period=1, warmup=0.0, alpha=6.0)
    set_sizes(parts, [1.0, 40.0, 2.0])
    method.constrain(model, Now(step=1, steps=10))
    assert [part.rank for part in parts] == [2, 5, 3]


def test_a_run_reaches_the_target_and_goes_on_bitwise(tmp_path: Path) -> None:
    methods = [TriAdaptLoRA(rank=3, most=6, period=3, warmup=0.2), AdamW(lr=3e-2)]

    def go(folder: str, stop: int = 0) -> Any:
        options = {"steps": 60, "batch_size": 10, "folder": tmp_path / folder}
        return train(net(), (X, Y), methods=methods, on_step=lambda now: now.step == stop, **options)

    whole = go("whole")
    assert whole.history[-1]["objective"] < 0.5 * whole.history[0]["objective"]
    ranks = [part.rank for _, _, part in attached(whole.model, GrowingLowRank)]
    assert sum(ranks) == 9
    assert max(ranks) <= 6
    go("halves", stop=35)
    again = go("halves").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.model.state_dict().items())


def test_folded_and_as_a_peft_file(tmp_path: Path) -> None:
    model, parts = grown()
    parts[1].grow(2, None)
    output: Tensor = model(X).detach()
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(net(), tmp_path)(X), output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fold(model)(X), output, rtol=1e-4, atol=1e-5)


def test_bad_input() -> None:
    for given, says in (
        ({"rank": 2, "first": 3}, "TriAdaptLoRA needs first <= rank <= most, not first=3, rank=2 and most=32."),
        ({"rank": 2, "first": 2}, "TriAdaptLoRA.first is 2, and so is rank: give a smaller first, or use LoRA."),
        ({"rank": 7}, "TriAdaptLoRA.rank is 7, but '4' has a (6, 7) weight: use at most 6."),
    ):
        with pytest.raises(BadInput) as problem:
            TriAdaptLoRA(**given).parametrize(net())
        assert str(problem.value) == says
