"""Optimizers in company: copies and files, hooks, groups added later, the states of others, weights others moved."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait import AdamW, LoRA, train
from plait.constrain.norm import LAWN
from plait.errors import BadInput
from plait.gradient.factor_rate import LoRAPlus
from plait.gradient.first_layer import TrAct
from plait.gradient.module_variance import AGVM
from plait.gradient.recurrent import VanishingGradientRegularizer
from plait.gradient.regularize import FullBatch
from plait.gradient.sharpness import SAM
from plait.method import Method
from plait.schedule import Cosine, WarmupStableDecay
from plait.step.adagrad import AdaGrad, AdaGradNorm
from plait.step.layer_sampling import LISA
from plait.step.low_rank import GaLore
from plait.step.momentum import SGD
from plait.step.orthogonal import Muon
from plait.step.scale_invariant import AdamP
from plait.step.signed import NormalizedSGD
from plait.step.weight_normalized import GradNormLoRP

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))


def stack(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def norms(model: nn.Module) -> list[float]:
    return [float(layer.weight.detach().norm()) for layer in model]  # type: ignore[union-attr, arg-type]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def stepped(model: nn.Module, rule: torch.optim.Optimizer) -> Tensor:
    rule.zero_grad()
    (model(X) - Y).square().mean().backward()
    rule.step()
    return weights(model)


RULES: list[Any] = [AdamW, AdaGradNorm, AdamP, LISA, Muon]


@pytest.mark.parametrize("kind", RULES)
def test_copies_and_files_of_a_model_and_its_optimizer_step_as_they_do(kind: Any) -> None:
    model = stack(4)
    rule = kind(model.named_parameters(), lr=0.1)
    stepped(model, rule)
    held = io.BytesIO()
    torch.save((model, rule), held)
    held.seek(0)
    others = [copy.deepcopy((model, rule)), torch.load(held, weights_only=False)]
    said, after = repr(rule), stepped(model, rule)
    for other_model, other_rule in others:
        assert repr(other_rule) == said
        assert torch.equal(stepped(other_model, other_rule), after)


@pytest.mark.parametrize("kind", [AdamW, NormalizedSGD, AdamP, LISA])
def test_hooks_run_once_a_step(kind: Any) -> None:
    AdamW([nn.Parameter(X.clone())])  # whose class torch has hooked
    model, calls = stack(3), []
    rule = kind(model.named_parameters(), lr=0.1)
    rule.register_step_post_hook(lambda *_: calls.append("after"))
    rule.register_step_pre_hook(lambda *_: calls.append("before"))
    stepped(model, rule)
    assert calls == ["before", "after"]


def test_what_cannot_be_added_or_loaded_is_one_sentence() -> None:
    model, more = stack(3), nn.Linear(4, 4)
    with pytest.raises(BadInput, match="LISA draws among the layers that it began with"):
        LISA(model.named_parameters(), layers=1).add_param_group({"params": list(more.named_parameters())})
    projected = GaLore(stack(3).named_parameters(), rank={".*": 2})
    with pytest.raises(BadInput, match=r"GaLore.rank was given by the names of weights"):
        projected.add_param_group({"params": list(more.named_parameters())})
    assert len(projected.param_groups) == 1
    with pytest.raises(BadInput, match=r"takes its fields by name, as in AdamW\(lr=...\), or AdamW\(model.parameters"):
        AdamW(model)
    adam = AdamW(model.parameters())
    stepped(model, adam)
    with pytest.raises(BadInput, match="holds 'exp_avg', which AdaGrad does not keep"):
        AdaGrad(model.parameters()).load_state_dict(adam.state_dict())


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
def test_a_state_of_another_shape_or_device_is_refused(states: Any) -> None:
    """What is compiled would read and write past its end."""
    small, large = nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.zeros(64, 128))
    small.grad, large.grad = torch.ones(4, 8), torch.ones(64, 128)
    rule, other = AdamW([small], states=states), AdamW([large], states=states)
    rule.step()
    other.load_state_dict(rule.state_dict())
    with pytest.raises(BadInput, match=r"a weight of shape \(64, 128\) on cpu has a state 'exp_avg' of shape \(4, 8\)"):
        other.step()
    rule.state[small] = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in rule.state[small].items()}
    with pytest.raises(BadInput, match="on meta: make a new optimizer"):
        rule.step()


def test_groups_are_found_by_their_names() -> None:
    model = stack(3)
    named = list(model.named_parameters())
    matrices = {"params": [pair for pair in named if pair[1].dim() > 1], "lr": 0.1}
    vectors = {"params": [pair for pair in named if pair[1].dim() < 2], "lr": 0.01}
    rule = AdamW([matrices, vectors])
    stepped(model, rule)
    other = copy.deepcopy(model)
    named = list(other.named_parameters())
    turned = [{"params": [p for p in reversed(named) if (p[1].dim() > 1) == large]} for large in (False, True)]
    again = AdamW(turned)
    again.load_state_dict(copy.deepcopy(rule.state_dict()))
    assert [group["lr"] for group in again.param_groups] == [0.01, 0.1]
    assert torch.equal(stepped(other, again), stepped(model, rule))


def test_torchs_own_state_is_gone_on_with() -> None:
    model, ours = stack(2), stack(2)
    theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
    stepped(model, theirs)
    ours.load_state_dict(model.state_dict())
    rule = AdamW(ours.parameters(), lr=0.01)
    rule.load_state_dict({**rule.state_dict(), "state": copy.deepcopy(theirs.state_dict()["state"])})
    torch.testing.assert_close(stepped(ours, rule), stepped(model, theirs))


def test_an_empty_matrix_is_passed_over() -> None:
    empty = nn.Parameter(torch.zeros(4, 0))
    empty.grad = torch.zeros(4, 0)
    Muon([empty]).step()
    assert empty.shape == (4, 0)


def test_adagrad_norm_remembers_weights_that_have_no_gradient_now() -> None:
    v, w = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    rule = AdaGradNorm([v, w], lr=1.0)
    v.grad, w.grad = torch.tensor([30.0]), torch.tensor([40.0])
    rule.step()
    v.grad, w.grad = None, torch.tensor([1.0])
    rule.step()
    assert rule.param_groups[0]["length"] == pytest.approx((30**2 + 40**2 + 1) ** 0.5)


def test_gradnormlorp_takes_over_a_length_that_others_gave() -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, 8))
    rule = GradNormLoRP([w], lr=0.1, rank=2)
    w.grad = torch.randn(6, 8)
    rule.step()
    with torch.no_grad():
        w.mul_(0.5)
    halved = w.detach().clone()
    rule.param_groups[0]["lr"] = 1e-7
    rule.step()
    torch.testing.assert_close(w.detach(), halved, rtol=1e-4, atol=1e-5)


# -- methods around a method, and layers that take turns
# ------------------------------------------------------------------
@pytest.mark.parametrize("first", [0, 1])
def test_lora_plus_lengthens_the_step_and_nothing_else(first: int) -> None:
    def made(*methods: Method) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        train(model, (X, Y), methods=[LoRA(rank=2), *methods, SGD(lr=1e-3, momentum=0.0)], steps=1)
        return model.plait.lora.B.detach()  # type: ignore[no-any-return, union-attr, operator]

    both: list[Method] = [SAM(radius=0.5), LoRAPlus(ratio=4.0)]
    torch.testing.assert_close(made(*(both if first else both[::-1])), 4 * made(SAM(radius=0.5)))


def test_what_follows_a_step_sees_the_layers_that_were_stepped() -> None:
    methods = [LAWN(warmup=0.0, radius=1.0), LISA(layers=2, period=1, where="[0-9]", lr=0.1)]
    model = train(stack(6), (X, Y), methods=methods, steps=12).model
    assert norms(model) == pytest.approx([1.0] * 6, abs=1e-5)
    resting = [LAWN(warmup=0.0, radius=1.0, where="0"), LISA(layers=1, period=1, where="[0-9]", lr=0.1)]
    model = train(stack(3), (X, Y), methods=resting, steps=8).model
    assert norms(model)[0] == pytest.approx(1.0, abs=1e-5)


def test_a_loop_of_ones_own_goes_on_with_the_rounds_of_a_run() -> None:
    run = train(stack(4), (X, Y), methods=[LISA(layers=1, period=1, where="[0-9]")], steps=3)
    rule, trained = run.now.optimizer, set()
    for _ in range(12):
        stepped(run.model, rule)
        trained.add(tuple(layer.weight.requires_grad for layer in run.model))  # type: ignore[union-attr, arg-type]
    assert len(trained) > 1


def test_modules_keep_their_numbers_while_layers_take_turns() -> None:
    agvm = AGVM(every=1, momentum=0.0)
    run = train(stack(4), (X, Y), methods=[agvm, LISA(layers=1, period=2, where="[0-9]")], steps=9)
    state = run.now.of(agvm)
    assert state["scale"].shape == (4,)
    assert not [name for name in state if name.endswith("/before")]
    assert torch.equal(state["scale"], torch.ones(4, dtype=torch.float64))  # one module at a time: nothing to compare


def test_agvm_keeps_what_it_found_where_float16_overflows() -> None:
    def loss(output: Tensor, target: Tensor, now: object) -> Tensor:
        return 100 * (output - target).square().mean(-1)

    def scale(precision: str) -> Tensor:
        agvm = AGVM(every=1, momentum=0.0)
        run = train(stack(3), (X, Y), loss, [agvm, SGD(lr=1e-6)], steps=2, precision=precision, nonfinite="skip")
        found: Tensor = run.now.of(agvm)["scale"]
        return found

    torch.testing.assert_close(scale("float16"), scale("float32"), rtol=0.05, atol=0.02)


def test_tract_passes_over_a_layer_that_rests() -> None:
    run = train(stack(4), (X, Y), methods=[TrAct(), LISA(layers=1, period=1, where="[0-9]")], steps=6)
    assert len(run.history) == 6


def test_the_bound_on_errors_is_of_one_example() -> None:
    x = torch.randn(8, 9, 1, generator=torch.Generator().manual_seed(0))

    def moved(copies: int) -> Tensor:
        torch.manual_seed(0)
        model, method = nn.RNN(1, 3, batch_first=True), VanishingGradientRegularizer(strength=0.5, bound=2e-3)
        data = x.repeat(copies, 1, 1), x[:, :3, 0].repeat(copies, 1)
        train(model, data, methods=[method, SGD(lr=1.0)], call=lambda m, rows: m(rows)[0][:, -1], steps=1,
              batch_size=8 * copies)  # fmt: skip
        return model.weight_hh_l0.detach()

    torch.testing.assert_close(moved(8), moved(1), rtol=1e-4, atol=1e-5)


def test_the_parts_of_a_full_batch_are_the_whole_batchs() -> None:
    run = train(stack(2), (X, Y), methods=[FullBatch(block=8)], batch_size=32, steps=2)
    for seen in run.history:
        assert seen["loss"] == pytest.approx(seen["objective"], rel=1e-5)


# -- schedules
# ------------------------------------------------------------------------------------------------------------
def test_restarts_begin_at_the_peak_and_never_at_the_end() -> None:
    for cycles in (2, 3, 5, 7):
        for warmup in (0.0, 0.05, 0.1, 0.3):
            schedule = Cosine(peak=1.0, warmup=warmup, cycles=cycles)
            for cycle in range(1, cycles):
                assert schedule.at(warmup + cycle * (1 - warmup) / cycles) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Cosine(peak=1.0, cycles=2.5), "a cosine has a whole number of cycles"),  # type: ignore[arg-type]
        (lambda: Cosine(peak="a"), "the schedule 'cosine' needs a number for 'peak', not 'a'"),  # type: ignore[arg-type]
        (lambda: Cosine(peak=1.0, warmup=True), "the schedule 'cosine' needs a number for 'warmup', not True"),
        (lambda: WarmupStableDecay(peak=1.0, warmup=0.6, decay=0.6), "their sum is at most 1, not 0.6 \\+ 0.6"),
    ],
)
def test_schedules_that_cannot_be_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        make()
