"""The runs of a comparison, spread over a Ray cluster.

A run whose worker dies is tried again, from its checkpoint where the machines share the folder, from the start where
they do not; the figures are the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import BadInput
from plait.workbench.store import Job

if TYPE_CHECKING:
    from plait.workbench.compare import Bars

RETRIES = 3


def run_job(config: str, folder: str) -> dict[str, Any]:
    """Run one recipe in a process of its own on this machine, and return what it left: {file name: values}."""
    from plait.recipe import Recipe
    from plait.workbench.local import run_one

    job = Job(Recipe.parse(config), Path(folder))
    run_one(job)
    done, failed = job.finished(), job.failed()
    return {"results.json": done} if done is not None else {"failed.json": failed}


def run_all(jobs: Sequence[Job], bars: Bars) -> None:
    """Run jobs over the cluster of RAY_ADDRESS, or over one on this machine; write what they return here."""
    if find_spec("ray") is None:
        raise BadInput("--engine ray needs Ray: pip install 'plait[ray]', or use --engine local.")
    import ray

    from plait.workbench.writing import write_json

    if not jobs:
        return
    ours = not ray.is_initialized()
    if ours:
        # The cluster of RAY_ADDRESS; without one, a new one here that ends with the comparison.
        ray.init(address=os.environ.get("RAY_ADDRESS") or "local", log_to_driver=False, logging_level="error")
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(run_job)
    waiting = {remote.options(name=job.title).remote(str(job.recipe), str(job.folder.resolve())): job for job in jobs}
    try:
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready)
            try:
                left = ray.get(ready)
            except ray.exceptions.RayError as problem:
                left = {"failed.json": {"error": f"the run's worker died {RETRIES + 1} times: {problem}"}}
            job.ready()
            for name, values in left.items():
                write_json(job.folder / name, values)
            bars.done(job, "failed" if job.finished() is None else "done")
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()
