"""Gradient regularization, flooding, full batches, clipped pixels and the vanishing-gradient regularizer: each against
an oracle written from its equation, and against the authors' figures where their code runs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.batch import Batch
from plait.engine import Engine
from plait.errors import BadInput
from plait.gradient.base import Gradient
from plait.gradient.clip import Clip
from plait.gradient.low_rank import LoRAPro
from plait.gradient.pixel import PixelwiseGradientClipping, clip_pixels, pixelwise_clipped
from plait.gradient.recurrent import VanishingGradientRegularizer, omega
from plait.gradient.regularize import Flooding, FullBatch, GradientRegularization
from plait.gradient.robust import WinsorizedGradient
from plait.gradient.sharpness import SAM
from plait.loss.base import cross_entropy, squared_error
from plait.method import Ask, Method, Now
from plait.oracle import oracle
from plait.parametrize.low_rank import LoRA
from plait.step.momentum import SGD
from plait.train import train
from test_gradient import close, problem

Weights = list[Tensor]


def loss_at(net: nn.Module, at: Weights, inputs: Tensor, target: Tensor) -> Tensor:
    named = dict(zip([name for name, _ in net.named_parameters()], at, strict=True))
    return F.cross_entropy(torch.func.functional_call(net, named, (inputs,)), target)


def slope(net: nn.Module, at: Weights, inputs: Tensor, target: Tensor) -> Weights:
    """The gradient at other weights."""
    held = [w.detach().clone().requires_grad_() for w in at]
    return list(torch.autograd.grad(loss_at(net, held, inputs, target), held))


def slope_of_squared_norm(net: nn.Module, inputs: Tensor, target: Tensor) -> Weights:
    """The gradient of |grad L|^2 / 2, by differentiating twice."""
    held = [p.detach().clone().requires_grad_() for p in net.parameters()]
    first = torch.autograd.grad(loss_at(net, held, inputs, target), held, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first) / 2, held))


def asking(methods: list[Method], accumulate: int = 1, misfit: Any = cross_entropy, **engine: Any) -> tuple[Ask, Now]:
    """Plait's own oracle with these methods around it."""
    made = Engine(device="cpu", **engine)
    ask = oracle(made, misfit, methods, accumulate)
    for m in methods:
        ask = m.gradient(ask)
    now = Now(steps=10)
    now.misfit, now.call = misfit, made.call
    return ask, now


def taken(method: Gradient, accumulate: int = 1) -> tuple[nn.Module, Weights, float, Now]:
    """The gradients that a method leaves on the problem."""
    net, inputs, target = problem()
    ask, now = asking([method], accumulate)
    now.batch = Batch.of(inputs, target)
    value = ask(net, now)
    return net, [p.grad for p in net.parameters()], value.item(), now


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("difference", ["forward", "backward", "centered"])
def test_gradient_regularization_is_its_difference_quotient(difference: Any, accumulate: int) -> None:
    method = GradientRegularization(strength=0.3, ascent=0.2, difference=difference)
    net, found, value, _ = taken(method, accumulate)
    _, inputs, target = problem()
    w = [p.detach() for p in net.parameters()]
    g = slope(net, w, inputs, target)
    up = slope(net, [a + 0.2 * b for a, b in zip(w, g, strict=True)], inputs, target)
    down = slope(net, [a - 0.2 * b for a, b in zip(w, g, strict=True)], inputs, target)
    ends = {"forward": (up, g, 0.2), "backward": (g, down, 0.2), "centered": (up, down, 0.4)}
    high, low, width = ends[difference]
    assert close(found, [a + 0.3 * (h - k) / width for a, h, k in zip(g, high, low, strict=True)], 1e-8)
    assert value == pytest.approx(loss_at(net, w, inputs, target).item(), rel=1e-7)


@pytest.mark.parametrize(("difference", "order"), [("forward", 1), ("backward", 1), ("centered", 2)])
def test_every_difference_comes_to_double_backward(difference: Any, order: int) -> None:
    """The error falls with the step to the order of the quotient: tenfold and hundredfold for a tenth of the step."""
    net, inputs, target = problem()
    exact = [g + h for g, h in zip(slope(net, list(net.parameters()), inputs, target),
                                   slope_of_squared_norm(net, inputs, target), strict=True)]  # fmt: skip
    errors = []
    for ascent in (1e-2, 1e-3):
        found = taken(GradientRegularization(strength=1.0, ascent=ascent, difference=difference))[1]
        errors.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))))
    assert errors[0] / errors[1] == pytest.approx(10**order, rel=0.1)
    assert errors[1] < 0.01


def test_forward_with_strength_of_its_ascent_is_the_gradient_uphill() -> None:
    net, found, _, _ = taken(GradientRegularization(strength=0.1, ascent=0.1))
    _, inputs, target = problem()
    w = [p.detach() for p in net.parameters()]
    g = slope(net, w, inputs, target)
    assert close(found, slope(net, [a + 0.1 * b for a, b in zip(w, g, strict=True)], inputs, target), 1e-8)


def test_flooding_turns_round_below_the_level() -> None:
    net, inputs, target = problem()
    value = F.cross_entropy(net(inputs), target).item()
    plain = slope(net, list(net.parameters()), inputs, target)
    assert close(taken(Flooding(level=value - 0.1))[1], plain, 1e-8)
    assert close(taken(Flooding(level=value + 0.1))[1], [-g for g in plain], 1e-8)
    assert taken(Flooding(level=value + 0.1))[2] == pytest.approx(value)


@pytest.mark.parametrize("first", ["down", "up"])
def test_two_steps_of_flooding_are_a_step_along_a_difference_quotient(first: str) -> None:
    """Down then up moves by -rate^2 times the backward quotient, up then down by -rate^2 times the forward one."""
    rate, (net, inputs, target) = 0.05, problem()
    start = [p.detach().clone() for p in net.parameters()]
    moved = [w.clone() for w in start]
    for sign in (1, -1) if first == "down" else (-1, 1):
        moved = [w - sign * rate * g for w, g in zip(moved, slope(net, moved, inputs, target), strict=True)]
    difference: Any = "backward" if first == "down" else "forward"
    quotient = taken(GradientRegularization(strength=1.0, ascent=rate, difference=difference))[1]
    plain = slope(net, start, inputs, target)
    expected = [w - rate**2 * (q - g) for w, q, g in zip(start, quotient, plain, strict=True)]
    assert close(moved, expected, 1e-8)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_full_batch_is_its_equation_with_exact_hessian_products(accumulate: int) -> None:
    net, found, value, _ = taken(FullBatch(strength=0.3, block=3, distance=1e-5), accumulate)
    _, inputs, target = problem()
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for rows in (slice(0, 3), slice(3, 6), slice(6, 8)):
        share = len(inputs[rows]) / 8
        g = slope(net, list(net.parameters()), inputs[rows], target[rows])
        h = slope_of_squared_norm(net, inputs[rows], target[rows])
        expected = [e + share * (a + 0.3 * b) for e, a, b in zip(expected, g, h, strict=True)]
    assert close(found, expected, 1e-4)
    assert value == pytest.approx(F.cross_entropy(net(inputs), target).item(), rel=1e-6)


def test_full_batch_is_the_authors_regularizer() -> None:
    """JonasGeiping/fullbatchtraining 5a772a2: GradRegularizer(block_strength=0.5, eps=0.01, forward-differences) with a
    learning rate of 0.8, on the two halves of this problem, averaged: sums of each gradient and of all squares.
    Tolerance: the float32 of an objective's share.
    """
    found = taken(FullBatch(strength=0.8 / 4 * 0.5, block=4, distance=1e-2))[1]
    theirs = [1.3900607755186953, -0.4427587805944414, 0.0, 0.0]
    assert [float(g.sum()) for g in found] == pytest.approx(theirs, rel=1e-6, abs=1e-7)
    assert sum(float(g.square().sum()) for g in found) == pytest.approx(3.2634881319772053, rel=1e-6)


def test_full_batch_training_draws_nothing_and_composes_with_clipping() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(40, 5)
    data, start = (inputs, (inputs[:, 0] > 0).long()), nn.Linear(5, 2).state_dict()
    finals = []
    for seed, accumulate in ((0, 1), (7, 3)):
        net = nn.Linear(5, 2)
        net.load_state_dict(start)
        methods = [SGD(lr=0.5), FullBatch(block=10), Clip(norm=0.25)]
        train(net, data, methods=methods, batch_size=40, accumulate=accumulate, seed=seed, steps=8)
        finals.append([p.detach().clone() for p in net.parameters()])
    assert close(*finals, 1e-5)


def test_full_batch_refuses_a_part_of_the_set() -> None:
    data = torch.randn(40, 5), torch.zeros(40, dtype=torch.long)
    with pytest.raises(BadInput, match="set batch_size to the number of examples"):
        train(nn.Linear(5, 2), data, methods=[FullBatch()], batch_size=20, steps=1)


def test_pixels_are_clipped_as_the_equation_and_as_the_authors_code() -> None:
    """fudan-zvg/PGC-3D 14b9653, the hook of 2d.py with grad_suppress_type 0 and grad_clip_rgb 0.6 on these numbers: it
    bounds the largest entry of a pixel. Tolerance: float64 rounding.
    """
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(2, 3, 3, 4, generator=generator, dtype=torch.float64)
    theirs = clip_pixels(gradient, 0.6, channels=-1, norm="largest")
    assert float(theirs.sum()) == pytest.approx(-5.402668129643117, rel=1e-12)
    assert float(theirs.square().sum()) == pytest.approx(11.469986346538699, rel=1e-12)
    ours = clip_pixels(gradient, 0.6, channels=-1)
    for pixel, clipped in zip(gradient.flatten(0, 2), ours.flatten(0, 2), strict=True):
        length = math.sqrt(sum(float(v) ** 2 for v in pixel))
        expected = [float(v) * min(length, 0.6) / length for v in pixel]
        assert clipped.tolist() == pytest.approx(expected, rel=1e-12)
    assert clip_pixels(torch.zeros(1, 3, 2, 2), 0.1).abs().sum() == 0


class Renderer(nn.Module):
    """A trained picture [3, 4, 4], seen by a frozen encoder."""

    def __init__(self, repeat: int = 1) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.picture, self.repeat = nn.Linear(2, 48), repeat
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Tanh(), nn.Conv2d(8, 4, 1)).requires_grad_(False)
        self.seen = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, 2] -> [n, 16]."""
        return self.encoder(self.seen(self.picture(inputs).view(-1, 3, 4, 4))).flatten(1)


def rendered(methods: list[Method], accumulate: int = 1, **engine: Any) -> Weights:
    """The gradients of the picture's weights."""
    model, generator = Renderer(), torch.Generator().manual_seed(4)
    ask, now = asking(methods, accumulate, squared_error, **engine)
    now.batch = Batch.of(torch.randn(6, 2, generator=generator), 9 * torch.randn(6, 16, generator=generator))
    ask(model, now)
    return [p.grad for p in model.picture.parameters()]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_bound_is_of_each_examples_own_objective(accumulate: int) -> None:
    """By hand: each example's gradient at the image, clipped pixel by pixel, then carried on to the weights."""
    model, generator = Renderer(), torch.Generator().manual_seed(4)
    inputs, target = torch.randn(6, 2, generator=generator), 9 * torch.randn(6, 16, generator=generator)
    expected = [torch.zeros_like(p) for p in model.picture.parameters()]
    cut = 0
    for row in range(6):
        flat = model.picture(inputs[row : row + 1])
        image = flat.detach().view(1, 3, 4, 4).requires_grad_()
        misfit = squared_error(model.encoder(image).flatten(1), target[row : row + 1], Now()).sum()
        (arriving,) = torch.autograd.grad(misfit, image)
        size = arriving.norm(dim=1, keepdim=True)
        cut += int((size > 2.0).sum())
        carried = (arriving * (2.0 / size).clamp(max=1)).flatten(1)
        found = torch.autograd.grad(flat, list(model.picture.parameters()), carried)
        expected = [e + f / 6 for e, f in zip(expected, found, strict=True)]
    assert 0 < cut < 96
    assert close(rendered([PixelwiseGradientClipping(where="seen", bound=2.0)], accumulate), expected, 1e-5)


def test_the_bound_does_not_depend_on_the_scale_of_float16() -> None:
    """float16 differentiates the objective times 2^15; the clipped gradient is float32's, to float16's rounding."""
    methods = [PixelwiseGradientClipping(where="seen", bound=2.0)]
    half, whole = rendered(methods, precision="float16"), rendered(methods)
    assert close(half, whole, 2e-2)
    assert not close(whole, rendered([]), 1e-1)


def test_clipping_in_a_loop_of_ones_own() -> None:
    image = torch.randn(2, 3, 4, 4, requires_grad=True)
    passed = pixelwise_clipped(image, 0.5)
    assert torch.equal(passed, image)
    (arriving,) = torch.autograd.grad((passed**2).sum(), image)
    torch.testing.assert_close(arriving, clip_pixels(2 * image.detach(), 0.5))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (PixelwiseGradientClipping(), "names no layer"),
        (PixelwiseGradientClipping(where="nowhere"), "matches no layer"),
        (VanishingGradientRegularizer(), "finds no layer"),
        (Flooding(level=0.0), "does nothing while level is 0"),
        (GradientRegularization(strength=0.0), "does nothing while strength is 0"),
    ],
)
def test_what_cannot_work_is_refused(method: Method, says: str) -> None:
    data = torch.randn(8, 2), torch.randn(8, 16)
    with pytest.raises(BadInput, match=says):
        train(Renderer(), data, methods=[method], steps=1)


class Sequences(nn.Module):
    """A recurrent net that answers at every step."""

    def __init__(self, kind: str, nonlinearity: str = "tanh", batch_first: bool = True) -> None:
        super().__init__()
        self.rnn: Any = (
            nn.RNN(2, 5, nonlinearity=nonlinearity, batch_first=batch_first)
            if kind == "rnn"
            else nn.RNNCell(2, 5, nonlinearity=nonlinearity)
        )
        self.head, self.batch_first = nn.Linear(5, 3), batch_first

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, steps, 2] -> [n, 3]: the middle state and the last one both speak."""
        if isinstance(self.rnn, nn.RNN):
            states, last = self.rnn(inputs if self.batch_first else inputs.transpose(0, 1))
            middle = states[:, 3] if self.batch_first else states[3]
            return self.head(last[0]) + self.head(middle).tanh()
        state, middle = torch.zeros(len(inputs), 5, dtype=inputs.dtype), torch.zeros(())
        for k in range(inputs.shape[1]):
            state = self.rnn(inputs[:, k], state)
            middle = state if k == 3 else middle
        return self.head(state) + self.head(middle).tanh()


def recurrent_problem(kind: str, nonlinearity: str, batch_first: bool) -> tuple[Sequences, Tensor, Tensor]:
    torch.manual_seed(5)
    model = Sequences(kind, nonlinearity, batch_first).double()
    return model, torch.randn(6, 7, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def omega_by_hand(model: Sequences, inputs: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """Omega and its immediate derivative from the equation: one example, one step at a time, Jacobians by autograd."""
    suffix = "_l0" if isinstance(model.rnn, nn.RNN) else ""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    V, W, b, c = (getattr(model.rnn, name + suffix).detach() for name in names)
    s = torch.tanh if model.rnn.nonlinearity == "tanh" else torch.relu
    weight, total = W.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for x, y in zip(inputs, target, strict=True):
        states = [torch.zeros(5, dtype=torch.float64, requires_grad=True)]
        for x_k in x:
            states.append(s(W @ states[-1] + V @ x_k + b + c))
        answer = model.head(states[-1]) + model.head(states[4]).tanh()
        errors = torch.autograd.grad(F.cross_entropy(answer[None], y[None]), states)
        for k in range(7):
            before = states[k].detach()

            def step(h: Tensor, k: int = k, x: Tensor = x) -> Tensor:
                return s(weight @ h + V @ x[k] + b + c)

            # d h_{k+1} / d h_k = diag(s') W, with s' a constant and W not
            slope_k = torch.autograd.functional.jvp(
                lambda v, at=W @ before + V @ x[k] + b + c: s(at + v), torch.zeros(5).double(), torch.ones(5).double()
            )[1]
            jacobian = torch.diag(slope_k) @ weight
            size = errors[k + 1].norm()
            if size > 0:
                total = total + ((errors[k + 1] @ jacobian).norm() / size - 1) ** 2
    (change,) = torch.autograd.grad(total / len(inputs), weight)
    return float(total.detach()) / len(inputs), change


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("kind", "nonlinearity", "batch_first"),
    [
        ("rnn", "tanh", True),
        ("rnn", "tanh", False),
        ("rnn", "relu", True),
        ("cell", "tanh", True),
        ("cell", "relu", True),
    ],
)
def test_the_regularizer_is_its_equation(kind: str, nonlinearity: str, batch_first: bool, accumulate: int) -> None:
    model, inputs, target = recurrent_problem(kind, nonlinearity, batch_first)
    gradients = []
    for methods in ([], [VanishingGradientRegularizer(strength=0.4)]):
        ask, now = asking(list(methods), accumulate)
        now.batch = Batch.of(inputs, target)
        for p in model.parameters():
            p.grad = None
        value = ask(model, now)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert value.item() == pytest.approx(F.cross_entropy(model(inputs), target).item(), rel=1e-6)
    figure, change = omega_by_hand(model, inputs, target)
    assert now.parts["VanishingGradientRegularizer"] == pytest.approx(0.4 * figure, rel=1e-6)
    for name, plain in gradients[0].items():
        expected = plain + 0.4 * change if "weight_hh" in name else plain
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-6, atol=1e-9)


def test_omega_is_0_where_errors_keep_their_norm() -> None:
    """A ReLU net whose recurrent matrix is a rotation and whose states are all positive: nothing to do."""
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    hidden = torch.ones(6, 3, 4, dtype=torch.float64)
    direct = torch.zeros_like(hidden)
    direct[-1] = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, change = omega(hidden, direct, rotation, "relu", 0.0)
    assert float(value) < 1e-20
    assert float(change.abs().max()) < 1e-10
    value, _ = omega(hidden, direct, rotation / 2, "relu", 0.0)
    assert float(value) == pytest.approx(6 * 3 * 0.25)


def test_layers_that_hide_their_states_are_refused() -> None:
    model = recurrent_problem("rnn", "tanh", True)[0].float()
    model.rnn = nn.RNN(2, 5, num_layers=2, batch_first=True)
    data = torch.randn(6, 7, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(BadInput, match="hidden states inside 'rnn'"):
        train(model, data, methods=[VanishingGradientRegularizer()], steps=1)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 4, 2), torch.tensor([4, 3]), batch_first=True)
    layer = nn.RNN(2, 5, batch_first=True)
    ask = VanishingGradientRegularizer().gradient(lambda model, now: model(packed)[1].sum())
    with pytest.raises(BadInput, match="not packed"):
        ask(layer, Now())


def test_what_would_do_nothing_beside_adapters_is_refused() -> None:
    """Adapters freeze the model: a frozen recurrent weight, or nothing trained before the image, leaves no gradient."""
    model = recurrent_problem("rnn", "tanh", True)[0].float()
    data = torch.randn(6, 7, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(BadInput, match="unfreeze it"):
        train(model, data, methods=[LoRA(rank=1), VanishingGradientRegularizer()], steps=1)
    methods = [LoRA(rank=1, where="2"), PixelwiseGradientClipping(where="0")]
    net, images = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(12, 2)), torch.randn(6, 3, 2, 2)
    with pytest.raises(BadInput, match="nothing before that layer is trained"):
        train(net, (images, torch.randn(6, 2)), methods=methods, steps=1)


def test_moments_are_taken_once_a_step() -> None:
    methods = [SGD(lr=0.1, momentum=0.0), LoRA(rank=1), LoRAPro(adam=True)]
    with pytest.raises(BadInput, match="put SAM before it"):
        train(nn.Linear(3, 2), (torch.randn(6, 3), torch.randn(6, 2)), methods=[*methods, SAM()], steps=1)
    methods.insert(2, SAM())
    train(nn.Linear(3, 2), (torch.randn(6, 3), torch.randn(6, 2)), methods=methods, steps=1)


def test_winsorized_gradients_stand_first_and_count_weights() -> None:
    """Weights scale the rows that are clipped: a weight of 0 removes an example's pull, 2 doubles it."""
    with pytest.raises(BadInput, match="WinsorizedGradient needs each example alone, and '0' mixes them"):
        WinsorizedGradient().check(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), [])
    with pytest.raises(BadInput, match="put WinsorizedGradient before Clip"):
        train(nn.Linear(3, 2), (torch.randn(6, 3), torch.randn(6, 2)), methods=[Clip(), WinsorizedGradient()], steps=1)
    net, inputs, target = problem()
    weight = torch.tensor([0.0, 2.0, 1.0, 1.0, 0.5, 1.0, 1.5, 1.0], dtype=torch.float64)
    ask, now = asking([WinsorizedGradient(percentile=25.0)])
    now.batch = replace(Batch.of(inputs, target), weight=weight)
    ask(net, now)
    rows = [slope(net, list(net.parameters()), inputs[i : i + 1], target[i : i + 1]) for i in range(8)]
    for number, p in enumerate(net.parameters()):
        values = torch.stack([weight[i] * rows[i][number] for i in range(8)]) * 8 / weight.sum()
        ordered = values.sort(0).values
        torch.testing.assert_close(p.grad, values.clamp(ordered[2], ordered[5]).mean(0), rtol=1e-6, atol=1e-9)
