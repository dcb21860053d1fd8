"""The runs of a plan: which there are, which are finished, and which settings are chosen."""

import itertools
import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from filelock import FileLock

from grade_lightning.errors import InputError
from grade_lightning.files import write_atomically

from .options import as_flags
from .plan import Plan, file_digests, joined, load
from .run import Run, read_json


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
            there = load(self.path) if self.path.is_file() else None
            found = there or plan
            assert found is not None
            found = joined(found, plan or found, self.path)
            digests = file_digests(found)
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
        seeds = dict.fromkeys(self.plan.searched + self.plan.seeds)
        points = itertools.product(self.plan.methods, self.plan.settings(), seeds)
        known = {run.name: run for run in itertools.starmap(partial(Run, self.out), points)}
        if name not in known:
            raise InputError(f"--run {name}: not in the plan; give METHOD/SETTING/seed_N, such as {next(iter(known))}")
        return known[name]

    def chosen(self, method: str) -> str | None:
        """The setting that is best on validation, once it is known."""
        return self._choice(method)[0]

    def _choice(self, method: str) -> tuple[str | None, dict[str, float | None]]:
        settings = list(self.plan.settings())
        if len(settings) == 1:
            return settings[0], {}
        found: dict[str, float | None] = {}
        for setting in settings:
            results = [Run(self.out, method, setting, seed).result for seed in self.plan.searched]
            objectives = [result["objective"] for result in results if result is not None]
            if len(objectives) < len(results):
                return None, found
            found[setting] = None if None in objectives else sum(objectives) / len(objectives)
        finite = {setting: value for setting, value in found.items() if value is not None and math.isfinite(value)}
        return (max(finite, key=finite.__getitem__) if finite else None), found

    def runs(self) -> list[Run]:
        """All whose setting is known: those of the grid first."""
        searched = self.plan.searched if len(self.plan.settings()) > 1 else []
        points = itertools.product(self.plan.methods, self.plan.settings(), searched)
        grid = list(itertools.starmap(partial(Run, self.out), points))
        chosen = {method: setting for method in self.plan.methods if (setting := self.chosen(method))}
        rest = [seed for seed in self.plan.seeds if seed not in searched]
        return grid + [Run(self.out, method, setting, seed) for seed in rest for method, setting in chosen.items()]

    def finished(self, run: Run) -> bool:
        """Whether nothing is left to do for it now."""
        tested = run.tested or run.seed not in self.plan.seeds or self.chosen(run.method) != run.setting
        return run.result is not None and tested

    def complete(self) -> bool:
        """Whether nothing is left to do at all."""
        return all(self.chosen(method) for method in self.plan.methods) and all(map(self.finished, self.runs()))

    def arguments(self, run: Run) -> list[str]:
        """Of `grade-fit` for a run."""
        own = dict(self.plan.methods[run.method])
        model = own.pop("model", run.method)
        everything = self.plan.arguments | own | self.plan.settings()[run.setting] | {"seed_everything": run.seed}
        return [
            *as_flags("config", everything.pop("config", [])),  # first: what the plan says comes after
            f"--model={model}",
            "--trainer.devices=1",
            "--export.enabled=false",
            *itertools.chain.from_iterable(as_flags(key, value) for key, value in everything.items()),
            f"--trainer.default_root_dir={run.folder}",
        ]

    def note_choices(self) -> None:
        """Write down what was chosen, for the report; for methods that another process has added, too."""
        with self._alone():
            self.plan = load(self.path)
            choices = {m: dict(zip(("setting", "objectives"), self._choice(m), strict=True)) for m in self.plan.methods}
            if choices != read_json(self.out / "chosen.json"):
                write_atomically(self.out / "chosen.json", json.dumps(choices, indent=1))
