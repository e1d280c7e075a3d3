"""Several processes: sharding by FSDP2, where each holds a part of every weight, and what they tell each other."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.math.packed import Packed


def is_sharded(tensor: Any) -> bool:
    """Say whether a tensor is spread over processes."""
    return hasattr(tensor, "full_tensor")


def local_share(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor that is spread over processes, in place."""
    share: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]
    return share


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be spread over processes; every process must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return `whole`, spread over processes as `parameter` is if their shapes agree."""
    if is_sharded(parameter) and whole.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    return whole


def remembered(memory: dict[str, Tensor], key: str, gradient: Tensor) -> Tensor:
    """Return what is remembered of a gradient under a key, zeros at first, spread over processes as the gradient is."""
    held = memory.get(key)
    if held is None:
        memory[key] = torch.zeros_like(gradient)
    elif not is_sharded(held):
        memory[key] = like(held, gradient)  # a checkpoint brings it back whole
    return memory[key]


def blocks(model: nn.Module) -> Iterable[nn.Module]:
    """Yield the repeated blocks of a model (the members of its module lists), which are sharded one by one."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            yield from module


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device: its structure, none of its memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def shard(model: nn.Module) -> nn.Module:
    """Spread a model's weights over all processes, in place: its blocks one by one, then the rest."""
    import torch.distributed as dist

    if not dist.is_initialized():
        raise BadInput("sharding='fsdp' needs several processes: start them with torchrun.")
    from torch.distributed.fsdp import fully_shard

    if any(isinstance(p, Packed) for p in model.parameters()):
        raise BadInput(
            "sharding='fsdp' cannot spread quantized weights: leave out Quantize, or set sharding to 'none'."
        )
    refuse_shared(model)
    empty = {p for p in model.parameters() if p.numel() == 0}  # an adapter that EVA gave rank 0
    for block in blocks(model):
        fully_shard(block, ignored_params=empty)
    fully_shard(model, ignored_params=empty)
    return model


def refuse_shared(model: nn.Module) -> None:
    """Refuse weights that several blocks have in common: each block is spread, and gathered, by itself."""
    for module in model.modules():
        seen: dict[int, int] = {}
        for number, block in enumerate(module if isinstance(module, nn.ModuleList) else ()):
            for name, parameter in block.named_parameters():
                if seen.setdefault(id(parameter), number) != number and parameter.numel():
                    raise BadInput(
                        f"sharding='fsdp' cannot spread '{name}', which several blocks share: leave out what shares it "
                        "(in DiffoRA, shared_rank=0), or set sharding to 'none'."
                    )


def whole(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Return a copy of `plain`, a skeleton of the model before it was sharded, with its weights as whole tensors."""
    plain = copy.deepcopy(plain)
    state = {name: full(t).detach().clone() for name, t in model.state_dict().items()}
    empty = dict(plain.named_parameters(remove_duplicate=False))  # held, so that identities stay unique
    first: dict[int, str] = {}
    plain.load_state_dict(state, assign=True)
    for name, parameter in empty.items():
        owner, _, leaf = name.rpartition(".")
        tied = first.setdefault(id(parameter), name)
        if tied != name:
            setattr(plain.get_submodule(owner), leaf, plain.get_parameter(tied))
    return plain


def synchronize_gradients(model: nn.Module, wanted: bool) -> None:
    """Exchange gradients at the coming backward pass, or keep them until a later one."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(wanted)  # type: ignore[operator]


def main_process() -> bool:
    """Say whether this process writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        torch.distributed.barrier()


def scalar(value: Any) -> Any:
    """Return a penalty as a plain scalar, whatever it was computed from."""
    return full(value) if isinstance(value, torch.Tensor) else value


def world_size() -> int:
    """Return how many processes train together: 1 where torch.distributed is not in use."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if started else 1


def rank() -> int:
    """Return this process's number."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


def averaged(value: Tensor) -> Tensor:
    """Return the mean over all processes, in place, or the value itself where there is one."""
    if world_size() > 1:
        torch.distributed.all_reduce(value)
        value /= world_size()
    return value


def gather(tensor: Tensor) -> list[Tensor]:
    """Return a tensor's value on every process, in order."""
    if world_size() == 1:
        return [tensor]
    every = [torch.empty_like(tensor) for _ in range(world_size())]
    torch.distributed.all_gather(every, tensor)
    return every


def leave() -> None:
    """Wait for the other processes and part from them: call it last in a script that torchrun starts."""
    barrier()
    part()


def part() -> None:
    """Part from the other processes without waiting for them; `train` has the interpreter call it at its exit.

    Wrappers hold the process group in reference cycles. Left to the interpreter's last moments, the group's threads
    would ask for the interpreter's lock when there is none any more, and the process would abort.
    """
    import torch.distributed as dist

    if dist.is_available():
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
