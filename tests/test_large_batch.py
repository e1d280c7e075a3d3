"""Ghost batch norm, multiplicative noise, the distance of weights, and the recipe for large batches that they make."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.batch import Batch
from plait.data.example_noise import MultiplicativeNoise
from plait.errors import BadInput
from plait.forward.ghost_norm import GhostBatchNorm
from plait.gradient.clip import Clip
from plait.gradient.large_batch import LargeBatch
from plait.gradient.sharpness import SAM
from plait.loss.base import cross_entropy
from plait.measure.distance import WeightDistance, fit, power
from plait.method import Now
from plait.recipe import Recipe, make
from plait.schedule import Cosine
from plait.step.momentum import SGD
from plait.train import train

NORMS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.BatchNorm1d(3), (12, 3)),
    (nn.BatchNorm1d(3, affine=False), (12, 3, 5)),
    (nn.BatchNorm2d(3, momentum=0.3), (12, 3, 4, 4)),
    (nn.BatchNorm2d(3, momentum=None), (12, 3, 4, 4)),
    (nn.BatchNorm3d(3, track_running_stats=False), (12, 3, 2, 2, 2)),
]


@pytest.mark.parametrize(("norm", "shape"), NORMS)
def test_ghost_batches_pass_a_batch_norm_one_by_one(norm: nn.Module, shape: tuple[int, ...]) -> None:
    """torch's own layer, called for each ghost batch in turn, as the authors' loop over mini-batches does."""
    torch.manual_seed(0)
    inputs = torch.randn(shape) * 3 + 1
    model, apart = nn.Sequential(copy.deepcopy(norm)), copy.deepcopy(norm)
    GhostBatchNorm(size=4).forward(model, Now())
    for _ in range(2):
        torch.testing.assert_close(model(inputs), torch.cat([apart(part) for part in inputs.split(4)]))
    for name, buffer in apart.named_buffers():
        torch.testing.assert_close(model[0].get_buffer(name), buffer)
    model.eval()
    torch.testing.assert_close(model(inputs), apart.eval()(inputs))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def numbers(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, (inputs[:, 0] > 0).long()


def test_the_gradient_is_that_of_the_authors_loop() -> None:
    """eladhoffer/bigBatch main_gbn.py: chunks of the batch through a plain network, gradients averaged, then clipped at
    5. Their code is of PyTorch 0.1 and does not run any more; this is its step, anew.
    """
    inputs, targets = numbers()
    ours, theirs = network(), network()
    GhostBatchNorm(size=8).forward(ours, Now())
    F.cross_entropy(ours(inputs), targets).backward()
    for part, target in zip(inputs.chunk(3), targets.chunk(3), strict=True):
        F.cross_entropy(theirs(part), target).backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad / 3, atol=1e-6, rtol=1e-5)


def test_published_weights_of_the_running_mean_once_they_sum_to_1() -> None:
    norm = nn.BatchNorm1d(1, momentum=0.2)
    GhostBatchNorm(size=2).forward(model := nn.Sequential(norm), Now())
    inputs = torch.tensor([[1.0], [3.0], [5.0], [7.0], [0.0], [2.0]])
    model(inputs)
    means = [2.0, 6.0, 1.0]
    expected = sum(0.2 * 0.8 ** (3 - number) * mean for number, mean in enumerate(means, 1))
    assert norm.running_mean.item() == pytest.approx(expected)


def test_a_remainder_is_spread_and_a_small_batch_is_one_part() -> None:
    model, plain = network(), network()
    GhostBatchNorm(size=16).forward(model, Now())
    inputs, _ = numbers(31)
    torch.testing.assert_close(model(inputs), plain(inputs))
    assert all(torch.equal(b, plain.get_buffer(name)) for name, b in model.named_buffers())


def test_a_ghost_batch_of_one_example_needs_positions() -> None:
    maps, rows = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm1d(3))
    for model in (maps, rows):
        GhostBatchNorm(size=1).forward(model, Now())
    images = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(maps(images), F.instance_norm(images))
    with pytest.raises(BadInput, match=r"^GhostBatchNorm\(size=1\) has a single value .* use a size of at least 2.$"):
        rows(torch.randn(4, 3))


def test_copies_go_their_own_way_and_later_runs_are_plain() -> None:
    model, now = network(), Now(steps=2)
    GhostBatchNorm(size=4).forward(model, now)
    twin = copy.deepcopy(model)
    inputs, _ = numbers()
    twin(inputs)
    assert model[1].num_batches_tracked.item() == 0
    assert twin[1].num_batches_tracked.item() == 6
    now.step = 2
    torch.testing.assert_close(model(inputs), network()(inputs))


def test_micro_batches_of_whole_ghosts_are_the_whole_batch() -> None:
    finals = []
    for accumulate in (1, 3):
        run = train(network(), numbers(), methods=[SGD(lr=0.1), GhostBatchNorm(size=4)], steps=4, batch_size=12,
                    accumulate=accumulate)  # fmt: skip
        finals.append(run.model.state_dict())
    for name, tensor in finals[0].items():
        torch.testing.assert_close(finals[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_a_second_question_leaves_the_statistics() -> None:
    runs = [
        train(network(), numbers(), methods=[SGD(lr=1e-9), GhostBatchNorm(size=4), *more], steps=1, batch_size=12)
        for more in ([], [SAM(radius=0.1)])
    ]
    for name, buffer in runs[0].model.named_buffers():
        assert torch.equal(buffer, runs[1].model.get_buffer(name))


def noisy_gradient(method: MultiplicativeNoise, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a linear model under the noise, the z that were drawn, and the objective."""
    inputs, targets = numbers()
    now = Now(batch=Batch.of(inputs, targets, torch.arange(24).flip(0)), generator=torch.Generator().manual_seed(seed))
    weight = torch.zeros(6, 3, requires_grad=True)
    method.batch(now.batch, now)
    held = now.of(method)
    z = held["noise"][torch.searchsorted(held["index"], now.batch.index)]
    now.output = inputs @ weight
    value = method.loss(cross_entropy)(now.output, targets, now).mean()
    (gradient,) = torch.autograd.grad(value, weight)
    return gradient, z, value


def per_example() -> Tensor:
    inputs, targets = numbers()
    scores = torch.full((24, 3), 1 / 3) - F.one_hot(targets, 3)
    return inputs[:, :, None] * scores[:, None, :]


def test_noise_multiplies_each_examples_gradient() -> None:
    gradient, z, value = noisy_gradient(MultiplicativeNoise(ratio=5.0), 0)
    expected = (z[:, None, None] * per_example()).mean(0)
    torch.testing.assert_close(gradient, expected)
    assert value.item() == pytest.approx(math.log(3), rel=1e-6)


def test_noise_gives_the_covariance_of_the_smaller_batch() -> None:
    """Over draws: mean the plain gradient, variance sigma^2 / M^2 sum g^2."""
    method, every = MultiplicativeNoise(ratio=9.0), per_example()
    drawn = torch.stack([noisy_gradient(method, seed)[0] for seed in range(2000)])
    variance = 8.0 / 24**2 * every.square().sum(0)
    deviation = ((drawn.mean(0) - every.mean(0)) / (variance / 2000).sqrt()).abs().max().item()
    assert deviation < 4.5
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.15, atol=0)


def test_noise_is_the_same_in_micro_batches_and_in_second_questions() -> None:
    finals = []
    for accumulate in (1, 3):
        methods = [SGD(lr=0.1), MultiplicativeNoise(ratio=4.0), SAM(radius=0.05)]
        torch.manual_seed(0)
        run = train(nn.Linear(6, 3), numbers(), methods=methods, steps=4, batch_size=12, accumulate=accumulate)
        finals.append(run.model.weight.detach())
    torch.testing.assert_close(*finals, atol=1e-5, rtol=1e-4)


def test_distance_of_a_hand_solved_run() -> None:
    model = nn.Linear(1, 2, bias=False)
    now, method = Now(), WeightDistance()
    with pytest.raises(BadInput, match="has not seen the start"):
        method.measure(model, now)
    method.initialize(model, now)
    start = model.weight.detach().clone()
    for step in (1, 2, 4, 8):
        now.step = step
        with torch.no_grad():
            model.weight.copy_(start + torch.tensor([[3.0], [4.0]]) * (1 + math.log(step)) / 5)
        figures = method.measure(model, now)
        assert figures["distance"] == pytest.approx(1 + math.log(step), rel=1e-5)
    assert figures["slope"] == pytest.approx(1.0, rel=1e-5)
    assert figures["log_fit"] == pytest.approx(1.0, rel=1e-5)
    assert figures["root_fit"] < 0.99
    assert figures["curve"]["lines"]["a + b log t"] == pytest.approx([1 + math.log(s) for s in (1, 2, 4, 8)], rel=1e-4)


def test_laws_are_told_apart() -> None:
    steps = [1.0, 2.0, 5.0, 10.0, 100.0]
    assert power(steps, [3 * t**0.5 for t in steps]) == pytest.approx(0.5)
    assert fit(steps, [2 - 3 * t for t in steps]) == pytest.approx((-3.0, 2.0, 1.0))
    assert fit([1.0, 1.0], [2.0, 2.0]) == (0.0, 2.0, 1.0)


def test_the_recipe_scales_with_the_root_of_the_ratio() -> None:
    assert LargeBatch(batch_size=512, small=32, lr=0.1) == [GhostBatchNorm(size=32), Clip(norm=5.0), SGD(lr=0.4)]
    noise = LargeBatch(batch_size=512, small=32, lr=0.1, noise="examples", ghost=False, clip=None)
    assert noise == [MultiplicativeNoise(ratio=16.0), SGD(lr=0.1)]
    (*_, rule) = LargeBatch(batch_size=64, small=16, lr=Cosine(peak=0.1, end=0.01, warmup=0.3))
    assert rule.lr == Cosine(peak=0.2, end=0.02, warmup=0.3)


def test_the_recipe_is_written_in_yaml() -> None:
    line = {"large-batch": {"batch_size": 64, "small": 16, "lr": {"cosine": {"peak": 0.1}}}}
    built = Recipe(model="cnn", data="digits", methods=[line]).build()
    assert [type(m).__name__ for m in built] == ["GhostBatchNorm", "Clip", "SGD"]
    assert built[-1].lr == Cosine(peak=0.2)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: LargeBatch(batch_size=32, small=32), "batch_size must be greater than small"),
        (lambda: LargeBatch(batch_size=32.5), "whole numbers"),
        (lambda: make("large-batch", {}), "needs its field 'batch_size'"),
        (lambda: LargeBatch(batch_size=512, noise="other"), "noise must be"),
        (lambda: MultiplicativeNoise(ratio=0.5), "ratio must be at least 1"),
        (lambda: GhostBatchNorm(size=0), "size must be at least 1"),
        (lambda: GhostBatchNorm().check(nn.Linear(2, 2), []), "finds no layer"),
    ],
)
def test_what_cannot_work_is_refused(make_it: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_it()
