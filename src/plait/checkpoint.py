"""Checkpoints: safetensors and JSON, written atomically; a run killed at any moment goes on bitwise as it was.

A folder holds `step-N/` with the trained weights, the optimizer's state by parameter name, the methods' memory, random
states, the order of examples, and the history; beside them lies `frozen-DIGEST.safetensors`, the weights that are not
trained, which a checkpoint names by what it holds, so that it is written once and never belongs to another run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from plait.errors import BadInput
from plait.math.packed import quantized_elsewhere
from plait.method import Method, Now
from plait.sharding import barrier, full, gather, like, main_process, rank
from plait.tensors import read_tensors, sync, write_tensors

KEPT = 2
"""How many checkpoints of a run are kept."""


def steps_kept(folder: str | Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, oldest first."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in Path(folder).glob("step-*/state.json"))


def last_step(folder: str | Path) -> int | None:
    """Return the step of the newest checkpoint, or None."""
    kept = steps_kept(folder)
    return kept[-1] if kept else None


def signature(model: nn.Module, methods: Sequence[Method], **settings: Any) -> dict[str, Any]:
    """Return what must be equal for a checkpoint to fit a run: the model as it was given, the methods, the settings."""
    shapes = json.dumps(sorted((name, list(t.shape), str(t.dtype)) for name, t in model.state_dict().items()))
    return {
        "model": type(model).__name__,
        "shapes of weights": hashlib.sha256(shapes.encode()).hexdigest()[:12],
        "methods": [repr(m) for m in methods],
        **settings,
    }


def _bytes(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode()
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(tensors: dict[str, Tensor]) -> str:
    """Return a name for the values of some tensors."""
    made = hashlib.sha256()
    for part in _bytes(tensors):
        made.update(part)
    return made.hexdigest()[:16]


def checksum(tensors: dict[str, Tensor]) -> str:
    """Return what shows damage to some tensors, in a quarter of the time that a digest takes."""
    made = 0
    for part in _bytes(tensors):
        made = zlib.crc32(part, made)
    return f"{made:08x}"


def _names(model: nn.Module, rule: torch.optim.Optimizer) -> list[str]:
    by_identity = {id(p): name for name, p in model.named_parameters()}
    return [by_identity[id(p)] for group in rule.param_groups for p in group["params"]]


def optimizer_state(model: nn.Module, rule: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's state as tensors by "parameter/state" name, and the rest as JSON."""
    names, state = _names(model, rule), dict[str, Any](rule.state_dict())
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    held_by_number: dict[Any, dict[str, Any]] = state["state"]
    for number, held in held_by_number.items():
        for key, value in held.items():
            if isinstance(value, Tensor):
                tensors[f"{names[number]}/{key}"] = full(value)
            else:
                plain.setdefault(names[number], {})[key] = value
    groups = [
        {k: v for k, v in group.items() if k != "params"} | {"names": [names[i] for i in group["params"]]}
        for group in state["param_groups"]
    ]
    return tensors, {"state": plain, "groups": groups}


def load_optimizer(
    model: nn.Module, rule: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """Put a saved state back, by parameter name, whatever the order of the parameters is now."""
    number = {name: i for i, name in enumerate(_names(model, rule))}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(number[parameter], {})[key] = like(value, parameters[parameter])
    for parameter, held in plain["state"].items():
        state.setdefault(number[parameter], {}).update(held)
    groups = dict[str, Any](rule.state_dict())["param_groups"]
    for group, saved in zip(groups, plain["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k != "names"})
    rule.load_state_dict({"state": state, "param_groups": groups})


def _random_states(now: Now) -> dict[str, Tensor]:
    _, keys, *_ = numpy.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "method": now.generator.get_state(),
        "numpy": torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: dict[str, Tensor], numpy_rest: list[Any], python_rest: float | None, now: Now) -> None:
    torch.set_rng_state(states["torch"])
    now.generator.set_state(states["method"])
    keys = states["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", keys, int(numpy_rest[0]), int(numpy_rest[1]), float(numpy_rest[2])))
    random.setstate((3, tuple(states["python"].tolist()), python_rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (trained parameters and buffers, frozen parameters), each shared tensor once."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    alone = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}

    def of(name: str) -> str:
        return name if name in alone else name.rpartition(".")[0]  # "0.weight.codes" is of a quantized "0.weight"

    # What another library has quantized is not ours to write: whoever goes on with the run gives the same base again.
    whole = model.state_dict(keep_vars=True).items()
    state = {name: full(t.detach()) for name, t in whole if of(name) in alone and not quantized_elsewhere(t)}
    moving = {name: t for name, t in state.items() if of(name) not in frozen}
    return moving, {name: t for name, t in state.items() if of(name) in frozen}


def _contents(
    model: nn.Module, now: Now, fits: dict[str, Any], rule: torch.optim.Optimizer, sampler: Any, run: Any
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Any]]:
    """Return what a checkpoint holds: tensors by file, frozen weights, and JSON. All processes gather together."""
    moving, frozen = _tensors_of(model)
    states, plain = optimizer_state(model, rule)
    memory = {f"{name}\n{key}": full(t) for name, held in now.memory.items() for key, t in held.items()}
    drawn = {f"{rank}/{key}": t for key, value in _random_states(now).items() for rank, t in enumerate(gather(value))}
    files = {"model": moving, "optimizer": states, "memory": memory, "random": {**drawn, **sampler.state()}}
    state = {
        "step": now.step,
        "epoch": now.epoch,
        "steps": now.steps,
        "timed": now.timed,
        "signature": fits,
        "optimizer": plain,
        "numpy": [str(value) for value in tuple(numpy.random.get_state(legacy=True))[2:]],
        "python": random.getstate()[2],
        "history": run.history,
        "measures": run.measures,
        "skipped": run.skipped,
    }
    return files, frozen, state


def _write(folder: Path, files: dict[str, dict[str, Tensor]], frozen: dict[str, Tensor], state: dict[str, Any]) -> None:
    target, temporary = folder / f"step-{state['step']}", folder / f".step-{state['step']}.{os.getpid()}"
    if state["step"] in steps_kept(folder):
        return  # this run has written it, or has gone on from it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        state["frozen"] = f"frozen-{digest(frozen)}.safetensors" if frozen else None
        if frozen and not (folder / state["frozen"]).exists():
            write_tensors(folder / state["frozen"], frozen)
        state["checksums"] = {name: checksum(tensors) for name, tensors in files.items()}
        for name, tensors in files.items():
            write_tensors(temporary / f"{name}.safetensors", tensors)
        (temporary / "state.json").write_text(_marked(state))
        sync(temporary / "state.json")
        sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove all but the newest checkpoints, frozen weights that none of them names, and what killed runs left."""
    for step in steps_kept(folder)[:-KEPT]:
        shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
    named = {_state(folder / f"step-{step}").get("frozen") for step in steps_kept(folder)}
    strays = [path for path in folder.glob("frozen-*.safetensors") if path.name not in named]
    for stray in [*strays, *folder.glob(".step-*.*"), *folder.glob(".frozen-*.*")]:
        with contextlib.suppress(OSError):
            shutil.rmtree(stray) if stray.is_dir() else stray.unlink()


def save(
    folder: str | Path,
    model: nn.Module,
    now: Now,
    fits: dict[str, Any],
    rule: torch.optim.Optimizer,
    sampler: Any,
    run: Any,
) -> None:
    """Write a checkpoint of this step; what was there before stands until the new one is whole."""
    folder = Path(folder)
    contents = _contents(model, now, fits, rule, sampler, run)
    if not main_process():
        barrier()
        return
    try:
        _write(folder, *contents)
    except (OSError, SafetensorError) as problem:
        kept = last_step(folder)
        stands = "there is no earlier checkpoint" if kept is None else f"the checkpoint of step {kept} stands"
        reason = os.strerror(problem.errno) if isinstance(problem, OSError) and problem.errno else str(problem)
        raise BadInput(
            f"the checkpoint of step {now.step} could not be written to {folder}: {reason}; {stands}. Free some room "
            "and run the same command again."
        ) from None
    _tidy(folder)
    barrier()


def _marked(state: dict[str, Any]) -> str:
    """Return a state as JSON that shows damage to itself."""
    return json.dumps(state | {"checksum": zlib.crc32(json.dumps(state).encode())})


def _state(place: Path) -> dict[str, Any]:
    """Return what a checkpoint's state.json says; raise BadInput if it says nothing."""
    try:
        state = json.loads((place / "state.json").read_text())
    except (OSError, ValueError) as problem:
        raise BadInput(f"{place / 'state.json'} is truncated or damaged ({problem}).") from None
    if not isinstance(state, dict) or "signature" not in state:
        raise BadInput(f"{place / 'state.json'} is truncated or damaged (it holds no run).")
    written = state.pop("checksum", None)
    if written is not None and zlib.crc32(json.dumps(state).encode()) != written:
        raise BadInput(f"{place / 'state.json'} is truncated or damaged (it does not hold what was written).")
    return state


def _read(path: Path, written: str | None, mark: Callable[[dict[str, Tensor]], str] = checksum) -> dict[str, Tensor]:
    """Return the tensors of a file; raise BadInput if they are not those whose mark was written down."""
    tensors = read_tensors(path)
    if written is not None and mark(tensors) != written:
        raise BadInput(f"{path} is truncated or damaged (it does not hold what was written).")
    return tensors


def _refuse_another(folder: Path, state: dict[str, Any], fits: dict[str, Any], now: Now) -> None:
    """Refuse the checkpoint of another run."""
    found, cure = state["signature"], "choose another folder, or delete that one to start anew"
    if (odd := next((key for key in fits if fits[key] != found.get(key)), None)) is not None:
        raise BadInput(
            f"{folder} holds a checkpoint of another recipe (its {odd}: {found.get(odd)}, this run's: {fits[odd]}): "
            f"{cure}."
        )
    if now.steps < state["step"]:
        raise BadInput(
            f"{folder} holds a checkpoint of step {state['step']}, beyond the {now.steps} steps of this run: give "
            f"steps={state['steps']}, or {cure}."
        )
    if now.steps != state["steps"] and state["timed"]:
        raise BadInput(
            f"{folder} holds a run of {state['steps']} steps whose schedules follow that number, and this run has "
            f"{now.steps}: give steps={state['steps']}, or {cure}."
        )


def _newest(folder: Path, fits: dict[str, Any], now: Now) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder and the state of the newest checkpoint, which fits this run, or None."""
    if (newest := last_step(folder)) is None:
        return None
    place = folder / f"step-{newest}"
    with _naming_the_cure(folder):
        state = _state(place)
    _refuse_another(folder, state, fits, now)
    return place, state


@contextlib.contextmanager
def _naming_the_cure(folder: Path) -> Iterator[None]:
    """Say, of a damaged checkpoint, what stands beside it."""
    *earlier, newest = steps_kept(folder)
    anew = f"delete {folder} to start anew"
    cure = f"delete {folder / f'step-{newest}'} to go on from step {earlier[-1]}" if earlier else anew
    try:
        yield
    except BadInput as problem:
        shared = f"{folder / 'frozen-'}" in str(problem)  # every checkpoint of the run needs the frozen weights
        raise BadInput(f"{str(problem).rstrip('.')}: {anew if shared else cure}.") from None


def resume_weights(folder: str | Path | None, model: nn.Module, now: Now, fits: dict[str, Any]) -> bool:
    """Load the weights of the newest checkpoint of this run, in place of the starts; say whether there is one."""
    found = None if folder is None else _newest(folder := Path(folder), fits, now)
    if folder is None or found is None:
        return False
    place, state = found
    with _naming_the_cure(Path(folder)):
        name = state["frozen"]
        frozen = _read(place.parent / name, Path(name).stem.removeprefix("frozen-"), digest) if name else {}
        tensors = {**frozen, **_read(place / "model.safetensors", state.get("checksums", {}).get("model"))}
    model.load_state_dict(tensors, strict=False)
    return True


def resume(
    folder: str | Path | None,
    model: nn.Module,
    now: Now,
    fits: dict[str, Any],
    rule: torch.optim.Optimizer,
    sampler: Any,
    run: Any,
) -> None:
    """Take all but the weights from the newest checkpoint of this run in the folder, if there is one."""
    found = None if folder is None else _newest(Path(folder), fits, now)
    if found is None:
        return
    place, state = found
    written = state.get("checksums", {})
    with _naming_the_cure(place.parent):
        # Copies begin where every new tensor does: matrix products round otherwise at other alignments.
        states, memory, drawn = (
            {key: t.clone() for key, t in _read(place / f"{name}.safetensors", written.get(name)).items()}
            for name in ("optimizer", "memory", "random")
        )
    load_optimizer(model, rule, states, state["optimizer"])
    for name, tensor in memory.items():
        method, _, key = name.partition("\n")
        now.memory.setdefault(method, {})[key] = tensor
    now.step, now.epoch, now.timed = state["step"], state["epoch"], state["timed"]
    run.history, run.measures, run.skipped = state["history"], state["measures"], state["skipped"]
    sampler.load(drawn)
    own = {key.removeprefix(f"{rank()}/"): t for key, t in drawn.items()}
    _restore_random(own, state["numpy"], state["python"], now)
