"""Self-tuning networks: layers that know how they would change with the hyperparameters, which follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.catalogue import paper
from plait.fields import Count, NonNegative, Positive
from plait.layers import CONVOLUTIONS, is_transformers_conv1d, own_bias, own_weight
from plait.loops.tuning import FURTHEST, Tuner, adam_step, knobs, set_numbers
from plait.method import Ask, Method, Now, method
from plait.parametrize.base import Parametrization, Parametrize, attach, attached, stack
from plait.parametrize.folding import fold


class BestResponse(Parametrization):
    """W -> W + diag(V d) R, and the bias b -> b + (C d) * r, for the hyperparameters' distance d [h] from their start.

    R [out, in] and r [out] begin as a layer's weights do, V and C [out, h] at 0. `settle` gives them their width.
    """

    deviation: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        bound = weight.shape[1] ** -0.5

        def uniform(like: Tensor) -> nn.Parameter:
            drawn = torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False)
            return nn.Parameter(drawn.uniform_(-bound, bound))

        self.response = uniform(weight)
        self.scaling = nn.Parameter(weight.new_zeros(len(weight), 0))
        self.bias_response = None if bias is None else uniform(bias)
        self.bias_scaling = None if bias is None else nn.Parameter(weight.new_zeros(len(weight), 0))
        self.register_buffer("deviation", torch.zeros(0))

    def settle(self, count: int) -> None:
        """Give V and C a column for each of the hyperparameters."""
        for parameter in (self.scaling, self.bias_scaling):
            if parameter is not None:
                parameter.data = parameter.data.new_zeros(len(parameter), count)
        self.deviation = self.response.new_zeros(count, dtype=torch.float32)

    def dense(self, weight: Tensor) -> Tensor:
        """Return W + diag(V d) R."""
        if not len(self.deviation):
            return weight
        return weight + (self.scaling @ self.deviation.to(self.scaling))[:, None] * self.response

    def shift(self) -> Tensor | None:
        """Return (C d) * r."""
        if self.bias_scaling is None or self.bias_response is None or not len(self.deviation):
            return None
        return (self.bias_scaling @ self.deviation.to(self.bias_scaling)) * self.bias_response

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        loaded = state_dict.get(f"{prefix}deviation")
        if loaded is not None:
            self.deviation = torch.zeros_like(loaded, device=self.response.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@paper("mackay2019selftuning", key="stn", theme="bilevel")
@method
class STN(Tuner, Parametrize):
    """w(u) = W + diag(V (u - u_0)) R, b(u) likewise; train: min_{W, V, R} E f(u + e, w(u + e)), e ~ N(0, s^2);
    validation: u <- u - lr grad_u E [F(w(u + e))] + entropy * grad_s sum log s: self-tuning networks.

    Each layer learns, beside its weight, how the best weight changes with the hyperparameters u around where they are,
    for which they are perturbed in every training step; through that response the validation loss has a gradient in u.
    Nothing is asked of how a hyperparameter acts: rates of dropout and strengths of noise are tuned as well as
    penalties. u are the raw numbers (logarithms, logits) of the fields that are `Tuned`, u_0 their start.

    lr: of Adam on u and s. train_steps, validation_steps: how many of each alternate. warmup: training steps before u
    moves. scale: the first s. tune_scale: whether s is learned, held up by `entropy`; otherwise s stays, and u is moved
    at its mean, as in the authors' code. One e is drawn for a step, for all its examples (theirs: one an example). The
    validation loss is taken in evaluation mode, without penalties. where: the layers that respond; each costs two
    further weights of its size in training, and none after it: the last response is folded into the weight, and a bias.
    Raises BadInput without a validation set, or where nothing is `Tuned`.

    >>> from plait import schedule, train
    >>> from plait.penalty.norm import L2
    >>> from plait.step.adam import AdamW
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> data, tuner = (x, x.sum(1)), STN(lr=0.1, warmup=20)
    >>> methods = [L2(strength=schedule.Tuned(start=0.1)), tuner, AdamW(lr=0.03)]
    >>> _ = torch.manual_seed(0)
    >>> run = train(nn.Linear(3, 1), data, methods=methods, validation=data, steps=120)
    >>> run.measures[repr(tuner)][-1]["L2.strength"] < 0.05
    True
    """

    lr: Positive = 3e-3
    scale: Positive = 0.5
    tune_scale: bool = True
    entropy: NonNegative = 1e-3
    train_steps: Count = 2
    validation_steps: Count = 1

    def targets(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the layers that respond: those of which something is trained."""
        return [(n, m) for n, m in super().targets(model) if any(p.requires_grad for p in m.parameters())]

    def build(self, layer: nn.Module, weight: Tensor) -> BestResponse:
        """Return the response of one layer."""
        affine = isinstance(layer, (nn.Linear, *CONVOLUTIONS)) or is_transformers_conv1d(layer)
        return BestResponse(weight, own_bias(layer) if affine else None)

    def parametrize(self, model: nn.Module) -> None:
        """Attach a response to each target."""
        from plait.layers import matrix

        for _, layer in self.targets(model):
            attach(layer, "stn", self.build(layer, matrix(layer, own_weight(layer))))

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse targets that match nothing, and a list in which nothing is to be tuned."""
        Parametrize.check(self, model, methods)
        super().check(model, methods)

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Give the responses as many columns as there are hyperparameters."""
        super().initialize(model, now)
        count = len(self.state(model, now)["raw"])
        for part in responses(model):
            part.settle(count)

    def state(self, model: nn.Module, now: Now) -> dict[str, Tensor]:
        """Return the memory: the raw numbers, where they started, and the inverse softplus of each scale."""
        state = super().state(model, now)
        if "spread" not in state:
            state["start"] = state["raw"].clone()
            state["spread"] = torch.full_like(state["raw"], self.scale).expm1().log()
        return state

    def tune(self, model: nn.Module, now: Now) -> None:
        """Move u and s down the validation loss, at the steps at which that is due."""
        state = self.state(model, now)
        late = now.step - self.warmup
        if late < 0 or now.step == 0 or late % self.train_steps:
            return
        for _ in range(self.validation_steps):
            raw, spread = (state[name].clone().requires_grad_() for name in ("raw", "spread"))
            noise = torch.randn(raw.shape, generator=now.generator) if self.tune_scale else torch.zeros_like(raw)
            width = F.softplus(spread)
            respond(model, raw + width * noise - state["start"])
            value = now.validate(model, self.validation_batch(state)) - self.entropy * width.log().sum().to(
                model_device(model)
            )
            found = torch.autograd.grad(value, (raw, spread), allow_unused=True, materialize_grads=True)
            if all(bool(torch.isfinite(g).all()) for g in found):
                adam_step(state, "raw", found[0], self.lr)
                state["raw"] = state["raw"].clamp(-FURTHEST, FURTHEST)
                if self.tune_scale:
                    adam_step(state, "spread", found[1], self.lr)
        respond(model, state["raw"] - state["start"])

    def gradient(self, ask: Ask) -> Ask:
        """Ask at hyperparameters that are perturbed, of weights that respond to them."""

        def asking(model: nn.Module, now: Now) -> Tensor:
            state = self.state(now.model, now)
            respond(now.model, state["perturbed"] - state["start"])
            value = ask(model, now)
            respond(now.model, state["raw"] - state["start"])
            return value

        return asking

    def batch(self, batch: Any, now: Now) -> Any:
        """Tune, and perturb the numbers for this step; the batch stays as it is."""
        batch, state = super().batch(batch, now), self.state(now.model, now)
        noise = torch.randn(state["raw"].shape, generator=now.generator)
        state["perturbed"] = (state["raw"] + F.softplus(state["spread"]) * noise).clamp(-FURTHEST, FURTHEST)
        set_numbers(now, knobs(now.model, now.methods), state["perturbed"])
        return batch

    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Fold the last response, where nothing else stands on the layers; otherwise it stays, and `Fold` folds all."""
        ours = all(isinstance(part, BestResponse) for layer in model.modules() for part in stack(layer))
        return fold(model) if ours else model


def responses(model: nn.Module) -> Iterator[BestResponse]:
    """Yield the responses of all layers."""
    for _, _, part in attached(model, BestResponse):
        yield part


def respond(model: nn.Module, deviation: Tensor) -> None:
    """Let every layer respond to hyperparameters so far from their start."""
    for part in responses(model):
        part.deviation = deviation.to(part.response.device)


def model_device(model: nn.Module) -> torch.device:
    """Return where the model's weights are."""
    return next(model.parameters()).device
