"""Chunked logits, tied embeddings and data-driven starts: two processes, replicated or sharded, give what one gives."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plait.parametrize.base import LEFT

SCRIPT = Path(__file__).with_name("distributed_language_model.py")
TOLERANCE = 2e-5
"""Largest difference of a loss or a weight after four steps of AdamW, which divides by the gradient's own size."""


def launch(processes: int, sharding: str, methods: str) -> dict[str, Any]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*start, str(SCRIPT), sharding, methods], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def is_record(name: str) -> bool:
    """Say whether a tensor of a state is what a start left as its record."""
    return name.endswith(f".{LEFT}")


@pytest.mark.parametrize(
    ("methods", "sharding"),
    [("full", "none"), ("full", "fsdp"), ("gradient start", "fsdp"), ("activation start", "fsdp")],
)
def test_two_processes_give_what_one_gives(methods: str, sharding: str) -> None:
    one, two = launch(1, "none", methods), launch(2, sharding, methods)
    np.testing.assert_allclose(one["objective"], two["objective"], atol=TOLERANCE)
    assert one["weights"].keys() == two["weights"].keys()
    assert (methods == "full") == (not any(map(is_record, one["weights"])))
    for name, weight in one["weights"].items():
        if is_record(name):  # a digest of weights that agree to rounding says nothing
            continue
        np.testing.assert_allclose(weight, two["weights"][name], atol=TOLERANCE, err_msg=name)
