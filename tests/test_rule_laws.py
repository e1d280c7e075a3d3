"""Laws of every rule of the catalogue: one description, several compilers; and the contract of a torch optimizer."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.math import kernel_source, kernels, storage
from plait.math.kernel_source import Layout
from plait.step.adam import AdamW
from plait.step.base import Rule
from plait.step.momentum import Lion
from rules import RULES, Weights, given, gradients, made, stepped

FOLDER = Path(__file__).parent
OWN_LOOP = {"egn": "use it in plait.train", "riemannlora": "finds no trained low-rank adapter"}
"""Rules that do not step these weights, and what says so; the laws of pairs of factors are in test_fixed_rank.py."""
KEYS = [key for key in RULES if key not in OWN_LOOP]
ROUNDED = [key for key in KEYS if RULES[key].rounds()]
EVERY_LAYOUT = ("adamw", "lion", "lamb", "mars")
"""Rules that are tried with every kind of weights and states; others with float32 weights or float32 states."""
PARTS = 2e-6
"""Kernels and the plain loop round float32 in another order: relative and absolute difference after five steps."""
FLIPPED = 2e-3
"""The part of elements that may be rounded to the other side, for what is rounded differs in its last bits."""

every_rule = pytest.mark.parametrize("key", KEYS)


def pairs(one: nn.Module, other: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        yield name, a.detach(), b.detach()


@pytest.mark.parametrize("key", OWN_LOOP)
def test_a_rule_without_an_optimizer_of_its_own_says_so(key: str) -> None:
    with pytest.raises(BadInput, match=OWN_LOOP[key]):
        made(key, Weights())


# -- one description
# -----------------------------------------------------------------------------------------------------
@every_rule
@pytest.mark.parametrize("fields", [{}, {"weight_decay": 0.1, "maximize": True, "decay_vectors": False}])
def test_the_kernel_agrees_with_the_plain_loop(key: str, fields: dict[str, Any]) -> None:
    for name, fast, plain in pairs(stepped(key, **fields), stepped(key, fused=False, **fields)):
        assert torch.allclose(fast, plain, rtol=PARTS, atol=PARTS), name


@every_rule
def test_bfloat16_weights_are_stepped_as_in_float32_and_rounded_last(key: str) -> None:
    """Kernel and plain loop agree but for numbers on the border between two bfloat16, which differ by 2^-7 at most."""
    for name, fast, plain in pairs(stepped(key, dtype=torch.bfloat16), stepped(key, dtype=torch.bfloat16, fused=False)):
        assert torch.allclose(fast.float(), plain.float(), rtol=2**-6, atol=1e-3), name
        assert (fast != plain).float().mean() <= FLIPPED or fast.numel() < 100, name


@pytest.mark.parametrize("key", ROUNDED)
@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_rounded_states_agree_between_kernel_and_plain_loop(key: str, states: str) -> None:
    fast, plain = (stepped(key, states=states, weight_decay=0.1, fused=fused) for fused in (True, False))
    for name, a, b in pairs(fast, plain):
        assert ((a - b).abs() > 10 * PARTS * (1 + b.abs())).float().mean() <= FLIPPED, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", storage.KINDS)
def test_weights_larger_than_the_stash_are_stepped_alike(
    states: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a rule with a trust ratio keeps the direction of a part of a weight only."""
    options: dict[str, Any] = {"states": states, "dtype": dtype, "weight_decay": 0.1}
    whole = stepped("lamb", **options)
    monkeypatch.setattr(kernel_source, "STASH", 700)
    monkeypatch.setattr(kernels, "_COMPILED", {})
    for name, part, all_kept in pairs(stepped("lamb", **options), whole):
        assert not part.isnan().any()
        assert ((part - all_kept).abs() > 10 * PARTS * (1 + all_kept.abs())).float().mean() <= FLIPPED, name


TRUE_TO = {"bfloat16": 0.005, "8bit": 0.03}
"""How far five steps with rounded states may end from the exact ones, as a part of the way that these went."""
BY_SIGN = ("lion", "signsgd", "muon")
"""A state near 0 that changes its sign moves an element the other way: these may end farther, by 0.1 of the way."""


@pytest.mark.parametrize("key", ROUNDED)
@pytest.mark.parametrize("states", TRUE_TO)
def test_rounded_states_stay_close_to_exact_ones(key: str, states: str) -> None:
    start, near, exact = (
        torch.cat([p.detach().flatten() for p in model.parameters()])
        for model in (Weights(), stepped(key, states=states), stepped(key))
    )
    most = 0.1 if key in BY_SIGN else TRUE_TO[states]
    assert (near - exact).norm() <= most * (exact - start).norm()


TRITON = """
import json, sys, warnings
import torch
from plait.math import triton_kernels
triton_kernels.DEVICES.add("cpu")
sys.path.insert(0, sys.argv[1])
from rules import RULES, stepped
found = {}
for key, layouts in json.loads(sys.argv[2]).items():
    for dtype, states in layouts:
        more = {} if states == "float32" else {"states": states}
        done = stepped(key, steps=3, dtype=getattr(torch, dtype), weight_decay=0.1, **more)
        found[f"{key} {dtype} {states}"] = [p.detach().double().flatten().tolist() for p in done.parameters()]
print(json.dumps(found))
"""
ALL = [(dtype, states) for dtype in ("float32", "bfloat16") for states in storage.KINDS]


def interpreted(wanted: dict[str, Any], shapes: Path = FOLDER) -> dict[str, list[list[float]]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRITON, str(shapes), json.dumps(wanted)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[list[float]]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_triton_agrees_with_the_plain_loop() -> None:
    """In Triton's interpreter: every rule as it is, and some rules in every layout."""
    wanted = {key: [("float32", "float32")] for key in KEYS} | dict.fromkeys(EVERY_LAYOUT, ALL)
    found = interpreted(wanted)
    assert len(found) == sum(map(len, wanted.values()))
    for case, held in found.items():
        key, dtype, states = case.split()
        plain = stepped(
            key, steps=3, dtype=getattr(torch, dtype), fused=False, weight_decay=0.1,
            **({} if states == "float32" else {"states": states}),
        )  # fmt: skip
        for numbers, p in zip(held, plain.parameters(), strict=True):
            other = p.detach().double().flatten()
            differ = (torch.tensor(numbers, dtype=torch.float64) - other).abs() > 10 * PARTS * (1 + other.abs())
            assert differ.double().mean() <= (0 if (dtype, states) == ALL[0] else FLIPPED), case


FOR_CUDA = [*((key, Layout()) for key in KEYS), *((key, Layout("bfloat16", "8bit")) for key in ("lamb", "mars"))]


@pytest.mark.parametrize(("key", "layout"), FOR_CUDA)
def test_triton_compiles_for_cuda_and_reads_sixteen_bytes_at_a_time(key: str, layout: Layout) -> None:
    """To machine code of compute capability 9.0, for which no device is needed: the interpreter forgives too much."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from plait.math.triton_kernels import triton_kernel

    rule = RULES[key]
    made = triton_kernel(rule.rule(), rule.__name__, layout)
    assert made is not None
    names = {"COLUMNS": 10, "NUMBERS": 14, "DIVISOR": 16}
    tables = {"table": "*i64", "numbers": "*fp32"}
    spans = {"spans": "*i64", "numbers": "*fp32", "sums": "*fp64", "answers": "*fp64"}
    wanted: dict[str, dict[str, str]] = {"run": tables | {"answers": "*fp64"}}
    if rule.rule().whole:
        wanted |= {"norms": tables | {"sums": "*fp64"}, "answer": spans}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kernel, tensors in wanted.items():
            constants = {"NUMBERS": 14} if kernel == "answer" else names
            signature = tensors | dict.fromkeys(constants, "constexpr")
            source = ASTSource(getattr(made.module, kernel), signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            assert compiled.asm["cubin"]
            assert kernel == "answer" or "v4.b32" in compiled.asm["ptx"]
            assert not re.search(r"\b(max|min)\.f32", compiled.asm["ptx"])  # these, unlike max.NaN.f32, hide a NaN


# -- compiled once
# -------------------------------------------------------------------------------------------------------
def test_new_numbers_compile_nothing() -> None:
    """Other rates, decays and decay rates: the same kernels, each of one signature."""
    for key in KEYS:
        stepped(key, steps=1)
    compiled = {id(run): len(run.signatures) for run in kernels._COMPILED.values() if run is not None}
    assert set(compiled.values()) == {1}
    for key in KEYS:
        stepped(key, steps=2, lr=0.0123, weight_decay=0.321, betas=(0.7, 0.8, 0.6), momentum=0.3, eps=1e-3)
    after = {id(run): len(run.signatures) for run in kernels._COMPILED.values() if run is not None}
    assert after == compiled


SECOND = """
import sys
sys.path.insert(0, sys.argv[1])
from rules import RULES, stepped
for key in sys.argv[2:]:
    stepped(key, steps=1)
runs = [m.run for name, m in sys.modules.items() if name.startswith("plait_kernel")]
hits, misses = (sum(sum(seen.values()) for seen in each) for each in zip(
    *((run.stats.cache_hits, run.stats.cache_misses) for run in runs), strict=True))
print(len(runs), hits, misses)
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing() -> None:
    for key in KEYS:
        stepped(key, steps=1)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SECOND, str(FOLDER), *KEYS],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    count, hits, misses = map(int, done.stdout.split())
    assert count > 5
    assert (hits, misses) == (count, 0)


def test_without_numba_every_rule_takes_the_plain_loop_after_one_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_COMPILED", {})
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for key in KEYS:
            model, draw = Weights(), torch.Generator().manual_seed(1)
            torch.manual_seed(0)
            optimizer = made(key, model)
            for _ in range(5):
                gradients(model, draw)
                optimizer.step()
            for name, a, b in pairs(model, stepped(key, fused=False)):
                assert torch.equal(a, b), (key, name)
    assert [str(w.message).partition(":")[0] for w in seen] == ["numba is not installed"]


def test_an_installed_numba_that_cannot_be_imported_is_told_and_the_plain_loop_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str) -> None:
        raise ImportError("Numba needs NumPy 2.3 or less")

    monkeypatch.setattr(kernels, "_COMPILED", {})
    monkeypatch.setattr(kernels.importlib, "import_module", refuse)
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    with pytest.warns(UserWarning, match=r"numba cannot be imported \(Numba needs NumPy 2.3 or less\): optimizers run"):
        AdamW([weight], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


# -- the contract of an optimizer
# ----------------------------------------------------------------------------------------
def through_a_file(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    held = io.BytesIO()
    torch.save(optimizer.state_dict(), held)
    held.seek(0)
    loaded: dict[str, Any] = torch.load(held, weights_only=True)
    return loaded


class Turned(Weights):
    """The same weights, named in the opposite order."""

    def __init__(self, like: Weights) -> None:
        super().__init__(like.scalar.dtype)
        self.load_state_dict(like.state_dict())

    def named_parameters(self, *given: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from reversed(list(super().named_parameters(*given, **named)))


def go(model: Weights, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for _, p in sorted(model.named_parameters()):
            drawn = torch.randn(p.shape, generator=draw).to(p.dtype)
            p.grad = drawn if p.requires_grad else None
        optimizer.step()


RESUMED = [
    (key, states, dtype)
    for key in KEYS
    for dtype, states in ALL
    if (states == "float32" or key in ROUNDED) and ("float32" in (dtype, states) or key in EVERY_LAYOUT)
]


@pytest.mark.parametrize(("key", "states", "weights"), RESUMED)
def test_a_state_from_a_file_goes_on_bitwise_in_any_order_of_weights(key: str, states: str, weights: str) -> None:
    dtype = getattr(torch, weights)
    torch.manual_seed(0)
    whole = Weights(dtype)
    go(whole, made(key, whole, states=states), range(7))
    torch.manual_seed(0)
    half = Weights(dtype)
    optimizer = made(key, half, states=states)
    go(half, optimizer, range(4))
    rest = Turned(half)
    again = made(key, rest, states="float32")
    again.load_state_dict(through_a_file(optimizer))
    go(rest, again, range(4, 7))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, rest.state_dict()[name]), name


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_state_goes_on_with_weights_of_another_precision(key: str, dtype: torch.dtype, loaded: bool) -> None:
    """Loaded into another model's optimizer, and of a model that changes its precision under its optimizer."""
    torch.manual_seed(0)
    before = torch.float64 if dtype == torch.float32 else torch.float32
    model = Weights(before)
    optimizer = made(key, model)
    go(model, optimizer, range(4))
    other, rest = copy.deepcopy((model, optimizer))
    other.to(dtype)
    if loaded:
        other.requires_grad_(True)  # a rule whose layers take turns had frozen some
        rest = made(key, other)
        rest.load_state_dict(through_a_file(optimizer))
    go(model, optimizer, range(4, 6))
    go(other, rest, range(4, 6))
    for name, a, b in pairs(other, model):
        near = 5e-3 if key == "muon" else 1e-5  # its products may be of sixteen bits where the weights are float32
        torch.testing.assert_close(a.double(), b.double(), rtol=near, atol=near, msg=name)


@every_rule
def test_a_group_has_its_own_numbers_and_follows_torchs_schedulers(key: str) -> None:
    ends = {}
    for rate in (0.01, 0.03):
        torch.manual_seed(0)
        model = Weights()
        optimizer = made(key, model, lr=rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for _ in range(2):  # the first step of some moves nothing
            gradients(model, torch.Generator().manual_seed(1))
            optimizer.step()
            scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(rate / 4)] * len(
            optimizer.param_groups
        )
        ends[rate] = model.large.detach().clone()
    if RULES[key] is not RULES.get("adafactor"):
        assert not torch.equal(ends[0.01], ends[0.03])


@every_rule
def test_groups_of_one_optimizer_make_another(key: str) -> None:
    """As where a library splits groups anew: what a group holds of the run is not carried over."""
    model, draw = Weights(), torch.Generator().manual_seed(1)
    optimizer = made(key, model)
    gradients(model, draw)
    optimizer.step()
    groups = [{name: v for name, v in g.items() if name != "param_names"} for g in optimizer.param_groups]
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        group["params"] = list(zip(own["param_names"], own["params"], strict=True))
    for p in model.parameters():
        p.requires_grad_(True)  # what the other froze
    again = RULES[key](groups, **given(RULES[key]))
    assert [g["params"] for g in again.param_groups] == [g["params"] for g in optimizer.param_groups]
    assert not again.state
    again.step()


@every_rule
def test_maximizing_is_minimizing_the_negative(key: str) -> None:
    ends = []
    for up in (False, True):
        torch.manual_seed(0)
        model, draw = Weights(), torch.Generator().manual_seed(1)
        optimizer = made(key, model, maximize=up, weight_decay=0.1)
        for _ in range(3):
            gradients(model, draw)
            for p in model.parameters():
                p.grad = -p.grad if up and p.grad is not None else p.grad
            optimizer.step()
        ends.append(model)
    assert all(torch.equal(a, b) for _, a, b in pairs(*ends))


@every_rule
def test_a_closure_is_asked_once_with_gradients_and_its_value_returned(key: str) -> None:
    model, asked = Weights(), []
    optimizer = made(key, model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = model.loss()
        value.backward()
        asked.append(torch.is_grad_enabled())
        return value.detach()

    before = float(model.loss().detach())
    assert float(optimizer.step(closure)) == pytest.approx(before)
    assert asked == [True]


@every_rule
def test_gradients_are_not_written_and_weights_without_one_stay(key: str) -> None:
    torch.manual_seed(0)
    model = Weights()
    optimizer = made(key, model, weight_decay=0.1, maximize=True, nesterov=True)
    gradients(model, torch.Generator().manual_seed(1))
    model.matrix.grad = None
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    start = model.matrix.detach().clone()
    optimizer.step()
    assert torch.equal(model.matrix, start)
    assert model.matrix not in optimizer.state or not optimizer.state[model.matrix]
    held = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and name in before}
    assert held
    assert all(torch.equal(before[name], gradient) for name, gradient in held.items())


@every_rule
def test_sparse_gradients_and_complex_weights_are_refused(key: str) -> None:
    torch.manual_seed(0)
    model = Weights()
    optimizer = made(key, model)
    gradients(model, torch.Generator().manual_seed(1))
    model.large.grad = torch.ones(18, 300).to_sparse()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(BadInput, match="build the embedding with sparse=False"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(state.get("step") for state in optimizer.state.values())
    model.register_parameter("wave", nn.Parameter(torch.ones(20, 4, dtype=torch.complex64)))
    with pytest.raises(BadInput, match="is not defined for complex weights"):
        made(key, model)


@pytest.mark.parametrize("rule", [AdamW, Lion])
def test_a_graph_from_before_a_step_cannot_be_differentiated_after_it(rule: type[Rule]) -> None:
    """As with torch's own optimizers: the weights that its gradient needs are gone."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer, x = rule(model.parameters(), lr=0.1), torch.randn(5, 4)
    one, two = model(x).square().sum(), model(x).abs().sum()
    one.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        two.backward()


def test_a_gradient_of_another_shape_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(5))
    weight.sum().backward()
    weight.data = torch.zeros(4000)
    with pytest.raises(BadInput, match=r"shape \(4000,\) has a gradient of shape \(5,\): call zero_grad"):
        AdamW([weight], lr=1.0).step()
    assert not weight.any()


@every_rule
def test_float64_weights_are_stepped_in_float64(key: str) -> None:
    torch.manual_seed(0)
    model, draw = Weights(torch.float64), torch.Generator().manual_seed(1)
    optimizer = made(key, model, **({"states": "8bit"} if RULES[key].rounds() else {}))
    gradients(model, draw)
    optimizer.step()
    kinds = {t.dtype for held in optimizer.state.values() for t in held.values() if isinstance(t, Tensor)}
    assert {kind for kind in kinds if kind.is_floating_point} <= {torch.float64}


@every_rule
def test_the_scaler_leaves_out_a_step_that_overflowed(key: str) -> None:
    torch.manual_seed(0)
    model = Weights()
    optimizer, scaler = made(key, model), torch.amp.GradScaler("cpu", init_scale=8.0)
    for step, overflow in enumerate((False, False, True, False)):
        optimizer.zero_grad()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        scaler.scale(model.loss() * (float("inf") if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        still = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert still == overflow or not step  # the first step of some moves nothing
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_accelerate_prepares_every_rule() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    for key in KEYS:
        torch.manual_seed(0)
        model = Weights()
        prepared = accelerator.prepare(made(key, model))
        scheduler = accelerator.prepare(torch.optim.lr_scheduler.ConstantLR(prepared.optimizer, factor=1.0))
        before = model.large.detach().clone()
        for _ in range(2):  # the first step of some moves nothing
            with accelerator.accumulate(model):
                accelerator.backward(model.loss())
                prepared.step()
                scheduler.step()
                prepared.zero_grad()
        assert not torch.equal(model.large, before) or key in ("lisa", "hft"), key


# -- several processes
# ----------------------------------------------------------------------------------------------------
ALONE = ("lisa", "hft")
"""Rules that freeze whole weights as they go, which are not whole where they are sharded: they say so."""


@pytest.mark.slow
def test_sharded_is_unsharded() -> None:
    """Two processes of FSDP2, with a checkpoint between: 1e-6 for every rule and kind of states, whole matrices too."""
    start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*start, str(FOLDER / "sharded_rules.py"), *KEYS], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found.pop("partial gradients") == 0
    assert found.pop("extreme gradients") <= 1e-6
    assert {case.split()[0] for case in found} == set(KEYS)
    for case, difference in found.items():
        if case.split()[0] in ALONE:
            assert "freezes whole weights as it goes, and these are sharded" in difference
        else:
            assert difference <= 1e-6, case


# -- rounding
# ------------------------------------------------------------------------------------------------------------
def test_rounding_at_random_keeps_the_mean_and_the_largest() -> None:
    values = torch.randn(8, 700, generator=torch.Generator().manual_seed(0))
    index = torch.arange(values.numel()).view(values.shape)
    for sample in (values, values.square(), values**5, -values.abs()):
        signed, total = bool((sample < 0).any()), torch.zeros_like(sample)
        for step in range(1, 301):
            codes, scales = storage.encode(sample, storage.bits_at(storage.key_of(step), index, 0))
            total += (decoded := storage.decode(codes, scales))
        most, sign = (127, codes & 128) if signed else (255, codes & 0)
        size = (codes & most).int()
        above, below = (
            storage.decode((sign | (size + by).clamp(0, most)).to(torch.uint8), scales).abs() for by in (1, -1)
        )
        assert ((below * 0.999999 <= sample.abs()) & (sample.abs() <= above * 1.000001)).all()
        error = (total / 300 - sample).abs() / (above - below).clamp(min=1e-20)
        assert error.max() < 0.5
        assert float(((total / 300 - sample) / (above - below).clamp(min=1e-20)).mean().abs()) < 0.002
        blocked = storage._in_blocks(sample).abs().amax(2)
        assert torch.allclose(storage._in_blocks(decoded).abs().amax(2), blocked, rtol=3e-7)
        assert (storage.encode(decoded, index * 0 + 32768)[0] == codes).float().mean() == 1  # what is rounded stays
        assert signed or ((sample > 0) <= (decoded > 0)).all()
    bits = storage.bits_at(storage.key_of(3), torch.arange(100_000), 1).double() / 65536
    assert float(bits.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(bits.var()) == pytest.approx(1 / 12, abs=0.002)


@pytest.mark.parametrize("size", [1e25, float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["adamw", "adopt", "mars"])
def test_a_block_that_is_not_finite_is_nan_however_it_is_stepped(key: str, size: float) -> None:
    """A square beyond float32 is infinite, and has no code: that the others of its block stood still went unsaid."""
    found = []
    for fused in (True, False):
        weight, draw = torch.nn.Parameter(torch.ones(20, 300)), torch.Generator().manual_seed(0)
        optimizer = RULES[key]([weight], states="8bit")
        optimizer.fused = fused
        for step in range(3):
            weight.grad = torch.randn(20, 300, generator=draw)
            weight.grad[2, 5] = size if step == 0 else 1.0
            optimizer.step()
        found.append(weight.detach().isnan())
    assert torch.equal(*found)
    assert found[0][2, :256].all() or (key == "mars" and size == 1e25)  # it clips before it squares


def test_the_kernel_codes_a_block_as_the_plain_loop_does() -> None:
    """Of sizes over eight orders of magnitude, zeros with and without a sign among them; a scale is any float32."""
    pytest.importorskip("numba")
    from plait.math import kernel_functions

    draw, differ, total = np.random.default_rng(0), 0, 0
    for case in range(200):
        values = 10.0 ** draw.uniform(-8, 0, 256) * draw.normal(size=256) * 10.0 ** draw.uniform(-25, 15)
        values = (np.abs(values) if case % 2 else values).astype(np.float32)
        values[draw.integers(0, 256, 20)], values[draw.integers(0, 256, 20)] = 0.0, -0.0
        random = draw.integers(0, 1 << 16, 256).astype(np.int32)
        most = max(values.view(np.int32).max(), np.int32(0))
        least = values.view(np.uint32).max().view(np.int32)
        codes, decoded = np.zeros(256, np.uint8), np.zeros(256, np.float32)
        scale = kernel_functions.pack(values, most, least, codes, random, np.int32(0))
        kernel_functions.unpack(codes, np.float32(scale), decoded)
        plain, scales = storage.encode(torch.from_numpy(values)[None], torch.from_numpy(random)[None])
        assert float(scales[0, 0]) == pytest.approx(scale, rel=1e-6)
        meant = storage.decode(torch.from_numpy(codes)[None], scales)[0].numpy()
        assert np.allclose(decoded, meant, rtol=15 * 2**-23, atol=0)  # 1/16 = 1 - 15/16, and the latter is rounded
        assert ((decoded != 0) | (values == 0) | (case % 2 == 0)).all()
        apart = np.abs(plain[0].numpy().astype(int) - codes)
        apart[values == 0] = 0  # 0 may have a sign
        assert apart.max() <= 1
        differ, total = differ + int((apart > 0).sum()), total + 256
    assert differ <= FLIPPED * total


def test_bfloat16_is_rounded_up_as_often_as_it_should() -> None:
    value = torch.full((40_000,), 1.0 + 2**-7 * 0.3)
    rounded = storage.to_bfloat16(value, storage.bits_at(storage.key_of(1), torch.arange(40_000), 0)).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert float((rounded > 1).float().mean()) == pytest.approx(0.3, abs=0.01)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    moved = storage.to_bfloat16(odd, torch.full((5,), 65535))
    assert moved.view(torch.int16)[[0, 1]].tolist() == [0x7F80, -128]
    assert torch.isnan(moved[2])


def test_a_mean_that_moves_by_a_thousandth_moves() -> None:
    """Rounded to nearest, a running square in 8 bits or bfloat16 would stay where it is."""
    for states in ("bfloat16", "8bit"):
        w = nn.Parameter(torch.zeros(64, 256))
        optimizer = AdamW([w], lr=1e-9, states=states, betas=(0.9, 0.999))
        draw = torch.Generator().manual_seed(0)
        scale = torch.rand(64, 256, generator=draw) + 0.5
        for step in range(1200):
            w.grad = scale * (1.0 if step < 600 else 2.0)
            w.grad[:, 0] = 2.0  # the block's largest does not change with the others
            optimizer.step()
        state = optimizer.state[w]
        held = (
            state["exp_avg_sq"].float()
            if states == "bfloat16"
            else storage.decode(state["exp_avg_sq"], state["exp_avg_sq_scale"])
        )
        exact = scale.square() * ((1 - 0.999**600) * 0.999**600 + 4 * (1 - 0.999**600))
        assert float((held / exact)[:, 1:].mean()) == pytest.approx(1.0, abs=0.03)


def test_states_in_eight_bits_take_a_quarter_of_the_room() -> None:
    w = nn.Parameter(torch.zeros(512, 1024))
    w.grad = torch.ones_like(w)
    bytes_of = {}
    for states in storage.KINDS:
        optimizer = AdamW([w], states=states)
        optimizer.step()
        bytes_of[states] = sum(t.nbytes for t in optimizer.state[w].values() if isinstance(t, Tensor))
    assert bytes_of["bfloat16"] * 2 == bytes_of["float32"]
    assert bytes_of["8bit"] * 3.9 < bytes_of["float32"]


@pytest.mark.parametrize("rule", [AdamW, Lion])
@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_threads_round_alike(rule: type[Rule], states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 10)
    monkeypatch.setattr(kernels, "CHUNK", 1024)
    key = rule.key
    alone = stepped(key, states=states)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for _, a, b in pairs(alone, stepped(key, states=states)))


def test_rules_with_states_of_their_own_refuse_to_round_them() -> None:
    for key in KEYS:
        if not RULES[key].rounds():
            with pytest.raises(BadInput, match="keeps states of its own in float32: leave out states="):
                made(key, Weights(), states="8bit")
    with pytest.raises(BadInput, match=r"AdamW\.states"):
        AdamW([nn.Parameter(torch.ones(1))], states="4bit")


def test_rounding_lets_no_step_explode() -> None:
    """Gradients of all sizes side by side, then none: a mean that outlives its running square would be divided by 0."""
    draw = torch.Generator().manual_seed(0)
    size = torch.exp(-30 * torch.rand(32, 512, generator=draw))
    for states in ("bfloat16", "8bit"):
        w = nn.Parameter(torch.zeros(32, 512))
        optimizer = AdamW([w], lr=1.0, weight_decay=0.0, states=states)
        for step in range(30):
            before = w.detach().clone()
            w.grad = size * torch.randn(w.shape, generator=draw) * (step < 10)
            optimizer.step()
            assert (w.detach() - before).abs().max() < 3 * 0.1 / 0.001**0.5  # thrice what Adam's means allow


@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_training_with_rounded_states_ends_where_exact_ones_do(states: str) -> None:
    ends = {}
    for kind in ("float32", states):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        inputs, target = torch.randn(256, 64), torch.randn(256, 64)
        optimizer = AdamW(model.named_parameters(), lr=3e-3, states=kind)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(inputs) - target).square().mean()
            loss.backward()
            optimizer.step()
        ends[kind] = float(loss.detach())
    assert ends["float32"] < 0.5
    assert ends[states] == pytest.approx(ends["float32"], rel=0.02)
