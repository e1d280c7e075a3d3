"""SNELLA: by the letter of its equations, beside the authors' code, and how weights compete for entries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from networks import net
from plait import SNELLA, AdamW, train
from plait.errors import BadInput
from plait.method import Now
from plait.parametrize.base import attached, dense_weight
from plait.parametrize.folding import fold
from plait.parametrize.kernelized import KernelDelta, allotted, merged

X = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))


def one(kept: int = 24) -> tuple[nn.Module, KernelDelta]:
    """The first layer under SNELLA of rank 6, every number drawn anew, with so many entries left."""
    model = net()
    SNELLA(rank=6, where="0").parametrize(model)
    ((_, layer, part),) = attached(model, KernelDelta)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in (part.A, part.B):
            p.copy_(torch.randn(p.shape, generator=draw))
        for p, value in ((part.mixing, 0.7), (part.temperature, 0.3), (part.offset, -0.05)):
            p.fill_(value)
        part.kept.fill_(kept)
        layer.weight.zero_()
        layer.bias.zero_()
    return layer, part


def by_the_letter(part: KernelDelta, kept: int) -> torch.Tensor:
    """K_ji = D_ji + a softmax_j(D_ji / c) + b, and of it the entries of largest magnitude."""
    a, b = part.A.tolist(), part.B.tolist()
    mixing, temperature, offset = (p.item() for p in (part.mixing, part.temperature, part.offset))
    kernel = [[0.1 * (math.dist(a[0][i], b[0][j]) - math.dist(a[1][i], b[1][j])) for i in range(12)] for j in range(8)]
    exponentials = [[math.exp(number / temperature) for number in row] for row in kernel]
    for i in range(12):
        total = sum(exponentials[j][i] for j in range(8))
        for j in range(8):
            kernel[j][i] += mixing * exponentials[j][i] / total + offset
    sizes = sorted((abs(number), j, i) for j, row in enumerate(kernel) for i, number in enumerate(row))
    survivors = {(j, i) for _, j, i in sizes[len(sizes) - kept :]}
    return torch.tensor([[kernel[j][i] if (j, i) in survivors else 0.0 for i in range(12)] for j in range(8)])


@pytest.mark.parametrize("kept", [96, 24, 1, 0])
def test_by_the_letter(kept: int) -> None:
    layer, part = one(kept)
    expected = by_the_letter(part, kept)
    torch.testing.assert_close(dense_weight(layer), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(X), X @ expected.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fold(nn.Sequential(layer))(X), X @ expected.t(), rtol=1e-4, atol=1e-4)


def test_it_computes_what_the_authors_code_does() -> None:
    """Their SNELLA(12, 8, init_thres=0.75, q_dim=6) with these numbers in it, its kept entries not multiplied by their
    own magnitude: the kernel of the first input, the kernel's norm, then with the 24 entries that their quantile keeps
    the first output, the norm of all outputs, and norms of gradients of the sum of their squares; float32, hence 1e-4.
    """
    layer, part = one()
    column = [0.0692827, 0.0299818, 0.0786297, 0.2166692, -0.0313855, 0.1261288, -0.0160495, -0.0431834, 0.1186234]
    assert part.kernel()[0, :9].tolist() == pytest.approx(column, abs=1e-6)
    assert part.kernel().norm().item() == pytest.approx(1.2890289, rel=1e-5)
    assert part.delta().count_nonzero() == 24
    output = layer(X)
    output.square().sum().backward()
    theirs = [-0.4348801, 0.2364809, 0.0682336, 0.3583471, -0.2695739, 0.0704355, 0.2171616, -0.0447384]
    assert output[0].tolist() == pytest.approx(theirs, abs=1e-5)
    assert output.norm().item() == pytest.approx(3.1411064, rel=1e-5)
    norms = [p.grad.norm().item() for p in (part.A, part.B, part.mixing, part.temperature, part.offset)]
    assert norms == pytest.approx([4.3580441, 4.0101671, 9.8579006, 9.6621208, 44.9109420], rel=1e-4)


def test_training_starts_exactly_at_the_weight_and_every_factor_learns_from_the_first_step() -> None:
    model = net()
    SNELLA(rank=4).parametrize(model)
    for _, layer, part in attached(model, KernelDelta):
        assert torch.equal(dense_weight(layer), layer.weight)
        assert not part.kernel().any()
    model(X).square().sum().backward()
    for _, _, part in attached(model, KernelDelta):
        assert all(p.grad.abs().max() > 0 for p in (part.A, part.B, part.mixing, part.offset))


def test_the_merged_matrix_has_a_higher_rank_than_its_factors() -> None:
    _, part = one(96)
    assert torch.linalg.matrix_rank(part.delta(), rtol=1e-3) == 8 > 2 * part.A.shape[2]


def test_no_matrix_of_the_weights_size_is_kept_for_the_backward_pass() -> None:
    model, kept = nn.Sequential(nn.Linear(60, 50)), []
    SNELLA(rank=2).parametrize(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(torch.randn(3, 60))
    assert max(t.numel() for t in kept if t.data_ptr() != model[0].weight.data_ptr()) <= 3 * 60


def test_it_can_be_differentiated_twice() -> None:
    layer, part = one()
    held = [part.A.double(), part.B.double()]

    def output(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        made = {"plait.snella.A": a, "plait.snella.B": b}
        result: torch.Tensor = torch.func.functional_call(layer.double(), made, (X[:2].double(),))
        return result

    inputs = tuple(p.detach().requires_grad_() for p in held)
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


# -- weights compete ---------------------------------------------------------------------------------------------------
def test_entries_are_allotted_in_proportion_and_never_beyond_a_weight() -> None:
    assert allotted([1.0, 1.0, 2.0], [100, 100, 100], 40) == [10, 10, 20]
    assert allotted([9.0, 1.0], [10, 100], 50) == [10, 40]
    assert allotted([0.0, 0.0], [30, 30], 20) == [10, 10]
    assert allotted([1.0, 0.0, 0.0], [5, 10, 30], 25) == [5, 5, 15]
    assert allotted([1.0, 2.0], [3, 4], 100) == [3, 4]
    assert sum(allotted([0.3, 0.33, 0.37], [50, 60, 70], 101)) == 101


@pytest.mark.parametrize(("progress", "kept"), [(0.0, 1000), (0.25, 1000), (0.5, 300), (0.75, 200), (1.0, 200)])
def test_the_share_that_is_kept_falls_with_the_cube(progress: float, kept: int) -> None:
    assert SNELLA(sparsity=0.8, warmup=0.25, settle=0.25).volume(progress, 1000) == kept


def test_importance_is_smoothed_sensitivity_times_its_uncertainty() -> None:
    """Two steps of I and U by hand, on weights whose gradients differ in size."""
    model = net()
    method = SNELLA(rank=2, sparsity=0.5, warmup=0.0, settle=0.5, sensitivity_decay=0.6, uncertainty_decay=0.7)
    method.parametrize(model)
    parts = [part for _, _, part in attached(model, KernelDelta)]
    now, draw = Now(step=9, steps=10), torch.Generator().manual_seed(0)
    means = [{"A": 0.0, "B": 0.0} for _ in parts]
    spreads = [{"A": 0.0, "B": 0.0} for _ in parts]
    for _ in range(2):
        for part, size in zip(parts, (1.0, 1.3), strict=True):
            for factor in (part.A, part.B):
                factor.grad = size * torch.randn(factor.shape, generator=draw)
        method.constrain(model, now)
        for part, mean, spread in zip(parts, means, spreads, strict=True):
            for name in ("A", "B"):
                factor = getattr(part, name)
                here = (factor * factor.grad).abs().detach()
                mean[name] = 0.6 * mean[name] + 0.4 * here
                spread[name] = 0.7 * spread[name] + 0.3 * (here - mean[name]).abs()
    scores = [sum(float((m[k] * s[k]).mean()) for k in ("A", "B")) for m, s in zip(means, spreads, strict=True)]
    assert [int(part.kept) for part in parts] == pytest.approx(allotted(scores, [96, 160], 128), abs=1)
    assert sum(int(part.kept) for part in parts) == 128


def test_a_run_ends_at_the_target_and_goes_on_bitwise(tmp_path: Any) -> None:
    target = torch.randn(10, 20, generator=torch.Generator().manual_seed(9))
    methods = [SNELLA(rank=4, sparsity=0.75), AdamW(lr=3e-2)]

    def go(folder: str, stop: int = 0) -> Any:
        options = {"steps": 60, "batch_size": 10, "folder": tmp_path / folder}
        return train(net(), (X, target), methods=methods, on_step=lambda now: now.step == stop, **options)

    whole = go("whole")
    assert whole.history[-1]["objective"] < 0.9 * whole.history[0]["objective"]
    assert sum(int(part.kept) for _, _, part in attached(whole.model, KernelDelta)) == 64
    for _, layer, part in attached(whole.model, KernelDelta):
        assert (dense_weight(layer) != layer.weight).sum() <= int(part.kept)
    go("halves", stop=35)
    again = go("halves").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.model.state_dict().items())


def test_bad_input() -> None:
    for given, says in (
        ({"rank": 3}, r"SNELLA\.rank is 3: give an even number, for two distances\."),
        ({"rank": 10}, r"SNELLA\.rank is 10, but '0' has a \(8, 12\) weight: use at most 8\."),
        ({"rank": 2, "warmup": 0.5, "settle": 0.5}, r"SNELLA\.warmup \+ settle is 1: leave part of the run"),
    ):
        with pytest.raises(BadInput, match=says):
            SNELLA(**given).parametrize(net())


def test_second_derivatives_are_finite_where_rows_meet() -> None:
    a, b = torch.randn(2, 3, 2, requires_grad=True), torch.randn(2, 4, 2)
    b[:, 0] = a.detach()[:, 1]
    b.requires_grad_()
    numbers = [torch.ones(1) for _ in range(3)]
    kernel = merged(1.0, a, b, *numbers)
    (first,) = torch.autograd.grad(kernel.square().sum(), a, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), (a, b))
    assert all(grad.isfinite().all() for grad in second)
