"""Every pair (adapter x start, gradient method, step rule, penalty, adapter) of the catalogue on three small nets.

    python tests/pairs.py [--jobs 2] [--all] [--only KEY]

A pair trains, folds, saves, resumes bitwise and merges into its base, or it is refused in one sentence; it never does
nothing. What came out is written to docs/pairs.json, from which the documentation's page is made. Pairs that stand
there are not tried again unless `--all` or `--only` says so.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import json
import multiprocessing
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import Tensor, nn

from plait import catalogue
from plait.checkpoint import steps_kept
from plait.engine import call_model
from plait.errors import BadInput, NonFinite
from plait.finish.fold import Fold
from plait.layers import evaluating
from plait.math.packed import numbers
from plait.method import Method, Now
from plait.parametrize.base import stack
from plait.parametrize.instruction import IAPT
from plait.penalty.norm import L2
from plait.predict.boxes import LoRABAM
from plait.schedule import Tuned
from plait.step.adam import AdamW
from plait.tensors import write_tensors
from plait.train import train

SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where checkpoints go: memory, where the system has a folder for that, as thousands of them are written."""
MATRIX = Path(__file__).parents[1] / "docs" / "pairs.json"
STEPS, RATE = 3, 5e-3
LEAST = 1e-6
"""What a method must change of some output, beside the largest: above rounding."""
SECONDS = ("initialize", "gradient", "step", "penalty", "parametrize")
TRAINS = "trains"

Outcome = str
"""`TRAINS`, what the refusal said, `TRAINS` and why it does not fold, or "fails: " and what is wrong."""


# -- nets --------------------------------------------------------------------------------------------------------------
class Convolutional(nn.Module):
    """A convolution, two repeated blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, 4, 4, 4] -> [n, 4]."""
        hidden = torch.relu(self.norm(self.first(inputs)))
        for block in self.blocks:
            hidden = hidden + torch.relu(block(hidden))
        return self.head(torch.relu(self.body(hidden.mean((2, 3)))))


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SPREAD = {"initializer_range": 0.2}
"""Of weights this narrow: at 0.02 signals and gradients nearly vanish, and with them what bends a gradient."""


def llama() -> nn.Module:
    """A decoder of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=24, num_key_value_heads=1, max_position_embeddings=16, **SIZES, **SPREAD)
    )


def bert() -> nn.Module:
    """An encoder of two layers that classifies."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=24, max_position_embeddings=16, num_labels=3, **SIZES, **SPREAD, **rates)
    return BertForSequenceClassification(config)


def conv() -> nn.Module:
    """Convolutions, and linear layers on what they see."""
    torch.manual_seed(0)
    return Convolutional()


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 24, (24, 6), generator=draw())}


def words() -> Any:
    inputs = tokens()
    return inputs, inputs["input_ids"].roll(-1, 1)


def sentences() -> Any:
    inputs = tokens()
    return inputs, inputs["input_ids"][:, 0] % 3


def images() -> Any:
    inputs = torch.randn(24, 4, 4, 4, generator=draw())
    return inputs, (inputs.mean((1, 2, 3)) > 0).long() + (inputs[:, 0, 0, 0] > 0).long()


MARK = 5
"""The token with which an instruction ends, where a method needs one in every text."""


def marked(inputs: Any) -> Any:
    """Texts with an instruction of two tokens, which ends with the mark; other inputs as they are."""
    if not isinstance(inputs, dict):
        return inputs
    ids = inputs["input_ids"].clone()
    ids[:, 1] = MARK
    return inputs | {"input_ids": ids}


def paraphrased(inputs: Any) -> Any:
    """Texts, each with another one as its paraphrase; other inputs as they are."""
    if not isinstance(inputs, dict):
        return inputs
    return inputs | {f"paraphrase_{name}": t.roll(1, 0) for name, t in inputs.items()}


def data_for(net: str, trying: list[Method]) -> Any:
    """A net's data, with what these methods look for in it."""
    inputs, targets = NETS[net][1]()
    for method, change in ((IAPT, marked), (LoRABAM, paraphrased)):
        if any(isinstance(m, method) for m in trying):
            inputs = change(inputs)
    return inputs, targets


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "llama": (llama, words),
    "bert": (bert, sentences),
    "conv": (conv, images),
}


@functools.cache
def _first(net: str) -> nn.Module:
    return NETS[net][0]()


def fresh(net: str) -> nn.Module:
    """A net as it is before training."""
    return copy.deepcopy(_first(net))


# -- methods -----------------------------------------------------------------------------------------------------------
@functools.cache
def importance(first: str, net: str) -> str:
    """The path of a file in which every weight of a net with an adapter was of importance 1 before."""
    path = Path(tempfile.mkdtemp(prefix="plait-pairs-", dir=SCRATCH)) / "importance.safetensors"
    model, _ = run(net, methods(first, net), {})
    held = {name: t.clone() for name, t in model.state_dict().items() if t.is_floating_point()}
    kinds = {f"weight/{n}": t for n, t in held.items()} | {f"importance/{n}": t * 0 + 1 for n, t in held.items()}
    write_tensors(path, kinds)
    return str(path)


@functools.cache
def genes(net: str) -> str:
    """The path of a file of another net of the same shapes, from which one can be started."""
    path = Path(tempfile.mkdtemp(prefix="plait-pairs-", dir=SCRATCH)) / "genes.safetensors"
    write_tensors(path, {name: 0.9 * t for name, t in fresh(net).state_dict().items()})
    return str(path)


def special(net: str) -> dict[str, dict[str, Any]]:
    """Fields beside those of the laws, whose net is another, and at which a method acts in these few steps."""
    body = {"llama": "down_proj|up_proj", "bert": "dense", "conv": "body|blocks.[01]"}[net]
    part = {"llama": "model.layers.0", "bert": "bert.encoder.layer.0", "conv": "blocks"}[net]
    return {
        "freeze": {"where": part},
        "r-amt": {"start": 0.0051, "where": ".*"},  # masks that are about to close
        "compacter": {"where": {"bert": "output.dense", "llama": "down_proj", "conv": "body"}[net]},
        "spt": {"where": ".*"},
        "lost": {"where": ".*"},
        "snella": {"where": body},
        "pgc": {"where": {"llama": "lm_head", "bert": "classifier", "conv": "first"}[net]},
        "iapt": {"until": (MARK,)} if net == "llama" else {},
        "ia3": {"outputs": "first|body", "inputs": "head"} if net == "conv" else {},
        "lora-one": {"precondition": True, "damping": 0.1},  # else it only starts
        "adadagrad": {"tolerance": 1e-3},
        "lawn": {"warmup": 0.0},
        "lora-pro": {"damping": 0.1},
        "clip": {"norm": 1e-4},
        "lisa": {"layers": 1, "period": 1},
        "hft": {"period": 1},
        "quantize": {"group": 4},
        "egn": {"lr": 0.05},
        "bo-rep": {"linear_lr": 1e-3},
        "randlora": {"alpha": 4.0},
        "gmt": {"keep": 0.2},
        "ba-lora": {"consistency": 0.1, "diversity": 0.1, "svd": 0.1},
        "large-batch": {"batch_size": 8, "small": 4, "lr": RATE, "ghost": False},
        "mup": {"base": 8},
        "agvm": {} if net == "conv" else {"modules": ("layers?.0", "layers?.1")},
    } | {key: {"rank": 1} for key in ("galore", "fira", "dct-adam", "natural-galore", "gradnormlorp")}


OPTIONS: dict[str, dict[str, Any]] = {"full-batch": {"batch_size": 24}}
COMPANY: dict[str, Callable[[], list[Method]]] = {
    "stn": lambda: [L2(strength=Tuned(start=0.01))],
    "bo-rep": lambda: [L2(strength=Tuned(start=0.01))],
    "hoag": lambda: [L2(strength=Tuned(start=0.01))],
    "maid": lambda: [L2(strength=Tuned(start=0.01))],
    "lv-hba": lambda: [L2(strength=Tuned(start=0.01))],
}
"""What a method needs beside it to have anything to do."""
UNTRIED = {"rank": 2, "batch_size": 8}
"""Fields of what the laws have no case for."""
AGAIN = {"snella": {"rank": 4}, "triadaptlora": {"most": 4}}
"""Fields of an adapter on another of its kind, where a rank of 1 is no choice."""
INSTEAD: dict[str, Callable[[], list[Method]]] = dict.fromkeys(COMPANY, lambda: [L2(strength=0.01)])


@functools.cache
def entries() -> dict[str, catalogue.Entry]:
    """The catalogue."""
    return catalogue.load()


def make(key: str, fields: dict[str, Any]) -> list[Method]:
    """The methods that an entry stands for."""
    result: Any = entries()[key].make(**fields)
    return list(result) if isinstance(result, list | tuple) else [result]


def methods(key: str, net: str, **more: Any) -> list[Method]:
    """What a key stands for, with fields at which it acts on this net."""
    from test_laws import CASES

    known = inspect.signature(entries()[key].make).parameters
    fields = CASES[key].fields if key in CASES else {name: v for name, v in UNTRIED.items() if name in known}
    return make(key, fields | special(net).get(key, {}) | more)


def pair(first: str, second: str, net: str) -> list[Method]:
    """The methods of a pair; adapters of the same kind have different ranks."""
    adapter, more = methods(first, net), dict[str, Any]()
    if second == "hlora-forget":
        more = {"file": importance(first, net)}
    if second in ("tleg", "learngene-sws"):  # beside an adapter they start a net, and make none
        more = {"source": genes(net)} | ({"stages": ()} if second == "learngene-sws" else {})
    then = methods(second, net, **more)
    if any(m in adapter for m in then) and "rank" in inspect.signature(entries()[second].make).parameters:
        then = methods(second, net, **AGAIN.get(second, {"rank": 1}))
    return [*adapter, *COMPANY.get(second, list)(), *then]


def acts_at(place: str) -> list[str]:
    """Keys of what acts at a place, but for what only looks."""
    return [k for k, e in entries().items() if place in e.places and not ("measure" in e.places and looks(e))]


def looks(entry: catalogue.Entry) -> bool:
    return set(entry.places) <= {"initialize", "measure"}


def adapters() -> list[str]:
    """Keys of what changes how weights are made, but for loops."""
    return [key for key in acts_at("parametrize") if not getattr(entries()[key].make, "tunes", False)]


def seconds() -> list[str]:
    """Keys of what an adapter is paired with."""
    return list(dict.fromkeys(key for place in SECONDS for key in acts_at(place)))


# -- a pair ------------------------------------------------------------------------------------------------------------
def run(net: str, trying: list[Method], options: dict[str, Any], folder: Path | None = None) -> tuple[nn.Module, Now]:
    """Train a fresh net; AdamW at a rate of its own where nothing else is an optimizer."""
    data = data_for(net, trying)
    if not any(type(m).optimizer is not Method.optimizer for m in trying):
        trying = [*trying, AdamW(lr=RATE)]
    settings: dict[str, Any] = {"steps": STEPS, "batch_size": 8, "seed": 3, "validation": data, "device": "cpu"}
    kept = {} if folder is None else {"folder": folder, "save_every": STEPS - 1}
    done = train(fresh(net), data, methods=trying, **(settings | options | kept))
    return done.model, done.now


def outputs(net: str, model: nn.Module) -> Tensor:
    """What a model says about a few inputs, without chance."""
    inputs = marked(NETS[net][1]()[0])
    inputs = {name: t[:8] for name, t in inputs.items()} if isinstance(inputs, dict) else inputs[:8]
    with torch.no_grad(), evaluating(model):
        said: Tensor = call_model(model, inputs)
    return said.double()


def far(one: Tensor, other: Tensor) -> float:
    """The largest difference beside the largest value."""
    if one.shape != other.shape or not one.numel():
        return 0.0 if one.shape == other.shape else float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-6))


Left = tuple[Tensor, dict[str, Tensor]]
"""What a trained net says, and what it holds."""


@functools.lru_cache(maxsize=64)
def without(net: str, key: str, company: str, options: tuple[tuple[str, Any], ...]) -> Left | None:
    """What training with an adapter alone leaves; None where that cannot be."""
    try:
        model, _ = run(net, [*methods(key, net), *(INSTEAD[company]() if company else [])], dict(options))
    except (BadInput, NonFinite):
        return None
    return outputs(net, model), {name: t.detach().double() for name, t in model.state_dict().items()}


def change(net: str, model: nn.Module, said: Tensor, alone: Left) -> float:
    """How far a trained net is from another, in what it says or in what it holds (a mask may say the same)."""
    before, held = alone
    moved = [far(t.detach().double(), held[name]) for name, t in model.state_dict().items() if name in held]
    return max([far(said, before), *moved])


def outcome(first: str, second: str, net: str) -> Outcome:
    """Try a pair on a net."""
    options = OPTIONS.get(second, {})
    with tempfile.TemporaryDirectory(prefix="plait-pairs-", dir=SCRATCH) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trying = pair(first, second, net)
            model, now = run(net, trying, options, Path(folder))
        except BadInput as refused:
            return refusal(str(refused))
        except Exception as problem:  # a defect of the pair, whatever it is
            return f"fails: {type(problem).__name__}: {problem}".splitlines()[0]
        try:
            return trained(first, second, net, trying, options, model, now, Path(folder))
        except Exception as problem:
            return f"fails: {type(problem).__name__}: {problem}".splitlines()[0]


def refusal(sentence: str) -> Outcome:
    """The sentence, if it is one."""
    sentence = re.sub(r"/\S*/(?=importance|genes)", "", sentence)  # the folder of one walk
    one = sentence.endswith(".") and "\n" not in sentence
    return sentence if one else f"fails: refused in more than a sentence: {sentence!r}"


def trained(
    first: str, second: str, net: str, trying: list[Method], options: dict[str, Any], model: nn.Module, now: Now,
    folder: Path,
) -> Outcome:  # fmt: skip
    """Say what is wrong with a pair that has trained."""
    said = outputs(net, model)
    if not torch.isfinite(said).all():
        return "fails: the outputs are not finite"
    company = second if second in COMPANY else ""
    alone = without(net, first, company, tuple(sorted(options.items())))
    if alone is not None and (moved := change(net, model, said, alone)) < LEAST:
        return f"fails: {second} does nothing (all that changes is {moved:.0e})"
    shutil.rmtree(folder / f"step-{STEPS}")
    if steps_kept(folder) != [STEPS - 1]:
        return f"fails: the checkpoints are of the steps {steps_kept(folder)}"
    again, _ = run(net, trying, options, folder)
    before, after = model.state_dict(), again.state_dict()
    odd = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    if odd or before.keys() != after.keys():
        return f"fails: does not resume bitwise: {odd or sorted(after.keys() - before.keys())}"
    return merged(net, model, now, said)


def merged(net: str, model: nn.Module, now: Now, said: Tensor) -> Outcome:
    """Fold the trained model, and put the folded weights into the base."""
    adapted = any(stack(layer) for layer in model.modules())
    try:
        plain = Fold().finish(copy.deepcopy(model), now) if adapted else model
    except BadInput as refused:
        return f"{TRAINS}; {refused}"
    if any(stack(layer) for layer in plain.modules()):
        return "fails: folding leaves parametrizations"
    if (off := far(outputs(net, plain), said)) > 1e-4:
        return f"fails: folding changes the outputs by {off:.1e}"
    base = fresh(net)
    held = {name: numbers(t.detach()) for name, t in (*plain.named_parameters(), *plain.named_buffers())}
    own = dict((*base.named_parameters(), *base.named_buffers()))
    if added := sorted(held.keys() ^ own.keys()):
        return f"{TRAINS}; what it adds is no part of a weight, and stays ({added[0]})."
    with torch.no_grad():
        for name, t in own.items():
            t.copy_(held[name])
    if (off := far(outputs(net, base), said)) > 1e-4:
        return f"fails: the base with the folded weights says something else, by {off:.1e}"
    return TRAINS


# -- the walk ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """A pair on a net."""

    first: str
    second: str
    net: str

    def __call__(self) -> Outcome:
        return outcome(self.first, self.second, self.net)


def _work(task: Task) -> tuple[Task, Outcome]:
    torch.set_num_threads(1)
    return task, task()


def tasks() -> Iterator[Task]:
    """All pairs on all nets."""
    for first in adapters():
        for net in NETS:
            for second in seconds():
                yield Task(first, second, net)


def read(place: Path = MATRIX) -> dict[str, dict[str, dict[str, Outcome]]]:
    """What docs/pairs.json holds: adapter -> second method -> net -> outcome."""
    return json.loads(place.read_text())["pairs"] if place.exists() else {}


def write(pairs: dict[str, dict[str, dict[str, Outcome]]], place: Path = MATRIX) -> None:
    """Write the matrix, in the catalogue's order, of what is in the catalogue."""
    firsts, thens = adapters(), seconds()
    kept = {
        first: {then: pairs[first][then] for then in thens if then in pairs[first]}
        for first in firsts
        if first in pairs
    }
    places = {place: [key for key in acts_at(place) if key in thens] for place in SECONDS}
    rows = [
        f' "{first}": {{\n'
        + ",\n".join(f'  "{then}": {json.dumps(by_net, sort_keys=True)}' for then, by_net in row.items())
        + "\n }"
        for first, row in kept.items()
    ]
    head = f'"nets": {json.dumps(list(NETS))}, "steps": {STEPS}, "places": {json.dumps(places)}'
    place.write_text(f'{{{head},\n"pairs": {{\n' + ",\n".join(rows) + "\n}}\n")


def main() -> None:
    """Walk, and write what came out after every hundred pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="try again what stands in the matrix")
    parser.add_argument("--only", default="", help="try again the pairs with these methods (comma between them)")
    parser.add_argument("--failed", action="store_true", help="try again the pairs that failed")
    parser.add_argument("--net", default="", help="only this net")
    parser.add_argument("--to", type=Path, default=MATRIX, help="the file of the matrix")
    given = parser.parse_args()
    pairs, only = read(given.to), set(given.only.split(",")) - {""}

    def wanted(task: Task) -> bool:
        known = pairs.get(task.first, {}).get(task.second, {}).get(task.net)
        again = given.all or bool(only & {task.first, task.second}) or known is None
        return (again or (given.failed and known.startswith("fails"))) and given.net in ("", task.net)

    todo = [task for task in tasks() if wanted(task)]
    print(f"{len(todo)} pairs", flush=True)
    with multiprocessing.get_context("fork").Pool(given.jobs) as pool:
        for number, (task, said) in enumerate(pool.imap(_work, todo, chunksize=8), 1):
            pairs.setdefault(task.first, {}).setdefault(task.second, {})[task.net] = said
            if said.startswith("fails"):
                print(task.first, task.second, task.net, said, flush=True)
            if number % 200 == 0:
                write(pairs, given.to)
                print(number, flush=True)
    write(pairs, given.to)


if __name__ == "__main__":
    main()
