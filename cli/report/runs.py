"""Finished runs: their curves, their tests, and what is known of how they were made."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .statistics import Array


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
