"""What each process of the law of sharded rules runs: every rule of the catalogue, sharded by FSDP2 and not."""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from plait.checkpoint import load_optimizer, optimizer_state
from plait.errors import BadInput
from plait.sharding import full, is_sharded, leave, like
from plait.step.layerwise import LARS
from plait.step.momentum import SGD
from plait.step.scale_invariant import SGDP
from rules import RULES, made

STEPS = 4


class Net(nn.Module):
    """Repeated layers, an odd number of rows, a vector shorter than the processes, a row, and room for 8 bit."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 8) for _ in range(3)])
        for name, shape in {
            "odd": (7, 5),
            "row": (1, 9),
            "one": (1,),
            "large": (18, 300),
            "kernel": (5, 2, 3, 3),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw))


def run(key: str, sharded: bool, states: str) -> dict[str, torch.Tensor]:
    """Step a fresh net and return its whole weights."""
    model = Net()
    if sharded:
        fully_shard(model)
    torch.manual_seed(0)
    assert all(is_sharded(p) == sharded for p in model.parameters())
    optimizer = made(key, model, weight_decay=0.1, states=states)
    draw = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=draw)
            p.grad = like(gradient, p)
        optimizer.step()
        if step == 1 and sharded:  # whole tensors, as a checkpoint holds them, are spread again
            held = optimizer_state(model, optimizer)
            optimizer = made(key, model, weight_decay=0.1, states=states)
            load_optimizer(model, optimizer, *held)
        if step == 2 and sharded and states == "float32":  # torch's own distributed checkpoints do so too
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            whole = get_optimizer_state_dict(model, optimizer, options=options)
            optimizer = made(key, model, weight_decay=0.1, states=states)
            optimizer.zero_grad()
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(model, optimizer, whole, options=options)
    return {name: full(p.detach()) for name, p in model.named_parameters()}


def partial_gradients(fused: bool) -> list[torch.Tensor]:
    """Step replicated weights whose gradients have yet to be summed over the processes, as under tensor parallelism."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = [nn.Parameter(DTensor.from_local(torch.zeros(64, 64), mesh, [Replicate()])) for _ in range(6)]
    rule = SGD(weights, lr=1.0, momentum=0.0)
    rule.fused = fused
    for number, weight in enumerate(weights, 1):
        weight.grad = DTensor.from_local(torch.full((64, 64), float(number)), mesh, [Partial()])
    rule.step()
    return [full(weight.detach()) for weight in weights]


def extreme_gradients() -> float:
    """The largest relative difference of a step whose norms only float64 holds, sharded and not, rows or columns."""
    draw = torch.Generator().manual_seed(0)
    start, unit = torch.randn(7, 6, generator=draw), torch.randn(7, 6, generator=draw)
    tangent = unit - (unit * start).sum(1, keepdim=True) / start.square().sum(1, keepdim=True) * start
    mesh, differences = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for rule, gradient in [(LARS, unit), (SGDP, tangent), (SGDP, unit - unit.mean() + start)]:
        for size in (1e25, 1e-35):
            weights = [nn.Parameter(start.clone())]
            weights += [nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(dim)])) for dim in (0, 1)]
            optimizer = rule(weights, lr=0.1 if rule is LARS else 0.1 / size)
            for weight in weights:
                weight.grad = like(size * gradient, weight)
            optimizer.step()
            alone, *together = (full(weight.detach()) for weight in weights)
            assert (alone - start).abs().max() > 0.01
            differences += [float((alone - other).abs().max() / alone.abs().max()) for other in together]
    return max(differences)


def main() -> None:
    """Print the largest difference of each rule, or the sentence that refuses it."""
    dist.init_process_group("gloo")
    found: dict[str, object] = {}
    for key in sys.argv[1:]:
        kind = RULES[key]
        for states in ("float32", "bfloat16", "8bit") if kind.rounds() else ("float32",):
            try:
                alone, together = run(key, False, states), run(key, True, states)
            except BadInput as problem:
                found[f"{key} {states}"] = str(problem)
                continue
            found[f"{key} {states}"] = max(float((alone[n] - together[n]).abs().max()) for n in alone)
    ends = zip(partial_gradients(True), partial_gradients(False), strict=True)
    found["partial gradients"] = max(float((one - other).abs().max()) for one, other in ends)
    found["extreme gradients"] = extreme_gradients()
    if dist.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
    leave()
