"""Tuning inside a run: what is tuned, best responses by their equation, where the numbers end, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait import train
from plait.batch import Batch
from plait.data.noise import InputNoise
from plait.errors import BadInput, NonFinite
from plait.fields import ScheduledNonNegative
from plait.forward.dropout import Dropout
from plait.gradient.sharpness import SAM
from plait.loops.best_response import STN, BestResponse
from plait.loops.evidence import DataEmphasizedELBo, divergence
from plait.loops.hypergradient import hoag
from plait.loops.implicit import BOREP, objective
from plait.loops.tensors import bilevel_problem
from plait.loops.tuning import adam_step, knobs, link, raw_start
from plait.loss.base import squared_error
from plait.loss.smoothing import LabelSmoothing, ZLoss
from plait.method import Method, Now, method
from plait.parametrize.base import attach, attached
from plait.parametrize.folding import fold
from plait.passes import call_again
from plait.penalty.adversarial import SMART
from plait.penalty.norm import L2
from plait.predict.base import predictor
from plait.recipe import Recipe
from plait.schedule import Tuned
from plait.step.adam import AdamW
from plait.step.layer_sampling import LISA


def data(seed: int, count: int = 60, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 20, generator=generator)
    return x, x[:, :4].sum(1) + noise * torch.randn(count, generator=generator)


def numbers(run: Any) -> dict[str, float]:
    """The last figures of the method that tunes."""
    return {name: value for name, value in next(iter(run.measures.values()))[-1].items() if name != "step"}


# -- numbers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tuned", [Tuned(start=0.1), Tuned(start=0.3, high=0.5), Tuned(start=2.0, low=1.0, high=4.0)])
def test_a_link_is_the_inverse_of_the_raw_start_and_stays_between_the_ends(tuned: Tuned) -> None:
    assert float(link(tuned, torch.tensor(raw_start(tuned), dtype=torch.float64))) == pytest.approx(tuned.start)
    ends = link(tuned, torch.tensor([-15.0, 15.0], dtype=torch.float64))
    assert tuned.low < float(ends[0]) < tuned.start < float(ends[1]) < tuned.high


def test_adam_is_torchs() -> None:
    state, weight = {"raw": torch.tensor([1.0, -2.0])}, nn.Parameter(torch.tensor([1.0, -2.0]))
    rule = torch.optim.Adam([weight], lr=0.1)
    for step in range(5):
        weight.grad = torch.tensor([0.3 * step - 1, 2.0])
        rule.step()
        adam_step(state, "raw", weight.grad, 0.1)
    torch.testing.assert_close(state["raw"], weight.detach(), atol=1e-6, rtol=0)


def test_equal_numbers_of_one_name_are_one_and_without_a_name_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    same, named = Tuned(start=0.1), Tuned(start=0.1, name="decay")
    found = knobs(model, [L2(where="0", strength=named), L2(where="1", strength=named), ZLoss(strength=same)])
    assert [(k.title, k.rows.start, k.rows.stop) for k in found] == [("decay", 0, 1), ("ZLoss.strength", 1, 2)]
    with pytest.raises(BadInput, match=r"L2\[0\].strength and L2\[1\].strength are the same"):
        knobs(model, [L2(where="0", strength=same), L2(where="1", strength=same)])


# -- best responses ------------------------------------------------------------------------------------------------
def test_a_layer_responds_as_the_authors_does() -> None:
    """Their HyperLinear (github.com/asteroidhouse/self-tuning-networks, cnn/hypermodels/hyperlinear.py), in float64.

    All numbers are drawn in this order from torch.Generator().manual_seed(0); elem_scalar is 1; agreement to 1e-7.
    """
    theirs = [[4.37800831, -2.91695879], [2.3443414, -0.28554199], [2.37577183, 4.51572013], [2.65507068, 6.84918101]]
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    W, b, R, r, V, C, x, deviation = (draw(*s) for s in ((2, 3), (2,), (2, 3), (2,), (2, 2), (2, 2), (4, 3), (2,)))
    layer = nn.Linear(3, 2).double()
    part = BestResponse(layer.weight, layer.bias)
    attach(layer, "stn", part)
    part.settle(2)
    with torch.no_grad():
        for parameter, value in zip(
            (layer.weight, layer.bias, part.response, part.bias_response), (W, b, R, r), strict=True
        ):
            parameter.copy_(value)  # type: ignore[union-attr]
        part.scaling.copy_(V)
        part.bias_scaling.copy_(C)  # type: ignore[union-attr]
    part.deviation = deviation
    torch.testing.assert_close(layer(x), torch.tensor(theirs, dtype=torch.float64), atol=1e-7, rtol=0)


def layers() -> list[tuple[nn.Module, Tensor]]:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    tokens = torch.tensor([[1, 2, 0]])
    return [
        (nn.Linear(4, 3), torch.randn(2, 4)),
        (nn.Linear(4, 3, bias=False), torch.randn(2, 4)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
        (nn.Embedding(5, 3), tokens),
        (Conv1D(3, 4), torch.randn(2, 4)),
    ]


@pytest.mark.parametrize("number", range(5))
def test_every_kind_of_layer_responds_row_by_row_and_folds(number: int) -> None:
    """W_i + (V d)_i R_i for each output i, written as a loop over outputs, in the layer's own shape."""
    layer, inputs = layers()[number]
    model = nn.Sequential(layer)
    before = layer.weight.detach().clone()  # type: ignore[operator]
    STN().parametrize(model)
    ((_, _, part),) = attached(model, BestResponse)
    part.settle(2)
    with torch.no_grad():
        part.scaling.normal_()
        if part.bias_scaling is not None:
            part.bias_scaling.normal_()
    plain = model(inputs)
    part.deviation = torch.tensor([0.5, -1.0])
    scale = [float(row @ part.deviation) for row in part.scaling.detach()]
    outputs_last = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
    expected = before.t().flatten(1).clone() if outputs_last else before.flatten(1).clone()
    for i in range(len(expected)):
        expected[i] += scale[i] * part.response[i].detach()
    moved = model(inputs)
    assert not torch.allclose(moved, plain)
    folded = fold(model)
    weight = folded[0].weight.detach()
    torch.testing.assert_close(weight.t().flatten(1) if outputs_last else weight.flatten(1), expected)
    torch.testing.assert_close(folded(inputs), moved)
    assert not list(attached(folded, BestResponse))


def test_the_validation_losss_gradient_is_that_of_differences() -> None:
    """u moves along the derivative of F(w(u)): of central differences of the model's own loss, for one Adam step."""
    model, moved = nn.Linear(20, 1), []
    x, y = data(0)
    method = STN(lr=1e-3, tune_scale=False, warmup=1, train_steps=1)

    def watch(now: Any) -> bool:
        memory = now.of(method)
        (part,) = (p for _, _, p in attached(model, BestResponse))
        if now.step == 4:
            base = part.deviation.clone()

            def loss(shift: float) -> float:
                part.deviation = base + shift
                with torch.no_grad():
                    value = float(F.mse_loss(model.eval()(x).squeeze(1).double(), y.double()))
                part.deviation = base
                return value

            moved.append((memory["raw first"].clone(), (loss(0.01) - loss(-0.01)) / 0.02))
        if now.step == 5:
            moved.append((memory["raw first"].clone(), 0.0))
        return False

    train(
        model,
        (x, y),
        methods=[L2(strength=Tuned(start=0.1)), method, AdamW(lr=0.02)],
        validation=(x, y),
        steps=6,
        batch_size=60,
        on_step=watch,
    )
    (before, difference), (after, _) = moved
    gradient = (after - 0.9 * before) / 0.1
    assert float(gradient) == pytest.approx(difference, rel=1e-3)


def ridge_loss(inputs: Any, held: Any, strength: float) -> float:
    """The validation loss where 1/n ||X w - y||^2 + strength / 2 |w|^2 is least, by closed form."""
    (x, y), (v, z) = inputs, held
    w = torch.linalg.solve(x.T @ x / len(x) + strength / 2 * torch.eye(20), x.T @ y / len(x))
    return float(((v @ w - z) ** 2).mean())


@pytest.mark.parametrize("start", [0.02, 100.0])
def test_the_strength_of_ridge_regression_gains_what_the_best_gains(start: float) -> None:
    inputs, held = data(1, 40, 4.0), data(2, 400, 4.0)
    torch.manual_seed(0)
    run = train(
        nn.Linear(20, 1, bias=False),
        inputs,
        methods=[L2(strength=Tuned(start=start)), STN(lr=0.03, warmup=100), AdamW(lr=0.01, weight_decay=0.0)],
        validation=held,
        steps=1200,
        batch_size=40,
    )
    best = min(ridge_loss(inputs, held, strength) for strength in torch.logspace(-3, 2, 200).tolist())
    gained = ridge_loss(inputs, held, start) - ridge_loss(inputs, held, numbers(run)["L2.strength"])
    assert gained > 0.9 * (ridge_loss(inputs, held, start) - best)
    assert not list(attached(run.model, BestResponse))


def test_rates_noise_smoothing_and_strengths_of_each_layer_are_tuned_together() -> None:
    x, y = data(0)
    labels = (y > 0).long()
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2), nn.Dropout(0.1))
    tuner = STN(lr=0.05)
    methods: list[Method] = [
        tuner,
        InputNoise(strength=Tuned(start=0.2)),
        Dropout(rate=Tuned(start=0.1, high=0.9, each_layer=True)),
        LabelSmoothing(smoothing=Tuned(start=0.05, high=0.5)),
        ZLoss(strength=Tuned(start=1e-3)),
        L2(strength=Tuned(start=0.01, each_layer=True)),
    ]
    run = train(model, (x, labels), methods=methods, validation=(x, labels), steps=40, batch_size=30)
    found = numbers(run)
    starts = {
        "InputNoise.strength": 0.2,
        "Dropout.rate 0": 0.1,
        "Dropout.rate 1": 0.1,
        "LabelSmoothing.smoothing": 0.05,
        "ZLoss.strength": 1e-3,
        "L2.strength 0": 0.01,
        "L2.strength 1": 0.01,
    }
    assert found.keys() == starts.keys()
    assert all(found[name] != pytest.approx(start, rel=1e-3) for name, start in starts.items())
    assert 0 < found["Dropout.rate 0"] < 0.9


def test_numbers_of_each_layer_are_refused_where_layers_take_turns() -> None:
    """Those that rest are not penalized: the numbers would be of other layers."""
    model = nn.Sequential(*[nn.Linear(20, 20) for _ in range(3)], nn.Linear(20, 1))
    methods = [STN(), L2(strength=Tuned(start=0.1, each_layer=True)), LISA(layers=1, period=2)]
    with pytest.raises(BadInput, match=r"L2\.strength has a number for each layer, and under LISA layers take turns"):
        train(model, data(0), methods=methods, validation=data(1), steps=3)


def test_one_number_for_each_layer_is_that_layers_own() -> None:
    model, now = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), Now()
    penalty = L2(strength=Tuned(start=1.0, each_layer=True))
    now.tuned[penalty.strength] = torch.tensor([2.0, 3.0])  # type: ignore[index]
    expected = sum(s * float(layer.weight.detach().square().sum()) / 2 for s, layer in zip((2, 3), model, strict=True))
    with torch.no_grad():
        assert float(penalty.penalty(model, now)) == pytest.approx(expected, rel=1e-6)


# -- recipes and refusals ------------------------------------------------------------------------------------------
def test_a_recipe_tunes() -> None:
    recipe = Recipe.parse(
        "model: mlp\ndata: digits\nmethods:\n- stn: {lr: 0.01}\n"
        "- l2: {strength: {tuned: {start: 0.01, each_layer: true, name: decay}}}\n"
        "- label-smoothing: {smoothing: {tuned: {start: 0.1, high: 0.5}}}"
    )
    assert recipe.build() == [
        STN(lr=0.01),
        L2(strength=Tuned(start=0.01, each_layer=True, name="decay")),
        LabelSmoothing(smoothing=Tuned(start=0.1, high=0.5)),
    ]
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        (lambda: [L2(strength=Tuned(start=0.1))], "nothing tunes it"),
        (lambda: [L2(strength=0.1), STN()], "finds nothing to tune"),
        (lambda: [AdamW(lr=Tuned(start=0.1)), STN()], "no part of the objective"),
        (lambda: [InputNoise(strength=Tuned(start=0.1)), STN()], "put STN first"),
        (lambda: [STN(), ZLoss(strength=Tuned(start=0.1, each_layer=True))], "drop each_layer"),
        (lambda: [L2(strength=Tuned(start=0.1)), STN(where="nowhere")], "matches no"),
    ],
)
def test_lists_that_cannot_work_are_refused(methods: Any, says: str) -> None:
    x, y = data(0)
    with pytest.raises(BadInput, match=says):
        train(nn.Linear(20, 1), (x, y), methods=methods(), validation=(x, y), steps=2)


def test_a_run_without_a_validation_set_is_refused() -> None:
    with pytest.raises(BadInput, match="needs a validation set"):
        train(nn.Linear(20, 1), data(0), methods=[L2(strength=Tuned(start=0.1)), STN()], steps=2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Tuned(start=0.0), "between its ends"),
        (lambda: Tuned(start=1.0, high=0.5), "between its ends"),
        (lambda: LabelSmoothing(smoothing=Tuned(start=0.1)), r"must be in \[0, 1\]"),
        (lambda: STN(lr=-1.0), "STN.lr"),
        (lambda: STN(train_steps=0), "STN.train_steps"),
    ],
)
def test_bad_numbers_are_refused(make: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()


# -- one product with the Hessian at a time ----------------------------------------------------------------------------
def standing(tuner: BOREP, strength: Tuned) -> tuple[nn.Module, Any, Tensor, Tensor, Tensor, Tensor]:
    """A run at some weights, in float64, between two steps: (model, now, X, y, V, z)."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    X, y, V, z, weight = draw(9, 4), draw(9), draw(7, 4), draw(7), draw(1, 4)
    model = nn.Linear(4, 1, bias=False).double()
    model.weight.data.copy_(weight)
    now = Now(methods=[L2(strength=strength), tuner], model=model, misfit=squared_error)
    now.batch = Batch(X, y, torch.arange(9), torch.ones(9, dtype=torch.float64))
    now.validate = lambda model, number: (model(V).squeeze(1) - z).square().mean()
    return model, now, X, y, V, z


def test_upper_steps_are_those_of_the_equations_with_dense_matrices() -> None:
    tuner, strength = BOREP(lr=0.2, linear_lr=0.05, momentum=0.8), Tuned(start=0.3)
    model, now, X, _, V, z = standing(tuner, strength)
    w = model.weight.detach()[0]  # type: ignore[index]
    u, q, m = torch.tensor(0.3).log().double(), torch.zeros(4).double(), torch.zeros(()).double()
    for _ in range(5):
        tuner.upper_step(model, now)
        H = 2 * X.T @ X / 9 + u.exp() * torch.eye(4)
        cross = u.exp() * w  # d^2 f / dw du of exp(u) |w|^2 / 2
        m, q = 0.8 * m + 0.2 * (-cross @ q), q - 0.05 * (H @ q - 2 * V.T @ (V @ w - z) / 7)
        u = u - 0.2 * torch.sign(m)  # one number: its normalized step has length 1
        memory = now.of(tuner)
        torch.testing.assert_close(memory["z weight"][0], q, atol=1e-6, rtol=1e-6)
        assert float(memory["momentum"]) == pytest.approx(float(m), abs=1e-5)
        assert float(memory["raw"]) == pytest.approx(float(u), abs=1e-5)
    assert model.weight.grad is None


@pytest.mark.parametrize(("start", "linear_lr"), [(0.02, 0.02), (100.0, 0.01)])
def test_implicit_differentiation_gains_what_the_best_gains(start: float, linear_lr: float) -> None:
    inputs, held = data(1, 40, 4.0), data(2, 400, 4.0)
    torch.manual_seed(0)
    tuner = BOREP(lr=0.1, linear_lr=linear_lr, lower_steps=5, upper_steps=2)
    methods = [L2(strength=Tuned(start=start)), tuner, AdamW(lr=0.02, weight_decay=0.0)]
    run = train(nn.Linear(20, 1, bias=False), inputs, methods=methods, validation=held, steps=600, batch_size=40)
    best = min(ridge_loss(inputs, held, strength) for strength in torch.logspace(-3, 2, 200).tolist())
    gained = ridge_loss(inputs, held, start) - ridge_loss(inputs, held, numbers(run)["L2.strength"])
    assert gained > 0.9 * (ridge_loss(inputs, held, start) - best)


@method
class Small(Method):
    """strength * mean f(x)^2, of the pass under way and of another: a penalty that reads outputs."""

    strength: ScheduledNonNegative = 1.0

    def penalty(self, model: nn.Module, now: Now) -> Tensor:
        again = call_again(model, now.batch.inputs, now)
        return now.at(self.strength) * (now.output.square().mean() + again.square().mean()) / 2


def test_penalties_see_the_output_of_the_pass() -> None:
    _, now, X, y, _, _ = standing(BOREP(), strength := Tuned(start=0.3))
    now.methods, now.model = [Small(strength=strength)], nn.Linear(4, 1, bias=False).double()
    out = X @ now.model.weight.detach()[0]
    expected = (out - y).square().mean() + 0.3 * out.square().mean()
    torch.testing.assert_close(objective(now.model, now).detach(), expected)
    assert now.output is None

    inner, _, weights, raw = bilevel_problem(now.model, (X, y), now.methods, (X, y))
    torch.testing.assert_close(inner(weights, raw.double()).detach(), expected, atol=1e-6, rtol=1e-6)
    by_name = bilevel_problem(Named(now.model), ({"x": X}, y), now.methods, ({"x": X}, y))
    torch.testing.assert_close(by_name[0](by_name[2], raw.double()).detach(), expected, atol=1e-6, rtol=1e-6)


class Named(nn.Module):
    """A model that takes its input by name."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def test_a_strength_of_smart_is_tuned() -> None:
    x, y = data(0, 24)
    methods = [SMART(strength=Tuned(start=1.0), proximal=0.0, radius=0.1, noise=0.1, step=0.1), BOREP(warmup=0)]
    run = train(nn.Linear(20, 1), (x, y), methods=methods, validation=(x, y), steps=4)
    assert numbers(run)["SMART.strength"] != 1.0


def test_a_linear_system_that_diverges_stops_the_run() -> None:
    inputs = data(1, 40, 4.0)
    methods = [L2(strength=Tuned(start=100.0)), BOREP(linear_lr=10.0, warmup=0, lower_steps=1)]
    with pytest.raises(NonFinite, match="lower linear_lr"):
        train(nn.Linear(20, 1), inputs, methods=methods, validation=inputs, steps=100)


def test_a_number_without_a_derivative_is_refused() -> None:
    x, y = data(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.Dropout(), nn.Linear(8, 1))
    methods = [Dropout(rate=Tuned(start=0.1, high=0.9)), BOREP(warmup=0)]
    with pytest.raises(BadInput, match=r"no derivative in Dropout\.rate"):
        train(model, (x, y), methods=methods, validation=(x, y), steps=2)


# -- the evidence bound --------------------------------------------------------------------------------------------
def test_the_divergence_is_the_least_over_prior_variances() -> None:
    from torch.distributions import MultivariateNormal, kl_divergence

    mean, deviation = torch.tensor([0.3, -1.0, 2.0]), torch.tensor(0.4)
    kl, variance = divergence(3, mean.square().sum(), deviation)

    def at(v: float) -> float:
        posterior = MultivariateNormal(mean, deviation.square() * torch.eye(3))
        return float(kl_divergence(posterior, MultivariateNormal(torch.zeros(3), v * torch.eye(3))))

    assert float(kl) == pytest.approx(at(float(variance)), rel=1e-5)
    assert all(at(float(variance) * factor) > float(kl) for factor in (0.5, 0.9, 1.1, 2.0))


class Two(nn.Module):
    """A body and a head, 12 + 8 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, 3] -> [n, 2]."""
        hidden: Tensor = self.head(self.body(inputs))
        return hidden


@pytest.mark.parametrize(
    ("scale", "theirs"),
    [
        (0.01, [2.25597589, 0.80427559, 4.80568232, 0.19534951, -0.05314043, -0.08159653, -0.99494068]),
        (0.5, [2.50587589, 1.05417559, 0.97929048, 0.15890363, -0.04784097, -0.06225348, -0.6651834]),
    ],
)
def test_the_bound_and_its_gradients_are_the_authors(scale: float, theirs: Any) -> None:
    """Their L2KappaELBoLoss (github.com/tufts-ml/data-emphasized-ELBo, src/losses.py), D = 20, N = 6, kappa = D / N.

    In float64, of start [12], body [12], head [8], drawn in this order from torch.Generator().manual_seed(0): (body's
    variance, head's, KL / (kappa N), its gradient's norm in the weights, its first and last entries, and its derivative
    in the inverse softplus of s). Ours keeps distances in float32: agreement to 1e-5.
    """
    generator = torch.Generator().manual_seed(0)
    start, body, head = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (12, 12, 8))
    model, method = Two(), DataEmphasizedELBo(head="head", scale=scale)
    with torch.no_grad():
        model.body.weight.copy_(start.view(4, 3))
    now = Now(model=model)
    method.initialize(model, now)
    with torch.no_grad():
        model.body.weight.copy_(body.view(4, 3))
        model.head.weight.copy_(head.view(2, 4))
    figures = method.measure(model, now)
    groups, deviation = method.groups(model), torch.tensor(scale)
    bound, slope = method.pull(groups, now, deviation, method.share(groups, now))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    raw_slope = slope * float(torch.sigmoid(now.of(method)["spread"]))
    ours = [figures["body variance"], figures["head variance"], bound, float(gradient.norm())]
    ours += [float(gradient[0]), float(gradient[-1]), raw_slope]
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_the_gradient_is_that_of_the_bound_at_one_draw() -> None:
    """autograd through mean misfit(m + s e) + KL / D, with the e that the method draws; the weights stay bitwise."""
    torch.manual_seed(0)
    model, method = Two(), DataEmphasizedELBo(center="zero", scale=0.3)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    now = Now(model=model, generator=torch.Generator().manual_seed(5))
    method.initialize(model, now)
    before = [p.detach().clone() for p in model.parameters()]
    spread = now.of(method)["spread"].clone().requires_grad_()

    def ask(model: nn.Module, now: Now) -> Tensor:
        value = F.cross_entropy(model(x), y)
        value.backward()
        return value.detach()

    value = method.gradient(ask)(model, now)
    generator = torch.Generator().manual_seed(5)
    means = [p.clone().requires_grad_() for p in before]
    s = F.softplus(spread)
    body, head = (m + s * torch.randn(m.shape, generator=generator) for m in means)
    variance = s**2 + sum(m.square().sum() for m in means) / 20
    whole = F.cross_entropy(x @ body.T @ head.T, y) + torch.log(variance / s**2) / 2
    *expected, in_spread = torch.autograd.grad(whole, [*means, spread])
    assert float(value) == pytest.approx(float(whole.detach()), rel=1e-5)
    for p, held, g in zip(model.parameters(), before, expected, strict=True):
        assert torch.equal(p.detach(), held)
        torch.testing.assert_close(p.grad, g, atol=1e-6, rtol=1e-4)
    assert float(now.of(method)["spread first"]) == pytest.approx(0.1 * float(in_spread), rel=1e-4)


def test_s_moves_once_a_step_and_the_whole_step_has_the_same() -> None:
    """SAM asks twice: a second move would be of the slope at weights that SAM has moved."""
    x, y = data(0, 24)

    def run(sam: list[Method]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        method = DataEmphasizedELBo(center="zero")
        model = nn.Linear(20, 1)
        methods = [method, *sam, AdamW(lr=0.01, weight_decay=0.0)]
        return train(model, (x, y), methods=methods, steps=1, batch_size=24).now.of(method)

    alone, around = run([]), run([SAM(radius=0.5)])
    assert int(around["spread steps"]) == 1
    assert all(torch.equal(alone[name], around[name]) for name in alone)


def test_more_emphasis_lets_the_weights_go_further() -> None:
    x, y = data(0, 60, 0.5)
    lengths = {}
    for emphasis in (1.0, None, 1e3):
        torch.manual_seed(0)
        method = DataEmphasizedELBo(center="zero", emphasis=emphasis, lr=0.03)
        model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 1))
        run = train(model, (x, y), methods=[method, AdamW(lr=0.01, weight_decay=0.0)], steps=300)
        lengths[emphasis] = float(sum(p.detach().square().sum() for p in run.model.parameters()))
    assert lengths[1.0] < 0.5 * lengths[None] < 0.5 * lengths[1e3]  # kappa = D / N is 14.7 here


def test_predictions_are_averaged_over_the_posterior() -> None:
    """The mean of softmax over ten draws, written out; the weights stay bitwise, and 0 samples predict at the mean."""
    torch.manual_seed(0)
    model, x = Two(), torch.randn(5, 3)
    now = Now(model=model, generator=torch.Generator().manual_seed(3))
    method = DataEmphasizedELBo(center="zero", scale=0.5)
    method.initialize(model, now)
    before = [p.detach().clone() for p in model.parameters()]
    ours = predictor([method])(model, x, now)
    generator, expected = torch.Generator().manual_seed(3), torch.zeros(5, 2)
    for _ in range(10):
        body, head = (m + 0.5 * torch.randn(m.shape, generator=generator) for m in before)
        expected += (x @ body.T @ head.T).softmax(-1) / 10
    torch.testing.assert_close(ours, expected)
    assert all(torch.equal(p.detach(), held) for p, held in zip(model.parameters(), before, strict=True))
    at_mean = DataEmphasizedELBo(center="zero", scale=0.5, samples=0)
    at_mean.initialize(model, now)
    torch.testing.assert_close(predictor([at_mean])(model, x, now), model(x).softmax(-1).detach())


# -- the two losses of a model, for loops over tensors -----------------------------------------------------------------
def test_a_models_problem_is_its_objective_and_its_validation_loss() -> None:
    """Strengths of each layer, label smoothing and the z-loss, written out."""
    x, y = data(0, 30)
    labels = (y > 0).long()
    model = nn.Sequential(nn.Linear(20, 3), nn.Tanh(), nn.Linear(3, 2))
    methods = [
        L2(strength=Tuned(start=0.2, each_layer=True)),
        LabelSmoothing(smoothing=Tuned(start=0.1, high=0.5)),
        ZLoss(strength=Tuned(start=0.01)),
    ]
    inner, outer, weights, raw = bilevel_problem(model, (x, labels), methods, (x, labels))
    first, second, smoothing, z = 0.3, 0.4, 0.2, 0.05
    moved = torch.tensor([first, second, smoothing / (0.5 - smoothing), z]).log()
    w = {name: t + 0.1 for name, t in weights.items()}
    logits = torch.tanh(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing) + z * logits.logsumexp(1).square().mean()
    expected = expected + first / 2 * w["0.weight"].square().sum() + second / 2 * w["2.weight"].square().sum()
    torch.testing.assert_close(inner(w, moved).detach(), expected)
    torch.testing.assert_close(outer(w).detach(), F.cross_entropy(logits, labels))
    assert raw.shape == (4,)


def test_hoag_tunes_the_fields_of_methods() -> None:
    x, y = data(1, 60)
    labels, held = (y > 0).long(), data(2, 400)
    model = nn.Sequential(nn.Linear(20, 2))
    methods = [L2(strength=Tuned(start=1e-3)), LabelSmoothing(smoothing=Tuned(start=0.05, high=0.5))]
    problem = bilevel_problem(model, (x, labels), methods, (held[0], (held[1] > 0).long()))
    before = hoag(*problem, steps=1)
    after = hoag(*problem, steps=15)
    assert after.outer < 0.8 * before.history[0]["outer"]
    assert not torch.allclose(after.hyper, problem[3], atol=0.1)


def test_methods_that_are_no_losses_are_refused() -> None:
    x, y = data(0)
    with pytest.raises(BadInput, match="no loss and no penalty"):
        bilevel_problem(nn.Linear(20, 1), (x, y), [InputNoise(strength=Tuned(start=0.1))], (x, y))
    with pytest.raises(BadInput, match="nothing to tune"):
        bilevel_problem(nn.Linear(20, 1), (x, y), [L2(strength=0.1)], (x, y))
