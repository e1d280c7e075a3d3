"""EPT: its parts by hand, what the model reads, generation, state."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait.engine import Pairs, call_model
from plait.errors import BadInput
from plait.integrations.peft import save_adapter
from plait.parametrize.decomposed_prompt import EPT, Decomposed
from plait.parametrize.folding import fold
from plait.parametrize.low_rank import LoRA
from plait.parametrize.prompt import PromptTuning
from plait.train import train
from plait.workbench.export import to_onnx, to_transformers
from test_soft_prompts import MASK, TOKENS, bert, gpt2, llama, stir, with_

SMALL = EPT(tokens=3, reach=7, rank=2, spaces=2, width=4)


def by_hand(prompt: Decomposed) -> Tensor:
    """F, one vector after the other."""
    known, size = [a @ prompt.B for a in prompt.A], prompt.P.shape[1]
    fused = []
    for p in prompt.P:
        weights = torch.stack([((p * row).sum() / math.sqrt(size)).exp() for row in known])
        fused.append(p + sum(w * row for w, row in zip(weights / weights.sum(), known, strict=True)))
    mean = sum(fused) / len(fused)
    gates = torch.stack([(g * mean).sum().exp() for g in prompt.gate])
    made = []
    for p in fused:
        views = [p + (p @ down).clamp_min(0) @ up for down, up in zip(prompt.down, prompt.up, strict=True)]
        made.append(sum(g * view for g, view in zip(gates / gates.sum(), views, strict=True)))
    return torch.stack(made)


def prompt_of(model: nn.Module) -> Decomposed:
    return next(part for part in model.modules() if isinstance(part, Decomposed))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_the_model_reads(make: Any) -> None:
    """The plain model is given [F; E + A B] itself; tokens beyond the reach are as they were."""
    model, plain = stir(with_(make(), SMALL)), make()
    prompt = prompt_of(model)
    torch.testing.assert_close(prompt.flat(), by_hand(prompt))
    words = plain.get_input_embeddings()(TOKENS).clone()
    for place in range(7):
        words[:, place] += prompt.A[place] @ prompt.B
    given = torch.cat([by_hand(prompt).expand(2, -1, -1), words], 1)
    mask = torch.cat([torch.ones(2, 3), MASK], 1)
    expected = plain(inputs_embeds=given, attention_mask=mask).logits[:, 3:]
    ours = model(TOKENS, attention_mask=MASK).logits
    torch.testing.assert_close(ours[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_shifts_nothing() -> None:
    model = stir(with_(llama(), SMALL))
    padded, mask = (torch.cat([torch.zeros_like(t[:, :2]), t], 1) for t in (TOKENS, torch.ones_like(TOKENS)))
    places = (mask.cumsum(1) - 1).clamp_min(0)
    said = model(padded, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(said[:, 2:], model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    given = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    made = model.generate(padded, attention_mask=mask, **given)
    assert torch.equal(made[:, 2:], model.generate(TOKENS, **given))


def test_it_starts_as_a_prompt_of_words() -> None:
    words = (3, 4, 5)
    one, two = with_(llama(), EPT(tokens=3, words=words)), with_(llama(), PromptTuning(tokens=3, words=words))
    torch.testing.assert_close(one(TOKENS).logits, two(TOKENS).logits)


def test_what_is_generated_gets_its_own_rows() -> None:
    model = stir(with_(llama(), EPT(tokens=3, reach=12, rank=2)))
    with torch.no_grad():
        prompt_of(model).A.mul_(20)
    made, text = model.generate(TOKENS, max_new_tokens=6, do_sample=False), TOKENS
    for _ in range(6):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, text)
    before = text
    with torch.no_grad():
        prompt_of(model).A[9:] = 0
    assert not torch.equal(model.generate(TOKENS, max_new_tokens=6, do_sample=False), before)


def test_onnx_holds_the_prompt(tmp_path: Path) -> None:
    import onnxruntime

    model = stir(with_(bert(), SMALL))
    data = Pairs({"input_ids": TOKENS, "attention_mask": MASK}, torch.zeros(2, dtype=torch.long))
    task: Any = SimpleNamespace(test=data, call=call_model, save=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter says that a pass notes how many places it has added
        to_onnx(task, model, tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    said = session.run(None, {"input_ids": TOKENS.numpy(), "attention_mask": MASK.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(said), model(TOKENS, attention_mask=MASK).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="a soft prompt changes what the model reads"):
        to_transformers(task, model, tmp_path)


def test_state_and_going_on_beside_an_adapter(tmp_path: Path) -> None:
    data = ({"input_ids": TOKENS.repeat(6, 1), "attention_mask": MASK.repeat(6, 1)}, (TOKENS.repeat(6, 1) > 30)[:, 0])

    def go(steps: int, folder: Path) -> nn.Module:
        options = {"steps": steps, "batch_size": 4, "folder": folder, "save_every": 2}
        return train(bert(), (data[0], data[1].long()), methods=[SMALL, LoRA(rank=2)], **options).model.eval()

    whole = go(6, tmp_path / "whole")
    go(4, tmp_path / "halves")
    again = go(6, tmp_path / "halves")
    for (key, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert prompt_of(whole).A.abs().max() > 0
    assert prompt_of(whole).gate.abs().max() > 0
    other = with_(bert(), SMALL, LoRA(rank=2)).eval()
    other.load_state_dict(whole.state_dict())
    assert torch.equal(other(TOKENS).logits, whole(TOKENS).logits)
    other.load_state_dict(bert().state_dict())  # strict
    with pytest.raises(BadInput, match="a soft prompt changes what the model reads"):
        fold(whole)
    with pytest.raises(BadInput, match="PEFT's files hold one prompt or one prefix"):
        save_adapter(whole, tmp_path)
