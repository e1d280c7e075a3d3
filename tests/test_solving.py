"""HOAG and MAID inside a run: the steps of the functions, closed forms, what a solve leaves alone, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait import train
from plait.constrain.norm import LAWN
from plait.errors import BadInput
from plait.forward.dropout import Dropout
from plait.loops import tuning
from plait.loops.base import as_tensors, from_tensors
from plait.loops.hypergradient import HOAG, Descent, hoag
from plait.loops.inexact import MAID, maid
from plait.loops.solving import SolvingTuner
from plait.loops.tensors import bilevel_problem, objective, training_batches, validation_misfit
from plait.loss.smoothing import LabelSmoothing, ZLoss
from plait.method import Method, Now, method
from plait.penalty.norm import L2
from plait.schedule import Tuned
from plait.step.adam import AdamW
from test_tuning import data, numbers, ridge_loss

STILL = AdamW(lr=1e-30, weight_decay=0.0)
"""Steps too short to change a weight in float32."""
CERTAIN = {"convexity": 0.2, "smoothness": 2.9}
"""Of the ridge regression of `data(1, 40, 4.0)`, judged by `data(2, 400, 4.0)`."""


def logistic(seed: int, count: int) -> tuple[Tensor, Tensor]:
    x, y = data(seed, count)
    return x, (y > 0).long()


def penalties() -> list[Method]:
    """Methods with four numbers of a network of two layers."""
    return [
        L2(strength=Tuned(start=0.02, each_layer=True)),
        LabelSmoothing(smoothing=Tuned(start=0.1, high=0.5)),
        ZLoss(strength=Tuned(start=0.01)),
    ]


# -- the same steps as the functions -----------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_hoag_takes_the_steps_of_the_function(steps: int) -> None:
    """Where training moves nothing in between, numbers, weights and cost are those of `hoag` on the same problem."""
    (x, y), (v, z) = logistic(0, 60), logistic(1, 90)
    inputs, held = (x.double(), y), (v.double(), z)
    tuner = HOAG(warmup=0, every=1, schedule="quadratic", iterations=50)
    torch.manual_seed(0)
    model, again = nn.Linear(20, 2).double(), nn.Linear(20, 2).double()
    again.load_state_dict(model.state_dict())
    methods = [L2(strength=Tuned(start=0.1)), LabelSmoothing(smoothing=Tuned(start=0.1, high=0.5))]
    run = train(model, inputs, methods=[tuner, *methods, STILL], validation=held, steps=steps)
    problem = bilevel_problem(again, inputs, methods, held)
    theirs = hoag(*problem, steps=steps, schedule="quadratic", iterations=50)
    torch.testing.assert_close(run.now.of(tuner)["raw"], theirs.hyper, atol=1e-5, rtol=0)
    assert numbers(run)["value"] == pytest.approx(theirs.history[-1]["outer"], rel=1e-6)
    assert numbers(run)["evaluations"] == theirs.history[-1]["evaluations"]


def test_maid_takes_the_steps_of_the_function() -> None:
    inputs, held = ((x.double(), y.double()) for x, y in (data(1, 40, 4.0), data(2, 400, 4.0)))
    tuner = MAID(warmup=0, every=1, **CERTAIN)
    torch.manual_seed(0)
    model, again = (nn.Linear(20, 1, bias=False).double() for _ in range(2))
    again.load_state_dict(model.state_dict())
    methods = [L2(strength=Tuned(start=1.0))]
    run = train(model, inputs, methods=[tuner, *methods, STILL], validation=held, steps=5)
    theirs = maid(*bilevel_problem(again, inputs, methods, held), steps=5, iterations=100, **CERTAIN)
    # Losses are taken in float32, whose rounding the two round at other places.
    assert float(run.now.of(tuner)["raw"]) == pytest.approx(float(theirs.hyper), abs=3e-4)


def test_a_state_comes_back_from_its_tensors() -> None:
    state = Descent(torch.arange(3.0), taken=4, alpha=0.1, value=1 / 3, convex=False)
    held = as_tensors(state)
    assert all(isinstance(t, Tensor) for t in held.values())
    back = from_tensors(Descent, held)
    assert torch.equal(back.q, state.q)
    assert (back.taken, back.alpha, back.value, back.convex) == (4, 0.1, 1 / 3, False)


# -- where they end ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", [0.02, 1.0])
@pytest.mark.parametrize("tuner", [HOAG(warmup=50, every=5, schedule="quadratic"), MAID(warmup=50, every=5, **CERTAIN)])
def test_the_strength_of_ridge_regression_is_the_best(tuner: SolvingTuner, start: float) -> None:
    """Against the validation loss of the closed form, on batches of 16 of 40 examples."""
    inputs, held = data(1, 40, 4.0), data(2, 400, 4.0)
    torch.manual_seed(0)
    methods = [L2(strength=Tuned(start=start)), tuner, AdamW(lr=0.02, weight_decay=0.0)]
    model = nn.Linear(20, 1, bias=False)
    run = train(model, inputs, methods=methods, validation=held, steps=200, batch_size=16)
    losses = {s: ridge_loss(inputs, held, s) for s in torch.logspace(-3, 2, 2000).tolist()}
    best = min(losses, key=losses.__getitem__)
    assert numbers(run)["L2.strength"] == pytest.approx(best, rel=0.03)
    assert ridge_loss(inputs, held, numbers(run)["L2.strength"]) < losses[best] + 1e-4


@pytest.mark.parametrize("start", [1.0, 100.0])
def test_losses_in_float32_are_solved_further_than_their_rounding(start: float) -> None:
    """It ends a line search far from the solution: without Newton's steps the strength stayed at 10.6, and at 100."""
    inputs, held = data(1, 40, 4.0), data(2, 400, 4.0)
    torch.manual_seed(0)
    problem = bilevel_problem(nn.Linear(20, 1, bias=False), inputs, [L2(strength=Tuned(start=start))], held)
    found = maid(*problem, steps=30, **CERTAIN)
    best = min(torch.logspace(-3, 2, 2000).tolist(), key=lambda strength: ridge_loss(inputs, held, strength))
    assert float(found.hyper.exp()) == pytest.approx(best, rel=0.02)


def test_strengths_of_each_layer_and_terms_of_the_loss_are_tuned_together() -> None:
    inputs, held = logistic(0, 60), logistic(1, 300)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))
    tuner = HOAG(warmup=40, every=10, schedule="quadratic")
    run = train(model, inputs, methods=[tuner, *penalties()], validation=held, steps=200, measure_every=50)
    first, *_, last = run.measures[repr(tuner)]
    names = ["L2.strength 0", "L2.strength 1", "LabelSmoothing.smoothing", "ZLoss.strength"]
    assert all(last[name] != pytest.approx(first[name], rel=1e-3) for name in names)
    assert last["value"] < 0.95 * first["value"]


# -- the problem that is solved ----------------------------------------------------------------------------------------
def seen(look: Callable[[nn.Module, Now], None], **options: Any) -> None:
    """Call a function in the midst of a run of 23 examples in batches of 8, before its first step."""

    @method
    class Look(Method):
        def initialize(self, model: nn.Module, now: Now) -> None:
            look(model, now)

    model = nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 2))
    train(model, logistic(0, 23), methods=[Look()], batch_size=8, validation=logistic(1, 13), steps=1, **options)


def test_all_batches_are_the_whole_data_each_example_once() -> None:
    def look(model: nn.Module, now: Now) -> None:
        batches = training_batches(now, 0)
        assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(23))
        assert [b.index.tolist() for b in training_batches(now, 2)] == [b.index.tolist() for b in batches[:2]]
        assert len(training_batches(now, 9)) == 3
        now.methods = [L2(strength=0.3)]
        (x, y), (v, z) = logistic(0, 23), logistic(1, 13)
        decay = sum(float(layer.weight.detach().square().sum()) for layer in (model[0], model[2]))  # type: ignore
        expected = F.cross_entropy(model(x), y).item() + 0.15 * decay
        assert objective(model, now, batches).item() == pytest.approx(expected, rel=1e-5)
        assert validation_misfit(now, 0)(model).item() == pytest.approx(F.cross_entropy(model(v), z).item(), rel=1e-5)
        parts = [now.validate(model, number).item() for number in range(2)]
        assert validation_misfit(now, 2)(model).item() == pytest.approx(sum(parts) / 2, rel=1e-5)

    seen(look)


def test_a_weight_that_two_layers_share_is_penalized_once() -> None:
    """Also where `functional_call` puts tensors in place of the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 2))
    model[2].weight = model[0].weight
    (x, y), penalty = logistic(0, 23), L2(strength=Tuned(start=0.3, each_layer=True))
    inner, _, weights, raw = bilevel_problem(model, (x, y), [penalty], logistic(1, 13))
    decay = sum(float(model[place].weight.detach().square().sum()) for place in (0, 4))  # type: ignore[union-attr]
    expected = F.cross_entropy(model(x), y).item() + 0.15 * decay
    assert inner(weights, raw).item() == pytest.approx(expected, rel=1e-5)


def test_without_the_number_of_examples_the_batches_must_be_said() -> None:
    with pytest.raises(BadInput, match="say how many batches"):
        training_batches(Now(), 0)


def test_a_solve_leaves_statistics_and_random_states_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    left: list[Any] = []

    def watched(tuner: SolvingTuner, now: Now) -> None:
        before = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
        type(tuner).tune(tuner, model, now)
        left.append(torch.equal(before[0], torch.get_rng_state()))
        left.append(all(torch.equal(b, before[1][name]) for name, b in model.named_buffers()))
        left.append(all(layer.training for layer in model.modules()))

    @method
    class Watched(HOAG):
        def tune(self, model: nn.Module, now: Now) -> None:
            if now.step == 2:
                watched(HOAG(warmup=2), now)

    methods = [Watched(), L2(strength=Tuned(start=0.1))]
    train(model, logistic(0, 60), methods=methods, validation=logistic(1, 60), steps=4)
    assert left == [True, True, True]


# -- refusals ----------------------------------------------------------------------------------------------------------
@method
class Watching(Method):
    """Reads the features of a layer."""

    watches: ClassVar[str] = "0"

    def penalty(self, model: nn.Module, now: Now) -> Tensor:
        return now.features["0"].square().mean()


class Once(torch.autograd.Function):
    """x^2, with a derivative that has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)  # type: ignore[no-any-return]


TUNERS = [HOAG(warmup=0), MAID(warmup=0, convexity=1.0, smoothness=1.0)]


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([], "finds nothing to tune"),
        ([L2(strength=Tuned(start=0.1)), LAWN()], "without the constraint of LAWN"),
        ([L2(strength=Tuned(start=0.1)), Watching()], "features that Watching reads"),
        ([Dropout(rate=Tuned(start=0.1, high=0.9))], r"no derivative in Dropout\.rate"),
    ],
)
def test_lists_that_cannot_work_are_refused(tuner: SolvingTuner, methods: list[Method], says: str) -> None:
    model = nn.Sequential(nn.Linear(20, 8), nn.Dropout(), nn.Linear(8, 2))
    with pytest.raises(BadInput, match=says):
        train(model, logistic(0, 30), methods=[tuner, *methods], validation=logistic(1, 30), steps=2)


@pytest.mark.parametrize("tuner", TUNERS)
def test_models_and_runs_that_cannot_work_are_refused(tuner: SolvingTuner, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [L2(strength=Tuned(start=0.1)), tuner]
    model = nn.Sequential(nn.Linear(20, 4), Squares(), nn.Linear(4, 2))
    with pytest.raises(BadInput, match="needs second derivatives"):
        train(model, logistic(0, 30), methods=methods, validation=logistic(1, 30), steps=2)
    with pytest.raises(BadInput, match="needs a validation set"):
        train(nn.Linear(20, 2), logistic(0, 30), methods=methods, steps=2)
    monkeypatch.setattr(tuning, "world_size", lambda: 2)
    with pytest.raises(BadInput, match="not defined for several processes"):
        train(nn.Linear(20, 2), logistic(0, 30), methods=methods, validation=logistic(1, 30), steps=2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MAID(), "MAID needs its field 'convexity'"),
        (lambda: MAID(convexity=0.0, smoothness=1.0), "MAID.convexity must be"),
        (lambda: MAID(convexity=1.0, smoothness=1.0, margin=1.0), "MAID.margin must be"),
        (lambda: HOAG(every=0), "HOAG.every must be"),
        (lambda: HOAG(schedule="linear"), "HOAG.schedule must be"),
        (lambda: HOAG(lr=0.1), "HOAG has no field 'lr'"),
    ],
)
def test_bad_numbers_are_refused(make: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()
