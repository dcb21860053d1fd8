"""What runs left behind, read with suspicion: what is absent or damaged is named, never guessed."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.tensorflow_stub import errors  # type: ignore[import-untyped]
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New  # type: ignore[import-untyped]

from grade_lightning.errors import InputError

from .statistics import Array

Points = dict[str, dict[int, tuple[float, float]]]
"""Time and value of each scalar at each step."""


@dataclass(frozen=True)
class Curve:
    """A logged scalar, in the order of its steps."""

    steps: Array
    """As TensorBoard counts them."""
    values: Array
    seconds: Array
    """Since the first record of the run, without the pauses before it went on."""


@dataclass(frozen=True)
class Rows:
    """The test prompts of a run, one by one; figures are NaN where there is none."""

    prompts: list[str]
    completions: list[str]
    figures: dict[str, Array]
    """`reward`, `kl`, and `rewards/{name}`."""


@dataclass
class Run:
    """One finished training run."""

    folder: Path
    method: str
    setting: str
    seed: int
    chosen: bool = True
    """Its setting is the one that is compared."""
    about: dict[str, Any] = field(default_factory=dict)
    """What run.json says: command, commit, versions, hardware …"""
    config: dict[str, Any] = field(default_factory=dict)
    """The flags that it saved."""
    curves: dict[str, Curve] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    """Test metrics without their stage; empty where it was not tested."""
    rows: Rows | None = None
    ended: bool = True
    """Its curves reach to the end of its training."""


@dataclass
class Study:
    """Everything that is reported on."""

    runs: list[Run] = field(default_factory=list)
    objectives: dict[tuple[str, str], float] = field(default_factory=dict)
    """What the choice of a setting was made by, for each method and setting."""
    plans: list[str] = field(default_factory=list)
    betas: set[float] = field(default_factory=set)
    """Coefficients of the KL by which the plans chose."""
    names: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """What a method's setting is called, by what its runs were made with."""
    planned: set[str] = field(default_factory=set)
    """Methods whose absent runs a plan has told."""
    lost: list[str] = field(default_factory=list)
    """Methods that were to be compared, of which no setting can be."""
    missing: list[str] = field(default_factory=list)
    """One sentence for each thing that is absent or damaged."""

    def name(self, method: str, origin: str, *names: str) -> str:
        """The first of the names that runs of the method have not, unless they were made with the same."""
        taken = [name for (other, *_), name in self.names.items() if other == method]
        key = method, names[0], origin
        return self.names.setdefault(key, next((name for name in names if name not in taken), names[-1]))


def read(folders: Iterable[Path]) -> Study:
    """All finished runs in comparisons' folders and single runs' folders.

    Raises:
        InputError: a folder is neither.
    """
    study = Study()
    for folder in folders:
        if (folder / "plan.yaml").is_file() or any(folder.glob("runs/*/*/seed_*")):
            found = _comparison(folder, study)
        elif (folder / "config.yaml").is_file() or _event_files(folder):
            found = [_single(folder, study)]
        else:
            raise InputError(
                f"{folder}: neither a comparison (runs/METHOD/SETTING/seed_N in it) nor a run "
                "(events.out.tfevents… in it, such as runs/GradeSTE/version_0)"
            )
        for run in found:
            if any((r.method, r.setting, r.seed) == (run.method, run.setting, run.seed) for r in study.runs):
                study.missing.append(f"{run.folder}: a second run of {run.method} with seed {run.seed}; left out.")
            else:
                study.runs.append(run)
    return study


def _comparison(folder: Path, study: Study) -> list[Run]:
    plan = _plan(folder / "plan.yaml", study)
    origin = str(folder.resolve()) if plan is None else plan.origin

    def called(method: str, setting: str) -> str:
        own = origin if plan is None else f"{origin} {plan.methods.get(method)}"
        return study.name(method, own, setting, f"{setting}, {folder.name}", f"{setting}, {folder.resolve()}")

    methods: dict[str, None] = {}
    chosen: dict[str, str] = {}
    lost = "the settings that were tested count as chosen"
    for method, entry in _json(folder / "chosen.json", study.missing, lost).items():
        entry = entry if isinstance(entry, dict) else {}
        methods[method] = None
        if isinstance(entry.get("setting"), str):
            chosen[method] = entry["setting"]
        if isinstance(values := entry.get("objectives"), dict):
            for name, x in values.items():
                study.objectives.setdefault((method, called(method, name)), _number(x))
    found, foreign = [], []
    for place in sorted(folder.glob("runs/*/*/seed_*"), key=_numbered):
        method, setting, seed = place.parts[-3], place.parts[-2], place.name.removeprefix("seed_")
        if not seed.isdigit():
            continue
        methods[method] = None
        if plan is not None and (method not in plan.methods or int(seed) not in plan.seeds):
            foreign.append(f"{method}/{setting}/{place.name}")
            continue
        lost = "the run is not finished and is left out"
        if not (about := _json(place / "run.json", study.missing, lost)):
            continue
        if about.get("seed") != int(seed) or about.get("method", method) != method:
            study.missing.append(f"{place / 'run.json'}: not of {method} with seed {seed}; {lost}.")
            continue
        tested = (place / "test.json").exists()
        is_chosen = chosen[method] == setting if method in chosen else tested
        run = Run(place, method, called(method, setting), int(seed), is_chosen, about)
        for logs in _logs(place, about, study.missing):
            run.curves = _scalars(logs, study.missing)
            run.config = _yaml(logs / "config.yaml")
            if not run.config:
                lost = "whether its task is that of the others is not known"
                study.missing.append(f"{logs / 'config.yaml'}: cannot be read; {lost}.")
            if any(name.startswith("val/") for name in run.curves):
                break  # a later one may be of a test
        if about.get("diverged"):
            study.missing.append(f"{place}: diverged; it has no test, and those that have speak of runs that did not.")
        elif run.chosen:
            _read_test(run, study.missing)
        _note_curves(run, study.missing)
        found.append(run)
    if not found:
        study.missing.append(f"{folder}: no finished run in it.")
    if foreign:
        study.missing.append(f"{folder}: not in its plan, and left out: {', '.join(foreign)}.")
    for method in methods if plan is None else plan.methods:
        own = [run for run in found if run.method == method]
        if not any(run.chosen for run in own):
            known = {name: x for (other, name), x in study.objectives.items() if other == method}
            values = [f"{name} {x:.4g}" if math.isfinite(x) else f"{name} not finite" for name, x in known.items()]
            why = "no finished run at its chosen setting" if method in chosen else "no setting was chosen or tested"
            said = f" (objectives on validation: {', '.join(values)})" if values else ""
            study.missing.append(f"{method}: {why}{said}.")
            study.lost.append(method)
        if plan is not None:
            study.planned.add(method)
            study.missing += [f"{method}: {line}, which the plan has." for line in plan.absent(own)]
    return found


def _logs(place: Path, about: dict[str, Any], missing: list[str]) -> list[Path]:
    """Where a run's curves lie: as it says itself; if it says nothing, the last version or job goes first."""
    if "folder" in about:
        own = place / str(about["folder"])
        if own != place and own.is_dir() and own.resolve().is_relative_to(place.resolve()):
            return [own]
        missing.append(f"{place / 'run.json'}: its logs are not where it says ({about['folder']}).")
        return []
    others = [path for kind in ("version", "job") for path in place.glob(f"*/{kind}_*")]
    return sorted(others, key=_numbered, reverse=True)


@dataclass(frozen=True)
class _Plan:
    """What a comparison was to have."""

    methods: dict[str, Any]
    """What each has of its own."""
    seeds: list[int]
    origin: str
    """All that is equal for its runs."""
    points: list[dict[str, Any]]
    """Of the grid, which is gone through with the first seed."""

    def absent(self, runs: Sequence[Run]) -> Iterator[str]:
        """What a method's finished runs lack."""
        seeds = {run.seed for run in runs if run.chosen} or {run.seed for run in runs}
        if lost := [str(seed) for seed in self.seeds if seed not in seeds]:
            yield f"no finished run with seed {', '.join(lost)}"
        there = [run.about.get("setting") for run in runs if run.seed == self.seeds[0]]
        points = [",".join(f"{key}={x}" for key, x in point.items()) for point in self.points if point not in there]
        if points and there:
            yield f"no finished run with seed {self.seeds[0]} at {'; '.join(points)}"


def _plan(path: Path, study: Study) -> _Plan | None:
    """None where there is none, or none that is understood; that is said."""
    if path.is_file():
        study.plans.append(path.read_text(errors="replace"))
    plan = _yaml(path)
    methods, seeds, grid, beta = (plan.get(name) for name in ("methods", "seeds", "grid", "beta"))
    if (
        not (isinstance(methods, dict) and isinstance(seeds, list) and isinstance(grid, dict))
        or not (methods and seeds and all(type(seed) is int for seed in seeds))
        or not all(isinstance(values, list) for values in grid.values())
        or not math.isfinite(_number(beta))
    ):
        why = "not understood" if path.is_file() else "not there"
        study.missing.append(f"{path}: {why}; which runs are absent is not known, nor the β of the objective.")
        return None
    study.betas.add(_number(beta))
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    origin = json.dumps({k: v for k, v in plan.items() if k not in ("methods", "seeds")}, sort_keys=True, default=str)
    return _Plan({str(method): own for method, own in methods.items()}, seeds, origin, points)


def _yaml(path: Path) -> dict[str, Any]:
    """An object from a file; empty where there is none."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _single(folder: Path, study: Study) -> Run:
    config = _yaml(folder / "config.yaml")
    if not config:
        study.missing.append(f"{folder}: no readable config.yaml; its seed is unknown, and shown as 0.")
    seed = config.pop("seed_everything", 0)
    config.pop("ckpt_path", None)
    whole = folder.resolve()
    method = whole.parent.name
    # runs whose configurations differ in the seed alone are seeds of one setting
    origin = json.dumps(config, sort_keys=True, default=str)
    setting = study.name(method, origin, "default", whole.name, str(whole))
    run = Run(folder, method, setting, seed if isinstance(seed, int) else 0)
    run.config = config
    run.curves = _scalars(folder, study.missing)
    study.missing.append(f"{folder}: a single run: nothing says whether it finished, nor its commit and versions.")
    tests = {name.removeprefix("test/"): c.values[-1] for name, c in run.curves.items() if name.startswith("test/")}
    if (folder / "test.json").exists():
        _read_test(run, study.missing)
    elif math.isfinite(tests.get("reward", math.nan)):
        run.test = {name: float(value) for name, value in tests.items()}
    _note_curves(run, study.missing)
    return run


def _numbered(path: Path) -> list[Any]:
    """Sort by the numbers in a path: version_9 before version_10, lr=3e-4 before lr=0.001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", str(path))
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def _note_curves(run: Run, missing: list[str]) -> None:
    for name in ("val/reward", "val/kl"):
        if name not in run.curves:
            missing.append(f"{run.folder}: no {name} in its TensorBoard logs; it is in no picture of it.")
    for name in ("train/reward", "val/reward", "val/kl"):
        lost = int((~np.isfinite(run.curves[name].values)).sum()) if name in run.curves else 0
        if lost:
            missing.append(f"{run.folder}: {name} is not a number at {lost} steps; those are left out.")
    run.ended = _reaches_the_end(run)
    if not run.ended and "val/reward" in run.curves:
        at = f"{run.curves['val/reward'].steps[-1]:.0f}"
        missing.append(f"{run.folder}: its last validation in the logs, at step {at}, is not that of its end; what the "
                       "end was is not known.")  # fmt: skip


def _reaches_the_end(run: Run) -> bool:
    """Whether the last validation is of the last step, and what run.json says of it; where these say anything."""
    curve = run.curves.get("val/reward")
    if curve is None:
        return False
    trainer, validation = run.config.get("trainer"), run.about.get("validation")
    steps = _number(trainer.get("max_steps")) if isinstance(trainer, dict) else math.nan
    known = _number(validation.get("reward")) if isinstance(validation, dict) else math.nan
    if steps > 0 and curve.steps[-1] < steps - 1:
        return False
    return math.isnan(known) or abs(curve.values[-1] - known) <= 1e-5 * (1 + abs(known))


def _event_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("events.out.tfevents*") if path.is_file())


def _contradicts(points: Points, step: int, value: Any) -> bool:
    """Whether something else was logged there; the same again is what one training may leave in two files."""
    there = points.get(value.tag, {}).get(step)
    return there is not None and not np.array_equal(there[1], value.simple_value, equal_nan=True)


def _until(points: Points, step: float) -> Points:
    """A copy of what was logged before a step."""
    kept = {name: {s: p for s, p in by_step.items() if s < step} for name, by_step in points.items()}
    return {name: by_step for name, by_step in kept.items() if by_step}


def _scalars(folder: Path, missing: list[str]) -> dict[str, Curve]:
    """All scalars of a run; of several values at a step the first counts.

    Where the run went on, what had been logged from that step on is dropped, as TensorBoard does, and the time that
    passed since the last record that is kept.
    """
    points: Points = {}
    began, pause = math.inf, 0.0
    files = _event_files(folder)
    for path in files:
        before, again = _until(points, math.inf), False
        reader, records = PyRecordReader_New(str(path)), 0
        while True:
            try:
                reader.GetNext()
                event = Event.FromString(reader.record())
            except errors.OutOfRangeError:
                break
            except (errors.DataLossError, DecodeError):
                missing.append(f"{path}: cut off or damaged after {records} records; what follows is left out.")
                break
            records += 1
            if event.session_log.status == SessionLog.START:
                points, again = _until(points, event.step), True
                last = max((time for by_step in points.values() for time, _ in by_step.values()), default=math.inf)
                began, pause = (began, event.wall_time - last) if points else (math.inf, 0.0)
            logged = [value for value in event.summary.value if value.HasField("simple_value")]
            if not again and any(_contradicts(before, event.step, value) for value in logged):
                missing.append(f"{path}: of another training than the files before it; left out.")
                points = before
                break
            for value in logged:
                time = event.wall_time - pause
                began = min(began, time)
                points.setdefault(value.tag, {}).setdefault(event.step, (time, value.simple_value))
    if not points:
        missing.append(f"{folder}: {'empty TensorBoard logs' if files else 'no TensorBoard logs'}.")
    curves = {}
    for name, by_step in points.items():
        steps = sorted(by_step)
        times, values = np.array([by_step[step] for step in steps], float).T
        curves[name] = Curve(np.array(steps, float), values, times - began)
    return curves


def _read_test(run: Run, missing: list[str]) -> None:
    """Test metrics, and the prompts where every line is sound and their mean is that of the metrics."""
    lost = "its test is left out"
    test = {name: _number(x) for name, x in _json(run.folder / "test.json", missing, lost).items()}
    if not math.isfinite(test.get("reward", math.nan)):
        if test:
            missing.append(f"{run.folder / 'test.json'}: no finite reward in it; {lost}.")
        return
    path = run.folder / "test.jsonl"
    if path.exists():
        try:
            rows = _rows(path)
        except ValueError as error:
            missing.append(f"{path}: {error}; {lost}.")
            return
        reward = rows.figures["reward"]
        seen = reward[np.isfinite(reward)]
        if not len(seen) or abs(seen.mean() - test["reward"]) > 0.01 * seen.std() + 1e-5 * (1 + abs(test["reward"])):
            mean = f"{seen.mean():.4g} over its {len(rows.prompts)} lines" if len(seen) else "of no line"
            missing.append(f"{path}: mean reward {mean}, but {test['reward']:.4g} in test.json; {lost}.")
            return
        run.rows = rows
    else:
        missing.append(f"{path}: not there; no interval over prompts and no pairing by prompt for this run.")
    run.test = test


def _rows(path: Path) -> Rows:
    prompts, completions = [], []
    figures: list[dict[str, float]] = []
    # not splitlines(): a completion may hold other characters that end a line
    for number, line in enumerate(path.read_text(errors="replace").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            prompts.append(str(row["prompt"]))
            completions.append(str(row["completion"]))
            parts = {f"rewards/{name}": _number(x) for name, x in (row.get("rewards") or {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"line {number} is broken") from None
        figures.append({"reward": _number(row.get("reward")), "kl": _number(row.get("kl"))} | parts)
    names = dict.fromkeys(name for row in figures for name in row)
    return Rows(prompts, completions, {n: np.array([row.get(n, math.nan) for row in figures]) for n in names})


def _json(path: Path, missing: list[str], so: str) -> dict[str, Any]:
    """An object from a file; empty, with a note, where there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        missing.append(f"{path}: not there; {so}.")
        return {}
    except (OSError, ValueError) as error:
        missing.append(f"{path}: cannot be read ({error}); {so}.")
        return {}
    if isinstance(found, dict) and found:
        return found
    missing.append(f"{path}: holds no object; {so}.")
    return {}


def _number(value: Any) -> float:
    """NaN for all that is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return math.nan
    return float(value)
