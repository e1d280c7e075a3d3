"""Adapter layers whose weights are sums of Kronecker products: Compacter."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Positive
from plait.layers import CONVOLUTIONS, matrix_shape
from plait.method import Method, method
from plait.parametrize.base import Adapter, Parametrization, attached
from plait.parametrize.low_rank import adapter_dtype


def kronecker_sum(slow: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return H = sum_i A_i (x) (L_i R_i), [n * p, n * q], for A [n, n, n], L [n, p, rank] and R [n, rank, q]."""
    n, p, q = len(slow), left.shape[1], right.shape[2]
    return torch.einsum("iac,ipr,irq->apcq", slow, left, right).reshape(n * p, n * q)


def times_kronecker_sum(x: Tensor, slow: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return x H for x [..., n * p], never forming H."""
    n = len(slow)
    inner = torch.einsum("...ap,ipr->...air", x.reshape(*x.shape[:-1], n, left.shape[1]), left)
    return torch.einsum("...air,iac,irq->...cq", inner, slow, right).flatten(-2)


class HypercomplexAdapter(Parametrization):
    """y -> y + H_2 gelu(H_1 y + b_1) + b_2, H_1 [width, out] and H_2 [out, width] sums of n Kronecker products, whose
    factors A_i [n, n] all layers and both H share.
    """

    linear = False
    made_by = "Compacter"

    def __init__(self, weight: Tensor, factors: int, width: int, rank: int, deviation: float) -> None:
        super().__init__()
        n, out, kind = factors, weight.shape[0], adapter_dtype(weight)
        self.A = nn.Parameter(deviation * torch.randn(n, n, n, dtype=kind))
        for side, (rows, columns) in (("down", (out // n, width // n)), ("up", (width // n, out // n))):
            self.register_parameter(f"{side}_left", nn.Parameter(_uniform(n, rows, rank).to(kind)))
            self.register_parameter(f"{side}_right", nn.Parameter(_uniform(n, rank, columns).to(kind)))
            self.register_parameter(f"{side}_bias", nn.Parameter(torch.zeros(columns * n, dtype=kind)))

    def dense(self, weight: Tensor) -> Tensor:
        """Return W: the layer's linear map stays as it is."""
        return weight

    def maps(self) -> tuple[Tensor, Tensor]:
        """Return H_1 [width, out] and H_2 [out, width], the definition."""
        down, up = (self._factors(side) for side in ("down", "up"))
        return kronecker_sum(*down).t(), kronecker_sum(*up).t()

    def _factors(self, side: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.A, getattr(self, f"{side}_left"), getattr(self, f"{side}_right")

    def _through(self, side: str, x: Tensor) -> Tensor:
        factors = (t.to(x) for t in self._factors(side))
        bias: Tensor = getattr(self, f"{side}_bias")  # under EGN no parameter, but a tensor in its place
        return times_kronecker_sum(x, *factors) + bias.to(x)

    def after(self, layer: nn.Module, outputs: Tensor) -> Tensor:
        """Return y + H_2 gelu(H_1 y + b_1) + b_2, without forming H_1 or H_2."""
        y = outputs.movedim(-1 - len(layer.kernel_size), -1) if isinstance(layer, CONVOLUTIONS) else outputs
        added = self._through("up", F.gelu(self._through("down", y), approximate="tanh"))
        return outputs + (added.movedim(-1, -1 - len(layer.kernel_size)) if isinstance(layer, CONVOLUTIONS) else added)


def _uniform(n: int, rows: int, columns: int) -> Tensor:
    """Return n matrices of Glorot's uniform start with a gain of sqrt(2)."""
    bound = math.sqrt(2) * math.sqrt(6 / (rows + columns))
    return torch.empty(n, rows, columns).uniform_(-bound, bound)


@paper("karimi2021compacter", key="compacter")
@method
class Compacter(Adapter):
    """y <- y + H_2 gelu(H_1 y + b_1) + b_2 for the outputs y of each target, H^T = sum_i A_i (x) (s_i t_i): n Kronecker
    products of slow weights A_i [n, n], which all adapter layers of the model share, and fast ones of each layer's own,
    s_i [k / n, rank] and t_i [rank, d / n], for H [d, k]. All else is frozen.

    With n `factors` and d outputs a layer trains 2 rank (d + width) + d + width numbers, and all together n^3. The rank
    is 1 in the paper. A_i ~ N(0, deviation^2), s_i and t_i are uniform of Glorot with gain sqrt(2), biases zero, as in
    the authors' code: at the start the layers are all but idle. No H is formed. After convolutions it acts on the
    channels. The layer is no linear map, so it stays in the model: it cannot be folded, and no other format holds it.
    Written from the authors' code and the abstract.

    where: the layers behind which one is put; by default the last of each attention and feed-forward part, by the names
    of transformers ("down_proj|fc2|..." is Compacter++, behind feed-forward parts alone). factors: n, which divides
    `width` and each target's outputs. width: units between H_1 and H_2. train: what else is trained; with the authors
    the norms are, as in `train=".*norm.*"`. Raises BadInput for `factors` that do not divide the width or a target's
    outputs, a rank above min(k, d) / n, the most that s_i t_i can have, and beside Fold, Requantize and
    MagnitudePruning.

    >>> model = nn.ModuleDict({"o_proj": nn.Linear(6, 8), "down_proj": nn.Linear(6, 8)})
    >>> Compacter(factors=2, width=4).parametrize(model)
    >>> [(name[13:], tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad][:3]
    [('compacter.A', (2, 2, 2)), ('compacter.down_left', (2, 4, 1)), ('compacter.down_right', (2, 1, 2))]
    """

    excludes = ("Fold", "Requantize", "MagnitudePruning")

    where: str = r"o_proj|out_proj|down_proj|c_proj|fc2|wo|o|output\.dense"
    factors: Count = 4
    width: Count = 24
    rank: Count = 1
    deviation: Positive = 1e-4

    def build(self, layer: nn.Module, weight: Tensor) -> HypercomplexAdapter:
        """Return what stands behind one layer."""
        return HypercomplexAdapter(weight, self.factors, self.width, self.rank, self.deviation)

    def parametrize(self, model: nn.Module) -> None:
        """Attach them, and let all share the slow weights."""
        super().parametrize(model)
        alike = [part for _, _, part in attached(model, HypercomplexAdapter) if len(part.A) == self.factors]
        for part in alike:
            part.A = alike[0].A

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse sizes that the factors do not divide, and ranks that matrices of these sizes do not have."""
        sizes = [("width", self.width)]
        sizes += [(f"the outputs of '{name}'", matrix_shape(layer)[0]) for name, layer in self.targets(model)]
        for what, size in sizes:
            if size % self.factors:
                raise BadInput(
                    f"Compacter.factors is {self.factors}, which does not divide {what}, {size}: choose others."
                )
            if self.rank > (most := size // self.factors):
                raise BadInput(
                    f"Compacter.rank is {self.rank}, but {what}, {size}, divided by {self.factors} factors leave a "
                    f"rank of {most}: use at most {most}."
                )
