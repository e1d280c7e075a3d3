"""plait's methods inside Lightning's Trainer."""

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from plait import AdamW, BadInput, Clip, Method, Now, method, train
from plait.finish.quantize import Requantize
from plait.initialize.sensitivity import SPT
from plait.initialize.weight_svd import PiSSA
from plait.integrations.lightning import PlaitCallback
from plait.method import Ask
from plait.parametrize.base import untouched_weight
from plait.parametrize.low_rank import LoRA
from plait.schedule import Linear

pytestmark = pytest.mark.filterwarnings("ignore")


def data() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    return inputs, (inputs.sum(1) > 0).long()


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, *methods: Method, batch_size: int = 6, **options: Any) -> tuple[Module, PlaitCallback]:
    module, callback = Module(), PlaitCallback(*methods)
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(default_root_dir=folder, callbacks=[callback], **quiet, **settings)
        trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=batch_size))
    return module, callback


@method
class Twice(Method):
    """Asks twice and keeps the second gradient."""

    calls = 2

    def gradient(self, ask: Ask) -> Ask:
        def asked(model: nn.Module, now: Now) -> torch.Tensor:
            ask(model, now)
            model.zero_grad()
            return ask(model, now)

        return asked


@method
class Shrink(Method):
    """0.05 |w|^2."""

    def penalty(self, model: nn.Module, now: Now) -> torch.Tensor:
        return 0.05 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def test_only_the_adapters_move(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, LoRA(rank=2))
    before, after = Module().model.state_dict(), module.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after["0.plait.lora.B"].abs().max() > 0


def test_asking_twice_for_the_same_gradient_changes_nothing(tmp_path: Path) -> None:
    once, twice = fit(tmp_path)[0].model.state_dict(), fit(tmp_path, Twice())[0].model.state_dict()
    assert all(torch.allclose(once[name], twice[name], atol=1e-7) for name in once)


@pytest.mark.parametrize("again", ["the same trainer", "a new trainer"])
def test_a_second_fit_goes_on_without_starting_again(again: str, tmp_path: Path) -> None:
    module, callback = Module(), PlaitCallback(LoRA(rank=2), PiSSA(), AdamW(lr=1e-12))
    inputs, targets = data()
    said, loader = module.model(inputs).detach(), DataLoader(TensorDataset(inputs, targets), batch_size=6)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "default_root_dir": tmp_path} | quiet
    trainer = lightning.Trainer(callbacks=[callback], **options)
    trainer.fit(module, loader)
    if again == "the same trainer":
        trainer.fit_loop.max_epochs = 2
    else:
        trainer = lightning.Trainer(callbacks=[callback], **options)
    trainer.fit(module, loader)
    torch.testing.assert_close(module.model(inputs), said)
    torch.testing.assert_close(untouched_weight(module.model[0]), Module().model[0].weight)
    assert callback.now.step == 8  # each step once, not twice through a step that was wrapped twice


def test_a_callback_for_two_modules_is_refused(tmp_path: Path) -> None:
    _, callback = fit(tmp_path, LoRA(rank=2))
    with pytest.raises(BadInput, match=r"^this PlaitCallback acts on another module already: make a new one for each"):
        callback.setup(lightning.Trainer(logger=False), Module(), "fit")


def test_penalties_reach_the_gradient(tmp_path: Path) -> None:
    plain, shrunk = fit(tmp_path)[0].model, fit(tmp_path, Shrink())[0].model
    assert sum(p.norm() for p in shrunk.parameters()) < sum(p.norm() for p in plain.parameters())


def test_methods_of_the_loss_place_are_refused(tmp_path: Path) -> None:
    @method
    class Harder(Method):
        def loss(self, misfit: Any) -> Any:
            return lambda o, t, now: 2 * misfit(o, t, now)

    with pytest.raises(BadInput, match="changes the loss, which is computed in your training_step"):
        PlaitCallback(Harder())


def test_what_chooses_its_weights_after_the_optimizer_was_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"SPT decides what is trained \('0.plait.spt"):
        fit(tmp_path, LoRA(rank=2, where="2"), SPT(where="0", share=0.5))


def test_what_trains_nothing_before_its_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="SPT leaves nothing to train before its start, and Lightning asks for the opt"):
        fit(tmp_path, SPT(share=0.5))


def test_several_asks_with_accumulation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="accumulate_grad_batches"):
        fit(tmp_path, Twice(), accumulate_grad_batches=2)


def test_the_same_network_trains_in_both_loops() -> None:
    assert train(Module().model, data(), methods=[LoRA(rank=2)], steps=2).history


@pytest.mark.parametrize("methods", [(), (Clip(norm=100.0),), (LoRA(rank=2),)])
def test_micro_batches_add_up_to_the_whole_batch(methods: tuple[Method, ...], tmp_path: Path) -> None:
    whole, _ = fit(tmp_path, *methods, batch_size=12)
    parts, _ = fit(tmp_path, *methods, batch_size=3, accumulate_grad_batches=4)
    for one, other in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_epoch_is_told(tmp_path: Path) -> None:
    _, callback = fit(tmp_path, max_epochs=3)
    assert (callback.now.epoch, callback.now.step) == (2, 12)


def test_without_a_known_number_of_steps_nothing_can_be_scheduled(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"max_epochs": -1, "max_time": {"seconds": 1}}
    _, callback = fit(tmp_path, LoRA(rank=2), **endless)
    assert callback.now.step > 0
    with pytest.raises(BadInput, match=r"AdamW.lr follows a schedule, and this Trainer does not know"):
        fit(tmp_path, AdamW(lr=Linear(start=0.1, end=0.0)), **endless)


def test_what_needs_the_loss_of_each_example_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"set the callback's now.misfit to a function"):
        fit(tmp_path, LoRA(rank=2), Requantize(bits=8))
