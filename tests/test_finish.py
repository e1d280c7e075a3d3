"""Merging, averaging, pruning and folding against oracles written from the equations."""

from pathlib import Path

import pytest
import torch
from torch import nn

from plait import BadInput, Batch, Now, train
from plait.finish.fisher import FisherMerge, fisher_diagonal, fisher_merge
from plait.finish.fold import Fold
from plait.finish.prune import MagnitudePruning
from plait.finish.soup import ModelSoup, greedy_soup, learned_soup, uniform_soup
from plait.parametrize.low_rank import LoRA
from plait.tensors import write_tensors


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()


def states(count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [{name: t.clone() for name, t in net(seed).state_dict().items()} for seed in range(count)]


def test_uniform_soup_is_the_mean_of_each_weight() -> None:
    members = states()
    for name, tensor in uniform_soup(members).items():
        torch.testing.assert_close(tensor, (members[0][name] + members[1][name] + members[2][name]) / 3)


def test_greedy_soup_follows_the_published_loop() -> None:
    """Oracle: Algorithm 1 on scalars, with the losses worked by hand."""
    members = [{"w": torch.tensor([v])} for v in (3.0, 1.0, -1.0, 0.9)]

    def loss(state: dict[str, torch.Tensor]) -> float:
        return abs(float(state["w"]))

    # Best first: 0.9, then 1.0 (mean 0.95 is worse: out), then -1.0 (mean -0.05: in), then 3.0 (0.967: out).
    soup, chosen = greedy_soup(members, loss)
    assert chosen == [2, 3]
    assert float(soup["w"]) == pytest.approx(-0.05)


def test_greedy_soup_is_never_worse_than_its_best_member() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        members = [{"w": torch.randn(3, generator=generator)} for _ in range(5)]
        curvature = torch.rand(3, generator=generator)

        def loss(state: dict[str, torch.Tensor], curvature: torch.Tensor = curvature) -> float:
            return float((curvature * state["w"].square()).sum())

        assert loss(greedy_soup(members, loss)[0]) <= min(map(loss, members))


def test_learned_soup_finds_the_mixture_that_a_grid_finds() -> None:
    members = [{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}]
    _, alpha = learned_soup(members, lambda s: (s["w"] - 0.3).square().sum(), steps=300)
    grid = torch.linspace(0, 1, 1001)
    assert float(alpha[1]) == pytest.approx(float(grid[(grid - 0.3).square().argmin()]), abs=0.01)


def test_fisher_diagonal_equals_a_loop_over_examples_and_classes() -> None:
    model, (inputs, targets) = net(), data()
    fast = fisher_diagonal(model, [Batch.of(inputs[:7], targets[:7]), Batch.of(inputs[7:], targets[7:])])
    slow = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x in inputs:
        for c in range(3):
            model.zero_grad()
            log = model(x[None]).log_softmax(-1)[0]
            log[c].backward()
            for name, p in model.named_parameters():
                slow[name] += float(log[c].detach().exp()) * p.grad**2 / len(inputs)
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name])


def test_fisher_of_softmax_regression_is_known_in_closed_form() -> None:
    """For logits W x the diagonal entry of W_cj is E[p_c (1 - p_c) x_j^2]."""
    model, (inputs, targets) = nn.Linear(4, 3), data()
    p = model(inputs).softmax(-1).detach()
    expected = torch.einsum("nc,nj->cj", p * (1 - p), inputs.square()) / len(inputs)
    torch.testing.assert_close(fisher_diagonal(model, [Batch.of(inputs, targets)])["weight"], expected)


def test_fisher_merge_is_the_published_average_and_equal_fishers_give_the_mean() -> None:
    one, other = states(2)
    fisher = [{name: torch.rand_like(t) for name, t in one.items()} for _ in range(2)]
    merged = fisher_merge([one, other], fisher, [0.7, 0.3])
    for name in one:
        a, b = 0.7 * fisher[0][name], 0.3 * fisher[1][name]
        torch.testing.assert_close(merged[name], (a * one[name] + b * other[name]) / (a + b))
    alike = fisher_merge([one, other], [{n: torch.ones_like(t) for n, t in one.items()}] * 2)
    for name in one:
        torch.testing.assert_close(alike[name], (one[name] + other[name]) / 2)


def test_fisher_leaves_the_model_as_it_was() -> None:
    model, (inputs, targets) = net().train(), data()
    model[0].requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fisher_diagonal(model, [Batch.of(inputs, targets)])
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["uniform", "greedy", "learned"])
def test_soup_inside_a_run(kind: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "member.safetensors", net(1).state_dict())
    soup = ModelSoup(kind=kind, members=(str(tmp_path / "member.safetensors"),))
    plain = train(net(), data(), steps=5, validation=data(1))
    mixed = train(net(), data(), steps=5, validation=data(1), methods=[soup])
    if kind == "uniform":
        expected = (plain.model[0].weight + net(1)[0].weight) / 2
        torch.testing.assert_close(mixed.model[0].weight, expected)
    if kind == "greedy":
        assert plain.now.evaluate(mixed.model) <= plain.now.evaluate(plain.model)


def test_fisher_merge_inside_a_run(tmp_path: Path) -> None:
    member = net(1)
    write_tensors(tmp_path / "m.safetensors", member.state_dict())
    fisher = fisher_diagonal(member, [Batch.of(*data(1))])
    write_tensors(tmp_path / "f.safetensors", fisher)
    files = {"members": (str(tmp_path / "m.safetensors"),), "fishers": (str(tmp_path / "f.safetensors"),)}
    plain = train(net(), data(), steps=5)
    merged = train(net(), data(), steps=5, methods=[FisherMerge(**files)])
    own = fisher_diagonal(plain.model, list(plain.now.calibration(4)))
    expected = fisher_merge([plain.model.state_dict(), member.state_dict()], [own, fisher])
    for name, tensor in merged.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "other.safetensors", nn.Sequential(nn.Linear(4, 9)).state_dict())
    soup = ModelSoup(members=(str(tmp_path / "other.safetensors"),), kind="uniform")
    with pytest.raises(BadInput, match=r"'0.weight' is \(9, 4\) in .* and \(8, 4\) here"):
        train(net(), data(), steps=1, methods=[soup])
    with pytest.raises(BadInput, match="there is no file"):
        train(net(), data(), steps=1, methods=[ModelSoup(members=("nowhere",), kind="uniform")])


class Tied(nn.Module):
    """A head that shares its weight with the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Both layers."""
        return self.last(self.first(inputs[:, :3]))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("made", [net, Tied])
def test_a_member_may_be_the_folder_of_a_run(made: type[nn.Module], frozen: bool, tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        given = made()
        next(given.parameters()).requires_grad_(not frozen)
        return given

    member = train(model(), data(1), steps=11, seed=1, folder=tmp_path / "a", save_every=2).model
    plain = train(model(), data(), steps=3).model
    for folder in (tmp_path / "a", tmp_path / "a" / "step-11"):
        mixed = train(model(), data(), steps=3, methods=[ModelSoup(kind="uniform", members=(str(folder),))]).model
        for name, tensor in mixed.state_dict().items():
            torch.testing.assert_close(tensor, (plain.state_dict()[name] + member.state_dict()[name]) / 2)


def test_members_that_are_not_there_are_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_tensors(tmp_path / "m.safetensors", net(1).state_dict())
    here, steps = str(tmp_path / "m.safetensors"), []
    for method, says in (
        (ModelSoup(members=("nowhere",)), "there is no file nowhere"),
        (ModelSoup(members=(here, str(tmp_path / "empty"))), "empty holds no safetensors file: name a model's file"),
        (FisherMerge(members=("nowhere",)), "there is no file nowhere"),
        (FisherMerge(members=(here,), fishers=("nowhere",)), "there is no file nowhere"),
    ):
        with pytest.raises(BadInput, match=says):
            train(net(), data(), steps=1, methods=[method], on_start=steps.append)
    assert steps == []


def two_of_four_by_hand(row: list[float]) -> list[float]:
    """Zero the two smallest of every four."""
    kept: list[float] = []
    for start in range(0, len(row), 4):
        group = row[start : start + 4]
        stay = sorted(range(4), key=lambda i: -abs(group[i]))[:2]
        kept += [value if i in stay else 0.0 for i, value in enumerate(group)]
    return kept


@pytest.mark.parametrize("layer", [nn.Linear(8, 3), nn.Conv1d(8, 3, 2)], ids=["linear", "conv"])
def test_pruning_keeps_the_largest_two_of_four(layer: nn.Module) -> None:
    weight = layer.weight.detach().clone()
    rows = weight if weight.dim() == 2 else weight.movedim(1, -1)
    expected = torch.tensor([two_of_four_by_hand(r) for r in rows.reshape(-1, 8).tolist()]).view(rows.shape)
    MagnitudePruning().finish(layer, Now())
    pruned = layer.weight if weight.dim() == 2 else layer.weight.movedim(1, -1)
    torch.testing.assert_close(pruned.detach(), expected)


def test_pruning_works_on_what_adapters_make_of_a_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    LoRA(rank=2).parametrize(model)
    nn.init.normal_(model[0].plait["lora"].B)
    dense = (
        model[0].weight + model[0].plait["lora"].scale * model[0].plait["lora"].B @ model[0].plait["lora"].A
    ).detach()
    MagnitudePruning().finish(model, Now())
    assert isinstance(model[0], nn.Linear)
    assert "0.plait.lora.A" not in model.state_dict()
    expected = torch.tensor([two_of_four_by_hand(row) for row in dense.tolist()])
    torch.testing.assert_close(model[0].weight.detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_keeps_the_function(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    LoRA(rank=2).parametrize(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("B"):
                p.normal_()
    inputs = data()[0].to(dtype)
    before = model(inputs)
    folded = Fold().finish(model, Now())
    # bfloat16: the product B A and the sum are rounded to 8 bits once each
    torch.testing.assert_close(
        folded(inputs),
        before,
        rtol=1e-5 if dtype == torch.float32 else 5e-2,
        atol=1e-5 if dtype == torch.float32 else 0.1,
    )


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (lambda: ModelSoup(), "ModelSoup has no members: name the other models' files in members."),
        (lambda: FisherMerge(), "FisherMerge has no members: name the other models' files in members."),
        (
            lambda: FisherMerge(members=("a", "b"), fishers=("c",)),
            "FisherMerge has 2 members and 1 fishers: give one file for each member, or none.",
        ),
    ],
)
def test_bad_input(method: object, sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        method().check(net(), [])  # type: ignore[operator]
    assert str(caught.value) == sentence


def test_n_must_be_below_m() -> None:
    with pytest.raises(BadInput, match="n must be below m, not 4 of 4"):
        MagnitudePruning(n=4)
