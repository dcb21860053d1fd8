"""Errors for people: one line and status 2 for what is wrong with the input, no noise, nothing half-made."""

import errno
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from grade_lightning.errors import InputError

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


@contextmanager
def user_errors(name: str) -> Iterator[None]:
    """Quiet what says nothing to the user; turn errors of input into one line and status 2."""
    _quieten()
    try:
        yield
    except SIGTERMException:  # which would end with success
        raise SystemExit(128 + signal.SIGTERM) from None
    except Exception as error:
        known: Exception | str | None = _error_of_input(error)
        if known is None and isinstance(error, OSError) and error.errno in _UNWRITABLE and error.filename:
            known = f"{error.filename}: cannot be written ({error.strerror}); give another folder, or make room"
        if known is None:
            raise
        print(f"{name}: error: {known}", file=sys.stderr)
        raise SystemExit(2) from None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # its threads may abort a process that leaves without


@contextmanager
def refusals() -> Iterator[None]:
    """What Lightning or jsonargparse itself refuses is the user's to mend; any other error is a fault of somebody's."""
    try:
        yield
    except Exception as error:
        chain: list[BaseException] = [error]
        while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(deeper)
        packages = [frame.f_globals["__name__"].partition(".")[0] for frame, _ in walk_tb(chain[-1].__traceback__)]
        told = any(isinstance(link, InputError) for link in chain)
        if told or packages[-1:] not in (["lightning"], ["jsonargparse"], ["typing"]):
            raise
        raise InputError(f"{' '.join(str(chain[-1]).split()).rstrip('.')}; check the value") from error


@contextmanager
def remove_unstarted_run(trainer: Trainer, step: int = 0) -> Iterator[None]:
    """Remove what this start wrote when it ends before its first step: the run's new folder, after an error of input.

    Of a run that was there only the new configuration and the new curves are removed, after any error.

    Args:
        trainer: of the run.
        step: at which it starts.
    """
    folder = Path(trainer.log_dir) if trainer.logger is not None and trainer.log_dir else None
    existed = folder is None or folder.exists()
    before = _written_at_start(folder)
    try:
        yield
    except Exception as error:
        if folder is not None and trainer.global_step in (0, step) and trainer.is_global_zero:
            if existed:
                for path in _written_at_start(folder) - before:
                    path.unlink(missing_ok=True)
            elif isinstance(error, InputError):
                shutil.rmtree(folder, ignore_errors=True)
                for parent in list(folder.parents)[:2]:
                    if parent.is_dir() and not any(parent.iterdir()):
                        parent.rmdir()
        raise


def _written_at_start(folder: Path | None) -> set[Path]:
    if folder is None:
        return set()
    return {*folder.glob("config-*.yaml"), *folder.glob("events.out.tfevents.*")}


@contextmanager
def all_end_together(trainer: Trainer) -> Iterator[None]:
    """When this process fails, end those that it started: they would wait for it."""
    try:
        yield
    except Exception as error:
        launcher, known = trainer.strategy.launcher, _error_of_input(error)
        if not isinstance(launcher, _SubprocessScriptLauncher):
            raise
        patience = time.monotonic() + (10 if known is None else 0)
        while not any(process.poll() for process in launcher.procs) and time.monotonic() < patience:
            time.sleep(0.1)  # one that failed first has closed its connections, and is about to end
        failed = [process.returncode for process in launcher.procs if process.returncode]
        launcher.kill(signal.SIGKILL)  # in a collective a process hears nothing less
        if known is None and failed:
            raise InputError(f"another process ended with status {failed[0]}; its message is above") from error
        raise


def _error_of_input(error: BaseException | None) -> InputError | None:
    """What is behind it: jsonargparse wraps what the classes that it makes raise."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def _quieten() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for pattern in (
        r".*does not have many workers.*",
        r".*in eval mode at the start of training.*",
        r".*LeafSpec.*",
        r".*is_gradient_checkpointing.*",
        r"Checkpoint directory .* exists and is not empty.*",
        r"The dirpath has changed from.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tips)


def _no_tips(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
