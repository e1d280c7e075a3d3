"""DSEE: by the letter of its equation, and what it prunes, beside torch's own pruning, which the authors use."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from networks import net
from plait import AdamW, train
from plait.errors import BadInput
from plait.method import Method, Now
from plait.models.small import llama_tiny
from plait.parametrize.base import attached, dense_weight, run
from plait.parametrize.folding import fold
from plait.parametrize.pruned import DSEE, PrunedUpdate, where_low_rank_fails

X = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randn(10, 20, generator=torch.Generator().manual_seed(9))


def stirred(model: nn.Module, *methods: Method) -> list[tuple[str, nn.Module, PrunedUpdate]]:
    for method in methods:
        method.parametrize(model)
    draw, found = torch.Generator().manual_seed(7), list(attached(model, PrunedUpdate))
    with torch.no_grad():
        for _, _, part in found:
            for p in part.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) / 3)
    return found


@pytest.mark.parametrize("pattern", ["entries", "heads"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_it_is_its_equation(pattern: Any, kind: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 8) if kind == "Linear" else Conv1D(8, 12))
    ((_, layer, part),) = stirred(model, DSEE(rank=3, alpha=6.0, entries=24, pattern=pattern, heads=4, sparsity=0.3))
    part.mask.copy_(torch.rand(part.mask.shape, generator=torch.Generator().manual_seed(1)) > 0.4)
    weight = (layer.weight if kind == "Linear" else layer.weight.t()).tolist()
    a, b, values, support = (t.tolist() for t in (part.A, part.B, part.values, part.support))
    for i in range(8):
        for j in range(12):
            update = sum(b[i][r] * a[r][j] for r in range(3))
            update += values[support.index(12 * i + j)] if 12 * i + j in support else 0.0
            if pattern == "entries":
                weight[i][j] = part.mask[i, j].item() * weight[i][j] + 2.0 * update
            else:
                weight[i][j] = part.mask[i, 0].item() * (weight[i][j] + 2.0 * update)
    made = dense_weight(layer) if kind == "Linear" else dense_weight(layer).t()
    torch.testing.assert_close(made, torch.tensor(weight), rtol=1e-5, atol=1e-5)
    bias = layer.bias if pattern == "entries" else layer.bias * part.mask[:, 0]
    expected = X @ torch.tensor(weight).t() + bias
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fold(copy.deepcopy(model))(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["entries", "heads"])
def test_gradients_of_a_pruned_layer_are_those_of_the_definition(pattern: Any) -> None:
    model = nn.Sequential(nn.Linear(12, 8)).double()
    ((_, layer, part),) = stirred(model, DSEE(rank=3, entries=24, pattern=pattern, heads=4, sparsity=0.3))
    part.mask.copy_(torch.rand(part.mask.shape, generator=torch.Generator().manual_seed(1)) > 0.4)
    seen = []
    for fast in (True, False):
        x = X.double().requires_grad_()
        bias = part.dense_bias(layer.bias)
        output = layer(x) if fast else run(layer, x, dense_weight(layer), bias)
        layer.zero_grad()
        output.square().sum().backward()
        seen.append([x.grad, *(p.grad for p in part.parameters())])
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_matrix_is_kept_for_the_backward_pass() -> None:
    model = net()
    ((_, layer, part),) = stirred(model, DSEE(rank=1, entries=9, where="0"))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(X[:2])
    held = {layer.weight.data_ptr(), part.mask.data_ptr()}
    assert max(t.numel() for t in kept if t.data_ptr() not in held) == 24 < layer.weight.numel()


def test_the_places_are_those_that_low_rank_leaves() -> None:
    """A matrix of rank 2 with 12 entries moved is taken apart exactly."""
    draw = torch.Generator().manual_seed(0)
    low = torch.randn(30, 2, generator=draw) @ torch.randn(2, 25, generator=draw)
    chosen = torch.randperm(750, generator=draw)[:12].sort().values
    whole = low.flatten().index_add(0, chosen, 4 * torch.randn(12, generator=draw).sign()).view(30, 25)
    assert torch.equal(where_low_rank_fails(whole, 2, 12), chosen)


@pytest.mark.parametrize("score", ["update", "sum", "weight"])
def test_what_is_pruned_is_what_torch_prunes(score: Any) -> None:
    """prune.global_unstructured by L1Unstructured, over the matrices of scores, as in the authors' scripts."""
    model = net()
    found = stirred(model, DSEE(rank=2, alpha=6.0, entries=9, sparsity=0.3, score=score))
    scored = nn.ModuleList(nn.Linear(12, 8) if n == "0" else nn.Linear(8, 20) for n, _, _ in found)
    for module, (_, layer, part) in zip(scored, found, strict=True):
        delta = (dense_weight(layer) - layer.weight).detach()
        module.weight.data = {"update": delta / part.scale, "sum": layer.weight + delta, "weight": layer.weight}[
            score
        ].data
    prune.global_unstructured(
        [(module, "weight") for module in scored], pruning_method=prune.L1Unstructured, amount=int(0.3 * 256)
    )
    method = DSEE(rank=2, alpha=6.0, entries=9, sparsity=0.3, score=score)
    now = Now(step=5, steps=10)
    method.constrain(model, now)
    for module, (_, _, part) in zip(scored, found, strict=True):
        assert torch.equal(part.mask, module.weight_mask.bool())
    assert sum(int((~part.mask).sum()) for _, _, part in found) == int(0.3 * 256)


def test_whole_heads_are_pruned_in_queries_and_values_alike() -> None:
    torch.manual_seed(0)
    model = llama_tiny()
    attention = model.model.layers[0].self_attn
    rows, heads = attention.q_proj.out_features, 2
    where = "q_proj|v_proj" if attention.v_proj.out_features == rows else "q_proj|o_proj"
    found = stirred(model, DSEE(rank=2, entries=4, sparsity=0.5, pattern="heads", heads=heads, where=where))
    method = DSEE(rank=2, entries=4, sparsity=0.5, pattern="heads", heads=heads, where=where)
    updates = {name: part.update() for name, _, part in found}
    method.constrain(model, Now(step=9, steps=10))
    for number in range(len(model.model.layers)):
        block = [part for part in found if f"layers.{number}." in part[0]]
        sums = [
            sum(updates[n].abs()[h * rows // heads : (h + 1) * rows // heads].sum() for n, _, _ in block)
            for h in (0, 1)
        ]
        least = 0 if sums[0] < sums[1] else 1
        for _, layer, part in block:
            gone = ~part.mask[:, 0].view(heads, -1)
            assert gone[least].all()
            assert not gone[1 - least].any()
            assert not dense_weight(layer).view(heads, -1)[least].any()


def test_it_prunes_once_at_its_part_of_the_run() -> None:
    masks: list[Tensor] = []

    def look(now: Now) -> None:
        masks.append(torch.cat([part.mask.flatten() for _, _, part in attached(now.model, PrunedUpdate)]).clone())

    methods = [DSEE(rank=2, entries=9, sparsity=0.3, at=0.5), AdamW(lr=1e-2)]
    train(net(), (X, Y), methods=methods, steps=10, batch_size=10, on_step=look)
    assert [int((~mask).sum()) for mask in masks] == [0] * 4 + [int(0.3 * 256)] * 6


def test_what_was_never_updated_is_not_all_pruned() -> None:
    """Where the border is 0, ties stay."""
    model, method = net(), DSEE(rank=2, entries=9, sparsity=0.3)
    method.parametrize(model)
    method.constrain(model, Now(step=9, steps=10))
    assert all(part.mask.all() for _, _, part in attached(model, PrunedUpdate))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (DSEE(rank=9), "DSEE.rank is 9, but '0' has a (8, 12) weight: use at most 8."),
        (DSEE(rank=2, entries=97), "DSEE.entries is 97, but '0' has 8 x 12 entries: give fewer."),
        (
            DSEE(rank=2, entries=4, pattern="heads"),
            "DSEE.heads is 12, which does not divide the 8 outputs of '0'.",
        ),
        (
            DSEE(rank=2, entries=4, pattern="heads", heads=4),
            "DSEE.sparsity is 0.2, which prunes none of 4 heads: give more, or 0.",
        ),
    ],
)
def test_what_does_not_fit(method: Method, says: str) -> None:
    with pytest.raises(BadInput) as problem:
        method.check(net(), [method])
    assert str(problem.value) == says
