"""Every adapter that peft has too: one training step on SmolLM2-135M beside peft's, time and memory.

    python benchmarks/adapter_methods.py [--methods dora ia3] [--rounds 3] [--save]

--save writes what was measured, and keeps what the results file has of other methods.

float32, one thread, 4 x 128 tokens, all linear layers but the output layer (IA3: k, v and down), equal sizes. Time: the
two steps take turns in one process, the ratio is of the fastest rounds. Memory: each in a process of its own, the
highest resident memory above the loaded model. Geometric means over the methods stand last.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from adapters import RANK, TARGETS, memory, peft_step, plait_step, ratio, smollm2, times

RESULTS = Path(__file__).parent / "results" / "adapter_methods.json"
LAYERS = TARGETS.split("|")


def pairs() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Return, by method, what makes peft's configuration and what makes ours."""
    import peft

    from plait.parametrize.block import Bone
    from plait.parametrize.low_rank import DoRA, LoRA
    from plait.parametrize.prefix import PrefixTuning
    from plait.parametrize.prompt import PromptTuning
    from plait.parametrize.random_bases import RandLoRA
    from plait.parametrize.scaling import IA3

    def lora(**options: Any) -> Any:
        return peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=LAYERS, **options)

    ia3 = ["k_proj", "v_proj", "down_proj"]
    return {
        "lora": (lora, lambda: LoRA(rank=RANK, where=TARGETS)),
        "rslora": (
            lambda: lora(use_rslora=True),
            lambda: LoRA(rank=RANK, scaling="rank-stabilized", where=TARGETS),
        ),
        "dora": (lambda: lora(use_dora=True), lambda: DoRA(rank=RANK, where=TARGETS)),
        "bone": (
            lambda: peft.MissConfig(r=64, target_modules=LAYERS, init_weights="bat"),
            lambda: Bone(rank=64, kind="affine", where=TARGETS),
        ),
        "miss": (
            lambda: peft.MissConfig(r=64, target_modules=LAYERS),
            lambda: Bone(rank=64, kind="shared", where=TARGETS),
        ),
        "randlora": (
            lambda: peft.RandLoraConfig(r=32, target_modules=LAYERS),
            lambda: RandLoRA(rank=32, where=TARGETS),
        ),
        "ia3": (
            lambda: peft.IA3Config(target_modules=ia3, feedforward_modules=["down_proj"]),
            lambda: IA3(outputs="k_proj|v_proj", inputs="down_proj"),
        ),
        "prompt-tuning": (
            lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
            lambda: PromptTuning(tokens=20),
        ),
        "prefix-tuning": (
            lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
            lambda: PrefixTuning(tokens=20, width=0),
        ),
    }


def peak(name: str, side: str) -> float:
    """Return one side's peak above the model in MB, from a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, side]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[-1])


def geometric_mean(values: list[float]) -> float:
    return round(math.exp(sum(map(math.log, values)) / len(values)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(pairs()), default=list(pairs()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", nargs=2, metavar=("METHOD", "SIDE"), help="print one peak and stop")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    if given.memory_of:
        name, side = given.memory_of
        theirs, ours = pairs()[name]
        print(memory(lambda: peft_step(theirs()) if side == "peft" else plait_step(ours())))
        return
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()
    smollm2()
    found: dict[str, Any] = {}
    for name in given.methods:
        theirs, ours = pairs()[name]
        made = {"peft": lambda t=theirs: peft_step(t()), "plait": lambda o=ours: plait_step(o())}
        seen, _ = times(made, 1, given.rounds)
        high = {side: peak(name, side) for side in made}
        found[name] = {
            "seconds": {side: round(min(values), 3) for side, values in seen.items()},
            "peak above the model, MB": {side: round(value, 1) for side, value in high.items()},
            "time, plait / peft": ratio(seen["plait"], seen["peft"]),
            "memory, plait / peft": round(high["plait"] / high["peft"], 3),
        }
        print(name, json.dumps(found[name]), flush=True)
        gc.collect()
    if given.save and RESULTS.exists():
        earlier = json.loads(RESULTS.read_text())["methods"]
        found = {name: found.get(name, earlier.get(name)) for name in pairs() if name in found or name in earlier}
    result = {
        "what": "SmolLM2-135M, float32, one thread, 4 x 128 tokens, all linear layers",
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
        "machine": platform.machine(),
        "methods": found,
        "geometric means": {
            what: geometric_mean([f[f"{what}, plait / peft"] for f in found.values()]) for what in ("time", "memory")
        },
    }
    print(json.dumps(result["geometric means"]))
    if given.save:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
