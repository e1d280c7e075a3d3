"""LoGAH: the graph of a network, the weights that a hypernetwork writes for it, and networks that start from them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait import AdamW, BadInput, DoRA, LoRA, Now, train
from plait.initialize.hypernetwork import KINDS, Family, Graph, Hypernetwork, LoGAH, graph_of
from plait.initialize.weight_svd import PiSSA
from plait.method import Method
from plait.parametrize.low_rank_sparse import SLTrain
from plait.tensors import write_tensors


class Residual(nn.Module):
    """first -> (up -> down) beside the identity -> norm -> head; a convolution and an embedding join at first."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(7, width), nn.Conv1d(width, width, 3, padding=1, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.words(tokens).transpose(1, 2)).mean(2)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


TOKENS = torch.randint(0, 7, (12, 5), generator=torch.Generator().manual_seed(0))


def small(most: int = 32, **sizes: int) -> Hypernetwork:
    torch.manual_seed(0)
    return Hypernetwork(most, **({"hidden": 16, "rank": 4} | sizes))


def saved(model: nn.Module, folder: Path) -> str:
    write_tensors(folder / "hypernetwork.safetensors", model.state_dict())
    return str(folder / "hypernetwork.safetensors")


def test_the_graph_knows_how_data_flows() -> None:
    model = Residual()
    graph = graph_of(model, model(TOKENS))
    place = {name: n for n, name in enumerate(graph.names)}
    assert set(place) == {name for name, _ in model.named_parameters()}

    def far(one: str, other: str) -> int:
        return int(graph.distances[place[one], place[other]])

    assert far("words.weight", "words.weight") == 1
    assert far("words.weight", "conv.weight") == far("conv.weight", "up.weight") == far("up.weight", "down.weight") == 2
    assert far("conv.weight", "norm.weight") == 2  # beside the branch
    assert far("conv.weight", "head.bias") == 3
    assert far("up.weight", "norm.weight") == 3
    assert far("down.weight", "up.weight") == far("head.weight", "conv.weight") == 0
    assert far("head.weight", "head.bias") == far("head.bias", "head.weight") == 1
    assert graph.shapes[place["words.weight"]].tolist() == [4, 7]  # as a map from one-hot tokens
    assert graph.shapes[place["conv.weight"]].tolist() == [4, 12]
    kinds = {name: KINDS[int(graph.kinds[n])] for name, n in place.items()}
    assert (kinds["conv.weight"], kinds["norm.weight"], kinds["head.bias"]) == ("convolution", "gain", "bias")


def slow(net: Hypernetwork, graph: Graph) -> dict[str, Tensor]:
    """The definition, a node, a pair and a head at a time."""
    n, hidden = len(graph.names), net.norm.normalized_shape[0]
    rows = []
    for i in range(n):
        sizes = torch.tensor([math.log2(int(size)) / 8 for size in graph.shapes[i]])
        into = sum(int(graph.distances[j, i]) == 2 for j in range(n))
        out = sum(int(graph.distances[i, j]) == 2 for j in range(n))
        deep = max(int(graph.distances[j, i]) for j in range(n))
        parts = [net.kind.weight[graph.kinds[i]], net.slot.weight[graph.slots[i]], net.size(sizes)]
        rows.append(sum(parts) + net.into.weight[into] + net.out.weight[out] + net.depth.weight[deep])
    x = torch.stack(rows)
    for layer in net.layers:
        q, k, v = layer.triple(layer.before(x)).chunk(3, 1)
        width, joined = hidden // layer.heads, torch.zeros(n, hidden)
        for head in range(layer.heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(n):
                scores = [
                    q[i, part] @ k[j, part] / math.sqrt(width)
                    + net.edge.weight[graph.distances[i, j], head]
                    + net.edge.weight[graph.distances[j, i] + 33, head]
                    for j in range(n)
                ]
                share = torch.stack(scores).softmax(0)
                joined[i, part] = sum(share[j] * v[j, part] for j in range(n))
        x = x + layer.out(joined)
        x = x + layer.down(nn.functional.gelu(layer.up(layer.after(x))))
    made = {}
    for i, name in enumerate(graph.names):
        both = net.mlp(net.norm(x[i])).relu().view(2, net.rank, net.rank)
        a, b = (both[side] @ net.decoder.weight.T for side in range(2))
        out, into = graph.shapes[i].tolist()
        weight = torch.stack([torch.stack([(a[:, r] * b[:, c]).sum() for c in range(into)]) for r in range(out)])
        kind = KINDS[int(graph.kinds[i])]
        if kind == "gain":
            made[name] = 2 / (1 + (-weight / 2).exp())
        elif kind == "bias":
            made[name] = (weight / 5).tanh()
        else:
            made[name] = weight / weight.std() * graph.spreads[i]
    return made


@torch.no_grad()
def test_the_weights_are_those_of_the_definition() -> None:
    with torch.enable_grad():
        model = Residual()
        graph = graph_of(model, model(TOKENS))
    net = small()
    fast, oracle = net(graph), slow(net, graph)
    for name, weight in oracle.items():
        torch.testing.assert_close(fast[name], weight, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    shaped = net.weights(model, graph)
    assert torch.equal(shaped["words.weight"], fast["words.weight"].T)
    assert torch.equal(shaped["conv.weight"].flatten(1), fast["conv.weight"])
    assert all(shaped[name].shape == p.shape for name, p in model.named_parameters())
    assert float(shaped["up.weight"].std()) == pytest.approx(float(model.up.weight.std()), rel=1e-3)
    assert int(torch.linalg.matrix_rank(small(rank=2)(graph)["down.weight"].double(), rtol=1e-4)) <= 2


def llama(width: int, depth: int, tied: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 4, "vocab_size": 20}
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=depth, initializer_range=0.2, tie_word_embeddings=tied, **sizes)
    )


def texts() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 20, (24, 6), generator=torch.Generator().manual_seed(0))
    return tokens, (tokens + 1) % 20


def family(seed: int = 0) -> Family:
    torch.manual_seed(seed)
    models = [llama(width, depth) for width, depth in ((8, 1), (16, 1), (8, 2), (16, 2))]
    return Family(Hypernetwork(most=40, hidden=16, rank=4), models, texts()[0])


def test_a_hypernetwork_is_trained_on_a_family_and_starts_networks_outside_of_it(tmp_path: Path) -> None:
    made = family()
    before = [p.detach().clone() for model in made.models for p in model.parameters()]
    run = train(made, texts(), methods=[AdamW(lr=5e-3)], steps=60)
    assert run.history[-1]["objective"] < 0.9 * run.history[0]["objective"]
    after = [p for model in made.models for p in model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    source = saved(run.model, tmp_path)
    model, fresh = llama(12, 1), llama(12, 1)
    losses = []
    for net, methods in ((model, [LoGAH(source=source)]), (fresh, [])):
        losses.append(train(net, texts(), methods=[*methods, AdamW(lr=1e-9)], steps=1).history[0]["objective"])
    assert losses[0] < losses[1]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = llama(16, 2, tied=False)
    train(untied, texts(), methods=[LoGAH(source=source), LoRA(rank=2)], steps=1)


def test_every_part_of_the_hypernetwork_is_trained() -> None:
    made = family().train()
    loss = sum(made(texts()[0]).logits.square().mean() for _ in range(8))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.parameters())


class Stopped(Exception):
    pass


def test_an_interrupted_training_of_it_resumes_bitwise(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None = None) -> dict[str, Tensor]:
        def on_step(now: Now) -> None:
            if now.step == stop:
                raise Stopped

        kept: dict[str, Any] = {"steps": 6, "batch_size": 8, "save_every": 2, "folder": folder, "on_step": on_step}
        return train(family(), texts(), methods=[AdamW()], **kept).model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop=3)
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_frozen_parts_stay_frozen_and_where_chooses(tmp_path: Path) -> None:
    source, data = saved(small(), tmp_path), (TOKENS, TOKENS[:, 0] % 3)
    model, plain = Residual(), None
    plain = copy.deepcopy(model)
    model.words.weight.requires_grad_(False)
    train(model, data, methods=[LoGAH(source=source, where="up|words"), AdamW(lr=1e-30)], steps=1)
    assert not model.words.weight.requires_grad
    assert not torch.equal(model.words.weight, plain.words.weight)
    assert torch.equal(model.down.weight, plain.down.weight)
    half = Residual().bfloat16()
    train(half, data, methods=[LoGAH(source=source)], steps=1)
    assert half.up.weight.dtype == torch.bfloat16


def test_adapters_that_hold_nothing_of_the_weights_leave_the_start_as_it_is(tmp_path: Path) -> None:
    source, data = saved(small(), tmp_path), (TOKENS, TOKENS[:, 0] % 3)
    torch.manual_seed(1)
    model = Residual()
    alone, adapted, before = model, copy.deepcopy(model), copy.deepcopy(model)
    train(alone, data, methods=[LoGAH(source=source), AdamW(lr=1e-12)], steps=1)
    train(adapted, data, methods=[LoRA(rank=2), LoGAH(source=source), PiSSA(), AdamW(lr=1e-12)], steps=1)
    torch.testing.assert_close(adapted(TOKENS), alone(TOKENS))
    refused: list[tuple[list[Method], str]] = [
        (DoRA(rank=2), "LoGAH writes the weight of 'words', and DoRA was made of the one before: drop one, or part"),
        ([LoRA(rank=2), PiSSA()], "of which a start took a part before: put LoGAH before that start"),
        ([SLTrain(rank=2, density=0.3)], "that is not in use beside SLTrain: drop one, or part them by where"),
    ]
    for adapters, says in refused:
        with pytest.raises(BadInput, match=says):
            train(copy.deepcopy(before), data, methods=[*adapters, LoGAH(source=source)], steps=1)
    train(before, data, methods=[*DoRA(rank=2, where="up"), LoGAH(source=source, where="down")], steps=1)


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path) -> None:
    data = (TOKENS, TOKENS[:, 0] % 3)
    write_tensors(tmp_path / "other.safetensors", Residual().state_dict())
    with pytest.raises(BadInput, match="not the weights of a hypernetwork"):
        train(Residual(), data, methods=[LoGAH(source=str(tmp_path / "other.safetensors"))], steps=1)
    with pytest.raises(BadInput, match=r"a side of 12, and this hypernetwork writes at most 8"):
        train(Residual(), data, methods=[LoGAH(source=saved(small(8), tmp_path))], steps=1)
    with pytest.raises(BadInput, match="at least one network"):
        Family(small(), [], TOKENS)
    with pytest.raises(BadInput, match="has gradients"):
        graph_of(Residual(), torch.zeros(2))
