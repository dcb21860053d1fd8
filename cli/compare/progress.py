"""How far all runs are, as a table."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from .comparison import Comparison
from .run import Run, read_json
from .workers import Workers


def progress(comparison: Comparison, workers: Workers) -> Table:
    """A line for each method and setting, a column for each seed."""
    plan = comparison.plan
    table = Table(title=f"{comparison.out}: validation reward, * the setting that was chosen")
    seeds = list(dict.fromkeys(plan.searched + plan.seeds))
    for name in ("method", "setting", *(f"seed {seed}" for seed in seeds)):
        table.add_column(name)
    known = set(comparison.runs())
    for method in plan.methods:
        chosen = comparison.chosen(method)
        for setting in plan.settings():
            runs = [Run(comparison.out, method, setting, seed) for seed in seeds]
            cells = [state_of(comparison, workers, run) if run in known else "" for run in runs]
            table.add_row(*map(escape, (method, f"{setting} *" if setting == chosen else setting, *cells)))
    return table


def state_of(comparison: Comparison, workers: Workers, run: Run) -> str:
    """What becomes of a run, or became of it, in a few words."""
    if run in workers.failed:
        return f"failed: {_last_line(run.folder / 'log.txt')}"
    if result := run.result:
        if result.get("diverged"):
            return "diverged"
        reward = f"{result['validation'].get('reward', float('nan')):.3f}"
        return reward if comparison.finished(run) else f"{reward}, test to come"
    if run in workers.elsewhere:
        return "another process"
    if run not in workers.at:
        return "waits"
    state = read_json(run.folder / "progress.json")
    return (
        f"{state['step']}/{state['of']} ({state['reward']:.2f})" if state and state["reward"] is not None else "starts"
    )


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
