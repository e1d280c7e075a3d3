"""Sparse matrices on frozen weights: SpIEL by the letter and beside the authors' code, and what is held in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks import net
from plait import AdamW, LoRA, train
from plait.batch import Batch
from plait.errors import BadInput
from plait.method import Method, Now
from plait.parametrize.base import attached, dense_weight, run
from plait.parametrize.folding import fold
from plait.parametrize.sparse import SparseDelta
from plait.parametrize.sparse_growth import Growing, SpIEL

X = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))


def one(*methods: Method) -> tuple[nn.Module, Any]:
    """Return the first layer of the net under some methods, the values of the sparse matrix drawn anew."""
    model = net()
    for method in methods:
        method.parametrize(model)
    ((_, layer, part), *_) = attached(model, SparseDelta)
    with torch.no_grad():
        part.values.copy_(torch.randn(part.values.shape, generator=torch.Generator().manual_seed(7)))
    return layer, part


def test_a_sparse_delta_by_the_letter() -> None:
    layer, part = one(SpIEL(density=0.25, where="0"))
    weight = layer.weight.tolist()
    for value, place in zip(part.values.tolist(), part.support.tolist(), strict=True):
        weight[place // 12][place % 12] += value
    torch.testing.assert_close(dense_weight(layer), torch.tensor(weight))
    expected = X @ torch.tensor(weight).t() + layer.bias
    torch.testing.assert_close(layer(X), expected)
    torch.testing.assert_close(fold(nn.Sequential(layer))(X), expected)
    assert len(part.support.unique()) == len(part.values) == 24


def test_16_bit_weights_are_rounded_once() -> None:
    layer, part = one(SpIEL(density=0.25, where="0"))
    layer.to(torch.bfloat16)
    part.values.data = torch.randn(24, generator=torch.Generator().manual_seed(8))
    exact = layer.weight.double().flatten()
    exact[part.support.long()] += part.values.double()
    assert torch.equal(dense_weight(layer).flatten(), exact.to(torch.bfloat16))


def test_nothing_of_a_matrixs_size_is_kept_for_the_backward_pass() -> None:
    for methods in ([SpIEL(density=0.1, where="0")], [LoRA(rank=1, where="0"), SpIEL(density=0.1, where="0")]):
        layer, _ = one(*methods)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):
            layer(X[:2])
        own = [t for t in kept if t.data_ptr() != layer.weight.data_ptr()]
        assert max(t.numel() for t in own) == 24 < layer.weight.numel()


def test_it_can_be_differentiated_twice() -> None:
    layer, part = one(SpIEL(density=0.1, where="0"))
    layer, x = layer.double(), X[:3].double().requires_grad_()
    values = part.values.detach().double().requires_grad_()

    def output(x: Tensor, values: Tensor) -> Tensor:
        made: Tensor = torch.func.functional_call(layer, {"plait.spiel.values": values}, (x,))
        return made

    assert torch.autograd.gradcheck(output, (x, values))
    assert torch.autograd.gradgradcheck(output, (x, values))


@pytest.mark.parametrize("dense", [False, True])
def test_the_gradient_that_is_shown_is_that_of_the_whole_weight(dense: bool) -> None:
    layer, part = one(SpIEL(density=0.1, where="0"))
    seen: list[Tensor] = []
    part.seen = seen.append
    output = run(layer, X, dense_weight(layer)) if dense else layer(X)
    output.square().sum().backward()
    weight = dense_weight(layer).detach().requires_grad_()
    run(layer, X, weight).square().sum().backward()
    torch.testing.assert_close(seen[0], weight.grad)
    torch.testing.assert_close(part.values.grad, weight.grad.flatten()[part.support.long()])


# -- beside the authors' code -----------------------------------------------------------------------------------------
def steps_of(growth: Any, rule_for: Callable[[Any, Now, SpIEL], Any]) -> Iterator[tuple[list[int], list[float]]]:
    """Yield places and values after each of 9 of 20 steps, on the problem that the authors' code was run on."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 12, generator=draw), torch.randn(10, 8, generator=draw)
    layer = nn.Linear(12, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 12, generator=draw) / 3)
        layer.bias.copy_(torch.randn(8, generator=draw))
    method = SpIEL(density=16.5 / 96, growth=growth, every=6, estimate=3, rate=0.5)
    method.parametrize(layer)
    ((_, _, part),) = attached(layer, Growing)
    part.support.copy_(torch.randperm(96, generator=draw)[:16].sort().values)
    now = Now(steps=20, model=layer, batch=Batch.of(x, y))
    rule = now.optimizer = rule_for(part, now, method)

    def ask(model: nn.Module, now: Now) -> Tensor:
        loss = (model(x) - y).square().sum(-1).mean()
        loss.backward()
        return loss.detach()

    for _ in range(9):
        rule.zero_grad()
        method.gradient(ask)(layer, now)
        rule.step()
        method.constrain(layer, now)
        now.step += 1
        order = part.support.sort().indices
        yield part.support[order].tolist(), part.values[order].tolist()


class SM3(torch.optim.Optimizer):
    """g / sqrt(u), u = min(r, c) + g^2, with the accumulators that the method keeps."""

    def __init__(self, part: Any, now: Now, method: SpIEL) -> None:
        super().__init__([part.values], {})
        self.part, self.now, self.method = part, now, method
        self.rows, self.columns = [0.0] * 8, [0.0] * 12

    def step(self, closure: Any = None) -> None:
        rows, columns, gradient = list(self.rows), list(self.columns), self.part.values.grad
        for n, place in enumerate(self.part.support.tolist()):
            i, j = place // 12, place % 12
            u = min(self.rows[i], self.columns[j]) + gradient[n].item() ** 2
            rows[i], columns[j] = max(rows[i], u), max(columns[j], u)
            self.part.values.data[n] -= 0.05 * gradient[n] / u**0.5
        self.rows, self.columns = rows, columns
        kept = self.now.of(self.method)
        assert next(t for k, t in kept.items() if "rows" in k).tolist() == pytest.approx(rows, rel=1e-4)
        assert next(t for k, t in kept.items() if "columns" in k).tolist() == pytest.approx(columns, rel=1e-4)


def test_growth_by_gradients_agrees_with_the_authors_code() -> None:
    """SftSelector and SftAdamW(lr=0.05, eps=1e-12), 16 entries, 6 steps a round, 3 of estimation, 20 steps in all. Two
    things were set right in it: the second round's estimation began with the round, and the age of a grown entry, by
    which its means are corrected, was that of its means. To 2e-5.
    """
    seen = list(
        steps_of("gradients", lambda part, now, method: AdamW([part.values], lr=0.05, eps=1e-12, weight_decay=0.0))
    )
    first = [1, 5, 17, 26, 28, 38, 41, 47, 52, 55, 58, 71, 76, 79, 81, 93]
    assert seen[2][0] == seen[5][0] == first
    nonzero = [(i, pytest.approx(v, abs=2e-5)) for i, v in ((2, -0.149783), (10, -0.14981))]
    assert [(i, v) for i, v in enumerate(seen[2][1]) if v] == nonzero
    theirs = [
        *(-0.149821, 0.149698, -0.295488, -0.149633, 0.149748, 0.149288, 0.149853, 0.148708),
        *(-0.149258, 0.149055, -0.298373, -0.149295, 0.148962, -0.149255, -0.149139, -0.149458),
    ]
    assert seen[5][1] == pytest.approx(theirs, abs=2e-5)
    assert seen[8][0] == [1, 5, 17, 23, 26, 28, 38, 41, 45, 52, 58, 64, 71, 79, 81, 93]
    theirs = [
        *(-0.29693, 0.297342, -0.432658, 0.0, -0.297322, 0.296998, 0.294731, 0.297221),
        *(0.0, -0.294633, -0.443644, 0.0, -0.295392, -0.293824, -0.292747, -0.294628),
    ]
    assert seen[8][1] == pytest.approx(theirs, abs=2e-5)


def test_growth_by_momenta_agrees_with_the_authors_code() -> None:
    """SftSelector of kind sm3 with SftSM3(lr=0.05, eps=1e-12), otherwise as above. To 2e-5."""
    seen = list(steps_of("momenta", SM3))
    assert seen[2] == ([1, 5, 10, 13, 14, 23, 41, 45, 46, 49, 50, 53, 57, 59, 89, 94], [0.0] * 16)
    theirs = [
        *(-0.092442, 0.10261, -0.070714, 0.048158, -0.052741, -0.099635, 0.101011, 0.084174),
        *(-0.007159, 0.001241, 0.097653, -0.054917, 0.049188, -0.028866, -0.032893, 0.022602),
    ]
    assert seen[5][1] == pytest.approx(theirs, abs=2e-5)
    assert seen[8][0] == [1, 2, 5, 9, 10, 11, 13, 14, 17, 23, 41, 45, 50, 53, 57, 89]
    theirs = [
        *(-0.150482, 0.0, 0.164802, 0.0, -0.121514, 0.0, 0.083498, -0.075222),
        *(0.0, -0.156483, 0.161782, 0.136088, 0.158306, -0.097948, 0.07921, -0.052429),
    ]
    assert seen[8][1] == pytest.approx(theirs, abs=2e-5)


# -- in a run ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("growth", ["gradients", "momenta", "none"])
def test_places_move_where_they_should(growth: Any) -> None:
    seen: list[list[int]] = []

    def look(now: Now) -> None:
        ((_, _, part),) = attached(now.model, Growing)
        assert len(part.support.unique()) == len(part.support) == 24
        seen.append(part.support.sort().values.tolist())

    methods = [SpIEL(density=0.25, growth=growth, every=4, estimate=2, rate=0.5, where="0"), AdamW(lr=1e-2)]
    target = torch.randn(10, 20, generator=torch.Generator().manual_seed(9))
    train(net(), (X, target), methods=methods, steps=12, batch_size=5, on_step=look)
    moved = [number for number in range(1, 12) if seen[number] != seen[number - 1]]
    assert moved == ([] if growth == "none" else [1, 5, 9])


def test_every_kind_of_layer_grows() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(7, 5, padding_idx=0), "b": nn.Conv1d(5, 4, 3), "c": nn.Linear(4, 2)})
    model.forward = lambda x: model["c"](model["b"](model["a"](x).transpose(1, 2)).mean(2))  # type: ignore[method-assign]
    before: dict[str, Tensor] = {}

    def look(now: Now) -> None:
        found = {name: part.support.clone() for name, _, part in attached(now.model, Growing)}
        before.setdefault("step", torch.tensor(0))
        if now.step == 1:
            before.update(found)
        if now.step == 2:
            assert all(not torch.equal(found[name], before[name]) for name in ("a", "b"))

    tokens = torch.randint(0, 7, (12, 6), generator=torch.Generator().manual_seed(1))
    methods = [SpIEL(density=0.3, every=3, estimate=2), AdamW(lr=1e-2)]
    train(model, (tokens, tokens[:, 0] % 2), methods=methods, steps=3, batch_size=12, on_step=look)


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([SpIEL(every=4)], "SpIEL.every must be at least estimate, 5, not 4."),
        ([SpIEL(density=0.01)], "SpIEL.density is 0.01, no entry of the 8 x 12 matrix of '0': give more."),
    ],
)
def test_what_does_not_fit(methods: list[Method], says: str) -> None:
    with pytest.raises(BadInput) as problem:
        train(net(), (X, torch.zeros(10, 20)), methods=methods, steps=1)
    assert str(problem.value) == says
