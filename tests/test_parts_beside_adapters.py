"""What stands beside adapters: norms whose outputs are changed in place, running statistics, biases that are shared."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from plait import AdamW, DoRA, LoRA, train
from plait.adapters import Adapters
from plait.errors import BadInput, NonFinite
from plait.initialize.weight_svd import PiSSA
from plait.integrations.peft import load_adapter, save_adapter
from plait.method import Now
from plait.parametrize.folding import fold
from plait.parametrize.sequential import Hydra
from plait.parametrize.singular import SORSA
from plait.parametrize.update import update_of

X = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(1))


def test_the_output_of_a_norm_may_be_changed_in_place() -> None:
    grads = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.RMSNorm(8, eps=1e-6), nn.ReLU(inplace=inplace), nn.Linear(8, 4))
        LoRA(rank=2).parametrize(model)
        nn.init.ones_(model[2].plait.lora.B)
        model(torch.randn(5, 8)).square().sum().backward()
        grads.append(model[2].plait.lora.A.grad)
    torch.testing.assert_close(*grads)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return train(net(), (X, Y), methods=[LoRA(rank=2), AdamW(lr=1e-2)], steps=20).model.eval()


@pytest.mark.parametrize("first", [True, False])
def test_what_an_adapter_brings_along_follows_eval_and_train(trained: nn.Module, first: bool) -> None:
    base = net().train(not first)
    adapters = Adapters(base)
    adapters.add("x", trained)
    adapters.switch("x")
    torch.testing.assert_close(base.eval()(X), trained(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["norm1|norm2", "self_attn", "linear1"])
def test_torchs_encoder_layer_reads_what_an_adapter_brings_along(part: str) -> None:
    """Its fast path, in eval mode without gradients, reads the weights of layers that it does not call."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    base = nn.Sequential(nn.Linear(8, 16), layer).eval()
    model = copy.deepcopy(base)
    LoRA(rank=2, where="0", train=part).parametrize(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    x, hooks = torch.randn(4, 5, 8), [len(m._forward_pre_hooks) for m in base.modules()]
    adapters = Adapters(base)
    adapters.add("x", model)
    adapters.switch("x")
    with torch.no_grad():
        torch.testing.assert_close(base(x), model(x), rtol=1e-5, atol=1e-5)
    adapters.remove("x")
    assert [len(m._forward_pre_hooks) for m in base.modules()] == hooks


def test_running_statistics_that_training_moved_are_saved_with_the_adapter(trained: nn.Module, tmp_path: Path) -> None:
    save_adapter(trained, tmp_path)
    torch.testing.assert_close(load_adapter(net(), tmp_path).eval()(X), trained(X), rtol=1e-4, atol=1e-5)
    theirs = PeftModel.from_pretrained(net(), tmp_path).eval()
    torch.testing.assert_close(theirs(X), trained(X), rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """Two layers of one weight and one bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.b(torch.tanh(self.a(x)))
        return output


def test_a_shared_bias_is_folded_into_each_of_its_layers() -> None:
    model = Shared()
    Hydra(rank=2).parametrize(model)
    x, draw = torch.randn(3, 6), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".plait." in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    expected = model(x)
    torch.testing.assert_close(fold(model)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [None, ["2", "3"]])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_peft_trained_are_loaded(bias: str, whole: list[str] | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8))
    targets = ["0"] if whole else ["0", "3"]
    config = LoraConfig(target_modules=targets, modules_to_save=whole, r=2, bias=bias)
    theirs = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(5, 8)
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), theirs(x), rtol=1e-5, atol=1e-5)
    adapters = Adapters(base)
    adapters.add("a", tmp_path)
    adapters.switch("a")
    torch.testing.assert_close(base(x), theirs(x), rtol=1e-5, atol=1e-5)


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max())


def test_biases_that_were_trained_beside_low_rank_factors_are_part_of_the_update(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(5, 8)
    for number, methods in enumerate(([LoRA(rank=2, train=".*bias")], DoRA(rank=2, train=".*bias"))):
        model = copy.deepcopy(base)
        for method in methods:
            method.parametrize(model)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        folder, rank = tmp_path / str(number), 8 if number else None
        with pytest.raises(BadInput, match="bias' is trained, and PEFT's files cannot hold it beside the adapter"):
            save_adapter(model, folder)
        save_adapter(model, folder, base=base, rank=rank)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        adapters = Adapters(copy.deepcopy(base))
        adapters.add("a", model, rank=rank)
        adapters.switch("a")
        assert max(far(one(x), model(x)) for one in (theirs, adapters.model)) < 1e-5 < far(base(x), model(x))
    with pytest.raises(BadInput, match="PEFT's DoRA cannot hold the trained bias of '0': give a rank"):
        save_adapter(model, tmp_path, base=base)


def test_an_adapter_on_weights_that_another_was_folded_into_is_an_update_of_the_base_before_both(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(5, 8)
    model = copy.deepcopy(base)
    for _ in range(2):
        LoRA(rank=1).parametrize(fold(model))
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.plait.lora.B.normal_(std=0.02)
    save_adapter(model, tmp_path, base=base)
    assert far(load_adapter(copy.deepcopy(base), tmp_path)(x), model(x)) < 1e-5 < far(base(x), model(x))
    adapters = Adapters(base)
    with pytest.raises(BadInput, match="the adapter of the model was made for another base"):
        adapters.add("second", model)
    adapters.add("second", model, any_base=True)  # alone, on a base that the first was not folded into
    adapters.switch("second")
    with torch.no_grad():
        model[0].weight.copy_(base[0].weight)
        model[2].weight.copy_(base[2].weight)
    assert far(base(x), model(x)) < 1e-5


@pytest.mark.parametrize("part", ["0", "3"])
def test_layers_trained_whole_beside_an_adapter_are_kept_whole(part: str, tmp_path: Path) -> None:
    """An embedding and a linear map, whose updates are of full rank: as a model, as files, and cut off when asked."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(24, 8), nn.Linear(8, 8))
    x = torch.randint(20, (64, 3))
    adapted = LoRA(rank=2, where="2", train=part)
    model = train(copy.deepcopy(base), (x, torch.randn(64, 8)), methods=[adapted, AdamW(lr=1e-2)], steps=5).model
    save_adapter(model, tmp_path)
    assert Adapters(copy.deepcopy(base)).add("cut", model, rank=2) > 0.1
    adapters = Adapters(base)
    assert adapters.add("model", model) == 0
    adapters.add("files", tmp_path)
    for name in ("model", "files"):
        adapters.switch(name)
        assert far(base(x), model(x)) < 1e-6
    adapters.switch(None)
    assert far(base(x), model(x)) > 1e-3


@pytest.mark.parametrize("part", ["0", "3", "4"], ids=["embedding", "norm", "head"])
def test_a_model_that_is_frozen_to_be_served_keeps_what_was_trained_whole(part: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    x = torch.randint(20, (64, 3))
    adapted = LoRA(rank=2, where="2", train=part)
    model = train(copy.deepcopy(base), (x, torch.randn(64, 8)), methods=[adapted, AdamW(lr=1e-2)], steps=5).model
    model.requires_grad_(False)
    save_adapter(model, tmp_path / "without")
    save_adapter(model, tmp_path / "with", base=base, rank=8)
    adapters = Adapters(copy.deepcopy(base))
    assert adapters.add("whole", model) == 0
    assert Adapters(copy.deepcopy(base)).add("cut", model, rank=8) < 1e-6
    assert (Adapters(copy.deepcopy(base)).add("cut", model, rank=2) > 0.1) == (part != "3")
    adapters.switch("whole")
    assert far(adapters.model(x), model(x)) < 1e-6
    for folder in ("without", "with"):
        assert far(load_adapter(copy.deepcopy(base), tmp_path / folder)(x), model(x)) < 1e-5


def test_a_weight_that_was_trained_under_its_adapter_is_no_low_rank_update_once_it_is_frozen() -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    model = copy.deepcopy(base)
    LoRA(rank=2, train="0.weight").parametrize(model)
    with torch.no_grad():
        model[0].weight += torch.randn(8, 8)
    model.requires_grad_(False)
    with pytest.raises(BadInput, match="is no low-rank update: give the base and a rank"):
        update_of(model)
    assert update_of(model, base, rank=2).error > 0.1


MOVED = {"pissa": [LoRA(rank=2, train="0.weight"), PiSSA()], "sorsa": [SORSA(rank=2, train="0.weight")]}


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize("kind", MOVED)
def test_so_it_is_where_a_start_had_taken_part_of_that_weight(kind: str, reloaded: bool, tmp_path: Path) -> None:
    """The start notes which weight it left: a residual cannot be compared with the base's own weight."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)

    def trained(change: bool) -> nn.Module:
        model = copy.deepcopy(base)
        for method in MOVED[kind]:
            method.parametrize(model)
        for method in MOVED[kind]:
            method.initialize(model, Now())
        with torch.no_grad():
            if change:
                model[0].weight += torch.randn(8, 8)
        if reloaded:
            state, model = model.state_dict(), copy.deepcopy(base)
            MOVED[kind][0].parametrize(model)
            model.load_state_dict(state)
        return model.requires_grad_(False)

    left, changed = trained(False), trained(True)
    assert update_of(left, base).factors["0"].rank == update_of(left).factors["0"].rank == 4
    assert update_of(left.to(torch.bfloat16)).factors["0"].rank == 4  # the same weight in less precision
    with pytest.raises(BadInput, match="is no low-rank update: give the base and a rank"):
        save_adapter(changed, tmp_path)
    with pytest.raises(BadInput, match="is no low-rank update: give a rank"):
        Adapters(copy.deepcopy(base)).add("mine", changed)
    save_adapter(changed, tmp_path, base=base, rank=8)
    assert far(load_adapter(copy.deepcopy(base), tmp_path)(x), changed(x)) < 1e-5


def test_a_base_loaded_under_a_start_is_what_the_start_leaves_from_then_on() -> None:
    torch.manual_seed(0)
    base, other = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    LoRA(rank=2).parametrize(model := copy.deepcopy(base))
    PiSSA().initialize(model, Now())
    model.load_state_dict(other.state_dict(), strict=False)
    assert update_of(model).factors["0"].rank == update_of(model, other).factors["0"].rank == 4


def test_an_update_that_is_not_finite_has_no_nearest_of_a_rank() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8))
    model = copy.deepcopy(base)
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(NonFinite, match="the update of '0' has a number that is NaN or infinite"):
        update_of(model, base, rank=2)


class Embedder(nn.Module):
    """A layer and a parameter beside it in one module, as a vision transformer's patches and its token."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.project = nn.Parameter(torch.zeros(8)), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) + self.token


def test_a_parameter_whose_module_holds_adapted_layers_is_refused(tmp_path: Path) -> None:
    base, x = nn.Sequential(Embedder(), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 6)

    def trained(where: str) -> nn.Module:
        model = copy.deepcopy(base)
        LoRA(rank=2, where=where, train="token").parametrize(model)
        with torch.no_grad():
            model[0].token += 1
        return model

    model = trained(".*")
    for write in (
        lambda: save_adapter(model, tmp_path),
        lambda: update_of(model, base),
        lambda: update_of(model, base, rank=2),
        lambda: Adapters(copy.deepcopy(base)).add("x", model),
    ):
        with pytest.raises(BadInput, match=r"'0.token' was trained, and .* not beside the adapter of '0.project' in"):
            write()
    alone = trained("2")
    save_adapter(alone, tmp_path)
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), alone(x))
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), alone(x))


def test_a_where_that_is_no_pattern_is_refused() -> None:
    with pytest.raises(BadInput, match=r"where is '\(', which is no regular expression"):
        LoRA(where="(").parametrize(nn.Sequential(nn.Linear(2, 2)))
