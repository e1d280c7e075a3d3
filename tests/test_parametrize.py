"""Adapters and other parametrizations: the laws of the place, an oracle for each method, and how layers carry them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from plait.errors import BadInput
from plait.layers import matrix
from plait.method import Method, Now
from plait.parametrize import lean
from plait.parametrize.base import attached, dense_weight, run, stack, untouched_weight
from plait.parametrize.block import Bone
from plait.parametrize.compander import WeightCompander
from plait.parametrize.core import LoRAXS
from plait.parametrize.folding import fold
from plait.parametrize.freeze import mark_fresh
from plait.parametrize.kernelized import SNELLA
from plait.parametrize.low_rank import DoRA, LoRA, LowRank, Magnitude, RowNorms, row_norms
from plait.parametrize.low_rank_channels import LOST
from plait.parametrize.low_rank_dropout import LoRADropout
from plait.parametrize.low_rank_sparse import SLTrain
from plait.parametrize.masked import RAMT
from plait.parametrize.mixout import Mixout
from plait.parametrize.prompt import PromptTuning
from plait.parametrize.pruned import DSEE
from plait.parametrize.random_bases import RandLoRA
from plait.parametrize.rank_growth import TriAdaptLoRA
from plait.parametrize.row_scaled import ALLoRA
from plait.parametrize.scaling import IA3Scale
from plait.parametrize.sequential import Hydra
from plait.parametrize.singular import SORSA, SingularTriplets, SVFit
from plait.parametrize.sparse_growth import SpIEL
from plait.parametrize.sparse_smallest import SaRA
from plait.train import train

Maker = Callable[[], list[Method]]

METHODS: dict[str, Maker] = {
    "lora": lambda: [LoRA(rank=2)],
    "rslora": lambda: [LoRA(rank=2, scaling="rank-stabilized")],
    "dora": lambda: DoRA(rank=2),
    "sorsa": lambda: [SORSA(rank=2)],
    "lora-xs": lambda: [LoRAXS(rank=2, deviation=0.0)],
    "miss": lambda: [Bone(rank=2, kind="shared")],
    "randlora": lambda: [RandLoRA(rank=2)],
    "hydra": lambda: [Hydra(rank=2)],
    "hydra + output scale": lambda: [Hydra(rank=2), IA3Scale()],
    "lora + hydra": lambda: [LoRA(rank=2), Hydra(rank=2)],
    "sltrain": lambda: [SLTrain(rank=2, density=0.2)],
    "sltrain + lora": lambda: [SLTrain(rank=2, density=0.2), LoRA(rank=1)],
    "lost": lambda: [LOST(rank=2, density=0.5)],
    "lost + lora": lambda: [LOST(rank=2, density=0.5), LoRA(rank=1)],
    "svfit": lambda: [SVFit(rank=3)],
    "allora": lambda: [ALLoRA(rank=2)],
    "snella": lambda: [SNELLA(rank=2)],
    "triadaptlora": lambda: [TriAdaptLoRA(rank=2, most=3, period=2)],
    "dsee": lambda: [DSEE(rank=2, entries=5, sparsity=0.0)],
    "lora + dsee": lambda: [LoRA(rank=1), DSEE(rank=2, entries=5, sparsity=0.0)],
    "ramt": lambda: [RAMT(share=0.5)],
    "lora + ramt": lambda: [LoRA(rank=1), RAMT()],
    "sara": lambda: [SaRA(share=0.3, stages=1)],
    "spiel": lambda: [SpIEL(density=0.2, every=3, estimate=2)],
    "lora + spiel": lambda: [LoRA(rank=1), SpIEL(density=0.2)],
    "spiel + dora": lambda: [SpIEL(density=0.2), *DoRA(rank=1)],
    "lora dropout": lambda: [LoRADropout(rank=2)],
    "output scale": lambda: [IA3Scale()],
    "input scale": lambda: [IA3Scale(side="input")],
    "output scale + lora": lambda: [IA3Scale(), LoRA(rank=2)],
    "sorsa + dora": lambda: [SORSA(rank=2), Magnitude()],
    "lora twice": lambda: [LoRA(rank=2), LoRA(rank=1)],
    "compander": lambda: [WeightCompander()],
    "compander + lora": lambda: [WeightCompander(), LoRA(rank=2)],
    "mixout": lambda: [Mixout()],
    "mixout + lora": lambda: [Mixout(), LoRA(rank=2)],
}
FACTORED = ["sltrain", "lost", "svfit", "allora", "spiel", "lora + spiel", "sara", "ramt", "dsee"]
TIMED = ["snella", "triadaptlora"]  # which follow the number of steps, so that it may not change
FROM_THE_BASE = [name for name in METHODS if not name.startswith(("sltrain", "lost"))]  # which start from scratch
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), (3, 4, 6)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 7)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, (2, 3), stride=2, dilation=(1, 2)), (2, 3, 6, 8)),
    "Conv2d with groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "Conv2d, channels last": (lambda: nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last), (2, 3, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 3, 4)),
    "Embedding": (lambda: nn.Embedding(7, 5, padding_idx=0), ()),
}


def inputs_of(layer: str, dtype: torch.dtype = torch.float32) -> Tensor:
    draw, shape = torch.Generator().manual_seed(3), LAYERS[layer][1]
    return torch.randn(shape, generator=draw).to(dtype) if shape else torch.randint(0, 7, (3, 4), generator=draw)


def adapted(layer: str, methods: list[Method], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Return (the model before, the model with its parametrizations stirred), both holding one layer, `0`."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[layer][0]()).to(dtype)
    before = copy.deepcopy(model)
    for method in methods:
        method.parametrize(model)
    return before, model


def stir(model: nn.Module, size: float = 0.2) -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".plait." in f".{name}" and parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=draw).to(parameter))
    return model


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    scale = theirs.abs().max().clamp_min(1e-3)
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).abs().max() <= tolerance * scale


every_layer = pytest.mark.parametrize("layer", LAYERS)
every_method = pytest.mark.parametrize("name", METHODS)


# -- laws --------------------------------------------------------------------------------------------------------------
@every_layer
@pytest.mark.parametrize("name", FROM_THE_BASE)
def test_the_function_is_the_base_models_at_the_start(layer: str, name: str) -> None:
    before, model = adapted(layer, METHODS[name]())
    close(model.eval()(inputs_of(layer)), before(inputs_of(layer)), 1e-5)


@every_layer
@every_method
def test_folded_is_unfolded(layer: str, name: str) -> None:
    _, model = adapted(layer, METHODS[name]())
    stir(model).eval()
    unfolded = model(inputs_of(layer))
    plain = fold(copy.deepcopy(model))
    close(plain(inputs_of(layer)), unfolded, 1e-5)
    assert sorted(plain.state_dict()) == sorted(nn.Sequential(LAYERS[layer][0]()).state_dict())
    assert type(plain[0]) is type(LAYERS[layer][0]())
    assert "forward" not in plain[0].__dict__


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "sorsa", "sorsa + dora", "lora twice", *FACTORED])
@every_layer
def test_the_fast_path_is_the_dense_definition_in_values_and_gradients(layer: str, name: str) -> None:
    _, model = adapted(layer, METHODS[name](), torch.float64)
    stir(model)
    target, seen = model[0], []
    for fast in (True, False):
        x = inputs_of(layer, torch.float64)
        x = x.requires_grad_() if x.is_floating_point() else x
        output = target(x) if fast else run(target, x, dense_weight(target))
        model.zero_grad()
        (output * torch.linspace(-1, 2, output.numel()).view(output.shape)).sum().backward()
        named = {n: p.grad for n, p in target.named_parameters() if p.grad is not None}
        seen.append((output.detach(), x.grad, named))
    (ours, ours_x, ours_p), (theirs, theirs_x, theirs_p) = seen
    close(ours, theirs, 1e-12)
    assert set(ours_p) == set(theirs_p) == {n for n, p in target.named_parameters() if p.requires_grad}
    for key in ours_p:
        close(ours_p[key], theirs_p[key], 1e-11)
    if ours_x is not None:
        close(ours_x, theirs_x, 1e-11)


@pytest.mark.parametrize("name", ["lora", "dora", "sorsa", "compander", "mixout", "hydra", *FACTORED])
@every_layer
def test_bfloat16_stays_within_its_rounding(layer: str, name: str) -> None:
    """16-bit weights: adapters are kept in float32, outputs in bfloat16; folded and unfolded agree to 4e-2."""
    _, model = adapted(layer, METHODS[name](), torch.bfloat16)
    stir(model).eval()
    x = inputs_of(layer, torch.bfloat16)
    output = model(x)
    assert output.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora" in n)
    output.float().sum().backward()
    close(fold(copy.deepcopy(model))(x), output.detach(), 4e-2)


@every_layer
@every_method
def test_a_layer_takes_what_it_takes_without_adapters(layer: str, name: str) -> None:
    """Also no examples at all (an expert that no token chose), one without a batch, and in inference mode."""
    before, model = adapted(layer, METHODS[name]())
    stir(model)
    x = inputs_of(layer)
    model(x[:0]).sum().backward()
    with torch.inference_mode():
        every = model.eval()(x)
        assert model(x[:0]).shape == before(x[:0]).shape
        close(model(x[0]), every[0], 1e-5)


@every_method
def test_state_round_trip_and_the_base_models_checkpoint(name: str) -> None:
    before, model = adapted("Linear", METHODS[name]())
    stir(model).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert set(before.state_dict()) <= set(state)
    _, other = adapted("Linear", METHODS[name]())
    other.eval().load_state_dict(state)
    assert torch.equal(other(inputs_of("Linear")), model(inputs_of("Linear")))
    other.load_state_dict(before.state_dict())  # strict
    close(untouched_weight(other[0]), before[0].weight, 1e-6)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**before.state_dict(), "odd": torch.zeros(1)})


@every_method
def test_a_copy_is_independent(name: str) -> None:
    _, model = adapted("Linear", METHODS[name]())
    stir(model).eval()
    output, twin = model(inputs_of("Linear")), copy.deepcopy(model)
    assert torch.equal(twin(inputs_of("Linear")), output)
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs_of("Linear")), output)
    stir(twin, 1.0)
    with torch.no_grad():
        twin[0].weight.add_(1.0)
    assert not torch.equal(twin(inputs_of("Linear")), output)
    assert torch.equal(model(inputs_of("Linear")), output)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in TIMED])
def test_training_resumes_bitwise(name: str, tmp_path: Path) -> None:
    data = (torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3)

    def go(steps: int, folder: Path | None) -> nn.Module:
        torch.manual_seed(0)
        model = mark_fresh(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "2")
        return train(model, data, methods=METHODS[name](), steps=steps, batch_size=8, folder=folder, save_every=2).model

    whole = go(6, tmp_path / "whole")
    go(4, tmp_path / "halves")
    again = go(6, tmp_path / "halves")
    for (key, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


# -- layers, models ----------------------------------------------------------------------------------------------------
def tiny_llama(tie: bool = False) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=tie, **shape)
    return LlamaForCausalLM(config)


TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def test_all_layers_means_neither_new_heads_nor_the_ends_of_a_language_model() -> None:
    model = tiny_llama()
    LoRA(rank=2).parametrize(model)
    names = {name.rpartition(".")[2] for name, _, _ in attached(model, LowRank)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    net = mark_fresh(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), "1")
    LoRA(rank=1).parametrize(net)
    assert [name for name, _, _ in attached(net, LowRank)] == ["0"]
    trained = ["0.plait.lora.A", "0.plait.lora.B", "1.weight", "1.bias"]
    assert [name for name, p in net.named_parameters() if p.requires_grad] == trained
    net = mark_fresh(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), "1")
    LoRA(rank=1).parametrize(torch.compile(net, backend="eager"))
    assert [name for name, p in net.named_parameters() if p.requires_grad] == trained


@pytest.mark.parametrize("methods", [[LoRA(rank=2, train="lm_head|norm")], [PromptTuning(train="lm_head|norm")]])
def test_layers_are_trained_by_their_names_beside_adapters(methods: list[Method]) -> None:
    model = tiny_llama()
    for method in methods:
        method.parametrize(model)
    beside = [n for n, p in model.named_parameters() if p.requires_grad and ".plait." not in n]
    assert beside == ["model.norm.weight", "lm_head.weight"]
    for wrong in (LoRA(rank=2, train="lm_haed"), PromptTuning(train="lm_haed")):
        with pytest.raises(
            BadInput, match=r"train='lm_haed' matches no weight .* \(did you mean 'lm_head'\?\): change it"
        ):
            wrong.parametrize(tiny_llama())


def test_folding_tied_weights_unties_them_and_the_model_saves_and_loads(tmp_path: Path) -> None:
    model = tiny_llama(tie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    LoRA(rank=2, where="lm_head").parametrize(model)
    stir(model).eval()
    output, tokens = model(TOKENS).logits, model.model.embed_tokens.weight.clone()
    fold(model)
    assert torch.equal(model.model.embed_tokens.weight, tokens)
    close(model(TOKENS).logits, output, 1e-5)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    close(loaded(TOKENS).logits, output, 1e-5)


def test_folding_both_of_two_tied_layers() -> None:
    model = tiny_llama(tie=True)
    LoRA(rank=2, where="lm_head|embed_tokens").parametrize(model)
    stir(model).eval()
    output = model(TOKENS).logits
    close(fold(model)(TOKENS).logits, output, 1e-5)


def test_a_gpt2_block_takes_adapters() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).eval()
    for method in DoRA(rank=2):
        method.parametrize(model)
    output = stir(model)(TOKENS).logits
    close(fold(model)(TOKENS).logits, output, 1e-5)


def test_transformer_encoder_layers_do_not_pass_an_adapter_by() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x, before = torch.randn(2, 3, 8), None
    with torch.no_grad():
        before = model(x)
        LoRA(rank=2).parametrize(model)
        stir(model)
        assert {name for name, _, _ in attached(model, LowRank)} == {"linear1", "linear2"}
        assert (model(x) - before).abs().max() > 1e-3
    with pytest.raises(BadInput, match="MultiheadAttention reads its weight without calling it"):
        LoRA(rank=2, where="out_proj").parametrize(model)
    with pytest.raises(BadInput, match="cannot act on 'out_proj': nn"):
        LoRA(rank=2).parametrize(nn.MultiheadAttention(8, 2))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    _, model = adapted("Linear", DoRA(rank=2))
    stir(model)
    grads = []
    for wrapped in (False, True):
        x = inputs_of("Linear").requires_grad_()
        model.zero_grad()
        output = checkpoint(model, x, use_reentrant=use_reentrant) if wrapped else model(x)
        output.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(grads[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["lora", "dora", "sorsa"])
def test_compiled_models_compute_the_same(name: str) -> None:
    _, model = adapted("Linear", METHODS[name]())
    stir(model)
    x = inputs_of("Linear")
    model(x).square().sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    for key, grad in plain.items():
        close(dict(model.named_parameters())[key].grad, grad, 1e-5)


def test_autocast_gradients_stay_in_float32() -> None:
    _, model = adapted("Linear", [LoRA(rank=2)])
    stir(model)
    x = inputs_of("Linear")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert model[0].plait.lora.A.grad.dtype == torch.float32
    close(output.detach(), model(x).detach(), 2e-2)


def test_derivatives_of_derivatives_and_transforms_of_functions() -> None:
    _, model = adapted("Linear", [LoRA(rank=2)], torch.float64)
    layer = stir(model)[0]
    low = layer.plait.lora

    def output(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        swapped = {"plait.lora.A": a, "plait.lora.B": b}
        made: Tensor = torch.func.functional_call(layer, swapped, (x,))
        return made

    x = inputs_of("Linear", torch.float64)[0].requires_grad_()
    a, b = low.A.detach().requires_grad_(), low.B.detach().requires_grad_()
    assert torch.autograd.gradcheck(output, (x, a, b))
    assert torch.autograd.gradgradcheck(output, (x, a, b))
    per_example = torch.func.vmap(torch.func.grad(lambda a, x: output(x, a, b).sum()), (None, 0))(a, x)
    summed = torch.autograd.grad(output(x, a, b).sum(), a)[0]
    close(per_example.sum(0), summed, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_keeps_less_computes_the_same(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
    LoRA(rank=2, train=".*norm.weight").parametrize(model)
    stir(model)
    spared = [
        n
        for n, m in model.named_modules()
        if getattr(m.__dict__.get("forward"), "func", None) in (lean._norm, lean._gated)
    ]
    assert len(spared) == 2 * 3 + 1
    seen = []
    for keeps_less in (True, False):
        if not keeps_less:
            lean.restore(model)
        model.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        seen.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    close(seen[0][0], seen[1][0], tolerance)
    assert any("norm" in key for key in seen[0][1])
    for key, grad in seen[1][1].items():
        close(seen[0][1][key], grad, tolerance)


def test_what_keeps_less_can_be_differentiated_twice() -> None:
    draw = torch.Generator().manual_seed(0)
    x, w, u = (torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in ((3, 5), (5,), (3, 5)))
    norm: Any = lambda x, w: lean._RootMeanSquare.apply(x, w, 1e-6)  # noqa: E731
    for function, given in ((norm, (x, w)), (lean._Gated.apply, (x, u))):
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


def test_a_gradient_penalty_is_the_same_in_a_model_that_keeps_less() -> None:
    model = tiny_llama().double()
    model.set_attn_implementation("eager")  # torch's fused attention on the CPU has no second derivative
    LoRA(rank=2).parametrize(model)
    stir(model)
    factors, seen = [p for p in model.parameters() if p.requires_grad], []
    for keeps_less in (True, False):
        if not keeps_less:
            lean.restore(model)
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        grads = torch.autograd.grad(loss, factors, create_graph=True)
        seen.append(torch.autograd.grad(sum(g.square().sum() for g in grads), factors))
    for ours, theirs in zip(*seen, strict=True):
        close(ours, theirs, 1e-4)  # transformers' own norm rounds to float32


def test_a_second_adapter_leaves_trained_what_the_first_one_trains() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    LoRA(rank=1, where="0", train="1.*").parametrize(model)
    LoRA(rank=1, where="2").parametrize(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = {f"{n}.plait.lora.{f}" for n in (0, 2) for f in "AB"}
    assert trained == {"1.weight", "1.bias"} | factors


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "model", "says"),
    [
        (LoRA(rank=9), nn.Sequential(nn.Linear(6, 5)), "LoRA.rank is 9, but '0' has a (5, 6) weight: use at most 5."),
        (SORSA(rank=9), nn.Sequential(nn.Linear(6, 5)), "SORSA.rank is 9, but '0' has a (5, 6) weight: use at most 5."),
        (LoRA(rank=1), nn.Sequential(nn.Tanh()), "LoRA finds no layer that it is defined for in Sequential: drop it."),
        (
            LoRA(rank=1),
            nn.Sequential(nn.Linear(2, 2, device="meta")),
            "is on the meta device: load the model's weights",
        ),
        (LoRA(rank=1), nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), "rewrites its own weight (max_norm)"),
        (LoRA(rank=1), mark_fresh(nn.Sequential(nn.Linear(2, 2)), "0"), "finds only layers that are new with the task"),
        (
            SORSA(rank=2, where="lm_head"),
            tiny_llama(True),
            "rewrites the weight of 'lm_head', which another layer shares",
        ),
        (WeightCompander(where="lm_head"), tiny_llama(True), "which another layer shares: leave it out of where"),
        (WeightCompander(bound=1.0), nn.Sequential(nn.Linear(2, 2)), "WeightCompander.bound must be greater than 1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(method: Method, model: nn.Module, says: str) -> None:
    before = sorted(model.state_dict())
    with pytest.raises(BadInput) as caught:
        method.parametrize(model)
    assert says in str(caught.value)
    assert sorted(model.state_dict()) == before


# -- each method against its equation ----------------------------------------------------------------------------------
def test_lora_is_its_equation() -> None:
    before, model = adapted("Linear", [LoRA(rank=2, alpha=3.0)])
    low = stir(model)[0].plait.lora
    W, b, x = before[0].weight, before[0].bias, inputs_of("Linear")
    expected = torch.einsum("oi,...i->...o", W, x) + b
    for r in range(2):
        expected = expected + 3.0 / 2 * (x * low.A[r]).sum(-1, keepdim=True) * low.B[:, r]
    close(model(x), expected, 1e-5)
    assert LoRA(rank=4, alpha=3.0, scaling="rank-stabilized").scale == 1.5


def test_dora_is_its_equation_and_its_gradient_holds_the_norm_constant() -> None:
    before, model = adapted("Linear", DoRA(rank=2, alpha=3.0), torch.float64)
    layer, x = stir(model)[0], inputs_of("Linear", torch.float64)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.plait.lora.A, layer.plait.lora.B))
    m = layer.plait.magnitude.magnitude.detach().clone().requires_grad_()
    V = before[0].weight.detach() + 1.5 * B @ A
    constant = torch.stack([row.square().sum().sqrt() for row in V]).detach()
    W = m[:, None] * V / constant[:, None]
    model(x).square().sum().backward()
    F.linear(x, W, before[0].bias).square().sum().backward()
    ours = (layer.plait.lora.A.grad, layer.plait.lora.B.grad, layer.plait.magnitude.magnitude.grad)
    for a, b in zip(ours, (A.grad, B.grad, m.grad), strict=True):
        close(a, b, 1e-11)


def test_dora_leaves_rows_of_zeros_at_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[0] = 0.0
    for method in DoRA(rank=1):
        method.parametrize(model)
    output = model(torch.ones(1, 3))
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_sorsa_takes_the_largest_triplets_and_penalizes_the_distance_from_orthonormal() -> None:
    before, model = adapted("Linear", [SORSA(rank=2, strength=0.5)], torch.float64)
    W = before[0].weight.detach()
    U, S, V = torch.linalg.svd(W)
    held = model[0].plait.sorsa
    close(held.S.detach(), S[:2], 1e-12)
    close(((held.U * held.S) @ held.V).detach(), U[:, :2] @ torch.diag(S[:2]) @ V[:2], 1e-12)
    close(model[0].weight.detach(), U[:, 2:5] @ torch.diag(S[2:]) @ V[2:5], 1e-12)
    stir(model)
    eye = torch.eye(2, dtype=torch.float64)
    norms = [(held.U.T @ held.U - eye).square().sum().sqrt(), (held.V @ held.V.T - eye).square().sum().sqrt()]
    assert SORSA(rank=2, strength=0.5).penalty(model, Now()).item() == pytest.approx(0.5 * sum(norms).item(), rel=1e-6)


def test_sorsa_agrees_with_the_authors_code() -> None:
    """Made by Gunale0926/SORSA, sorsalib/src/sorsa/layer.py: its Linear(7, 5, r=3) with alpha None, the same weight and
    input, sorsa_init(), then S, B and A times 1.1, 1.2 and 0.9 (nothing depends on the signs of the vectors): the
    output, and calc_ortho. That is the mean over the two factors, ours is their sum: a factor of 2. Tolerance: 1e-5
    relative.
    """
    layer = nn.Linear(7, 5, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, 36).float().sin().view(5, 7))
    model = nn.Sequential(layer)
    method = SORSA(rank=3, strength=1.0)
    method.parametrize(model)
    held, x = layer.plait.sorsa, torch.arange(1, 15).float().cos().view(2, 7)
    with torch.no_grad():
        held.S.mul_(1.1)
        held.U.mul_(1.2)
        held.V.mul_(0.9)
    ours = [*model(x).flatten().tolist(), method.penalty(model, Now()).item() / 2]
    assert ours == pytest.approx(SORSA_REFERENCE, rel=1e-5, abs=1e-6)


SORSA_REFERENCE = [
    0.4588359,
    3.033335,
    4.1148405,
    3.1710401,
    0.666468,
    -2.4301658,
    -0.0041052,
    2.4239764,
    3.6589873,
    3.093061,
    0.5455959,
]


def test_sorsas_penalty_is_the_sum_over_adapters() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    method = SORSA(rank=2, strength=1.0)
    method.parametrize(model)
    stir(model)
    alone = [held.unorthonormality().item() for _, _, held in attached(model, SingularTriplets)]
    assert len(alone) == 2
    assert min(alone) > 0
    assert method.penalty(model, Now()).item() == pytest.approx(sum(alone), rel=1e-6)


def test_sorsas_penalty_has_no_gradient_in_rounding_noise() -> None:
    _, model = adapted("Linear", [SORSA(rank=2, strength=1.0)])
    method = SORSA(rank=2, strength=1.0)
    method.penalty(model, Now()).backward()
    held = model[0].plait.sorsa
    assert all(p.grad is None or not p.grad.any() for p in held.parameters())
    with torch.no_grad():
        held.U.mul_(1.01)
    method.penalty(model, Now()).backward()
    assert held.U.grad.norm() > 0.1


@pytest.mark.parametrize("over", ["neurons", "weights"])
def test_mixout_is_its_equation_forward_and_backward(over: Any) -> None:
    before, model = adapted("Linear", [Mixout(p=0.7, over=over)])
    layer, origin = model[0], before[0].weight.detach()
    with torch.no_grad():
        layer.weight.add_(torch.randn(5, 6, generator=torch.Generator().manual_seed(5)))
    W = layer.weight.detach().clone().requires_grad_()
    torch.manual_seed(7)
    output = model(inputs_of("Linear"))
    torch.manual_seed(7)
    M = torch.empty(5, 6).bernoulli_(0.3) if over == "weights" else torch.empty(6).bernoulli_(0.3).expand(5, 6)
    assert 0 < M.sum() < 30
    mixed = ((1 - M) * origin + M * W - 0.7 * origin) / 0.3
    expected = F.linear(inputs_of("Linear"), mixed, before[0].bias)
    close(output, expected, 1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    close(layer.weight.grad, W.grad, 1e-5)


def test_mixout_draws_a_convolutions_inputs_whole_and_has_the_weight_as_its_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False))
    Mixout(p=0.5).parametrize(model)
    mixture = model[0].plait.mixout
    with torch.no_grad():
        model[0].weight.add_(1.0)
    weight = matrix(model[0], model[0].weight.detach())
    moved = [mixture.sample(weight) != mixture.origin for _ in range(20)]
    assert all(len({bool(v) for v in m[:, c * 4 : c * 4 + 4].flatten()}) == 1 for m in moved for c in range(3))
    mean = torch.stack([mixture.sample(weight) for _ in range(4000)]).mean(0)
    close(mean, weight, 0.05)


def test_mixout_of_nothing_is_plain_training() -> None:
    before, model = adapted("Linear", [Mixout(p=0.0)])
    assert torch.equal(model.train()(inputs_of("Linear")), before(inputs_of("Linear")))


def test_mixout_forward_agrees_with_the_authors_code_and_its_backward_with_their_equation() -> None:
    """bloodwass/mixout, mixout.py, run on input = sin(1..12) as [3, 4], target = cos(1..12), p = 0.5, with the mask
    [1, 0, 0, 1] that torch.manual_seed(30) drew there; its gradient of the sum is the mask, without 1 / (1 - p), which
    is what ours is after multiplication by 0.5. Tolerance: 1e-6.
    """
    w, u = torch.arange(1, 13).float().sin().view(3, 4), torch.arange(1, 13).float().cos().view(3, 4)
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0])
    from plait.parametrize.mixout import Mixture

    mixture = Mixture(u, 0.5, 1, "neurons")
    seed = next(s for s in range(500) if torch.equal(drawn(s), mask))
    weight = w.clone().requires_grad_()
    torch.manual_seed(seed)
    output = mixture.sample(weight)
    output.sum().backward()
    assert output.flatten().tolist() == pytest.approx(MIXOUT_REFERENCE, abs=1e-6)
    assert torch.equal(weight.grad * 0.5, mask.expand(3, 4))


MIXOUT_REFERENCE = [
    1.1426396,
    -0.4161468,
    -0.9899925,
    -0.8599614,
    -2.2015109,
    0.9601703,
    0.7539023,
    2.1242166,
    1.7353673,
    -0.8390715,
    0.0044257,
    -1.9169998,
]


def drawn(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.empty(4).bernoulli_(0.5)


def test_weight_compander_is_its_equation() -> None:
    before, model = adapted("Linear", [WeightCompander(bound=3.0, expansion=2.5)], torch.float64)
    held, v = model[0].plait.weightcompander, model[0].weight
    a, b = held.log_a.exp(), held.log_b.exp()
    largest = before[0].weight.abs().max()
    assert (a * torch.pi / 2).item() == pytest.approx(3.0 * largest.item())
    assert (a / b).item() == pytest.approx(2.5)
    expected = torch.empty_like(v)
    for i in range(5):
        for j in range(6):
            expected[i, j] = a * torch.atan(v[i, j] / b)
    close(dense_weight(model[0]), before[0].weight, 1e-12)
    close(expected.detach(), before[0].weight, 1e-12)
    with torch.no_grad():
        v.mul_(1e6)
    assert (dense_weight(model[0]).abs() <= a * torch.pi / 2).all()
    model(inputs_of("Linear", torch.float64)).sum().backward()
    assert held.log_a.grad is not None
    fixed = nn.Sequential(nn.Linear(2, 2))
    WeightCompander(learn=False).parametrize(fixed)
    assert not any(p.requires_grad for n, p in fixed.named_parameters() if "log" in n)


def test_names_of_stacked_parametrizations() -> None:
    _, model = adapted("Linear", [LoRA(rank=1), LoRA(rank=2), Magnitude()])
    assert [type(p) for p in stack(model[0])] == [LowRank, LowRank, RowNorms]
    assert list(model[0].plait) == ["lora", "lora_2", "magnitude"]
    close(row_norms(torch.tensor([[3.0, 4.0]])), torch.tensor([5.0]), 1e-6)
    assert isinstance(
        next(iter(attached(adapted("Linear", [SORSA(rank=1)])[1], SingularTriplets)))[2], SingularTriplets
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_norms_and_gates_agree_with_the_formulas(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.math import threads as rows
    from plait.parametrize import lean

    monkeypatch.setattr(lean, "KERNEL_FROM", 1)
    monkeypatch.setattr(rows.torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    gate, up, slope = (3 * torch.randn(600, 1000, generator=generator) for _ in range(3))
    gate[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -0.0])
    weight = torch.randn(1000, generator=generator)
    gate.requires_grad_(True)
    up.requires_grad_(True)
    assert lean.kernels_for(gate, up) is not None
    assert lean.kernels_for(gate.double()) is None
    norm = lean._RootMeanSquare.apply(up, weight, 1e-5)  # type: ignore[no-untyped-call]
    product = lean._Gated.apply(gate, up)  # type: ignore[no-untyped-call]
    ours = [norm, *torch.autograd.grad(norm, up, slope), product, *torch.autograd.grad(product, (gate, up), slope)]
    g, u, w = gate.detach().double().requires_grad_(True), up.detach().double().requires_grad_(True), weight.double()
    norm = w * u * (u.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    product = g * torch.sigmoid(g) * u
    theirs = [
        norm, *torch.autograd.grad(norm, u, slope.double()),
        product, *torch.autograd.grad(product, (g, u), slope.double()),
    ]  # fmt: skip
    for mine, exact in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.double(), exact, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(lean._normed(up, weight, 1e-5), ours[0])


def test_an_adapter_without_a_pattern_fits_an_encoder() -> None:
    """Its tables of positions and token types have fewer rows than usual ranks, and are no projections."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config)
    LoRA(rank=8).parametrize(model)
    adapted = {name.partition(".plait")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert "encoder.layer.0.attention.self.query" in adapted
    assert not any("embeddings" in name for name in adapted)
