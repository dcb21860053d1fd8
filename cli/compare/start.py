"""How the process of a run is started: a fork of this one where that is safe, so that nothing is imported again."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Protocol

import torch

from .run import Run


class Process(Protocol):
    """What is asked of a process; `subprocess.Popen` answers it."""

    def poll(self) -> int | None:
        """Its exit status; None while it is at work."""

    def terminate(self) -> None:
        """End it by SIGTERM."""

    def wait(self) -> int:
        """Its exit status, when it has ended."""


class Forked:
    """A fork of this process, with the face of `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        self.process = process
        self.terminate = process.terminate

    def poll(self) -> int | None:
        """Its exit status; None while it is at work."""
        return self.process.exitcode

    def wait(self) -> int:
        """Its exit status, when it has ended."""
        self.process.join()
        return self.process.exitcode or 0


def start(run: Run, threads: int, variables: Mapping[str, str], work: Callable[[list[str]], object]) -> Process:
    """Start the process of a run; what it says goes to the run's log.

    Args:
        run: which.
        threads: that it may use.
        variables: of its environment, beside those of this process.
        work: the command, as a function of its arguments.
    """
    arguments = [f"--out={run.out}", f"--run={run.name}"]
    variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **variables}
    if forks():
        process = multiprocessing.get_context("fork").Process(
            target=_forked, args=(run, threads, variables, work, arguments)
        )
        process.start()
        return Forked(process)
    command = [sys.executable, "-m", "grade_lightning_cli.compare", *arguments]
    with (run.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | variables)


def forks() -> bool:
    """Whether a fork is safe: not beside other threads, not with a GPU, whose driver does not survive it."""
    return sys.platform == "linux" and threading.active_count() == 1 and not torch.cuda.is_available()


def _forked(
    run: Run, threads: int, variables: Mapping[str, str], work: Callable[[list[str]], object], arguments: list[str]
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a command like nohup has left it
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)
    with (run.folder / "log.txt").open("ab") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a display of the parent may have put its own there
    os.environ.update(variables)
    torch.set_num_threads(threads)
    work(arguments)
