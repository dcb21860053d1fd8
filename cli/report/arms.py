"""The methods that are compared, and the judges that none of them was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

from .runs import Run, Study


@dataclass(frozen=True)
class Arm:
    """A method at the setting that is compared, with its finished runs in order of their seeds."""

    label: str
    method: str
    setting: str
    runs: list[Run]

    @property
    def tested(self) -> list[Run]:
        """Its runs with a test."""
        return [run for run in self.runs if run.test]

    @property
    def seeds(self) -> list[int]:
        """The seeds of its finished runs."""
        return [run.seed for run in self.runs]


def arms(study: Study, chosen: bool = True) -> list[Arm]:
    """The methods at their chosen settings, or every setting; all settings where none was chosen."""
    shown = [run for run in study.runs if run.chosen or not chosen] or study.runs
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in shown:
        groups.setdefault((run.method, run.setting), []).append(run)
    methods = [method for method, _ in groups]
    return [
        Arm(
            method if methods.count(method) == 1 else f"{method} ({setting})",
            method,
            setting,
            sorted(runs, key=lambda run: run.seed),
        )
        for (method, setting), runs in groups.items()
    ]


def judges_of(run: Run) -> set[str]:
    """Names `rewards/…` that were measured but not trained on: a part of the training reward is logged in training.

    Without logs of the training none is known.
    """
    if "train/reward" not in run.curves:
        return set()
    measured = {name.removeprefix("val/") for name in run.curves if name.startswith("val/rewards/")}
    measured |= {name for name in run.test if name.startswith("rewards/")}
    return measured - set(run.curves)


def judges(arms: Sequence[Arm]) -> list[str]:
    """All judges of all runs."""
    return sorted(set().union(*(judges_of(run) for arm in arms for run in arm.runs)))


def trained_on(arm: Arm, name: str) -> bool:
    """Whether the method has for its reward, or a part of it, what is another's judge."""
    return name.startswith("rewards/") and any(name in run.curves for run in arm.runs)
