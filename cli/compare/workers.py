"""The processes that are at runs."""

import os
import time
from collections.abc import Callable

import torch

from .comparison import Comparison
from .run import Run
from .start import Process, start
from .watch import PARENT

ELSEWHERE = 75
"""Exit status of a run that another process is at."""


class Workers:
    """Processes that are at runs, so many at a time; each has a GPU or its part of the cores.

    Args:
        comparison: with the runs.
        jobs: how many processes.
        threads: of each; None: its part of the cores.
        work: the command that does one run, as a function of its arguments.
    """

    def __init__(
        self, comparison: Comparison, jobs: int, threads: int | None, work: Callable[[list[str]], object]
    ) -> None:
        self.work = work
        self.comparison, self.jobs = comparison, jobs
        self.threads = threads or max(1, _cores() // jobs)
        self.at: dict[Run, tuple[Process, int]] = {}
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
            variables = {PARENT: str(os.getpid())}
            if torch.cuda.device_count() > 1:
                variables["CUDA_VISIBLE_DEVICES"] = _gpus()[slot % len(_gpus())]
            self.at[run] = start(run, self.threads, variables, self.work), slot

    def collect(self) -> None:
        """See which have ended."""
        for run, (process, _) in list(self.at.items()):
            status = process.poll()
            if status is not None:
                del self.at[run]
                if status != ELSEWHERE and (status or run.result is None):
                    self.failed.add(run)

    def wait(self, longest: float) -> None:
        """Until a process has ended. To look at all runs takes cores away from those that are at work.

        Args:
            longest: seconds; after them another process may have ended a run of its own.
        """
        until = time.monotonic() + longest
        while time.monotonic() < until and all(process.poll() is None for process, _ in self.at.values()):
            time.sleep(0.5)

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
