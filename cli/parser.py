"""What the parser says when an argument is wrong: one line, with the choices."""

import difflib
import inspect
import re
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from grade_lightning.data import Source, TextDataModule
from grade_lightning.estimators import TokenEstimator
from grade_lightning.kl import KL
from grade_lightning.policies import LoRA, Pass, Policy
from grade_lightning.rewards import PairwiseJudge, Reward
from grade_lightning.rollouts import Engine, Sampler
from grade_lightning.schedules import Schedule
from grade_lightning.selection import Selection

from .shown import filled

BASES: dict[str, type] = {
    "model": LightningModule,
    "reward": Reward,
    "estimator": TokenEstimator,
    "tau": Schedule,
    "source": Source,
    "engine": Engine,
    "selection": Selection,
    "training_pass": Pass,
    "pairwise_judge": PairwiseJudge,
}
_NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Expected a <class 'NoneType'>|Expected a path but|Given value|^tip:"
)


def choices(base: type) -> list[str]:
    """Names of our own subclasses of `base`.

    Example:
        >>> choices(TokenEstimator)
        ['Gumbel', 'ReinMax', 'ReinMaxRao', 'StraightThrough']
    """
    found: set[str] = set()
    queue = [base]
    while queue:
        subclasses: list[type] = type.__subclasses__(queue.pop())
        for sub in subclasses:
            queue.append(sub)
            package, _, rest = sub.__module__.partition(".")
            ours = package == "grade_lightning" and not rest.startswith("modules.")
            if ours and not inspect.isabstract(sub) and not sub.__name__.startswith("_"):
                found.add(sub.__name__)
    return sorted(found)


def explain(message: str, args: Sequence[str] = ()) -> str:
    r"""Shorten a message of jsonargparse to one line; for a class that is not there, list those that are.

    Example:
        >>> text = "Parser key \"model\":\n  - Expected a dot import path string: GradeSTF"
        >>> explain(text).partition("; ours are")[0]
        "--model GradeSTF: no such class, did you mean 'GradeSTE'?"
        >>> explain("Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: x")
        "--trainer.max_steps: Expected a <class 'int'>. Got value: x"
    """
    if message.startswith(("Problems parsing config", "Unexpected config")):
        files = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg in ("-c", "--config")]
        files += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
        reason = "no options by name in it" if message.startswith("Unexpected") else " ".join(message.split())
        return f"--config {' or '.join(files)}: {reason}"
    refused = re.match(r"Option '(\S+)' is not accepted|unrecognized arguments: --([\w.]+)", message.strip())
    if refused and (told := _elsewhere(refused[1] or refused[2], args)):
        return told
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    where = _option(keys, args) if keys else ""
    wrong = re.search(r"Expected a dot import path string: (\S+)", message)
    base = BASES.get(keys[-1].rpartition(".")[2]) if keys else None
    if wrong and base:
        names = choices(base)
        near = difflib.get_close_matches(wrong[1], names, n=1, cutoff=0.5)
        hint = f", did you mean '{near[0]}'?" if near else ""
        return f"{where} {wrong[1]}: no such class{hint}; ours are {', '.join(names)}, or give a dotted path"
    lines = [re.sub(r'Parser key "[^"]+":?', "", line).strip().lstrip("- ") for line in message.splitlines()]
    lines = list(dict.fromkeys(line.replace('"', "'") for line in lines if line))
    useful = [line for line in lines if not _NOISE.search(line)] or lines
    given = re.search(r"Given value: (.+)", message)
    if given and not any("Got value" in line for line in useful):
        useful.append(f"(given: {given[1]})")
    return f"{where}: {' '.join(useful)}" if where else " ".join(useful)


PARTS: dict[str, type] = {
    "model.optimizer": torch.optim.AdamW,
    "model.sampler": Sampler,
    "model.policy": Policy,
    "model.policy.lora": LoRA,
    "model.kl": KL,
    "data": TextDataModule,
    "trainer": Trainer,
}
"""Where options lie that are looked for elsewhere."""


def _elsewhere(key: str, args: Sequence[str]) -> str:
    """Of an option that is not there: where there is one of that name; nothing if there is none."""
    name = key.rpartition(".")[2]
    owners = [part for part, owner in PARTS.items() if name in inspect.signature(owner).parameters]
    there = " or ".join(f"--{part}.{name}" for part in owners)
    return f"{_option([key], args)}: no such option, did you mean {there}?" if owners else ""


def _option(keys: list[str], args: Sequence[str]) -> str:
    """The option as the user wrote it: parsers of nested parts know only their own end of it."""
    key = ".".join(keys)
    written = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    return next((option for option in written if option.endswith(f".{key}")), f"--{key}")


_read = get_loader("yaml")


def load(text: str) -> Any:
    """What YAML makes of a value. One that begins with # is a text, not a comment, which YAML would read as null.

    Example:
        >>> load("#### (.+)"), load("3"), load("null")
        ('#### (.+)', 3, None)
    """
    value = _read(text)
    said = text.strip()
    return text if value is None and said.startswith("#") and "\n" not in said else value


set_loader("yaml", load, (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """The parser of LightningCLI with short errors, and to which null is a value like others."""

    given: ClassVar[list[str]] = []
    """The arguments as the user wrote them, shared with the parsers of nested parts."""

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Check the values; jsonargparse itself lets each null pass, and lists where it expects options by name.

        Raises:
            TypeError: one is not what the option takes.
        """
        super().validate(namespace, *args, **kwargs)
        for action in self._actions:
            value = namespace.get(action.dest, action.default)
            by_name = action.default is SUPPRESS and action.nargs != 0  # which a switch has, too
            if by_name and value is not SUPPRESS and not isinstance(value, (Namespace, dict, str)):
                raise TypeError(f'Parser key "{action.dest}":\n  Expected options by name. Got value: {value}')
            if value is None and action.default not in (None, SUPPRESS):
                self._check_value_key(action, value, action.dest, namespace)

    def dump(self, cfg: Namespace, **kwargs: Any) -> str:
        """The configuration as text; what `--print_config` prints has the values that are in force instead of null."""
        text: str = super().dump(filled(cfg) if hasattr(self, "print_config") else cfg, **kwargs)
        return text

    def format_help(self, *args: Any) -> str:
        """The help; that of a nested part names its options as the user has to write them."""
        nested = re.match(r"Help for --(\S+)\.help=", self.description or "")
        if nested:
            short = nested[1]
            full = _option([f"{short}.help"], self.given).removesuffix(".help")
            for action in self._actions:
                action.option_strings = [
                    full + option.removeprefix(f"--{short}") if option.startswith(f"--{short}.") else option
                    for option in action.option_strings
                ]
            self.description = str(self.description).replace(f"--{short}.help", f"{full}.help", 1)
        return super().format_help(*args)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and leave with status 2."""
        del ex
        name = Path(sys.argv[0]).name
        print(f"{name}: error: {explain(message, self.given)} (see {name} --help)", file=sys.stderr)
        raise SystemExit(2)
