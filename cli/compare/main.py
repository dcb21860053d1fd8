"""`grade-compare`: several methods, everything else equal; and one run of such a comparison."""

import inspect
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from grade_lightning.errors import InputError, check_range

from ..guard import user_errors
from ..parser import Parser
from .comparison import Comparison
from .options import option_pairs
from .plan import beside, plan
from .progress import progress, state_of
from .run import Run
from .work import work
from .workers import ELSEWHERE, Workers


def compare(args: Sequence[str] | None = None) -> None:
    """`grade-compare`: run what is still to be run, and say what became of it."""
    given, shared = _divided(list(sys.argv[1:] if args is None else args))
    Parser.given = given
    parser = Parser(
        prog="grade-compare",
        description="Train several methods, everything else equal; resume where it stopped. Arguments of grade-fit "
        "for all runs follow after a lone --.",
    )
    parser.add_argument("-c", "--config", action="config", help="A plan in YAML.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the comparison.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time.")
    parser.add_argument(
        "--threads",
        type=int | None,
        default=None,
        help="Threads of each run; by default the cores are divided among the runs.",
    )
    parser.add_argument("--list", action="store_true", help="Only print a command for each run that can start now.")
    parser.add_argument("--run", type=str | None, default=None, help="Only this run: METHOD/SETTING/seed_N.")
    parser.add_function_arguments(plan, fail_untyped=False)
    with user_errors("grade-compare"):
        o = parser.parse_args(given)
        check_range("[1, inf)", jobs=o.jobs, threads=o.threads)
        named = parser.parse_args(given, defaults=False)
        told = {name: named[name] for name in inspect.signature(plan).parameters if name in named}
        for file in o.config or []:
            told = beside(told, Path(str(file)).parent)
        if shared:
            told["arguments"] = (told.get("arguments") or {}) | option_pairs(shared)
        if told and "methods" not in told:
            raise InputError(
                f"{', '.join(told)}: given without methods; give the whole plan, or nothing of it to resume"
            )
        comparison = Comparison(Path(o.out), plan(**told) if told else None)
        if o.run is not None:
            run = comparison.run(o.run)
            with run.claimed(patience=1) as ours:  # who looks whether it is held, holds it for a moment
                if not ours:
                    print(f"grade-compare: another process is at {o.run}", file=sys.stderr)
                    raise SystemExit(ELSEWHERE)
                work(comparison, run)
        elif o.list:
            for run in comparison.runs():
                if not comparison.finished(run) and not run.held:
                    print(shlex.join(["grade-compare", "--out", o.out, "--run", run.name]))
        else:
            _end_by_signals()
            workers = Workers(comparison, o.jobs, o.threads, compare)
            compare_all(comparison, workers)
            Console().print(progress(comparison, workers))
            trouble = []
            if workers.failed:
                names = ", ".join(sorted(run.name for run in workers.failed))
                trouble.append(
                    f"{len(workers.failed)} runs failed ({names}); see log.txt in their folders, and run me again"
                )
            if lost := [method for method in comparison.plan.methods if comparison.chosen(method) is None]:
                trouble.append(f"{', '.join(lost)}: no setting to choose; what is in the grid failed or diverged")
            if trouble:
                raise InputError("; ".join(trouble))
            print(f"grade-report {o.out}")


def compare_all(comparison: Comparison, workers: Workers) -> None:
    """Go through all runs, and show how far each is."""
    console = Console()
    told: set[Run] = set()
    with Live(console=console, auto_refresh=False, transient=not console.is_terminal) as live:
        try:
            while True:
                workers.collect()
                comparison.note_choices()
                workers.start()
                live.update(progress(comparison, workers), refresh=console.is_terminal)
                ended = [
                    r for r in comparison.runs() if r not in told and (r in workers.failed or comparison.finished(r))
                ]
                for run in ended:
                    told.add(run)
                    if not console.is_terminal:
                        print(f"{run.name}: {state_of(comparison, workers, run)}", flush=True)
                if comparison.complete() or not (workers.at or workers.elsewhere):
                    break
                workers.wait(5 if console.is_terminal else 30)
        finally:
            workers.stop()


def _end_by_signals() -> None:
    """And end the runs, too; what a command like nohup has turned off stays so."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda caught, _: sys.exit(128 + caught))


def _divided(args: list[str]) -> tuple[list[str], list[str]]:
    at = args.index("--") if "--" in args else len(args)
    return args[:at], args[at + 1 :]
