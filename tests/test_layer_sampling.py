"""LISA and HFT: what a round trains, that the rest is frozen and its room free, and that a run resumes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.errors import BadInput
from plait.measure.coherence import Coherence
from plait.measure.curvature import HessianSpectrum
from plait.measure.distance import WeightDistance
from plait.measure.generalization import GeneralizationGap, GradientNormBound
from plait.measure.laziness import Laziness
from plait.step.adam import AdamW
from plait.step.layer_sampling import HFT, LISA, named_layers, parts_of, repeated_layers
from plait.train import train
from plait.workbench.memory import Gauge, LiveBytes, gradient_bytes, optimizer_bytes
from test_step import state_of


class Deep(nn.Module):
    """An embedding, eight equal layers, a norm and a head."""

    def __init__(self, width: int = 16, depth: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(x))


def deep(**sizes: int) -> Deep:
    torch.manual_seed(0)
    return Deep(**sizes)


def llama(layers: int = 4, tied: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=layers, tie_word_embeddings=tied, **sizes))


X = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (48,), generator=torch.Generator().manual_seed(2))


def learn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# -- which layers
# -------------------------------------------------------------------------------------------------------------------
def test_the_layers_that_repeat_are_found() -> None:
    shapes = {name: p.shape for name, p in llama().named_parameters()}
    layers = repeated_layers(shapes)
    assert list(layers) == [f"model.layers.{i}" for i in range(4)]
    assert len(layers["model.layers.0"]) == 9
    two = {f"{side}.{i}.weight": (3, 3) for side in ("encoder", "decoder") for i in range(3)}
    assert len(repeated_layers(two)) == 6
    assert list(repeated_layers({"0.weight": (5, 2), "2.weight": (5, 5), "4.weight": (5, 5), "6.weight": (1, 5)})) == [
        "2",
        "4",
    ]


def test_layers_may_be_named() -> None:
    shapes = {name: p.shape for name, p in llama().named_parameters()}
    assert list(named_layers(shapes, "layers.[13]")) == ["model.layers.1", "model.layers.3"]
    assert len(named_layers(shapes, "mlp")) == 4


def test_the_rest_is_always_trained_and_tied_weights_with_it() -> None:
    model = llama()
    optimizer = LISA(model.named_parameters(), layers=1, period=1)
    ids = torch.arange(20).reshape(2, 10)
    for _ in range(6):
        on = trained(model)
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= on
        assert len({name.split(".")[2] for name in on if ".layers." in name}) == 1
        assert len([name for name in on if ".layers." in name]) == 9
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == on
        optimizer.step()


def test_each_layer_is_drawn_as_often() -> None:
    """400 rounds of 2 of 8 layers: 100 each, with a standard deviation of 8.7."""
    shapes = {name: p.shape for name, p in deep().named_parameters()}
    rule, counts = LISA(layers=2), Counter[str]()
    layers = rule.found(shapes)
    draw = torch.Generator().manual_seed(0)
    for number in range(400):
        out = rule.frozen(layers, number, draw, shapes)
        on = {layer for layer, names in layers.items() if not set(names) & out}
        assert len(on) == 2
        counts.update(on)
    assert len(counts) == 8
    assert all(abs(count - 100) < 35 for count in counts.values())


# -- the steps that it takes
# --------------------------------------------------------------------------------------------------------
def test_lisa_is_adamw_that_begins_anew_in_every_layer_it_draws() -> None:
    """Slow and obvious: torch's AdamW, one for each weight, made anew when its layer is drawn."""
    model, twin = deep(), deep()
    optimizer = LISA(model.named_parameters(), layers=2, period=3, lr=0.01, weight_decay=0.1)
    rules: dict[str, torch.optim.Optimizer] = {}
    own = dict(twin.named_parameters())
    for step in range(12):
        if step % 3 == 0:
            on = trained(model)
            rules = {name: kept for name, kept in rules.items() if name in on}  # a layer left out forgets
            for name in on - set(rules):
                rules[name] = torch.optim.AdamW([own[name]], lr=0.01, weight_decay=0.1)
        assert trained(model) == on
        twin.zero_grad()
        F.cross_entropy(twin(X), Y).backward()
        for name in on:
            rules[name].step()
        learn(model, optimizer)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, own[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rule", [LISA(layers=1, period=4, lr=0.01), HFT(period=4, lr=0.01)])
def test_what_is_frozen_stays_bitwise_and_holds_nothing(rule: Any) -> None:
    model = deep()
    optimizer = rule.optimizer(model.named_parameters())
    for _ in range(3):
        on, before = trained(model), {name: p.detach().clone() for name, p in model.named_parameters()}
        assert len(on) < len(before)
        for step in range(4):
            learn(model, optimizer)
            for name, p in model.named_parameters():
                assert torch.equal(p, before[name]) == (name not in on)
                assert name in on or step == 3 or (p.grad is None and p not in optimizer.state)


# -- the room that is free
# ----------------------------------------------------------------------------------------------------------
def test_gradients_and_states_of_frozen_layers_take_no_room() -> None:
    """Bytes as they lie in memory, at the most during the run: those of the ends and of 2 of 16 layers."""
    width, depth = 32, 16
    layer, whole = 4 * (width * width + width), 4 * sum(p.numel() for p in deep(width=32, depth=16).parameters())
    ends = whole - depth * layer
    most = {}
    for name, rule in {"adamw": AdamW(lr=0.01), "lisa": LISA(lr=0.01, layers=2, period=3)}.items():
        model = deep(width=width, depth=depth)
        optimizer = rule.optimizer(model.named_parameters())
        seen = []
        for _ in range(9):
            learn(model, optimizer)
            seen.append((gradient_bytes(model), optimizer_bytes(optimizer)))
        most[name] = tuple(max(s[i] for s in seen) for i in (0, 1))
    assert most["adamw"] == (whole, 2 * whole)
    assert most["lisa"] == (ends + 2 * layer, 2 * (ends + 2 * layer))
    assert most["lisa"][1] < 0.25 * most["adamw"][1]


def test_no_gradient_of_a_frozen_layer_is_ever_made() -> None:
    """The highest sum of live tensors in a step: less by the gradients of 14 of 16 layers and their states."""
    peaks = {}
    for name, rule in {"adamw": AdamW(lr=0.01), "lisa": LISA(lr=0.01, layers=2, period=100)}.items():
        model = deep(width=32, depth=16)
        optimizer = rule.optimizer(model.named_parameters())
        with LiveBytes() as live:
            for _ in range(2):
                learn(model, optimizer)
        peaks[name] = live.peak
    layer = 4 * (32 * 32 + 32)
    assert peaks["adamw"] - peaks["lisa"] > 0.95 * 3 * 14 * layer


def test_a_runs_report_shows_the_bytes() -> None:
    memory = {}
    for name, rule in {"adamw": AdamW(), "lisa": LISA(layers=1, period=2)}.items():
        model = deep(width=32, depth=16)
        with Gauge(model) as gauge:
            train(model, gauge.data(plain_data()), methods=[rule], steps=5, on_step=gauge.on_step)
        memory[name] = gauge.memory
    assert memory["lisa"].optimizer < 0.2 * memory["adamw"].optimizer
    assert memory["lisa"].gradients < 0.2 * memory["adamw"].gradients


def plain_data() -> Any:
    from plait.engine import as_data

    return as_data((X, Y))


# -- half of every layer
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("depth", [4, 5])
def test_hft_freezes_half_of_every_layer(depth: int) -> None:
    """2 of q, k, v, o; 2 of gate, up, down in half of the layers and 1 in the others; 1 of 2 norms."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = llama(layers=depth)
        torch.manual_seed(seed)
        HFT(model.named_parameters())
        frozen = set(dict(model.named_parameters())) - trained(model)
        counts = Counter[tuple[str, str]]()
        for name in frozen:
            _, _, number, module, *_ = name.split(".")
            counts[number, "norm" if "norm" in module else module] += 1
        assert all(counts[str(i), "self_attn"] == 2 for i in range(depth))
        assert all(counts[str(i), "norm"] == 1 for i in range(depth))
        assert sorted(counts[str(i), "mlp"] for i in range(depth)) == sorted([1, 2] * (depth // 2) + [1] * (depth % 2))
        if depth % 2 == 0:
            sizes = {n: p.numel() for n, p in model.named_parameters() if ".layers." in n}
            assert 2 * sum(sizes[n] for n in frozen) == sum(sizes.values())


def test_hft_draws_anew_each_round_and_by_the_runs_seed() -> None:
    draws = []
    for seed in (0, 0, 1):
        model = llama()
        torch.manual_seed(seed)
        optimizer = HFT(model.named_parameters(), period=1)
        ids = torch.arange(20).reshape(2, 10)
        for _ in range(2):
            draws.append(frozenset(trained(model)))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    first, second, *again = draws
    assert first != second
    assert again[:2] == [first, second]
    assert again[2] != first


@pytest.mark.parametrize("rule", [HFT(lr=0.01), LISA(lr=0.01, layers=4, period=100)])
def test_each_of_several_runs_is_a_round_of_its_own_and_is_drawn_alike_again(rule: Any) -> None:
    """plait.train seeds every run alike: the stages must differ by the weights that they start from."""

    def stages() -> list[set[str]]:
        model, moved = deep(), []
        for _ in range(3):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            train(model, (X, Y), methods=[rule], steps=2)
            moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
        return moved

    first, second, third = stages()
    assert first != second != third != first
    assert stages() == [first, second, third]


def test_modules_are_told_apart_by_kind() -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=20, **sizes), add_pooling_layer=False)
    gpt = GPT2Model(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    for model, kinds in ((bert, (4, 2, 2)), (gpt, (2, 2, 2))):
        shapes = {name: p.shape for name, p in model.named_parameters()}
        for layer, names in repeated_layers(shapes).items():
            assert tuple(len(modules) for modules in parts_of(layer, names, shapes).values()) == kinds


# -- resuming, and after
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", [LISA(layers=2, period=3, lr=0.01), HFT(period=3, lr=0.01)])
def test_a_run_goes_on_bitwise_from_within_a_round_and_from_its_end(rule: Any, tmp_path: Path) -> None:
    def go(steps: int, **options: Any) -> dict[str, Tensor]:
        run = train(deep(), (X, Y), methods=[rule], steps=steps, batch_size=16, **options)
        return {name: t.clone() for name, t in run.model.state_dict().items()}

    whole = go(10)
    for cut in (1, 3, 5):
        folder = tmp_path / str(cut)
        go(cut, folder=folder, save_every=cut)
        again = go(10, folder=folder)
        assert all(torch.equal(t, whole[name]) for name, t in again.items())


def test_an_optimizers_state_goes_on_with_its_round() -> None:
    model, other = deep(), deep()
    optimizer = LISA(model.named_parameters(), layers=2, period=3)
    for _ in range(4):
        learn(model, optimizer)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(7)
    again = LISA(other.named_parameters(), layers=2, period=3)
    again.load_state_dict(state_of(optimizer))
    for _ in range(5):
        assert trained(model) == trained(other)
        learn(model, optimizer)
        learn(other, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_finished_model_can_be_trained_on_and_what_was_frozen_stays_frozen() -> None:
    model = deep()
    model.embed.requires_grad_(False)
    model.layers[3].weight.requires_grad_(False)
    before, embedded = trained(model), model.embed.weight.detach().clone()
    run = train(model, (X, Y), methods=[LISA(layers=2, period=2, where="layers.[0-9]")], steps=5)
    assert trained(run.model) == before
    assert torch.equal(run.model.embed.weight, embedded)


@pytest.mark.parametrize("kind", [LISA, HFT])
def test_the_way_from_the_start_is_that_of_all_weights_whatever_rests(kind: Any, tmp_path: Path) -> None:
    """Also after a pause. At next to no rate the tangent kernel, over all weights, is the one at the start."""
    probes = [WeightDistance(), GradientNormBound(), Laziness(count=8)]
    sizes = {"period": 1} | ({"layers": 1} if kind is LISA else {})

    def figures(steps: int, lr: float, **options: Any) -> tuple[nn.Module, list[Any]]:
        rule = kind(lr=lr, **sizes)
        run = train(deep(), (X, Y), methods=[*probes, rule], steps=steps, batch_size=16, measure_every=1, **options)
        return run.model, [run.measures[repr(probe)][-1] for probe in probes]

    figures(3, 0.01, folder=tmp_path, save_every=3)
    model, (distance, bound, laziness) = figures(5, 0.01, folder=tmp_path)
    pairs = zip(model.parameters(), deep().parameters(), strict=True)
    moved = sum(float((p - q).detach().double().square().sum()) for p, q in pairs)
    assert distance["distance"] == pytest.approx(moved**0.5, rel=1e-6)
    assert bound["divergence"] == pytest.approx(moved / (2 * 0.03**2), rel=1e-6)
    assert laziness["weight change"] == pytest.approx(moved**0.5, rel=1e-6)
    assert figures(2, 1e-12)[1][2]["kernel alignment"] == pytest.approx(1.0, abs=1e-6)


def test_a_measure_of_layers_that_rest_says_nothing_of_that_step() -> None:
    probes = [kind(where="layers.0") for kind in (HessianSpectrum, Coherence, GeneralizationGap)]
    rule = LISA(lr=1e-3, layers=1, period=1)
    with pytest.warns(UserWarning, match="says nothing of steps in which all that it looks at rests"):
        run = train(deep(), (X, Y), methods=[*probes, rule], steps=8, batch_size=16, measure_every=1)
    for probe in probes:
        assert 0 < len(run.measures[repr(probe)]) < 8
    with pytest.raises(BadInput, match="where='other'"):
        train(deep(), (X, Y), methods=[Coherence(where="other")], steps=1, measure_every=1)


def test_a_kernel_is_found_one_example_at_a_time_while_layers_rest() -> None:
    """Where values decide what is run, torch.func cannot follow the model."""

    class Deciding(Deep):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else x + 0.0)

    torch.manual_seed(0)
    run = train(Deciding(), (X, Y), methods=[Laziness(count=4), LISA(layers=2)], steps=2)
    assert 0 < run.measures["Laziness(count=4)"][-1]["kernel alignment"] <= 1


def test_adapters_take_turns_with_their_layers() -> None:
    from plait.parametrize.low_rank import LoRA

    model = deep()
    run = train(model, (X, Y), methods=[LoRA(rank=2), LISA(layers=2, period=2)], steps=5)
    assert len(run.history) == 5


@pytest.mark.parametrize("rule", [LISA(layers=2), HFT()])
def test_a_state_that_distributed_checkpoints_lost_a_part_of_is_refused(rule: Any) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    flat, model, other = StateDictOptions(flatten_optimizer_state_dict=True), deep(), deep()
    optimizer = rule.optimizer(model.named_parameters())
    learn(model, optimizer)
    other.load_state_dict(model.state_dict())
    again = rule.optimizer(other.named_parameters())
    with pytest.raises(BadInput, match=r"loses states of .* save and load optimizer.state_dict\(\) itself"):
        set_optimizer_state_dict(other, again, get_optimizer_state_dict(model, optimizer, options=flat), options=flat)
    again.load_state_dict(state_of(optimizer))
    learn(model, optimizer)
    learn(other, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# -- refusals
# ----------------------------------------------------------------------------------------------------------------------
class Shared(Deep):
    """What follows a layer has the layer's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(16, 16)
        self.tail.weight = self.layers[2].weight


REFUSED: list[tuple[nn.Module, Any, str]] = [
    (
        nn.Linear(4, 3),
        LISA(),
        "LISA finds no layers that repeat and are trained: name at least two that take turns, as in "
        "LISA(where='layers.[0-9]+'), or use AdamW.",
    ),
    (
        deep(),
        HFT(where="layers.3"),
        "HFT finds no two layers that where='layers.3' names and are trained: name at least two that take turns, as in "
        "HFT(where='layers.[0-9]+'), or use AdamW.",
    ),
    (
        deep(),
        LISA(layers=8),
        "LISA(layers=8) would train all of the 8 layers that take turns: use at most 7, or AdamW.",
    ),
    (
        Shared(),
        LISA(where="layers.[0-9]"),
        "LISA cannot freeze layers.2 alone, for it shares 'layers.2.weight' with 'tail.weight': name layers that share "
        "nothing with where.",
    ),
]


@pytest.mark.parametrize(("model", "rule", "sentence"), REFUSED)
def test_refuses_in_one_sentence(model: nn.Module, rule: Any, sentence: str) -> None:
    with pytest.raises(BadInput) as problem:
        train(model, (X, Y), methods=[rule], steps=1)
    assert str(problem.value) == sentence


def test_needs_names() -> None:
    with pytest.raises(BadInput) as problem:
        LISA(deep().parameters())
    assert str(problem.value) == "LISA needs names: give it model.named_parameters()."
