"""Which checkpoint a command starts from, and which run it resumes."""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from grade_lightning.errors import InputError


@dataclass(frozen=True)
class Start:
    """Where a command starts."""

    checkpoint: Path | None = None
    """None: at the beginning."""
    folder: Path | None = None
    """The run's folder where it is known beforehand: of a run that is resumed, and of a job of SLURM."""
    step: int = 0
    """Optimizer steps that the checkpoint has behind it."""
    method: str | None = None
    """Whose the checkpoint is, if it is of a module of ours."""

    @property
    def config_name(self) -> str:
        """The configuration of each start of a run is kept, the first one as `config.yaml`.

        Example:
            >>> Start().config_name
            'config.yaml'
        """
        earlier = len(list(self.folder.glob("config*.yaml"))) if self.folder is not None else 0
        return f"config-{earlier + 1}.yaml" if earlier else "config.yaml"


def find_start(ckpt_path: str | None, runs: Path, command: str, args: Sequence[str]) -> Start:
    """Read `--ckpt_path`: nothing, a file, the folder of a run, or `last`. Only a run that trains is resumed.

    Args:
        ckpt_path: what the user gave.
        runs: the folder of the method's runs.
        command: `fit`, or one that only measures.
        args: the command's arguments; with the number of the job they tell a run of SLURM from others.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
    """
    job = _job_folder(runs, args) if command == "fit" else None
    if job is not None and (own := latest(job)) is not None:
        checkpoint, folder = own, job
    elif ckpt_path is None:
        return Start(folder=job)
    elif ckpt_path == "last":
        found = [path for folder in runs.glob("*/") if (path := latest(folder)) is not None]
        if not found and command == "fit":
            rank_zero_info(f"--ckpt_path last: no checkpoint in {runs} yet, so this run begins at the beginning")
            return Start(folder=job)
        if not found:
            raise InputError(f"--ckpt_path last: there is no checkpoint in {runs}; give the path of a .ckpt file")
        checkpoint = max(found, key=_written)
        folder = checkpoint.parent.parent
    elif Path(ckpt_path).is_dir():
        folder = Path(ckpt_path)
        if (own := latest(folder)) is None:
            raise InputError(f"{folder}: holds no checkpoint of a run; give --ckpt_path a run's folder or a .ckpt file")
        checkpoint = own
    else:
        return Start(Path(ckpt_path), job, *_check(Path(ckpt_path)))
    step, method = _check(checkpoint)
    if command != "fit":
        return Start(checkpoint)
    rank_zero_info(f"The run in {folder} resumes at step {step}, from {checkpoint.relative_to(folder)}")
    return Start(checkpoint, folder, step, method)


def latest(folder: Path) -> Path | None:
    """The checkpoint of a run that was written last."""
    return max(folder.glob("checkpoints/*.ckpt"), key=_written, default=None)


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


def _job_folder(runs: Path, args: Sequence[str]) -> Path | None:
    """Where a job of SLURM, or one task of an array, keeps what this command does; None outside of SLURM.

    A restarted job finds the folder that it had. A job that does the same twice has another one for the second time.
    """
    if not SLURMEnvironment.detect() or (job := SLURMEnvironment.job_id()) is None:
        return None
    digest = hashlib.blake2b(repr(list(args)).encode(), digest_size=3).hexdigest()
    name = f"job_{job}_{digest}"
    earlier = [folder for folder in runs.glob(f"{name}*/") if latest(folder) is not None]
    if earlier and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        return max(earlier, key=lambda folder: _written(folder / "checkpoints"))
    return runs / (f"{name}_{len(earlier) + 1}" if earlier else name)


def _check(path: Path) -> tuple[int, str | None]:
    """Find a missing or damaged checkpoint before anything is built for it.

    Returns:
        The checkpoint's step, and its method.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such checkpoint file; give --ckpt_path the path of a .ckpt, a run's folder, or 'last'"
        )
    try:
        if getattr(rank_zero_only, "rank", 0) == 0 and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:  # torch itself looks at no checksum
                if (bad := file.testzip()) is not None:
                    raise ValueError(f"the checksum of {bad} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: cannot be read as a checkpoint of weights ({reason}); it is damaged or foreign"
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        raise InputError(f"{path}: is not a checkpoint of Lightning; give the .ckpt file that grade-fit wrote")
    return int(checkpoint.get("global_step", 0)), checkpoint.get("grade_lightning", {}).get("method")
