"""muP and other abc-parametrizations: the authors' package, the limit of infinite width, and the coordinate check."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait import SGD, Adam, AdamW, BadInput, DoRA, LoRA, Now, train
from plait.engine import optimizer_for, prepared
from plait.initialize.weight_svd import PiSSA
from plait.initialize.width import NTK, STANDARD, MuP, base_shapes
from plait.method import Method
from plait.parametrize.core import LoRAXS
from plait.parametrize.folding import fold
from plait.parametrize.singular import SORSA, SVFit
from plait.schedule import Linear
from plait.step.layerwise import LAMB


class Net(nn.Module):
    """Widths n and 2 n, a norm, and biases everywhere."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, n), nn.Linear(n, 2 * n), nn.Linear(2 * n, n)
        self.norm, self.read = nn.LayerNorm(n), nn.Linear(n, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.norm(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 5, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def curve(methods: list[Method], model: nn.Module | None = None, steps: int = 8, given: Any = None) -> list[float]:
    """The objective of full batches."""
    if model is None:
        torch.manual_seed(0)
        model = Net(32)
    given = given or data()
    run = train(model, given, methods=methods, steps=steps, batch_size=len(given[1]))
    return [point["objective"] for point in run.history]


# microsoft/mup at 19814971: Net with MuReadout at width 32, base 8, delta 16, MuAdam(eps=0), MuAdamW(eps=0,
# weight_decay=0.1), MuSGD(lr=0.1, momentum=0.9, weight_decay=0.01); the cross entropy at 8 steps, rounded to 1e-6.
PEERS: dict[str, tuple[Callable[[], Method], list[float]]] = {
    "adam": (
        lambda: Adam(lr=0.01, eps=0.0),
        [1.069022, 1.006056, 0.971511, 0.948532, 0.936737, 0.927085, 0.914401, 0.899955],
    ),
    "adamw": (
        lambda: AdamW(lr=0.01, eps=0.0, weight_decay=0.1),
        [1.069022, 1.006138, 0.97174, 0.948831, 0.937017, 0.927396, 0.914821, 0.900533],
    ),
    "sgd": (
        lambda: SGD(lr=0.1, weight_decay=0.01),
        [1.069022, 1.033821, 1.002439, 0.973082, 0.950996, 0.946633, 0.942536, 0.929992],
    ),
}


@pytest.mark.parametrize("rule", PEERS)
@pytest.mark.parametrize("base", [8, base_shapes(Net(8))], ids=["width", "shapes"])
def test_trains_as_the_authors_package(rule: str, base: Any) -> None:
    make, expected = PEERS[rule]
    assert curve([MuP(base=base), make()]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_shifting_a_b_and_c_together_changes_nothing(rule: str) -> None:
    """(a + t, b - t, c - t) under Adam, (a + t, b - t, c - 2 t) under SGD; t = -1/2, 0, 1/2 are the paper's own."""
    power, made = (2, SGD(lr=0.1)) if rule == "sgd" else (1, Adam(lr=0.01, eps=0.0))
    first = MuP(base=8).abc(rule)
    for shift in (-0.5, 0.25):
        moved = {role: (a + shift, b - shift, c - power * shift) for role, (a, b, c) in first.items()}
        torch.manual_seed(0)
        one = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
        other = copy.deepcopy(one)
        plain = curve([MuP(base=8), made], one)
        assert curve([MuP(base=8, exponents=moved), made], other) == pytest.approx(plain, rel=2e-4)
        torch.testing.assert_close(fold(other)(data()[0]), one(data()[0]), rtol=1e-3, atol=1e-3)


def test_the_papers_exponents_are_the_default_under_sgd() -> None:
    paper: Any = {"input": (-0.5, 0.5, 0), "hidden": (0, 0.5, 0), "output": (0.5, 0.5, 0)}
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 32, bias=False), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    other = copy.deepcopy(one)
    plain = curve([MuP(base=8), SGD(lr=0.1)], one)
    assert curve([MuP(base=8, exponents=paper), SGD(lr=0.1)], other) == pytest.approx(plain, rel=2e-4)


def test_standard_exponents_are_the_network_as_it_was_and_ntk_has_its_learning_rate() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 32, bias=False), nn.Tanh(), nn.Linear(32, 3, bias=False))  # biases start alike
    same = curve([MuP(base=8, exponents=STANDARD), SGD(lr=0.1)], copy.deepcopy(plain))
    assert same == curve([SGD(lr=0.1)], plain)
    model = Net(32)
    rates = MuP(base=8, exponents=NTK).rates(model, torch.optim.SGD(model.parameters()))
    assert set(rates.values()) == {1.0}
    assert MuP(base=8, exponents=NTK).multipliers(model) == {"b": 0.5, "c": 0.5, "read": 0.5}


def test_a_wide_linear_network_follows_the_exact_limit_of_infinite_width() -> None:
    """f(x) = V U x / n with n -> infinity: TP4's derivation, and MetaInfLin1LP of the authors' edwardjhu/TP4.

    Rows of U and columns of V stay linear combinations of their independent Gaussian starts, so that the limit is a
    network of width inputs + outputs, started at [I; 0] and [0, I] and trained by the same steps.
    """
    inputs, outputs, n, lr = 3, 2, 4096, 0.3
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, inputs, generator=generator)
    y = x @ torch.randn(inputs, outputs, generator=generator)
    u, v = torch.eye(inputs + outputs)[:, :inputs].clone(), torch.eye(inputs + outputs)[inputs:].clone()
    limit = []
    for _ in range(12):
        u.requires_grad_(), v.requires_grad_()
        loss = (x @ u.T @ v.T - y).square().sum(1).mean()
        limit.append(float(loss.detach()))
        du, dv = torch.autograd.grad(loss, (u, v))
        u, v = (u - lr * du).detach(), (v - lr * dv).detach()
    model = nn.Sequential(nn.Linear(inputs, n, bias=False), nn.Linear(n, outputs, bias=False))
    with torch.no_grad():
        model[0].weight.normal_(generator=generator)
        model[1].weight.normal_(generator=generator).mul_(n**-0.5)  # "fan-in", of a base of width 1
    rule = SGD(lr=lr, momentum=0.0)

    def squares(output: Tensor, target: Tensor, now: Now) -> Tensor:
        return (output - target).square().sum(1)

    run = train(model, (x, y), squares, [MuP(base=1), rule], steps=12, batch_size=16)
    assert limit[-1] < 0.5 * limit[0]
    assert [p["objective"] for p in run.history] == pytest.approx(limit, abs=3 / math.sqrt(n))


# -- the coordinate check ----------------------------------------------------------------------------------------------
def llama(width: int, tied: bool, heads: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(width)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": heads, "vocab_size": 24}
    made = LlamaConfig(num_hidden_layers=2, initializer_range=0.1, tie_word_embeddings=tied, **shape)
    return LlamaForCausalLM(made)


def gpt2(width: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(width)
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    made = GPT2Config(n_embd=width, n_layer=2, n_head=width // 16, vocab_size=24, n_positions=16, **drops)
    return GPT2LMHeadModel(made)


def perceptron(width: int) -> nn.Module:
    torch.manual_seed(width)
    inner = [part for _ in range(2) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), *inner, nn.Linear(width, 3))


def convolutions(width: int) -> nn.Module:
    torch.manual_seed(width)
    first, then = nn.Conv1d(1, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), first, nn.Tanh(), then, nn.Tanh(), nn.Flatten(), nn.Linear(5 * width, 3)
    )


def words(width: int) -> nn.Module:
    torch.manual_seed(width)
    middle = nn.Linear(width, width)
    return nn.Sequential(nn.Embedding(24, width), middle, nn.ReLU(), nn.Flatten(), nn.Linear(6 * width, 3))


def tokens() -> tuple[Tensor, Tensor]:
    drawn = torch.randint(0, 24, (24, 6), generator=torch.Generator().manual_seed(2))
    return drawn, drawn.roll(-1, 1)


def word_data() -> tuple[Tensor, Tensor]:
    drawn, _ = tokens()
    return drawn, drawn[:, 0] % 3


def moved(
    build: Callable[[int], nn.Module], given: Any, make: Callable[[], list[Method]], widths: tuple[int, ...]
) -> dict[str, float]:
    """The slope of log(how far a layer's outputs move in four steps) in log(width), for each layer."""
    logs: dict[str, list[float]] = {}
    for width in widths:
        model = build(width)
        outputs: list[dict[str, Tensor]] = []

        def look(_: Now, model: nn.Module = model, outputs: list[dict[str, Tensor]] = outputs) -> None:
            found: dict[str, Tensor] = {}
            hooks = [
                layer.register_forward_hook(
                    lambda _, __, out, name=name, found=found: found.update({name: out.clone()})
                )
                for name, layer in model.named_modules()
                if hasattr(layer, "weight") and not list(layer.children())
            ]
            with torch.no_grad():
                model(given[0])
            for hook in hooks:
                hook.remove()
            outputs.append(found)

        train(model, given, methods=make(), steps=5, batch_size=len(given[1]), on_step=look)
        for name, after in outputs[-1].items():
            logs.setdefault(name, []).append(math.log(float((after - outputs[0][name]).square().mean().sqrt())))
    x = torch.tensor([math.log(width) for width in widths])
    return {
        name: float(((x - x.mean()) * torch.tensor(y)).sum() / (x - x.mean()).square().sum())
        for name, y in logs.items()
    }


NETS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Any], dict[str, Any]]] = {
    "perceptron": (perceptron, data, {}),
    "convolutions": (convolutions, data, {}),
    "embedding": (words, word_data, {}),
    "llama": (lambda width: llama(width, tied=False), tokens, {}),
    "tied llama": (lambda width: llama(width, tied=True), tokens, {}),
    "gpt2, by more heads": (gpt2, tokens, {"heads": 1}),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_activations_move_alike_at_every_width(net: str, rule: str) -> None:
    """The coordinate check: in standard parametrization the outputs move further the wider the network, here not."""
    build, given, fields = NETS[net]
    step: Method = Adam(lr=0.01) if rule == "adam" else SGD(lr=0.1, momentum=0.0)
    widths = (32, 64, 128, 256)
    ours = moved(build, given(), lambda: [MuP(base=16, **fields), step], widths)
    queries = {name for name in ours if name.endswith("q_proj")}  # these hold the root by which scores are smaller
    assert max(abs(slope + 0.5 * (name in queries)) for name, slope in ours.items()) < 0.35, ours
    if rule == "adam":
        plain = moved(build, given(), lambda: [step], widths)
        assert max(plain.values()) > 0.4, plain


# -- which weights get which start and rate ----------------------------------------------------------------------------
def test_each_kind_of_weight_has_the_rate_of_its_role() -> None:
    model = llama(64, tied=True)
    mup, rule = MuP(base=16), torch.optim.AdamW(model.parameters())
    rates = mup.rates(model, rule)
    part = "model.layers.0."
    assert rates["model.embed_tokens.weight"] == rates["model.norm.weight"] == 1.0
    assert rates[f"{part}self_attn.k_proj.weight"] == rates[f"{part}mlp.down_proj.weight"] == 0.25
    assert rates[f"{part}self_attn.q_proj.weight"] == 0.125  # heads are four times as large
    assert MuP(base=16, heads=2).rates(model, rule) == rates
    narrow = MuP(base=16, heads=1).rates(model, rule)  # one head of 16 became two of 32
    assert narrow[f"{part}self_attn.q_proj.weight"] == pytest.approx(0.25 * 2**-0.5)
    assert mup.multipliers(model) == {"lm_head": 0.25}
    assert MuP(base=16).multipliers(llama(64, tied=False)) == {}
    starts = mup.starts(model)
    assert starts[f"{part}self_attn.q_proj.weight"] == 0.25
    assert starts[f"{part}self_attn.k_proj.weight"] == 0.5  # constant at all widths before, 1 / sqrt(width) now
    assert MuP(base=16).starts(llama(64, tied=False))["lm_head.weight"] == 0.25


def test_a_tied_llama_trains_as_an_untied_one_that_is_kept_tied() -> None:
    """The multiplier of the shared weight is folded into a weight of its own, with the same outputs."""
    model = llama(64, tied=True)
    run = train(model, tokens(), methods=[MuP(base=16), AdamW(lr=0.01)], steps=3)
    before = model(tokens()[0]).logits.detach()
    assert len(run.model.lm_head.plait) == 1
    torch.testing.assert_close(fold(run.model)(tokens()[0]).logits, before, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_conv1d_and_recurrent_and_depthwise_weights_know_their_sides() -> None:
    model = gpt2(64)
    rates = MuP(base=16, heads=1).rates(model, torch.optim.Adam(model.parameters()))
    assert rates["transformer.h.0.mlp.c_fc.weight"] == rates["transformer.h.0.attn.c_attn.weight"] == 0.25
    assert rates["transformer.wpe.weight"] == rates["transformer.h.0.mlp.c_fc.bias"] == 1.0

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.deep = nn.LSTM(3, 32, num_layers=2), nn.Conv1d(32, 32, 3, groups=32)
            self.token, self.read = nn.Parameter(torch.zeros(1, 4, 32)), nn.Linear(32, 2)

    widths = MuP(base=8).widths(Reader())
    assert {name: (w.out, w.into) for name, w in widths.items() if w.into != 1} == {
        "rnn.weight_hh_l0": (4, 4),
        "rnn.weight_ih_l1": (4, 4),
        "rnn.weight_hh_l1": (4, 4),
        "read.weight": (1, 4),
    }
    assert widths["token"].out == widths["deep.weight"].out == widths["rnn.weight_ih_l0"].out == 4
    exact = MuP(base={name: tuple(shape) for name, shape in base_shapes(Net(8)).items()}).widths(Net(32))
    assert exact == MuP(base=8).widths(Net(32))


def test_schedules_and_resumed_runs_keep_the_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(32)
    methods: list[Method] = [
        MuP(base=8),
        AdamW(lr=Linear(start=0.01, end=0.0), weight_decay=Linear(start=0.2, end=0.1)),
    ]
    rule, now = optimizer_for(methods, model), Now(steps=2, step=1)
    with prepared(model, rule, methods, now):
        groups = {group["param_names"][0]: (group["lr"], group["weight_decay"]) for group in rule.param_groups}
    assert groups == {"a.weight": (0.005, pytest.approx(0.15)), "b.weight": (0.00125, pytest.approx(0.6))}
    assert now.learning_rate == 0.005

    def run(folder: Path, stop: int | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        kept: dict[str, Any] = {"steps": 6, "batch_size": 8, "folder": folder, "save_every": 2}
        return train(Net(32), data(), methods=methods, on_step=lambda now: now.step == stop, **kept).model.state_dict()

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop=3)
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_transformers_own_optimizer_gets_the_rates(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from plait.integrations.transformers import Trainer

    rows = [{"input_ids": t, "labels": t} for t in tokens()[0]]
    options = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=0.01, report_to=[], use_cpu=True)
    trainer = Trainer(llama(64, tied=False), options, train_dataset=rows, methods=[MuP(base=16)])
    trainer.train()
    initial = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert initial == {0.01, 0.0025, 0.00125}


def test_bfloat16_is_scaled_too() -> None:
    torch.manual_seed(0)
    model = Net(32).bfloat16()
    before = model.read.weight.detach().clone()
    MuP(base=8).initialize(model, Now())
    torch.testing.assert_close(model.read.weight.detach(), before * 0.5)


def test_bad_input_is_refused_in_one_sentence() -> None:
    with pytest.raises(BadInput, match="as wide as its base"):
        train(Net(8), data(), methods=[MuP(base=8)], steps=1)
    with pytest.raises(BadInput, match="does not know how LAMB steps"):
        train(Net(8), data(), methods=[MuP(base=4), LAMB()], steps=1)
    with pytest.raises(BadInput, match="more heads of the same size"):
        train(gpt2(64), tokens(), methods=[MuP(base=32)], steps=1)
    with pytest.raises(BadInput, match=r"no shape for 'b.weight'"):
        train(Net(8), data(), methods=[MuP(base={"a.weight": (4, 5), "a.bias": (4,)})], steps=1)
    with pytest.raises(BadInput, match="2 dimensions, and 1 in base"):
        train(Net(8), data(), methods=[MuP(base=base_shapes(Net(4)) | {"a.weight": [4]})], steps=1)
    odd = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    odd.register_parameter("odd", nn.Parameter(torch.zeros(3, 7)))
    with pytest.raises(BadInput, match="which sizes of 'odd'"):
        train(odd, data(), methods=[MuP(base=4)], steps=1)
    with pytest.raises(BadInput, match=r"MuP.base"):
        MuP(base=0)


@pytest.mark.parametrize("adapter", [*DoRA(rank=2)[1:], SORSA(rank=2), SVFit(rank=2), LoRAXS(rank=2)])
def test_adapters_made_of_the_weights_before_are_refused(adapter: Method) -> None:
    name = {"Magnitude": "DoRA"}.get(type(adapter).__name__, type(adapter).__name__)
    with pytest.raises(
        BadInput, match=rf"^MuP writes the weight of '\w+', and {name} was made of the one before: drop"
    ):
        train(Net(32), data(), methods=[adapter, MuP(base=8)], steps=1)
    with pytest.raises(BadInput, match=r"of which a start took a part before: put MuP before that start.$"):
        train(Net(32), data(), methods=[LoRA(rank=2), PiSSA(), MuP(base=8)], steps=1)


def test_half_the_network_can_be_left_as_it_is() -> None:
    model = Net(32)
    rates = MuP(base=8, where="b|c").rates(model, torch.optim.Adam(model.parameters()))
    assert set(rates) == {"b.weight", "b.bias", "c.weight", "c.bias"}
    loss = F.cross_entropy(model(data()[0]), data()[1])
    assert bool(torch.isfinite(loss))
