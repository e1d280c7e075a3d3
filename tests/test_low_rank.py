"""Low-rank gradient methods: how and when a subspace is found, what it costs in bytes and products, and resuming."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from plait.errors import BadInput
from plait.math.moments import step_moments
from plait.math.subspace import (
    captured,
    cosine_matrix,
    cosine_rows,
    cosine_transform,
    exact_rows,
    principal_angles,
    ranged_rows,
    tracked_rows,
)
from plait.math.svd import OVERSAMPLE, leading_rows
from plait.measure.subspace import SubspaceAngle
from plait.recipe import Recipe, make
from plait.step.adam import AdamW
from plait.step.dct import DCTAdam
from plait.step.low_rank import Fira, GaLore, LowRank
from plait.step.weight_normalized import GradNormLoRP
from plait.train import train
from plait.workbench.memory import optimizer_bytes
from test_step import state_of

KINDS = ["exact", "sketched", "tracked", "cosines"]
RULES: list[type[LowRank]] = [GaLore, Fira]


def falling(rows: int, columns: int, ratio: float = 0.8, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall by `ratio`, in float64."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, rows, generator=draw, dtype=torch.float64)).Q
    return left * ratio ** torch.arange(rows) @ right.T


# -- subspaces
# --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 30])
def test_the_cosine_transform_is_its_definition(count: int) -> None:
    draw = np.random.default_rng(0)
    matrix = draw.normal(size=(count, 3))
    slow = np.zeros_like(matrix)
    for k in range(count):
        for i in range(count):
            slow[k] += matrix[i] * np.cos(np.pi * (2 * i + 1) * k / (2 * count))
        slow[k] *= np.sqrt((1 if k == 0 else 2) / count)
    given = torch.tensor(matrix)
    assert np.allclose(cosine_transform(given), slow, atol=1e-12)
    cosines = cosine_matrix(count, torch.float64, given.device)
    assert np.allclose(cosines.T @ given, slow, atol=1e-12)
    assert torch.allclose(cosines.T @ cosines, torch.eye(count, dtype=torch.float64), atol=1e-12)


def test_the_cosines_that_hold_most_are_taken() -> None:
    cosines = cosine_matrix(12, torch.float64, torch.device("cpu"))
    lengths = torch.tensor([5.0, 0.1, 3.0, 0.1, 0.1, 7.0, *[0.0] * 6], dtype=torch.float64)
    matrix = cosines * lengths @ falling(12, 20, 1.0)
    columns, rows = cosine_rows(matrix, 3)
    assert columns.tolist() == [0, 2, 5]
    assert torch.allclose(rows, cosines[:, columns].T @ matrix)
    assert cosine_rows(torch.zeros(12, 20), 3)[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(40, 70), (40, 40)])
def test_each_way_returns_an_orthonormal_basis_and_what_the_matrix_is_in_it(shape: tuple[int, int]) -> None:
    matrix = falling(*shape).float()
    last = exact_rows(matrix + 0.02 * falling(*shape, seed=1).float(), 6)[0]
    ways = [exact_rows(matrix, 6), ranged_rows(matrix, 6), tracked_rows(matrix, last), leading_rows(matrix, 6)]
    for u, rows in ways:
        assert torch.allclose(u.T @ u, torch.eye(6), atol=2e-6)
        assert torch.allclose(rows, u.T @ matrix, atol=2e-6)


def test_the_exact_basis_is_numpys() -> None:
    matrix = falling(15, 22)
    u, rows = exact_rows(matrix, 4)
    theirs, s, _ = np.linalg.svd(matrix.numpy())
    assert np.allclose(np.abs((u.numpy() * theirs[:, :4]).sum(0)), 1.0)
    assert np.allclose(rows.norm(dim=1), s[:4])
    assert all(row[row.abs().argmax()] > 0 for row in rows)


def test_one_pass_finds_all_of_a_matrix_of_low_rank() -> None:
    matrix = falling(40, 70, 0.9)[:, :70] @ torch.zeros(70, 70, dtype=torch.float64).fill_diagonal_(1.0)
    low = exact_rows(matrix, 5)
    matrix = low[0] @ low[1]
    assert float(principal_angles(ranged_rows(matrix, 5)[0], low[0]).max()) < 1e-4


def test_tracking_arrives_at_the_exact_basis_and_keeps_signs() -> None:
    """Orthogonal iteration: vector by vector, in falling order, each with the sign that it began with."""
    matrix = falling(40, 70, 0.7)
    exact, _ = exact_rows(matrix, 5)
    turned = exact * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    u = torch.linalg.qr(turned + 0.05 * falling(40, 40, 1.0, seed=2)[:, :5]).Q
    u = u * (u * turned).sum(0).sign()
    for _ in range(60):
        u, _ = tracked_rows(matrix, u)
    assert torch.allclose(u, turned, atol=1e-8)


def test_principal_angles_are_scipys() -> None:
    from scipy.linalg import subspace_angles

    draw = torch.Generator().manual_seed(0)
    one, other = (torch.linalg.qr(torch.randn(30, 5, generator=draw, dtype=torch.float64)).Q for _ in range(2))
    ours = principal_angles(one, other)
    assert np.allclose(ours, np.rad2deg(subspace_angles(one.numpy(), other.numpy()))[::-1])
    assert float(principal_angles(one, one).max()) < 1e-5


def test_dearer_ways_are_nearer_to_the_exact_subspace() -> None:
    """Singular values that fall to a half over 13: 12 of 60 directions, and a last basis that is 0.03 wrong."""
    matrix = falling(60, 100, 0.95).float()
    exact, _ = exact_rows(matrix, 12)
    last = torch.linalg.qr(exact + 0.03 * torch.randn(60, 12, generator=torch.Generator().manual_seed(3))).Q
    found = {
        "sketched": leading_rows(matrix, 12, 2)[0],
        "tracked": tracked_rows(matrix, last)[0],
        "ranged": ranged_rows(matrix, 12)[0],
        "cosines": cosine_matrix(60, torch.float32, matrix.device)[:, cosine_rows(matrix, 12)[0]],
    }
    angle = {name: float(principal_angles(u, exact).mean()) for name, u in found.items()}
    part = {name: captured(u, matrix, exact) for name, u in found.items()}
    assert angle["sketched"] < angle["ranged"] < angle["cosines"]
    assert angle["tracked"] < float(principal_angles(last, exact).mean())
    assert angle["tracked"] < angle["ranged"]
    assert part["sketched"] > 0.98
    assert part["tracked"] > 0.98
    assert part["ranged"] > 0.6
    assert all(p <= 1 + 1e-6 for p in part.values())


# -- the rule with each of them
# ---------------------------------------------------------------------------------------------
def slow_projector(kind: str, g: np.ndarray, last: np.ndarray | None, rank: int) -> np.ndarray:
    """P as each way defines it; where none is defined by its letter (a first sketch), the exact one."""
    if kind == "cosines":
        m = len(g)
        d = np.array([[np.cos(np.pi * (2 * i + 1) * k / (2 * m)) for k in range(m)] for i in range(m)])
        d /= np.linalg.norm(d, axis=0)
        return d[:, np.sort(np.argsort(-np.linalg.norm(d.T @ g, axis=1))[:rank])]
    if kind == "tracked" and last is not None:
        q, _ = np.linalg.qr(g @ g.T @ last)
        return q * np.sign((q * last).sum(0))
    u, _, vh = np.linalg.svd(g, full_matrices=False)
    return (u * np.sign(vh[np.arange(len(vh)), np.abs(vh).argmax(1)]))[:, :rank]


@pytest.mark.parametrize("kind", ["exact", "tracked", "cosines"])
@pytest.mark.parametrize("shape", [(14, 20), (20, 14)])
def test_galore_follows_its_equations_in_each_subspace(kind: str, shape: tuple[int, int]) -> None:
    rank, period, lr = 2, 4, 0.02
    draw = np.random.default_rng(1)
    w, gradients = draw.normal(size=shape), list(draw.normal(size=(11, *shape)))
    p = nn.Parameter(torch.tensor(w))
    # A sketch of enough iterations is exact to rounding: then the first tracked basis is known, too.
    optimizer = GaLore([p], lr=lr, rank=rank, period=period, subspace=kind, spread=False, sketch=300, scale=0.5)
    for g in gradients:
        p.grad = torch.tensor(g)
        optimizer.step()
    lying = (lambda x: x.T) if shape[0] > shape[1] else (lambda x: x)
    w, m, v, basis = lying(w), 0.0, 0.0, None
    for t, g in enumerate(map(lying, gradients), 1):
        if (t - 1) % period == 0:
            basis = slow_projector(kind, g, basis, rank)
        r = basis.T @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r**2
        w = w - lr * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * 0.5 * basis @ (m / (np.sqrt(v) + 1e-6))
    assert np.allclose(lying(p.detach().numpy()), w, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bitwise_with_its_projector_whatever_the_order_of_the_parameters(rule: type, kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    start = {name: torch.randn(24, 31, generator=draw) for name in "abc"} | {"d": torch.randn(5, generator=draw)}
    gradients = [{name: torch.randn(t.shape, generator=draw) for name, t in start.items()} for _ in range(12)]

    def made(order: str, held: dict[str, Tensor]) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        weights = {name: nn.Parameter(held[name].clone()) for name in order}
        return weights, rule(list(weights.items()), lr=0.02, rank=3, period=4, subspace=kind)

    def go(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for name, p in weights.items():
                p.grad = gradients[step][name].clone()
            optimizer.step()

    whole, optimizer = made("abcd", start)
    go(whole, optimizer, range(12))
    for cut in (1, 3, 6):
        half, optimizer = made("abcd", start)
        go(half, optimizer, range(cut))
        rest, again = made("cadb", {name: p.detach() for name, p in half.items()})
        again.load_state_dict(state_of(optimizer))
        projectors = {n: p for n, p in rest.items() if "projector" in again.state[p] or "columns" in again.state[p]}
        assert set(projectors) == set("abc")
        go(rest, again, range(cut, 12))
        assert all(torch.equal(whole[name], rest[name]) for name in start)


def large_gradients(steps: int, shape: tuple[int, int] = (300, 500)) -> list[Tensor]:
    """Of a matrix that is large enough for the compiled kernel and for oneDNN's products."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for _ in range(steps)]


@pytest.mark.parametrize(("shape", "rank"), [((31, 24), 3), ((500, 300), 40)])
def test_a_checkpoint_that_keeps_no_strides_goes_on_bitwise(shape: tuple[int, int], rank: int) -> None:
    gradients = large_gradients(5, shape)

    def go(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: list[Tensor]) -> None:
        for g in steps:
            p.grad = g.clone()
            optimizer.step()

    whole = nn.Parameter(torch.zeros(shape))
    optimizer = GaLore([whole], lr=0.1, rank=rank, period=3)
    go(optimizer, whole, gradients[:2])
    part = nn.Parameter(whole.detach().clone())
    again, saved = GaLore([part], lr=0.1, rank=rank, period=3), copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["projector"] = saved["state"][0]["projector"].contiguous()
    again.load_state_dict(saved)
    go(optimizer, whole, gradients[2:])
    go(again, part, gradients[2:])
    assert torch.equal(whole, part)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_moments_are_adams(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gradients = large_gradients(4)
    held, slow = (
        [torch.zeros(300, 500) for _ in range(2)],
        [torch.zeros(300, 500, dtype=torch.float64) for _ in range(2)],
    )
    for g in gradients:
        found = step_moments(g, *held, (0.9, 0.999), 1e-6)
        slow[0] = 0.9 * slow[0] + 0.1 * g.double()
        slow[1] = 0.999 * slow[1] + 0.001 * g.double() ** 2
    torch.set_num_threads(before)
    for a, b in zip(held, slow, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-6, atol=1e-6)
    # Where gradients cancel, the mean's rounding of 1e-7 is divided by a square root of 0.03.
    assert torch.allclose(found.double(), slow[0] / (slow[1].sqrt() + 1e-6), rtol=1e-6, atol=1e-5)
    assert step_moments(gradients[0].double(), *slow, (0.9, 0.999), 1e-6).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_cut_goes_on_bitwise(kind: str, tmp_path: Path) -> None:
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    rule = Fira(lr=0.01, rank=3, period=3, subspace=kind)

    def go(steps: int, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 24))
        run = train(model, (x, x.flip(1)), methods=[rule], steps=steps, batch_size=8, accumulate=2, **options)
        return run.model.state_dict()

    whole = go(9)
    go(5, folder=tmp_path, save_every=5)
    assert all(torch.equal(t, whole[name]) for name, t in go(9, folder=tmp_path, save_every=5).items())


def test_accumulated_gradients_are_one_step_of_their_sum() -> None:
    """The authors' layerwise code takes a step of Adam for each micro-batch."""
    draw = torch.Generator().manual_seed(0)
    pieces = [[torch.randn(20, 30, generator=draw) for _ in range(3)] for _ in range(6)]
    ends = []
    for summed in (True, False):
        w = nn.Parameter(torch.zeros(20, 30))
        optimizer = GaLore([w], rank=4, period=2)
        for held in pieces:
            w.grad = None
            if summed:
                w.grad = held[0] + held[1] + held[2]
            else:
                for piece in held:
                    (w * piece).sum().backward()
            optimizer.step()
        assert optimizer.state[w]["step"] == 6
        ends.append(w.detach().clone())
    assert torch.equal(*ends)


# -- rank and period by name
# ------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Two layers that are told apart by name."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.down, self.norm = nn.Linear(20, 20), nn.Linear(20, 12), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(torch.tanh(self.q_proj(x))))


def test_rank_and_period_by_name() -> None:
    model = Attention()
    rule = GaLore(rank={"q_proj": 4, "down": 2}, period={"down": 5, ".*": 7})
    optimizer = rule.optimizer(model.named_parameters())
    told = {name: (group["rank"], group["period"]) for group in optimizer.param_groups for name in group["param_names"]}
    assert told == {
        **{"q_proj.weight": (4, 7), "q_proj.bias": (4, 7), "down.weight": (2, 5), "down.bias": (2, 5)},
        **{"norm.weight": (0, 7), "norm.bias": (0, 7)},
    }
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.state[model.q_proj.weight]["exp_avg"].shape == (4, 20)
    assert optimizer.state[model.down.weight]["exp_avg"].shape == (2, 20)
    assert optimizer.state[model.norm.weight]["exp_avg"].shape == (12,)


def test_a_recipe_gives_ranks_by_name_and_reads_back() -> None:
    text = (
        "model: minilm\ndata: tweets\nmethods:\n- fira: {rank: {'q_proj|k_proj': 64, '.*': 128}, subspace: cosines}\n"
    )
    recipe = Recipe.parse(text)
    assert recipe.build() == [Fira(rank={"q_proj|k_proj": 64, ".*": 128}, subspace="cosines")]
    assert Recipe.parse(str(recipe)) == recipe
    assert recipe.with_("methods.fira.rank=32").build() == [Fira(rank=32, subspace="cosines")]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rank": -1}, "GaLore.rank must be a whole number of at least 0, or such numbers by pattern of name, not -1."),
    (
        {"rank": {"q": 1.5}},
        "GaLore.rank must be a whole number of at least 0, or such numbers by pattern of name, not {'q': 1.5}.",
    ),
    ({"period": {}}, "GaLore.period must be a whole number of at least 1, or such numbers by pattern of name, not {}."),
    (
        {"rank": {"q_(": 4}},
        "GaLore.rank must have regular expressions for names (missing ), unterminated subpattern at position 2), "
        "not {'q_(': 4}.",
    ),
    ({"subspace": "svd"}, "GaLore.subspace must be 'exact', 'sketched', 'tracked' or 'cosines', not 'svd'."),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED)
def test_refuses_bad_fields_in_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput) as problem:
        make("galore", fields)
    assert str(problem.value) == sentence


def test_firas_residual_may_not_be_made_to_vanish() -> None:
    assert Fira(growth=1.0).growth == 1
    with pytest.raises(BadInput, match=r"^Fira.growth must be at least 1, not 0.5.$"):
        Fira(growth=0.5)


def test_refuses_names_that_match_nothing() -> None:
    model = Attention()
    with pytest.raises(BadInput) as problem:
        train(model, (torch.zeros(4, 20), torch.zeros(4, 12)), methods=[GaLore(rank={"q_porj": 4, ".*": 2})], steps=1)
    assert str(problem.value) == (
        "GaLore.rank has the pattern 'q_porj', which matches no trained weight (did you mean 'q_proj'?)."
    )
    with pytest.raises(BadInput, match="give it model"):
        GaLore(model.parameters(), rank={".*": 2})


# -- cost
# -------------------------------------------------------------------------------------------------------------------
# The matrices of one of SmolLM2-135M's thirty layers: query, key, value, output, gate, up, down.
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def state_bytes(rule: Any, shapes: list[tuple[int, int]], **fields: Any) -> int:
    draw = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in weights:
        p.grad = torch.randn(p.shape, generator=draw)
    optimizer = rule(weights, **fields)
    optimizer.step()
    return optimizer_bytes(optimizer)


def test_states_take_65_percent_less_room_than_adamws() -> None:
    """As published, at rank 128, in bytes as they lie in memory. 69 % less here, 75 % where P is a list of cosines."""
    adamw = state_bytes(AdamW, LAYER)
    assert adamw == 2 * 4 * sum(a * b for a, b in LAYER)
    galore = state_bytes(GaLore, LAYER, rank=128)
    assert galore == 4 * sum(min(s) * 128 + 2 * 128 * max(s) for s in LAYER)
    assert galore < 0.35 * adamw
    assert state_bytes(GaLore, LAYER, rank=128, subspace="cosines") < 0.26 * adamw
    assert state_bytes(Fira, LAYER, rank=128) == galore + 4 * len(LAYER)


def step_products(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], draw: torch.Generator) -> int:
    """Multiplications and additions of a step's matrix products and QR decompositions."""

    def qr(shape: tuple[int, int], *_: Any, **__: Any) -> int:
        rows, columns = shape
        return 4 * rows * columns**2 - 4 * columns**3 // 3

    for p in weights:
        p.grad = torch.randn(p.shape, generator=draw)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.linalg_qr: qr})
    with counter:
        optimizer.step()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_is_twice_as_dear_as_the_median_not_even_the_first(
    rule: type, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in products and decompositions; what is not counted (eigenvectors) must not happen at the first step."""
    draw = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.zeros(72, 144)) for _ in range(40)]
    optimizer = rule(weights, rank=16, period=200, subspace=kind)
    with monkeypatch.context() as first:
        first.setattr(torch.linalg, "eigh", None)
        work = [step_products(optimizer, weights, draw)]
    work += [step_products(optimizer, weights, draw) for _ in range(30)]
    assert max(work) <= 2 * sorted(work)[len(work) // 2]


def test_each_matrix_is_refreshed_once_a_period() -> None:
    rule = GaLore(rank=2)
    for period in (1, 3, 7, 50, 200):
        group = {"period": period, "spread": True}
        for number in (0, 1, 5, 100):
            due = [step for step in range(1, 2 * period + 40) if rule.refreshes(step, group, number)]
            assert due[0] == 1
            assert 2 <= due[1] <= 21
            assert all(b - a == period for a, b in pairwise(due[1:]))
    busiest = max(sum(rule.refreshes(s, {"period": 200, "spread": True}, n) for n in range(210)) for s in range(2, 210))
    assert busiest <= 12  # of 210 matrices over 20 steps


# -- the measure
# ------------------------------------------------------------------------------------------------------------
def angles(**fields: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 24))
    rule = GaLore(lr=1e-7, rank=3, period=2, spread=False, **fields)
    run = train(model, (x, x.flip(1)), methods=[rule, SubspaceAngle()], steps=3, batch_size=64)
    (figures,) = run.measures["SubspaceAngle()"]
    return figures


def test_the_measure_watches_the_matrices_that_where_names() -> None:
    torch.manual_seed(1)
    x = torch.randn(16, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    run = train(model, (x, x), methods=[GaLore(rank=2), SubspaceAngle(), SubspaceAngle(where="0")], steps=1)
    matrices = {name: figures[-1]["matrices"] for name, figures in run.measures.items()}
    assert matrices == {"SubspaceAngle()": 2, "SubspaceAngle(where='0')": 1}


def test_the_measure_tells_good_subspaces_from_bad() -> None:
    """The batch is all the data and the rate next to nothing, so that the gradient is the refresh's own."""
    exact, cosines = angles(subspace="exact"), angles(subspace="cosines")
    assert exact["matrices"] == cosines["matrices"] == 2
    assert exact["largest"] < 0.1
    assert exact["captured"] == pytest.approx(1, abs=1e-5)
    assert angles(subspace="sketched", sketch=3)["angle"] < 1
    assert cosines["angle"] > 20
    assert cosines["captured"] < 0.9


def test_the_measure_sees_what_was_left_out_of_steps_before() -> None:
    """DCTAdam(feedback=True) projects the sum of that and the gradient."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Linear(6, 6, bias=False)
    rule = DCTAdam(lr=1e-9, rank=1, feedback=True)
    run = train(model, (x, x.flip(1)), methods=[rule, SubspaceAngle()], steps=3, batch_size=64)
    state = run.now.optimizer.state[model.weight]
    whole = torch.autograd.grad((model(x) - x.flip(1)).square().sum() / 64, model.weight)[0] + state["left_out"]
    basis = cosine_matrix(6, torch.float32, torch.device("cpu"))[:, state["columns"]]
    kept = (basis.T @ whole).square().sum() / torch.linalg.svdvals(whole)[0] ** 2
    assert run.measures["SubspaceAngle()"][-1]["captured"] == pytest.approx(float(kept), rel=1e-3)


def test_the_measure_needs_a_subspace() -> None:
    with pytest.raises(BadInput) as problem:
        train(nn.Linear(3, 3), (torch.zeros(4, 3), torch.zeros(4, 3)), methods=[SubspaceAngle()], steps=1)
    assert str(problem.value) == (
        "SubspaceAngle watches an optimizer that steps in a subspace: add one, such as GaLore()."
    )
    with pytest.raises(BadInput, match="GradNormLoRP projects that of their directions"):
        SubspaceAngle().check(nn.Linear(3, 3), [GradNormLoRP(rank=1)])


def test_small_matrices_are_decomposed_exactly() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.zeros(4 + OVERSAMPLE, 40))]
    weights[0].grad = torch.randn(4 + OVERSAMPLE, 40, generator=draw)
    optimizer = GaLore(weights, rank=4)
    optimizer.step()
    assert torch.equal(optimizer.state[weights[0]]["projector"], exact_rows(weights[0].grad, 4)[0])
