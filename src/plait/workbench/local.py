"""The runs of a comparison on this machine: each in a process of its own, some at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from plait.errors import BadInput
from plait.workbench.store import Job
from plait.workbench.writing import write_json, write_text

if TYPE_CHECKING:
    from plait.workbench.compare import Bars

OnStep = Callable[[Job, dict[str, Any]], None]
Children = list[subprocess.Popen[str]]
STOPPED = (130, -signal.SIGTERM)
"""The exit codes of a run that was stopped: after a checkpoint, or outside its steps."""


def run_all(jobs: Sequence[Job], bars: Bars, workers: int = 1) -> None:
    """Run jobs, `workers` at a time, which share the cores; raise KeyboardInterrupt when Ctrl-C was pressed."""
    children: Children = []
    share = None if workers == 1 else threads(workers)

    def run(job: Job) -> None:
        run_one(job, bars.step, share=share, add=children)
        bars.done(job, "failed" if job.finished() is None else "done")

    pool = ThreadPoolExecutor(workers)
    running = [pool.submit(run, job) for job in jobs]
    try:
        wait(running, return_when=FIRST_EXCEPTION)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(done.done() for done in running):
            _stop(children)
            time.sleep(0.05)
    for done in running:
        done.result()


def check_workers(workers: int) -> None:
    """Refuse more runs at a time than there are cores, or none."""
    if not 1 <= workers <= (os.cpu_count() or 1):
        raise BadInput(f"workers must be between 1 and the {os.cpu_count()} cores of this machine, not {workers}.")


def threads(workers: int) -> int:
    """Return how many cores each of some runs at a time has."""
    return max((os.cpu_count() or 1) // workers, 1)


def run_one(job: Job, on_step: OnStep | None = None, *, share: int | None = None, add: Children | None = None) -> None:
    """Run a job in a process of its own, and wait for its end; its folder then holds results.json or failed.json.

    share: how many cores it may use [all]. add: where its process is put, for who may have to stop it.

    Raises KeyboardInterrupt where the run was stopped.
    """
    job.ready()
    recipe = job.folder / "job.yaml"
    write_text(recipe, f"{job.recipe}\n")
    command = [sys.executable, "-m", "plait.workbench.worker", str(recipe), str(job.folder)]
    limit = {} if share is None else {"OMP_NUM_THREADS": str(share), "NUMBA_NUM_THREADS": str(share)}
    with open(job.folder / "log.txt", "a", encoding="utf-8") as log:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=os.environ | limit
        )
        if add is not None:
            add.append(child)
        try:
            _listen(child, job, on_step)
        except BaseException:
            _stop([child])
            raise
    if child.returncode in STOPPED:
        raise KeyboardInterrupt
    if job.finished() is None and job.failed() is None:
        lines = (job.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        _fail(job, _reason(child.returncode, lines))
    if job.finished() is not None:
        job.tidy()


def _stop(children: Children) -> None:
    """End runs: each saves a checkpoint after the step under way; who cannot wait presses Ctrl-C again."""
    left = [child for child in children if child.poll() is None]
    try:
        for child in left:
            child.terminate()
        for child in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(60)
    finally:
        for child in left:
            child.kill()
            child.wait()


def _listen(child: subprocess.Popen[str], job: Job, on_step: OnStep | None) -> None:
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                if on_step is not None and isinstance(told, dict) and "step" in told:
                    on_step(job, told)
    child.wait()


def _reason(code: int, lines: list[str]) -> str:
    if code == -9:
        return "the system killed the process, most likely for want of memory: use `plait plan` on this recipe."
    return f"the process ended with code {code}: {lines[-1] if lines else 'it said nothing'}"


def _fail(job: Job, error: str) -> None:
    write_json(job.folder / "failed.json", {"error": error})
