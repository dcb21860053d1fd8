"""The processes that are at runs."""

import os
import subprocess
import sys

import torch

from .comparison import Comparison
from .run import Run
from .watch import PARENT

ELSEWHERE = 75
"""Exit status of a run that another process is at."""


class Workers:
    """Processes that are at runs, so many at a time; each has a GPU or its part of the cores."""

    def __init__(self, comparison: Comparison, jobs: int, threads: int | None) -> None:
        self.comparison, self.jobs = comparison, jobs
        self.threads = threads or max(1, _cores() // jobs)
        self.at: dict[Run, tuple[subprocess.Popen[bytes], int]] = {}
        self.failed: set[Run] = set()
        self.elsewhere: set[Run] = set()

    def start(self) -> None:
        """Give every free worker a run that no other process is at."""
        self.elsewhere.clear()
        taken = self.failed | self.at.keys()
        free = [slot for slot in range(self.jobs) if slot not in [slot for _, slot in self.at.values()]]
        for run in self.comparison.runs():
            if not free or run in taken or self.comparison.finished(run):
                continue
            if run.held:
                self.elsewhere.add(run)
                continue
            slot = free.pop(0)
            command = [sys.executable, "-m", "grade_lightning_cli.compare", f"--out={run.out}", f"--run={run.name}"]
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
            environment[PARENT] = str(os.getpid())
            if torch.cuda.device_count() > 1:
                environment["CUDA_VISIBLE_DEVICES"] = _gpus()[slot % len(_gpus())]
            with (run.folder / "log.txt").open("ab") as log:
                self.at[run] = subprocess.Popen(command, stdout=log, stderr=log, env=environment), slot

    def collect(self) -> None:
        """See which have ended."""
        for run, (process, _) in list(self.at.items()):
            status = process.poll()
            if status is not None:
                del self.at[run]
                if status != ELSEWHERE and (status or run.result is None):
                    self.failed.add(run)

    def stop(self) -> None:
        """End them all."""
        for process, _ in self.at.values():
            process.terminate()
        for process, _ in self.at.values():
            process.wait()


def _cores() -> int:
    """That this process may use, which a job's own limit makes fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
