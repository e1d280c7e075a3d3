"""IA3, BitFit, freezing, OLoRA and LoRA+ beside peft and torch, on the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait import AdamW, LoRA, train
from plait.errors import BadInput
from plait.gradient.factor_rate import LoRAPlus
from plait.initialize.base import to_plain_lora
from plait.initialize.orthonormal import OLoRA
from plait.method import Method
from plait.models.small import llama_tiny
from plait.parametrize.base import attached
from plait.parametrize.folding import fold
from plait.parametrize.freeze import BitFit, Freeze, mark_fresh
from plait.parametrize.low_rank import LowRank
from plait.parametrize.scaling import IA3

X = torch.randn(48, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 5, (48,), generator=torch.Generator().manual_seed(1))
IDS = torch.randint(1, 60, (3, 8), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.value, self.fc2, self.head = nn.Linear(12, 9), nn.Linear(9, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.value(x).tanh()).tanh())


def attach(model: nn.Module, methods: list[Method]) -> nn.Module:
    for m in methods:
        m.parametrize(model)
    return model


def test_ia3_computes_what_peft_computes() -> None:
    from peft import IA3Config, get_peft_model

    theirs = get_peft_model(Net(), IA3Config(target_modules=["value", "fc2"], feedforward_modules=["fc2"]))
    ours = attach(Net(), IA3(outputs="value", inputs="fc2"))
    draw = torch.Generator().manual_seed(4)
    scales = [1 + 0.5 * torch.randn(9, generator=draw) for _ in range(2)]
    with torch.no_grad():
        for p, scale in zip([p for p in theirs.parameters() if p.requires_grad], scales, strict=True):
            p.copy_(scale.view_as(p))
        for p, scale in zip([p for p in ours.parameters() if p.requires_grad], scales, strict=True):
            p.copy_(scale)
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours(X), Net()(X), atol=1e-2)
    torch.testing.assert_close(fold(copy.deepcopy(ours))(X), ours(X), rtol=1e-5, atol=1e-6)


def test_ia3_finds_the_layers_of_a_llama() -> None:
    plain = llama_tiny(64)
    model = attach(copy.deepcopy(plain), IA3())
    trained = {
        name.rpartition(".plait")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained == {"k_proj", "v_proj", "down_proj"}
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-6)


def test_olora_starts_where_peft_starts() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=6, target_modules=["value", "fc2"], init_lora_weights="olora")
    theirs = get_peft_model(Net(), config)
    ours = attach(Net(), [LoRA(rank=3, alpha=6.0, where="value|fc2")])
    OLoRA().initialize(ours, None)  # type: ignore[arg-type]
    torch.testing.assert_close(ours(X), Net()(X), rtol=1e-5, atol=1e-6)
    for name, _, low in attached(ours, LowRank):
        layer: Any = theirs.base_model.model.get_submodule(name)
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        torch.testing.assert_close(low.B @ low.A, b @ a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(low.A.abs(), a.abs(), rtol=1e-5, atol=1e-6)  # signs of a QR are free
        torch.testing.assert_close(ours.get_submodule(name).weight, layer.base_layer.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to_plain_lora(ours)(X), Net()(X), rtol=1e-5, atol=1e-6)


def test_lora_plus_steps_as_pefts_optimizer_does() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    theirs = get_peft_model(Net(), LoraConfig(r=3, lora_alpha=6, target_modules=["value", "fc2"]))
    ours = attach(Net(), [LoRA(rank=3, alpha=6.0, where="value|fc2")])
    with torch.no_grad():
        for name, _, low in attached(ours, LowRank):
            low.A.copy_(theirs.base_model.model.get_submodule(name).lora_A.default.weight)
    rule = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0)
    for _ in range(5):
        rule.zero_grad()
        nn.functional.cross_entropy(theirs(X), Y).backward()
        rule.step()
    factors = {name: (low.A.detach().clone(), low.B.detach().clone()) for name, _, low in attached(ours, LowRank)}

    class Same(Method):
        """Start from those factors."""

        def initialize(self, model: nn.Module, now: Any) -> None:
            for name, _, low in attached(model, LowRank):
                low.set(*factors[name])

    methods = [
        LoRA(rank=3, alpha=6.0, where="value|fc2"),
        Same(),
        LoRAPlus(ratio=8.0),
        AdamW(lr=1e-2, weight_decay=0.0),
    ]
    trained = train(Net(), (X, Y), methods=methods, steps=5, batch_size=48).model
    for name, _, low in attached(trained, LowRank):
        layer: Any = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(low.A, layer.lora_A.default.weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(low.B, layer.lora_B.default.weight, rtol=1e-4, atol=1e-6)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_bitfit_trains_biases_and_what_is_new() -> None:
    assert trained_names(attach(Net(), [BitFit()])) == {"value.bias", "fc2.bias", "head.bias"}
    model = attach(mark_fresh(Net(), "head"), [BitFit()])
    assert trained_names(model) == {"value.bias", "fc2.bias", "head.bias", "head.weight"}


@pytest.mark.parametrize("method", [BitFit(), Freeze(where="0")], ids=["bitfit", "freeze"])
@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.Linear(4, 4, device="meta"), "'0.weight' is on the meta device: load the model's weights before "),
        (nn.LazyLinear(4), "'0.weight' has no shape before its first input: run the model once before "),
    ],
    ids=["meta", "lazy"],
)
def test_what_has_no_weights_yet_is_not_frozen(method: Freeze, layer: nn.Module, says: str) -> None:
    with pytest.raises(BadInput) as problem:
        method.parametrize(nn.Sequential(layer, nn.Linear(4, 2)))
    assert str(problem.value) == f"{says}{type(method).__name__}."


@pytest.mark.parametrize("first", [True, False])
def test_bitfit_stands_beside_an_adapter_in_any_order(first: bool) -> None:
    methods: list[Method] = [BitFit(), LoRA(rank=2, where="fc2")]
    names = trained_names(attach(Net(), methods if first else methods[::-1]))
    assert names == {"value.bias", "fc2.bias", "head.bias", "fc2.plait.lora.A", "fc2.plait.lora.B"}


def test_freezing_leaves_the_others_and_their_bits() -> None:
    model = train(Net(), (X, Y), methods=[Freeze(where="value|fc2", keep="fc2.bias"), AdamW(lr=0.1)], steps=2).model
    moved = {name for (name, p), q in zip(model.named_parameters(), Net().parameters(), strict=True) if not p.equal(q)}
    assert moved == {"fc2.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([Freeze()], "Freeze would freeze every weight: narrow where, or name in keep what is to be trained."),
        (
            [Freeze(where="value", keep="vlaue")],
            "Freeze.keep='vlaue' matches no weight of Net (did you mean 'value'?): change it, or drop it.",
        ),
        ([Freeze(where="value", keep="value")], "Freeze would freeze nothing: change where or keep, or drop it."),
        ([LoRAPlus()], "LoRAPlus steps the factors of LoRA adapters, but the model has none: add LoRA before it."),
        ([LoRA(rank=2), LoRAPlus(ratio=1.0)], "LoRAPlus does nothing while ratio is 1: change it, or drop LoRAPlus."),
    ],
)
def test_what_cannot_work_is_one_sentence(methods: list[Method], says: str) -> None:
    with pytest.raises(BadInput) as problem:
        train(Net(), (X, Y), methods=methods, steps=1)
    assert str(problem.value) == says
