"""Soft prompts: what they mean, by running the model on real tokens in their place; against peft; laws and refusals."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from plait.errors import BadInput
from plait.finish.fold import Fold
from plait.integrations.peft import load_adapter, save_adapter
from plait.loss.chunked import call_with_chunked_logits
from plait.method import Method, Now
from plait.models.small import llama_tiny, mlp
from plait.parametrize.folding import fold
from plait.parametrize.freeze import Freeze
from plait.parametrize.low_rank import LoRA
from plait.parametrize.prefix import Prefix, PrefixTuning
from plait.parametrize.prompt import PromptMethod, PromptTuning
from plait.penalty.alignment import AlignGuard
from plait.train import train

WORDS = (3, 4, 5)
TOKENS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
MASK[0, 6:] = 0
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    none = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **LLAMA, **none, **more)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    none = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**shape, **none)).eval()


def bert(kind: Any = BertForSequenceClassification) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return kind(BertConfig(vocab_size=60, max_position_embeddings=16, num_labels=2, **sizes)).eval()


DECODERS = pytest.mark.parametrize("make", [llama, gpt2])
METHODS: dict[str, Any] = {
    "prompt": lambda **more: PromptTuning(tokens=3, **more),
    "prefix": lambda **more: PrefixTuning(tokens=3, width=0, **more),
}
BOTH = pytest.mark.parametrize("name", METHODS)


def with_(model: nn.Module, *methods: Method) -> nn.Module:
    for method in methods:
        method.parametrize(model)
    return model


def prompt_of(model: nn.Module) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if name.endswith("tuning.P"))


def stir(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=draw).to(p))
    return model


# -- the meaning -------------------------------------------------------------------------------------------------------
@DECODERS
@BOTH
def test_a_prompt_of_real_words_is_a_text_that_begins_with_them(make: Any, name: str) -> None:
    """The oracle: the plain model reads the words and the text, and what it says at the words is dropped."""
    model, plain = with_(make(), METHODS[name](words=WORDS)), make()
    words = torch.tensor([WORDS, WORDS])
    longer, mask = torch.cat([words, TOKENS], 1), torch.cat([torch.ones_like(words), MASK], 1)
    torch.testing.assert_close(model(TOKENS).logits, plain(longer).logits[:, 3:])
    masked, expected = model(TOKENS, attention_mask=MASK).logits, plain(longer, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(masked[MASK.bool()], expected[MASK.bool()])
    positions = torch.arange(12).expand(2, -1) // 2  # counted in some other way
    given = model(TOKENS, position_ids=positions[:, 3:] - 3).logits
    if name == "prompt":
        positions = torch.cat([torch.arange(3).expand(2, -1), positions[:, 3:]], 1)
        torch.testing.assert_close(
            given, plain(longer, position_ids=positions, attention_mask=mask * 0 + 1).logits[:, 3:]
        )
    assert not torch.allclose(given, model(TOKENS).logits)


@DECODERS
@BOTH
def test_generation_reads_the_prompt_once(make: Any, name: str) -> None:
    model, plain = with_(make(), METHODS[name](words=WORDS)), make()
    made = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    longer = torch.cat([torch.tensor([WORDS, WORDS]), TOKENS], 1)
    assert torch.equal(made, plain.generate(longer, max_new_tokens=6, do_sample=False)[:, 3:])
    stir(model)
    left = MASK.flip(1)  # padding on the left, as generation wants it
    made, text, mask = model.generate(TOKENS, attention_mask=left, max_new_tokens=5, do_sample=False), TOKENS, left
    for _ in range(5):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        after = model(text, attention_mask=mask, position_ids=positions).logits[:, -1].argmax(-1, keepdim=True)
        text, mask = torch.cat([text, after], 1), torch.cat([mask, torch.ones_like(after)], 1)
    assert torch.equal(made, text)


def opt() -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    none = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    return OPTForCausalLM(OPTConfig(**shape, max_position_embeddings=32, word_embed_proj_dim=32, **none)).eval()


def bloom() -> nn.Module:
    torch.manual_seed(0)
    none = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, **none)).eval()


@pytest.mark.parametrize("make", [llama, gpt2, opt, bloom])
@BOTH
def test_generation_without_a_cache_reads_it_too(make: Any, name: str) -> None:
    model = stir(with_(make(), METHODS[name]()))
    made = model.generate(TOKENS, max_new_tokens=5, do_sample=False)
    assert torch.equal(made, model.generate(TOKENS, max_new_tokens=5, do_sample=False, use_cache=False))
    assert not torch.allclose(model(TOKENS).logits, make()(TOKENS).logits)  # also where a head calls OPT's decoder


def test_an_encoder_pools_the_first_place_of_the_text() -> None:
    """By hand: [P; E(x)] through embeddings and layers, then the pooler at the place where the text begins."""
    model, plain = stir(with_(bert(), PromptTuning(tokens=3))), bert()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".plait." not in k})
    types = (torch.arange(9) > 4).long().expand(2, -1)
    words = torch.cat([prompt_of(model).expand(2, -1, -1), plain.bert.embeddings.word_embeddings(TOKENS)], 1)
    longer = torch.cat([torch.zeros(2, 3, dtype=torch.long), types], 1)
    mask = torch.cat([torch.ones(2, 3), MASK], 1)
    out = plain.bert(inputs_embeds=words, token_type_ids=longer, attention_mask=mask)
    logits = plain.classifier(plain.bert.pooler(out.last_hidden_state[:, 3:]))
    torch.testing.assert_close(model(TOKENS, attention_mask=MASK, token_type_ids=types).logits, logits)


def test_prompts_prefixes_and_low_rank_updates_stand_together() -> None:
    """Prefix, then two prompts, of the words of one text: the plain model reads all of them."""
    model, plain = with_(llama(), PrefixTuning(tokens=2, width=0, words=(7, 8))), llama()
    with_(model, PromptTuning(tokens=3, words=WORDS), PromptTuning(tokens=1, words=(9,)), LoRA(rank=2))
    longer = torch.cat([torch.tensor([[7, 8, *WORDS, 9]] * 2), TOKENS], 1)
    torch.testing.assert_close(model(TOKENS).logits, plain(longer).logits[:, 6:])
    stir(model)(TOKENS).logits.square().mean().backward()
    trained = {name.split(".plait.")[1]: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {"prefixtuning.P", "prompttuning.P", "prompttuning_2.P", "lora.A", "lora.B"} == set(trained)
    assert all(grad is not None and grad.abs().max() > 0 for grad in trained.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_perceptron_is_dropped_after_training() -> None:
    model = with_(llama(), PrefixTuning(tokens=3, width=5))
    assert [n.rpartition("plait.prefixtuning.")[2] for n, p in model.named_parameters() if p.requires_grad] == [
        *("P", "down.weight", "down.bias", "up.weight", "up.bias"),
    ]
    before, state = model(TOKENS).logits, copy.deepcopy(model.state_dict())
    PrefixTuning(tokens=3, width=5).finish(model, Now())
    assert torch.equal(model(TOKENS).logits, before)
    settled = model.state_dict()
    assert len(state) - len(settled) == 4
    other = with_(llama(), PrefixTuning(tokens=3, width=5))
    other.load_state_dict(settled)
    assert torch.equal(other(TOKENS).logits, before)


# -- peft --------------------------------------------------------------------------------------------------------------
def configured(name: str, task: str, **more: Any) -> Any:
    kind = PromptTuningConfig if name == "prompt" else PrefixTuningConfig
    return kind(task_type=task, num_virtual_tokens=3, **more)


def theirs(model: nn.Module, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that will go
        return get_peft_model(model, config).eval()


def opened(model: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, folder).eval()


@DECODERS
@BOTH
def test_peft_computes_the_same(make: Any, name: str) -> None:
    model = stir(with_(make(), METHODS[name]()))
    peft = theirs(make(), configured(name, "CAUSAL_LM"))
    with torch.no_grad():
        peft.prompt_encoder.default.embedding.weight.copy_(prompt_of(model))
    for mask in (None, MASK):
        ours, other = model(TOKENS, attention_mask=mask), peft(input_ids=TOKENS, attention_mask=mask)
        torch.testing.assert_close(ours.logits, other.logits[:, -9:], rtol=0, atol=1e-6)
    ours.logits.square().sum().backward()
    other.logits[:, -9:].square().sum().backward()
    grad = peft.prompt_encoder.default.embedding.weight.grad
    torch.testing.assert_close(prompt_of(model).grad, grad, rtol=1e-4, atol=1e-6)


def test_peft_computes_the_same_on_an_encoder() -> None:
    prefixed = stir(with_(bert(), PrefixTuning(tokens=3, width=0)))
    peft = theirs(bert(), configured("prefix", "SEQ_CLS"))
    with torch.no_grad():
        peft.prompt_encoder.default.embedding.weight.copy_(prompt_of(prefixed))
    ours, other = prefixed(TOKENS, attention_mask=MASK), peft(input_ids=TOKENS, attention_mask=MASK)
    torch.testing.assert_close(ours.logits, other.logits, rtol=0, atol=1e-6)
    prompted = stir(with_(bert(BertModel), PromptTuning(tokens=3)))
    peft = theirs(bert(BertModel), configured("prompt", "FEATURE_EXTRACTION"))
    with torch.no_grad():
        peft.prompt_encoder.default.embedding.weight.copy_(prompt_of(prompted))
    hidden = peft(input_ids=TOKENS, attention_mask=MASK).last_hidden_state[:, 3:]
    torch.testing.assert_close(prompted(TOKENS, attention_mask=MASK).last_hidden_state, hidden, rtol=0, atol=1e-6)


def test_peft_makes_the_same_of_a_perceptron() -> None:
    model = stir(with_(llama(), PrefixTuning(tokens=3, width=5)))
    peft = theirs(llama(), configured("prefix", "CAUSAL_LM", prefix_projection=True, encoder_hidden_size=5))
    ours, encoder = model.model.plait.prefixtuning, peft.prompt_encoder.default
    with torch.no_grad():
        encoder.embedding.weight.copy_(ours.P)
    encoder.transform[0].load_state_dict(ours.down.state_dict())
    encoder.transform[2].load_state_dict(ours.up.state_dict())
    torch.testing.assert_close(model(TOKENS).logits, peft(input_ids=TOKENS).logits, rtol=0, atol=1e-6)


@DECODERS
@BOTH
def test_files_go_to_peft_and_come_back(make: Any, name: str, tmp_path: Path) -> None:
    model = stir(with_(make(), METHODS[name]()))
    save_adapter(model, tmp_path / "ours")
    expected = model(TOKENS).logits
    peft = opened(make(), tmp_path / "ours")
    torch.testing.assert_close(peft(input_ids=TOKENS).logits[:, -9:], expected, rtol=0, atol=1e-6)
    peft.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = load_adapter(make(), tmp_path / folder)
        assert torch.equal(again(TOKENS).logits, expected)
        assert [p.shape for p in again.parameters() if p.requires_grad] == [prompt_of(model).shape]
    with pytest.raises(BadInput, match="is a soft prompt of another model: it has"):
        load_adapter(llama_tiny(), tmp_path / "ours", any_base=True)


def test_files_of_another_base_are_refused(tmp_path: Path) -> None:
    model = stir(with_(llama(), METHODS["prefix"]()))
    save_adapter(model, tmp_path)
    other: Any = llama()
    nn.init.normal_(other.lm_head.weight)
    with pytest.raises(BadInput, match=r"was made for another base: 1 of 21 weights, 'lm_head.weight' first"):
        load_adapter(other, tmp_path)
    assert not any(isinstance(part, Prefix) for part in other.modules())
    load_adapter(other, tmp_path, any_base=True)


def test_files_hold_a_new_head_and_what_a_perceptron_made(tmp_path: Path) -> None:
    from plait.parametrize.freeze import mark_fresh

    model = stir(with_(mark_fresh(bert(), "classifier"), PrefixTuning(tokens=3, width=4)))
    save_adapter(model, tmp_path)
    expected = model(TOKENS, attention_mask=MASK).logits
    peft = opened(bert(), tmp_path)
    theirs = peft(input_ids=TOKENS, attention_mask=MASK).logits
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-6)
    again = load_adapter(bert(), tmp_path)
    torch.testing.assert_close(again(TOKENS, attention_mask=MASK).logits, expected, rtol=0, atol=1e-6)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        *("bert.plait.prefixtuning.P", "classifier.weight", "classifier.bias"),
    }


# -- laws --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [PromptTuning(tokens=3), PrefixTuning(tokens=3, width=0), PrefixTuning(width=5)])
def test_state_round_trip_and_the_base_models_checkpoint(method: PromptMethod) -> None:
    model = stir(with_(llama(), method))
    other = with_(llama(), method)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    other.load_state_dict(llama().state_dict())  # strict
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**llama().state_dict(), "odd": torch.zeros(1)})


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@BOTH
def test_a_copy_is_independent(make: Any, name: str) -> None:
    model = stir(with_(make(), METHODS[name]()))
    output, twin = model(TOKENS).logits, copy.deepcopy(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(TOKENS).logits, output)
    stir(twin)
    assert not torch.equal(twin(TOKENS).logits, output)
    assert torch.equal(model(TOKENS).logits, output)


@BOTH
def test_a_language_model_trains_and_goes_on_bitwise(name: str, tmp_path: Path) -> None:
    target = torch.cat([TOKENS[:, 1:], torch.full((2, 1), -100)], 1)
    data = ({"input_ids": TOKENS.repeat(6, 1), "attention_mask": MASK.repeat(6, 1)}, target.repeat(6, 1))

    def go(steps: int, folder: Path) -> nn.Module:
        methods = [METHODS[name](), LoRA(rank=2)]
        options = {"steps": steps, "batch_size": 4, "folder": folder, "save_every": 2}
        return train(llama(), data, methods=methods, call=call_with_chunked_logits, **options).model

    whole = go(6, tmp_path / "whole")
    go(4, tmp_path / "halves")
    again = go(6, tmp_path / "halves")
    moved = prompt_of(with_(llama(), METHODS[name]())) != prompt_of(whole)
    assert moved.any()
    for (key, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@BOTH
def test_bfloat16_autocast_and_compiled_models(name: str) -> None:
    model = stir(with_(llama(), METHODS[name]()))
    expected = model(TOKENS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = model(TOKENS).logits
    torch.testing.assert_close(lower.float(), expected, rtol=0, atol=2e-2)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS).logits, expected)
    half = with_(llama().to(torch.bfloat16), METHODS[name]())
    assert prompt_of(half).dtype == torch.float32
    assert half(TOKENS).logits.dtype == torch.bfloat16
    half(TOKENS).logits.float().sum().backward()
    assert prompt_of(half).grad.abs().max() > 0


def test_starts() -> None:
    table = llama().model.embed_tokens.weight
    drawn = prompt_of(with_(llama(), PromptTuning(tokens=5)))
    assert all((row == table).all(1).any() for row in drawn)
    uniform = prompt_of(with_(llama(), PromptTuning(tokens=50, start="uniform")))
    assert uniform.abs().max() <= 0.5 < uniform.abs().max() + 0.05
    repeated = prompt_of(with_(llama(), PromptTuning(tokens=5, words=WORDS)))
    assert torch.equal(repeated, table[[3, 4, 5, 3, 4]])
    assert isinstance(with_(llama(), PrefixTuning(tokens=5)).model.plait.prefixtuning, Prefix)


# -- refusals ----------------------------------------------------------------------------------------------------------
def t5() -> nn.Module:
    sizes = {"vocab_size": 60, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes))


def distilbert() -> nn.Module:
    return DistilBertModel(DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=16))


def checkpointed() -> nn.Module:
    model: Any = llama()
    model.activation_checkpointing_enable()
    return model


@pytest.mark.parametrize(
    ("make", "method", "says"),
    [
        (
            lambda: mlp(3, 2),
            PromptTuning(),
            "PromptTuning needs a transformers model that reads tokens, not Sequential",
        ),
        (t5, PromptTuning(), "PromptTuning reads one text, and T5ForConditionalGeneration two: take an encoder or a"),
        (llama, PromptTuning(where="layers.0.*"), "PromptTuning acts on what the whole model reads: leave out where."),
        (llama, PromptTuning(words=(64,)), "PromptTuning.words has the token 64: give tokens from 0 to 63."),
        (llama, PrefixTuning(words=(1,)), "give width=0 too"),
        (distilbert, PrefixTuning(), "PrefixTuning needs a model that takes keys and values from outside: use Prompt"),
        (checkpointed, PrefixTuning(), "PrefixTuning cannot work under gradient checkpointing"),
    ],
)
def test_refusals(make: Any, method: PromptMethod, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        method.parametrize(make())
    assert says in str(caught.value)


def test_methods_of_weights_that_a_prompt_freezes_are_refused() -> None:
    data = (TOKENS.repeat(4, 1), torch.zeros(8, dtype=torch.long))
    with pytest.raises(
        BadInput, match="PromptTuning freezes the weights that Freeze names: put Freeze first, or drop it"
    ):
        train(bert(), data, methods=[PromptTuning(tokens=3), Freeze(where="bert.encoder.layer.0")], steps=1)
    with pytest.raises(BadInput, match="nothing is trained; change where, or drop it"):
        train(bert(), data, methods=[PromptTuning(tokens=3), AlignGuard()], steps=1)


def test_a_distilled_encoder_takes_a_prompt() -> None:
    assert with_(distilbert(), PromptTuning(tokens=2))(TOKENS).last_hidden_state.shape == (2, 9, 16)


def test_checkpointing_is_refused_later_too_for_prefixes_and_fine_for_prompts() -> None:
    model = with_(llama(), METHODS["prefix"]())
    model.activation_checkpointing_enable()
    with pytest.raises(BadInput, match="a prefix cannot work under gradient checkpointing"):
        model(TOKENS)
    prompted = stir(with_(llama(), METHODS["prompt"]())).train()
    prompted(TOKENS).logits.square().sum().backward()
    grad = prompt_of(prompted).grad.clone()
    prompted.activation_checkpointing_enable()
    prompted.zero_grad()
    prompted(TOKENS, use_cache=False).logits.square().sum().backward()
    torch.testing.assert_close(prompt_of(prompted).grad, grad)


def test_texts_that_are_too_long_with_the_prompt_are_refused() -> None:
    model = with_(bert(), PromptTuning(tokens=8))
    with pytest.raises(BadInput, match="9 tokens and 8 places of soft prompts are more than the 16 positions"):
        model(TOKENS)


@BOTH
def test_what_no_weight_can_hold_is_not_folded(name: str, tmp_path: Path) -> None:
    model = with_(llama(), METHODS[name](), LoRA(rank=2))
    with pytest.raises(BadInput, match="a soft prompt changes what the model reads and none of its weights"):
        fold(model)
    with pytest.raises(BadInput, match="PEFT's files hold one prompt or one prefix"):
        save_adapter(model, tmp_path)
    data = (TOKENS.repeat(4, 1), torch.zeros(8, dtype=torch.long))
    with pytest.raises(BadInput, match=r"Fold and P.*Tuning exclude each other: remove one"):
        train(bert(), data, methods=[METHODS[name](), LoRA(rank=2), Fold()], steps=1)
    for mask in (torch.ones(2, 1, 9, 9), {"full_attention": torch.ones(2, 1, 9, 9)}):  # the second of a static cache
        with pytest.raises(BadInput, match="needs an attention_mask of one number a token"):
            model(TOKENS, attention_mask=mask)


def test_a_masked_average_of_heads_sees_the_tokens_alone() -> None:
    """What lies behind the backbone gets as many places as there are tokens."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = bert(BertModel), nn.Linear(16, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.encoder(input_ids, attention_mask).last_hidden_state  # by position, as users do
            weight = attention_mask.unsqueeze(-1)
            return self.head((hidden * weight).sum(1) / weight.sum(1))

    torch.manual_seed(0)
    model = with_(Pooled(), PromptTuning(tokens=3))
    assert model(TOKENS, MASK).shape == (2, 2)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["encoder.plait.prompttuning.P"]
