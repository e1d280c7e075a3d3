"""IAPT: generators by hand, the layers one by one, what ends an instruction, and that nothing later is seen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from plait.errors import BadInput
from plait.integrations.peft import save_adapter
from plait.parametrize.folding import fold
from plait.parametrize.instruction import IAPT, Generator, Rational
from plait.parametrize.low_rank import LoRA
from plait.parametrize.prefix import PrefixTuning
from plait.parametrize.prompt import PromptTuning
from plait.train import train
from test_soft_prompts import TOKENS, bert, gpt2, llama, stir, with_

MARK = (61, 62)
TEXT = TOKENS.clone()
TEXT[0, 3:5], TEXT[1, 5:7] = torch.tensor(MARK), torch.tensor(MARK)
ENDS = (4, 6)


def by_hand(generator: Generator, hidden: Tensor, lasts: tuple[int, ...]) -> Tensor:
    """P [n, length, d], one number after the other, from the definition."""
    rows = []
    for states, last in zip(hidden, lasts, strict=True):
        narrow = [state @ generator.down for state in states[: last + 1]]
        places = []
        for query in generator.pool.t():
            weights = torch.stack([(u * query).sum().exp() for u in narrow])
            pooled = sum(w * u for w, u in zip(weights / weights.sum(), narrow, strict=True))
            acted = []
            for x in pooled:
                above = sum(c * x**power for power, c in enumerate(generator.activation.a))
                below = sum(c * x ** (power + 1) for power, c in enumerate(generator.activation.b))
                acted.append(above / (1 + abs(below)))
            places.append(torch.stack(acted) @ generator.up + generator.bias)
        rows.append(torch.stack(places))
    return torch.stack(rows)


def test_the_layers_one_by_one() -> None:
    model = stir(with_(llama(), IAPT(tokens=3, width=4, until=MARK)))
    plain: Any = llama()
    generators = model.model.plait.iapt.generators
    hidden = plain.model.embed_tokens(TEXT)
    length = hidden.shape[1] + 3
    positions = torch.arange(length).unsqueeze(0)
    prompt = torch.zeros(2, 3, 32)
    mask = create_causal_mask(plain.config, torch.cat([prompt, hidden], 1), torch.ones(2, length), None)
    for number, layer in enumerate(plain.model.layers):
        prompt = by_hand(generators[number], hidden, ENDS)
        given = torch.cat([prompt, hidden], 1)
        turned = plain.model.rotary_emb(given, position_ids=positions)
        hidden = layer(given, attention_mask=mask, position_embeddings=turned, position_ids=positions)[:, 3:]
    expected = plain.lm_head(plain.model.norm(hidden))
    torch.testing.assert_close(model(TEXT).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_whole_text_is_the_instruction_of_a_classifier() -> None:
    model = stir(with_(bert(), IAPT(tokens=2, width=4)))
    one = model(TOKENS).logits
    padded = torch.cat([TOKENS, torch.zeros(2, 3, dtype=torch.long)], 1)
    mask = (torch.arange(12) < 9).long().expand(2, -1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, one)
    changed = TOKENS.clone()
    changed[0, -1] = 1 + changed[0, -1] % 50
    generator = model.bert.plait.iapt.generators[0]
    written = [generator(model.bert.embeddings.word_embeddings(t), t > 0) for t in (TOKENS, changed)]
    assert not torch.allclose(written[0][0], written[1][0])
    assert torch.equal(written[0][1], written[1][1])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_nothing_after_the_instruction_is_seen_before_its_time(make: Any) -> None:
    model = stir(with_(make(), IAPT(tokens=2, width=4, until=MARK)))
    changed = TEXT.clone()
    changed[:, -1] = 1 + changed[:, -1] % 50
    torch.testing.assert_close(model(TEXT).logits[:, :-1], model(changed).logits[:, :-1])
    made, text = model.generate(TEXT[:1], max_new_tokens=5, do_sample=False, pad_token_id=0), TEXT[:1]
    for _ in range(5):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, text)


def test_beside_other_prompts_and_adapters() -> None:
    """Vectors before and after it stay where they are: two prompts of no effect would shift nothing but positions."""
    methods = [PrefixTuning(tokens=2, width=0), PromptTuning(tokens=2), IAPT(tokens=3, width=4, until=MARK)]
    model = with_(llama(), *methods, PromptTuning(tokens=1), LoRA(rank=2))
    seen: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    first: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda _, __, output: first.append(output))
    stir(model)(TEXT).logits.square().mean().backward()
    assert model.model.plait.length == 8
    same = (seen[0] == first[0]).all(-1).all(0)
    assert same.tolist() == [True] * 2 + [False] * 3 + [True] * 10
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert sum("iapt" in name for name in trained) == 12


def test_the_activation_starts_as_gelu_and_its_gradient_is_exact() -> None:
    x = torch.linspace(-10, 10, 101, dtype=torch.float64).requires_grad_()
    activation = Rational(torch.float64)
    assert (activation(x) - nn.functional.gelu(x)).abs().max() < 5e-3
    assert torch.autograd.gradcheck(activation, (x,))


def test_state_copies_and_going_on(tmp_path: Path) -> None:
    data = ({"input_ids": TEXT.repeat(6, 1)}, TEXT.repeat(6, 1).roll(-1, 1).where(torch.arange(9) > 6, -100))

    def go(steps: int, folder: Path) -> nn.Module:
        methods = [IAPT(tokens=2, width=4, until=MARK)]
        return train(llama(), data, methods=methods, steps=steps, batch_size=4, folder=folder, save_every=2).model

    whole = go(6, tmp_path / "whole")
    go(4, tmp_path / "halves")
    again = go(6, tmp_path / "halves")
    for (key, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    output = whole(TEXT).logits
    twin = stir(copy.deepcopy(whole))
    assert not torch.equal(twin(TEXT).logits, output)
    assert torch.equal(whole(TEXT).logits, output)
    other = with_(llama(), IAPT(tokens=2, width=4, until=MARK))
    other.load_state_dict(whole.state_dict())
    assert torch.equal(other(TEXT).logits, output)
    other.load_state_dict(llama().state_dict())  # strict


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="IAPT would show a language model the words that it should predict: give until"):
        with_(llama(), IAPT())
    model = with_(llama(), IAPT(until=MARK))
    with pytest.raises(BadInput, match=r"a text has no mark \[61, 62\] of where its instruction ends"):
        model(TEXT[:, :6])
    with pytest.raises(BadInput, match="IAPT looks for the end of the instruction among the tokens: give input_ids"):
        model(inputs_embeds=model.model.embed_tokens(TEXT))
    with pytest.raises(BadInput, match="a soft prompt changes what the model reads"):
        fold(model)
    with pytest.raises(BadInput, match="PEFT's files hold one prompt or one prefix"):
        save_adapter(model, tmp_path)
