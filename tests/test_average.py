"""Averages of the weights: slow means of what the steps left, torch's own average, statistics of normalization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from plait.errors import BadInput
from plait.finish.average import EMA, SWA
from plait.finish.fold import Fold
from plait.method import Method, Now
from plait.parametrize.low_rank import LoRA
from plait.step.layer_sampling import LISA
from plait.step.momentum import SGD
from plait.train import Run, train

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6) if norm else nn.Tanh(), nn.Linear(6, 2))


def run(*methods: Method, norm: bool = False, steps: int = 12, **options: Any) -> tuple[Run, list[dict[str, Tensor]]]:
    """A run, and the weights after each of its steps."""
    seen: list[dict[str, Tensor]] = []
    model = options.pop("model", None) or network(norm)

    def look(now: Now) -> None:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    given = [*methods, SGD(lr=0.3)]
    return train(model, (X, Y), methods=given, steps=steps, batch_size=8, on_step=look, **options), seen


def mean(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([held[name] for held in steps]).double().mean(0) for name in steps[0]}


def close(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(p.detach().double(), expected[n], atol=1e-6) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"begin": 0.0}, range(12)),
        ({"begin": 0.75}, range(9, 12)),
        ({"begin": 0.0, "every": 4}, (3, 7, 11)),
        ({"begin": 0.5, "every": 4}, (7, 11)),
        ({"begin": 1.0}, (11,)),
        ({"begin": 0.0, "every": 50}, (11,)),
    ],
)
def test_swa_is_the_mean_of_the_steps_it_takes(fields: dict[str, Any], taken: Any) -> None:
    done, seen = run(SWA(**fields))
    assert close(done.model, mean([seen[step] for step in taken]))


def test_ema_is_torchs_once_the_first_steps_are_over() -> None:
    """decay 0.5 differs from a mean after two steps: from there torch's multi_avg goes on from the same average."""
    done, seen = run(EMA(decay=0.5))
    model = network()
    model.load_state_dict(seen[0])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for held in seen:
        model.load_state_dict(held)
        averaged.update_parameters(model)
    assert close(done.model, {name: p.double() for name, p in averaged.module.named_parameters()})


def test_the_first_average_is_a_plain_mean() -> None:
    done, seen = run(EMA(decay=0.99))
    assert close(done.model, mean(seen))


def test_training_goes_on_as_it_would() -> None:
    _, plainly = run()
    for method in (EMA(decay=0.9), SWA()):
        _, seen = run(method)
        assert all(torch.equal(a[n], b[n]) for a, b in zip(plainly, seen, strict=True) for n in a)


def test_statistics_are_those_of_the_average() -> None:
    """As torch's update_bn gathers them on the same batches; the model's modes and momenta are as they were."""
    done, seen = run(SWA(begin=0.0), norm=True)
    other = network(norm=True)
    other.load_state_dict({**other.state_dict(), **mean(seen)})
    batches = [batch.inputs for batch in done.now.calibration(5)]
    update_bn(batches, other)
    for name, buffer in other.named_buffers():
        assert torch.allclose(done.model.get_buffer(name).double(), buffer.double(), atol=1e-5), name
    assert done.model[1].momentum == 0.1
    assert done.model[1].training


def test_statistics_of_instance_norms_are_gathered_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 2), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip
    done, _ = run(EMA(decay=0.5), model=model)
    seen = torch.cat([done.model[:2](batch.inputs).detach() for batch in done.now.calibration(5)])  # type: ignore[index]
    assert torch.allclose(done.model[2].running_mean, seen.mean((0, 2)), atol=1e-6)  # type: ignore[index]
    assert torch.allclose(done.model[2].running_var, seen.var(2).mean(0), atol=1e-6)  # type: ignore[index]


def test_averages_are_finer_than_the_weights() -> None:
    """In bfloat16 a thousandth of a weight would be lost at each step; the average of constant weights is exact."""
    model, now, method = nn.Linear(1, 1, bias=False).to(torch.bfloat16), Now(steps=2000), EMA(decay=0.999)
    for now.step in range(2000):
        nn.init.constant_(model.weight, 1.0 if now.step < 1000 else 2.0)
        method.constrain(model, now)
    # The first 1000 are all 1; 1000 more, each a thousandth of what is left.
    assert float(now.of(method)["average.weight"]) == pytest.approx(2 - 0.999**1000, abs=1e-3)


def test_where_names_what_is_averaged() -> None:
    done, seen = run(SWA(begin=0.0, where="2"))
    average = mean(seen)
    expected = {n: average[n] if n.startswith("2") else seen[-1][n].double() for n in average}
    assert close(done.model, expected)


@pytest.mark.parametrize("first", [True, False])
def test_weights_that_rest_are_averaged_as_they_stand(first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)), nn.Linear(5, 2))
    average, turns = EMA(decay=0.99), LISA(lr=0.01, layers=1, period=2)
    seen: list[dict[str, Tensor]] = []

    def look(now: Now) -> None:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    methods = [average, turns] if first else [turns, average]
    done = train(model, (X, Y), methods=methods, steps=10, batch_size=8, on_step=look)
    assert close(done.model, mean(seen))


def test_adapters_are_averaged_before_they_are_folded() -> None:
    done, _ = run(LoRA(rank=2), EMA(decay=0.9), Fold())
    assert sorted(done.model.state_dict()) == sorted(network().state_dict())
    with pytest.raises(BadInput, match="put EMA before Fold"):
        run(LoRA(rank=2), Fold(), EMA())


def test_resumes_bitwise(tmp_path: Path) -> None:
    whole, _ = run(EMA(decay=0.8, where="0"), SWA(begin=0.5, where="2"), norm=True)

    class Stop(Exception):
        pass

    def stop(now: Now) -> None:
        if now.step == 8:
            raise Stop

    methods = [EMA(decay=0.8, where="0"), SWA(begin=0.5, where="2"), SGD(lr=0.3)]
    options: dict[str, Any] = {"methods": methods, "steps": 12, "batch_size": 8, "folder": tmp_path, "save_every": 3}
    with pytest.raises(Stop):
        train(network(norm=True), (X, Y), on_step=stop, **options)
    done = train(network(norm=True), (X, Y), **options)
    expected = whole.model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in done.model.state_dict().items())


def test_a_decay_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="does nothing while decay is 0"):
        run(EMA(decay=0.0))


def test_an_average_that_another_replaces_is_refused() -> None:
    with pytest.raises(BadInput, match="followed by another average"):
        run(EMA(), SWA())
