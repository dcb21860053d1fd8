"""What should be the same for all runs, and is not."""

from collections.abc import Iterator, Sequence
from typing import Any

from .arms import Arm
from .runs import Run, Study


def facts(run: Run) -> dict[str, str]:
    """What should be the same for all runs: commit, versions, hardware, threads."""
    versions = run.about.get("versions")
    known = {name: run.about[name] for name in ("commit", "hardware", "threads") if name in run.about}
    known |= versions if isinstance(versions, dict) else {}
    return {name: "unknown" if value is None else str(value) for name, value in known.items()}


def mixed(study: Study) -> list[str]:
    """In what the runs differ although they should not."""
    known = [found for run in study.runs if (found := facts(run))]
    names = dict.fromkeys(name for one in known for name in one)
    return _differing([{name: one.get(name, "unknown") for name in names} for one in known])


def tasks(arms: Sequence[Arm]) -> list[str]:
    """In what the methods' data, reward and sampler differ, by the configurations that are there."""
    return _differing([dict(_task(run.config)) for arm in arms for run in arm.runs])


def _task(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in _leaves("", config):
        match name.split(".")[1:]:
            case ["data", "num_workers"]:
                pass
            case ["data", *_] | ["model", "reward" | "sampler", *_]:
                yield name.removeprefix("."), value


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Dotted names and values; a class is the value of the name that it fills."""
    if not isinstance(value, dict):
        yield name, str(value)
        return
    yield name, str(value.get("class_path", "given"))
    inner = value.get("init_args") if "class_path" in value else value
    for key, part in inner.items() if isinstance(inner, dict) else ():
        yield from _leaves(f"{name}.{key}", part)


def _differing(known: Sequence[dict[str, str]]) -> list[str]:
    """Names with several values, and these."""
    values = {name: sorted({one[name] for one in known if name in one}) for one in known for name in one}
    return [f"{name} ({', '.join(them)})" for name, them in values.items() if len(them) > 1]
