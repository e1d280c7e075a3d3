"""Starts of low-rank adapters, against dense decompositions from the papers' equations, and the peers' numbers."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait import BadInput, Batch, DoRA, LoRA, NonFinite, Now, train
from plait.engine import Engine, check
from plait.initialize.activation_svd import EVA, input_rows
from plait.initialize.base import Start, to_plain_lora
from plait.initialize.factor import RandomFactor
from plait.initialize.full_step import LoRASB
from plait.initialize.gradient_svd import GradientStart, LocallyOptimal, LoRAGA, LoRAOne
from plait.initialize.orthonormal import OLoRA
from plait.initialize.weight_svd import PiSSA
from plait.math.packed import numbers
from plait.math.svd import RowSVD, SumSVD, exact_svd, gram_svd, sketched_svd
from plait.method import Method
from plait.parametrize.base import attached, dense_weight, untouched_weight
from plait.parametrize.core import LoRAXS
from plait.parametrize.folding import fold
from plait.parametrize.low_rank import LowRank
from plait.parametrize.quantized import Quantize
from plait.parametrize.singular import SORSA
from plait.train import oracle


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, columns: int, seed: int = 0, per: float = 0.7) -> Tensor:
    u, _ = torch.linalg.qr(drawn(rows, min(rows, columns), seed=seed))
    v, _ = torch.linalg.qr(drawn(columns, min(rows, columns), seed=seed + 1))
    return u * per ** torch.arange(min(rows, columns)) @ v.T


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(10, 12)


KINDS = {
    "linear": lambda: nn.Linear(12, 10),
    "conv": lambda: nn.Conv2d(4, 9, 3, padding=1),
    "channels last": lambda: nn.Conv2d(4, 9, 3).to(memory_format=torch.channels_last),
    "embedding": lambda: nn.Embedding(20, 8),
    "conv1d": conv1d,
}


def only(model: nn.Module) -> LowRank:
    (found,) = [low for _, _, low in attached(model, LowRank)]
    return found


def with_adapters(model: nn.Module, rank: int = 2, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    LoRA(rank=rank, **fields).parametrize(model)
    return model


def now_for(model: nn.Module, data: Any, loss: Any, batch_size: int = 8, accumulate: int = 1) -> Now:
    engine = Engine(seed=0, device="cpu")
    from plait.engine import as_data

    now = engine.start(model, as_data(data), loss, 10, batch_size, None)
    now.misfit = loss
    now.ask = oracle(engine, loss, [], accumulate)
    return now


def half_squares(output: Tensor, target: Tensor, now: Now) -> Tensor:
    return 0.5 * (output - target).square().flatten(1).sum(1)


# -- decompositions --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (15, 15)])
@pytest.mark.parametrize("method", [exact_svd, gram_svd, sketched_svd])
def test_decompositions_are_the_dense_ones(shape: tuple[int, int], method: Any) -> None:
    matrix = decaying(*shape)
    u, s, vh = method(matrix, 4)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(s, S[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(u * s @ vh, U[:, :4] * S[:4] @ Vh[:4], rtol=0, atol=2e-3)
    torch.testing.assert_close(u.T @ u, torch.eye(4), rtol=0, atol=1e-4)
    assert (vh.gather(1, vh.abs().argmax(1, keepdim=True)) > 0).all()


def test_signs_do_not_depend_on_the_library() -> None:
    matrix = decaying(9, 7)
    for flipped in (exact_svd(matrix), exact_svd(matrix.double())):
        torch.testing.assert_close(flipped[2].float(), gram_svd(matrix)[2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(200, 60), (60, 200)])
def test_the_sketch_leaves_nearly_the_smallest_residual_even_of_noise(shape: tuple[int, int]) -> None:
    noise = drawn(*shape)
    u, s, vh = sketched_svd(noise, 8, iterations=4)
    smallest = torch.linalg.svdvals(noise)[8:].norm()
    assert float((noise - u * s @ vh).norm() / smallest) < 1.01


def test_rows_in_batches_give_the_centred_decomposition() -> None:
    rows = drawn(50, 6) * torch.linspace(3, 0.5, 6) + 2
    incremental = RowSVD(6)
    for part in rows.split([20, 1, 0, 29]):
        incremental.add(part)
    _, S, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close(incremental.values, S, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((incremental.vectors * Vh).sum(1).abs(), torch.ones(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(incremental.explained(), S.double() ** 2 / S.double().square().sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("rows", "width"), [(400, 90), (90, 400)])
def test_rows_in_batches_keep_as_much_as_with_exact_decompositions(rows: int, width: int) -> None:
    """Each batch is decomposed roughly, from the vectors before: what they keep of the variance is what counts."""
    spread = torch.linspace(0, -2, width).exp()
    batches = [drawn(rows, width, seed=s) * spread + 1 for s in range(5)]
    incremental = RowSVD(12)
    for batch in batches:
        incremental.add(batch)
    whole = torch.cat(batches)
    whole -= whole.mean(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plait.math.svd.sketched_svd", lambda stacked, rank, near: gram_svd(stacked, rank))
        exact = RowSVD(12)
        for batch in batches:
            exact.add(batch)
    kept, best = (float((whole @ each.vectors.T).square().sum()) for each in (incremental, exact))
    assert abs(kept / best - 1) < 0.02  # of a spectrum that falls slowly, the hardest to tell apart
    torch.testing.assert_close(incremental.vectors @ incremental.vectors.T, torch.eye(12), rtol=0, atol=1e-4)


def test_the_sketch_of_a_sum_does_not_depend_on_how_it_is_split() -> None:
    whole = decaying(80, 60)
    parts = [drawn(80, 60, seed=s) for s in (1, 2)]
    pieces = [[whole], [parts[0], parts[1], whole - parts[0] - parts[1]]]
    found = []
    for split in pieces:
        sketch = SumSVD((80, 60), 12, 5, torch.device("cpu"))
        assert not sketch.direct
        for number in range(4):
            for piece in split:
                sketch.add(piece)
            if number < 3:
                sketch.turn()
        found.append(sketch.svd(4))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[0][1], torch.linalg.svdvals(whole)[:4], rtol=1e-3, atol=0)


# -- PiSSA -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("iterations", [None, 4])
def test_pissa_is_the_principal_part(kind: str, iterations: int | None) -> None:
    from plait.layers import matrix

    torch.manual_seed(1)
    layer = KINDS[kind]()
    model = nn.Sequential(layer)
    before = layer.weight.detach().clone()
    with_adapters(model, rank=3, alpha=5.0, where="0")
    low = only(model)
    PiSSA(iterations=iterations).initialize(model, Now())
    U, S, Vh = torch.linalg.svd(matrix(layer, before), full_matrices=False)
    principal = U[:, :3] * S[:3] @ Vh[:3]
    torch.testing.assert_close(low.scale * low.B @ low.A, principal, rtol=0, atol=1e-5)
    torch.testing.assert_close(low.A @ low.A.T, torch.diag(S[:3]) / low.scale, rtol=0, atol=1e-4)
    torch.testing.assert_close(low.B.T @ low.B, torch.diag(S[:3]) / low.scale, rtol=0, atol=1e-4)
    torch.testing.assert_close(matrix(layer, layer.weight), matrix(layer, before) - principal, rtol=0, atol=1e-5)
    torch.testing.assert_close(dense_weight(layer), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(untouched_weight(layer), before, rtol=0, atol=1e-6)
    assert not layer.weight.requires_grad


def test_pissa_in_bfloat16_keeps_the_function_to_its_precision() -> None:
    model = nn.Sequential(nn.Linear(32, 24)).bfloat16()
    before = model[0].weight.detach().clone()
    PiSSA().initialize(with_adapters(model, rank=4), Now())
    assert model[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(dense_weight(model[0]), before, rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(untouched_weight(model[0]), before, rtol=2**-7, atol=2**-9)


def test_a_started_and_trained_adapter_becomes_plain_lora_of_the_untouched_base() -> None:
    x, y = drawn(32, 6), drawn(32, 5, seed=1)
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    base = model.weight.detach().clone()
    wrapped = nn.Sequential(model)
    train(wrapped, (x, y), half_squares, [LoRA(rank=2), PiSSA()], steps=5)
    expected = wrapped(x).detach()
    to_plain_lora(wrapped)
    torch.testing.assert_close(model.weight.detach(), base, rtol=0, atol=1e-6)
    assert only(wrapped).rank == 4
    assert only(wrapped).taken() is None
    torch.testing.assert_close(wrapped(x).detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fold(wrapped)(x).detach(), expected, rtol=1e-5, atol=1e-5)


def test_sorsa_becomes_plain_lora_of_the_untouched_base_and_what_stands_on_it_stays() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), drawn(32, 6).double()
    base = model[0].weight.detach().clone()
    train(model, (x, drawn(32, 5, seed=1).double()), half_squares, [SORSA(rank=2), *DoRA(rank=1)[1:]], steps=5)
    expected = model(x).detach()
    to_plain_lora(model)
    assert list(model[0].plait) == ["lora", "magnitude"]
    assert only(model).rank == 4
    assert only(model).A.requires_grad
    torch.testing.assert_close(model[0].weight.detach(), base)
    torch.testing.assert_close(model(x).detach(), expected)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
@pytest.mark.parametrize("adapters", [[LoRA(rank=2), PiSSA()], [SORSA(rank=2)]], ids=["pissa", "sorsa"])
def test_a_base_that_is_loaded_under_a_start_has_the_part_taken_out_again(
    adapters: list[Method], kind: str, inside: bool
) -> None:
    model, other = nn.Sequential(KINDS[kind]()), nn.Sequential(KINDS[kind]())
    before = dense_weight(model[0]).detach().clone()
    for m in adapters:
        m.parametrize(model)
    for m in adapters:
        m.initialize(model, Now())
    outer, state = (nn.ModuleDict({"inner": model}), {f"inner.{k}": v for k, v in other.state_dict().items()})
    outer.load_state_dict(state) if inside else model.load_state_dict(other.state_dict())
    torch.testing.assert_close(dense_weight(model[0]), other[0].weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(untouched_weight(model[0]), other[0].weight, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, other[0].weight, atol=1e-2)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())  # an adapted model's own weights lack the part already
    assert torch.equal(again[0].weight, model[0].weight)


def test_a_base_that_is_loaded_under_a_start_on_a_quantized_weight() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(32, 32, bias=False))
        Quantize(bits=8, group=8, keep="always").parametrize(made)
        return made

    started, plain = with_adapters(model()), {"0.weight": drawn(32, 32)}
    PiSSA().initialize(started, Now())
    started.load_state_dict(plain)
    torch.testing.assert_close(numbers(dense_weight(started[0])), plain["0.weight"], rtol=0, atol=0.05)
    with pytest.raises(BadInput, match=r"^a start took part of '0.weight', and out of the quantized weight of a check"):
        started.load_state_dict(model().state_dict())


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("start", "what"),
    [
        (EVA(), "saw an input of '0'"),
        (EVA(tau=1.0), "saw an input of '0'"),
        (LoRAGA(), "got a gradient for '0'"),
        (LoRAGA(memory=0), "got a gradient for '0'"),
        (LoRAOne(), "got a gradient for '0'"),
        (LoRASB(), "got a gradient for '0'"),
        (PiSSA(), "found a number in the weight of '0'"),
        (OLoRA(), "found a number in the weight of '0'"),
    ],
)
def test_what_is_not_finite_is_said_with_its_layer(start: Start, what: str, odd: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)), drawn(16, 32)
    if start.key in ("pissa", "olora"):
        model[0].weight.data[0, 0] = odd
    else:
        x[3, 2] = odd
    adapter = LoRAXS(rank=2) if isinstance(start, LoRASB) else LoRA(rank=2)
    says = f"^{type(start).__name__} {what} that is NaN or infinite: mend what it comes from, or leave the layer out"
    with pytest.raises(NonFinite, match=says):
        train(model, (x, torch.arange(16) % 3), methods=[adapter, start], steps=1, batch_size=8)


class Stopped(Exception):
    pass


ANEW = r"^{} would start the adapter of '0' a second time, and the part of the weight that it holds would be lost: drop"


@pytest.mark.parametrize("start", [PiSSA(), EVA()])
def test_an_adapter_that_holds_a_part_of_the_weight_is_not_started_again(start: Start) -> None:
    model, data = with_adapters(nn.Sequential(nn.Linear(8, 8))), (drawn(16, 8), torch.arange(16) % 3)
    PiSSA().initialize(model, Now())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(BadInput, match=ANEW.format(type(start).__name__)):
        start.initialize(model, Now())
    with pytest.raises(BadInput, match=ANEW.format(type(start).__name__)):
        train(model, data, methods=[start], steps=1)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


LEARNED = r"^{} would start the adapter of '0' a second time, and what it has learned would be lost: drop"


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("start", [EVA(), LoRAOne(), RandomFactor(), LocallyOptimal(), LoRASB()], ids=lambda s: s.key)
def test_an_adapter_that_training_went_on_from_is_not_started_again(start: Start, saved: bool) -> None:
    """Starts that leave the weight as it is leave a record too, which a state dict holds."""
    data, adapter = (drawn(16, 8), torch.arange(16) % 3), LoRAXS if isinstance(start, LoRASB) else LoRA
    torch.manual_seed(0)
    model = train(nn.Sequential(nn.Linear(8, 8)), data, methods=[adapter(rank=2), start], steps=1).model
    if saved:
        state, model = model.state_dict(), nn.Sequential(nn.Linear(8, 8))
        adapter(rank=2).parametrize(model)
        model.load_state_dict(state)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert any(name.endswith(".start_left") for name in before)
    with pytest.raises(BadInput, match=LEARNED.format(type(start).__name__)):
        train(model, data, methods=[start], steps=1)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    train(model, data, methods=[], steps=1)  # on from where it was


@pytest.mark.parametrize("start", [PiSSA(), EVA()], ids=lambda s: s.key)
def test_an_adapter_that_was_trained_without_a_start_is_not_started(start: Start) -> None:
    data = drawn(16, 8), torch.arange(16) % 3
    model = train(nn.Sequential(nn.Linear(8, 8)), data, methods=[LoRA(rank=2)], steps=2).model
    with pytest.raises(BadInput, match=LEARNED.format(type(start).__name__)):
        train(model, data, methods=[start], steps=1)


def test_a_core_that_was_trained_without_a_start_is_not_started() -> None:
    data = drawn(16, 8), torch.arange(16) % 3
    model = train(nn.Sequential(nn.Linear(8, 8)), data, methods=[LoRAXS(rank=2)], steps=2).model
    state, loaded, fresh = model.state_dict(), *(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
    for other in (loaded, fresh):
        LoRAXS(rank=2).parametrize(other)
    loaded.load_state_dict(state)
    for trained in (model, loaded, copy.deepcopy(model).bfloat16()):
        with pytest.raises(BadInput, match=LEARNED.format("LoRASB")):
            check(trained, [LoRASB()])
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        check(copy.deepcopy(fresh).to(kind), [LoRASB()])
    train(fresh.bfloat16().float(), data, methods=[LoRASB()], steps=1)


@pytest.mark.parametrize("start", [PiSSA(), EVA()], ids=lambda s: s.key)
def test_a_recipe_that_starts_what_was_started_adds_nothing_to_the_model(start: Start) -> None:
    data, methods = (drawn(16, 8), torch.arange(16) % 3), [LoRA(rank=2), start]
    model = train(nn.Sequential(nn.Linear(8, 8)), data, methods=methods, steps=2).model
    names = list(model.state_dict())
    with pytest.raises(BadInput, match="a second time"):
        train(model, data, methods=methods, steps=2)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("start", [EVA(rho=1.0), RandomFactor()], ids=lambda s: s.key)
def test_a_started_model_loads_adapters_without_a_record(start: Start) -> None:
    """Those that no start made, and those of a file that is older than the record."""
    data = drawn(16, 8), torch.arange(16) % 3
    model = train(nn.Sequential(nn.Linear(8, 8)), data, methods=[LoRA(rank=2), start], steps=2).model
    plain = train(nn.Sequential(nn.Linear(8, 8)), data, methods=[LoRA(rank=2)], steps=2).model
    started = model.state_dict()
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(started)
    assert "0.plait.lora.start_left" in model.state_dict()


def test_the_record_of_a_start_is_no_part_of_plain_lora() -> None:
    model = with_adapters(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    PiSSA(where="0").initialize(model, Now())
    RandomFactor(where="1").initialize(model, Now())
    assert {"0.plait.lora.start_left", "1.plait.lora.start_left"} <= set(model.state_dict())
    assert not any("start_" in name for name in to_plain_lora(model).state_dict())


@pytest.mark.parametrize(("first", "second"), [(".*", "0"), ("0|1", "0"), ("0", ".*")])
def test_two_starts_of_one_layer_are_refused_however_their_where_is_written(first: str, second: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    apart = [LoRA(rank=2), PiSSA(where="0"), EVA(where="1")]
    train(model, (drawn(16, 8), torch.arange(16) % 3), methods=apart, steps=1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    with pytest.raises(BadInput, match=r"^PiSSA and LoRAGA start the same adapters: keep one, or part them by where.$"):
        check(model, [LoRA(rank=2), PiSSA(where=first), LoRAGA(where=second)])


@pytest.mark.parametrize("start", [PiSSA(), EVA(), LoRAGA(), LoRAOne(precondition=True)], ids=lambda s: s.key)
def test_an_interrupted_run_resumes_bitwise(start: Method, tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 8))

    def run(folder: Path, stop: int | None = None) -> nn.Module:
        def on_step(now: Now) -> None:
            if now.step == stop:
                raise Stopped

        methods = [LoRA(rank=3), start]
        kept = {"steps": 8, "batch_size": 8, "save_every": 2, "folder": folder, "on_step": on_step}
        return train(model(), (drawn(64, 8), drawn(64, 8, seed=1)), half_squares, methods, **kept).model  # type: ignore[arg-type]

    whole = run(tmp_path / "whole").state_dict()
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop=5)
    resumed = run(tmp_path / "cut").state_dict()
    assert list(whole) == list(resumed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_bad_starts_are_refused_in_one_sentence() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(BadInput, match="the model has none"):
        PiSSA().initialize(plain, Now())
    with pytest.raises(BadInput, match="the model has none"):
        train(plain, (drawn(8, 4), drawn(8, 4)), half_squares, [PiSSA()], steps=1)
    with pytest.raises(BadInput, match="matches none of the LoRA adapters"):
        PiSSA(where="9").initialize(with_adapters(plain), Now())
    with pytest.raises(BadInput, match=r"iterations"):
        PiSSA(iterations=0)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(BadInput, match="shares with"):
        PiSSA().initialize(with_adapters(tied), Now())
    with pytest.raises(BadInput, match="shares its weight"):
        LoRAOne().initialize(tied, now_for(tied, (drawn(8, 4), drawn(8, 4)), half_squares))
    half = with_adapters(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(BadInput, match="needs gradients"):
        LoRAOne().initialize(half, Now())
    with pytest.raises(BadInput, match="needs batches"):
        EVA().initialize(half, Now())


# -- EVA -------------------------------------------------------------------------------------------------------------
def peers_net() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 6))
    generator = torch.Generator().manual_seed(1)
    return net, [torch.randn(40, 12, generator=generator) * torch.linspace(3, 0.1, 12) for _ in range(4)]


def calibrated(batches: list[Tensor]) -> Now:
    now = Now()
    now.calibration = lambda count: (
        Batch.of(x, torch.zeros(len(x))) for x in itertools.islice(itertools.cycle(batches), count)
    )
    return now


def test_eva_gives_what_peft_gives() -> None:
    """peft 0.21.2: initialize_lora_eva_weights on the same net and batches, r=4, EvaConfig(rho=2.0, tau=0.0), which
    takes two batches. First four entries of A's rows, to 2e-3 (peft's decomposition there is a sketch of its own).
    """
    net, batches = peers_net()
    with_adapters(net, rank=4)
    EVA(batches=2).initialize(net, calibrated(batches))
    theirs = {
        0: [[0.8264, 0.3937, -0.1787, 0.3068], [-0.1480, 0.7177, 0.6177, -0.1120], [-0.0408, -0.2912, 0.5781, 0.5149]],
        2: [
            [-0.1808, 0.2541, 0.2886, 0.1581],
            [-0.2906, -0.2852, -0.0784, 0.4014],
            [-0.3251, 0.2938, -0.1928, -0.1333],
        ],
        4: [[-0.0352, -0.2615, 0.2586, 0.0776], [0.2969, 0.2858, -0.0646, 0.5234], [-0.1853, 0.3525, 0.7249, -0.2018]],
    }
    adapters = {name: low for name, _, low in attached(net, LowRank)}
    assert [low.rank for low in adapters.values()] == [5, 4, 3]
    for layer, rows in theirs.items():
        torch.testing.assert_close(adapters[str(layer)].A[:3, :4].detach(), torch.tensor(rows), rtol=0, atol=3e-3)
    assert all(low.scale == 4.0 and not low.B.any() for low in adapters.values())


def test_eva_spends_the_budget_on_the_largest_explained_variances() -> None:
    net, batches = peers_net()
    with_adapters(net, rank=3)
    EVA(batches=4, tau=1.0, rho=2.0).initialize(net, calibrated(batches))
    x, variances = torch.cat(batches), {}
    for name, layer in (("0", net[0]), ("2", net[2]), ("4", net[4])):
        S = torch.linalg.svdvals((x - x.mean(0)).double())
        variances[name] = (S**2 / (S**2).sum())[:6]
        x = torch.tanh(nn.functional.linear(x, layer.weight, layer.bias)).detach()
    best = sorted(((float(v), name) for name, vs in variances.items() for v in vs), reverse=True)[:9]
    assert {name: low.rank for name, _, low in attached(net, LowRank)} == {
        name: sum(owner == name for _, owner in best) for name in variances
    }
    first = next(low for _, _, low in attached(net, LowRank))
    _, _, Vh = torch.linalg.svd(torch.cat(batches) - torch.cat(batches).mean(0))
    # 12 inputs, 6 kept at each batch: the incremental directions are close to the exact ones, not equal.
    assert float((first.A.detach()[0] * Vh[0]).sum().abs()) > 0.99


def test_eva_keeps_ranks_with_rho_1_and_shares_what_equal_inputs_give() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.query(x) * self.key(x)))

    net = with_adapters(Attention(), rank=2)
    net.train()
    EVA(rho=1.0, batches=3).initialize(net, calibrated([drawn(30, 6)]))
    ranks = {name: low.rank for name, _, low in attached(net, LowRank)}
    assert ranks == {"query": 2, "key": 2, "out": 2}
    assert torch.equal(net.query.plait.lora.A, net.key.plait.lora.A)
    assert net.training


class Parallel(nn.Module):
    """Two layers one after the other on one tensor, each of which makes other vectors of it."""

    def __init__(self, first: nn.Module, between: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.second = first, between, second

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        return self.first(x) + self.second(self.between(x))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (Parallel(nn.Conv1d(4, 3, 1), nn.Identity(), nn.Conv1d(4, 3, 5, padding=2)), (8, 4, 20)),
        (Parallel(nn.Conv1d(4, 3, 3, padding=1), nn.Identity(), nn.Conv1d(4, 3, 3, padding=4, dilation=4)), (8, 4, 20)),
        (Parallel(nn.Linear(6, 3), nn.ReLU(inplace=True), nn.Linear(6, 3)), (40, 6)),
    ],
    ids=["kernel size", "dilation", "in place"],
)
def test_eva_decomposes_what_each_of_two_layers_makes_of_one_tensor(net: nn.Module, shape: tuple[int, ...]) -> None:
    x = drawn(*shape).cumsum(-1) - torch.arange(shape[1]).view(-1, *(1,) * (len(shape) - 2))
    EVA(rho=1.0, batches=1).initialize(with_adapters(net, where="first|second"), calibrated([x]))
    for layer, given in ((net.first, x), (net.second, net.between(x.clone()))):
        rows = input_rows(layer, given, None)
        _, _, vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        cosines = (layer.plait.lora.A.detach() * vh[:2]).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(2), rtol=0, atol=1e-5)


class Parting(nn.Module):
    """Layers that read one tensor, until a batch in which the second reads another, none, or the first does."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.second, self.third = how, nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.read: dict[str, list[Tensor]] = {"first": [], "second": [], "third": []}

    def forward(self, x: Tensor) -> Tensor:
        parted, other = bool(x[0, 0] > 100), x.flip(-1)
        given = {"first": x, "second": x, "third": x}
        if parted:
            given |= {"another": {"second": other}, "none": {"second": None}, "leader": {"first": other}}[self.how]
        output = x.new_zeros(len(x), 4)
        for name, inputs in given.items():
            if inputs is not None and len(inputs):
                self.read[name].append(inputs)
                output = output + getattr(self, name)(inputs)
        return output


@pytest.mark.parametrize("how", ["another", "none", "leader"])
def test_eva_parts_layers_whose_inputs_were_one_in_the_first_batch_only(how: str) -> None:
    scale = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    batches = [drawn(32, 6, seed=seed) * scale for seed in range(5)]
    batches[2][0, 0] = 200.0
    batches[3][0, 0] = 300.0
    net = Parting(how)
    every = EVA(rho=1.0, tau=1.0, batches=5).inputs_svd(with_adapters(net, rank=4), calibrated(batches))
    for name, svd in every.items():
        rows = torch.cat(net.read[name])
        _, s, vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        assert svd.count == len(rows)
        torch.testing.assert_close(svd.values[:2], s[:2], rtol=0.01, atol=0)
        torch.testing.assert_close((svd.vectors[:2] * vh[:2]).sum(1).abs(), torch.ones(2), rtol=0, atol=0.01)
    same = {"another": ("first", "third"), "none": ("first", "third"), "leader": ("second", "third")}[how]
    assert torch.equal(*(every[name].vectors for name in same))
    assert not torch.equal(every["first"].vectors, every["second"].vectors)


def test_eva_waits_for_a_layer_that_some_batches_do_not_reach() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.expert(x[x[:, 0] > 9]).sum() + self.idle(x[:0]).sum()

    reached = drawn(16, 6) + torch.tensor([20.0, 0, 0, 0, 0, 0])
    batches = [drawn(16, 6), reached, drawn(16, 6), reached.flip(1) + 20]
    with pytest.raises(BadInput, match="saw no varying input of 'idle'"):
        EVA(batches=4).inputs_svd(with_adapters(Routed()), calibrated(batches))
    seen = EVA(batches=4).inputs_svd(with_adapters(Routed(), where="expert"), calibrated(batches))
    assert seen["expert"].count == 32


def test_eva_sees_all_batches_of_a_layer_that_is_called_twice_on_one_tensor() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x) * self.both(x)

    batches = [drawn(16, 6, seed=seed) for seed in range(4)]
    seen = EVA(batches=4, tau=1.0).inputs_svd(with_adapters(Twice()), calibrated(batches))
    assert seen["both"].count == 2 * 4 * 16


def test_eva_passes_end_at_the_last_layer_that_is_still_to_be_read() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.went = {"late": 0, "head": 0}

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.early(x)
            self.went["late"] += 1
            hidden = self.late(hidden if bool(x[0, 0] < 100) else self.early(hidden))
            self.went["head"] += 1
            return self.head(hidden)

    batches = [drawn(16, 6, seed=seed) for seed in range(4)]
    net = with_adapters(Counted(), where="early|late")
    whole = EVA(batches=4, tau=1.0).inputs_svd(net, calibrated(batches))
    assert whole["early"].count == whole["late"].count == 64
    assert net.went == {"late": 4, "head": 1}

    net.went = {"late": 0, "head": 0}
    batches[1][0, 0] = 200.0  # a batch that takes another way goes to its end
    whole = EVA(batches=4, tau=1.0).inputs_svd(net, calibrated(batches))
    assert (whole["early"].count, whole["late"].count) == (80, 64)
    assert net.went == {"late": 4, "head": 2}


def test_a_model_that_catches_errors_reads_no_layer_twice_in_a_short_pass() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.head(self.layer(x))
            except Exception:  # as one that falls back on another kernel
                return self.head(self.layer(x))

    batches = [drawn(16, 6, seed=seed) for seed in range(4)]
    net = with_adapters(Careful(), where="layer")
    assert EVA(batches=4, tau=1.0).inputs_svd(net, calibrated(batches))["layer"].count == 64


def test_eva_waits_for_a_layer_that_the_first_batches_do_not_reach() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.seldom = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.often(x) + (self.seldom(x) if bool(x[0, 0] > 100) else 0.0)

    batches = [drawn(16, 6) for _ in range(4)]
    batches[3][0, 0] = 200.0
    seen = EVA(batches=4, tau=0.1).inputs_svd(with_adapters(Routed()), calibrated(batches))
    assert seen["often"].count < 64
    assert seen["seldom"].count == 16


def test_eva_sees_convolutions_as_matrices_and_leaves_padding_out() -> None:
    line, sound = nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=1), drawn(4, 2, 9)
    output = input_rows(line, sound, None) @ line.weight.flatten(1).T + line.bias
    torch.testing.assert_close(output, line(sound).transpose(1, 2).flatten(0, 1), rtol=0, atol=1e-5)
    conv, x = nn.Conv2d(2, 3, 3, stride=2, padding=1), drawn(4, 2, 7, 7)
    rows = input_rows(conv, x, None)
    output = rows @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(output, conv(x).permute(0, 2, 3, 1).flatten(0, 2), rtol=0, atol=1e-5)
    tokens, mask = drawn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.equal(input_rows(nn.Linear(4, 4), tokens, mask), torch.cat([tokens[0, :3], tokens[1]]))
    net = with_adapters(nn.Sequential(conv), rank=2, where="0")
    EVA().initialize(net, calibrated([x]))
    assert only(net).A.shape == (2, 18)
    with pytest.raises(BadInput, match="Embedding '0'"):
        EVA().initialize(with_adapters(nn.Sequential(nn.Embedding(9, 4)), where="0"), calibrated([x]))
    with pytest.raises(BadInput, match="too few"):
        EVA().initialize(with_adapters(nn.Sequential(nn.Linear(8, 8)), rank=6), calibrated([drawn(2, 8)]))


# -- starts from the gradient ----------------------------------------------------------------------------------------
def gradient_net() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Dropout(0.3), nn.Linear(14, 8))
    return net, (drawn(32, 10), drawn(32, 8, seed=1))


def dense_gradients(net: nn.Module, now: Now, count: int) -> dict[str, Tensor]:
    """The mean over the calibration batches of the gradient of the mean misfit, by plain autograd."""
    net.eval()
    weights = {name: layer.weight for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for batch in now.calibration(count):
        loss = half_squares(net(batch.inputs), batch.target, now).mean()
        for name, grad in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += grad / count
    return total


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lora_ga_takes_the_gradients_singular_vectors(accumulate: int) -> None:
    net, data = gradient_net()
    now = now_for(net, data, half_squares, accumulate=accumulate)
    wanted = dense_gradients(net, now, 4)
    before = {name: layer.weight.detach().clone() for name, layer in net.named_modules() if hasattr(layer, "weight")}
    with_adapters(net, rank=2, alpha=4.0)
    net.train()
    LoRAGA(gamma=9.0).initialize(net, now)
    for name, layer, low in attached(net, LowRank):
        U, _, Vh = torch.linalg.svd(wanted[name])
        size = before[name].shape[0] ** 0.5 / 9.0
        torch.testing.assert_close(low.A.T @ low.A, size * Vh[:2].T @ Vh[:2], rtol=0, atol=1e-4)
        torch.testing.assert_close(low.B @ low.B.T, size * U[:, 2:4] @ U[:, 2:4].T, rtol=0, atol=1e-4)
        torch.testing.assert_close(dense_weight(layer), before[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(untouched_weight(layer), before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [2, 7])
def test_the_first_step_after_lora_ga_follows_the_best_gradient_of_twice_the_rank(rank: int) -> None:
    net, data = gradient_net()
    now = now_for(net, data, half_squares, batch_size=32)
    gradient = dense_gradients(net, now, 1)["0"]
    net = with_adapters(net, rank=rank)
    LoRAGA(batches=1).initialize(net, now)
    net.eval()
    layer = net[0]
    before, low, rate = dense_weight(layer).detach(), layer.plait.lora, 1e-4
    (now.batch,) = now.calibration(1)
    now.ask(net, now)
    with torch.no_grad():
        for parameter in (low.A, low.B):
            parameter -= rate * parameter.grad
    change = (dense_weight(layer).detach() - before).flatten()
    U, S, Vh = torch.linalg.svd(gradient)
    kept = min(2 * rank, 10)
    best = (U[:, :kept] * S[:kept] @ Vh[:kept]).flatten()
    assert float(torch.cosine_similarity(change, -best, dim=0)) > 0.9999


def test_a_gradient_start_leaves_no_trace_and_holds_one_gradient_at_a_time() -> None:
    net, data = gradient_net()
    with_adapters(net, rank=2)
    net.train()
    now = now_for(net, data, half_squares, accumulate=2)
    kept = torch.ones_like(only(nn.Sequential(net[0])).A)
    net[0].plait.lora.A.grad = kept
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    torch.manual_seed(5)
    state, draws = torch.get_rng_state(), now.generator.get_state()
    held: list[int] = []
    plain = SumSVD.add

    def watched(self: SumSVD, piece: Tensor) -> None:
        held.append(sum(layer.weight.grad is not None for layer in (net[0], net[3])))
        plain(self, piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SumSVD, "add", watched)
        LoRAOne(batches=3).initialize(net, now)
    assert len(held) == 3 * 2 * 2
    assert max(held) == 0
    assert {name for name, p in net.named_parameters() if p.requires_grad} == trained
    assert net[0].plait.lora.A.grad is kept
    assert net[3].weight.grad is None
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(draws, now.generator.get_state())
    assert net.training
    assert now.batch is None
    assert not net[0].weight._post_accumulate_grad_hooks


def test_sketched_gradients_span_nearly_what_dense_ones_do() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 60, bias=False))
    inputs = decaying(64, 64, per=0.8)
    target = net[0](inputs).detach() + inputs @ decaying(64, 60, seed=7, per=0.8)
    now = now_for(net, (inputs, target), half_squares, batch_size=16)
    wanted = dense_gradients(net, now, 4)["0"]
    low = only(with_adapters(net, rank=3))
    for rounds, least in ((1, 0.99), (3, 0.999999)):
        sketch = LoRAGA(rounds=rounds).gradients(net, now)["0"]
        assert not sketch.direct
        u, s, _ = sketch.svd(3, 4)
        best = float(torch.linalg.svdvals(wanted)[:3].norm())
        assert float((u.T @ wanted).norm()) > least * best
        torch.testing.assert_close(s.norm(), torch.tensor(best), rtol=1 - least + 1e-5, atol=0)
    assert low.rank == 3


def test_sketches_of_smollm2_stay_under_a_tenth_of_the_model() -> None:
    rank, layers, d, hidden, kv, model = 16, 30, 576, 1536, 192, 134_515_008
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (hidden, d), (hidden, d), (d, hidden)] * layers
    start = LoRAGA()
    numbers = 0
    for shape in shapes:
        sketch = SumSVD(shape, start.needed(rank) + 8, 0, torch.device("cpu"))
        numbers += sketch.sum.numel() + (0 if sketch.direct else sketch.other.numel())
    assert numbers < 0.1 * model


def test_a_layer_without_gradient_is_an_error() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    for where in (".*", "idle"):
        net = with_adapters(Idle(), rank=1, where=where)
        with pytest.raises(BadInput, match="no gradient for 'idle'"):
            LoRAGA().initialize(net, now_for(net, (drawn(8, 4), drawn(8, 4)), half_squares))


def test_lora_one_starts_one_step_along_the_best_gradient() -> None:
    net, data = gradient_net()
    now = now_for(net, data, half_squares)
    wanted = dense_gradients(net, now, 4)
    with_adapters(net, rank=3, alpha=6.0)
    frozen = {name: layer.weight.detach().clone() for name, layer, _ in attached(net, LowRank)}
    LoRAOne(gamma=20.0).initialize(net, now)
    for name, layer, low in attached(net, LowRank):
        U, S, Vh = torch.linalg.svd(wanted[name])
        step = -(U[:, :3] * S[:3] @ Vh[:3]) / (S[0] * 20.0)
        torch.testing.assert_close(low.B @ low.A, step, rtol=0, atol=1e-5)
        torch.testing.assert_close(low.B.T @ low.B, low.A @ low.A.T, rtol=0, atol=1e-5)
        assert torch.equal(layer.weight, frozen[name])


def test_lora_one_preconditions_both_factors() -> None:
    net, data = gradient_net()
    now = now_for(net, data, half_squares)
    with_adapters(net, rank=2)
    start = LoRAOne(damping=1e-3, precondition=True)
    start.initialize(net, now)
    net.eval()
    (now.batch,) = now.calibration(1)
    now.ask(net, now)
    plain = {name: (low.A.grad.clone(), low.B.grad.clone()) for name, _, low in attached(net, LowRank)}
    net.zero_grad()
    start.gradient(now.ask)(net, now)
    ridge = 1e-3 * torch.eye(2)
    for name, _, low in attached(net, LowRank):
        grad_A, grad_B = plain[name]
        torch.testing.assert_close(low.A.grad, torch.inverse(low.B.T @ low.B + ridge) @ grad_A, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(low.B.grad, grad_B @ torch.inverse(low.A @ low.A.T + ridge), rtol=1e-3, atol=1e-4)
    assert start.gradient(now.ask) is not now.ask
    assert LoRAOne().gradient(now.ask) is now.ask


AUTHORS: dict[str, tuple[GradientStart, list[float], list[float]]] = {
    "LoRA-GA": (
        LoRAGA(),
        [0.18691424, 0.17864960, 0.01825089, 0.00834996, 0.00225627, 0.00015487, 0.00068230, 0.00002665],
        [0.02579034, 0.01620940, 0.10632603, 0.05033396, 0.00735053, 0.03331904, 0.08267581, 0.04003221],
    ),
    "LoRA-One": (
        LoRAOne(),
        [0.00467741, 0.00699840, 0.00064633, 0.00026985, 0.00008818, 0.00000608, 0.00002179, 0.00000105],
        [0.00003403, 0.00003749, 0.00080624, 0.00417056, 0.00055481, 0.00019342, 0.00259746, 0.00340569],
    ),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_starts_agree_with_the_authors_function(name: str) -> None:
    """reinit_lora_modules of YuanheZ/LoRA-One (which holds both directions), run on this gradient with rank 2, scale
    4, scale="stable", gamma 16 and 128: the diagonals of A^T A and (first eight) of B B^T, which no sign changes.
    """
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(10, 8, generator=generator) * torch.logspace(0, -1.5, 8)
    start, of_A, of_B = AUTHORS[name]
    net = with_adapters(nn.Sequential(nn.Linear(8, 10, bias=False)), rank=2, alpha=8.0)
    now = now_for(net, (torch.eye(8), gradient.T.clone()), lambda output, target, now: (output * target).sum(1))
    start.initialize(net, now)
    low = only(net)
    torch.testing.assert_close((low.A.T @ low.A).diag(), torch.tensor(of_A), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close((low.B @ low.B.T).diag()[:8], torch.tensor(of_B), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("start", [EVA(), LoRAGA(), LoRAOne()], ids=lambda s: s.key)
def test_two_adapters_of_one_kind_on_a_layer_are_not_started_alike(start: Method) -> None:
    net = with_adapters(with_adapters(nn.Sequential(nn.Linear(8, 8))))
    says = f"^{type(start).__name__} would start two adapters of '0' alike: keep one of them there.$"
    with pytest.raises(BadInput, match=says):
        start.initialize(net, now_for(net, (drawn(8, 8), drawn(8, 8)), half_squares))
