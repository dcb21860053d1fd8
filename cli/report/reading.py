"""What runs left behind, read with suspicion: what is absent or damaged is named, never guessed."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from grade_lightning.errors import InputError

from .files import as_number, read_json, read_yaml
from .logs import event_files, scalars
from .plans import read_plan
from .runs import Run, Study
from .tested import read_test


def read(folders: Iterable[Path]) -> Study:
    """All finished runs in comparisons' folders and single runs' folders.

    Raises:
        InputError: a folder is neither.
    """
    study = Study()
    for folder in folders:
        if (folder / "plan.yaml").is_file() or any(folder.glob("runs/*/*/seed_*")):
            found = _comparison(folder, study)
        elif (folder / "config.yaml").is_file() or event_files(folder):
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
    plan = read_plan(folder / "plan.yaml", study)
    origin = str(folder.resolve()) if plan is None else plan.origin

    def called(method: str, setting: str) -> str:
        own = origin if plan is None else f"{origin} {plan.methods.get(method)}"
        return study.name(method, own, setting, f"{setting}, {folder.name}", f"{setting}, {folder.resolve()}")

    methods: dict[str, None] = {}
    chosen: dict[str, str] = {}
    lost = "the settings that were tested count as chosen"
    for method, entry in read_json(folder / "chosen.json", study.missing, lost).items():
        entry = entry if isinstance(entry, dict) else {}
        methods[method] = None
        if isinstance(entry.get("setting"), str):
            chosen[method] = entry["setting"]
        if isinstance(values := entry.get("objectives"), dict):
            for name, x in values.items():
                study.objectives.setdefault((method, called(method, name)), as_number(x))
    found, foreign = [], []
    for place in sorted(folder.glob("runs/*/*/seed_*"), key=_numbered):
        method, setting, seed = place.parts[-3], place.parts[-2], place.name.removeprefix("seed_")
        if not seed.isdigit():
            continue
        methods[method] = None
        if plan is not None and (method not in plan.methods or int(seed) not in plan.seeds + plan.searched):
            foreign.append(f"{method}/{setting}/{place.name}")
            continue
        lost = "the run is not finished and is left out"
        if not (about := read_json(place / "run.json", study.missing, lost)):
            continue
        if about.get("seed") != int(seed) or about.get("method", method) != method:
            study.missing.append(f"{place / 'run.json'}: not of {method} with seed {seed}; {lost}.")
            continue
        tested = (place / "test.json").exists()
        is_chosen = chosen[method] == setting if method in chosen else tested
        is_chosen &= plan is None or int(seed) in plan.seeds  # else it only served the choice
        run = Run(place, method, called(method, setting), int(seed), is_chosen, about)
        for logs in _logs(place, about, study.missing):
            run.curves = scalars(logs, study.missing)
            run.config = read_yaml(logs / "config.yaml")
            if not run.config:
                lost = "whether its task is that of the others is not known"
                study.missing.append(f"{logs / 'config.yaml'}: cannot be read; {lost}.")
            if any(name.startswith("val/") for name in run.curves):
                break  # a later one may be of a test
        if about.get("diverged"):
            study.missing.append(f"{place}: diverged; it has no test, and those that have speak of runs that did not.")
        elif run.chosen:
            read_test(run, study.missing)
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


def _single(folder: Path, study: Study) -> Run:
    config = read_yaml(folder / "config.yaml")
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
    run.curves = scalars(folder, study.missing)
    study.missing.append(f"{folder}: a single run: nothing says whether it finished, nor its commit and versions.")
    tests = {name.removeprefix("test/"): c.values[-1] for name, c in run.curves.items() if name.startswith("test/")}
    if (folder / "test.json").exists():
        read_test(run, study.missing)
    elif math.isfinite(tests.get("reward", math.nan)):
        run.test = {name: float(value) for name, value in tests.items()}
    _note_curves(run, study.missing)
    return run


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
    steps = as_number(trainer.get("max_steps")) if isinstance(trainer, dict) else math.nan
    known = as_number(validation.get("reward")) if isinstance(validation, dict) else math.nan
    if steps > 0 and curve.steps[-1] < steps - 1:
        return False
    return math.isnan(known) or abs(curve.values[-1] - known) <= 1e-5 * (1 + abs(known))


def _numbered(path: Path) -> list[Any]:
    """Sort by the numbers in a path: version_9 before version_10, lr=3e-4 before lr=0.001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", str(path))
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]
