"""Batches that grow: the tests of AdAdaGrad against slow and obvious estimates and the authors' code, and the loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plait.batch import IGNORE, Batch
from plait.data.batch_size import AdaptiveBatchSize, Spread, pieces
from plait.errors import BadInput
from plait.integrations.lightning import PlaitCallback
from plait.step.adagrad import AdaGrad
from plait.train import train


def gradients(seed: int, count: int = 12) -> np.ndarray:
    """Gradients of examples [count, 7]: a mean and noise, different along and across it."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=7) + 1.5 * draw.normal(size=(count, 7))


def spread_of(examples: np.ndarray, count: int, *, keep: bool = True) -> Spread:
    """What is gathered from `count` pieces of the examples, over two weights, one of which some pieces do not reach."""
    spread = Spread()
    for rows in np.array_split(examples, count):
        mean = torch.tensor(rows.mean(0))
        share = torch.tensor(len(rows) / len(examples), dtype=torch.float64)
        spread.add([mean[:3], None, mean[3:]], share, len(rows), keep=keep)
    return spread


def oracle_sizes(g: np.ndarray, eta: float, theta: float, nu: float) -> tuple[float, float]:
    """The batch sizes that the two tests ask for, by the paper's equations, from the gradient of every example."""
    mean, b = g.mean(0), len(g)
    square = mean @ mean
    variance = ((g - mean) ** 2).sum() / (b - 1)
    inner = sum((row @ mean - square) ** 2 for row in g) / (b - 1)
    across = sum(((row - (row @ mean) / square * mean) ** 2).sum() for row in g) / (b - 1)
    return variance / (eta**2 * square), max(inner / (theta**2 * square**2), across / (nu**2 * square))


@pytest.mark.parametrize("seed", range(4))
def test_every_example_a_piece_is_the_papers_test(seed: int) -> None:
    g = gradients(seed)
    spread = spread_of(g, len(g))
    by_norm, by_inner = oracle_sizes(g, 0.5, 0.3, 0.6)
    norm = AdaptiveBatchSize(tolerance=0.5)
    inner = AdaptiveBatchSize(test="inner-product", tolerance=0.3, orthogonality=0.6)
    assert norm.needed(spread) == math.ceil(by_norm)
    assert inner.needed(spread) == math.ceil(by_inner)


def test_agrees_with_the_authors_code() -> None:
    """`norm_test` and `inner_product_orthogonality_test` of timlautk/AdAdaGrad at cc126fb, run outside the repository
    on `gradients(seed)` as one weight, eta 0.5, theta 0.3, nu 0.6: their Var_1 and ||g||^2, to 9 digits."""
    for seed, (variance, along, across, square) in enumerate(AUTHORS):
        spread = spread_of(gradients(seed), 12)
        assert spread.variance() == pytest.approx(variance, rel=1e-8)
        assert spread.along_and_across() == pytest.approx((along, across), rel=1e-8)
        assert spread.square == pytest.approx(square, rel=1e-8)


AUTHORS = [
    (15.9120704, 5.98253424, 13.4166248, 2.39738117),
    (11.9439185, 5.82266447, 10.7962499, 5.07347201),
    (14.8060929, 17.2929163, 13.6584098, 15.0676751),
    (16.4829012, 69.0779368, 13.7503773, 25.2799021),
]


@pytest.mark.parametrize("count", [3, 5])
def test_pieces_give_the_same_variance_on_average(count: int) -> None:
    """The variance of means over m examples, times m, is the examples' variance on average, for unequal pieces too."""
    draw = np.random.default_rng(0)
    found = [spread_of(draw.normal(size=(13, 7)) * 1.5, count, keep=False).variance() for _ in range(3000)]
    assert np.mean(found) == pytest.approx(7 * 1.5**2, rel=0.04)


def test_a_gradient_of_zero_asks_for_all_that_may_be_had() -> None:
    for test in ("norm", "inner-product"):
        assert AdaptiveBatchSize(test=test, most=77).needed(spread_of(np.zeros((4, 7)), 4)) == 77


def test_pieces_differ_by_one_example_at_most() -> None:
    batch = Batch.of(torch.arange(11), torch.arange(11))
    for count in range(1, 12):
        held = list(pieces(batch, count))
        assert len(held) == count
        assert max(map(len, held)) - min(map(len, held)) <= 1
        assert torch.equal(torch.cat([p.inputs for p in held]), batch.inputs)


class Tokens(nn.Module):
    """A model of tokens, with a weight that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 5), nn.Linear(5, 9)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens)).transpose(1, 2).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:no gradient ever reached 'unused'")
def test_the_gradient_in_pieces_is_that_of_the_batch() -> None:
    """Also where targets that do not count make the pieces weigh differently."""
    tokens = torch.randint(0, 9, (10, 4), generator=torch.Generator().manual_seed(0))
    target = tokens.roll(1, 1).clone()
    target[0], target[3, 1:] = IGNORE, IGNORE
    kept: dict[str, list[dict[str, Tensor]]] = {"whole": [], "pieces": []}
    for name, methods in (("whole", []), ("pieces", [AdaptiveBatchSize(pieces=4)])):
        model = Tokens()
        train(model, (tokens, target), methods=[*methods, AdaGrad(lr=0.1)], steps=1, batch_size=10)
        kept[name].append({n: p.detach().clone() for n, p in model.named_parameters()})
    for name, weight in kept["whole"][0].items():
        assert torch.allclose(kept["pieces"][0][name], weight, atol=1e-5), name


def run(folder: Path | None = None, steps: int = 40, **fields: Any) -> tuple[list[int], list[int], nn.Module]:
    """Train and return the sizes of the batches, the sizes of what the model was called with, and the model."""
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    batches: list[int] = []
    called: list[int] = []

    def call(model: nn.Module, inputs: Tensor) -> Tensor:
        called.append(len(inputs))
        return model(inputs)

    methods = [AdaptiveBatchSize(**fields), AdaGrad(lr=0.05)]
    train(
        model, (x, (x[:, 0] > 0).long()), methods=methods, steps=steps, batch_size=8, accumulate=2, call=call,
        on_step=lambda now: batches.append(len(now.batch)), folder=folder, save_every=10,
    )  # fmt: skip
    return batches, called, model


def test_batches_grow_and_micro_batches_do_not(tmp_path: Path) -> None:
    batches, called, model = run(tmp_path, most=40)
    full = [size for size in batches if size not in (batches[i] for i in ends(batches))]
    assert max(batches) > 16
    assert max(batches) <= 40
    assert full == sorted(full)
    assert max(called) <= 4  # half of the batch of 8: the memory of a step stays what it was
    again, _, resumed = run(tmp_path, steps=40, most=40)
    assert again == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def ends(batches: list[int]) -> list[int]:
    """The places of each epoch's last batch, which takes what is left of 200."""
    total, places = 0, []
    for place, size in enumerate(batches):
        total += size
        if total % 200 == 0:
            places.append(place)
    return places


def test_a_loose_test_changes_no_size() -> None:
    batches, _, _ = run(tolerance=100.0)
    assert set(batches) == {8}


def test_pieces_of_one_example_are_refused_under_batch_normalization() -> None:
    model, data = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), torch.randn(16, 4)
    methods = [AdaptiveBatchSize(pieces=8), AdaGrad(lr=0.1)]
    with pytest.raises(BadInput, match="AdaptiveBatchSize needs each example alone, and '1' mixes them"):
        train(model, (data, data[:, :2]), methods=methods, steps=1, batch_size=8)
    run = train(model, (data, data[:, :2]), methods=methods, steps=1, batch_size=16)  # two examples a piece
    assert math.isfinite(run.history[-1]["objective"])


def test_a_host_that_chooses_the_batches_refuses() -> None:
    with pytest.raises(BadInput, match="call AdaptiveBatchSize"):
        PlaitCallback(AdaptiveBatchSize())
