"""The table at the end: what training changed."""

from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grade_lightning.module import AlignmentModule


@dataclass
class _Measurement:
    step: int
    metrics: dict[str, float]
    sample: list[tuple[str, str, float]]


class Summary(Callback):
    """Remember every validation; print the first beside the last, with two completions of each.

    Args:
        completions: how many completions are shown side by side.
    """

    def __init__(self, completions: int = 2) -> None:
        self.completions = completions
        self.measurements: list[_Measurement] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the measurements."""
        if trainer.sanity_checking:
            return
        metrics = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        sample: list[tuple[str, str, float]] = []
        if isinstance(pl_module, AlignmentModule):
            rollout = pl_module.last_evaluation["rollout"]
            rows = zip(rollout.prompts, rollout.completions, pl_module.last_evaluation["reward"], strict=True)
            sample = [(prompt, completion, float(r)) for prompt, completion, r in rows][: self.completions]
        self.measurements.append(_Measurement(trainer.global_step, metrics, sample))

    @property
    def last_step(self) -> int | None:
        """The step of the latest validation."""
        return self.measurements[-1].step if self.measurements else None

    def print(self, where: dict[str, str], console: Console | None = None) -> None:
        """Print the table.

        Args:
            where: what lies where, printed below.
            console: where to print.
        """
        console = console or Console()
        if self.measurements:
            first, last = self.measurements[0], self.measurements[-1]
            table = Table(title="Validation")
            table.add_column("")
            table.add_column(f"before (step {first.step})", justify="right")
            table.add_column(f"after (step {last.step})", justify="right")
            for name, value in last.metrics.items():
                table.add_row(name, f"{first.metrics.get(name, float('nan')):.3f}", f"{value:.3f}")
            console.print(table)
            if last.sample:
                console.print(_side_by_side(first, last))
        for name, path in where.items():
            console.print(f"{name}: {escape(path)}", soft_wrap=True)


def _side_by_side(first: _Measurement, last: _Measurement) -> Table:
    table = Table(title="The same prompts", show_lines=True)
    table.add_column("prompt", ratio=2)
    table.add_column("before", ratio=3)
    table.add_column("after", ratio=3)
    for (prompt, old, old_reward), (_, new, new_reward) in zip(first.sample, last.sample, strict=True):
        cells = (prompt.strip(), f"{old.strip()} [{old_reward:.2f}]", f"{new.strip()} [{new_reward:.2f}]")
        table.add_row(*map(escape, cells))
    return table
