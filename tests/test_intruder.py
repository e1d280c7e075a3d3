"""Intruder dimensions against a double loop over dense singular vectors, and on cases solved by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from plait import BadInput, LoRA, Now, PiSSA, train
from plait.loss.base import squared_error
from plait.measure.spectrum import IntruderDimensions, intruder_dimensions
from plait.parametrize.base import dense_weight


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow(before: Tensor, after: Tensor, top: int, epsilon: float) -> int:
    """Algorithm 1 of the paper: a vector of the tuned weight is an intruder unless one of the base's is like it."""
    U_before, U_after = torch.linalg.svd(before.double())[0], torch.linalg.svd(after.double())[0]
    count = 0
    for j in range(min(top, *after.shape)):
        cosines = [abs(float(U_after[:, j] @ U_before[:, i])) for i in range(min(before.shape))]
        count += all(cosine < epsilon for cosine in cosines)
    return count


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (16, 16)])
@pytest.mark.parametrize("size", [0.0, 3.0, 30.0])
def test_the_count_is_the_papers(shape: tuple[int, int], size: float) -> None:
    before = drawn(*shape)
    after = before + size * drawn(shape[0], 2, seed=1) @ drawn(2, shape[1], seed=2) / shape[1] ** 0.5
    for top, epsilon in ((5, 0.5), (10, 0.7), (40, 0.6)):
        assert intruder_dimensions(before, after, top, epsilon) == slow(before, after, top, epsilon)


def test_cases_solved_by_hand() -> None:
    before = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    rotated = before.clone()
    # The first two directions turned by 45 degrees: each new one has cosine 0.71 with two of the old ones.
    half = 2**-0.5
    turn = torch.eye(4)
    turn[:2, :2] = torch.tensor([[half, -half], [half, half]])
    rotated = turn @ before
    assert intruder_dimensions(before, before, epsilon=0.99) == 0
    assert intruder_dimensions(before, rotated, epsilon=0.7) == 0
    assert intruder_dimensions(before, rotated, epsilon=0.72) == 2
    assert intruder_dimensions(before, rotated, top=1, epsilon=0.72) == 1


def test_an_adapted_weight_is_compared_with_the_one_before_any_start() -> None:
    x, y = drawn(40, 12), drawn(40, 10, seed=1) * 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    before = model[0].weight.detach().clone()
    probe = IntruderDimensions(top=6, epsilon=0.7)
    run = train(model, (x, y), squared_error, [LoRA(rank=3), PiSSA(), probe], steps=30)
    figures = run.measures[repr(probe)][-1]
    wanted = slow(before, dense_weight(model[0]).detach(), 6, 0.7)
    assert figures == {"step": 30, "intruders": wanted, "per_layer": float(wanted), "layers": 1}
    assert not run.now.memory.get(repr(probe))


def test_full_training_is_compared_with_a_copy() -> None:
    x, y = drawn(40, 12), drawn(40, 10, seed=1) * 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 10))
    before = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    probe = IntruderDimensions(top=8, epsilon=0.8, where="0|2")
    run = train(model, (x, y), squared_error, [probe], steps=60)
    pairs = zip(before, (model[0].weight.detach(), model[2].weight.detach()), strict=True)
    assert run.measures[repr(probe)][-1]["intruders"] == sum(slow(a, b, 8, 0.8) for a, b in pairs)


def test_watching_changes_nothing_and_nothing_to_watch_is_an_error() -> None:
    x, y = drawn(24, 6), drawn(24, 4, seed=1)

    def weights(*methods: IntruderDimensions) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 40), nn.utils.parametrizations.spectral_norm(nn.Linear(40, 4)))
        train(model, (x, y), squared_error, list(methods), steps=6, measure_every=2)
        return torch.cat([t.flatten() for t in model.state_dict().values()])

    assert torch.equal(weights(), weights(IntruderDimensions()))
    frozen = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    with pytest.raises(BadInput, match="no layer that is adapted"):
        IntruderDimensions().measure(frozen, Now())
    with pytest.raises(BadInput, match="matches no layer"):
        IntruderDimensions(where="q_proj").check(frozen, [])
