"""SPT: the allocation against a count of every list from the definition, the authors' code, its paths, its state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from plait.batch import Batch
from plait.errors import BadInput
from plait.initialize.sensitivity import SPT
from plait.method import Method, Now
from plait.parametrize.allocated import Allocated
from plait.parametrize.base import attached, dense_weight, run
from plait.parametrize.folding import fold
from plait.parametrize.freeze import mark_fresh
from plait.parametrize.low_rank import LoRA
from plait.train import train

DATA = (torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3)


def net() -> nn.Module:
    torch.manual_seed(0)
    return mark_fresh(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)), "4")


def started(model: nn.Module, *methods: Method, data: Any = DATA, size: int = 16) -> nn.Module:
    """Return the model after the starts, before any step."""
    train(model, data, methods=methods, steps=1, batch_size=size, on_step=lambda now: True, seed=3)
    return model


def sensitivities(model: nn.Module, batches: int) -> dict[str, Tensor]:
    """s_n = sum over batches of g_n^2, with plain autograd, on the batches that calibration draws."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3 + 7919))
    made: dict[str, Tensor] = {}
    for number in range(batches):
        rows = order[(torch.arange(16) + 16 * number) % 64]
        model.zero_grad()
        F.cross_entropy(model.eval()(DATA[0][rows]), DATA[1][rows]).backward()
        for name, p in model.named_parameters():
            if not name.startswith("4"):
                made[name] = made.get(name, 0) + p.grad.double() ** 2
    return made


def oracle(s: dict[str, Tensor], budget: int, rank: int, threshold: float) -> tuple[set[str], dict[str, set[int]]]:
    """Try every tau: (what is trained as a whole, the places of what is trained one by one) of the last that fits."""
    flat = torch.cat([each.flatten() for each in s.values()])
    best: tuple[set[str], dict[str, set[int]]] = (set(), {})
    for tau in range(1, len(flat) + 1):
        bound = flat.sort(descending=True).values[tau - 1]
        masks = {name: each.flatten() >= bound for name, each in s.items()}
        cost, whole, single = 0, set(), {}
        for name, mask in masks.items():
            vector, size = s[name].dim() == 1, rank * sum(s[name].shape)
            if (mask.sum() >= 0.2 * len(mask)) if vector else (mask.sum() >= threshold * size):
                whole.add(name)
                cost += len(mask) if vector else size
            elif mask.any():
                single[name] = set(mask.nonzero().flatten().tolist())
                cost += int(mask.sum())
        if cost > budget:
            break
        best = (whole, single)
    return best


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
@pytest.mark.parametrize("threshold", [1.0, 0.3])
def test_the_allocation_is_that_of_the_longest_list_that_fits(share: float, threshold: float) -> None:
    s = sensitivities(net(), 3)
    whole, single = oracle(s, int(share * sum(each.numel() for each in s.values())), 2, threshold)
    model = started(net(), SPT(share=share, rank=2, threshold=threshold, batches=3))
    for name, _, part in attached(model, Allocated):
        weight, bias = f"{name}.weight", f"{name}.bias"
        assert (part.low_rank() is not None) == (weight in whole)
        assert set(part.support.tolist()) == single.get(weight, set())
        expected = set(range(part.out)) if bias in whole else single.get(bias, set())
        assert set(part.bias_support.tolist()) == expected
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".plait." in n)
    assert 0 < trained <= int(share * sum(each.numel() for each in s.values()))


def test_layers_taken_in_groups_give_what_all_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for room in (100.0, 1e-9):
        monkeypatch.setattr("plait.initialize.sensitivity.SHARE", room)
        model = started(net(), SPT(share=0.3, rank=1))
        seen.append({name: t for name, t in model.state_dict().items() if ".plait." in name})
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert len(seen[0]) == 12


def made(layer: nn.Module, form: str) -> tuple[nn.Module, nn.Module]:
    """Return (the layer before, one with an allocated update whose numbers are drawn)."""
    model = nn.Sequential(layer)
    before = copy.deepcopy(model)
    SPT(share=1.0).parametrize(model)
    part: Allocated = next(attached(model, Allocated))[2]
    draw = torch.Generator().manual_seed(5)
    places = torch.randperm(part.out * part.into, generator=draw)[:7]
    bias = torch.tensor([1, 3]) if getattr(layer, "bias", None) is not None else None
    if form == "low rank":
        part.allocate(torch.randn(2, part.into, generator=draw), None, bias)
    elif form == "sparse":
        part.allocate(None, places, bias)
    else:
        part.allocate(None, None, bias)
    with torch.no_grad():
        for p in part.parameters():
            p.add_(torch.randn(p.shape, generator=draw))
    return before, model


LAYERS: dict[str, tuple[Any, Any]] = {
    "Linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), (3, 4, 6)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 2, stride=2), (2, 3, 6, 6)),
    "Conv2d with groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "Embedding": (lambda: nn.Embedding(7, 5, padding_idx=0), None),
}


@pytest.mark.parametrize(
    ("layer", "form"),
    [(layer, form) for layer in LAYERS for form in ("low rank", "sparse")] + [("Linear", "none"), ("Conv2d", "none")],
)
def test_paths_folding_and_state(layer: str, form: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    before, model = made(build().double(), form)
    target, part = model[0], next(attached(model, Allocated))[2]
    x = torch.randint(0, 7, (3, 4)) if shape is None else torch.randn(shape, dtype=torch.float64)
    expected = before[0].weight.detach().clone()
    flat = expected.t() if layer in ("Conv1D", "Embedding") else expected.flatten(1)
    update = part.B.detach() @ part.A.detach()  # by hand: the definition
    for place, value in zip(part.support.tolist(), part.values.tolist(), strict=True):
        update[place // part.into, place % part.into] += value
    expected = (flat + update).t() if layer in ("Conv1D", "Embedding") else (flat + update).view(expected.shape)
    torch.testing.assert_close(dense_weight(target), expected)
    bias = getattr(target, "bias", None)
    if bias is not None:
        bias = bias.detach().clone()
        bias[[1, 3]] += part.bias_values.detach()
    torch.testing.assert_close(model(x), run(target, x, expected, bias))
    model(x).square().sum().backward()
    grads = {name: p.grad for name, p in part.named_parameters() if p.numel()}
    model.zero_grad()
    run(
        target, x, dense_weight(target), None if bias is None else part.dense_bias(target.bias)
    ).square().sum().backward()
    for name, p in part.named_parameters():
        if p.numel():
            torch.testing.assert_close(grads[name], p.grad)
    other = nn.Sequential(build().double())
    SPT(share=1.0).parametrize(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    other.load_state_dict(before.state_dict())  # strict
    torch.testing.assert_close(fold(model)(x), run(before[0], x, expected, bias))


def test_only_what_has_numbers_is_trained() -> None:
    """DistributedDataParallel waits for the gradient of each parameter that is trained."""
    model = started(net(), SPT(share=0.2, rank=1))
    parts = [p for name, p in model.named_parameters() if ".plait." in name]
    assert {p.requires_grad for p in parts if p.numel()} == {True}
    assert {p.requires_grad for p in parts if not p.numel()} == {False}


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_it_trains_folds_and_goes_on_bitwise_beside_another_adapter(share: float, tmp_path: Path) -> None:
    def go(steps: int, folder: Path) -> nn.Module:
        methods = [LoRA(rank=1), SPT(share=share, rank=1)]
        return train(net(), DATA, methods=methods, steps=steps, batch_size=16, folder=folder, save_every=2).model

    whole = go(6, tmp_path / "whole")
    go(4, tmp_path / "halves")
    again = go(6, tmp_path / "halves")
    for (key, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    output = whole.eval()(DATA[0])
    torch.testing.assert_close(fold(whole)(DATA[0]), output, rtol=1e-5, atol=1e-6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.q, self.attn.proj = nn.Linear(768, 768), nn.Linear(768, 768)
        self.mlp.fc1 = nn.Linear(768, 768)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn.proj(torch.tanh(self.attn.q(x)))
        return x + torch.relu(self.mlp.fc1(x))


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block()]), nn.Linear(768, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](x))


# What ziplab/SPT's get_sensitivity (engine.py) chose on the CPU, in float64, for `Vision` and its two batches, from
# seed 0, at rank 64, alpha 10 and beta 5: by how many numbers it trains (without the 768 of the class token), which are
# the budgets that its sweep comes to, the matrices of low rank, the biases trained whole, the number of places that are
# trained one by one, and the sum of these places, counted through the tensors that have any. All must agree exactly.
Q, PROJ, FC1 = "blocks.0.attn.q", "blocks.0.attn.proj", "blocks.0.mlp.fc1"
THEIRS = {
    101030: ([FC1], [], 2726, 1163257118),
    204808: ([Q, FC1], [], 8200, 2319200258),
    297216: ([Q, PROJ, FC1], [Q, PROJ, FC1], 0, 0),
}


@pytest.mark.parametrize("budget", THEIRS)
def test_the_authors_code_chooses_the_same(budget: int) -> None:
    torch.manual_seed(0)
    model: Any = mark_fresh(Vision(), "head").double()
    batches = [Batch.of(torch.randn(8, 768).double(), torch.arange(8) % 5) for _ in range(2)]
    numbers = sum(p.numel() for name, p in model.named_parameters() if "head" not in name)
    method = SPT(share=(budget + 0.5) / numbers, rank=64, threshold=0.1, batches=2)
    method.parametrize(model)

    def ask(model: nn.Module, now: Now) -> Tensor:
        loss = F.cross_entropy(model(now.batch.inputs), now.batch.target)
        loss.backward()
        return loss.detach()

    method.initialize(model, Now(ask=ask, calibration=lambda count: iter(batches[:count])))
    whole, biases, single = [], [], []
    for name, _, part in attached(model, Allocated):
        whole += [name] if part.low_rank() is not None else []
        biases += [name] if len(part.bias_support) == 768 else []
        single += [] if len(part.A) else [(768 * 768, part.support)]
        single += [] if len(part.bias_support) == 768 else [(768, part.bias_support)]
    starts = torch.tensor([0, *(size for size, _ in single)]).cumsum(0).tolist()
    places = [int((support.long() + start).sum()) for start, (_, support) in zip(starts, single, strict=False)]
    chosen = (whole, biases, sum(len(support) for _, support in single), sum(places))
    assert chosen == THEIRS[budget]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (SPT(share=0.001), "SPT.share is 0.001, which leaves nothing to choose: give more."),
        (SPT(threshold=0.0), "SPT.threshold is 0.0, which leaves nothing to choose: give more."),
    ],
)
def test_refusals(method: SPT, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        train(net(), DATA, methods=[method], steps=1)
    assert str(caught.value) == says


def test_shared_weights_and_layers_without_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].weight = model[0].weight
    with pytest.raises(BadInput, match="SPT would train the weight of '0', which '1' shares, for the one alone"):
        train(model, DATA, methods=[SPT(share=0.5)], steps=1)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(BadInput, match="SPT got no gradient for 'unused': nothing of the loss depends on it"):
        train(Odd(), DATA, methods=[SPT(share=0.5)], steps=1)
