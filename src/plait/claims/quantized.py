"""Claims of quantized bases, on the turned digits of `plait.claims.parametrize`."""

from __future__ import annotations

import copy

import torch
from torch import nn

from plait.claims.base import claim
from plait.claims.parametrize import ADAPTER_RATES, Task, accuracy, beside, digits, misfit, pretrained, rotated, tuned
from plait.finish.quantize import Requantize
from plait.initialize.quantization import LoftQ
from plait.method import Method, Now
from plait.parametrize.low_rank import LoRA
from plait.parametrize.quantized import QLoRA, Quantize

RATES = (1e-2,)


@claim(
    "qlora",
    says="LoRA of rank 4 adapts to turned digits on a base of 4 bits as well as on the same base in float32, to 0.02",
    baseline="LoRA of the same rank and learning rate on the base in float32",
    figure="accuracy on held-out turned digits",
    better="higher",
    margin=-0.02,
    seeds=20,
    first_seed=100,
)
def four_bits_cost_little_accuracy(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits, at one learning rate: five seeds and 0.01 decided nothing."""
    return beside(Task(rotated, 300, 100, seed), lambda: QLoRA(rank=4), lambda: [LoRA(rank=4)], RATES)


def distance(seed: int, methods: list[Method]) -> float:
    """Return the mean squared distance of the logits from the pretrained network's, before any training."""
    images = digits()[0][1000:]
    base = pretrained(seed)
    model: nn.Module = copy.deepcopy(base)
    torch.manual_seed(seed)
    for method in methods:
        method.parametrize(model)
    for method in methods:
        method.initialize(model, Now())
    with torch.no_grad():
        return float((model(images) - base(images)).square().mean())


def rounded(seed: int, method: Quantize) -> nn.Module:
    """Return the pretrained network with its weights in codes."""
    model: nn.Module = copy.deepcopy(pretrained(seed))
    method.parametrize(model)
    return model.eval()


@claim(
    "quantize",
    says="a network whose weights are rounded to 8 bits is as accurate as in float32, to 0.002",
    baseline="the network in float32",
    figure="accuracy on held-out digits",
    better="higher",
    margin=-0.002,
    seeds=24,
    first_seed=1000,
)
def eight_bits_keep_the_accuracy(seed: int) -> tuple[float, float]:
    """Compare on 797 digits, without any training after rounding."""
    images, labels = digits()
    held = images[1000:], labels[1000:]
    return accuracy(rounded(seed, Quantize(bits=8, keep="never")), held), accuracy(pretrained(seed), held)


@claim(
    "quantize",
    says="at 4 bits in groups of 64, nf4 is nearer to the unquantized network than whole-number codes are",
    baseline="4-bit whole numbers with a scale and a zero for each group, which take 5 % more memory",
    figure="mean squared distance of the logits on held-out digits, before training",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def nf4_is_nearer_than_whole_numbers(seed: int) -> tuple[float, float]:
    """Compare on the network that upright digits were learned with."""
    return distance(seed, [Quantize(bits=4)]), distance(seed, [Quantize(bits=4, format="int")])


def size(model: nn.Module) -> float:
    """Return the bytes of a model's state."""
    return float(sum(t.numel() * t.element_size() for t in model.state_dict().values()))


@claim(
    "quantize",
    says="the network takes less than 0.3 of its memory at 8 bits, biases and scales counted",
    baseline="0.3 of the network in float32; in bfloat16 it takes 0.5",
    figure="bytes of the state dict",
    better="lower",
)
def eight_bits_take_less_memory(seed: int) -> tuple[float, float]:
    """Count the bytes of codes, scales and biases."""
    return size(rounded(seed, Quantize(bits=8, keep="never"))), 0.3 * size(pretrained(seed))


@claim(
    "loftq",
    says="a base of 4 bits with LoftQ's start (rank 4, 5 rounds) is nearer to the unquantized network than without it",
    baseline="the same quantized base under LoRA's own start, which adds nothing",
    figure="mean squared distance of the logits on held-out digits, before training",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def starts_nearer_to_the_unquantized_network(seed: int) -> tuple[float, float]:
    """Compare on the network that upright digits were learned with."""
    base: list[Method] = QLoRA(rank=4)
    return distance(seed, [*base, LoftQ(rounds=5)]), distance(seed, base)


@claim(
    "loftq",
    says="after 20 steps on turned digits LoRA of rank 4 on a base of 4 bits fits them better with this start",
    baseline="LoRA's own start on the same base, its learning rate chosen from the same three",
    figure="cross entropy on the digits that are trained on",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def fits_sooner_on_four_bits(seed: int) -> tuple[float, float]:
    """Compare at 20 steps on 300 turned digits."""
    return beside(
        Task(rotated, 300, 20, seed),
        lambda: [*QLoRA(rank=4), LoftQ(rounds=5)],
        lambda: QLoRA(rank=4),
        ADAPTER_RATES,
        judge=misfit,
        on="train",
    )


@claim(
    "requantize",
    says="a folded QLoRA model errs less when rounded to 4 bits from the unrounded base than from the dequantized one",
    baseline="the same adapters folded into the dequantized base, whose sum is rounded a second time",
    figure="cross entropy on held-out turned digits",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def one_rounding_is_better_than_two(seed: int) -> tuple[float, float]:
    """Compare after 100 steps on 300 turned digits; each side has the best of three learning rates."""
    task = Task(rotated, 300, 100, seed)

    def side(originals: bool) -> nn.Module:
        base = Quantize(keep="always")
        return tuned(seed, lambda: [base, LoRA(rank=4), Requantize(originals=originals)], task, ADAPTER_RATES)

    return misfit(side(True), task.test), misfit(side(False), task.test)
