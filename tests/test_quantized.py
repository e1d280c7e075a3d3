"""Quantized bases: the codes against slow oracles and bitsandbytes, the layers that hold them, adapters on them,
folding, the start from the rounding error, and one rounding after training.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import plait
from laws import MODELS, Case, run, same, weights
from plait import catalogue
from plait.adapters import Adapters
from plait.errors import BadInput
from plait.finish.fold import Fold
from plait.finish.quantize import Requantize
from plait.initialize.base import Start
from plait.initialize.quantization import LoftQ
from plait.initialize.weight_svd import PiSSA
from plait.integrations.peft import load_adapter, save_adapter
from plait.math import quantization
from plait.math.packed import Packed, forget_originals, numbers, pack, packed_layers, page_out, unpack
from plait.math.quantization import NF4, Form
from plait.method import Method, Now
from plait.parametrize.base import Adapter, Parametrize, dense_weight
from plait.parametrize.core import LoRAXS
from plait.parametrize.folding import fold
from plait.parametrize.freeze import BitFit, Freeze
from plait.parametrize.low_rank import DoRA, LoRA
from plait.parametrize.mixout import Mixout
from plait.parametrize.quantized import QLoRA, Quantize
from plait.parametrize.singular import SORSA
from plait.recipe import check
from plait.step.layer_sampling import LISA
from plait.workbench.memory import Saved, weight_bytes
from test_laws import CASES
from test_parametrize import LAYERS, inputs_of

FORMS = {
    "int8, rows": {"bits": 8},
    "int8, groups of 4": {"bits": 8, "group": 4},
    "int4": {"format": "int", "group": 4},
    "nf4": {"group": 4, "double": False},
    "nf4, doubly": {"group": 4},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_layer(layer: str, form: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Return (the model before, the model with its one layer quantized)."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[layer][0]()).to(dtype)
    before = copy.deepcopy(model)
    Quantize(**form).parametrize(model)
    return before, forget_originals(model)


# -- the codes ---------------------------------------------------------------------------------------------------------
def oracle(group: list[float], bits: int, format: str) -> list[float]:
    """The numbers that come back, from the equations, one at a time."""
    if format == "nf4":
        c = max(abs(w) for w in group)
        return [c * min(NF4, key=lambda t: abs(w / c - t)) for w in group]
    if bits == 8:
        s = max(abs(w) for w in group) / 127
        return [s * round(w / s) for w in group]
    low, high = min(*group, 0.0), max(*group, 0.0)
    s = float(torch.tensor((high - low) / 15).bfloat16())
    z = round(-low / s)
    return [s * (min(max(round(w / s) + z, 0), 15) - z) for w in group]


@pytest.mark.parametrize(("bits", "format"), [(8, "int"), (4, "int"), (4, "nf4")])
@pytest.mark.parametrize("group", [0, 5, 8, 64])
def test_the_codes_are_those_of_the_equations(bits: int, format: str, group: int) -> None:
    """A row of 21 ends in a shorter group where the group is 5 or 8."""
    weight = normal(7, 21)
    held = pack(weight, Form(bits, format, group)).dequantize()
    size = group or 21
    for row, came_back in zip(weight.tolist(), held.tolist(), strict=True):
        wanted = [w for start in range(0, 21, size) for w in oracle(row[start : start + size], bits, format)]
        assert came_back == pytest.approx(wanted, rel=1e-5, abs=1e-9)


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    """The equation of QLoRA's section 3: 8 quantiles on the positive side, 7 on the other, 0, scaled into [-1, 1]."""
    end = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    up = norm.ppf(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    down = -norm.ppf(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    levels = sorted([*up, *down, 0.0])
    assert [level / max(up) for level in levels] == pytest.approx(NF4, abs=1e-6)


def test_nf4_is_that_of_bitsandbytes() -> None:
    """bitsandbytes 0.50.2, quantize_4bit(0.02 * randn(96, 128) of seed 0, blocksize 64, "nf4"), on the CPU: codes and
    numbers were bitwise the same; here the sum of the bytes and of the numbers. With compress_statistics, whose scales
    are 8-bit floats, its relative error was 0.0925758; without, 0.0925569.
    """
    torch.manual_seed(0)
    weight = torch.randn(96, 128) * 0.02
    ours = pack(weight, Form(4, "nf4", 64))
    assert int(ours.parts["codes"].long().sum()) == BYTES
    assert float(ours.dequantize().double().abs().sum()) == pytest.approx(NUMBERS, rel=1e-9)
    for double, theirs in ((False, 0.0925569), (True, 0.0925758)):
        held = pack(weight, Form(4, "nf4", 64, double)).dequantize()
        assert float((held - weight).norm() / weight.norm()) == pytest.approx(theirs, rel=5e-4)


BYTES, NUMBERS = 746467, 194.8601186578162


@every_form
def test_error_and_memory_are_within_their_bounds(form: dict[str, Any]) -> None:
    """Half a step of the codes at most, plus that of doubly rounded scales; bytes as the docstring says."""
    made = Quantize(**form).form
    weight = normal(64, 64)
    held = pack(weight, made)
    width = made.width(64)
    widest = weight.view(64, -1, width).abs().amax(2).repeat_interleave(width, 1)
    step = {8: 0.5 / 127, 4: 0.16}[made.bits] if made.format == "nf4" or made.bits == 8 else 0.5 * 2 / 15 + 0.01
    assert bool(((held.dequantize() - weight).abs() <= (step + 0.01 * made.double) * widest + 1e-7).all())
    scale_bytes = {"scales": 1 if made.double else 4, "zeros": 1} | ({"scales": 2} if "zeros" in made.names else {})
    groups = 64 * 64 // width
    extra = 4 * (-(-groups // 256) + 1) if made.double else 0
    wanted = 64 * 64 * made.bits // 8 + groups * sum(scale_bytes[n] for n in made.names if n in scale_bytes) + extra
    assert weight_bytes(nn.ParameterList([nn.Parameter(held, requires_grad=False)])) == wanted


@pytest.mark.parametrize("form", [Form(4, "int", 64), Form(4, "nf4", 64), Form(4, "nf4", 64, True)], ids=str)
def test_the_kernels_compute_bitwise_what_torch_does(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(256, 512)
    fast = pack(weight, form)
    numbers_fast = fast.dequantize()
    monkeypatch.setattr(quantization, "KERNEL_FROM", 2**62)
    slow = pack(weight, form)
    assert all(torch.equal(fast.parts[name], t) for name, t in slow.parts.items())
    assert torch.equal(slow.dequantize(), numbers_fast)


def test_zeros_and_constants_survive() -> None:
    for form in FORMS.values():
        made = Quantize(**form).form
        assert not pack(torch.zeros(3, 8), made).dequantize().any()
        assert torch.allclose(pack(torch.full((3, 8), 0.5), made).dequantize(), torch.full((3, 8), 0.5), rtol=1e-2)
    with pytest.raises(BadInput, match="NaN or infinite"):
        pack(torch.tensor([[1.0, float("nan")]]), Form(8, "int", 0))


# -- the layers that hold them -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", LAYERS)
@every_form
def test_a_layer_runs_on_the_numbers_that_its_codes_stand_for(layer: str, form: dict[str, Any]) -> None:
    before, model = one_layer(layer, form)
    held = model[0].weight
    assert isinstance(held, Packed)
    assert isinstance(held, nn.Parameter)
    assert not held.requires_grad
    assert (held.shape, held.dtype) == (before[0].weight.shape, torch.float32)
    plain = copy.deepcopy(before)
    with torch.no_grad():
        plain[0].weight.copy_(held.dequantize())
    seen = []
    for one in (model, plain):
        x = inputs_of(layer)
        x = x.requires_grad_() if x.is_floating_point() else x
        output = one(x)
        if x.requires_grad:
            output.square().sum().backward()
        seen.append((output.detach(), x.grad))
    with torch.inference_mode():
        assert torch.equal(model(inputs_of(layer)), seen[0][0])
        assert torch.equal(held.flatten(1).t(), held.dequantize().flatten(1).t())
    assert torch.allclose(seen[0][0], seen[1][0], atol=1e-6)  # channels last sums in another order
    assert seen[0][1] is None or torch.allclose(seen[0][1], seen[1][1], atol=1e-5)


@pytest.mark.parametrize("layer", ["Linear", "Conv1D", "Conv2d", "Embedding"])
@every_form
def test_states_copies_and_types(layer: str, form: dict[str, Any]) -> None:
    before, model = one_layer(layer, form)
    x, output = inputs_of(layer), model(inputs_of(layer))
    state = model.state_dict()
    assert {name for name in state if "weight" in name} == {f"0.weight.{part}" for part in Quantize(**form).form.names}
    _, other = one_layer(layer, form)
    with torch.no_grad():
        other[0].weight.copy_(torch.ones(other[0].weight.shape))
    assert not torch.equal(other(x), output)
    other.load_state_dict(state)
    assert torch.equal(other(x), output)
    other.load_state_dict(before.state_dict())  # of the base, in floating-point numbers: coded as it is loaded
    assert torch.equal(other(x), output)
    assert torch.equal(copy.deepcopy(model)(x), output)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), output)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    assert narrow[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(narrow[0].weight.parts[name], t) for name, t in model[0].weight.parts.items())
    plain = unpack(model)
    assert type(plain[0].weight) is nn.Parameter
    assert sorted(plain.state_dict()) == sorted(before.state_dict())
    assert torch.equal(plain(x), output)


def test_a_file_that_is_quantized_otherwise_is_refused() -> None:
    _, one = one_layer("Linear", {"bits": 8})
    _, other = one_layer("Linear", {"group": 4})
    with pytest.raises(BadInput, match="is not quantized as the model's"):
        other.load_state_dict(one.state_dict())


def test_the_backward_pass_keeps_no_dense_weight() -> None:
    """Nothing of the size of the weights is kept, under an adapter or without: they are made again from the codes."""
    torch.manual_seed(0)
    for adapters in ([], [LoRA(rank=2)]):
        model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)])
        for method in [Quantize(), *adapters]:
            method.parametrize(model)
        forget_originals(model)
        kept, x = Saved(), torch.randn(2, 128, requires_grad=True)
        with kept.counting(model):
            model(x)
        assert kept.bytes <= 4 * 4 * (2 * 128 + 2 * 2) + 4 * 2 * 128  # inputs and inner products, as of a plain base


def test_memory_is_truly_less() -> None:
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(4)])
    whole = weight_bytes(model)
    for form, bits in (({"bits": 8}, 8.13), ({}, 4.13), ({"format": "int"}, 4.38)):
        made = copy.deepcopy(model)
        Quantize(keep="never", **form).parametrize(made)
        assert weight_bytes(made) / whole == pytest.approx(bits / 32, rel=5e-3)


def test_what_is_paged_out_is_still_there(tmp_path: Path) -> None:
    """Of a file, and of memory that no file holds."""
    weight = normal(512, 512)
    weight.numpy().tofile(tmp_path / "weight")
    mapped = torch.from_file(str(tmp_path / "weight"), size=512 * 512)
    held = weight.clone()
    for tensor in (mapped, held):
        page_out(tensor)
        assert torch.equal(tensor.view(512, 512), weight)


def test_changing_a_quantized_weight_in_place_is_refused() -> None:
    _, model = one_layer("Linear", {})
    with torch.no_grad(), pytest.raises(BadInput, match="cannot be changed in place"):
        model[0].weight.add_(1.0)
    with pytest.raises(BadInput, match=r"'0.weight' is quantized and cannot be trained"):
        LoRA(rank=2, train=".*weight").parametrize(model)


def test_tied_weights_stay_one() -> None:
    embedding, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    Quantize().parametrize(model)
    assert embedding.weight is head.weight
    unpack(model)
    assert embedding.weight is head.weight


# -- adapters on them --------------------------------------------------------------------------------------------------
def stands_on_weights(entry: catalogue.Entry) -> bool:
    """Whether an entry is a parametrization, a start of one, or a function that returns such."""
    if isinstance(entry.make, type):
        return issubclass(entry.make, Parametrize | Start | Freeze)
    return "parametrize" in entry.places


WEIGHED = [k for k, e in catalogue.load().items() if stands_on_weights(e) and k not in ("quantize", "qlora", "freeze")]
SMALL = {"dora": {"rank": 2}, "ia3": {"outputs": "query|value", "inputs": r"layer\.\d+\.output\.dense"}}


def case_of(key: str) -> Case:
    if key == "ia3":
        return Case(SMALL[key], model="bert")
    return CASES.get(key, Case(SMALL.get(key, {})))


@pytest.mark.parametrize("key", WEIGHED)
def test_every_adapter_and_start_works_on_a_quantized_base_or_is_refused(key: str, tmp_path: Path) -> None:
    case = case_of(key)
    base = [] if any(name == "quantize" for name, _ in case.partners) else [Quantize(bits=4, group=8)]
    methods = [*base, *case.methods(key)]
    if any(isinstance(m, Parametrize) and not isinstance(m, Adapter | Quantize) for m in case.methods(key)):
        # these train or replace the weights themselves: mixout, SLTrain, weight compander, ...
        with pytest.raises(BadInput, match="which Quantize freezes"):
            run(case, methods)
        return
    done = run(case, methods, folder=tmp_path, save_every=3)

    class Stopped(Exception):
        pass

    def stop(now: Any) -> None:
        if now.step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        run(case, methods, folder=tmp_path / "again", save_every=3, on_step=stop)
    assert same(weights(run(case, methods, folder=tmp_path / "again", save_every=3)), weights(done))
    assert any(packed_layers(done.model))
    assert all(weight.original is None for _, _, weight in packed_layers(done.model))
    assert not same(weights(done), weights(run(case, [*base, *case.company()]) if case.company() else untrained(case)))
    inputs = MODELS[case.model][1]()[0]
    model = done.model.eval()

    def output(of: nn.Module) -> Tensor:
        return of(**inputs).logits if isinstance(inputs, dict) else of(inputs)

    try:
        plain = fold(copy.deepcopy(model))
    except BadInput as problem:  # soft prompts, what acts on outputs: on no base
        if "fold" not in str(problem):
            raise
        return
    assert not any(packed_layers(plain))
    unfolded = output(model).detach()
    assert (output(plain) - unfolded).abs().max() <= 1e-5 * unfolded.abs().max().clamp_min(1e-3)


def untrained(case: Case) -> Any:
    class Done:
        model = MODELS[case.model][0]()

    Quantize(bits=4, group=8).parametrize(Done.model)
    return Done


@pytest.mark.parametrize("methods", [[LoRA(rank=2)], DoRA(rank=2), [LoRAXS(rank=2)]], ids=["lora", "dora", "lora-xs"])
@pytest.mark.parametrize("layer", ["Linear", "Conv1D", "Conv2d", "Embedding"])
def test_an_adapter_computes_what_it_would_on_the_dequantized_weight(layer: str, methods: list[Method]) -> None:
    """Values and gradients; LoRA-XS takes its frozen factors from the weight before it was rounded."""
    _, model = one_layer(layer, {"group": 4})
    for method in methods:
        method.parametrize(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    plain = unpack(copy.deepcopy(model))
    seen = []
    for one in (model, plain):
        output = one(inputs_of(layer))
        output.square().sum().backward()
        seen.append([output.detach(), *(p.grad for p in one.parameters() if p.requires_grad)])
    for ours, theirs in zip(*seen, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bfloat16_and_autocast() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for dtype, precision in ((torch.bfloat16, "float32"), (torch.float32, "bfloat16")):
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).to(dtype)
        call = (lambda m, i: m(i.bfloat16()).float()) if dtype == torch.bfloat16 else None
        data = (x, torch.arange(8) % 3)
        done = plait.train(model, data, methods=[*QLoRA(rank=2), Fold()], steps=5, precision=precision, call=call)
        assert done.history[-1]["objective"] < done.history[0]["objective"]
        assert done.model[0].weight.dtype == dtype
        assert type(done.model[0].weight) is nn.Parameter


def test_starts_that_take_part_of_the_weight_round_the_rest_once() -> None:
    """PiSSA and SORSA on a quantized base: Q(W - P) + P is nearer to W than Q(Q(W) - P) + P would be, and as near as
    one rounding of W - P.
    """
    weight = normal(64, 64) + 0.1 * torch.outer(torch.ones(64), torch.linspace(-1, 1, 64))
    for methods in ([LoRA(rank=4), PiSSA(iterations=None)], [SORSA(rank=4)]):
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        Quantize(bits=4).parametrize(model)
        for method in methods:
            method.parametrize(model)
            method.initialize(model, Now())
        part = dense_weight(model[0]) - model[0].weight
        once = pack((weight - part).detach(), Quantize().form).dequantize() + part
        assert torch.allclose(dense_weight(model[0]), once, atol=1e-6)
        forget_originals(model)
        with pytest.raises(BadInput, match="rounded a second time"):
            SORSA(rank=2).parametrize(model)


def test_what_cannot_share_a_list_with_a_quantized_base() -> None:
    model = MODELS["mlp"][0]()
    for methods, says in (
        ([LoRA(rank=2), Quantize()], "put it before LoRA"),
        ([Quantize(), Mixout()], "Mixout trains or replaces the weights themselves"),
        ([Quantize(), LISA(layers=1, period=2)], "LISA trains weights in turn"),
        ([Quantize(), LoRA(rank=2, where="body"), LoftQ(where="head")], "matches none of the LoRA adapters"),
        ([LoRA(rank=2), LoftQ()], "add Quantize"),
        ([Quantize(), LoRA(rank=2), Requantize(originals=True)], "add Quantize\\(keep='always'\\)"),
        ([Quantize(keep="always"), LoRA(rank=2), LoftQ(), Requantize(originals=True)], "LoftQ gives the adapters"),
        ([Quantize(where="body"), Quantize()], "is quantized already"),
    ):
        with pytest.raises(BadInput, match=says):
            plait.train(copy.deepcopy(model), MODELS["mlp"][1](), methods=methods, steps=1)
    with pytest.raises(BadInput, match="'nf4' has 4 bits"):
        Quantize(bits=8, format="nf4")
    with pytest.raises(BadInput, match="bits"):
        Quantize(bits=3)
    with pytest.raises(BadInput, match="nothing is trained"):
        plait.train(nn.Linear(8, 2, bias=False), (torch.ones(4, 8), torch.ones(4, 2)), methods=[Quantize()], steps=1)
    check([Quantize(where="body"), Quantize(bits=8, where="head"), BitFit()], model)
    check([Freeze(where="conv"), Quantize(), LoRA(rank=2)], model)


# -- the start from the rounding error ---------------------------------------------------------------------------------
def loftq_oracle(weight: Tensor, rank: int, scale: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Return (Q, s B A), from the equations and a full decomposition."""
    update = torch.zeros_like(weight)
    for _ in range(rounds):
        base = pack(weight - update, Form(4, "nf4", 64)).dequantize()
        u, s, vh = torch.linalg.svd(weight - base)
        update = sum(s[k] * torch.outer(u[:, k], vh[k]) for k in range(rank))
    return base, update


def started(weight: Tensor, rounds: int, alpha: float, layer: type = nn.Linear) -> nn.Module:
    out, into = weight.shape
    model = nn.Sequential(nn.Linear(into, out, bias=False) if layer is nn.Linear else Conv1D(out, into))
    with torch.no_grad():
        model[0].weight.copy_(weight if layer is nn.Linear else weight.t())
    Quantize(double=False).parametrize(model)
    LoRA(rank=8, alpha=alpha).parametrize(model)
    LoftQ(rounds=rounds, iterations=None).initialize(model, Now())
    return model


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
def test_loftq_is_the_alternation_of_the_equations(rounds: int, layer: type) -> None:
    weight = normal(96, 128)
    for alpha in (8.0, 16.0):
        model = started(weight, rounds, alpha, layer)
        base, update = loftq_oracle(weight, 8, alpha / 8, rounds)
        turned = (lambda t: t) if layer is nn.Linear else (lambda t: t.t())
        lora = model[0].plait.lora
        assert torch.allclose(turned(numbers(model[0].weight)), base, atol=1e-6)
        assert torch.allclose(lora.scale * lora.B @ lora.A, update, atol=1e-6)
        assert (lora.taken() is not None) == (rounds > 1)


@pytest.mark.parametrize(("rounds", "error"), [(1, 0.08047745), (2, 0.07443450), (5, 0.07017208)])
def test_loftq_is_that_of_peft(rounds: int, error: float) -> None:
    """peft 0.21.2's loftq_init with bitsandbytes 0.50.2, its compute device set to the CPU, on 0.02 * randn(96, 128) of
    seed 0 at rank 8: base and product agreed to 2e-8; here |W - Q - B A| / |W|, and the sum of |Q|.
    """
    torch.manual_seed(0)
    weight = torch.randn(96, 128) * 0.02
    model = started(weight, rounds, 8.0)
    assert float((weight - dense_weight(model[0]).detach()).norm() / weight.norm()) == pytest.approx(error, rel=1e-5)
    sums = {1: 194.860118, 2: 195.069350, 5: 195.604060}
    assert float(numbers(model[0].weight).double().abs().sum()) == pytest.approx(sums[rounds], rel=1e-6)


# -- folding and rounding once -----------------------------------------------------------------------------------------
def digits_like() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(96, 64, generator=draw)
    return x, (x @ torch.randn(64, 5, generator=draw)).argmax(1)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


@pytest.mark.parametrize("originals", [False, True])
def test_requantizing_rounds_the_sum_once_and_says_what_it_cost(originals: bool) -> None:
    data, last = digits_like(), Requantize(originals=originals)
    base = Quantize(keep="always" if originals else "start")
    plain = plait.train(small_net(), data, methods=[base, LoRA(rank=2)], steps=20, validation=data)
    done = plait.train(small_net(), data, methods=[base, LoRA(rank=2), last], steps=20, validation=data)
    figures = done.measures[repr(last)][-1]
    for name, layer in plain.model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        start = layer.weight.original if originals else layer.weight.dequantize()
        lora = layer.plait.lora
        total = start + lora.scale * lora.B @ lora.A
        ours = done.model.get_submodule(name)
        assert not hasattr(ours, "plait")
        assert torch.equal(numbers(ours.weight), pack(total.detach(), last.form).dequantize())

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model.eval()(data[0]), data[1]))

    assert figures["loss trained"] == pytest.approx(loss(plain.model), rel=1e-5)
    folded = unpack(copy.deepcopy(plain.model), originals=True) if originals else plain.model
    assert figures["loss folded"] == pytest.approx(loss(fold(copy.deepcopy(folded))), rel=1e-5)
    assert figures["loss quantized"] == pytest.approx(loss(done.model), rel=1e-5)
    if not originals:
        assert figures["loss folded"] == pytest.approx(figures["loss trained"], rel=1e-5)


def test_a_model_of_words_is_judged_by_its_perplexity() -> None:
    from plait.models.small import llama_tiny

    torch.manual_seed(0)
    tokens = torch.randint(0, 32, (8, 9))
    last = Requantize(bits=8)
    done = plait.train(
        llama_tiny(32, depth=1), ({"input_ids": tokens[:, :-1]}, tokens[:, 1:]), methods=[*QLoRA(rank=2), last], steps=3
    )
    figures = done.measures[repr(last)][-1]
    assert figures["perplexity folded"] == pytest.approx(figures["perplexity trained"], rel=1e-5)
    assert figures["perplexity quantized"] == pytest.approx(figures["perplexity folded"], rel=0.02)


# -- files for others, and several adapters ----------------------------------------------------------------------------
def stirred(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return model


def test_adapters_are_written_for_a_base_that_is_quantized_alike(tmp_path: Path) -> None:
    base = small_net()
    model = copy.deepcopy(base)
    for method in QLoRA(rank=2):
        method.parametrize(model)
    save_adapter(forget_originals(stirred(model)), tmp_path)
    other = copy.deepcopy(base)
    Quantize().parametrize(other)
    assert torch.allclose(load_adapter(other, tmp_path)(digits_like()[0]), model(digits_like()[0]), atol=1e-6)


def test_adapters_of_a_base_that_was_rounded_after_their_start_are_cut_off_or_refused(tmp_path: Path) -> None:
    for start in (LoftQ(rounds=2), PiSSA()):
        base = small_net()
        model = copy.deepcopy(base)
        for method in QLoRA(rank=2):
            method.parametrize(model)
        start.initialize(model, Now())
        forget_originals(model)
        with pytest.raises(BadInput, match="so that the adapter fits no other base: give the base and a rank"):
            save_adapter(model, tmp_path)
        save_adapter(model, tmp_path, base=base, rank=64)
        x = digits_like()[0]
        assert torch.allclose(load_adapter(copy.deepcopy(base), tmp_path)(x), model(x), atol=1e-4)


def test_several_adapters_on_a_quantized_base() -> None:
    base, x = small_net(), digits_like()[0]
    Quantize(keep="never").parametrize(base)
    one, other = copy.deepcopy(base), copy.deepcopy(base)
    LoRA(rank=2).parametrize(one)
    LoRA(rank=3).parametrize(other)
    adapters = Adapters(base)
    for name, trained in (("one", stirred(one)), ("other", stirred(other))):
        assert adapters.add(name, trained) == 0.0
    with adapters.mixed(["one", "other", None] * 32):
        mixed = base(x)
    plain = base(x)
    for row, model in enumerate((one, other)):
        assert torch.allclose(mixed[row::3], model(x)[row::3], atol=1e-5)
    assert torch.equal(mixed[2::3], plain[2::3])


def test_a_model_on_the_meta_device_keeps_its_codes_packed() -> None:
    model = small_net()
    Quantize(keep="never").parametrize(model)
    model.to("meta")
    assert isinstance(model[0].weight, Packed)
    assert all(part.is_meta for part in model[0].weight.parts.values())


class Theirs(Tensor):
    """Stands for a quantized weight of another library: it multiplies, and everything else needs `dequantize`.

    torchao 0.18's Int8WeightOnlyConfig was run in its place: LoRA and DoRA train, resume, and fold to 2e-7.
    """

    @staticmethod
    def __new__(cls, codes: Tensor) -> Theirs:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    __torch_function__ = torch._C._disabled_torch_function_impl

    def dequantize(self) -> Tensor:
        return self.codes.float() / 100

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *rest: Any) -> Theirs:
        return Theirs(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Theirs(args[0].codes)
        if func in (torch.ops.aten.t.default,):
            return Theirs(args[0].codes.t())
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return func(*[a.dequantize() if isinstance(a, Theirs) else a for a in args], **(kwargs or {}))
        raise NotImplementedError(func)


@pytest.mark.parametrize("methods", [[LoRA(rank=2)], DoRA(rank=2)], ids=["lora", "dora"])
def test_adapters_stand_on_what_other_libraries_quantized(methods: list[Method], tmp_path: Path) -> None:
    def base() -> nn.Module:
        model = small_net()
        for layer in (model[0], model[2]):
            layer.weight = nn.Parameter(Theirs((100 * layer.weight).round().to(torch.int8)), requires_grad=False)
        return model

    data = digits_like()
    done = plait.train(base(), data, methods=methods, steps=6)
    plait.train(base(), data, methods=methods, steps=6, folder=tmp_path, on_step=lambda now: now.step == 3)
    again = plait.train(base(), data, methods=methods, steps=6, folder=tmp_path)
    trained = {n: p for n, p in done.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, trained[n]) for n, p in again.model.named_parameters() if p.requires_grad)
    plain = fold(copy.deepcopy(done.model))
    assert type(plain[0].weight) is nn.Parameter
    assert torch.allclose(plain(data[0]), done.model(data[0]), atol=1e-5)
    with pytest.raises(BadInput, match="another library quantized cannot be changed"):
        plait.train(base(), data, methods=[LoRA(rank=2), PiSSA()], steps=1)
