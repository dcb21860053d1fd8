"""The table at the end: what training changed."""

from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grade_lightning.modules import AlignmentModule


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
            found = pl_module.last_evaluation
            rows = zip(found.rollout.prompts, found.rollout.completions, found.reward, strict=True)
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
            shown = {f"before (step {first.step})": first, f"after (step {last.step})": last}
            if first is last:  # a run that went on is measured at its end alone
                shown = {f"step {last.step}": last}
            table = Table("", title="Validation")
            for label in shown:
                table.add_column(label, justify="right")
            for name in last.metrics:
                table.add_row(name, *(f"{one.metrics.get(name, float('nan')):.3f}" for one in shown.values()))
            console.print(table)
            if last.sample:
                console.print(_side_by_side(shown))
        for name, path in where.items():
            console.print(f"{name}: {escape(path)}", soft_wrap=True)


def _side_by_side(shown: dict[str, _Measurement]) -> Table:
    table = Table(title="The same prompts", show_lines=True)
    table.add_column("prompt", ratio=2)
    for label in shown:
        table.add_column(label.partition(" (")[0], ratio=3)
    for samples in zip(*(one.sample for one in shown.values()), strict=True):
        texts = (f"{text.strip()} [{reward:.2f}]" for _, text, reward in samples)
        table.add_row(*map(escape, (samples[0][0].strip(), *texts)))
    return table
