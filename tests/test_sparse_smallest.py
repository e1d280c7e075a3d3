"""SaRA: by the letter of its equations, beside the authors' code, and how entries are closed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks import net
from plait import AdamW, train
from plait.errors import BadInput
from plait.layers import matrix
from plait.math.selection import nth_smallest
from plait.method import Now
from plait.parametrize.base import attached, dense_weight
from plait.parametrize.sparse_smallest import SaRA, SmallestEntries

X = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randn(10, 20, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_nth_smallest_of_many_tensors(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(7, 9, generator=draw).to(dtype),
        torch.zeros(4),
        torch.randn(300, generator=draw).t() * 1e-20,
    ]
    every = torch.cat([t.float().abs().flatten() for t in tensors]).sort().values
    for n in (1, 4, 5, 100, 333, len(every)):
        assert nth_smallest(lambda: tensors, n) == every[n - 1].item()


def test_it_is_its_equation() -> None:
    model = net()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}
    theta = torch.cat([w.abs().flatten() for w in weights.values()]).sort().values[51 - 1].item()
    SaRA(share=0.2).parametrize(model)
    parts = list(attached(model, SmallestEntries))
    assert sum(len(part.values) for _, _, part in parts) == 51
    for name, layer, part in parts:
        small = weights[f"{name}.weight"].abs() <= theta
        assert part.support.tolist() == small.flatten().nonzero().flatten().tolist()
        with torch.no_grad():
            part.values.copy_(torch.randn(part.values.shape, generator=torch.Generator().manual_seed(5)))
        expected = weights[f"{name}.weight"].clone()
        expected[small] += part.values
        assert torch.equal(dense_weight(layer), expected)


def test_the_penalty_is_the_nuclear_norm_of_what_is_trained() -> None:
    """Value and gradient against autograd through torch's decomposition, to 1e-4 of the largest."""
    layer = nn.Linear(12, 8)
    SaRA(share=0.6).parametrize(layer)
    ((_, _, part),) = attached(layer, SmallestEntries)
    with torch.no_grad():
        part.values.copy_(torch.randn(part.values.shape, generator=torch.Generator().manual_seed(5)))
        part.open[::5] = False
    value = part.low_rank_penalty(matrix(layer, layer.weight).detach())
    value.backward()
    values = part.values.detach().clone().requires_grad_()
    whole = torch.zeros(96).index_put((part.support.long(),), layer.weight.flatten()[part.support.long()] + values)
    masked = whole * torch.zeros(96).index_put((part.support.long(),), part.open.float())
    oracle = torch.linalg.svdvals(masked.view(8, 12)).sum()
    oracle.backward()
    torch.testing.assert_close(value, oracle, rtol=1e-5, atol=0)
    torch.testing.assert_close(part.values.grad, values.grad, rtol=1e-4, atol=1e-4)
    assert not part.values.grad[::5].any()


def test_it_computes_what_the_authors_code_does() -> None:
    """Their AdamW of optim/adamw2.py, lr=0.01, threshold at the smallest 0.2, progressive_iter=3, lambda_rank=0.02 and
    no weight decay, on one matrix, 6 steps. To 2e-5.
    """
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 70, generator=draw), torch.randn(16, 66, generator=draw)
    layer = nn.Linear(70, 66, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(66, 70, generator=draw) / 8)
    seen: list[tuple[int, float, float]] = []
    last: list[float] = []

    def look(now: Now) -> None:
        ((_, found, part),) = attached(now.model, SmallestEntries)
        change = dense_weight(found).detach() - found.weight
        seen.append((int(part.open.sum()), change.norm().item(), change.sum().item()))
        last[:] = change.flatten()[part.support.long()][:8].tolist()

    methods = [SaRA(share=0.2, strength=0.02), AdamW(lr=0.01, weight_decay=0.0)]
    loss = lambda output, target, now: (output - target).square().sum(-1)  # noqa: E731
    train(layer, (x, y), loss, methods, steps=6, batch_size=16, on_step=look)
    assert [count for count, _, _ in seen] == [924, 924, 515, 515, 515, 515]
    norms, sums = [norm for _, norm, _ in seen], [total for _, _, total in seen]
    assert norms == pytest.approx([0.303973, 0.597224, 0.885735, 1.048386, 1.221582, 1.399821], rel=2e-5)
    assert sums == pytest.approx([0.2, 0.370573, 0.588752, 0.620444, 0.652323, 0.682335], abs=2e-4)
    theirs = [0.059362, 0.028868, 0.029986, 0.029975, -0.029969, 0.060012, 0.059484, 0.029975]
    assert last == pytest.approx(theirs, abs=2e-5)


def test_what_has_come_to_matter_is_closed_and_stays() -> None:
    held: list[Tensor] = []

    def look(now: Now) -> None:
        ((_, layer, part),) = attached(now.model, SmallestEntries)
        if now.step < 4:
            assert part.open.all()
        elif now.step == 4:
            above = dense_weight(layer).detach().flatten()[part.support.long()].abs() > part.threshold
            assert torch.equal(part.open, ~above)
            assert 0 < int(above.sum()) < len(above)
        if now.step >= 4:
            held.append(dense_weight(layer).detach().flatten()[part.support.long()][~part.open])

    methods = [SaRA(share=0.4, where="0"), AdamW(lr=3e-2)]
    train(net(), (X, Y), methods=methods, steps=8, batch_size=10, on_step=look)
    assert len(held) == 5
    assert all(torch.equal(h, held[0]) for h in held)


def test_one_stage_closes_nothing() -> None:
    def look(now: Now) -> None:
        assert all(part.open.all() for _, _, part in attached(now.model, SmallestEntries))

    train(net(), (X, Y), methods=[SaRA(stages=1), AdamW(lr=3e-2)], steps=6, batch_size=10, on_step=look)


def test_a_stronger_penalty_leaves_a_lower_nuclear_norm() -> None:
    def left(strength: float) -> float:
        methods = [SaRA(share=0.5, strength=strength, where="0", stages=1), AdamW(lr=1e-2, weight_decay=0.0)]
        model = train(net(), (X, Y), methods=methods, steps=60, batch_size=10).model
        ((_, layer, part),) = attached(model, SmallestEntries)
        return part.low_rank_penalty(layer.weight.detach()).item()

    assert left(0.3) < 0.7 * left(0.0)


def test_no_matrix_is_kept_for_the_backward_pass() -> None:
    model = net()
    SaRA(share=0.2, where="0").parametrize(model)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model[0](X[:2])
    own = [t for t in kept if t.data_ptr() != model[0].weight.data_ptr()]
    assert max(t.numel() for t in own) == 24 < model[0].weight.numel()


def test_a_threshold_below_all_weights() -> None:
    with pytest.raises(BadInput) as problem:
        train(net(), (X, Y), methods=[SaRA(threshold=1e-9)], steps=1)
    assert str(problem.value) == "SaRA.threshold is 1e-09, below all weights of its targets: give more, or a share."


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_nothing_or_everything(share: float) -> None:
    with pytest.raises(BadInput, match=r"SaRA.share must be in \(0, 1\)"):
        SaRA(share=share)
