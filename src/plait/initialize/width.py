"""Starts and learning rates that follow a network's width: abc-parametrizations, of which muP is the one that learns
features at every width, and whose best learning rate stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Number
from plait.initialize.fresh import refuse_adapted
from plait.layers import CONVOLUTIONS, is_linear_map, is_transformers_conv1d, layers, matches, matrix_shape, own_bias
from plait.method import Method, Now, method
from plait.parametrize.base import Parametrization, attach
from plait.parametrize.low_rank import without_padding

Role = Literal["input", "hidden", "output"]
Exponents = dict[Role, tuple[Number, Number, Number]]
"""(a, b, c) for each role of a weight."""

ADAM: Exponents = {"input": (0, 0, 0), "hidden": (0, 0.5, 1), "output": (0, 1, 1)}
SGD: Exponents = {"input": (0, 0, -1), "hidden": (0, 0.5, 0), "output": (0, 1, 1)}
STANDARD: Exponents = {"input": (0, 0, 0), "hidden": (0, 0.5, 0), "output": (0, 0.5, 0)}
NTK: Exponents = {"input": (0, 0, 0), "hidden": (0.5, 0, 0), "output": (0.5, 0, 0)}

RULES = {
    "adam": {
        "Adam",
        "AdamW",
        "AdamP",
        "NAdam",
        "RAdam",
        "Adamax",
        "AdaBelief",
        "DiffGrad",
        "Adan",
        "ADOPT",
        "LaProp",
        "MARS",
        "Lion",
        "SignSGD",
        "RMSprop",
    },
    "sgd": {"SGD", "SGDW", "ASGD"},
}
"""Optimizers whose elementwise step does not depend on the gradient's size, and those whose step is in proportion."""

QUERIES = "q_proj|query|q_lin|to_q|wq"
QUERY_NORMS = "q_norm|q_layernorm|query_norm|layer_norm_q"
FUSED = "c_attn|qkv|qkv_proj|query_key_value|Wqkv|in_proj"


@dataclass(frozen=True)
class Width:
    """How many times as many outputs and inputs a weight has as at the base: 1 where their number is no width."""

    out: float = 1.0
    into: float = 1.0

    @property
    def role(self) -> Role:
        """Whether a weight leads into the width, stays in it, or leads out of it."""
        return "input" if self.into == 1 else "output" if self.out == 1 else "hidden"


class Multiplier(Parametrization):
    """W -> m W for a constant m; a bias stays as it is."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def dense(self, weight: Tensor) -> Tensor:
        """Return m W."""
        return self.factor * weight

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return m (W x) + bias, which forms no weight."""
        output, bias = below(), own_bias(layer)
        if bias is None:
            scaled: Tensor = self.factor * output
            return without_padding(layer, inputs, scaled)
        ones = (1,) * len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else ()
        joined: Tensor = self.factor * output + (1 - self.factor) * bias.to(output.dtype).view(-1, *ones)
        return joined


def base_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of a model's weights by name, as `MuP(base=...)` takes them; it may be on the meta device."""
    return {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def _is_first(layer: nn.Module) -> bool:
    return is_linear_map(layer) or isinstance(layer, nn.RNNBase)


@paper("yang2021feature", key="mup")
@method
class MuP(Method):
    """W = r^-a w,  std(w) = s r^-b,  learning rate lr r^-c: an abc-parametrization. r is how many times as wide the
    network is as its base, at which it is the network as given; s is the standard deviation there.

    The maximal update parametrization, which is the default, has a = 0 and

        weights from               b      c under Adam   c under SGD
        data to width, vectors     0      0              -1
        width to width             1/2    1              0
        width to outputs           1      1              1

    Then every activation moves by as much in a step at any width, and rates that are best for a narrow network are best
    for a wide one. r is that of a weight's inputs (of its outputs where the inputs are data; under SGD the rate of a
    weight from width to width takes both). These are Table 3 of Yang, Hu et al.'s "Tensor Programs V" (2022); the
    exponents of "Feature Learning in Infinite-Width Neural Networks", a = -1/2, 0, 1/2 with b = 1/2, c = 0 under SGD,
    are the same: (a + t, b - t, c - 2 t) trains alike under SGD, (a + t, b - t, c - t) under Adam without eps. Only an
    output layer that shares its weight with an embedding has a multiplier, r^-1.

    Attention divides by the size of heads, not its root: queries (or the gains of their norm) start r^-1/2 smaller
    and are stepped r^-1/2 (SGD: r^-1) times as far, r for that size. The rates are the optimizer's `rates`: parameter
    groups with rates of their own, and decays such that rate * decay is as it was. Adam's eps is not scaled, and should
    be small. What starts at zero, and norms, start as they did.

    base: the base's width (outputs of the model's first layer; then every size but those of data and outputs is a
    width, in proportion), or the base's shapes by name (`base_shapes(model)`), where the sizes that differ are widths.
    heads: of the base's attention; unless given, as many as here, and larger. inputs, outputs: layers that read data,
    that give the output; unless given, embeddings or else the first layer, and the last. start: how the start given
    depends on width, "fan-in" (torch's layers) or "constant" (transformers' `initializer_range`). rule: what the
    optimizer is like; "auto" knows Adam's and SGD's kin. exponents: (a, b, c) for "input", "hidden" and "output" in
    place of muP's; STANDARD and NTK are such. where: names of layers or weights. For starts from nothing: it rescales
    what it finds. Raises BadInput at the base's own width, for optimizers that scale by a whole weight, and for weights
    that an adapter or a start before it was made of.

    >>> model = nn.Sequential(nn.Linear(2, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False), nn.Linear(64, 3))
    >>> rule = torch.optim.Adam(model.named_parameters())
    >>> MuP(base=16).rates(model, rule)
    {'0.weight': 1.0, '2.weight': 0.25, '3.weight': 0.25, '3.bias': 1.0}
    """

    base: Count | dict[str, tuple[int, ...]]
    heads: Count | None = None
    inputs: str = ""
    outputs: str = ""
    start: Literal["auto", "fan-in", "constant"] = "auto"
    rule: Literal["auto", "adam", "sgd"] = "auto"
    exponents: Exponents | None = None

    # -- which sizes are widths ----------------------------------------------------------------------------------------
    def ends(self, model: nn.Module) -> tuple[set[str], set[str]]:
        """Return the names of the layers that read data, and of those that give the output."""
        first = {name for name, layer in layers(model, ".*", nn.Embedding)}
        if self.inputs:
            first = {name for name, _ in layers(model, self.inputs, _is_first)}
        elif not first:
            first = {name for name, _ in list(layers(model, ".*", _is_first))[:1]}
        if self.outputs:
            return first, {name for name, _ in layers(model, self.outputs)}
        found = getattr(model, "get_output_embeddings", lambda: None)()
        last = [name for name, layer in layers(model) if not isinstance(layer, nn.Embedding)][-1:]
        return first, {name for name, layer in layers(model) if layer is found} or set(last)

    def ratio(self, model: nn.Module, first: set[str], base: int) -> tuple[int, float]:
        """Return the model's width, and how many times the base's it is."""
        for name, layer in model.named_modules():
            if name in first:
                width = layer.hidden_size if isinstance(layer, nn.RNNBase) else matrix_shape(layer)[0]
                return width, width / base
        return base, 1.0

    def widths(self, model: nn.Module) -> dict[str, Width]:
        """Return how much wider each weight is than at the base, by name; a shared weight stands under each name."""
        found: dict[str, Width] = {}
        first, last = self.ends(model)
        for at, layer in model.named_modules():
            if ".plait" in f".{at}":
                continue
            for leaf, p in layer.named_parameters(recurse=False):
                name = f"{at}.{leaf}" if at else leaf
                if not (matches(self.where, name) or matches(self.where, at)):
                    continue
                if isinstance(self.base, dict):
                    shape = self.base.get(name, tuple(p.shape))
                    if len(shape) != p.dim():
                        raise BadInput(f"MuP: '{name}' has {p.dim()} dimensions, and {len(shape)} in base.")
                    grown = [size / before for size, before in zip(p.shape, shape, strict=True)]
                else:
                    size, times = self.ratio(model, first, self.base)
                    grown = self.grown(name, leaf, layer, p, at in first, at in last, size, times)
                if is_transformers_conv1d(layer) or isinstance(layer, nn.Embedding):
                    grown.reverse()  # [in, out]
                wide = [size for size in grown if size != 1]
                if is_linear_map(layer) and p.dim() > 1:
                    found[name] = Width(*grown[:2])
                else:
                    found[name] = Width(wide[0] if wide else 1.0, wide[-1] if len(wide) > 1 else 1.0)
        return found

    def grown(
        self, name: str, leaf: str, layer: nn.Module, p: Tensor, first: bool, last: bool, width: int, ratio: float
    ) -> list[float]:
        """Return how many times larger each dimension is than at a base of which only the width is known."""
        if first and last:
            return [1.0] * p.dim()
        out, into = 1.0 if last else ratio, 1.0 if first else ratio
        if is_linear_map(layer):
            if leaf != "weight":
                return [out] * p.dim()
            if isinstance(layer, CONVOLUTIONS):
                apart = layer.groups > 1 and layer.groups == layer.in_channels
                return [out, 1.0 if apart else into] + [1.0] * (p.dim() - 2)
            return [into, out] if is_transformers_conv1d(layer) or isinstance(layer, nn.Embedding) else [out, into]
        if p.dim() < 2:
            return [ratio if p.numel() > 1 else 1.0] * p.dim()
        if isinstance(layer, nn.RNNBase):
            return [ratio, into if leaf.startswith("weight_ih_l0") else ratio]
        if isinstance(layer, nn.MultiheadAttention):
            return [ratio] * p.dim() if leaf.endswith("weight") else [1.0, 1.0, ratio]
        if width not in p.shape:
            raise BadInput(
                f"MuP cannot tell which sizes of '{name}' {tuple(p.shape)} grow with the width {width}: give base as "
                "shapes, base_shapes(narrow_model)."
            )
        return [ratio if size == width else 1.0 for size in p.shape]

    def queries(self, model: nn.Module, widths: dict[str, Width]) -> dict[str, float]:
        """Return how many times larger the heads are, for the weights that make up for their size."""
        found: dict[str, float] = {}
        for at, layer in model.named_modules():
            named = f"{at}.in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else f"{at}.weight"
            fused = isinstance(layer, nn.MultiheadAttention) or (is_linear_map(layer) and matches(FUSED, at))
            if named not in widths or not (fused or (is_linear_map(layer) and matches(QUERIES, at))):
                continue
            parent = layer if isinstance(layer, nn.MultiheadAttention) else model.get_submodule(at.rpartition(".")[0])
            ratio = widths[named].out
            if self.heads is not None:
                here = _heads(parent) or _heads(getattr(parent, "config", None))
                if here is None:
                    raise BadInput(f"MuP cannot tell how many heads '{at}' has: leave heads out, or use where.")
                ratio *= self.heads / here
            if fused and ratio != 1:
                raise BadInput(
                    f"MuP cannot scale the queries in '{at}', which share a weight with keys: widen by more heads of "
                    "the same size, and give heads, the number at the base."
                )
            norms = [n for n, part in parent.named_children() if matches(QUERY_NORMS, n) and list(part.parameters())]
            above = at.rpartition(".")[0]
            targets = [f"{above}.{n}" if above else n for n in norms] or [at]
            for target in targets:
                for leaf, _ in model.get_submodule(target).named_parameters(recurse=False):
                    found[f"{target}.{leaf}"] = ratio
        return found

    # -- what follows from them ----------------------------------------------------------------------------------------
    def abc(self, kind: str) -> Exponents:
        """Return the exponents under a kind of optimizer."""
        return self.exponents or (SGD if kind == "sgd" else ADAM)

    def kind(self, rule: object) -> str:
        """Return whether an optimizer, or the method of one, is like Adam or like SGD."""
        if self.rule != "auto":
            return self.rule
        made = getattr(rule, "method", rule)
        names = {kind.__name__ for kind in type(made).__mro__}
        for kind, known in RULES.items():
            if names & known:
                return kind
        raise BadInput(
            f"MuP does not know how {type(made).__name__} steps: give rule='adam' if its step of an element does not "
            "depend on the gradient's size, rule='sgd' if it is in proportion, or use AdamW."
        )

    def shared(self, model: nn.Module, widths: dict[str, Width]) -> Iterator[tuple[str, nn.Parameter, list[str]]]:
        """Yield each weight once, with the name by which it is an input if it has one, and all its names."""
        names: dict[int, tuple[nn.Parameter, list[str]]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in widths:
                names.setdefault(id(p), (p, []))[1].append(name)
        for p, every in names.values():
            yield min(every, key=lambda name: widths[name].role != "input"), p, every

    def multipliers(self, model: nn.Module) -> dict[str, float]:
        """Return r^-a for the layers where it is not 1, by name."""
        widths, found = self.widths(model), dict[str, float]()
        exponents = self.abc("adam")
        for name, _, every in self.shared(model, widths):
            for other in every:
                if not other.endswith("weight") or not is_linear_map(model.get_submodule(other.rpartition(".")[0])):
                    continue
                a, b, _ = exponents[widths[other].role]
                if other != name and widths[other].role != widths[name].role:
                    a += b - exponents[widths[name].role][1]  # the start is another role's
                size = widths[other].out if widths[other].role == "input" else widths[other].into
                if size**-a != 1:
                    found[other.rpartition(".")[0]] = size**-a
        return found

    def starts(self, model: nn.Module) -> dict[str, float]:
        """Return what the start of each weight is multiplied by, by name."""
        widths, found = self.widths(model), dict[str, float]()
        queries, exponents = self.queries(model, widths), self.abc("adam")
        constant = self.start == "constant" or (self.start == "auto" and _has_range(model))
        multiplied = {f"{layer}.weight" if layer else "weight" for layer in self.multipliers(model)}
        for name, _, every in self.shared(model, widths):
            width, layer = widths[name], model.get_submodule(name.rpartition(".")[0])
            a, b, _ = exponents[width.role]
            size = width.out if width.role == "input" else width.into
            given = width.into  # torch's layers start with 1 / sqrt(inputs)
            if name.endswith("bias") and is_linear_map(layer):
                given = widths.get(f"{name.removesuffix('bias')}weight", Width()).into
            if isinstance(layer, nn.RNNBase):
                given = widths[name].out
            factor = size ** -(b if multiplied & set(every) else a + b)
            factor *= 1.0 if constant else given**0.5
            found[name] = factor * queries.get(name, 1.0) ** -0.5
        return found

    def rates(self, model: nn.Module, rule: torch.optim.Optimizer) -> dict[str, float]:
        """Return what the learning rate of each weight is multiplied by, by name."""
        kind, widths, found = self.kind(rule), self.widths(model), dict[str, float]()
        queries, exponents = self.queries(model, widths), self.abc(kind)
        multiplied = {f"{layer}.weight" if layer else "weight" for layer in self.multipliers(model)}
        power = 2 if kind == "sgd" else 1
        for name, _, every in self.shared(model, widths):
            width = widths[name]
            a, _, c = exponents[width.role]
            size = width.out if width.role == "input" else width.into
            found[every[0]] = size ** -(c if multiplied & set(every) else c + power * a)
            if self.exponents is None and kind == "sgd" and width.role == "hidden":
                found[every[0]] = width.out / width.into
            found[every[0]] *= queries.get(name, 1.0) ** (-power / 2)
        return found

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse optimizers that this is not defined for, weights that base does not name, and the base's own width."""
        steps = [m for m in methods if type(m).optimizer is not Method.optimizer]
        if steps:
            self.kind(steps[0])
        if isinstance(self.base, dict):
            names = [name for name, _ in model.named_parameters() if ".plait" not in f".{name}"]
            if missing := [name for name in names if name not in self.base]:
                raise BadInput(f"MuP.base has no shape for '{missing[0]}': give base_shapes(narrow_model).")
        widths = self.widths(model)
        if all(width == Width() for width in widths.values()):
            raise BadInput("MuP does nothing where the model is as wide as its base: give a base of another width.")
        self.queries(model, widths)

    def parametrize(self, model: nn.Module) -> None:
        """Multiply the layers that need it."""
        for name, factor in self.multipliers(model).items():
            attach(model.get_submodule(name), "multiplier", Multiplier(factor))

    @torch.no_grad()
    def initialize(self, model: nn.Module, now: Now) -> None:
        """Scale the start of each weight."""
        starts = {model.get_parameter(name): factor for name, factor in self.starts(model).items()}
        refuse_adapted(self, model, (p for p, factor in starts.items() if factor != 1))
        for p, factor in starts.items():
            p.mul_(factor)


def _has_range(model: nn.Module) -> bool:
    """Say whether a model starts all its matrices alike, whatever their size, as transformers' models do."""
    return any(hasattr(getattr(part, "config", None), "initializer_range") for part in model.modules())


def _heads(holder: object) -> int | None:
    found = getattr(holder, "num_attention_heads", None) or getattr(holder, "num_heads", None)
    return found if isinstance(found, int) else None
