"""Soft prompts: trained vectors that join what a frozen transformer reads, in place of a change of its weights.

A prompt lies on the transformer's backbone, the part that turns tokens into hidden states. A hook puts its vectors
before the embedded tokens, or its keys and values before every layer's, and makes attention mask, positions and token
types as long; another drops the places of the prompt again, so that heads, losses and targets see the tokens alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.layers import require_weights
from plait.method import Method, method
from plait.parametrize.low_rank import adapter_dtype

NEEDED = ("input_ids", "inputs_embeds", "attention_mask")
"""What a backbone must take to be given a prompt."""


class SoftPrompt(nn.Module):
    """What joins the input: `length` places before the tokens, each a vector, or (`cached`) a key and a value in every
    layer.
    """

    cached: ClassVar[bool] = False
    length: int

    def vectors(self, embedded: Tensor, mask: Tensor, ids: Tensor | None) -> Tensor | None:
        """Return the vectors before the tokens, [n, length, d] or [1, length, d], or None if there are none.

        embedded: the tokens' embeddings, [n, T, d]. mask: 1 at tokens and 0 at padding, [n, T]. ids: the tokens,
        [n, T], where the model was given them.
        """
        return None

    def shifted(self, embedded: Tensor, places: Tensor) -> Tensor:
        """Return what the model is to read of tokens: their embeddings [n, T, d], at these places [n, T] of a text."""
        return embedded

    def keys_values(self) -> Tensor | None:
        """Return the keys and values before every layer's, [layers, 2, heads, length, d_head], or None."""
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):  # a checkpoint of the base model: it all stays
            state_dict |= self.state_dict(prefix=prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class SoftPrompts(nn.ModuleDict):
    """The soft prompts of one backbone, by name, in the order in which they stand before the tokens.

    added: how many vectors the pass under way has before its tokens. own_cache: whether its keys and values are a
    prefix's alone, that nobody asked for.
    """

    added, own_cache = 0, False

    def prompts(self) -> list[SoftPrompt]:
        """Return them."""
        return cast("list[SoftPrompt]", list(self.values()))

    def before(self, prompt: SoftPrompt) -> int:
        """Return how many vectors stand before those of a prompt."""
        prompts = self.prompts()
        return sum(other.length for other in prompts[: prompts.index(prompt)] if not other.cached)

    @property
    def length(self) -> int:
        """Return how many places they take in all."""
        return sum(prompt.length for prompt in self.prompts())


def soft_prompts(model: nn.Module) -> Iterator[SoftPrompts]:
    """Yield the soft prompts that a model holds, by backbone."""
    return (part for part in model.modules() if isinstance(part, SoftPrompts) and len(part) > 0)


def refuse_prompts(model: nn.Module, deed: str) -> None:
    """Refuse what a model with soft prompts cannot do: they change what it reads and none of its weights."""
    if any(True for _ in soft_prompts(model)):
        raise BadInput(
            f"a soft prompt changes what the model reads and none of its weights, so it cannot be {deed}: keep the "
            "model as it is, or export it with --to onnx (--to peft, for prompt and prefix tuning)."
        )


# -- the backbone ------------------------------------------------------------------------------------------------------
def backbone_of(title: str, model: nn.Module) -> Any:
    """Return the part of a transformers model that turns tokens into hidden states; BadInput if there is none."""
    for part in model.modules():
        if not (hasattr(part, "get_input_embeddings") and hasattr(part, "base_model")):
            continue
        backbone: Any = part.base_model
        if getattr(backbone.config, "is_encoder_decoder", False):
            raise BadInput(f"{title} reads one text, and {type(part).__name__} two: take an encoder or a decoder.")
        inner = getattr(backbone, "decoder", None)
        if hasattr(inner, "get_input_embeddings"):
            backbone = inner  # OPT's head calls it by itself, past what stands around it
        if not set(NEEDED) <= set(names_of(backbone)):
            break
        return backbone
    raise BadInput(f"{title} needs a transformers model that reads tokens, not {type(model).__name__}: drop {title}.")


def trunk_of(backbone: nn.Module) -> nn.Module:
    """Return the part whose output is the last hidden states of all places, before anything is pooled of them."""
    encoder = getattr(backbone, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) else backbone


def layers_of(backbone: Any) -> nn.ModuleList:
    """Return the layers of a backbone, first to last."""
    count = backbone.config.num_hidden_layers
    return next(m for m in trunk_of(backbone).modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def names_of(backbone: nn.Module) -> list[str]:
    """Return the names of what a backbone's forward takes."""
    return list(inspect.signature(type(backbone).forward).parameters)[1:]


def attached_to(backbone: nn.Module) -> SoftPrompts:
    """Return the soft prompts of a backbone that has some."""
    held = backbone.plait
    assert isinstance(held, SoftPrompts)
    return held


def attach(backbone: nn.Module, name: str, prompt: SoftPrompt) -> None:
    """Put a prompt after those that a backbone already has."""
    held = getattr(backbone, "plait", None)
    if not isinstance(held, SoftPrompts):
        held = backbone.plait = SoftPrompts()
        backbone.register_forward_pre_hook(_join, with_kwargs=True)
        trunk_of(backbone).register_forward_hook(partial(_part, held))
    free = name if name not in held else next(f"{name}_{n}" for n in range(2, 10_000) if f"{name}_{n}" not in held)
    held[free] = prompt.to(next(backbone.parameters()).device).train(backbone.training)


# -- the pass ----------------------------------------------------------------------------------------------------------
def _join(backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the prompts before the tokens of one pass."""
    held: SoftPrompts = backbone.plait
    given = dict(zip(names_of(backbone), args, strict=False)) | kwargs
    ids, embedded, cache = (given.pop(name, None) for name in ("input_ids", "inputs_embeds", "past_key_values"))
    embedded = backbone.get_input_embeddings()(ids) if embedded is None else embedded
    seen, held.added = 0 if cache is None else cache.get_seq_length(), 0
    held.own_cache = cache is None and given.get("use_cache") is False
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise BadInput(
            "a soft prompt needs an attention_mask of one number a token, [n, T]: leave it so, and the cache dynamic."
        )
    if mask is None:
        mask = torch.ones(len(embedded), max(seen - held.length, 0) + embedded.shape[1], device=embedded.device)
        mask = mask.long()
    if mask.shape[1] + held.length == max(seen, held.length) + embedded.shape[1]:
        mask = torch.cat([mask.new_ones(len(mask), held.length), mask], 1)
    places = (mask[:, held.length :].long().cumsum(1) - 1).clamp_min(0)[:, -embedded.shape[1] :]  # without padding
    for prompt in held.prompts():
        embedded = prompt.shifted(embedded, places)
    if seen == 0:
        embedded = _lengthened(backbone, embedded, mask[:, held.length :], ids, given)
        cache = _with_prefix(backbone, len(embedded), cache)
    elif given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"] + held.length
    return (), {**given, "inputs_embeds": embedded, "attention_mask": mask} | (
        {} if cache is None else {"past_key_values": cache}
    )


def _lengthened(backbone: Any, embedded: Tensor, mask: Tensor, ids: Tensor | None, given: dict[str, Any]) -> Tensor:
    """Return the vectors of the prompts and the embedded tokens, [n, p + T, d]; positions and types made as long."""
    held: SoftPrompts = backbone.plait
    made = [vectors for prompt in held.prompts() if (vectors := prompt.vectors(embedded, mask, ids)) is not None]
    before = [vectors.to(embedded.dtype).expand(len(embedded), -1, -1) for vectors in made]
    held.added = sum(vectors.shape[1] for vectors in before)
    _refuse_too_long(backbone, held.length, embedded.shape[1])
    if (positions := given.get("position_ids")) is not None:
        first = torch.arange(held.length - held.added, held.length, device=positions.device)
        given["position_ids"] = torch.cat([first.expand(len(positions), -1), positions + held.length], 1)
    if (types := given.get("token_type_ids")) is not None:
        given["token_type_ids"] = torch.cat([types.new_zeros(len(types), held.added), types], 1)
    return torch.cat([*before, embedded], 1)


def _refuse_too_long(backbone: Any, places: int, tokens: int) -> None:
    most = getattr(backbone.config, "max_position_embeddings", None)
    table = not any("rotary" in name for name, _ in backbone.named_children())
    if isinstance(most, int) and places + tokens > most and table:
        raise BadInput(
            f"{tokens} tokens and {places} places of soft prompts are more than the {most} positions that "
            f"{type(backbone).__name__} has: shorten the texts (data.length) or the prompt."
        )


def _with_prefix(backbone: Any, count: int, cache: Any) -> Any:
    """Return a cache that begins with the keys and values of the prompts, or the one given if they have none."""
    for prompt in backbone.plait.prompts():
        if (made := prompt.keys_values()) is None:
            continue
        if cache is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=backbone.config)
        if any(getattr(layer, "gradient_checkpointing", False) for layer in layers_of(backbone)):
            raise BadInput("a prefix cannot work under gradient checkpointing, which drops its keys: disable it.")
        device = made.device.type
        lower = torch.is_autocast_enabled(device)
        made = made.to(torch.get_autocast_dtype(device) if lower else backbone.get_input_embeddings().weight.dtype)
        for number, (keys, values) in enumerate(made):
            cache.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), number)
    return cache


def _part(held: SoftPrompts, trunk: nn.Module, args: Any, output: Any) -> Any:
    """Drop the places of the prompts from the last hidden states, and keys and values that nobody asked for."""
    if held.own_cache and getattr(output, "past_key_values", None) is not None:
        output.past_key_values = None  # some models return what they were given: a second pass would go on from it
    if held.added == 0:
        return None
    if isinstance(output, Tensor):
        return output[:, held.added :]
    if isinstance(output, tuple):
        return (output[0][:, held.added :], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:, held.added :]
    return output


# -- methods -----------------------------------------------------------------------------------------------------------
@method
class PromptMethod(Method):
    """A method that trains soft prompts in place of the model: all else is frozen, but for heads that are new, adapters
    and the layers or parameters that `train` names, as beside an adapter.
    """

    excludes = ("Fold",)
    train: str = ""

    def build(self, backbone: Any) -> SoftPrompt:
        """Return the prompt of a backbone."""
        raise NotImplementedError

    def parametrize(self, model: nn.Module) -> None:
        """Freeze the model and put the prompt before what it reads."""
        from plait.parametrize.freeze import freeze
        from plait.parametrize.lean import spare
        from plait.parametrize.origin import record_origin

        self.check(model, [self])
        require_weights(f"{type(self).__name__}.train", self.train, model)
        record_origin(model)
        freeze(model, self.train)
        spare(model)
        backbone = backbone_of(type(self).__name__, model)
        self.attach(backbone, self.build(backbone))

    def attach(self, backbone: Any, prompt: SoftPrompt) -> None:
        """Put the prompt before what the backbone reads."""
        attach(backbone, type(self).__name__.lower(), prompt)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse models that read no tokens, and a choice of layers."""
        title = type(self).__name__
        backbone_of(title, model)
        if self.where != ".*":
            raise BadInput(f"{title} acts on what the whole model reads: leave out where.")


class Vectors(SoftPrompt):
    """[P; E(x)]: P, [length, d], is the parameter itself."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.length = len(start)
        self.P = nn.Parameter(start.detach().to(adapter_dtype(start)).clone())

    def flat(self) -> Tensor:
        """Return P."""
        return self.P

    def vectors(self, embedded: Tensor, mask: Tensor, ids: Tensor | None) -> Tensor:
        """Return P, alike for every example: [1, length, d]."""
        return self.P.unsqueeze(0)


def words_of(title: str, backbone: Any, words: tuple[int, ...], count: int) -> Tensor:
    """Return some tokens repeated or cut to so many, [count]; drawn from the vocabulary where none are given."""
    table: nn.Embedding = backbone.get_input_embeddings()
    if wrong := [word for word in words if not 0 <= word < table.num_embeddings]:
        raise BadInput(f"{title}.words has the token {wrong[0]}: give tokens from 0 to {table.num_embeddings - 1}.")
    ids = torch.tensor(words).repeat(-(-count // len(words)))[:count] if words else None
    return (torch.randint(table.num_embeddings, (count,)) if ids is None else ids).to(table.weight.device)


@paper("lester2021prompt", key="prompt-tuning", kind="ground")
@method
class PromptTuning(PromptMethod):
    """f([P; E(x)]) with f and the embedding E frozen: P, [tokens, d], are trained vectors before the text x.

    tokens: how many. start: "vocabulary" draws the embeddings of as many words; "uniform" draws from [-0.5, 0.5].
    words: tokens to start from in place of that, repeated or cut to the length (a description of the task, the names of
    its classes). Positions count from the prompt on. Where the first place of a text is pooled (BERT), it is the first
    of the text, not of the prompt, unlike in peft. Raises BadInput for models that are no encoder or decoder of
    transformers.

    >>> from plait.models.small import llama_tiny
    >>> model = llama_tiny()
    >>> PromptTuning(tokens=4).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('model.plait.prompttuning.P', (4, 64))]
    >>> model(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 3, 260])
    """

    tokens: Count = 20
    start: Literal["vocabulary", "uniform"] = "vocabulary"
    words: tuple[int, ...] = ()

    def build(self, backbone: Any) -> Vectors:
        """Return the prompt at its start."""
        ids = words_of(type(self).__name__, backbone, self.words, self.tokens)
        with torch.no_grad():
            embedded: Tensor = backbone.get_input_embeddings()(ids)
        return Vectors(embedded if self.words or self.start == "vocabulary" else torch.rand_like(embedded) - 0.5)
