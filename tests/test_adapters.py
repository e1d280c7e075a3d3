"""Several adapters on one base: each alone, mixed in a batch, removed, swapped under torch.compile, and beside peft."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import plait
from plait import catalogue
from plait.adapters import Adapters
from plait.errors import BadInput
from plait.initialize.base import Start
from plait.initialize.weight_svd import PiSSA
from plait.integrations.peft import load_adapter, save_adapter, write_update
from plait.method import Now
from plait.parametrize.base import attached, stack
from plait.parametrize.core import LoRAXS
from plait.parametrize.folding import fold
from plait.parametrize.freeze import mark_fresh
from plait.parametrize.low_rank import DoRA, LoRA, LowRank
from plait.parametrize.quantized import Quantize, forget_originals
from plait.parametrize.singular import SORSA
from plait.parametrize.update import update_of
from test_parametrize import METHODS
from test_parametrize import stir as stirred
from test_peft_files import ALL, IDS, EveryKind, attach, every_kind, peft_reads, stir, tiny_llama

STARTS = [
    key
    for key, entry in catalogue.load().items()
    if isinstance(entry.make, type)
    and issubclass(entry.make, Start)
    and entry.make.starts is LowRank
    and key != "loftq"
]
"""All starts of LoRA, but for the one that is of a quantized base."""
TOKENS = torch.randint(0, 64, (4, 7), generator=torch.Generator().manual_seed(3))


def trained(base: nn.Module, methods: Any, seed: int = 1) -> nn.Module:
    """A model that something was done to, which differs from seed to seed."""
    model = attach(copy.deepcopy(base), methods)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


@torch.no_grad()
def out(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    made = model.eval()(inputs)
    return getattr(made, "logits", made)


# -- each alone --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [every_kind, tiny_llama], ids=["every kind of layer", "llama"])
def test_each_adapter_gives_the_outputs_of_the_model_it_came_from(make: Any, tmp_path: Path) -> None:
    base = make()
    inputs, where = (IDS, ALL) if isinstance(base, EveryKind) else (TOKENS, "q_proj|down_proj|embed_tokens")
    plain, names = out(base, inputs), list(base.state_dict())
    one = trained(base, LoRA(rank=2, where=where))
    two = trained(base, [LoRA(rank=3, alpha=5.0, where=where)], seed=2)
    save_adapter(two, tmp_path)
    adapters = Adapters(base, room=1, rank=1)  # both make the tables grow
    assert adapters.add("one", one) == 0
    torch.testing.assert_close(out(base, inputs), plain, rtol=0, atol=0)
    assert adapters.add("two", tmp_path) == 0
    assert (adapters.names, adapters.active) == (["one", "two"], None)
    for name, model in (("one", one), ("two", two), (None, make())):
        adapters.switch(name)
        assert adapters.active == name
        torch.testing.assert_close(out(base, inputs), out(model, inputs), rtol=1e-5, atol=1e-6)
    assert list(base.state_dict()) == names
    adapters.switch("two")
    adapters.remove("one")
    torch.testing.assert_close(out(base, inputs), out(two, inputs), rtol=1e-5, atol=1e-6)
    adapters.remove("two")
    torch.testing.assert_close(out(base, inputs), plain, rtol=0, atol=0)
    assert all("plait" not in part._modules and "forward" not in part.__dict__ for part in base.modules())


def test_adapters_with_different_starts_live_on_one_untouched_base(tmp_path: Path) -> None:
    base = tiny_llama()
    weights = copy.deepcopy(base.state_dict())
    starts = {key: [LoRA(rank=2), catalogue.find(key).make()] for key in STARTS}
    starts |= {"plain": [LoRA(rank=2)], "sorsa": [SORSA(rank=2)], "lora-sb": [LoRAXS(rank=2), plait.LoRASB()]}
    models = {}
    for name, methods in starts.items():
        models[name] = plait.train(
            copy.deepcopy(base),
            (TOKENS, TOKENS),
            lambda output, target, now: nn.functional.cross_entropy(output.transpose(1, 2), target, reduction="none"),
            [*methods, plait.AdamW(lr=1e-2)],
            steps=3,
            batch_size=2,
            call=lambda model, inputs: model(input_ids=inputs).logits,
        ).model
    adapters = Adapters(base)
    for name, model in models.items():
        assert adapters.add(name, model) == 0
    for name, model in models.items():
        adapters.switch(name)
        expected = out(model, TOKENS)
        torch.testing.assert_close(out(base, TOKENS), expected, rtol=1e-4, atol=1e-5)
        adapters.save(name, tmp_path / name)
        torch.testing.assert_close(
            out(peft_reads(tiny_llama(), tmp_path / name), TOKENS), expected, rtol=1e-4, atol=1e-5
        )
    assert len({out(model, TOKENS).sum().item() for model in models.values()}) == len(starts)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, weights[name])
    names = list(models)
    for four in (names[:4], names[4:8]):
        with adapters.mixed(four):
            mixed = out(base, TOKENS)
        for row, name in enumerate(four):
            torch.testing.assert_close(mixed[row], out(models[name], TOKENS)[row], rtol=1e-4, atol=1e-5)


def test_what_has_no_low_rank_is_cut_off_where_asked_and_the_error_is_returned(tmp_path: Path) -> None:
    base = every_kind()
    model = trained(base, DoRA(rank=2, where="flat|plane"))
    save_adapter(model, tmp_path)
    adapters = Adapters(base)
    for source in (model, tmp_path):
        with pytest.raises(BadInput, match=r"the adapter of '.*' is DoRA, which is no low-rank update: give a rank"):
            adapters.add("dora", source)
    assert adapters.names == []
    from_model, from_files = adapters.add("a", model, rank=3), adapters.add("b", tmp_path, rank=3)
    assert from_model == pytest.approx(from_files, rel=1e-4)
    assert 0 < from_model < 1
    assert adapters.add("whole", model, rank=12) == pytest.approx(0, abs=1e-6)
    adapters.switch("whole")
    torch.testing.assert_close(out(base, IDS), out(model, IDS), rtol=1e-4, atol=1e-5)
    bare = stir(copy.deepcopy(every_kind()).requires_grad_(True))  # all of it was trained, biases too
    assert adapters.add("bare", bare, rank=12) == pytest.approx(0, abs=1e-6)
    with adapters.mixed(["bare", None, "whole", "bare", "a"]):
        mixed = out(base, IDS)
    torch.testing.assert_close(mixed[[0, 3]], out(bare, IDS)[[0, 3]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[2], out(model, IDS)[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], out(every_kind(), IDS)[1], rtol=1e-5, atol=1e-6)


# -- mixed in one batch ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [every_kind, tiny_llama], ids=["every kind of layer", "llama"])
def test_each_row_has_its_own_adapter(make: Any) -> None:
    base = make()
    inputs, where = (IDS, ALL) if isinstance(base, EveryKind) else (TOKENS.repeat(2, 1)[:5], ".*proj|embed_tokens")
    models = {name: trained(base, LoRA(rank=n, where=where), n) for n, name in enumerate(("a", "b"), 2)}
    alone = {None: out(base, inputs)} | {name: out(model, inputs) for name, model in models.items()}
    adapters = Adapters(base)
    for name, model in models.items():
        adapters.add(name, model)
    names = ["b", None, "a", "a", "b"]
    with adapters.mixed(names):
        mixed = out(base, inputs)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out(base, inputs), alone[None], rtol=0, atol=0)
    with adapters.mixed(["a"]):  # one name for five rows: a row of the batch each five times over
        torch.testing.assert_close(out(base, inputs), alone["a"], rtol=1e-5, atol=1e-5)
    if isinstance(base, EveryKind):
        with adapters.mixed(["a", "b"]):  # layers that no row reaches, as experts of a mixture
            assert base.flat(torch.zeros(0, 12)).shape == (0, 12)
            assert base.words(IDS[:0]).shape == (0, *IDS.shape[1:], 12)


class Mixture(nn.Module):
    """Tokens [n, t, 8] that are flattened, each of which one expert sees, or (of one expert) all."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.mlps = nn.Linear(8, experts), nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 8)
        chosen, output = self.gate(flat).argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.mlps):
            mine = (chosen == number).nonzero().flatten()
            output = output.index_copy(0, mine, expert(flat[mine]))
        return output.view(x.shape)


@pytest.mark.parametrize("experts", [2, 1])
def test_tokens_are_mixed_only_where_each_is_known_to_be_of_its_row(experts: int) -> None:
    base = Mixture(experts)
    models = {name: trained(base, LoRA(rank=2, where=r"mlps\.\d"), n) for n, name in enumerate(("a", "b"))}
    adapters = Adapters(base)
    for name, model in models.items():
        adapters.add(name, model)
    for seed in range(20):  # among them passes in which an expert sees just as many tokens as there are rows
        x = torch.randn(2, 1 + seed % 4, 8, generator=torch.Generator().manual_seed(seed))
        if experts > 1 or x.shape[1] > 1:
            with adapters.mixed(["a", "b"]), pytest.raises(BadInput, match="vectors, which need not be the 2 rows"):
                base(x)
        if experts == 1:
            with adapters.mixed(["a", "a"]):
                torch.testing.assert_close(out(base, x), out(models["a"], x))
            with adapters.mixed(["a", "b"], flat=True):
                mixed = out(base, x)
            for row, model in enumerate(models.values()):
                torch.testing.assert_close(mixed[row], out(model, x)[row])


class Branches(nn.Module):
    """Tokens [n, t, 8] of which one layer sees those that a gate likes, and another the rest; a head on the first."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.gate = how, nn.Linear(8, 1)
        self.left, self.right, self.second, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 8)
        likes = self.gate(flat)[:, 0] > 0
        left, right = (side.nonzero().flatten() for side in (likes, ~likes))
        output = torch.zeros_like(flat)
        if self.how == "mask":
            output[likes], output[~likes] = self.second(self.left(flat[likes]).relu()), self.right(flat[~likes])
        elif self.how == "places":
            output = output.index_add(0, left, self.second(self.left(flat.index_select(0, left)).relu()))
            output.index_copy_(0, right, self.right(flat[right]))
        else:
            order = torch.cat([left, right])
            one, other = flat[order].split([len(left), len(right)])
            output = torch.cat([self.second(self.left(one).relu()), self.right(other)])[order.argsort()]
        last = output.view(x.shape)[torch.arange(len(x)), [-1] * len(x)]
        return self.head(last)


@pytest.mark.parametrize("where", ["left", "second", "right", "head"])
@pytest.mark.parametrize("how", ["mask", "places", "sort"])
def test_rows_that_an_index_picked_are_not_mixed_whatever_their_layers_are_called(how: str, where: str) -> None:
    """As many as the batch has they may be, of layers that are called nothing and stand in no list."""
    base = Branches(how)
    models = {name: trained(base, LoRA(rank=2, where=where), n) for n, name in enumerate(("a", "b"))}
    adapters = Adapters(base)
    for name, model in models.items():
        adapters.add(name, model)
    seen = 0
    for seed in range(20):
        x = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(seed))
        with adapters.mixed(["a", "b"]):  # what is picked outside the model is the batch
            assert base.head(x[:, 0][[1, 0]]).shape == base.second(x.view(4, 8)[:2]).shape == (2, 8)
        left = int((base.gate(x.view(-1, 8)) > 0).sum())
        seen += left == 2
        if where == "head":
            with adapters.mixed(["a", "b"]):
                mixed = out(base, x)
            for row, model in enumerate(models.values()):
                torch.testing.assert_close(mixed[row], out(model, x)[row])
        elif left in (1, 2, 3):
            with adapters.mixed(["a", "b"]), pytest.raises(BadInput, match="vectors, which need not be the 2 rows"):
                base(x)
    assert seen > 3


def test_rows_of_beams_follow_their_batch_row_in_generation() -> None:
    base = tiny_llama()
    models = {name: trained(base, LoRA(rank=2), n) for n, name in enumerate(("a", "b"))}
    tokens = TOKENS.clamp(min=3)  # neither padding nor an end
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    alone = [models[name].generate(tokens[row : row + 1], **settings) for row, name in enumerate(("a", "b"))]
    adapters = Adapters(base)
    for name, model in models.items():
        adapters.add(name, model)
    with adapters.mixed(["a", "b"]):
        made = base.generate(tokens[:2], **settings)
    assert torch.equal(made, torch.cat(alone))


def test_heads_that_adapters_bring_along_are_switched_and_mixed_with_them(tmp_path: Path) -> None:
    base = mark_fresh(every_kind(), "head")
    models = {name: trained(base, LoRA(rank=2, where="flat"), n) for n, name in enumerate(("a", "b"))}
    adapters, plain, weights = Adapters(base), out(base, IDS), list(base.state_dict())
    for name, model in models.items():
        adapters.add(name, model)
        assert (model.head.weight - base.head.weight).abs().max() > 0.05
    for name, model in models.items():
        adapters.switch(name)
        torch.testing.assert_close(out(base, IDS), out(model, IDS), rtol=1e-5, atol=1e-6)
    adapters.save("a", tmp_path)
    theirs = peft_reads(every_kind(), tmp_path)
    torch.testing.assert_close(out(theirs, IDS), out(models["a"], IDS), rtol=1e-5, atol=1e-6)
    with adapters.mixed(["a", "b", None, "b", "a"]):
        mixed = out(base, IDS)
    for row, model in enumerate([models["a"], models["b"], every_kind(), models["b"], models["a"]]):
        torch.testing.assert_close(mixed[row], out(model, IDS)[row], rtol=1e-5, atol=1e-6)
    adapters.remove("a")
    adapters.switch("b")
    torch.testing.assert_close(out(base, IDS), out(models["b"], IDS), rtol=1e-5, atol=1e-6)
    again = every_kind()
    again.load_state_dict(fold(copy.deepcopy(base)).state_dict())  # with its head
    torch.testing.assert_close(out(again, IDS), out(models["b"], IDS), rtol=1e-5, atol=1e-6)
    adapters.remove("b")
    torch.testing.assert_close(out(base, IDS), plain, rtol=0, atol=0)
    assert list(base.state_dict()) == weights


def test_mixed_batches_agree_with_peft(tmp_path: Path) -> None:
    base = tiny_llama()
    adapters = Adapters(base)
    for seed, name in enumerate(("a", "b")):
        save_adapter(trained(tiny_llama(), LoRA(rank=2 + seed, where="q_proj|up_proj"), seed), tmp_path / name)
        adapters.add(name, tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"), adapter_name="a").eval()
        theirs.load_adapter(str(tmp_path / "b"), adapter_name="b")
    names = ["b", "__base__", "a", "b"]
    with torch.no_grad():
        expected = theirs(TOKENS, adapter_names=names).logits
    with adapters.mixed([None if name == "__base__" else name for name in names]):
        torch.testing.assert_close(out(base, TOKENS), expected, rtol=1e-5, atol=1e-5)


# -- swapped -----------------------------------------------------------------------------------------------------------
def test_compiled_code_runs_on_when_adapters_are_added_switched_swapped_and_mixed() -> None:
    base = tiny_llama()
    models = [trained(base, LoRA(rank=rank, where="q_proj|up_proj"), rank) for rank in (2, 4, 3, 1)]
    with torch.no_grad():
        models[3].model.layers[0].self_attn.q_proj.plait.lora.B.zero_()
    expected = [out(model, TOKENS) for model in models]
    adapters = Adapters(base, room=3, rank=4)
    adapters.add("a", models[0])
    torch._dynamo.reset()
    graphs: list[Any] = []

    def counted(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(base, backend=counted, fullgraph=True)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return compiled(input_ids=TOKENS, use_cache=False).logits

    logits()
    with adapters.mixed(["a", None, None, "a"]):
        logits()
    assert len(graphs) == 2  # one for all rows alike, one for rows of their own
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, number in (("a", 0), ("b", 1)):
            if name == "b":
                adapters.add("b", models[1])
            adapters.switch(name)
            torch.testing.assert_close(logits(), expected[number], rtol=1e-4, atol=1e-5)
        adapters.swap("b", models[2])
        torch.testing.assert_close(logits(), expected[2], rtol=1e-4, atol=1e-5)
        adapters.swap("b", models[3])
        torch.testing.assert_close(logits(), expected[3], rtol=1e-4, atol=1e-5)
        with adapters.mixed(["b", "a", None, "b"]):
            mixed = logits()
        for row, expectation in ((0, expected[3]), (1, expected[0]), (3, expected[3])):
            torch.testing.assert_close(mixed[row], expectation[row], rtol=1e-4, atol=1e-5)
        adapters.remove("b")
        torch.testing.assert_close(logits(), out(tiny_llama(), TOKENS), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2
    adapters.add("large", trained(tiny_llama(), LoRA(rank=6, where="q_proj")))  # the tables grow: compiled once more
    logits()
    assert len(graphs) == 3


@pytest.mark.parametrize("kind", ["bfloat16", "quantized"])
def test_other_bases_take_the_same_adapters(kind: str, tmp_path: Path) -> None:
    save_adapter(trained(tiny_llama(), LoRA(rank=2)), tmp_path / "a")
    save_adapter(trained(tiny_llama(), LoRA(rank=3), seed=2), tmp_path / "b")

    def base() -> nn.Module:
        model = tiny_llama()
        if kind == "bfloat16":
            return model.to(torch.bfloat16)
        plait.Quantize(bits=8).parametrize(model)
        return model

    shared = base()
    adapters = Adapters(shared)
    assert adapters.add("model", trained(tiny_llama(), LoRA(rank=2))) == 0  # in float32, as the files' were
    adapters.add("file", tmp_path / "a")
    said = []
    for name in ("model", "file"):
        adapters.switch(name)
        said.append(out(shared, TOKENS))
    assert torch.equal(*said)
    for name in ("a", "b"):
        adapters.add(name, tmp_path / name)
        adapters.switch(name)
        alone = out(load_adapter(base(), tmp_path / name), TOKENS)
        torch.testing.assert_close(out(shared, TOKENS), alone, rtol=2e-2, atol=2e-2 if kind == "bfloat16" else 1e-5)
    with adapters.mixed(["a", "b", "b", "b"]):
        torch.testing.assert_close(out(shared, TOKENS)[1:], alone[1:], rtol=2e-2, atol=2e-2)


def test_training_goes_on_from_the_active_adapter() -> None:
    base = every_kind()
    bare = stir(every_kind().requires_grad_(True))
    adapters = Adapters(base)
    adapters.add("bare", bare, rank=12)
    adapters.switch("bare")
    more = trained(base, LoRA(rank=1, where=ALL), seed=4)
    assert adapters.add("more", more) == 0
    adapters.switch("more")
    torch.testing.assert_close(out(base, IDS), out(more, IDS), rtol=1e-4, atol=1e-5)
    assert (out(base, IDS) - out(bare, IDS)).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:torch.compile with dynamic")
def test_compiled_heads_are_swapped_too() -> None:
    base = mark_fresh(every_kind(), "head")
    models = [trained(base, LoRA(rank=2, where=ALL), seed) for seed in range(3)]
    adapters = Adapters(base)
    adapters.add("a", models[0])
    adapters.add("b", models[1])
    torch._dynamo.reset()
    compiled = torch.compile(base, backend="eager", fullgraph=True)
    out(compiled, IDS)
    with adapters.mixed(["a", "b", None, "b", "a"]):
        out(compiled, IDS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        adapters.swap("b", models[2])
        adapters.switch("b")
        torch.testing.assert_close(out(compiled, IDS), out(models[2], IDS), rtol=1e-4, atol=1e-5)
        with adapters.mixed(["b", "a", None, "a", "b"]):
            mixed = out(compiled, IDS)
    torch.testing.assert_close(mixed[0], out(models[2], IDS)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], out(models[0], IDS)[1], rtol=1e-4, atol=1e-5)


# -- every adapter of the catalogue ------------------------------------------------------------------------------------
EXACT = ["lora", "rslora", "sorsa", "lora-xs", "svfit", "allora", "lora dropout", "lora twice", "triadaptlora"]
LOW_RANK = [*EXACT, "miss", "hydra", "lora + hydra", "dsee", "lora + dsee", "mixout + lora"]
NATIVE = ["dora", "sorsa + dora"]  # PEFT's files hold these as they are


@pytest.mark.parametrize("name", [name for name in METHODS if name != "mixout"])  # which draws in training alone
def test_peft_loads_what_any_adapter_has_learned_with_identical_outputs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 20))
    model, x = copy.deepcopy(base), torch.randn(6, 24)
    for method in METHODS[name]():
        method.parametrize(model)
    stirred(model).eval()
    if not all(part.linear for part in stack(model[0])):
        with pytest.raises(BadInput, match="no low-rank update can hold it"):
            update_of(model, base)
        return
    rank = None if name in [*LOW_RANK, *NATIVE] else 20
    update = update_of(model, base, rank)
    assert update.error < 1e-6
    assert not (update.lost and name in [*EXACT, *NATIVE])
    if name in LOW_RANK:
        assert update.factors["0"].rank <= 8
    write_update(update, model, tmp_path)
    expected = out(model, x)
    near = {"rtol": 0.0, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(out(peft_reads(copy.deepcopy(base), tmp_path), x), expected, **near)
    adapters = Adapters(base)
    assert adapters.add(name, model, rank=20) < 1e-6
    adapters.switch(name)
    torch.testing.assert_close(out(base, x), expected, **near)
    adapters.switch(None)
    assert (expected - out(base, x)).abs().max() > 1e-2
    if name in ("randlora", "snella", "output scale", "compander", "lora + spiel", "sara"):
        with pytest.raises(BadInput, match="is no low-rank update: give a rank"):
            update_of(model, base)


# -- refused -----------------------------------------------------------------------------------------------------------
def test_what_cannot_work_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    base = tiny_llama()
    adapters = Adapters(base)
    adapters.add("a", trained(base, LoRA(rank=2, where="q_proj")))
    adapters.switch("a")
    before = out(base, TOKENS)
    other = tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    foreign = trained(other, LoRA(rank=2))
    save_adapter(foreign, tmp_path)
    wide = nn.ModuleDict({"model": nn.Linear(3, 3)})
    cases = [
        (lambda: adapters.switch("b"), "there is no adapter 'b' (known: a)."),
        (lambda: adapters.add("a", foreign), "there is an adapter 'a' already: swap it, or choose another name."),
        (lambda: adapters.add("b", foreign), "was made for another base: 1 of"),
        (lambda: adapters.swap("a", tmp_path), "was made for another base: 1 of"),
        (lambda: adapters.add("b", tiny_llama()), "the model is the base: there is no adapter in it."),
        (lambda: adapters.add("b", wide), "another model"),
        (lambda: adapters.remove("b"), "there is no adapter 'b'"),
        (lambda: Adapters(base), "has an adapter of its own: fold it, or give the base"),
        (lambda: Adapters(tiny_llama(), rank=0), "has room for nothing"),
        (lambda: Adapters("llama"), "Adapters takes the base, a torch.nn.Module, not 'llama'."),
        (lambda: adapters.switch(["a"]), "['a'] is no name of an adapter"),
        (lambda: adapters.add("", foreign), "'' is no name of an adapter"),
        (lambda: adapters.add("b", None), "an adapter comes from a folder or from a trained model, not from None."),
        (lambda: adapters.add("b", foreign, rank=1.5), "rank is 1.5: give a whole number of at least 1."),
        (lambda: adapters.mixed("a").__enter__(), "`mixed` got 'a': give a list of names"),
        (lambda: adapters.mixed(3).__enter__(), "`mixed` got 3: give a list of names"),
        (lambda: adapters.swap(None, tmp_path), "None stands for the base alone, which cannot be swapped"),
        (lambda: adapters.remove(None), "None stands for the base alone, which cannot be removed"),
        (lambda: adapters.save(None, tmp_path), "None stands for the base alone, which cannot be saved"),
    ]
    for call, says in cases:
        with pytest.raises(BadInput) as caught:
            call()
        assert says in str(caught.value)
    with pytest.raises(BadInput, match=r"sees 4 rows where adapters were named for 3"), adapters.mixed(["a"] * 3):
        out(base, TOKENS)
    torch.testing.assert_close(out(base, TOKENS), before, rtol=0, atol=0)
    adapters.add("b", tmp_path, any_base=True)
    time_first = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4))
    with (
        pytest.raises(BadInput, match=r"rows cannot be mixed: '1' has the batch second"),
        Adapters(time_first).mixed([None]),
    ):
        raise AssertionError("mixed anyway")
    torch.testing.assert_close(out(fold(base), TOKENS), before, rtol=1e-5, atol=1e-6)
    with pytest.raises(BadInput, match="the base was folded, and the adapters are no longer on it"):
        adapters.switch("b")


def test_a_start_on_a_quantized_base_is_no_low_rank_update_of_the_plain_one() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64))
    model = copy.deepcopy(base)
    for part in (Quantize(), LoRA(rank=2)):
        part.parametrize(model)
    PiSSA().initialize(model, Now())
    forget_originals(model)
    adapters = Adapters(base)
    with pytest.raises(
        BadInput, match="the weight of '0' was quantized after a start took part of it, so that the base"
    ):
        adapters.add("a", model)
    assert 0 < adapters.add("a", model, rank=4) < 1


class Placed(nn.Module):
    """Tokens with a vector for each place, of the places once, [length, 8], or of each row's own, [n, length, 8]."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.each, self.token, self.place, self.out = each, nn.Embedding(9, 8), nn.Embedding(4, 8), nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1])
        if self.each:
            places = places.unsqueeze(0).expand(tokens.shape)
        return self.out((self.token(tokens) + self.place(places)).tanh())  # type: ignore[no-any-return]


def test_a_table_of_as_many_places_as_there_are_rows_is_not_taken_for_the_rows() -> None:
    tokens = torch.arange(16).view(4, 4) % 9
    for each in (True, False):
        torch.manual_seed(0)
        base = Placed(each)
        trained = copy.deepcopy(base)
        LoRA(rank=2, where="token|place|out").parametrize(trained)
        for _, _, part in attached(trained, LowRank):
            nn.init.normal_(part.B)
        adapters = Adapters(base)
        adapters.add("a", trained)
        plain = base(tokens)
        if not each:
            with pytest.raises(BadInput, match=r"^'place' sees what all rows share"), adapters.mixed(["a", None] * 2):
                base(tokens)
            continue
        with adapters.mixed(["a", None] * 2):
            mixed = base(tokens)
        torch.testing.assert_close(mixed[::2], trained(tokens)[::2])
        torch.testing.assert_close(mixed[1::2], plain[1::2])
