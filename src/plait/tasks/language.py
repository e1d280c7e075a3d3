"""Causal language modelling: packed text, or prompts and responses with the loss on the responses; loss, perplexity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.batch import IGNORE
from plait.engine import call_model
from plait.errors import BadInput
from plait.loss.base import cross_entropy
from plait.loss.chunked import call_with_chunked_logits
from plait.models.pretrained import load_transformers
from plait.models.small import llama_tiny
from plait.tasks import metrics
from plait.tasks.base import Options, Task
from plait.tasks.reading import Table, column, read, require_named, rows_of, texts
from plait.tasks.sets import Blocks, Texts, shifted
from plait.tasks.splits import NAMES, is_share, share, three
from plait.tasks.text import require_length, tokenizer_of

FEW = 20
"""A corpus of fewer documents than this is split inside its text, not by document."""


def build(options: Options) -> Task:
    """Return the task; the data has a column of texts, or of prompts and responses, or of messages."""
    tokenizer = tokenizer_of(options)
    options = replace(options, data=read(options.data, options.encoding))
    first = next(iter(options.data.values()))
    require_named(first, options, "prompt", "response")
    notes: list[str] = []
    sets: dict[str, Any]
    if _has_pairs(first, options):
        sets = {
            part: answers(table, tokenizer, options, notes)
            for part, table in zip(NAMES, three(options), strict=True)
        }  # fmt: skip
    else:
        sets = packed(options, tokenizer)
    other = None if options.other is None else _other(options, tokenizer, notes)
    model = _model(options, tokenizer)
    require_length(model, options.length)
    call = caller(model)

    def save(folder: str | Path) -> None:
        tokenizer.save_pretrained(folder)

    return Task(
        name=options.task,
        model=model,
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        other=other,
        call=call,
        loss=cross_entropy,
        metrics=metrics.language(call, cross_entropy),
        quality="loss",
        better="lower",
        save=save,
        tokenizer=tokenizer,
        notes=tuple(notes),
    )


def _model(options: Options, tokenizer: Any) -> nn.Module:
    if isinstance(options.model, nn.Module):
        return options.model
    if str(options.model) != "llama-tiny":
        return load_transformers(options.model, options.task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return llama_tiny(len(tokenizer))


def caller(model: nn.Module) -> Callable[[nn.Module, Any], Any]:
    """Return how to run a language model: with its logits in chunks where its head allows it, and never with a cache.

    Raises BadInput for a model that sees the tokens that it should predict.
    """
    known = hasattr(model, "get_output_embeddings")  # one of transformers' models

    def plain(model: nn.Module, inputs: Any) -> Any:
        return call_model(model, {**inputs, "use_cache": False} if known else inputs)

    def chunked(model: nn.Module, inputs: Any) -> Any:
        return call_with_chunked_logits(model, {**inputs, "use_cache": False})

    with metrics.judging(model) as device:
        probe = torch.tensor([[1, 2], [1, 3]], device=device)
        seen = plain(model, {"input_ids": probe})
        if not torch.allclose(seen[0, 0], seen[1, 0], atol=1e-3):
            raise BadInput(
                f"{type(model).__name__} sees the words that it should predict: take a causal language model, such as "
                f"smollm2-135m."
            )
        try:
            call_with_chunked_logits(model, {"input_ids": probe})
        except BadInput:
            return plain
    return chunked


# -- packed text -----------------------------------------------------------------------------------------------------
def encode(texts: list[str], tokenizer: Any, length: int, blocks: int | None = None) -> Tensor:
    """Return texts as blocks [n, length] of tokens, an end mark after each text; only so many blocks, if given."""
    flat: list[int] = []
    for start in range(0, len(texts), 256):
        for row in tokenizer(texts[start : start + 256], add_special_tokens=False, verbose=False)["input_ids"]:
            flat += row
            flat.append(tokenizer.eos_token_id)
        if blocks is not None and len(flat) >= blocks * length:
            break
    count = len(flat) // length if blocks is None else min(blocks, len(flat) // length)
    return torch.tensor(flat[: count * length]).view(count, length)


def _shuffled(texts: list[str], seed: int) -> list[str]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts[i] for i in order.tolist()]


def quotas(options: Options) -> dict[str, int | None]:
    """Return how many blocks each set may have: `rows` in all, in the proportion of the shares."""
    if options.rows is None:
        return dict.fromkeys(NAMES)
    held = {
        part: share(getattr(options, part), part, options.rows, 1) if is_share(getattr(options, part)) else options.rows
        for part in ("validation", "test")
    }
    inside = sum(count for part, count in held.items() if is_share(getattr(options, part)))
    if options.rows - inside < 1:
        raise BadInput(f"rows={options.rows} leaves no block to train on: give more rows, or smaller shares.")
    return {"train": options.rows - inside, **held}


def packed(options: Options, tokenizer: Any) -> dict[str, Blocks]:
    """Return the sets of packed text: split by document where there are enough, else one stretch after the other."""
    tables = read(options.data, options.encoding)
    quota, blocks = quotas(options), {}
    shares = is_share(options.validation) and is_share(options.test)
    if set(tables) == {"all"} and len(tables["all"]) < FEW and shares:
        whole = encode(texts(tables["all"], options.text, "text"), tokenizer, options.length, options.rows)
        held = {part: share(getattr(options, part), part, len(whole), 1) for part in ("validation", "test")}
        sizes = [len(whole) - sum(held.values()), held["validation"], held["test"]]
        if sizes[0] < 1:
            raise _too_short(tables["all"], len(whole), options)
        blocks = dict(zip(NAMES, torch.split(whole, sizes), strict=True))
    else:
        for part, table in zip(NAMES, three(replace(options, rows=None)), strict=True):
            shuffled = _shuffled(texts(table, options.text, "text"), options.split_seed)
            blocks[part] = encode(shuffled, tokenizer, options.length, quota[part])
            if len(blocks[part]) == 0:
                raise _too_short(table, 0, options)
    return {part: Blocks(tokens) for part, tokens in blocks.items()}


def _too_short(table: Table, blocks: int, options: Options) -> BadInput:
    return BadInput(
        f"{table.attrs['source']} has text for {blocks} blocks of {options.length} tokens, too few to split into "
        f"training, validation and test sets: give more text, or a smaller length."
    )


def _other(options: Options, tokenizer: Any, notes: list[str]) -> Any:
    """Return the second domain: its test set if it has one; as many examples as the test set where `rows` is given."""
    tables = read(options.other, options.encoding)
    table = tables.get("test", next(iter(tables.values())))
    count = quotas(options)["test"]
    if _has_pairs(table, options):
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(options.split_seed))
        chosen = table.iloc[order[:count].tolist()]
        chosen.attrs = dict(table.attrs)
        return answers(chosen, tokenizer, options, notes)
    shuffled = _shuffled(texts(table, options.text, "text"), options.split_seed)
    tokens = encode(shuffled, tokenizer, options.length, count)
    if len(tokens) == 0:
        raise _too_short(table, 0, options)
    return Blocks(tokens)


# -- prompts and responses -------------------------------------------------------------------------------------------
def _has_pairs(table: Table, options: Options) -> bool:
    return "messages" in table.columns or {options.prompt, options.response} <= set(table.columns)


def conversations(table: Table, options: Options) -> list[list[dict[str, str]]]:
    """Return each example as messages {role, content}."""
    if "messages" in table.columns:
        held = column(table, "messages", "messages")
        for row, messages in zip(rows_of(table), held, strict=True):
            several = isinstance(messages, Sequence) or hasattr(messages, "tolist")  # parquet holds arrays
            if not (several and len(messages) and all(isinstance(message, Mapping) for message in messages)):
                raise BadInput(
                    f"{table.attrs['source']} has the messages {str(messages)[:40]!r} in row {row}: give a list of "
                    "one {role, content} or more."
                )
            for message in messages:
                said = message.get("content") if not message.get("tool_calls") else ""  # a call may stand alone
                if not (isinstance(message.get("role"), str) and isinstance(said, str)):
                    raise BadInput(
                        f"{table.attrs['source']} has the message {str(dict(message))[:60]!r} in row {row}: give its "
                        "role and its content as text."
                    )
        return [[dict(message) for message in messages] for messages in held]
    prompts = texts(table, options.prompt, "prompt")
    responses = texts(table, options.response, "response")
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(prompts, responses, strict=True)
    ]


def _written(messages: list[dict[str, str]], tokenizer: Any, where: str, prompting: bool = False) -> str:
    """Return messages as the tokenizer's chat template writes them; BadInput for those that it refuses."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompting))
    except (TemplateError, TypeError) as problem:
        raise BadInput(
            f"the chat template cannot write {where} ({problem}): change it, or give it as a column of text."
        ) from None


def rendered(messages: list[dict[str, str]], tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as the model reads it, and the stretches [from, to) of it that the assistant says."""
    if messages[0].get("role") == "assistant":
        raise BadInput(f"{where} begins with the assistant: put before it what it answers to, or remove it.")
    whole = _written(messages, tokenizer, where)
    spans = []
    for i, message in enumerate(messages):
        if message.get("role") == "assistant":
            before = _written(messages[:i], tokenizer, where, prompting=True)
            after = _written(messages[: i + 1], tokenizer, where)
            if not (whole.startswith(before) and whole.startswith(after)):
                raise BadInput(f"the chat template rewrites earlier messages in {where}: give it as a column of text.")
            spans.append((len(before), len(after)))
    if not spans:
        raise BadInput(f"{where} holds no message of the role assistant, so nothing could be learnt: remove it.")
    return whole, spans


def answers(table: Table, tokenizer: Any, options: Options, notes: list[str]) -> Texts:
    """Return conversations as tokens, with a target only where the assistant speaks, its end mark included."""
    if not tokenizer.chat_template:
        raise BadInput("the tokenizer has no chat template for prompts and responses: give one, or a column of text.")
    source = table.attrs["source"]
    made = [
        rendered(messages, tokenizer, f"row {row} of {source}")
        for row, messages in zip(rows_of(table), conversations(table, options), strict=True)
    ]
    encoded = tokenizer(
        [whole for whole, _ in made],
        add_special_tokens=False,
        truncation=True,
        max_length=options.length,
        return_offsets_mapping=True,
    )
    tokens, targets = [], []
    for row, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], made, strict=True):
        spoken = torch.tensor(
            [any(a <= start and end <= b and end > start for a, b in spans) for start, end in offsets]
        )
        ids = torch.tensor(row)
        target = shifted(ids.where(spoken, torch.tensor(IGNORE)))
        if bool((target != IGNORE).any()):
            tokens.append(ids)
            targets.append(target)
    if not tokens:
        raise BadInput(f"{source} has no response within {options.length} tokens: give a larger length.")
    if len(tokens) < len(made):
        notes.append(f"{len(made) - len(tokens)} of {len(made)} examples of {source} were left out: too long")
    return Texts(tokens, targets, tokenizer.pad_token_id)
