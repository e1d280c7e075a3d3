"""What each process of the test of distributed training runs: argv = sharding, methods, folder, steps."""

import json
import os
import sys

import torch
from torch import nn

from plait import train
from plait.data.batch_size import AdaptiveBatchSize
from plait.finish.average import EMA
from plait.gradient.low_rank import LoRAPro
from plait.gradient.module_variance import AGVM
from plait.measure.coherence import Coherence
from plait.measure.curvature import HessianSpectrum
from plait.measure.generalization import GeneralizationGap
from plait.measure.subspace import SubspaceAngle
from plait.method import Method
from plait.parametrize.low_rank import LoRA
from plait.parametrize.masked import RAMT
from plait.parametrize.sparse_growth import SpIEL
from plait.parametrize.sparse_smallest import SaRA
from plait.sharding import gather, leave
from plait.step.adagrad import AdaGradNorm
from plait.step.layer_sampling import HFT, LISA
from plait.step.low_rank import GaLore
from plait.step.momentum import SGD


class Net(nn.Module):
    """Two repeated blocks and a head, so that sharding has something to shard one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, 6] -> [n, 2]."""
        for block in self.blocks:
            inputs = torch.tanh(block(inputs))
        return self.head(inputs) * 1.0


class Normalized(Net):
    """With running statistics behind the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.insert(1, nn.BatchNorm1d(6))


METHODS: dict[str, list[Method]] = {
    "full": [],
    "lora": [LoRA(rank=2)],
    "adadagrad": [AdaptiveBatchSize(pieces=4, tolerance=0.05, most=24), AdaGradNorm(lr=1.0)],
    "galore": [GaLore(rank=2, period=2, lr=0.01)],
    "sparse": [
        SpIEL(density=0.3, growth="momenta", every=2, estimate=1, where="blocks.0"),
        SaRA(share=0.4, where="blocks.1"),
        RAMT(where="head"),
    ],
    "growing": [SpIEL(density=0.3, every=3, estimate=2, rate=0.5, where="blocks.[01]")],
    "lisa": [LISA(where="blocks.[0-9]", layers=1, period=2)],
    "hft": [HFT(period=2)],
    "agvm": [AGVM(every=1, adaptive=True)],
    "lora-pro": [LoRA(rank=2), LoRAPro(adam=True), SGD(lr=0.05)],
    "average": [EMA(decay=0.9)],
    "measured": [
        GaLore(rank=2, period=2, lr=0.01),
        *(HessianSpectrum(), Coherence(), GeneralizationGap(), SubspaceAngle()),
    ],
}


def main() -> None:
    """Train, and let the first process print the curve and the weights."""
    sharding, name, folder, steps = sys.argv[1:5]
    torch.manual_seed(0)
    inputs = torch.randn(64, 6)
    methods, net = METHODS[name], Normalized() if name == "average" else Net()
    run = train(
        net, (inputs, (inputs.sum(1) > 0).long()), methods=methods, steps=int(steps), batch_size=16, accumulate=2,
        sharding=sharding, device="cpu", folder=folder if folder != "-" else None, measure_every=2,
    )  # fmt: skip
    state = [t.double() for t in run.model.state_dict().values()]
    apart = max(float((gather(t)[-1] - t).abs().max()) for t in state)
    if int(os.environ.get("RANK", "0")) == 0:
        weights = {name: t.tolist() for name, t in run.model.state_dict().items()}
        objective = [h["objective"] for h in run.history]
        print(json.dumps({"objective": objective, "weights": weights, "apart": apart, "measures": run.measures}))


if __name__ == "__main__":
    main()
    leave()
