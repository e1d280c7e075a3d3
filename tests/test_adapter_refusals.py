"""What no adapter can work on is refused in one sentence: every adapter of the catalogue is tried."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from laws import made
from plait import catalogue
from plait.errors import BadInput, NonFinite
from plait.initialize.weight_svd import PiSSA
from plait.method import Method, Now
from plait.parametrize.base import Parametrize, stack
from plait.parametrize.folding import fold
from plait.parametrize.low_rank import LoRA
from plait.parametrize.singular import SORSA
from plait.parametrize.sparse_smallest import SaRA
from plait.step.adam import AdamW
from plait.train import train
from test_laws import CASES, Case

X, CLASSES = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 6


class Net(nn.Module):
    """Two linear maps, of which one may be the other's, and layers that are none."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.recurrent = nn.LayerNorm(6), nn.GRU(6, 6, batch_first=True)
        if tied:
            self.head.weight = self.body.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, 6] -> [n, 6]."""
        return self.head(self.norm(self.recurrent(self.body(inputs))[0]).to(inputs.dtype))


FIELDS: dict[str, dict[str, Any]] = {
    "ia3": {"outputs": "body", "inputs": "head"},
    "triadaptlora": {"most": 9},
    "compacter": {"where": "body|head"},
    "snella": {"rank": 2},
}


def fields_of(key: str) -> set[str]:
    """The names of a catalogue entry's fields."""
    return set(inspect.signature(catalogue.find(key).make).parameters)


def adapter(key: str, **fields: Any) -> list[Method]:
    """The methods of an adapter, small enough for the net."""
    small = {"rank": 2} if "rank" in fields_of(key) else {}
    tried = {name: value for name, value in CASES.get(key, Case()).fields.items() if name != "where"}
    return made(key, **(small | tried | FIELDS.get(key, {}) | fields))


def attaches(key: str) -> bool:
    """Whether all that an entry stands for attaches parametrizations to linear maps."""
    entry = catalogue.find(key)
    return (
        "parametrize" in entry.places
        and not getattr(entry.make, "tunes", False)
        and all(isinstance(m, Parametrize) for m in adapter(key))
    )


ADAPTERS = [key for key in catalogue.load() if attaches(key)]
RANKED = [key for key in ADAPTERS if "rank" in fields_of(key)]
UNBOUND = {
    "compacter": "its rank is that of Kronecker factors of what it adds behind a layer, whose sides bound it",
    "spt": "it gives a low-rank update only to layers where that holds fewer numbers than single entries",
}
"""Adapters whose rank no side of a matrix bounds, and why."""
every_adapter = pytest.mark.parametrize("key", ADAPTERS)
every_ranked = pytest.mark.parametrize("key", RANKED)


def refusal(methods: list[Method], model: nn.Module, inputs: Tensor = X) -> str:
    """The sentence; nothing may be left of the attempt."""
    before = {name: t.clone() for name, t in model.state_dict().items() if not t.is_meta}
    with pytest.raises(BadInput) as caught:
        train(model, (inputs, CLASSES), methods=methods, steps=1, batch_size=8, device="cpu", validation=(X, CLASSES))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())
    said = str(caught.value)
    assert said.endswith(".")
    assert "\n" not in said
    return said


def test_there_are_adapters() -> None:
    assert {"lora", "dora", "sorsa", "ia3", "bone"} <= set(ADAPTERS)
    assert {"lora", "dora", "sorsa", "bone"} <= set(RANKED)


@every_ranked
def test_a_rank_above_the_matrixs(key: str) -> None:
    if key in UNBOUND:
        return
    methods = adapter(key, rank=8)
    said = refusal(methods, Net())
    assert said in {
        f"{type(m).__name__}.rank is 8, but 'body' has {shape}: use at most 6."
        for m in methods
        for shape in ("a (6, 6) weight", "6 inputs", "a 6 x 6 matrix")
    }


@every_ranked
@pytest.mark.parametrize(("rank", "rule"), [(0, "at least 1"), (-2, "at least 1"), (1.5, "a whole number")])
def test_a_rank_that_is_none(key: str, rank: Any, rule: str) -> None:
    with pytest.raises(BadInput) as caught:
        adapter(key, rank=rank)
    title = str(caught.value).partition(".")[0]
    assert title in {catalogue.find(key).name, "LoRA"}
    assert str(caught.value) == f"{title}.rank must be {rule}, not {rank!r}."


@every_adapter
@pytest.mark.parametrize(("where", "kind"), [("norm", "LayerNorm"), ("recurrent", "GRU"), ("body|norm", "LayerNorm")])
def test_a_target_that_is_no_linear_map(key: str, where: str, kind: str) -> None:
    fields: dict[str, Any] = {"outputs": where, "inputs": where} if key == "ia3" else {"where": where}
    methods = adapter(key, **fields)
    named = where.rpartition("|")[2]
    assert refusal(methods, Net()) == (
        f"{type(methods[0]).__name__} is not defined for the {kind} '{named}': name layers such as body, head in where."
    )


@every_adapter
def test_a_weight_that_two_layers_share(key: str) -> None:
    """An adapter that rewrites the weight is refused; one that adds to it trains each of the two, and folding parts
    them.
    """
    methods = adapter(key)
    try:
        for m in methods:
            if isinstance(m, Parametrize):
                m.check(Net(tied=True), methods)
    except BadInput:
        title = type(methods[0]).__name__
        assert refusal(methods, Net(tied=True)) in {
            f"{title} rewrites the weight of 'body', which another layer shares: leave it out of where, or untie the "
            "two.",
            f"{title} would train the weight of 'body', which 'head' shares, for the one alone: leave it out of where.",
        }
        return
    torch.manual_seed(0)
    model = Net(tied=True)
    run = train(
        model,
        (X, CLASSES),
        methods=[*methods, *made("adamw", lr=1e-2)],
        steps=2,
        batch_size=8,
        device="cpu",
        validation=(X, CLASSES),
    )
    output = run.model.eval()(X)
    if key == "compacter":  # which acts on what layers put out
        return
    plain = made("fold")[0].finish(run.model, run.now)
    assert not any(stack(layer) for layer in plain.modules())
    torch.testing.assert_close(plain(X), output, rtol=1e-4, atol=1e-5)


@every_adapter
def test_a_base_on_the_meta_device(key: str) -> None:
    assert refusal(adapter(key), Net().to("meta")) == (
        "'body.weight' is on the meta device: load the model's weights before training."
    )
    model = Net()
    model.norm.to("meta")
    assert (
        refusal(adapter(key), model) == "'norm.weight' is on the meta device: load the model's weights before training."
    )
    first = adapter(key)[0]
    with pytest.raises(BadInput) as caught:
        first.parametrize(Net().to("meta"))
    title = type(first).__name__
    assert str(caught.value) == (
        f"the weight of 'body' is on the meta device: load the model's weights before {title}."
    )


@every_adapter
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(key: str, odd: float) -> None:
    """What decomposes it says so; what does not attaches, and training says it."""
    model = Net()
    with torch.no_grad():
        model.body.weight[1, 2] = odd
    said = ""
    try:
        for method in adapter(key):
            method.parametrize(model)
    except (BadInput, NonFinite) as refused:
        said = str(refused)
    assert bool(said) == (not any(stack(layer) for layer in model.modules()))
    if said:
        assert (
            "'body' that is NaN or infinite: mend what it comes" in said or "that is to be quantized holds NaN" in said
        )
        assert said.endswith(".")
        assert not any(stack(layer) for layer in model.modules())


@every_adapter
def test_layers_and_inputs_of_different_types(key: str) -> None:
    """What the model without the adapter, and the folded one, would not take is not converted in silence."""
    model = Net()
    model.body.to(torch.bfloat16)
    assert refused_after_attaching(key, model) == (
        "the layer 'body' is torch.bfloat16 and its input torch.float32: convert one of the two."
    )
    assert refused_after_attaching(key, Net(), X.double()) == (
        "the layer 'body' is torch.float32 and its input torch.float64: convert one of the two."
    )
    assert refused_after_attaching(key, Net(), X.long()) == (
        "the layer 'body' is torch.float32 and its input torch.int64: convert one of the two."
    )


def refused_after_attaching(key: str, model: nn.Module, inputs: Tensor = X) -> str:
    with pytest.raises(BadInput) as caught:
        train(
            model, (inputs, CLASSES), methods=adapter(key), steps=1, batch_size=8, device="cpu", validation=(X, CLASSES)
        )
    return str(caught.value)


@every_adapter
@pytest.mark.parametrize(("dtype", "cure"), [
    (torch.int8, ": {} needs a floating-point weight."),
    (torch.complex64, ": {} needs a floating-point weight."),
    (torch.float8_e4m3fn, ": convert it to 16 or more bits before {}."),
])  # fmt: skip
def test_weights_of_a_type_that_no_update_can_be_added_to(key: str, dtype: torch.dtype, cure: str) -> None:
    model = Net()
    model.body.weight = nn.Parameter(model.body.weight.data.to(dtype), requires_grad=False)
    methods = adapter(key)
    with pytest.raises(BadInput) as caught:
        train(model, (X, CLASSES), methods=methods, steps=1, batch_size=8, device="cpu", validation=(X, CLASSES))
    assert str(caught.value) == f"the weight of 'body' is {dtype}" + cure.format(type(methods[0]).__name__)


def test_a_weight_and_a_bias_of_different_types() -> None:
    for key in ADAPTERS:
        model = Net()
        model.body.bias = nn.Parameter(model.body.bias.data.bfloat16())
        assert refused_after_attaching(key, model) == (
            "the layer 'body' has a weight of torch.float32 and a bias of torch.bfloat16: convert one of the two."
        )


@pytest.mark.filterwarnings("ignore:no gradient ever reached 'recurrent")  # which this model does not call
def test_a_model_of_two_precisions_trains_where_the_model_itself_converts() -> None:
    class Mixed(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            """[n, 6] -> [n, 6]."""
            return self.head(self.norm(self.body(inputs)).bfloat16()).float()

    for key in ADAPTERS:
        torch.manual_seed(0)
        model = Mixed()
        model.head.to(torch.bfloat16)
        run = train(
            model, (X, CLASSES), methods=adapter(key), steps=2, batch_size=8, device="cpu", validation=(X, CLASSES)
        )
        assert run.model.head.weight.dtype == torch.bfloat16
        assert all(torch.isfinite(p).all() for p in run.model.parameters())


STARTS: dict[str, str] = {
    key: "lora-xs" if key == "lora-sb" else "lora"
    for key in catalogue.load()
    if key in ("eva", "pissa", "olora", "lora-ga", "lora-one", "lora-sb", "lora-init-ab")
}


@pytest.mark.parametrize("key", STARTS)
def test_a_start_of_adapters_whose_layers_share_a_weight(key: str) -> None:
    """What moves part of a weight, or needs its gradient, is refused; the others start each of the two."""
    methods = [*made(STARTS[key], rank=2), *made(key)]
    title = type(methods[-1]).__name__
    said = {
        "pissa": "PiSSA would move part of the weight that 'body' shares with 'head': leave one of them out of the "
        "adapters with where.",
        "lora-ga": "LoRAGA would move part of the weight that 'body' shares with 'head': leave one of them out of the "
        "adapters with where.",
        "olora": "OLoRA would move part of the weight that 'body' shares with 'head': leave one of them out of the "
        "adapters with where.",
        "lora-one": f"{title} needs the gradient of 'body' alone, but 'head' shares its weight: leave it out of the "
        "adapters with where.",
        "lora-sb": f"{title} needs the gradient of 'body' alone, but 'head' shares its weight: leave it out of the "
        "adapters with where.",
    }
    if key in said:
        with pytest.raises(BadInput) as caught:
            train(
                Net(tied=True),
                (X, CLASSES),
                methods=methods,
                steps=1,
                batch_size=8,
                device="cpu",
                validation=(X, CLASSES),
            )
        assert str(caught.value) == said[key]
    else:
        run = train(
            Net(tied=True), (X, CLASSES), methods=methods, steps=1, batch_size=8, device="cpu", validation=(X, CLASSES)
        )
        assert torch.isfinite(torch.tensor(run.history[0]["objective"]))


@pytest.mark.parametrize("methods", [[LoRA(rank=1, where="idle")], [SaRA(where="idle")]])
def test_adapters_of_layers_that_no_pass_uses(methods: list[Any]) -> None:
    model = nn.ModuleDict({"idle": nn.Linear(4, 4), "used": nn.Linear(4, 2)})
    model.forward = model["used"].forward  # type: ignore[method-assign]
    data = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    with pytest.raises(BadInput, match="nothing that is trained has an effect on the loss"):
        train(model, data, methods=[*methods, AdamW(lr=1e-2)], steps=2)


@pytest.mark.parametrize(
    "make", [parametrizations.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)]
)
def test_a_weight_that_is_made_of_others_in_each_pass(make: Any) -> None:
    """Adapters stand on it and train, and nothing is written into it: it would be lost without a word."""
    model, x = nn.Sequential(make(nn.Linear(8, 8)), nn.Linear(8, 3)), torch.randn(4, 8)
    LoRA(rank=2).parametrize(model)
    model(x).sum().backward()
    assert model[0].plait.lora.B.grad.any()
    for write in (fold, lambda model: PiSSA().initialize(model, Now()), SORSA(rank=2).parametrize):
        before = model(x)
        with pytest.raises(BadInput, match="is made of others in each pass"):
            write(model)
        assert torch.equal(model(x), before)


def test_a_layer_that_has_no_shape_yet() -> None:
    with pytest.raises(BadInput, match="'0' has no shape before its first input: run the model once before LoRA"):
        LoRA(rank=2).parametrize(nn.Sequential(nn.LazyLinear(3)))
