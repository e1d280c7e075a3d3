"""Bone, MiSS and RandLoRA: beside peft on the same weights, and against sums written by the letter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from networks import net
from plait import train
from plait.errors import BadInput
from plait.method import Method
from plait.parametrize.base import attached, dense_weight
from plait.parametrize.block import BlockAffine, Bone, SharedBlock
from plait.parametrize.folding import fold
from plait.parametrize.random_bases import RandLoRA, RandomBases

X = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))


def attach(method: Method) -> nn.Module:
    model = net()
    method.parametrize(model)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=draw))
    return model


@pytest.mark.parametrize(("kind", "theirs", "rank"), [("affine", "bat", 4), ("shared", True, 4), ("shared", True, 5)])
def test_bone_computes_what_peft_computes(kind: Any, theirs: Any, rank: int) -> None:
    from peft import MissConfig, get_peft_model

    config = MissConfig(r=rank, target_modules=["0", "2"], init_weights=theirs)
    other = get_peft_model(net(), config)
    ours = attach(Bone(rank=rank, kind=kind))
    for name, _, part in attached(ours, BlockAffine if kind == "affine" else SharedBlock):
        block = other.base_model.model.get_submodule(name).miss_block.default
        with torch.no_grad():
            block.copy_(part.B if kind == "affine" else part.B.t())
    torch.testing.assert_close(ours(X), other(X), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours(X), net()(X), atol=1e-2)
    torch.testing.assert_close(fold(copy.deepcopy(ours))(X), ours(X), rtol=1e-5, atol=1e-5)


def test_bone_by_the_letter() -> None:
    model = attach(Bone(rank=4))
    for name, layer, part in attached(model, BlockAffine):
        weight = net().get_submodule(name).weight.detach()
        expected = weight.clone()
        for o in range(weight.shape[0] // 4):
            for i in range(weight.shape[1] // 4):
                block = weight[4 * o : 4 * o + 4, 4 * i : 4 * i + 4]
                expected[4 * o : 4 * o + 4, 4 * i : 4 * i + 4] = block + block @ part.B[o] + part.B[o]
        torch.testing.assert_close(dense_weight(layer), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [3, 4])
def test_randlora_by_the_letter(rank: int) -> None:
    model = attach(RandLoRA(rank=rank, alpha=2.0))
    for name, layer, part in attached(model, RandomBases):
        weight = net().get_submodule(name).weight.detach()
        total = torch.zeros(sorted(weight.shape)[::-1])
        for j in range(len(part.l)):
            total += part._bases.b[j] @ torch.diag(part.l[j]) @ part._bases.a @ torch.diag(part.g[j])
        expected = weight + 2 / rank * (total if weight.shape[0] >= weight.shape[1] else total.T)
        torch.testing.assert_close(dense_weight(layer), expected, rtol=1e-4, atol=1e-5)
        assert torch.linalg.matrix_rank(dense_weight(layer) - weight) == min(weight.shape)


@pytest.mark.parametrize("name", ["0", "2"])
def test_randlora_is_pefts_sum_when_the_bases_are_paired(name: str) -> None:
    """peft flattens B as [large, (j, r)] and A as [(r, j), small]: with one base the orders are the same."""
    from peft import RandLoraConfig, get_peft_model

    config = RandLoraConfig(r=8, randlora_alpha=4, target_modules=[name], projection_prng_key=0)
    other = get_peft_model(net(), config).base_model.model.get_submodule(name)
    ours = attach(RandLoRA(rank=8, alpha=4.0, where=name))  # 12 -> 8 and 8 -> 20: one base each
    ((_, layer, part),) = attached(ours, RandomBases)
    assert len(part.l) == 1
    with torch.no_grad():
        for bases in (other.randlora_A, other.randlora_B):
            bases["default"] = bases["default"].float()  # drawn in bfloat16
        part._bases.a.copy_(other.randlora_A["default"][:, 0])
        part._bases.b.copy_(other.randlora_B["default"][:, :1].transpose(0, 1))
        other.randlora_lambda.default.copy_(part.l.T)
        other.randlora_gamma.default.copy_(part.g)
    inputs = X[:, : layer.in_features]
    torch.testing.assert_close(layer(inputs), other(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("into", "out"), [(12, 20), (20, 12)])
def test_randlora_without_and_with_the_weight_formed_is_the_same(into: int, out: int) -> None:
    """Few tokens go through the factors, many through the weight: one batch of many gives what its parts give."""
    layer = nn.Linear(into, out)
    RandLoRA(rank=5, alpha=2.0).parametrize(nn.Sequential(layer))
    ((_, _, part),) = attached(layer, RandomBases)
    with torch.no_grad():
        part.l.normal_(generator=torch.Generator().manual_seed(1))
    many = torch.randn(64, into, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert part.fast(layer, many, lambda: layer(many)) is None
    assert part.fast(layer, many[:4], lambda: layer(many[:4])) is not None
    found = []
    for parts in ([many], many.split(4)):
        output = torch.cat([layer(x) for x in parts])
        found.append([output, *torch.autograd.grad(output.square().sum(), [many, part.l, part.g])])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-4)


def test_randlora_is_trained_after_it_was_used_for_inference_and_is_mapped_over() -> None:
    layer = nn.Linear(8, 8).double()
    RandLoRA(rank=2).parametrize(nn.Sequential(layer))
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.plait.randlora.l.grad is not None  # type: ignore[union-attr]
    torch.testing.assert_close(torch.vmap(layer)(x.unsqueeze(1)).squeeze(1), layer(x))


def test_layers_of_one_size_share_their_bases() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    RandLoRA(rank=2).parametrize(model)
    first, second = (part for _, _, part in attached(model, RandomBases))
    assert first._bases is second._bases
    assert not any("bases" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Bone(rank=5), "Bone.rank is 5, but '0' has a 8 x 12 matrix: give a divisor of both sides, or kind='shared'."),
        (Bone(rank=13, kind="shared"), "Bone.rank is 13, but '0' has 12 inputs: use at most 12."),
        (RandLoRA(rank=9), "RandLoRA.rank is 9, but '0' has a (8, 12) weight: use at most 8."),
    ],
)
def test_blocks_that_do_not_fit(method: Method, says: str) -> None:
    with pytest.raises(BadInput) as problem:
        train(net(), (X, torch.zeros(10, 20)), methods=[method], steps=1)
    assert str(problem.value) == says
