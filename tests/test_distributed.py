"""Two gloo processes, replicated (DDP) or sharded (FSDP2), give the loss and the weights of one process."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("distributed_run.py")
TOLERANCE = 1e-6
"""Largest difference of a loss or a weight: sums over processes round differently from sums over a batch."""


def launch(processes: int, sharding: str, adapters: str, folder: str = "-", steps: int = 6) -> dict[str, Any]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*start, str(SCRIPT), sharding, adapters, folder, str(steps)], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    np.testing.assert_allclose(one["objective"], other["objective"], atol=TOLERANCE)
    assert one["weights"].keys() == other["weights"].keys()
    for name, weight in one["weights"].items():
        np.testing.assert_allclose(weight, other["weights"][name], atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("adapters", ["full", "lora", "galore", "adadagrad"])
def test_two_processes_give_what_one_gives(adapters: str) -> None:
    one = launch(1, "none", adapters)
    assert_close(launch(2, "none", adapters), one)
    assert_close(launch(2, "fsdp", adapters), one)


def test_measures_of_sharded_weights_are_those_of_whole_ones() -> None:
    whole, sharded = (launch(2, sharding, "measured") for sharding in ("none", "fsdp"))
    assert_close(sharded, whole)
    assert len(whole["measures"]) == 4
    for name, figures in whole["measures"].items():
        assert [seen["step"] for seen in figures] == [2, 4, 6]
        for one, other in zip(figures, sharded["measures"][name], strict=True):
            numbers = [key for key, value in one.items() if not isinstance(value, dict)]
            np.testing.assert_allclose([one[key] for key in numbers], [other[key] for key in numbers], rtol=1e-3)


@pytest.mark.parametrize("rule", ["lisa", "hft"])
def test_two_processes_freeze_the_same_weights(rule: str) -> None:
    assert_close(launch(2, "none", rule), launch(1, "none", rule))


OWN_LOOP = """
import torch
from torch import nn
from plait.sharding import gather, leave, rank
from plait.step.layer_sampling import LISA
torch.distributed.init_process_group("gloo")
torch.manual_seed(rank())
rule = LISA(nn.Sequential(*(nn.Linear(3, 3) for _ in range(40))).named_parameters(), layers=20, period=1)
asked = torch.tensor([p.requires_grad for p in rule.param_groups[0]["params"]])
assert all(torch.equal(other, asked) for other in gather(asked))
leave()
"""


def test_processes_of_different_seeds_freeze_the_same_weights(tmp_path: Path) -> None:
    """In a loop of one's own each process has often a seed of its own."""
    script = tmp_path / "loop.py"
    script.write_text(OWN_LOOP)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*start, str(script)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


UNEVEN = """
import sys
import torch
from torch import nn
from plait import SGD, train
from plait.penalty.norm import L2
from plait.sharding import leave, rank
rows, sharding = int(sys.argv[1]), sys.argv[2]
x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
torch.manual_seed(0)
run = train(
    nn.Linear(3, 1), (x, x[:, 0] ** 2), methods=[L2(strength=0.1), SGD(lr=0.1)], steps=4, batch_size=12, accumulate=2,
    sharding=sharding, device="cpu",
)
if rank() == 0:
    print([t.flatten().tolist() for t in run.model.parameters()], [seen["objective"] for seen in run.history])
leave()
"""


@pytest.mark.parametrize(("rows", "processes"), [(14, 3), (15, 2)])
def test_a_process_without_an_example_adds_nothing(rows: int, processes: int, tmp_path: Path) -> None:
    """The last batch of an epoch has two examples for three processes; or one for the second micro-batch of two."""
    script, ends = tmp_path / "uneven.py", []
    script.write_text(UNEVEN)
    together = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    for start, sharding in (([], "none"), (together, "none"), (together, "fsdp")):
        run = [sys.executable, *start, str(script), str(rows), sharding]
        done = subprocess.run(run, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-3000:]
        ends.append([float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", done.stdout.strip().splitlines()[-1])])
    assert len(ends[0]) == 8
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], atol=TOLERANCE)


def test_statistics_for_averaged_weights_are_those_of_all_processes() -> None:
    assert launch(2, "none", "average")["apart"] == 0.0


def test_two_processes_train_the_same_entries() -> None:
    assert_close(launch(2, "none", "sparse"), launch(1, "none", "sparse"))


@pytest.mark.parametrize(("sharding", "adapters"), [("fsdp", "sparse"), ("none", "growing")])
def test_entries_of_several_processes(sharding: str, adapters: str) -> None:
    """Sharded ones are refused; grown ones are the same for all, though each process sees another part of a batch."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = [*start, str(SCRIPT), sharding, adapters, "-", "6"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=180)
    if sharding == "fsdp":
        says = "looks at single entries, and these are sharded over processes: use sharding='none'."
        assert says in done.stderr
    else:
        assert json.loads(done.stdout.strip().splitlines()[-1])["apart"] == 0.0


def test_sharded_weights_are_not_frozen_in_turns() -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*start, str(SCRIPT), "fsdp", "hft", "-", "2"], capture_output=True, text=True, timeout=180)
    assert "HFT freezes whole weights as it goes, and these are sharded: use sharding='none'." in done.stderr


@pytest.mark.parametrize("adapters", ["full", "galore"])
def test_a_sharded_run_goes_on_from_its_checkpoint(adapters: str, tmp_path: Path) -> None:
    launch(2, "fsdp", adapters, str(tmp_path), steps=3)
    assert_close(launch(2, "fsdp", adapters, str(tmp_path), steps=6), launch(1, "none", adapters))


@pytest.mark.parametrize("name", ["agvm", "lora-pro"])
def test_means_of_sharded_gradients_go_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    launch(2, "fsdp", name, str(tmp_path), steps=3)
    assert_close(launch(2, "fsdp", name, str(tmp_path), steps=6), launch(2, "none", name))


def test_sharding_alone_is_refused() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "fsdp", "full", "-", "2"], capture_output=True, text=True)
    assert "sharding='fsdp' needs several processes: start them with torchrun." in done.stderr
