"""What the runs say: results, differences, curves, gaps, and the sentence that follows from them."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from .runs import Curve, Run, Study
from .statistics import Array, Estimate, PairedTest, crossed_interval, holm, paired_test
from .wording import interval, number

AXES = {
    "steps": "optimizer steps",
    "train/sampled_tokens": "sampled tokens",
    "train/reward_calls": "reward calls",
    "seconds": "seconds",
}
"""What a learning curve is drawn against."""
PLAIN = ("perplexity", "distinct_2", "response_length", "eos_rate", "entropy")
"""Test metrics that are shown as means over seeds."""


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


# ---- test results ---------------------------------------------------------------------------------------------------


def _same_prompts(runs: Sequence[Run]) -> bool:
    known = [run.rows.prompts for run in runs if run.rows is not None]
    return len(known) == len(runs) and all(prompts == known[0] for prompts in known)


def _values(run: Run, name: str, beta: float | None) -> Array:
    """A figure of each test prompt; of the whole test where there are no prompts."""
    if name == "objective":
        return _values(run, "reward", None) - (beta or 0.0) * _values(run, "kl", None)
    if run.rows is None:
        return np.array([run.test.get(name, math.nan)])
    return run.rows.figures.get(name, np.full(len(run.rows.prompts), math.nan))


def measure(arm: Arm, name: str, beta: float | None = None) -> Estimate:
    """A test figure over seeds and prompts; over seeds alone where the prompts are not the same."""
    runs = arm.tested
    if not runs:
        return Estimate(math.nan, math.nan, "", 0, 0, 0)
    if name in PLAIN:
        return crossed_interval(np.array([[run.test.get(name, math.nan)] for run in runs]))
    measured = [(run, x) for run in runs if np.isfinite(x := _values(run, name, beta)).any()]
    if not measured:
        return Estimate(math.nan, math.nan, "", 0, 0, 0)
    runs, values = [run for run, _ in measured], [x for _, x in measured]
    if _same_prompts(runs):
        return crossed_interval(np.stack(values))
    found = crossed_interval(np.array([[x[np.isfinite(x)].mean()] for x in values]))
    return found._replace(left_out=sum(int((~np.isfinite(x)).sum()) for x in values))


class Difference(NamedTuple):
    """One method less another on the same prompts, or why that cannot be said."""

    measure: str
    first: Arm
    second: Arm
    estimate: Estimate | None
    test: PairedTest | None
    p: float
    """Of the t-test, Holm-corrected over the pairs of this measure; NaN without a test."""
    why_not: str

    @property
    def significant(self) -> bool:
        """By the corrected test, and the interval for other seeds and prompts does not reach zero."""
        e = self.estimate
        return e is not None and self.p < 0.05 and abs(e.mean) > e.half_width


def differences(arms: Sequence[Arm], name: str, beta: float | None = None) -> list[Difference]:
    """All pairs of methods by a figure, if it is a judge of those not trained on it; p is corrected over them."""
    judged = [arm for arm in arms if not trained_on(arm, name)]
    found = [_difference(one, two, name, beta) for one, two in combinations(judged, 2)]
    corrected = iter(holm([d.test.p for d in found if d.test]))
    return [d._replace(p=next(corrected)) if d.test else d for d in found]


def _difference(first: Arm, second: Arm, name: str, beta: float | None) -> Difference:
    other = {run.seed: run for run in second.tested}
    both = [(run, other[run.seed]) for run in first.tested if run.seed in other]
    pairs = [pair for pair in both if all(run.rows is not None for run in pair)]
    estimate, test, why = None, None, ""
    if not both:
        why = "no seed was tested with both"
    elif not pairs or not _same_prompts([run for pair in pairs for run in pair]):
        why = "the prompts differ or are not known: not paired"
    else:
        gaps = np.stack([_values(one, name, beta) - _values(two, name, beta) for one, two in pairs])
        estimate = crossed_interval(gaps)
        by_seed = np.array([row[np.isfinite(row)].mean() for row in gaps if np.isfinite(row).any()])
        test = paired_test(by_seed)
        if test is None:
            counts = {
                0: "no prompt was scored with both",
                1: "one seed: no test is possible",
                2: "two seeds: no test is made",
            }
            why = counts.get(len(by_seed), "no scatter between seeds: no test")
    return Difference(name, first, second, estimate, test, math.nan, why)


# ---- curves ---------------------------------------------------------------------------------------------------------


class Band(NamedTuple):
    """A curve over seeds, at the validations that all of them have: the mean is of the same seeds everywhere."""

    x: Array
    mean: Array
    low: Array
    """The lowest seed's value."""
    high: Array


def clean(run: Run, name: str) -> Curve | None:
    """A curve without the points that are not finite; None where nothing is left."""
    curve = run.curves.get(name)
    if curve is None or not (ok := np.isfinite(curve.values)).any():
        return None
    return Curve(curve.steps[ok], curve.values[ok], curve.seconds[ok])


def position(run: Run, curve: Curve, axis: str) -> Array | None:
    """Where the points of a validation curve lie on an axis; None where nothing was logged.

    Counts are taken between two logs in proportion to the steps. What lies beyond the last log is NaN; run.json may say
    what was spent in the end. At step 0, where validation begins, nothing is spent.
    """
    found: Array
    if axis in ("steps", "seconds"):
        found = getattr(curve, axis)
        return found
    counts = clean(run, axis)
    if counts is None:
        return None
    steps, values = [-1.0, *counts.steps], [0.0, *counts.values]
    spent = run.about.get("spent")
    total = spent.get(axis.removeprefix("train/")) if isinstance(spent, dict) else None
    if run.ended and curve.steps[-1] > steps[-1] and isinstance(total, (int, float)):
        steps, values = [*steps, curve.steps[-1]], [*values, total]
    at = np.where(curve.steps == 0, -1, curve.steps)
    at = np.where(at == steps[-1] + 1, steps[-1], at)  # the validation at the end carries the number of steps
    found = np.interp(at, steps, values, right=math.nan)
    return found


def band(arm: Arm, name: str, axis: str) -> Band | None:
    """Mean and range of a curve over the seeds that have it; None where none has."""
    curves = [(run, curve) for run in arm.runs if (curve := clean(run, name))]
    return _band([(curve, x) for run, curve in curves if (x := position(run, curve, axis)) is not None])


def gap_band(arm: Arm) -> Band | None:
    """Training reward less validation reward along the training, against steps."""
    curves = [curve for run in arm.runs if (curve := gap(run))]
    return _band([(curve, curve.steps) for curve in curves])


def _band(curves: Sequence[tuple[Curve, Array]]) -> Band | None:
    columns = []
    for curve, x in curves:
        rows = zip(curve.steps, x, curve.values, strict=True)
        columns.append({step: pair for step, *pair in rows if math.isfinite(pair[0])})
    shared = sorted(set(columns[0]).intersection(*columns[1:])) if columns else []
    if not shared:
        return None
    x, y = np.array([[column[step] for step in shared] for column in columns]).transpose(2, 0, 1)
    return Band(x.mean(0), y.mean(0), y.min(0), y.max(0))


def coarse(band: Band, points: int = 40) -> Band:
    """No more than so many points, each the mean of neighbours."""
    groups = np.array_split(np.arange(len(band.x)), min(points, len(band.x)))
    return Band(*(np.array([values[group].mean() for group in groups]) for values in band))


def gap(run: Run) -> Curve | None:
    """Mean training reward since the validation before, less validation reward; None where either is absent."""
    train, val = clean(run, "train/reward"), clean(run, "val/reward")
    if train is None or val is None:
        return None
    since = zip([-1.0, *val.steps], val.steps, strict=False)
    parts = [train.values[(train.steps > low) & (train.steps <= high) & (high > 0)] for low, high in since]
    kept = [i for i, part in enumerate(parts) if len(part)]
    if not kept:
        return None
    return Curve(val.steps[kept], np.array([parts[i].mean() - val.values[i] for i in kept]), val.seconds[kept])


def levels(arms: Sequence[Arm]) -> list[float]:
    """Rewards worth asking for: parts of the way from where validation began to the best mean.

    They have two digits of that way, and lie on it.
    """
    bands = [found for arm in arms if (found := band(arm, "val/reward", "steps"))]
    if not bands:
        return []
    start, best = max(float(b.mean[0]) for b in bands), max(float(b.mean.max()) for b in bands)
    if best <= start:
        return []
    decimals = 1 - math.floor(math.log10(best - start))
    rounded = (round(start + part * (best - start), decimals) for part in (0.25, 0.5, 0.75, 0.9))
    return list(dict.fromkeys(level for level in rounded if start < level <= best))


def reached(arm: Arm, level: float, axis: str) -> str:
    """Where the validation reward first was at a level, from the first seed to the last, and how many got there.

    Not known is what a log that ends too early leaves open.
    """
    found: list[float] = []
    known = 0
    for run in arm.runs:
        curve = clean(run, "val/reward")
        x = None if curve is None else position(run, curve, axis)
        if curve is None or x is None:
            continue
        first = x[curve.values >= level][:1]
        known += run.ended and not np.isnan(first).any()
        found += first[~np.isnan(first)].tolist()
    if not found and known:
        return "not reached" + ("" if known == len(arm.runs) else f" by {known} of {len(arm.runs)} seeds")
    if not found:
        return "not known"
    span = f"{min(found):,.0f}" + (f" … {max(found):,.0f}" if max(found) > min(found) else "")
    return span if len(found) == len(arm.runs) else f"{span} ({len(found)} of {len(arm.runs)} seeds)"


# ---- what else the numbers say --------------------------------------------------------------------------------------


def joined(run: Run, *names: str) -> Array:
    """Step and value of several curves, a row for each step that all of them have; none where one is absent."""
    tables = [dict(zip(c.steps, c.values, strict=True)) for name in names if (c := run.curves.get(name)) is not None]
    if len(tables) < len(names):
        return np.empty((0, len(names) + 1))
    shared = sorted(set(tables[0]).intersection(*tables[1:]))
    return np.array([[step, *(table[step] for table in tables)] for step in shared]).reshape(-1, len(names) + 1)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and t interval of one number for each seed."""
    return crossed_interval(np.array([values], float).T)


def last(run: Run, name: str, points: int = 1) -> float:
    """Mean of the last points of a curve that are finite; NaN where none is, or the log ends before the run did."""
    curve = run.curves.get(name)
    values = np.empty(0) if curve is None or not run.ended else curve.values[-points:]
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def end(run: Run) -> tuple[float, float]:
    """KL and reward of a run's last validation; NaN where they are not known."""
    return last(run, "val/kl"), last(run, "val/reward")


def first(run: Run, name: str) -> float:
    """The first point of a curve, where there are more; NaN where there are not."""
    curve = run.curves.get(name)
    return float(curve.values[0]) if curve is not None and len(curve.values) > 1 else math.nan


def gaps(arm: Arm) -> tuple[Estimate, Estimate]:
    """How much better the reward was in training (its last ten logged batches) and on validation than on the test."""
    test = [(run, run.test.get("reward", math.nan)) for run in arm.tested]
    return (
        over_seeds([last(run, "train/reward", 10) - reward for run, reward in test]),
        over_seeds([last(run, "val/reward") - reward for run, reward in test]),
    )


class Steadiness(NamedTuple):
    """How steady a method was; NaN where nothing is known."""

    within: float
    """Standard deviation of the training reward over the last fifth of a run's logged steps, mean over seeds."""
    between: float
    """Standard deviation of the last validation reward over seeds."""
    highest_kl: float
    """Highest KL that was logged in training, nats per sequence, of all seeds."""
    skipped: float
    """Optimizer steps that were left out, of all seeds."""


def steadiness(arm: Arm) -> Steadiness:
    """How much rewards scatter in the end and from seed to seed, how far the policy went, and what was left out."""
    rewards = [c.values for run in arm.runs if run.ended and (c := clean(run, "train/reward"))]
    ends = [x[-max(2, len(x) // 5) :].std(ddof=1) for x in rewards if len(x) > 1]
    finals = np.array([x for run in arm.runs if math.isfinite(x := last(run, "val/reward"))])
    kls = [c.values.max() for run in arm.runs if run.ended and (c := clean(run, "train/kl"))]
    skipped = [x for run in arm.runs if math.isfinite(x := last(run, "train/skipped_steps"))]
    return Steadiness(
        float(np.mean(ends)) if ends else math.nan,
        float(finals.std(ddof=1)) if len(finals) > 1 else math.nan,
        float(max(kls, default=math.nan)),
        float(sum(skipped)) if skipped else math.nan,
    )


class Drift(NamedTuple):
    """How the training reward and a judge moved on validation, from the first to the last."""

    arm: Arm
    judge: str
    reward: float
    change: float
    hacked: int
    """Seeds in which the reward rose and the judge fell."""
    seeds: int

    @property
    def flagged(self) -> bool:
        """The mean reward rose and the judge's mean fell."""
        return self.reward > 0 > self.change


def drifts(arms: Sequence[Arm]) -> Iterator[Drift]:
    """Every judge of every method, where validation has both."""
    for arm in arms:
        for judge in judges([arm]):
            moved = []
            for run in arm.runs:
                ways = [last(run, f"val/{name}") - first(run, f"val/{name}") for name in ("reward", judge)]
                if judge in judges_of(run) and np.isfinite(ways).all():
                    moved.append(ways)
            if moved:
                reward, change = np.array(moved).T
                hacked = int(((reward > 0) & (change < 0)).sum())
                yield Drift(arm, judge, float(reward.mean()), float(change.mean()), hacked, len(moved))


def noise_kind(arms: Sequence[Arm]) -> str | None:
    """Whose figures of the gradient's noise are shown: the probe's, if a run has any."""
    names = {name for arm in arms for run in arm.runs for name in run.curves}
    return next((kind for kind in ("probe", "grad") if f"{kind}/relative_std" in names), None)


def absent(arms: Sequence[Arm], planned: Collection[str] = ()) -> list[str]:
    """What is missing for a comparison although each run is sound; seeds only of methods that are not `planned`."""
    seeds = set().union(*(arm.seeds for arm in arms))
    logged = {name for arm in arms for run in arm.runs for name in run.curves}
    return [
        f"{arm.label}: {line}."
        for arm in arms
        for line in _absent(arm, set() if arm.method in planned else seeds, logged)
    ]


def _absent(arm: Arm, seeds: set[int], logged: set[str]) -> Iterator[str]:
    if lost := sorted(seeds - set(arm.seeds)):
        yield f"no finished run with seed {', '.join(map(str, lost))}, which others have"
    if not arm.tested:
        yield "no finished run was tested; it is not among the test results"
    elif len(arm.tested) < len(arm.runs):
        yield f"{len(arm.tested)} of {len(arm.runs)} finished runs count in the test results"
    if len(arm.tested) > 1 and not _same_prompts(arm.tested):
        yield "its runs' test prompts differ or are not known: its interval covers seeds alone"
    for name in ("reward", "kl", *judges([arm]), *PLAIN):
        found, tested = measure(arm, name), len(arm.tested)
        if 0 < found.seeds < tested:
            yield f"{name} was measured on the test in {found.seeds} of {tested} runs; it is of those"
        elif found.left_out and name not in PLAIN:
            yield f"{found.left_out} values of {name} on the test are null or not finite; left out"
    if beyond := [str(run.seed) for run in arm.runs if not all(map(math.isfinite, end(run)))]:
        yield f"where it ended in reward and KL on validation is not known of seed {', '.join(beyond)}"
    curves = [curve for run in arm.runs if (curve := clean(run, "val/reward"))]
    if len(curves) < len(arm.runs):
        yield f"{len(curves)} of {len(arm.runs)} runs have a validation curve; the mean is of those"
    if len({tuple(curve.steps) for curve in curves}) > 1:
        yield "its runs were validated at different steps; curves show those they share"
    for axis in [axis for axis in AXES if axis in logged]:
        if (known := sum(axis in run.curves for run in arm.runs)) < len(arm.runs):
            yield f"{known} of {len(arm.runs)} runs logged their {AXES[axis]}; the curve against them is of those"
        places = [position(run, c, axis) for run in arm.runs if (c := clean(run, "val/reward"))]
        if any(x is not None and np.isnan(x).any() for x in places):
            yield f"{AXES[axis]} were not logged up to the last validation; it is not drawn against them"


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


def verdict(arms: Sequence[Arm], pairs: Sequence[Difference], lost: Sequence[str] = ()) -> str:
    """What the numbers bear, in a few sentences.

    Args:
        arms: the methods that are compared.
        pairs: the differences of their test rewards.
        lost: further methods that were to be compared.
    """
    ranked = sorted(((measure(arm, "reward"), arm) for arm in arms if arm.tested), key=lambda p: -p[0].mean)
    if not ranked:
        return "No finished run was tested: nothing can be said about the test reward."
    (best, top), rivals = ranked[0], [arm for _, arm in ranked[1:]]
    untested = [arm.label for arm in arms if not arm.tested]
    untested += [method for method in lost if all(arm.method != method for arm in arms)]
    silent = f" Of {', '.join(untested)} there is no test result." if untested else ""
    kl = measure(top, "kl").mean
    at = "" if math.isnan(kl) else f" at a KL of {number(kl)} nats"
    out = f", {best.left_out} values left out" if best.left_out else ""
    figures = f"{interval(best)}{at} ({best.seeds} seed{'s' if best.seeds > 1 else ''}{out})"
    if not rivals:
        text = f"{top.label} has a test reward of {figures}"
        return f"{text}.{silent}" if silent else f"{text}; there is nothing to compare it with."
    own = [pair for pair in pairs if top in (pair.first, pair.second) and pair.first.tested and pair.second.tested]
    text = f"{top.label} has the highest mean test reward, {figures}. "
    if not any(pair.test for pair in own):
        why = "; ".join(sorted({pair.why_not for pair in own}))
        return f"{text}Whether that is more than chance cannot be said ({why}).{silent}"
    above, below, neither = "significantly above", "significantly below", "not significantly above"
    said: dict[str, list[str]] = {above: [], neither: [], below: [], "not tested against": []}
    for pair in own:
        rival = pair.second if pair.first is top else pair.first
        ahead = pair.estimate is not None and (pair.estimate.mean > 0) == (pair.first is top)
        how = neither if not pair.significant else above if ahead else below
        said["not tested against" if pair.test is None else how].append(rival.label)
    parts = [f"{how} {', '.join(labels)}" for how, labels in said.items() if labels]
    where = "On the seeds and prompts that both have, it" if said[below] else "It"
    how = "paired by prompt, seeds as the unit, Holm-corrected, level 0.05"
    return f"{text}{where} is {' and '.join(parts)} ({how}).{silent}"
