"""What is trained beside adapters: freezing a pretrained model, but for what a task added to it."""

from __future__ import annotations

from torch import nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.layers import require_weights, within
from plait.math.packed import Packed
from plait.method import Method, method
from plait.parametrize.refusals import refuse_absent


def mark_fresh(model: nn.Module, *names: str) -> nn.Module:
    """Record the layers whose weights a task made anew (a classification head): adapters leave them trained."""
    model._plait_fresh = (*fresh(model), *names)  # type: ignore[assignment]
    return model


def fresh(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that are new with the task."""
    names: tuple[str, ...] = getattr(model, "_plait_fresh", ())
    return names


def is_fresh(model: nn.Module, name: str) -> bool:
    """Say whether a layer or parameter belongs to what is new with the task."""
    name = name.removeprefix("_orig_mod.")  # which torch.compile puts before the names of a model's parts
    return any(name == head or name.startswith(f"{head}.") for head in fresh(model))


def trainable(name: str, parameter: nn.Parameter, wanted: bool) -> bool:
    """Return whether a parameter is to be trained as is wanted; refuse a quantized one."""
    if wanted and isinstance(parameter, Packed):
        raise BadInput(f"'{name}' is quantized and cannot be trained: leave it out of Quantize with where.")
    return wanted


def freeze(model: nn.Module, train: str = "") -> None:
    """Freeze every parameter but those of parametrizations, of fresh layers, and those that `train` names (or the layer
    that holds them), here or in an earlier call: a second adapter does not freeze what the first one asked to train.

    >>> model = mark_fresh(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), "1")
    >>> freeze(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['1.weight', '1.bias']
    """
    asked: tuple[str, ...] = getattr(model, "_plait_train", ())
    asked = (*asked, train) if train else asked
    model._plait_train = asked  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        if ".plait." in f".{name}" or is_fresh(model, name):
            continue
        parameter.requires_grad_(trainable(name, parameter, any(within(pattern, name) for pattern in asked)))


@paper("yosinski2014transferable", key="freeze", kind="ground")
@method
class Freeze(Method):
    """Freeze the weights whose name, or whose layer's name, `where` matches, and train the others.

    Adapters, and what `keep` matches, are trained though `where` matches them. Raises BadInput where nothing would be.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> Freeze(where="0").parametrize(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['1.weight', '1.bias']
    """

    keep: str = ""

    def frozen(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that are frozen."""
        return [
            p
            for name, p in model.named_parameters()
            if ".plait." not in f".{name}" and within(self.where, name) and not self._kept(name)
        ]

    def _kept(self, name: str) -> bool:
        return bool(self.keep) and within(self.keep, name)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse weights that are not there yet, and a pattern that freezes nothing, or everything."""
        frozen, title = {id(p) for p in self.frozen(model)}, type(self).__name__
        for name, parameter in model.named_parameters():
            refuse_absent(title, f"'{name}'", parameter)
        require_weights(f"{title}.keep", self.keep, model)
        if not frozen:
            raise BadInput(f"{title} would freeze nothing: change where or keep, or drop it.")
        self._refuse_late(model, methods)
        adds = any(type(m).parametrize is not Method.parametrize for m in methods if not isinstance(m, Freeze))
        if not adds and all(id(p) in frozen for p in model.parameters() if p.requires_grad):
            raise BadInput(f"{title} would freeze every weight: narrow where, or name in keep what is to be trained.")

    def _refuse_late(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse to come after an adapter that has frozen all of it."""
        from plait.parametrize.base import Adapter
        from plait.parametrize.prompt import PromptMethod

        earlier = [m for m in methods[: methods.index(self)] if isinstance(m, Adapter | PromptMethod)]
        frozen = {id(p) for p in self.frozen(model)}
        fresh = any(id(p) in frozen and is_fresh(model, name) for name, p in model.named_parameters())
        trained = fresh or any(m.train for m in earlier)
        if earlier and not self.keep and not trained:
            title, adapter = type(self).__name__, type(earlier[0]).__name__
            raise BadInput(f"{adapter} freezes the weights that {title} names: put {title} first, or drop it.")

    def parametrize(self, model: nn.Module) -> None:
        """Freeze them."""
        self.check(model, [self])
        if self.keep:  # an adapter that comes later leaves it trained too
            model._plait_train = (*getattr(model, "_plait_train", ()), self.keep)  # type: ignore[assignment]
            for name, parameter in model.named_parameters():
                if self._kept(name):
                    parameter.requires_grad_(trainable(name, parameter, True))
        for parameter in self.frozen(model):
            parameter.requires_grad_(False)


@paper("benzaken2022bitfit", key="bitfit", kind="ground")
@method
class BitFit(Freeze):
    """W stays, b is trained: every weight but the biases is frozen, and what is new with the task.

    where: among which layers' weights. keep: what else is trained; the default is every bias. Raises BadInput where
    `keep` matches no weight, as in a model without biases, and where nothing, or every weight, would be frozen.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1, bias=False))
    >>> BitFit().parametrize(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.bias', '1.bias']
    """

    keep: str = "bias"

    def frozen(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that are frozen."""
        heads = {id(p) for name, p in model.named_parameters() if is_fresh(model, name)}
        return [p for p in super().frozen(model) if id(p) not in heads]
