"""The four commands: fit, validate, test and predict, over one flat configuration."""

import argparse
import errno
import json
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

# imported whole, so that bare class names are known
import grade_lightning.methods
from grade_lightning import bundled
from grade_lightning.callbacks import (
    Checkpoint,
    Completions,
    Export,
    GradientVariance,
    PredictionWriter,
    Progress,
    Requeue,
    Summary,
    Terminate,
)
from grade_lightning.data import TextDataModule, reviews
from grade_lightning.errors import InputError, check_range
from grade_lightning.files import write_atomically
from grade_lightning.module import AlignmentModule, TrainableModule, check_method
from grade_lightning.policies.loading import BUNDLED

from .parser import Parser
from .preflight import preflight
from .resume import find_start, latest


class _SaveConfig(SaveConfigCallback):
    """Lightning's, which without a logger would write into the current folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class GradeCLI(LightningCLI):
    """LightningCLI without subcommands; `--model` is a bare name of ours or a dotted path."""

    def __init__(self, args: ArgsType = None, run: str = "fit") -> None:
        self.command = run
        super().__init__(
            LightningModule,
            TextDataModule,
            subclass_mode_model=True,
            run=False,
            args=args,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": f"grade-{run}",
                "default_config_files": [str(Path(__file__).with_name("defaults.yaml"))],
            },
            save_config_callback=_SaveConfig if run == "fit" else None,
        )

    def init_parser(self, **kwargs: Any) -> Parser:
        """Our parser, whose errors are one line."""
        kwargs["parser_mode"] = kwargs.get("parser_mode", "yaml")
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="A configuration file; may be given several times.")
        return parser

    def parse_arguments(self, parser: Any, args: ArgsType) -> None:
        """Let a configuration that names no method come before `--model`, too."""
        Parser.given = list(sys.argv[1:] if args is None else args)
        self.config = parser.parse_args(_model_first(Parser.given))
        check_range("[0, 4294967295]", seed_everything=self.config.seed_everything)

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Options beside the trainer's, the model's and the data's."""
        help = "A .ckpt file to start a new run from; to go on with a run: its folder, or `last` for the latest one."
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=help)
        # no callback in Lightning's sense, which there is no getting rid of
        parser.add_class_arguments(Checkpoint, "checkpoint", fail_untyped=False, sub_configs=True)
        parser.add_lightning_class_args(Completions, "completions")
        parser.add_lightning_class_args(Export, "export")
        parser.add_lightning_class_args(GradientVariance, "gradient_variance")
        if self.command in ("predict", "test"):
            parser.add_argument("--output", type=str | None, default=None, help="File of JSON lines, a prompt in each.")
        if self.command == "fit":  # suppressed where it is not given: configurations are for all commands
            help = "Show what the run is going to do and to need, and end before any training."
            parser.add_argument("--preflight", action="store_true", default=argparse.SUPPRESS, help=help)

    def _parse_ckpt_path(self) -> None:
        """Stock Lightning merges the checkpoint's settings over the user's flags; here the flags stand."""

    def before_instantiate_classes(self) -> None:
        """Fill in what depends on the machine and the method."""
        trainer = self.config.trainer
        method = self.config.model.class_path.rpartition(".")[2]
        if self.config.data.source is None and "judges" in self.config.model.init_args:
            self.config.model.init_args.judges = self.config.model.init_args.judges or _grammar_judges()
        self.runs = Path(trainer.default_root_dir or "runs") / method
        self.start = find_start(self.config.ckpt_path, self.runs, self.command, Parser.given)
        if self.start.folder is not None and self.start.method is not None:
            check_method(self.start.method, method)  # before the run is written to
        self.save_config_kwargs = {"config_filename": self.start.config_name}
        ours = _tensorboard(str(self.runs.parent), method)
        if trainer.logger in (None, True):
            trainer.logger = ours
        logger = trainer.logger
        self.logs_as_usual = isinstance(logger, Namespace) and all(logger.get(k) == v for k, v in ours.items())
        elsewhere = not self.logs_as_usual or self.config.checkpoint.dirpath is not None
        if self.config.ckpt_path == "last" and self.start.checkpoint is None and elsewhere:
            raise InputError(
                f"--ckpt_path last: looks for runs in {self.runs}, but with this --trainer.logger or "
                "--checkpoint.dirpath checkpoints lie elsewhere; give the path of a .ckpt file"
            )
        on_cuda = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        if trainer.precision is None and on_cuda and torch.cuda.is_bf16_supported():
            trainer.precision = "bf16-mixed"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has."""
        self.summary = Summary()
        folder, runs, version, purge = self.start.folder, self.runs, None, 0
        if folder is not None:
            runs, version, purge = folder.parent, folder.name, self.start.step
            kwargs["default_root_dir"] = str(folder)
        if self.logs_as_usual:
            # TensorBoard hides what was logged after a restart's step; a restart is what follows a start
            kwargs["logger"] = TensorBoardLogger(
                runs.parent, runs.name, version, default_hp_metric=False, purge_step=purge
            )
        given = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        callbacks = [*(given if isinstance(given, list) else [given]), self.summary]
        if self.config.trainer.enable_checkpointing is not False and not any(
            isinstance(callback, ModelCheckpoint) for callback in callbacks
        ):
            checkpoint: Checkpoint = self._get(self.config_init, "checkpoint")
            if folder is not None and checkpoint.dirpath is None:
                checkpoint.dirpath = str(folder / "checkpoints")  # whichever logger there is
            callbacks.append(checkpoint)
        if self.command == "fit":
            callbacks += [Requeue(), Terminate()]
        kwargs["callbacks"] = callbacks
        if self.config.trainer.enable_progress_bar is not False:
            kwargs["callbacks"].append(Progress())
        if self.command == "predict" or (self.command == "test" and self.config.output):
            kwargs["callbacks"].append(PredictionWriter(self.config.output))
        return super().instantiate_trainer(**kwargs)


def _model_first(args: list[str]) -> list[str]:
    """Repeat the method's name in front: the recipes in `configs/` set arguments that most methods share."""
    for i, arg in enumerate(args):
        if arg == "--model" and i + 1 < len(args):
            return [arg, args[i + 1], *args]
        if arg.startswith("--model="):
            return [arg, *args]
    return args


def _grammar_judges() -> list[Namespace]:
    """The bundled reviews come with the truth about themselves: show it beside the reward."""
    functions = (reviews.grammar_positive, reviews.grammar_valid)
    return [
        Namespace(
            class_path="grade_lightning.rewards.FunctionReward",
            init_args=Namespace(function=function),
        )
        for function in functions
    ]


def _tensorboard(folder: str, name: str) -> Any:
    return Namespace(
        class_path="lightning.pytorch.loggers.TensorBoardLogger",
        init_args=Namespace(save_dir=folder, name=name, version=None, default_hp_metric=False),
    )


def build(args: ArgsType = None, command: str = "fit") -> GradeCLI:
    """Parse the arguments and make trainer, model and data, without running anything.

    Args:
        args: arguments instead of those of the command line.
        command: `fit`, `validate`, `test` or `predict`.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for rewards and sources of the user's own
    with _refusals():
        cli = GradeCLI(args, command)
    if command == "predict" and isinstance(cli.model, TrainableModule) and not isinstance(cli.model, AlignmentModule):
        raise InputError(f"--model {type(cli.model).__name__}: makes no completions to write; name an alignment method")
    if any(getattr(module, "path", None) == BUNDLED for module in cli.model.modules()):
        bundled.prepare()
    return cli


@contextmanager
def _refusals() -> Iterator[None]:
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


def fit(args: ArgsType = None) -> None:
    """`grade-fit`: measure, train, measure again, and say what changed and where it lies."""
    with for_people("grade-fit"):
        began = time.perf_counter()
        cli = build(args, "fit")
        if cli.config.get("preflight"):
            preflight(cli.trainer, cli.model, cli.datamodule, cli.start.checkpoint)
            return
        train(cli)
        _report(cli, time.perf_counter() - began)


def train(cli: GradeCLI) -> None:
    """Measure, train, measure again."""
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    measures = trainer.limit_val_batches != 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
    with _no_trace_of_what_never_began(trainer), _all_end_together(trainer):
        if measures and cli.start.checkpoint is None:
            trainer.validate(model, data, verbose=False)
        trainer.fit(model, data, ckpt_path=cli.start.checkpoint, weights_only=True)
        if measures and cli.summary.last_step != trainer.global_step:
            # where a checkpoint left nothing to train Lightning is one short, and so would the curves be
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            trainer.validate(model, data, verbose=False)


def _report(cli: GradeCLI, seconds: float) -> None:
    trainer = cli.trainer
    log_dir = trainer.log_dir  # asks all processes
    where = {"time": f"{seconds:.0f} s"}
    if trainer.logger is not None and log_dir:
        where["logs"] = f"{log_dir} (tensorboard --logdir {Path(log_dir).parent.parent})"
    export = next(callback for callback in trainer.callbacks if isinstance(callback, Export))  # type: ignore[attr-defined]
    folder = export.path(trainer)
    if folder is not None and folder.is_dir():
        where["model"] = str(folder)
    if trainer.is_global_zero:
        cli.summary.print(where)


def validate(args: ArgsType = None) -> None:
    """`grade-validate`: measure on the validation split."""
    _run(args, "validate")


def test(args: ArgsType = None) -> None:
    """`grade-test`: measure on the test split; what a run ends with is left in its folder, for the report."""
    _run(args, "test")


def predict(args: ArgsType = None) -> None:
    """`grade-predict`: write completions of the test prompts, with rewards and KL, as JSON lines."""
    _run(args, "predict")


def _run(args: ArgsType, command: str) -> None:
    with for_people(f"grade-{command}"):
        cli = build(args, command)
        entry = getattr(cli.trainer, command)
        kwargs = {"return_predictions": False} if command == "predict" else {}
        folder = _run_to_test(cli) if command == "test" else None
        if folder is not None and cli.trainer.world_size == 1:  # of several processes each has a part of the lines
            lines = folder / "test.jsonl"
            if not cli.config.output or Path(cli.config.output).resolve() != lines.resolve():
                cli.trainer.callbacks.append(PredictionWriter(str(lines)))  # type: ignore[attr-defined]
        with _no_trace_of_what_never_began(cli.trainer), _all_end_together(cli.trainer):
            found = entry(
                cli.model, datamodule=cli.datamodule, ckpt_path=cli.start.checkpoint, weights_only=True, **kwargs
            )
        if folder is not None and cli.trainer.is_global_zero:
            print(f"written: {write_test(found[0], folder)}")
        if command == "predict" and cli.trainer.is_global_zero:
            writer = next(c for c in cli.trainer.callbacks if isinstance(c, PredictionWriter))  # type: ignore[attr-defined]
            print(f"written: {writer.path}")


def _run_to_test(cli: GradeCLI) -> Path | None:
    """The folder of the run whose last checkpoint is measured, unless it has a test or cannot be written to."""
    checkpoint = cli.start.checkpoint
    if checkpoint is None or not isinstance(cli.model, AlignmentModule) or cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    folder = checkpoint.parent.parent
    if not (folder / "config.yaml").is_file() or latest(folder) != checkpoint or not os.access(folder, os.W_OK):
        return None
    for path in (folder / "test.json", folder / "test.jsonl"):
        if path.exists():
            rank_zero_info(f"{path}: is there already and stays; remove it to have this test in its place")
            return None
    return folder


def write_test(metrics: Mapping[str, float], folder: Path) -> Path:
    """What `trainer.test` found, as `test.json` in the run's folder: all of it or nothing.

    Args:
        metrics: `test/reward` and so on.
        folder: the run's; `test.jsonl` beside it has the lines of a `PredictionWriter`.
    """
    found = {name.removeprefix("test/"): value for name, value in metrics.items()}
    return write_atomically(folder / "test.json", json.dumps(found, indent=1))


@contextmanager
def _no_trace_of_what_never_began(trainer: Trainer) -> Iterator[None]:
    """Remove the run's new folder when an error of input ends the run before its first step."""
    folder = Path(trainer.log_dir) if trainer.logger is not None and trainer.log_dir else None
    existed = folder is None or folder.exists()
    try:
        yield
    except InputError:
        if folder is not None and not existed and trainer.global_step == 0 and trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in list(folder.parents)[:2]:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        raise


@contextmanager
def _all_end_together(trainer: Trainer) -> Iterator[None]:
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
            raise InputError(f"another process ended with status {failed[0]}; what it said is above") from error
        raise


@contextmanager
def for_people(name: str) -> Iterator[None]:
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


_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


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


__all__ = ["build", "fit", "grade_lightning", "predict", "test", "validate"]
