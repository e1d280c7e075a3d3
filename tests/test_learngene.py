"""TLEG and SWS: networks made of genes, and networks of other depths that start from them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait import SGD, AdamW, BadInput, DoRA, LoRA, Now, train
from plait.initialize.learngene import SWS, TLEG, Learngene, line_through, sequences, stages_of
from plait.initialize.weight_svd import PiSSA
from plait.method import Method
from plait.parametrize.quantized import Quantize
from plait.tensors import write_tensors


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(self.norm(x))))


class Deep(nn.Module):
    def __init__(self, depth: int, outputs: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.blocks = nn.Linear(4, 6), nn.ModuleList([Block() for _ in range(depth)])
        self.head = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def saved(model: nn.Module, folder: Path) -> str:
    write_tensors(folder / "model.safetensors", model.state_dict())
    return str(folder)


@pytest.mark.parametrize("method", [TLEG, SWS])
def test_a_quantized_net_starts_from_genes_and_is_rounded_once(method: type[Learngene], tmp_path: Path) -> None:
    source, made, x = Deep(2, seed=5), Deep(2), data()[0]
    expected, quantize = copy.deepcopy(source), Quantize(bits=4, group=2, where="up|down")
    quantize.parametrize(made)
    method(source=saved(source, tmp_path)).initialize(made, Now())
    quantize.parametrize(expected)
    torch.testing.assert_close(made(x), expected(x))


def test_the_genes_are_trained_as_the_equation_says() -> None:
    """theta_l = B + (l - 1) / L A, by functional calls on a plain network, with gradients of B and A alone."""
    depth, x, y = 4, *data()
    model = Deep(depth)
    frozen = copy.deepcopy(model)
    names = [name for name, _ in frozen.blocks[0].named_parameters()]
    first, last = (dict(frozen.blocks[at].named_parameters()) for at in (0, depth - 1))
    base = {name: first[name].detach().clone().requires_grad_() for name in names}
    slope = {
        name: (last[name].detach().clone() if last[name].dim() > 1 else torch.zeros_like(last[name])).requires_grad_()
        for name in names
    }
    rest = {n: p.detach().clone().requires_grad_() for n, p in frozen.named_parameters() if not n.startswith("blocks")}
    trained = [*rest.values(), *base.values(), *slope.values()]

    def expanded() -> dict[str, Tensor]:
        lines = {f"blocks.{at}.{name}": base[name] + at / depth * slope[name] for at in range(depth) for name in names}
        return rest | lines

    for _ in range(5):
        loss = F.cross_entropy(torch.func.functional_call(frozen, expanded(), (x,)), y)
        grads = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for weight, grad in zip(trained, grads, strict=True):
                weight -= 0.3 * grad
    run = train(model, (x, y), methods=[TLEG(), SGD(lr=0.3, momentum=0.0)], steps=5, batch_size=24)
    for name, value in expanded().items():
        torch.testing.assert_close(run.model.get_parameter(name).detach(), value.detach(), rtol=1e-4, atol=1e-6)
    assert [name for name, _ in run.model.named_parameters()] == [name for name, _ in Deep(depth).named_parameters()]
    assert type(model.blocks[1].up) is nn.Linear


def test_while_it_trains_only_the_genes_are_parameters() -> None:
    model = Deep(5)
    count = sum(p.numel() for p in model.blocks[0].parameters())
    rest = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("blocks"))
    TLEG().parametrize(model)
    assert sum(p.numel() for p in model.parameters()) == rest + 2 * count
    assert "blocks.0.up.learngene.weight.slope" in dict(model.named_parameters())
    both = copy.deepcopy(model)
    with torch.no_grad():
        both.get_parameter("blocks.0.up.learngene.weight.slope").add_(1.0)
    torch.testing.assert_close(both.blocks[4].up.weight - model.blocks[4].up.weight, torch.full((12, 6), 0.8))
    other = Deep(5, seed=1)
    SWS(stages=(2, 3)).parametrize(other)
    assert sum(p.numel() for p in other.parameters()) == rest + 2 * count


def test_a_fit_begins_at_the_nearest_line() -> None:
    values = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    base, slope = line_through(values)
    design = torch.stack([torch.ones(5), torch.arange(5) / 5], 1).double()
    solved = torch.linalg.lstsq(design, values.double().flatten(1)).solution
    torch.testing.assert_close(torch.stack([base, slope]).flatten(1), solved)
    model, plain = Deep(3), Deep(3)
    TLEG(fit=True).parametrize(model)
    TLEG(fit=True).finish(model, Now())
    base, slope = line_through(torch.stack([block.up.weight.detach() for block in plain.blocks]))
    torch.testing.assert_close(model.blocks[2].up.weight.detach().double(), base + 2 / 3 * slope, rtol=0, atol=1e-6)


def test_any_depth_starts_from_the_genes_as_in_the_authors_code(tmp_path: Path) -> None:
    """AlphaXia/TLEG, gene_tranfer(None, cp, 7) on normals drawn with seed 5, in the order below; sums, to 1e-4."""
    shapes = {"qkv": (12, 4), "proj": (4, 4), "fc1": (8, 4), "fc2": (4, 8), "norm1": (4,), "norm2": (4,)}
    generator = torch.Generator().manual_seed(5)
    genes: dict[str, dict[str, Tensor]] = {}
    for name, shape in shapes.items():
        for leaf, size in (("weight", shape), ("bias", shape[:1])):
            genes[f"{name}.{leaf}"] = {kind: torch.randn(size, generator=generator) for kind in ("base", "slope")}

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, shape in shapes.items():
                made = nn.Linear(shape[1], shape[0]) if len(shape) > 1 else nn.LayerNorm(shape[0])
                self.add_module(name, made)

    source = {f"blocks.{at}.{n}": g["base"] + at / 5 * g["slope"] for at in range(5) for n, g in genes.items()}
    write_tensors(tmp_path / "genes.safetensors", source)
    model = nn.ModuleDict({"blocks": nn.ModuleList([Layer() for _ in range(7)])})
    TLEG(source=str(tmp_path / "genes.safetensors")).initialize(model, Now())
    places = ["0.qkv.weight", "3.fc1.bias", "6.fc2.weight", "6.norm2.weight"]
    sums = [float(model.get_parameter(f"blocks.{name}").detach().double().sum()) for name in places]
    assert sums == pytest.approx([-2.50778, -0.97904, -0.73025, 1.31645], abs=1e-4)


def test_stages_expand_as_in_the_authors_example(tmp_path: Path) -> None:
    """AlphaXia/SWS, gene_tranfer_1 with --layers-source 0,0,0,1,1,1,2,2,3,3,4,4 for 12 layers, as in its README."""
    source = Deep(16)
    SWS(stages=(3, 3, 4, 3, 3)).parametrize(source)
    source = SWS(stages=(3, 3, 4, 3, 3)).finish(source, Now())
    model = Deep(12, outputs=5, seed=1)
    head = model.head.weight.detach().clone()
    SWS(source=saved(source, tmp_path)).initialize(model, Now())
    firsts = [0, 3, 6, 10, 13]
    for layer, stage in enumerate([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]):
        expected = source.blocks[firsts[stage]].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.blocks[layer].state_dict().items())
    assert torch.equal(model.embed.weight, source.embed.weight)
    assert torch.equal(model.head.weight, head)  # another task's
    SWS(source=str(tmp_path), stages=(8, 1, 1, 1, 1)).initialize(model, Now())
    assert torch.equal(model.blocks[7].up.weight, source.blocks[0].up.weight)


def test_shared_layers_get_the_sum_of_their_gradients() -> None:
    x, y = data()
    model, plain = Deep(3), Deep(3)
    with torch.no_grad():
        plain.blocks[2].load_state_dict(plain.blocks[1].state_dict())
    F.cross_entropy(plain(x), y).backward()
    pairs = zip(plain.blocks[1].named_parameters(), plain.blocks[2].parameters(), strict=True)
    expected = {name: p.detach() - 0.3 * (p.grad + other.grad) for (name, p), other in pairs}
    run = train(model, (x, y), methods=[SWS(stages=(1, 2)), SGD(lr=0.3, momentum=0.0)], steps=1, batch_size=24)
    for at in (1, 2):
        for name, value in expected.items():
            torch.testing.assert_close(run.model.blocks[at].get_parameter(name).detach(), value)
    assert run.model.blocks[1].up.weight is not run.model.blocks[2].up.weight
    assert stages_of([dict(block.named_parameters()) for block in run.model.blocks]) == [1, 2]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", [TLEG(), SWS(stages=(2, 2))], ids=["tleg", "sws"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_resumes_bitwise(method: Method, dtype: torch.dtype, tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None = None) -> dict[str, Tensor]:
        def on_step(now: Now) -> None:
            if now.step == stop:
                raise Stopped

        kept: dict[str, Any] = {"steps": 6, "batch_size": 8, "save_every": 2, "folder": folder, "on_step": on_step}
        x, y = data()
        return train(Deep(4).to(dtype), (x.to(dtype), y), methods=[method, AdamW(lr=0.01)], **kept).model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop=3)
    resumed = run(tmp_path / "cut")
    assert list(whole) == list(resumed) == list(Deep(4).state_dict())
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_of_another_depth_starts_from_a_trained_one(tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama(depth: int) -> nn.Module:
        torch.manual_seed(depth)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 20}
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, tie_word_embeddings=tied, **sizes))

    tokens = torch.randint(0, 20, (12, 6), generator=torch.Generator().manual_seed(0))
    source = train(llama(3), (tokens, tokens.roll(-1, 1)), methods=[TLEG(), AdamW(lr=0.01)], steps=4).model
    model = llama(6)
    run = train(
        model, (tokens, tokens.roll(-1, 1)), methods=[TLEG(source=saved(source, tmp_path)), LoRA(rank=2)], steps=1
    )
    ours, theirs = (m.model.layers for m in (model, source))
    torch.testing.assert_close(ours[2].mlp.up_proj.weight, theirs[1].mlp.up_proj.weight, rtol=0, atol=1e-6)
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert bool(torch.isfinite(run.now.objective))


def test_the_order_of_layers_is_their_number_and_lists_can_be_named() -> None:
    shapes = {f"a.{n}.w": (2, 2) for n in (10, 2, 1)} | {f"b.{n}.w": (3, 3) for n in range(2)}
    assert sequences(shapes)["a"] == (["a.1", "a.2", "a.10"], ["w"])
    assert list(sequences(shapes, "b")) == ["b"]


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path) -> None:
    given = data()
    source = saved(Deep(3), tmp_path)
    cases: list[tuple[nn.Module, list[Method], str]] = [
        (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), [TLEG()], "no list of layers that are alike"),
        (Deep(3), [TLEG(), LoRA(rank=2)], "LoRA acts on weights of their own"),
        (Deep(3), [SWS()], "which add up to 3"),
        (Deep(3), [SWS(stages=(2, 2))], r"'blocks' has 3 layers"),
        (Deep(2), [SWS(source=source)], "has 3 stages, and 'blocks' 2 layers"),
        (Deep(4), [SWS(source=source, stages=(2, 2))], "4 layers for 3 stages"),
        (Deep(4), [*DoRA(rank=2), TLEG(source=source)], r"and DoRA was made of the one before: drop one, or part them"),
        (
            Deep(4),
            [LoRA(rank=2), PiSSA(), SWS(source=source)],
            r"a start took a part before: put SWS before that start",
        ),
        (Deep(4), [TLEG(source=str(tmp_path / "none"))], "there is no file"),
    ]
    for model, methods, says in cases:
        with pytest.raises(BadInput, match=says):
            train(model, given, methods=methods, steps=1)
    wide = nn.ModuleDict({"blocks": nn.ModuleList([Block(5) for _ in range(3)])})
    with pytest.raises(BadInput, match="the same layers"):
        TLEG(source=source).check(wide, [])
    assert issubclass(TLEG, Learngene)
