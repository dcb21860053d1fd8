"""What is compared, and what is equal."""

import hashlib
import itertools
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from grade_lightning.errors import InputError, check_range

from .options import as_list, option_names

_PLANNED = {"model", "seed_everything", "ckpt_path", "output"}
_PLANNED |= {f"trainer.{name}" for name in ("default_root_dir", "max_steps", "val_check_interval", "devices")}
"""Arguments that the plan sets for each run."""

_FILES = {"config", "path", "backbone", "train", "test"}
"""Options, by the last part of their names, that name a file or a folder."""


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
    grid_seeds: list[int] = field(default_factory=list)
    """With which the grid is searched; the first of the seeds where there are none."""
    files: dict[str, str] = field(default_factory=dict)
    """A digest of each configuration file that is named, once it lies in a comparison's folder."""

    @property
    def searched(self) -> list[int]:
        """The seeds with which the grid is searched."""
        return self.grid_seeds or self.seeds[:1]

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
    grid_seeds: str | list[int] | None = None,
) -> Plan:
    """Say what is compared, and what is equal.

    Args:
        methods: names, or for each name the arguments that it alone has (`model`, if it is not the name).
        arguments: of grade-fit, for all; `config` is one file or a list of them.
        grid: values of arguments that are tried, all with all. A method is compared with those that are best on
            validation.
        seeds: of the runs.
        completions: sampled in each run; how many steps that takes follows from the method. Must be given.
        beta: β of the objective, reward − β KL, by which the best of the grid is chosen; reward per nat.
        validations: how often a run is measured on the way.
        grid_seeds: with which the grid is searched: the first of the seeds by default. Give others, and no run that
            decides the choice is among those that are compared.

    Raises:
        InputError: something is missing, twice there, out of range, or not for the user to set.

    Example:
        >>> plan("GradeSTE,RLOO", grid={"model.optimizer.lr": [0.001, 0.01]}, completions=9600).settings()
        {'lr=0.001': {'model.optimizer.lr': 0.001}, 'lr=0.01': {'model.optimizer.lr': 0.01}}
    """
    names = [name.strip() for name in methods.split(",")] if isinstance(methods, str) else list(methods)
    own = methods if isinstance(methods, dict) else {}
    numbers = _whole_numbers("seeds", seeds)
    searching = [] if grid_seeds is None else _whole_numbers("grid_seeds", grid_seeds)
    if searching and not grid:
        raise InputError("grid_seeds: there is no grid to search; remove them")
    lists: dict[str, list[Any]] = {"methods": names, "seeds": numbers, **(grid or {})}
    if searching:
        lists["grid_seeds"] = searching
    for name, values in lists.items():
        if not values or len(set(map(str, values))) < len(values):
            raise InputError(f"{name}: must not be empty, and must not repeat a value")
    odd = [name for name in names if not name or set(name) & set("/\\") or name.startswith(".")]
    if odd:
        raise InputError(f"methods: {odd[0]!r} cannot be the name of a folder")
    if completions is None:
        raise InputError("completions: say how many each run samples, such as 9600")
    check_range("[1, inf)", validations=validations, completions=completions)
    check_range("[0, inf)", beta=beta)
    for seed in numbers + searching:
        check_range("[0, 4294967295]", seeds=seed)
    each = {name: dict(own.get(name) or {}) for name in names}
    given = [*option_names(arguments or {}), *option_names(grid or {})]
    given += [key for one in each.values() for key in option_names(one) if key != "model"]
    if planned := sorted(_PLANNED.intersection(given)):
        raise InputError(f"{planned[0]}: the plan itself sets it for each run; remove it")
    found = Plan(each, arguments or {}, grid or {}, numbers, completions, beta, validations, searching)
    if len(found.settings()) < math.prod(map(len, found.grid.values())):
        raise InputError("grid: two of its points have the same name, in which / is _; give other values")
    return found


def _whole_numbers(name: str, values: str | list[int]) -> list[int]:
    try:
        return [int(value) for value in values.split(",")] if isinstance(values, str) else values
    except ValueError:
        raise InputError(f"{name} = {values}: give whole numbers, such as 1,2,3") from None


def beside(value: Any, folder: Path, key: str = "") -> Any:
    """The same with the file names in it that lie in the plan's own folder made whole.

    Args:
        value: of a plan, or a part of it.
        folder: of the plan's file.
        key: the option whose value it is.
    """
    if isinstance(value, dict):
        return {name: beside(part, folder, name) for name, part in value.items()}
    if isinstance(value, list):
        return [beside(part, folder, key) for part in value]
    named = isinstance(value, str) and key.rpartition(".")[2] in _FILES and (folder / value).exists()
    return str((folder / value).absolute()) if named else value


def load(path: Path) -> Plan:
    """Read what `grade-compare` wrote.

    Raises:
        InputError: it is something else.
    """
    try:
        written = yaml.safe_load(path.read_text())
        files = written.pop("files", {})
        found = plan(**written)
        if asdict(found) == {"grid_seeds": []} | written | {"files": {}}:  # an older plan has none
            return replace(found, files=files)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError):
        pass
    raise InputError(f"{path}: not a plan that this grade-compare wrote; give --out another name")


def joined(there: Plan, plan: Plan, path: Path) -> Plan:
    """Methods and seeds are added; what is equal for all, or decides the choice, may not change."""
    old, new = asdict(there), asdict(plan)
    equal = ("arguments", "grid", "completions", "beta", "validations", "grid_seeds")
    differ = [key for key in equal if old[key] != new[key]]
    differ += [f"methods.{m}" for m in old["methods"] if old["methods"][m] != new["methods"].get(m, old["methods"][m])]
    if not (there.grid_seeds or plan.grid_seeds) and there.searched != plan.searched:
        differ.append("first seed")
    if differ:
        raise InputError(f"{path}: the runs there were made with other {', '.join(differ)}; give --out another name")
    return replace(there, methods=there.methods | plan.methods, seeds=list(dict.fromkeys(there.seeds + plan.seeds)))


def file_digests(plan: Plan) -> dict[str, str]:
    """Of the configuration files that a plan names."""
    named = [one.get("config") or [] for one in (plan.arguments, *plan.methods.values(), plan.grid)]
    digests = {}
    paths = [path for value in named for some in as_list(value) for path in as_list(some)]  # a point may hold several
    for path in paths:
        try:
            digests[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        except OSError as error:
            raise InputError(f"config {path}: cannot be read ({error.strerror}); fix the plan") from None
    return digests
