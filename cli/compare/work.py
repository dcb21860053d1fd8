"""What is done for one run: it is trained, and its test split is measured."""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

import grade_lightning
from grade_lightning.errors import DivergenceError, InputError
from grade_lightning.files import write_atomically
from grade_lightning.modules import AlignmentModule
from grade_lightning.modules.trainable import batching_of

from ..config import GradeCLI, build
from ..run import train, write_test
from .comparison import Comparison
from .plan import Plan
from .run import Run
from .watch import Watch


def work(comparison: Comparison, run: Run) -> None:
    """Train, unless it is done; measure the test split, if the setting is the chosen one."""
    if run.result is None:
        _train(comparison, run)
    comparison.note_choices()
    if not comparison.finished(run):
        _test(comparison, run)


def _train(comparison: Comparison, run: Run) -> None:
    plan, arguments = comparison.plan, comparison.arguments(run)
    arguments += _budget(build(arguments), plan)
    cli = build([*arguments, "--ckpt_path=last"])  # of an earlier start, if there was one
    cli.trainer.callbacks.append(Watch(run.folder / "progress.json"))  # type: ignore[attr-defined]
    started, began = datetime.now(timezone.utc), time.perf_counter()
    diverged = None
    try:
        train(cli)
    except DivergenceError as error:
        diverged = str(error)
        print(f"grade-compare: diverged: {diverged}", file=sys.stderr)
    spent = {k: int(v) for k, v in cli.model.meter.spent.items()} if isinstance(cli.model, AlignmentModule) else {}
    step, steps = cli.trainer.global_step, cli.config.trainer.max_steps
    if not diverged and step < steps:
        raise InputError(f"ended at step {step} of {steps}; remove what ended it, such as trainer.max_time")
    if not diverged and 0 < spent.get("reward_calls", 0) < plan.completions:
        raise InputError(f"{spent['reward_calls']} of {plan.completions} completions were sampled; look at the data")
    last = cli.summary.measurements[-1].metrics if cli.summary.measurements and not diverged else {}
    result = {
        "method": run.method,
        "model": type(cli.model).__name__,
        "setting": plan.settings()[run.setting],
        "seed": run.seed,
        "command": shlex.join(["grade-fit", *arguments]),
        "arguments": arguments,
        "folder": str(Path(cli.trainer.log_dir or run.folder).relative_to(run.folder)),
        "commit": _commit(),
        "versions": {name: version(name) for name in ("grade-lightning", "torch", "lightning", "transformers")},
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
        "from_step": cli.start.step,  # above 0: an earlier start was interrupted, and took its own seconds
        "validation": last,
        "objective": _objective(last, plan.beta),
        "spent": spent,
        "diverged": diverged,
    }
    write_atomically(run.folder / "run.json", json.dumps(result, indent=1))


def _objective(metrics: Mapping[str, float], beta: float) -> float | None:
    """Reward − β KL; None where that is no finite number.

    Example:
        >>> _objective({"reward": 1.0, "kl": 2.0}, beta=0.25)
        0.5
    """
    cost = beta * metrics.get("kl", math.nan) if beta else 0.0
    value = metrics.get("reward", math.nan) - cost
    return value if math.isfinite(value) else None


def _budget(cli: GradeCLI, plan: Plan) -> list[str]:
    """The steps in which so many completions are sampled, and the batches from one validation to the next."""
    model, micro = cli.model, cli.trainer.accumulate_grad_batches
    for there, option in (
        (cli.trainer.checkpoint_callback, "enable_checkpointing"),
        (cli.trainer.logger, "logger"),
    ):
        if there is None:
            raise InputError(f"trainer.{option}: a comparison needs it; remove it from the arguments")
    batching = batching_of(model)
    window = cli.datamodule.batch_size * micro * cli.trainer.world_size * batching.minibatches
    windows, rest = divmod(plan.completions, window)
    if rest:
        raise InputError(
            f"completions = {plan.completions}: {type(model).__name__} samples {window} at once; give a multiple"
        )
    steps = windows * batching.epochs * batching.minibatches
    return [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={max(1, steps * micro // plan.validations)}"]


def _test(comparison: Comparison, run: Run) -> None:
    result = run.result
    assert result is not None
    rows = run.folder / "test.jsonl"
    rows.unlink(missing_ok=True)  # of a test that did not end
    cli = build(
        [
            *result["arguments"],
            f"--ckpt_path={run.folder / result['folder']}",
            "--trainer.logger=false",
            f"--output={rows}",
        ],
        "test",
    )
    (metrics,) = cli.trainer.test(
        cli.model, datamodule=cli.datamodule, ckpt_path=cli.start.checkpoint, weights_only=True, verbose=False
    )
    write_test(metrics, run.folder)


def _commit() -> str | None:
    """Of the checkout that the library is read from, with a mark if it has changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(grade_lightning.__file__).parent, capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return answer.stdout.strip() or None
