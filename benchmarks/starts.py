"""The starts of LoRA that peft has too, on SmolLM2-135M, all linear layers, rank 16: plait beside peft.

    OMP_NUM_THREADS=1 python benchmarks/starts.py [--starts pissa eva] [--rounds 2]

Both add their adapters to a model that is loaded already and start them; they take turns in one process, on one thread.
What reads data reads the same texts in batches of 4 x 128 tokens: EVA as many as peft takes until each vector points
where it pointed a batch before (a cosine of 0, for at the usual 0.99 peft had not ended after seven minutes); LoRA-GA
the gradient of 2 batches, those of all layers at once, as in peft. peft's LoftQ asks for a GPU and is left out.
"pissa" is peft's exact decomposition, "pissa_niter_4" its sketched one; ours is the same, sketched, beside both.
Residual: the root of the summed squares of W - scale * B A over all weights after PiSSA, beside the smallest possible
one, which is that of peft's exact decomposition. The results file keeps what it has of other starts.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from adapters import RANK, TARGETS, smollm2

RESULTS = Path(__file__).parent / "results" / "starts.json"


EVA_BATCHES: list[int] = []
"""How many batches peft's EVA took, each time, until its vectors settled."""


@cache
def texts() -> Any:
    from plait.tasks import load_task

    return load_task("causal-language-modelling", "smollm2-135m", "kjv", rows=400, length=128)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    data = texts().train
    ids = [data.batch(torch.arange(4 * i, 4 * i + 4)).inputs["input_ids"] for i in range(count)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids]


def peft_start(model: nn.Module, kind: str) -> nn.Module:
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    options: dict[str, dict[str, Any]] = {
        "eva": {"eva_config": EvaConfig(tau=0.0)},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
    }
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=TARGETS.split("|"), init_lora_weights=kind, **options.get(kind, {})
    )
    if kind == "lora_ga":

        def train_step() -> None:
            for batch in batches(2):
                model(**batch, use_cache=False).loss.backward()

        preprocess_loraga(model, config, train_step)
    made = get_peft_model(model, config)
    if kind == "eva":
        asked: list[int] = []
        hook = made.register_forward_pre_hook(lambda module, inputs: asked.append(1))
        initialize_lora_eva_weights(made, batches(16), show_progress_bar=False)
        hook.remove()
        EVA_BATCHES.append(len(asked) - 1)  # the first only finds equal inputs
    return made


def plait_start(model: nn.Module, kind: str) -> tuple[nn.Module, float]:
    """Return the model, and when its adapters were there and started."""
    from plait import EVA, AdamW, LoRA, LoRAGA, OLoRA, PiSSA, train

    starts = {
        "pissa": lambda: [PiSSA()],
        "pissa_niter_4": lambda: [PiSSA()],
        "olora": lambda: [OLoRA()],
        "eva": lambda: [EVA(tau=1.0, batches=EVA_BATCHES[-1])],
        "lora_ga": lambda: [LoRAGA(batches=2, memory=1)],
    }
    over = []
    train(
        model, texts().train, texts().loss, call=texts().call, steps=1, batch_size=4,
        methods=[LoRA(rank=RANK, alpha=RANK, where=TARGETS), *starts[kind](), AdamW(lr=1e-4)],
        on_start=lambda now: over.append(time.perf_counter()),
    )  # fmt: skip
    return model, over[0]


def passes(kind: str) -> float:
    """Return the seconds that the model itself takes over a start's batches, which neither side can save."""
    from plait.layers import matches

    model = smollm2().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind == "lora_ga" and matches(TARGETS, name.removesuffix(".weight")))
    read = batches(EVA_BATCHES[-1] if kind == "eva" else 2)
    began = time.perf_counter()
    for batch in read:
        loss = model(**batch, use_cache=False).loss
        if kind == "lora_ga":
            loss.backward()
    return round(time.perf_counter() - began, 3)


@torch.no_grad()
def residual(model: nn.Module) -> float:
    """Return the norm of all frozen weights of the adapted layers together."""
    from plait.layers import matches

    total = 0.0
    for name, parameter in model.named_parameters():
        name = name.replace(".base_layer", "").removesuffix(".weight")
        if matches(TARGETS, name) and not parameter.requires_grad:
            total += float(parameter.double().square().sum())
    return total**0.5


def measured(side: Callable[[nn.Module, str], Any], kind: str) -> tuple[float, nn.Module]:
    model = smollm2()
    for parameter in model.parameters():  # a memory-mapped file is read when a weight is first touched
        parameter.data = parameter.data.clone()
    began = time.perf_counter()
    made = side(model, kind)
    model, over = made if isinstance(made, tuple) else (made, time.perf_counter())
    return over - began, model


def geometric_mean(ratios: dict[str, float]) -> float:
    """Return the geometric mean over the starts, of which PiSSA counts once."""
    logarithms = [math.log(ratio) for kind, ratio in ratios.items() if kind != "pissa_niter_4"]
    return round(math.exp(sum(logarithms) / len(logarithms)), 4)


def main() -> None:
    kinds = ["pissa", "pissa_niter_4", "olora", "lora_ga", "eva"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    import peft
    import transformers

    texts()
    sides: dict[str, Callable[[nn.Module, str], Any]] = {"peft": peft_start, "plait": plait_start}
    found: dict[str, Any] = {}
    residuals: dict[str, dict[str, float]] = {}
    for kind in given.starts:
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(given.rounds):
            for name in list(sides)[:: 1 if number % 2 == 0 or kind == "eva" else -1]:  # EVA: as long as peft's did
                spent, model = measured(sides[name], kind)
                seconds[name].append(round(spent, 3))
                if kind.startswith("pissa"):
                    residuals.setdefault(kind, {})[name] = residual(model)
                del model
        best = {name: min(values) for name, values in seconds.items()}
        found[kind] = {"seconds": seconds, "ratio": round(best["plait"] / best["peft"], 4)}
        if kind in ("eva", "lora_ga"):
            found[kind]["seconds of the model's own passes"] = passes(kind)
        if kind in residuals:
            found[kind]["residual to peft's"] = round(residuals[kind]["plait"] / residuals[kind]["peft"], 5)
        print(kind, json.dumps(found[kind]), flush=True)
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = {kind: earlier[kind] for kind in kinds if kind in earlier} | found
    ratios = {kind: found[kind]["ratio"] for kind in kinds if kind in found}
    quick = {**ratios, "pissa": ratios.get("pissa_niter_4", ratios.get("pissa", 1.0))}
    report = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        **{kind: found[kind] for kind in kinds if kind in found},
        "geometric mean": geometric_mean(ratios),
        "geometric mean, peft's PiSSA sketched": geometric_mean(quick),
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
