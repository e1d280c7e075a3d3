"""How rich or lazy learning was: how far kernel, representation and weights moved, and of what rank they started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from plait.batch import Batch
from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.layers import Kinds, evaluating, hooked, is_linear_map, layers, matrix, require_layers
from plait.math.logits import dense
from plait.math.per_example import per_example_jacobians
from plait.measure.base import remember, remembered, untouched
from plait.method import Method, Now, method
from plait.parametrize.base import dense_weight
from plait.sharding import full

LARGEST = 8192
"""A kernel has at most so many rows: examples times outputs."""


def effective_rank(matrix: Tensor) -> float:
    """Return exp(- sum_i p_i ln p_i), p_i = s_i / sum_j s_j the singular values' shares (Roy and Vetterli, 2007).

    From 1, for a matrix of rank 1, to min(out, in), where all singular values are equal; 0 for a matrix of zeros.

    >>> round(effective_rank(torch.eye(4)), 4), round(effective_rank(torch.ones(4, 4)), 4)
    (4.0, 1.0)
    """
    values = torch.linalg.svdvals(matrix.double())
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp()) if float(values.sum()) > 0 else 0.0


def alignment(one: Tensor, other: Tensor) -> float:
    """Return <K, K'> / (|K| |K'|) of two matrices, in [-1, 1]: 1 where one is a multiple of the other; 0 for zeros.

    >>> alignment(torch.eye(2), 3 * torch.eye(2))
    1.0
    """
    one, other = one.double(), other.double()
    norms = torch.linalg.matrix_norm(one) * torch.linalg.matrix_norm(other)
    return min(float((one * other).sum() / norms), 1.0) if float(norms) > 0 else 0.0


@contextlib.contextmanager
def awake(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters ask for gradients, also those that rest."""
    rest = [p for p in parameters if not p.requires_grad]
    for p in rest:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in rest:
            p.requires_grad_(False)


@paper("liu2024connectivity", key="rich-lazy", kind="probe")
@method
class Laziness(Method):
    """tr(K_0 K_t) / (|K_0| |K_t|) of the tangent kernel K = J J^T, the same of the representation's kernel R = H H^T,
    and |W_t - W_0|: 1, 1 and 0 where learning was lazy, a linear model on features that stay as they were; less, less
    and more the richer it was. Beside them the effective rank of the weights that learning began with.

    Starts of high rank lead to lazy learning, starts of low rank and the same norm to rich learning, unless they are
    aligned with the task, for then little has to change (Liu et al.).

    J [examples * outputs, parameters]: the derivatives of the outputs in the parameters that are trained at the start
    and that `where` names, on `count` training examples in evaluation mode. H [examples, features]: what enters
    `layer`, by default the linear map that runs last, averaged over tokens. Effective rank: exp of the entropy of the
    singular values' shares (Roy and Vetterli's; the authors' code cuts ranks off and needs none). The kernels follow
    that code, which takes J in the recurrent weights alone: name them in `where`. Memory: the weights as they began, J,
    and K.

    Returns {"kernel alignment", "representation alignment", "sign similarity" (the part of H whose signs stayed),
    "weight change" (|W_t - W_0| over all), "relative change" (the same over |W_0|), "effective rank" (mean over the
    matrices now), "effective rank at start", "part of full rank at start"}. Raises BadInput where nothing is trained,
    and for models with thousands of outputs, such as language models.

    >>> from plait import train
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(4, 2), (x, (x[:, 0] > 0).long()), methods=[Laziness()], steps=20)
    >>> round(run.measures["Laziness()"][-1]["kernel alignment"], 6)  # a linear model has one kernel
    1.0
    """

    count: Count = 32
    layer: str = ""

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a layer that does not exist, or several."""
        if self.layer and len(found := require_layers(self, model, self.layer, nn.Module)) > 1:
            raise BadInput(
                f"Laziness(layer={self.layer!r}) matches '{found[0][0]}' and '{found[1][0]}': name one layer."
            )

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Remember kernel, representation, weights and ranks as they are before the first step."""
        held = now.of(self)
        held.clear()
        with untouched(model, now, {repr(self)}):
            remember(model, self.where, held)
            held["kernel"], held["hidden"] = self.kernel_and_representation(model, now)
            every = layers(model, self.where)
            names = [name for name, layer in every if any(p.requires_grad for p in layer.parameters())]
            held |= {f"rank/{name}": rank for name, rank in self.ranks(model, names).items()}

    @torch.no_grad()
    def ranks(self, model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
        """Return (effective rank, full rank) of the weight that each of these layers uses: [2]."""
        found = {}
        for name in names:
            layer = model.get_submodule(name)
            weight = matrix(layer, dense_weight(layer))
            found[name] = torch.tensor([effective_rank(weight), float(min(weight.shape))], dtype=torch.float64)
        return found

    def kernel_and_representation(self, model: nn.Module, now: Now) -> tuple[Tensor, Tensor]:
        """Return J J^T [examples * outputs, the same] and H [examples, features], on the same examples each time."""
        parameters = remembered(model, now.of(self))
        jacobians: list[dict[str, Tensor]] = []
        hidden: list[Tensor] = []
        with evaluating(model), awake(parameters.values()):
            for batch in self.samples(now):
                hidden.append(self.representation(model, batch, now))
                jacobians.append(per_example_jacobians(model, parameters, batch, now)[0])
        kernel = sum(
            rows @ rows.T for rows in (torch.cat([j[name] for j in jacobians]).double() for name in parameters)
        )
        return torch.as_tensor(kernel).detach(), torch.cat(hidden)

    def samples(self, now: Now) -> Iterator[Batch]:
        """Yield `count` training examples, in batches, always the same."""
        left = min(self.count, now.examples or self.count)
        for batch in now.calibration(left):
            yield batch.take(slice(0, left))
            left -= len(batch)
            if left <= 0:
                return

    @torch.no_grad()
    def representation(self, model: nn.Module, batch: Batch, now: Now) -> Tensor:
        """Return what enters the layer, by example: [examples, features], the mean over tokens where there are any."""
        kinds: Kinds = nn.Module if self.layer else is_linear_map
        seen: list[Tensor] = []

        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], into: list[Tensor]) -> None:
            into[:] = [inputs[0].detach()]

        found = layers(model, self.layer or ".*", kinds)
        with hooked(layer.register_forward_pre_hook(partial(keep, into=seen)) for _, layer in found):
            outputs = dense(now.call(model, batch.inputs)).numel() // len(batch)
        if outputs * self.count > LARGEST:
            rows = f"{self.count} examples times {outputs} outputs"
            raise BadInput(f"Laziness would form a kernel of {rows}, squared: lower count, or drop it.")
        if not seen:
            raise BadInput("Laziness finds no linear map whose input is the representation: name a layer (layer=...).")
        hidden = seen[0].double()
        return hidden.mean(1) if hidden.dim() == 3 else hidden.flatten(1)

    def measure(self, model: nn.Module, now: Now) -> dict[str, float]:
        """Return how far training has moved the model since it began."""
        held = now.of(self)
        if "kernel" not in held:
            raise BadInput("Laziness did not see the start: put it in the list of methods before training.")
        kernel, hidden = self.kernel_and_representation(model, now)
        before, moved, size = held["hidden"], 0.0, 0.0
        for name, p in remembered(model, held).items():
            start = held[f"start/{name}"]
            moved += float((full(p.detach()) - start).double().square().sum())
            size += float(start.double().square().sum())
        figures = {
            "kernel alignment": alignment(held["kernel"], kernel),
            "representation alignment": alignment(before @ before.T, hidden @ hidden.T),
            "sign similarity": float((hidden.sign() == before.sign()).double().mean()),
            "weight change": moved**0.5,
            "relative change": (moved / size) ** 0.5 if size else 0.0,
        }
        if began := {name.removeprefix("rank/"): rank for name, rank in held.items() if name.startswith("rank/")}:
            ranks = torch.stack(list(began.values()))
            figures["effective rank"] = float(torch.stack(list(self.ranks(model, began).values()))[:, 0].mean())
            figures["effective rank at start"] = float(ranks[:, 0].mean())
            figures["part of full rank at start"] = float((ranks[:, 0] / ranks[:, 1]).mean())
        return figures
