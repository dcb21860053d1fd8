"""The four commands: fit, validate, test and predict, over one flat configuration."""

import time

from lightning.pytorch.cli import ArgsType

from .config import build
from .guard import user_errors
from .preflight import preflight
from .run import measure, print_summary, train


def fit(args: ArgsType = None) -> None:
    """`grade-fit`: measure, train, measure again, and say what changed and where it lies."""
    with user_errors("grade-fit"):
        began = time.perf_counter()
        cli = build(args, "fit")
        if cli.config.get("preflight"):
            preflight(cli.trainer, cli.model, cli.datamodule, cli.start.checkpoint)
            return
        train(cli)
        print_summary(cli, time.perf_counter() - began)


def validate(args: ArgsType = None) -> None:
    """`grade-validate`: measure on the validation split."""
    with user_errors("grade-validate"):
        measure(build(args, "validate"))


def test(args: ArgsType = None) -> None:
    """`grade-test`: measure on the test split; what a run ends with is left in its folder, for the report."""
    with user_errors("grade-test"):
        measure(build(args, "test"))


def predict(args: ArgsType = None) -> None:
    """`grade-predict`: write completions of the test prompts, with rewards and KL, as JSON lines."""
    with user_errors("grade-predict"):
        measure(build(args, "predict"))
