"""MixtureGrowth: weights as combinations of templates, and wider networks from new combinations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait import Adam, BadInput, Now, train
from plait.initialize.growth import Mixture, MixtureGrowth, new_coefficients, sets_of
from plait.method import Method
from plait.parametrize.base import attached, dense_weight
from plait.parametrize.folding import fold
from plait.tensors import write_tensors


def conv1d(into: int, out: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, into)


class Net(nn.Module):
    """Every kind of layer, a batch norm and an embedding."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(10, width)
        self.conv, self.norm = nn.Conv1d(width, 2 * width, 3, padding=1), nn.BatchNorm1d(2 * width)
        self.one, self.two = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, 2 * width)
        self.three, self.head = conv1d(2 * width, width), nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(self.words(tokens).transpose(1, 2)))).mean(2)
        return self.head(torch.tanh(self.three(torch.tanh(self.two(torch.tanh(self.one(hidden)))))))


def data() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 10, (32, 5), generator=torch.Generator().manual_seed(0))
    return tokens, tokens[:, 0] % 3


def member(folder: Path, seed: int, width: int = 2, steps: int = 8) -> str:
    methods: list[Method] = [MixtureGrowth(templates=2, share=2), Adam(lr=0.02)]
    model = train(Net(width, seed), data(), methods=methods, steps=steps, seed=seed).model
    path = folder / f"member-{seed}-{width}.safetensors"
    write_tensors(path, model.state_dict())
    return str(path)


def test_blocks_stand_where_the_authors_put_them() -> None:
    """chaudatascience/mixturegrowth: SConv2d(4, 6, 3), template_size [0.5, 0.5, 1], 4 templates in each of 2 sets,
    member_template_sets [0, 1, 0, 1], after growth_update(2), with everything drawn by seed 7 but the last
    coefficients, which it makes orthogonal. Each block times a cosine of its places, summed, to 1e-4.
    """
    generator = torch.Generator().manual_seed(7)
    templates = [nn.Parameter(torch.randn(4, 3, 2, 3, 3, generator=generator).flatten(2)) for _ in range(2)]
    members = [torch.randn(4, generator=generator) for _ in range(2)]
    third = torch.randn(4, generator=generator)
    fourth = torch.tensor([0.06021, 0.74239, 0.58059, 0.32886])
    mixture = Mixture([nn.Parameter(t.view(4, 3, 18)) for t in templates], torch.zeros(4, 4), (2, 2))
    with torch.no_grad():
        mixture.coefficients.copy_(torch.stack([members[0], third, fourth, members[1]]))
    whole = mixture.dense(torch.zeros(6, 36)).detach().double().view(6, 4, 3, 3)
    probe = torch.arange(whole.numel()).double().view(whole.shape).cos()
    sums = [float((whole * probe)[a : a + 3, b : b + 2].sum()) for a in (0, 3) for b in (0, 2)]
    assert sums == pytest.approx([0.02243, -2.32909, -2.87295, -1.55847], abs=1e-4)
    last = torch.linalg.svd(torch.stack([*members, third])).Vh[-1]
    assert float((last @ fourth).abs()) == pytest.approx(1.0, abs=1e-4)  # our rule, on what it saw


def test_new_coefficients_are_orthogonal_to_all_before() -> None:
    members = [torch.randn(6, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    made = new_coefficients(members, (2, 2), 0.5)
    assert torch.equal(made[0], members[0])
    assert torch.equal(made[3], members[1])
    torch.testing.assert_close(made[1:3] @ made[1:3].T, 0.25 * torch.eye(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(made[1:3] @ torch.stack(members).T, torch.zeros(2, 2), rtol=0, atol=1e-6)
    assert sets_of((3, 3), 2) == [0, 0, 1, 0, 1, 0, 1, 0, 1]
    assert sets_of((2, 1), 1) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_the_sum_of_its_templates(dtype: torch.dtype) -> None:
    model = Net(3).to(dtype)
    spread = float(model.two.weight.detach().float().std())
    MixtureGrowth(templates=3, share=2).parametrize(model)
    for name, layer, mixture in attached(model, Mixture):
        weight = dense_weight(layer)
        assert weight.shape == layer.weight.shape
        assert not layer.weight.requires_grad
        slow = sum(c.detach() * t.detach() for c, t in zip(mixture.coefficients[0], mixture.templates[0], strict=True))
        slow = slow.T if name == "three" else slow.view(weight.shape)
        torch.testing.assert_close(weight, slow.to(dtype), rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    mixtures = {name: mixture for name, _, mixture in attached(model, Mixture)}
    assert mixtures["one"].templates[0] is mixtures["two"].templates[0]
    assert (mixtures["one"].coefficients @ mixtures["two"].coefficients.T).item() == pytest.approx(0, abs=1e-5)
    assert 0.6 * spread < float(dense_weight(model.two).detach().float().std()) < 1.5 * spread
    before = model.eval()(data()[0]).detach()
    torch.testing.assert_close(fold(model)(data()[0]).detach(), before, rtol=1e-5, atol=1e-5)


def test_without_new_blocks_the_grown_network_gives_the_sum_of_its_members(tmp_path: Path) -> None:
    sources = (member(tmp_path, 0), member(tmp_path, 1))
    tokens, expected = data()[0], torch.zeros(32, 3)
    for source in sources:
        small = Net(2)
        MixtureGrowth(templates=2, share=2).parametrize(small)
        from plait.tensors import read_tensors

        small.load_state_dict(read_tensors(Path(source)))
        expected = expected + small.eval()(tokens).detach()
    model, grow = Net(4), MixtureGrowth(sources=sources, scale=0.0)
    grow.parametrize(model)
    grow.initialize(model, Now())
    torch.testing.assert_close(model.eval()(tokens).detach(), expected, rtol=1e-5, atol=1e-5)
    model, grow = Net(4), MixtureGrowth(sources=sources)
    grow.parametrize(model)
    grow.initialize(model, Now())
    grids = {name: mixture.grid for name, _, mixture in attached(model, Mixture)}
    assert grids == {"conv": (2, 2), "one": (2, 2), "two": (2, 2), "three": (2, 2), "head": (1, 2)}
    assert model.one.plait.mixture.templates[1] is model.two.plait.mixture.templates[1]
    assert float((model.eval()(tokens) - expected).detach().abs().max()) > 0.05


def test_one_network_can_grow_threefold_and_train_on(tmp_path: Path) -> None:
    grow = MixtureGrowth(sources=(member(tmp_path, 0),), scale=0.3)
    run = train(Net(6), data(), methods=[grow, Adam(lr=0.01)], steps=10)
    assert run.model.one.plait.mixture.coefficients.shape == (9, 4)
    assert run.history[-1]["objective"] < run.history[0]["objective"]
    values = run.model.state_dict()
    assert not torch.equal(values["one.plait.mixture.coefficients"][0], values["one.plait.mixture.coefficients"][1])


class Stopped(Exception):
    pass


def test_a_grown_run_resumes_bitwise(tmp_path: Path) -> None:
    sources = (member(tmp_path, 0), member(tmp_path, 1))

    def run(folder: Path, stop: int | None = None) -> dict[str, Tensor]:
        def on_step(now: Now) -> None:
            if now.step == stop:
                raise Stopped

        kept: dict[str, Any] = {"steps": 6, "batch_size": 8, "save_every": 2, "folder": folder, "on_step": on_step}
        return train(Net(4), data(), methods=[MixtureGrowth(sources=sources), Adam()], **kept).model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop=3)
    resumed = run(tmp_path / "cut")
    assert list(whole) == list(resumed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path) -> None:
    one, other, wide = member(tmp_path, 0), member(tmp_path, 1), member(tmp_path, 0, width=3, steps=1)
    write_tensors(tmp_path / "plain.safetensors", Net(2).state_dict())
    cases: list[tuple[nn.Module, tuple[str, ...], str]] = [
        (Net(4), (one, other, one), "one or two networks, not from 3"),
        (Net(4), (str(tmp_path / "plain.safetensors"),), "no templates of 'conv'"),
        (Net(5), (one,), "a whole number of times"),
        (Net(4), (one, wide), "templates of two shapes"),
        (Net(2), (one, other), "give one source for a network as wide"),
        (Net(4), ("nowhere",), "there is no file nowhere"),
    ]
    for model, sources, says in cases:
        with pytest.raises(BadInput, match=says):
            train(model, data(), methods=[MixtureGrowth(sources=sources)], steps=1)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(BadInput, match="another layer shares"):
        MixtureGrowth().parametrize(tied)
