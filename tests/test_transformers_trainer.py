"""plait's methods inside transformers' Trainer give what they give in plait's loop."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from plait import PSKD, AdamW, BadInput, Method
from plait.forward.dropout import Dropout
from plait.initialize.activation_svd import EVA
from plait.initialize.gradient_svd import LoRAGA
from plait.initialize.weight_svd import PiSSA
from plait.integrations.transformers import Trainer
from plait.parametrize.base import attached, untouched_weight
from plait.parametrize.hypercomplex import Compacter
from plait.parametrize.low_rank import LoRA
from plait.parametrize.module_selection import DiffoRA, GatedLowRank

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=32, **SIZES))


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 40, (count, 12), generator=generator)
    return [{"input_ids": t, "labels": t.clone()} for t in tokens]


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**settings | given)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_only_the_adapters_move(tmp_path: Path) -> None:
    model = llama()
    before = state(model)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), methods=[LoRA(rank=2, where="q_proj|v_proj")])
    trainer.train()
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(name.endswith("B") and after[name].abs().max() > 0 for name in after)


def test_the_gradient_is_that_of_the_plain_trainer(tmp_path: Path) -> None:
    from transformers import Trainer as Plain

    ours, theirs = llama(), llama()
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.5}
    Trainer(ours, arguments(tmp_path, **settings), train_dataset=rows(), methods=[]).train()
    Plain(theirs, arguments(tmp_path, **settings), train_dataset=rows()).train()
    assert largest_difference(state(ours), state(theirs)) < 1e-5


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    models = []
    for size, parts in ((4, 1), (2, 2)):
        model = llama()
        given = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts)
        Trainer(model, given, train_dataset=rows(), methods=[LoRA(rank=2, where="q_proj")]).train()
        models.append(state(model))
    assert largest_difference(*models) < 1e-5


def test_resumes_bitwise(tmp_path: Path) -> None:
    given = {"save_strategy": "steps", "save_steps": 3}
    methods = [LoRA(rank=2, where="q_proj")]
    whole = llama()
    Trainer(whole, arguments(tmp_path / "a", **given), train_dataset=rows(), methods=methods).train()
    resumed = llama()
    trainer = Trainer(resumed, arguments(tmp_path / "a", **given), train_dataset=rows(), methods=methods)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    one, other = state(whole), state(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("start", [PiSSA(), EVA()])
def test_a_second_train_goes_on_without_starting_again(start: Method, tmp_path: Path) -> None:
    model = llama()
    methods = [LoRA(rank=4, where=".*_proj"), start, Dropout(rate=0.1, where=".*_proj"), AdamW(lr=1e-2)]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), methods=methods)
    trainer.train()
    hooks = [len(part._forward_hooks) for part in model.modules()]
    before, said = state(model), model.eval()(rows()[0]["input_ids"][None]).logits
    trainer.methods[-1] = AdamW(lr=1e-12)
    trainer.train()
    assert largest_difference(before, state(model)) < 1e-6
    torch.testing.assert_close(model.eval()(rows()[0]["input_ids"][None]).logits, said)
    assert hooks == [len(part._forward_hooks) for part in model.modules()]


def test_a_smaller_batch_after_an_out_of_memory_error_finds_the_adapters_started(tmp_path: Path) -> None:
    class Full(Trainer):
        failed = False

        def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
            if not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*given, **named)

    model, token = llama(), rows()[0]["input_ids"][None]
    said = model.eval()(token).logits
    methods = [LoRA(rank=4, where=".*_proj"), PiSSA(), AdamW(lr=1e-12)]
    Full(model, arguments(tmp_path, auto_find_batch_size=True), train_dataset=rows(), methods=methods).train()
    torch.testing.assert_close(model.eval()(token).logits, said, rtol=1e-4, atol=1e-5)
    layer = model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(untouched_weight(layer), llama().model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("start", [EVA(), LoRAGA()], ids=lambda s: s.key)
def test_a_start_that_takes_too_much_memory_is_begun_anew_with_a_smaller_batch(start: Method, tmp_path: Path) -> None:
    model, seen = llama(), []

    def full(part: torch.nn.Module, given: Any, named: Any) -> None:
        seen.append(len(named["input_ids"]))
        if seen[-1] > 4:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(full, with_kwargs=True)
    given = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
    Trainer(model, arguments(tmp_path, **given), train_dataset=rows(), methods=[LoRA(rank=2), start]).train()
    assert seen[0] == 8
    assert max(seen[-3:]) <= 4


def test_what_methods_let_layers_share_is_saved_and_resumed(tmp_path: Path) -> None:
    given = {"save_strategy": "steps", "save_steps": 3}
    left = []
    for start in (None, str(tmp_path / "checkpoint-3")):
        model, methods = llama(), [Compacter(factors=2, width=4, where="down_proj")]
        trainer = Trainer(model, arguments(tmp_path, **given), train_dataset=rows(), methods=methods)
        trainer.train(resume_from_checkpoint=start)
        left.append(state(trainer.finish()))
    assert largest_difference(*left) == 0
    assert any("compacter" in name for name in left[0])  # no weight can hold it: the finished model keeps it


def test_what_learns_from_the_validation_set_reads_the_evaluation_set(tmp_path: Path) -> None:
    methods, model = [DiffoRA(rank=2, where=".*proj", search=0.5)], llama()
    Trainer(model, arguments(tmp_path), train_dataset=rows(), eval_dataset=rows(6), methods=methods).train()
    settled = {name: int(part.common) for name, _, part in attached(model, GatedLowRank)}
    assert sum(settled.values()) == len(settled) // 2
    with pytest.raises(BadInput, match=r"or to transformers' Trainer \(eval_dataset=...\)"):
        Trainer(llama(), arguments(tmp_path), train_dataset=rows(), methods=methods).train()


def test_a_recipe_that_cannot_work_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="matches no layer"):
        Trainer(llama(), arguments(tmp_path), train_dataset=rows(), methods=[LoRA(where="q_prj")])


def classifier(labels: int, **given: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=labels, **sizes, **given))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, **off))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2))


def labelled(label: Any) -> list[dict[str, torch.Tensor]]:
    return [row | {"labels": torch.tensor(label(i))} for i, row in enumerate(rows())]


class Plain(nn.Module):
    """What transformers' Trainer also takes: a module without a configuration that returns its loss and logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.table(input_ids).mean(1)
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: classifier(3), labelled(lambda i: i % 3)),
        (lambda: classifier(1), labelled(float)),
        (lambda: classifier(1, problem_type="regression"), labelled(lambda i: i)),
        (lambda: classifier(2, problem_type="regression"), labelled(lambda i: [0.1 * i, 1.0])),
        (lambda: classifier(3, problem_type="multi_label_classification"), labelled(lambda i: [1.0, 0.0, i % 2.0])),
        (lambda: classifier(3), labelled(lambda i: [1.0, 0.0, i % 2.0])),
        (llama, rows()),
        (Plain, labelled(lambda i: i % 3)),
    ],
    ids=[
        "classes",
        "number",
        "whole number",
        "numbers",
        "several classes",
        "told by labels",
        "llama",
        "module",
    ],
)
def test_losses_are_those_of_the_plain_trainer(make: Any, data: Any, tmp_path: Path) -> None:
    seen = []
    for kind in (transformers.Trainer, Trainer):
        trainer = kind(make(), arguments(tmp_path, logging_strategy="steps", logging_steps=1), train_dataset=data)
        trainer.train()
        steps = [(step["loss"], step["grad_norm"]) for step in trainer.state.log_history if "loss" in step]
        seen.append([*steps, (trainer.evaluate(data)["eval_loss"],)])
    for ours, theirs in zip(*seen, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_gpt2_learns_the_next_token(tmp_path: Path) -> None:
    """Its class is a language model's by another name; transformers counts the first token of a row too, we do not."""
    data = [{"input_ids": (t := (torch.arange(12) + i) % 40), "labels": t} for i in range(24)]
    trainer = Trainer(gpt2(), arguments(tmp_path, max_steps=60), train_dataset=data)
    trainer.train()
    whole = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        output = trainer.model(input_ids=whole, labels=whole)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(float(output.loss), rel=1e-4)
    assert (output.logits[:, :-1].argmax(-1) == whole[:, 1:]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("make", "options", "methods", "says"),
    [
        (llama, {}, [PSKD()], "PSKD remembers each example, and the Trainer does not say which a batch holds"),
        (llama, {"label_smoothing_factor": 0.1}, [], "label_smoothing_factor would replace the loss that methods"),
        (t5, {}, [], "T5ForConditionalGeneration has an encoder and a decoder"),
    ],
)
def test_what_it_cannot_do_is_refused_before_training(
    make: Any, options: Any, methods: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=says):
        Trainer(make(), arguments(tmp_path, **options), train_dataset=rows(), methods=methods)


def test_what_is_judged_is_the_model_that_is_given(tmp_path: Path) -> None:
    model, data = llama(), rows(8)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), eval_dataset=data, methods=[LoRA(rank=2)])
    trainer.train()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    own = trainer.now.evaluate(model)
    assert own == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)
    assert trainer.now.evaluate(other) == pytest.approx(math.log(40), rel=1e-5)
    assert trainer.now.evaluate(model) == own
