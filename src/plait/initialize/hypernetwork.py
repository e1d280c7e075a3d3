"""A network that writes the weights of others: it reads a network's graph, and starts networks of many widths."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.catalogue import paper
from plait.errors import BadInput
from plait.initialize.fresh import refuse_adapted
from plait.layers import CONVOLUTIONS, evaluating, is_linear_map, matches_weight, matrix, unmatrix
from plait.method import Method, Now, method
from plait.parametrize.base import without_stacks
from plait.tensors import State, read_state

KINDS = ("linear", "convolution", "embedding", "gain", "bias", "other")
SLOTS, FARTHEST = 64, 32
"""How many places in a layer, and which distances, are told apart."""


@dataclass(frozen=True)
class Graph:
    """A network's weights as the nodes of the graph in which data flows through them.

    shapes: [n, 2], of each weight as a matrix [out, in]; a vector is [out, 1]. distances: [n, n], operations with
    weights on the shortest way from one node to another, plus 1; 0 where there is none. spreads: standard deviations.
    """

    names: list[str]
    kinds: Tensor
    slots: Tensor
    shapes: Tensor
    distances: Tensor
    spreads: list[float]


def _kind(layer: nn.Module, leaf: str, weight: Tensor) -> str:
    if "bias" in leaf:
        return "bias"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, CONVOLUTIONS):
        return "convolution"
    if is_linear_map(layer) or (isinstance(layer, nn.MultiheadAttention) and weight.dim() == 2):
        return "linear"
    return "gain" if weight.dim() == 1 and "norm" in type(layer).__name__.lower() else "other"


def _operations(output: Tensor) -> tuple[dict[Any, list[Any]], dict[int, Any]]:
    """Return, of the computation of an output, which operations use each one's result, and which takes each weight."""
    last: Any = output.grad_fn
    users: dict[Any, list[Any]] = {last: []}
    leaves: dict[int, Any] = {}
    waiting = deque([last])
    while waiting:
        node = waiting.popleft()
        for child, _ in node.next_functions:
            if child is None:
                continue
            if child not in users:
                users[child] = []
                waiting.append(child)
            users[child].append(node)
            if hasattr(child, "variable"):
                leaves.setdefault(id(child.variable), child)
    for key, leaf in leaves.items():
        node = users[leaf][0]  # past what only reshapes the weight, to what joins it with data
        while len(node.next_functions) < 2 and "Embedding" not in node.name() and users[node]:
            node = users[node][0]
        leaves[key] = node
    return users, leaves


def _distances(users: dict[Any, list[Any]], takes: list[Any]) -> Tensor:
    """Return how many of the operations that take weights lie on the shortest way from each to each, plus 1."""
    chosen = set(takes)
    onward: dict[Any, set[Any]] = {}
    for node in chosen:
        onward[node], ahead, seen = set(), list(users[node]), set[Any]()
        while ahead:
            user = ahead.pop()
            if user in chosen:
                onward[node].add(user)
            elif user not in seen:
                seen.add(user)
                ahead += users[user]
    found = torch.zeros(len(takes), len(takes), dtype=torch.long)
    for start in chosen:
        reached, waiting = {start: 1}, deque([start])
        while waiting:
            node = waiting.popleft()
            for user in onward[node]:
                if user not in reached:
                    reached[user] = reached[node] + 1
                    waiting.append(user)
        for row in (n for n, node in enumerate(takes) if node is start):
            found[row] = torch.tensor([reached.get(node, 0) for node in takes])
    return found.clamp_max(FARTHEST)


def graph_of(model: nn.Module, output: Any) -> Graph:
    """Return the graph of the weights that an output of the model was computed from, with gradients on.

    >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
    >>> made = graph_of(model, model(torch.zeros(4, 2)))
    >>> made.names, made.shapes.tolist(), made.distances.tolist()
    (['0.weight', '2.weight', '2.bias'], [[3, 2], [1, 3], [1, 1]], [[1, 2, 2], [0, 1, 1], [0, 1, 1]])
    """
    made = getattr(output, "logits", output)
    if not isinstance(made, Tensor) or made.grad_fn is None:
        raise BadInput("the graph of a network is read from an output that has gradients: give one tensor, or logits.")
    users, leaves = _operations(made)
    names, kinds, slots, shapes, spreads, takes = [], [], [], [], [], []
    slot: dict[str, int] = {}
    for name, p in model.named_parameters():
        if id(p) not in leaves or ".plait." in name:
            continue
        owner, _, leaf = name.rpartition(".")
        layer = model.get_submodule(owner)
        flat = matrix(layer, p) if is_linear_map(layer) and p.dim() > 1 else p.flatten(0, -2) if p.dim() > 2 else p
        block = re.match(r"((?:[^.]*\.)*?\d+)\.", name)
        place = block[1] if block else ""
        slots.append(slot.setdefault(place, 0) % SLOTS)
        slot[place] += 1
        names.append(name)
        kinds.append(KINDS.index(_kind(layer, leaf, p)))
        shapes.append([*flat.shape, 1] if flat.dim() == 1 else [*flat.shape] or [1, 1])
        spreads.append(float(p.detach().float().std()) if p.numel() > 1 else 0.0)
        takes.append(leaves[id(p)])
    return Graph(
        names, torch.tensor(kinds), torch.tensor(slots), torch.tensor(shapes), _distances(users, takes), spreads
    )


class GraphLayer(nn.Module):
    """x + attention(norm(x)) + feed-forward of that, with a bias of attention for each pair of nodes: Graphormer's."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.triple, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[n, hidden], [heads, n, n] -> [n, hidden]."""
        q, k, v = self.triple(self.before(x)).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        seen = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias[None].to(q.dtype))[0]
        x = x + self.out(seen.transpose(0, 1).flatten(1))
        hidden: Tensor = x + self.down(F.gelu(self.up(self.after(x))))
        return hidden


class Hypernetwork(nn.Module):
    """LoGAH's: a graph's nodes see each other through `layers` of attention; of a node h, A B is its weight.

    [X_A; X_B] = MLP(h), each [rank, rank];  A = (relu(X_A) D)^T [most, rank],  B = relu(X_B) D [rank, most], with D
    [rank, most] for all nodes; the weight is A_(1..out) B_(1..in), so the decoder's size does not grow with the square
    of the widest side, `most`. Matrices are scaled to the spread that the network's own start gives them; gains are
    2 sigmoid(x / 2), biases tanh(x / 5), as in GHN-3 and the authors' code.
    """

    def __init__(self, most: int, hidden: int = 32, rank: int = 16, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.most, self.rank = most, rank
        self.kind, self.slot = nn.Embedding(len(KINDS), hidden), nn.Embedding(SLOTS, hidden)
        self.into, self.out = nn.Embedding(FARTHEST + 1, hidden), nn.Embedding(FARTHEST + 1, hidden)
        self.depth, self.size = nn.Embedding(FARTHEST + 1, hidden), nn.Linear(2, hidden)
        self.edge = nn.Embedding(2 * (FARTHEST + 1), heads)
        self.layers = nn.ModuleList([GraphLayer(hidden, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, 8 * hidden), nn.ReLU(),
            nn.Linear(8 * hidden, 2 * rank * rank),
        )  # fmt: skip
        self.decoder = nn.Linear(rank, most, bias=False)
        for part in self.mlp:
            if isinstance(part, nn.Linear):  # with torch's start the biases would outweigh what tells nodes apart
                nn.init.kaiming_normal_(part.weight)
                nn.init.zeros_(part.bias)
        last: Any = self.mlp[-1]
        with torch.no_grad():
            last.weight.mul_(0.1)  # gains begin near 1 and biases near 0; matrices are scaled anyhow
            self.size.weight.zero_()  # widths are told apart only as far as that helps

    @classmethod
    def of(cls, state: State) -> Hypernetwork:
        """Return the hypernetwork whose weights these are."""
        own = {name.removeprefix("hypernetwork."): t for name, t in state.items()}
        if not {"decoder.weight", "kind.weight", "edge.weight"} <= own.keys():
            raise BadInput("these are not the weights of a hypernetwork: save Hypernetwork(...).state_dict().")
        most, rank = own["decoder.weight"].shape
        layers = len({name.split(".")[1] for name in own if name.startswith("layers.")})
        made = cls(most, own["kind.weight"].shape[1], rank, own["edge.weight"].shape[1], layers)
        made.load_state_dict(own)
        return made

    def nodes(self, graph: Graph) -> Tensor:
        """Return what is known of each node after all have seen each other: [n, hidden]."""
        device = self.edge.weight.device
        distances = graph.distances.to(device)
        sizes = graph.shapes.to(device).float().log2() / 8  # waves would tell seen widths from unseen ones
        x = self.kind(graph.kinds.to(device)) + self.slot(graph.slots.to(device))
        x = x + self.size(sizes)
        near = distances == 2
        x = x + self.into(near.sum(0).clamp_max(FARTHEST)) + self.out(near.sum(1).clamp_max(FARTHEST))
        x = x + self.depth(distances.amax(0))
        bias = (self.edge(distances) + self.edge(distances.t() + FARTHEST + 1)).permute(2, 0, 1)
        for layer in self.layers:
            x = layer(x, bias)
        seen: Tensor = self.norm(x)
        return seen

    def forward(self, graph: Graph) -> dict[str, Tensor]:
        """Return the weights, by name, as matrices [out, in]; vectors as [out, 1]."""
        if int(graph.shapes.max()) > self.most:
            name = graph.names[int(graph.shapes.amax(1).argmax())]
            raise BadInput(
                f"'{name}' has a side of {int(graph.shapes.max())}, and this hypernetwork writes at most {self.most}: "
                "make one with a larger `most`."
            )
        parts = self.decoder(F.relu(self.mlp(self.nodes(graph)).view(-1, 2, self.rank, self.rank)))
        made = {}
        for n, name in enumerate(graph.names):
            rows, columns = graph.shapes[n].tolist()
            weight = parts[n, 0, :, :rows].t() @ parts[n, 1, :, :columns]
            kind = KINDS[int(graph.kinds[n])]
            if kind == "gain":
                weight = 2 * torch.sigmoid(0.5 * weight)
            elif rows * columns == 1 or (columns == 1 and kind in ("bias", "other")):
                weight = torch.tanh(0.2 * weight)
            else:
                weight = weight / (weight.std() + 1e-7) * graph.spreads[n]
            made[name] = weight
        return made

    def weights(self, model: nn.Module, graph: Graph) -> dict[str, Tensor]:
        """Return the weights of a model in their own shapes."""
        made = {}
        for name, weight in self(graph).items():
            layer, own = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
            whole = unmatrix(layer, weight, own) if is_linear_map(layer) and own.dim() > 1 else weight
            made[name] = whole.reshape(own.shape).to(own.dtype)
        return made


class Family(nn.Module):
    """Networks whose weights a hypernetwork writes: each training pass runs one of them, drawn anew, and trains the
    hypernetwork; in evaluation the first is run.

    models: of any widths and depths, on this task. inputs: an example, to read their graphs from.

    >>> from plait import train
    >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    >>> nets = [nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1)) for width in (4, 8)]
    >>> family = Family(Hypernetwork(most=16, hidden=8, rank=4), nets, x)
    >>> run = train(family, (x, x.sum(1, keepdim=True)), steps=3)
    >>> family.hypernetwork.weights(nets[1], family.graphs[1])["0.weight"].shape
    torch.Size([8, 4])
    """

    def __init__(self, hypernetwork: Hypernetwork, models: Sequence[nn.Module], inputs: Any) -> None:
        super().__init__()
        if not models:
            raise BadInput("a family needs at least one network.")
        self.hypernetwork = hypernetwork
        self.models = tuple(models)  # not registered: their own weights are not trained
        self.graphs = []
        for model in self.models:
            with evaluating(model), torch.enable_grad():
                self.graphs.append(graph_of(model, model(**inputs) if isinstance(inputs, dict) else model(inputs)))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run one of the networks with the weights that the hypernetwork writes."""
        chosen = int(torch.randint(len(self.models), ())) if self.training else 0
        model = self.models[chosen].train(self.training)
        weights = self.hypernetwork.weights(model, self.graphs[chosen])
        return torch.func.functional_call(model, weights, inputs, named)


@paper("zhou2024logah", key="logah", kind="model")
@method
class LoGAH(Method):
    """W = A B,  A [out, r], B [r, in] from a graph hypernetwork: a network starts with weights that another network,
    trained on many like it, writes after reading its graph.

    The hypernetwork is a model: `Family(Hypernetwork(most=512), models, inputs)` is trained by `plait.train` on the
    task, one network drawn at each step, and its `state_dict()` is saved. Networks of widths and depths that it has not
    seen start from that file, and train as usual; their norms' gains and biases are written too. Its size does not
    depend on the number of weights that it writes: see `Hypernetwork`.

    The graph is read from autograd: its nodes are weights, data flows along its edges. Unlike the authors', operations
    without weights are no nodes, a weight's place in its layer stands in for them, sizes enter by their logarithms, D
    has no bias, and A is read by rows and B by columns. Rows are written in order: queries, keys and values in one
    matrix begin at other rows in every width, so weights of their own carry over to unseen widths better, as do heads
    of one size. Only the abstract and the code could be read for this.

    source: a file or folder of a hypernetwork or of a family. where: names of layers or weights that it writes. Raises
    BadInput for weights with a side longer than the hypernetwork's `most`, and for those that an adapter or a start
    before it was made of.

    >>> import tempfile, pathlib
    >>> from plait.tensors import write_tensors
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "hypernetwork.safetensors"
    >>> write_tensors(path, Hypernetwork(most=16, hidden=8, rank=4).state_dict())
    >>> from plait import train
    >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 1)), (x, x[:, :1]), steps=1,
    ...             methods=[LoGAH(source=str(path))])
    """

    source: str

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a file of something else."""
        self.read()

    def read(self) -> Hypernetwork:
        """Return the hypernetwork of the source."""
        return Hypernetwork.of(read_state(self.source))

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Write the weights."""
        trained = [(p, p.requires_grad) for p in model.parameters()]
        batch = next(iter(now.calibration(1)))
        try:
            for p, _ in trained:
                p.requires_grad_(p.is_floating_point())
            # The graph of the model itself: what adapters compute would stand between its weights.
            with evaluating(model), without_stacks(model), torch.enable_grad(), torch.random.fork_rng():
                graph = graph_of(model, now.call(model, batch.inputs))
        finally:
            for p, wanted in trained:
                p.requires_grad_(wanted)
        chosen = [name for name in graph.names if matches_weight(self.where, name)]
        refuse_adapted(self, model, map(model.get_parameter, chosen))
        with torch.no_grad():
            made = self.read().weights(model, graph)
            for name in chosen:
                model.get_parameter(name).copy_(made[name])
