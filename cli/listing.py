"""`grade-methods`: what there is by name, in one line each."""

import argparse
import inspect
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import grade_lightning.methods  # noqa: F401
from grade_lightning.data import Source
from grade_lightning.modules import TrainableModule
from grade_lightning.rewards import PairwiseJudge, Reward
from grade_lightning.rollouts import Engine

from .parser import choices

KINDS: dict[str, tuple[str, type]] = {
    "methods": ("--model", TrainableModule),
    "rewards": ("--model.reward", Reward),
    "judges of pairs": ("--model.pairwise_judge", PairwiseJudge),
    "engines": ("--model.sampler.engine", Engine),
    "sources": ("--data.source", Source),
}


def lines(base: type) -> list[tuple[str, str]]:
    """Name and first line of the docstring of our classes of a kind.

    Example:
        >>> dict(lines(Source))["InMemory"]
        'Rows that are in memory already.'
    """
    found = []
    queue: list[type] = [base]
    classes: dict[str, type] = {}
    while queue:
        subclasses: list[type] = type.__subclasses__(queue.pop())
        for sub in subclasses:
            classes.setdefault(sub.__name__, sub)
            queue.append(sub)
    for name in choices(base):
        found.append((name, (inspect.getdoc(classes[name]) or "").partition("\n")[0]))
    return found


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser("grade-methods", description="List methods, rewards, engines and sources of data.")
    parser.parse_args(args)
    console = Console()
    for kind, (option, base) in KINDS.items():
        table = Table(title=f"{kind}: {option} NAME", box=None, title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column()
        for name, said in lines(base):
            table.add_row(name, escape(said))
        console.print(table)
        console.print()
    console.print("grade-fit --model.help NAME shows the arguments of one; docs/methods/ has formulas and papers.")
