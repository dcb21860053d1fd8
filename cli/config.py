"""One flat configuration: its options, and the trainer, the model and the data that are made from it."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

# imported whole, so that bare class names are known
import grade_lightning.methods  # noqa: F401
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
from grade_lightning.data import TextDataModule
from grade_lightning.errors import InputError, check_range
from grade_lightning.modules import AlignmentModule, TrainableModule
from grade_lightning.modules.guards import check_method
from grade_lightning.policies.loading import BUNDLED
from grade_lightning.records import unique_name
from grade_lightning.running import usual_precision

from .arguments import classes_first, torch_first, with_base_help
from .guard import refusals
from .help import restrict, short, topic_of
from .parser import Parser
from .resume import find_start
from .shown import grammar_judges, tensorboard


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
        given = list(sys.argv[1:] if args is None else args)
        Parser.given, topic = topic_of(given)
        if topic == "":
            print(short(self.command), end="")
            raise SystemExit
        if topic is not None:
            restrict(parser, topic)
        self.config = parser.parse_args(with_base_help(_model_first(torch_first(classes_first(Parser.given)))))
        check_range("[0, 4294967295]", seed_everything=self.config.seed_everything)

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Options beside the trainer's, the model's and the data's."""
        help = "A .ckpt file to start a new run from; to resume a run: its folder, or `last` for the latest one."
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
            self.config.model.init_args.judges = self.config.model.init_args.judges or grammar_judges()
        self.runs = Path(trainer.default_root_dir or "runs") / method
        self.start = find_start(self.config.ckpt_path, self.runs, self.command, Parser.given)
        if self.start.folder is not None and self.start.method is not None:
            check_method(self.start.method, method)  # before the run is written to
        self.save_config_kwargs = {"config_filename": self.start.config_name}
        ours = tensorboard(str(self.runs.parent), method)
        if trainer.logger in (None, True):
            trainer.logger = ours
        logger = trainer.logger
        self.logs_as_usual = isinstance(logger, Namespace) and all(logger.get(k) == v for k, v in ours.items())
        elsewhere = not self.logs_as_usual or self.config.checkpoint.dirpath is not None
        if self.config.ckpt_path == "last" and self.start.checkpoint is None and elsewhere:
            raise InputError(
                f"--ckpt_path last: looks for runs in {self.runs}, but with this --trainer.logger or "
                "--checkpoint.dirpath checkpoints are elsewhere; give the path of a .ckpt file"
            )
        if trainer.precision is None:
            trainer.precision = usual_precision(trainer.accelerator)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has."""
        self.summary = Summary()
        folder, runs, version, purge = self.start.folder, self.runs, None, 0
        if folder is not None:
            runs, version, purge = folder.parent, folder.name, self.start.step
            kwargs["default_root_dir"] = str(folder)
        if self.command == "predict" and self.logs_as_usual:
            kwargs["logger"] = False  # there is nothing to log
        elif self.logs_as_usual:
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
            kwargs["callbacks"].append(PredictionWriter(self.config.output or self._free_place()))
        return super().instantiate_trainer(**kwargs)

    def _free_place(self) -> str | None:
        """Where predictions are written unasked: in the run whose checkpoint is given, or among those of the method."""
        if not self.logs_as_usual:
            return None  # in the folder of the user's logger
        checkpoint, folder = self.start.checkpoint, self.runs
        if checkpoint is not None and (checkpoint.parent.parent / "config.yaml").is_file():
            folder = checkpoint.parent.parent
        name = unique_name("predictions", [path.stem for path in folder.glob("predictions*.jsonl")])
        return str(folder / f"{name}.jsonl")


def _model_first(args: list[str]) -> list[str]:
    """Repeat the method's name in front: the recipes in `configs/` set arguments that most methods share."""
    for i, arg in enumerate(args):
        if arg == "--model" and i + 1 < len(args):
            return [arg, args[i + 1], *args]
        if arg.startswith("--model="):
            return [arg, *args]
    return args


def build(args: ArgsType = None, command: str = "fit") -> GradeCLI:
    """Parse the arguments and make trainer, model and data, without running anything.

    Args:
        args: arguments instead of those of the command line.
        command: `fit`, `validate`, `test` or `predict`.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for rewards and sources of the user's own
    with refusals():
        cli = GradeCLI(args, command)
    if command == "predict" and isinstance(cli.model, TrainableModule) and not isinstance(cli.model, AlignmentModule):
        raise InputError(f"--model {type(cli.model).__name__}: makes no completions to write; name an alignment method")
    if any(getattr(module, "path", None) == BUNDLED for module in cli.model.modules()):
        bundled.prepare()
    return cli
