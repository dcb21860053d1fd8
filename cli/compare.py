"""`grade-compare`: several methods, everything else equal; and one run of such a comparison."""

import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from grade_lightning.errors import DivergenceError, InputError, check_range
from grade_lightning.files import write_atomically
from grade_lightning.module import AlignmentModule

from .config import GradeCLI, build
from .guard import user_errors
from .parser import Parser
from .run import train, write_test

ELSEWHERE = 75
"""Exit status of a run that another process is at."""

_PARENT = "GRADE_COMPARE_PARENT"
"""Names the process that a run ends with."""

_PLANNED = {"model", "seed_everything", "ckpt_path", "output"}
_PLANNED |= {f"trainer.{name}" for name in ("default_root_dir", "max_steps", "val_check_interval", "devices")}
"""Arguments that the plan sets for each run."""


@dataclass
class Plan:
    """What is compared, and what is equal."""

    methods: dict[str, dict[str, Any]]
    arguments: dict[str, Any]
    grid: dict[str, list[Any]]
    seeds: list[int]
    completions: int
    beta: float
    validations: int
    files: dict[str, str] = field(default_factory=dict)
    """A digest of each configuration file that is named, once it lies in a comparison's folder."""

    def settings(self) -> dict[str, dict[str, Any]]:
        """Each point of the grid by its name."""
        points = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return {
            ",".join(f"{key.rpartition('.')[2]}={value}".replace("/", "_") for key, value in p.items()) or "default": p
            for p in points
        }


def plan(
    methods: str | list[str] | dict[str, dict[str, Any] | None] = "",
    arguments: dict[str, Any] | None = None,
    grid: dict[str, list[Any]] | None = None,
    seeds: str | list[int] = "1,2,3",
    completions: int | None = None,
    beta: float = 0.0,
    validations: int = 3,
) -> Plan:
    """Say what is compared, and what is equal.

    Args:
        methods: names, or for each name the arguments that it alone has (`model`, if it is not the name).
        arguments: of grade-fit, for all; `config` is one file or a list of them.
        grid: values of arguments that are tried, all with all, with the first seed. A method is compared with those
            that are best on validation.
        seeds: of the runs.
        completions: sampled in each run; how many steps that takes follows from the method. Must be given.
        beta: β of the objective, reward − β KL, by which the best of the grid is chosen; reward per nat.
        validations: how often a run is measured on the way.

    Raises:
        InputError: something is missing, twice there, out of range, or not for the user to set.

    Example:
        >>> plan("GradeSTE,RLOO", grid={"model.optimizer.lr": [0.001, 0.01]}, completions=9600).settings()
        {'lr=0.001': {'model.optimizer.lr': 0.001}, 'lr=0.01': {'model.optimizer.lr': 0.01}}
    """
    names = [name.strip() for name in methods.split(",")] if isinstance(methods, str) else list(methods)
    own = methods if isinstance(methods, dict) else {}
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if isinstance(seeds, str) else seeds
    except ValueError:
        raise InputError(f"seeds = {seeds}: give whole numbers, such as 1,2,3") from None
    lists: dict[str, list[Any]] = {"methods": names, "seeds": numbers, **(grid or {})}
    for name, values in lists.items():
        if not values or len(set(map(str, values))) < len(values):
            raise InputError(f"{name}: must hold something, and nothing twice")
    odd = [name for name in names if not name or set(name) & set("/\\") or name.startswith(".")]
    if odd:
        raise InputError(f"methods: {odd[0]!r} cannot be the name of a folder")
    if completions is None:
        raise InputError("completions: say how many each run samples, such as 9600")
    check_range("[1, inf)", validations=validations, completions=completions)
    check_range("[0, inf)", beta=beta)
    for seed in numbers:
        check_range("[0, 4294967295]", seeds=seed)
    each = {name: dict(own.get(name) or {}) for name in names}
    given = [*_options(arguments or {}), *_options(grid or {})]
    given += [key for one in each.values() for key in _options(one) if key != "model"]
    if planned := sorted(_PLANNED.intersection(given)):
        raise InputError(f"{planned[0]}: the plan itself sets it for each run; take it away")
    found = Plan(each, arguments or {}, grid or {}, numbers, completions, beta, validations)
    if len(found.settings()) < math.prod(map(len, found.grid.values())):
        raise InputError("grid: two of its points have the same name, in which / is _; give other values")
    return found


def _options(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """All options by their full names, however they are nested."""
    for key, value in values.items():
        yield prefix + key.removesuffix("+")
        if isinstance(value, dict):
            yield from _options(value, f"{prefix}{key}.")


@dataclass(frozen=True)
class Run:
    """One training run of a comparison, and where it lies."""

    out: Path
    method: str
    setting: str
    seed: int

    @property
    def name(self) -> str:
        """As the command line knows it."""
        return f"{self.method}/{self.setting}/seed_{self.seed}"

    @property
    def folder(self) -> Path:
        """Its own."""
        return self.out / "runs" / self.method / self.setting / f"seed_{self.seed}"

    @property
    def result(self) -> dict[str, Any] | None:
        """What it left when it was trained."""
        return _read(self.folder / "run.json")

    @property
    def tested(self) -> bool:
        """Whether the test split was measured, or there is nothing to measure."""
        return bool((self.result or {}).get("diverged")) or _read(self.folder / "test.json") is not None

    @contextmanager
    def claimed(self, patience: float = 0) -> Iterator[bool]:
        """Whether this process alone is at it; given up when the process ends, however it ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / "lock").acquire(timeout=patience)
        except Timeout:
            yield False
        else:
            with lock:
                yield True

    @property
    def held(self) -> bool:
        """Whether a process is at it."""
        with self.claimed() as ours:
            return not ours


class Comparison:
    """The runs of a plan, in a folder.

    Args:
        out: the folder.
        plan: added to the one that is there; None for that one alone.

    Raises:
        InputError: what is there is something else, or was made with something else.
    """

    def __init__(self, out: Path, plan: Plan | None) -> None:
        self.out, self.path = out, out / "plan.yaml"
        # listed before the plan is looked for: another process may be writing it
        foreign = out.exists() and any(p.name != "lock" and p.suffix != ".part" for p in out.iterdir())
        if not self.path.is_file() and plan is None:
            raise InputError(f"{out}: holds no comparison; say what to compare (grade-compare --help)")
        if not self.path.is_file() and foreign:
            raise InputError(f"{out}: exists and holds no comparison; give --out another name")
        with self._alone():
            there = _load(self.path) if self.path.is_file() else None
            found = there or plan
            assert found is not None
            found = _joined(found, plan or found, self.path)
            digests = _digests(found)
            if changed := [path for path, digest in found.files.items() if digests[path] != digest]:
                raise InputError(f"{changed[0]}: has changed since the runs in {out}; give --out another name")
            self.plan = replace(found, files=digests)
            if self.plan != there:
                write_atomically(self.path, yaml.safe_dump(asdict(self.plan), sort_keys=False))

    def _alone(self) -> FileLock:
        """While no other process changes what is of all runs."""
        self.out.mkdir(parents=True, exist_ok=True)
        return FileLock(self.out / "lock")

    def run(self, name: str) -> Run:
        """The run of that name.

        Raises:
            InputError: it is not in the plan.
        """
        points = itertools.product(self.plan.methods, self.plan.settings(), self.plan.seeds)
        known = {run.name: run for run in itertools.starmap(partial(Run, self.out), points)}
        if name not in known:
            raise InputError(f"--run {name}: not in the plan; give METHOD/SETTING/seed_N, such as {next(iter(known))}")
        return known[name]

    def chosen(self, method: str) -> str | None:
        """The setting that is best on validation, once it is known."""
        return self._choice(method)[0]

    def _choice(self, method: str) -> tuple[str | None, dict[str, float]]:
        settings = list(self.plan.settings())
        if len(settings) == 1:
            return settings[0], {}
        found: dict[str, float] = {}
        for setting in settings:
            result = Run(self.out, method, setting, self.plan.seeds[0]).result
            if result is None:
                return None, found
            found[setting] = result["objective"]
        finite = {setting: value for setting, value in found.items() if value is not None and math.isfinite(value)}
        return (max(finite, key=finite.__getitem__) if finite else None), found

    def runs(self) -> list[Run]:
        """All whose setting is known: those of the grid first."""
        first, *rest = self.plan.seeds
        grid = [Run(self.out, m, setting, first) for m in self.plan.methods for setting in self.plan.settings()]
        chosen = {method: setting for method in self.plan.methods if (setting := self.chosen(method))}
        return grid + [Run(self.out, method, setting, seed) for seed in rest for method, setting in chosen.items()]

    def finished(self, run: Run) -> bool:
        """Whether nothing is left to do for it now."""
        return run.result is not None and (run.tested or self.chosen(run.method) != run.setting)

    def complete(self) -> bool:
        """Whether nothing is left to do at all."""
        return all(self.chosen(method) for method in self.plan.methods) and all(map(self.finished, self.runs()))

    def arguments(self, run: Run) -> list[str]:
        """Of `grade-fit` for a run."""
        own = dict(self.plan.methods[run.method])
        model = own.pop("model", run.method)
        everything = self.plan.arguments | own | self.plan.settings()[run.setting] | {"seed_everything": run.seed}
        return [
            *_flags("config", everything.pop("config", [])),  # first: what the plan says comes after
            f"--model={model}",
            "--trainer.devices=1",
            "--export.enabled=false",
            *itertools.chain.from_iterable(_flags(key, value) for key, value in everything.items()),
            f"--trainer.default_root_dir={run.folder}",
        ]

    def note_choices(self) -> None:
        """Write down what was chosen, for the report; for methods that another process has added, too."""
        with self._alone():
            self.plan = _load(self.path)
            choices = {m: dict(zip(("setting", "objectives"), self._choice(m), strict=True)) for m in self.plan.methods}
            if choices != _read(self.out / "chosen.json"):
                write_atomically(self.out / "chosen.json", json.dumps(choices, indent=1))


def _flags(key: str, value: Any) -> list[str]:
    return [f"--{key}={_text(one)}" for one in (_each(value) if _several(key) else [value])]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def _several(key: str) -> bool:
    """Whether an option may be given several times."""
    return key == "config" or key.endswith("+")


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _load(path: Path) -> Plan:
    try:
        written = yaml.safe_load(path.read_text())
        files = written.pop("files", {})
        found = plan(**written)
        if asdict(found) == written | {"files": {}}:
            return replace(found, files=files)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError):
        pass
    raise InputError(f"{path}: not a plan that this grade-compare wrote; give --out another name")


def _joined(there: Plan, plan: Plan, path: Path) -> Plan:
    """Methods and seeds are added; what is equal for all, or decides the choice, may not change."""
    old, new = asdict(there), asdict(plan)
    differ = [key for key in ("arguments", "grid", "completions", "beta", "validations") if old[key] != new[key]]
    differ += [f"methods.{m}" for m in old["methods"] if old["methods"][m] != new["methods"].get(m, old["methods"][m])]
    if there.seeds[0] != plan.seeds[0]:
        differ.append("first seed")
    if differ:
        raise InputError(f"{path}: the runs there were made with other {', '.join(differ)}; give --out another name")
    return replace(there, methods=there.methods | plan.methods, seeds=list(dict.fromkeys(there.seeds + plan.seeds)))


def _digests(plan: Plan) -> dict[str, str]:
    """Of the configuration files that a plan names."""
    named = [one.get("config") or [] for one in (plan.arguments, *plan.methods.values(), plan.grid)]
    digests = {}
    for path in [path for value in named for some in _each(value) for path in _each(some)]:  # a point may hold several
        try:
            digests[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        except OSError as error:
            raise InputError(f"config {path}: cannot be read ({error.strerror}); mend the plan") from None
    return digests


# ---- one run -------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Says in a file how far the run is; ends it when the process that started it has ended."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, 0.0
        self.parent = int(os.environ.get(_PARENT, 0))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse epochs whose last step would be of fewer batches than the others.

        Raises:
            InputError: they are.
        """
        batches, micro = trainer.num_training_batches, trainer.accumulate_grad_batches
        window = max(micro, getattr(pl_module, "visits", 1))
        if batches % window and trainer.max_steps * micro > batches:
            raise InputError(
                f"an epoch has {batches} batches, no multiple of {window}: its last step would be of fewer than the "
                "others; choose trainer.accumulate_grad_batches or data.prompt_size so that it is one"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write now and then."""
        if self.parent and os.getppid() != self.parent:
            os.kill(os.getpid(), signal.SIGTERM)  # which ends a run between two steps
        if time.monotonic() - self.last > 2:
            self.last = time.monotonic()
            reward = trainer.callback_metrics.get("train/reward")
            state = {
                "step": trainer.global_step,
                "of": trainer.max_steps,
                "reward": None if reward is None else float(reward),
            }
            with suppress(OSError):  # a full disk is no reason to end a run
                write_atomically(self.path, json.dumps(state))


def work(comparison: Comparison, run: Run) -> None:
    """Train, unless it is done; measure the test split, if the setting is the chosen one."""
    if run.result is None:
        _train(comparison, run)
    comparison.note_choices()
    if comparison.chosen(run.method) == run.setting and not run.tested:
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
    spent = {k: int(v) for k, v in cli.model.spent.items()} if isinstance(cli.model, AlignmentModule) else {}
    step, steps = cli.trainer.global_step, cli.config.trainer.max_steps
    if not diverged and step < steps:
        raise InputError(f"ended at step {step} of {steps}; take away what ended it, such as trainer.max_time")
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
            raise InputError(f"trainer.{option}: a comparison needs it; take it away from the arguments")
    epochs, minibatches = getattr(model, "epochs", 1), getattr(model, "minibatches", 1)
    window = cli.datamodule.batch_size * micro * cli.trainer.world_size * minibatches
    windows, rest = divmod(plan.completions, window)
    if rest:
        raise InputError(
            f"completions = {plan.completions}: {type(model).__name__} samples {window} at once; give a multiple"
        )
    steps = windows * epochs * minibatches
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
    """Of the checkout that this is run from, with a mark if it has changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return answer.stdout.strip() or None


def _read(path: Path) -> dict[str, Any] | None:
    """None where nothing is that could be read; a machine that loses power may leave such."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# ---- all runs ------------------------------------------------------------------------------------------------------


class Workers:
    """Processes that are at runs, so many at a time; each has a GPU or its part of the cores."""

    def __init__(self, comparison: Comparison, jobs: int, threads: int | None) -> None:
        self.comparison, self.jobs = comparison, jobs
        self.threads = threads or max(1, _cores() // jobs)
        self.at: dict[Run, tuple[subprocess.Popen[bytes], int]] = {}
        self.failed: set[Run] = set()
        self.elsewhere: set[Run] = set()

    def start(self) -> None:
        """Give every free worker a run that no other process is at."""
        self.elsewhere.clear()
        taken = self.failed | self.at.keys()
        free = [slot for slot in range(self.jobs) if slot not in [slot for _, slot in self.at.values()]]
        for run in self.comparison.runs():
            if not free or run in taken or self.comparison.finished(run):
                continue
            if run.held:
                self.elsewhere.add(run)
                continue
            slot = free.pop(0)
            command = [sys.executable, "-m", "grade_lightning_cli.compare", f"--out={run.out}", f"--run={run.name}"]
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
            environment[_PARENT] = str(os.getpid())
            if torch.cuda.device_count() > 1:
                environment["CUDA_VISIBLE_DEVICES"] = _gpus()[slot % len(_gpus())]
            with (run.folder / "log.txt").open("ab") as log:
                self.at[run] = subprocess.Popen(command, stdout=log, stderr=log, env=environment), slot

    def collect(self) -> None:
        """See which have ended."""
        for run, (process, _) in list(self.at.items()):
            status = process.poll()
            if status is not None:
                del self.at[run]
                if status != ELSEWHERE and (status or run.result is None):
                    self.failed.add(run)

    def stop(self) -> None:
        """End them all."""
        for process, _ in self.at.values():
            process.terminate()
        for process, _ in self.at.values():
            process.wait()


def _cores() -> int:
    """That this process may use, which a job's own limit makes fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


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
                        print(f"{run.name}: {_state(comparison, workers, run)}", flush=True)
                if comparison.complete() or not (workers.at or workers.elsewhere):
                    break
                time.sleep(1)
        finally:
            workers.stop()


def progress(comparison: Comparison, workers: Workers) -> Table:
    """A line for each method and setting, a column for each seed."""
    plan = comparison.plan
    table = Table(title=f"{comparison.out}: validation reward, * the setting that was chosen")
    for name in ("method", "setting", *(f"seed {seed}" for seed in plan.seeds)):
        table.add_column(name)
    known = set(comparison.runs())
    for method in plan.methods:
        chosen = comparison.chosen(method)
        for setting in plan.settings():
            runs = [Run(comparison.out, method, setting, seed) for seed in plan.seeds]
            cells = [_state(comparison, workers, run) if run in known else "" for run in runs]
            table.add_row(*map(escape, (method, f"{setting} *" if setting == chosen else setting, *cells)))
    return table


def _state(comparison: Comparison, workers: Workers, run: Run) -> str:
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
    state = _read(run.folder / "progress.json")
    return (
        f"{state['step']}/{state['of']} ({state['reward']:.2f})" if state and state["reward"] is not None else "starts"
    )


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def compare(args: Sequence[str] | None = None) -> None:
    """`grade-compare`: run what is still to be run, and say what became of it."""
    given, shared = _divided(list(sys.argv[1:] if args is None else args))
    Parser.given = given
    parser = Parser(
        prog="grade-compare",
        description="Train several methods, everything else equal; go on where it stopped. Behind a lone -- stand "
        "arguments of grade-fit for all runs.",
    )
    parser.add_argument("-c", "--config", action="config", help="A plan in YAML.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the comparison.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time.")
    parser.add_argument(
        "--threads", type=int | None, default=None, help="Of each run; the cores are shared out by default."
    )
    parser.add_argument("--list", action="store_true", help="Only print a command for each run that can start now.")
    parser.add_argument("--run", type=str | None, default=None, help="Only this run: METHOD/SETTING/seed_N.")
    parser.add_function_arguments(plan, fail_untyped=False)
    with user_errors("grade-compare"):
        o = parser.parse_args(given)
        check_range("[1, inf)", jobs=o.jobs, threads=o.threads)
        named = parser.parse_args(given, defaults=False)
        told = {name: named[name] for name in inspect.signature(plan).parameters if name in named}
        if shared:
            told["arguments"] = (told.get("arguments") or {}) | _pairs(shared)
        if told and "methods" not in told:
            raise InputError(
                f"{', '.join(told)}: given without methods; give the whole plan, or nothing of it to go on"
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
            workers = Workers(comparison, o.jobs, o.threads)
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


def _end_by_signals() -> None:
    """And end the runs, too; what a command like nohup has turned off stays so."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda caught, _: sys.exit(128 + caught))


def _divided(args: list[str]) -> tuple[list[str], list[str]]:
    at = args.index("--") if "--" in args else len(args)
    return args[:at], args[at + 1 :]


def _pairs(args: list[str]) -> dict[str, Any]:
    """Options of `grade-fit` and their values.

    Example:
        >>> _pairs(["--model.policy.path", "gpt2", "--config=a.yaml", "--config=b.yaml"])
        {'model.policy.path': 'gpt2', 'config': ['a.yaml', 'b.yaml']}
    """
    words = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise InputError(f"behind --: give options of grade-fit with one value each, not {' '.join(args)}")
    pairs: dict[str, Any] = {}
    for option, value in zip(words[::2], words[1::2], strict=True):
        key = option.removeprefix("--")
        if key in pairs and not _several(key):
            raise InputError(f"behind --: {option} stands there twice; give it once")
        pairs[key] = [*_each(pairs[key]), value] if key in pairs else value
    return pairs


if __name__ == "__main__":
    compare()
