"""Coherence of per-example gradients and their robust mean, against cases solved by hand and slow oracles."""

import pytest
import torch
from torch import nn

from plait import SGD, BadInput, Batch, Now, train
from plait.gradient.robust import WinsorizedGradient, winsorized_mean
from plait.loss.base import cross_entropy
from plait.math.per_example import per_example_gradients
from plait.measure.coherence import Coherence, m_coherence
from plait.method import Method
from plait.train import Run


def test_equal_gradients_help_everybody_and_orthogonal_ones_nobody_else() -> None:
    same = [(torch.tensor([2.0, 1.0]),)] * 5
    assert m_coherence(same) == (pytest.approx(5.0), 5)
    assert m_coherence([(row,) for row in torch.eye(4)]) == (pytest.approx(1.0), 4)
    assert m_coherence([(torch.tensor([1.0]),), (torch.tensor([-1.0]),)])[0] == 0.0


def test_is_the_double_sum_of_the_definition() -> None:
    gradients = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    pairs = sum(float(a @ b) for a in gradients for b in gradients) / 49
    squares = sum(float(a @ a) for a in gradients) / 7
    measured, count = m_coherence([(g[:4], g[4:]) for g in gradients])
    assert measured == pytest.approx(7 * pairs / squares, rel=1e-5)
    assert count == 7


def test_per_example_gradients_are_those_of_each_example_alone() -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 4), Batch.of(torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0]))
    now = Now()
    now.misfit = cross_entropy
    for row, gradient in enumerate(per_example_gradients(model, batch, now)):
        p = model(batch.inputs[row]).softmax(-1)
        p = p - nn.functional.one_hot(batch.target[row], 4)
        torch.testing.assert_close(gradient[0], torch.outer(p, batch.inputs[row]))
        torch.testing.assert_close(gradient[1], p)


def test_winsorized_mean_clips_entry_by_entry() -> None:
    values = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    for percentile, cut in ((0.0, 0), (10.0, 2), (30.0, 6), (49.9, 9)):
        expected = []
        for column in values.T.tolist():
            ordered = sorted(column)
            low, high = ordered[cut], ordered[19 - cut]
            expected.append(sum(min(max(v, low), high) for v in column) / 20)
        torch.testing.assert_close(winsorized_mean(values, percentile), torch.tensor(expected))


def test_zero_percent_is_the_plain_run_and_more_is_not() -> None:
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    data = inputs, (inputs.sum(1) > 0).long()

    def final(percentile: float) -> torch.Tensor:
        torch.manual_seed(0)
        return train(nn.Linear(4, 2), data, methods=[WinsorizedGradient(percentile=percentile)], steps=4).model.weight

    torch.manual_seed(0)
    plain = train(nn.Linear(4, 2), data, steps=4).model.weight
    assert torch.equal(final(0.0), plain)
    assert not torch.equal(final(20.0), plain)


def test_measures_inside_a_run() -> None:
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    run = train(nn.Linear(4, 2), (inputs, (inputs.sum(1) > 0).long()), methods=[Coherence()], steps=2, batch_size=12)
    figures = run.measures["Coherence()"][-1]
    assert figures["examples"] == 12
    assert 0 <= figures["coherence"] <= 1
    assert figures["m-coherence"] == pytest.approx(12 * figures["coherence"])


def test_where_names_the_weights_whose_gradients_are_watched_and_held_back() -> None:
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    data = inputs, (inputs.sum(1) > 0).long()

    def run(*methods: Method) -> Run:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        return train(model, data, methods=[*methods, SGD(lr=0.1)], steps=1, batch_size=24)

    plain, whole = run(Coherence(where="0")), run(WinsorizedGradient(percentile=20.0))
    part = run(WinsorizedGradient(percentile=20.0, where="0"))
    for name, weight in part.model.state_dict().items():
        assert torch.equal(weight, (whole if name.startswith("0") else plain).model.state_dict()[name])
        assert not torch.equal(weight, (plain if name.startswith("0") else whole).model.state_dict()[name])

    gradients = list(per_example_gradients(plain.model, next(plain.now.calibration(1)), plain.now))
    expected, _ = m_coherence([g[:2] for g in gradients])  # the first layer's weight and bias
    (figures,) = plain.measures["Coherence(where='0')"]
    assert figures["m-coherence"] == pytest.approx(expected)
    assert figures["m-coherence"] != pytest.approx(m_coherence(gradients)[0])


def test_a_loop_by_hand_is_told_to_set_the_misfit() -> None:
    model, now = nn.Linear(3, 2), Now(batch=Batch.of(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))

    def ask(model: nn.Module, now: Now) -> torch.Tensor:
        loss = cross_entropy(model(now.batch.inputs), now.batch.target, now).mean()
        loss.backward()
        return loss.detach()

    with pytest.raises(BadInput, match=r"use it inside plait.train, or set now.misfit.$"):
        WinsorizedGradient().gradient(ask)(model, now)
    now.misfit = cross_entropy
    assert WinsorizedGradient().gradient(ask)(model, now) > 0
