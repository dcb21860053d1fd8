"""The page and the tables beside it."""

import base64
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from . import bands, consistency, curves, diagnostics, differences, estimates
from .absent import absent
from .arms import Arm, judges, trained_on
from .arms import arms as arms_of
from .curves import AXES
from .diagnostics import Drift
from .differences import Difference
from .estimates import PLAIN
from .runs import Study
from .statistics import Estimate
from .verdict import verdict
from .wording import number, probability, shown

TITLES = {
    "reward": "reward",
    "objective": "objective",
    "kl": "KL, nats",
    "perplexity": "perplexity",
    "distinct_2": "distinct-2",
    "response_length": "tokens",
    "eos_rate": "ended",
    "entropy": "entropy, nats",
}
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    | {"±": r"$\pm$", "−": "$-$", "–": "--", "\xa0": "~", "…": r"\dots{}", "τ": r"$\tau$", "β": r"$\beta$", "|": "$|$"}
    | {c: f"{{{c}}}" for c in "[*"}  # which would be read as arguments of the line before
)


class Table(NamedTuple):
    """Cells of text; the columns in `text` are no numbers."""

    header: list[str]
    rows: list[list[str]]
    caption: str = ""
    text: tuple[int, ...] = (0,)


def measures(arms: Sequence[Arm], beta: float | None) -> dict[str, str]:
    """What has an interval in the test results, with its title."""
    return {name: _title(name) for name in _names(arms, beta) if name not in PLAIN}


def _names(arms: Sequence[Arm], beta: float | None) -> list[str]:
    return ["reward", *(["objective"] if beta is not None else []), "kl", *judges(arms), *PLAIN]


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("rewards/", "judge "))


def results(arms: Sequence[Arm], beta: float | None) -> Table:
    """The test results, a row for each method that has any."""
    names, rows = _names(arms, beta), []
    for arm in [arm for arm in arms if arm.tested]:
        found = {name: estimates.measure(arm, name, beta) for name in names}
        whole = found["reward"]
        cells = [
            "trained on" if trained_on(arm, name) else number(e.mean) if name in PLAIN else shown(e)
            for name, e in found.items()
        ]
        cells = [cell + _less(e, whole, name in PLAIN) for cell, (name, e) in zip(cells, found.items(), strict=True)]
        rows.append([arm.label, str(whole.seeds), *cells[: -len(PLAIN)], whole.covers or "–", *cells[-len(PLAIN) :]])
    place = 2 + len(names) - len(PLAIN)
    header = ["method", "seeds", *map(_title, names)]
    return Table([*header[:place], "covers", *header[place:]], rows, text=(0, place))


def _less(e: Estimate, whole: Estimate, plain: bool) -> str:
    """What a figure stands for, where that is less than the reward does."""
    if math.isnan(e.mean) or (e.seeds == whole.seeds and (plain or e.covers == whole.covers)):
        return ""
    seeds = f"{e.seeds} seed{'s' if e.seeds > 1 else ''}"
    return f" [{seeds}]" if plain else f" [{seeds}; {e.covers or 'no interval'}]"


def as_csv(arms: Sequence[Arm], beta: float | None) -> str:
    """Every figure of the test, over all seeds and of each, in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "setting", "seed", "measure", *Estimate._fields])
    for arm in arms:
        for seed, part in [("all", arm), *((str(run.seed), replace(arm, runs=[run])) for run in arm.tested)]:
            for name in [name for name in _names(arms, beta) if not trained_on(arm, name)]:
                writer.writerow([arm.method, arm.setting, seed, name, *estimates.measure(part, name, beta)])
    return buffer.getvalue()


def as_latex(table: Table, caption: str) -> str:
    """A table in the manner of booktabs, to be input; other characters than ASCII become question marks."""

    def escaped(text: str) -> str:
        return text.translate(_LATEX).encode("ascii", "replace").decode()

    lines = [" & ".join(map(escaped, row)) + r" \\" for row in (table.header, *table.rows)]
    columns = "".join("l" if i in table.text else "r" for i in range(len(table.header)))
    head = ["% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{escaped(caption)}}}"]
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*head, *body, r"\end{tabular}", r"\end{table}", ""])


def render(
    study: Study, arms: Sequence[Arm], figures: dict[str, bytes], beta: float | None, levels: list[float]
) -> str:
    """The whole page, with everything in it.

    Args:
        study: all runs.
        arms: the methods that are compared.
        figures: SVG, by name.
        beta: coefficient of the KL in the objective; None: the objective is left out.
        levels: rewards; the page says when each was reached.
    """
    pairs = {name: differences.differences(arms, name, beta) for name in measures(arms, beta) if name != "kl"}
    drifts = list(diagnostics.drifts(arms))
    missing = [*study.missing, *absent(arms, study.planned)]
    missing += sorted({f"{d.first.label} and {d.second.label}: {d.why_not}." for d in pairs["reward"] if d.why_not})
    warnings = [f"Mixed versions: the runs differ in {line}." for line in consistency.mixed(study)]
    if tasks := consistency.tasks(arms):
        warnings.append(f"Not the same task: the methods differ in {'; '.join(tasks)}.")
    warnings += [
        f"Reward hacking? {d.arm.label}: on validation the training reward rose by {number(d.reward)} while "
        f"{_title(d.judge)} fell by {number(-d.change)} ({d.hacked} of {d.seeds} seeds)."
        for d in drifts
        if d.flagged
    ]
    warnings += [f"Something is missing ({len(missing)}): see the section near the end."] if missing else []
    labels = ", ".join(arm.label for arm in arms) or "no run"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).render(
        title=f"Comparison of {labels if len(arms) < 7 else len(arms)}" if len(arms) > 1 else f"Report on {labels}",
        verdict=verdict(arms, pairs["reward"], study.lost),
        warnings=warnings,
        beta=beta,
        results=results(arms, beta),
        judges=_drifts(drifts),
        steady=_steady(arms),
        figures={name: base64.b64encode(data).decode() for name, data in figures.items()},
        reached=[
            _reached(arms, levels, axis)
            for axis in ("steps", "train/sampled_tokens")
            if levels and any(bands.band(arm, "val/reward", axis) for arm in arms)
        ],
        noise=_noise(arms),
        gaps=_gaps(arms),
        differences=[_differences(name, found) for name, found in pairs.items() if any(d.estimate for d in found)],
        settings=_settings(study),
        samples=_samples(arms),
        missing=missing,
        made=_made(study),
        commands="\n".join(str(run.about["command"]) for run in study.runs if "command" in run.about) or "not recorded",
        study=study,
    )


def _reached(arms: Sequence[Arm], levels: list[float], axis: str) -> Table:
    header = ["method", *(f"reward {level:.10g}" for level in levels)]
    rows = [[arm.label, *(bands.reached(arm, level, axis) for level in levels)] for arm in arms]
    return Table(header, rows, f"{AXES[axis]} until the validation reward was reached")


def _noise(arms: Sequence[Arm]) -> Table:
    kind = diagnostics.noise_kind(arms)
    rows = []
    for arm in arms:
        values = [curves.joined(run, f"{kind}/snr")[:, 1] for run in arm.runs]
        known = np.concatenate(values) if values else np.empty(0)
        rows.append([arm.label, str(len(known)), str(int(np.isfinite(known).sum()))])
    return Table(["method", "measurements", "of these resolved"], rows, f"logged as {kind}/…")


def _gaps(arms: Sequence[Arm]) -> Table:
    rows = [[arm.label, *map(shown, diagnostics.gaps(arm))] for arm in arms]
    return Table(["method", "last training − test", "last validation − test"], rows)


def _differences(name: str, found: list[Difference]) -> Table:
    header = ["methods", "seeds", "prompts", "difference", "covers", "p", "sign-flip p", "d_z", ""]
    rows = []
    for d in found:
        e, t = d.estimate, d.test
        size = [str(e.seeds), str(e.prompts), shown(e), e.covers] if e else ["–", "–", "–", "–"]
        tested = [probability(d.p), probability(t.p_flip), number(t.effect)] if t else ["–", "–", "–"]
        remark = "significant" if d.significant else d.why_not
        rows.append([f"{d.first.label} − {d.second.label}", *size, *tested, remark])
    return Table(header, rows, _title(name), text=(0, 4, 8))


def _steady(arms: Sequence[Arm]) -> Table:
    known = [(arm, diagnostics.steadiness(arm)) for arm in arms]
    rows = [[arm.label, *map(number, x[:-1]), "–" if math.isnan(x.skipped) else f"{x.skipped:.0f}"] for arm, x in known]
    header = ["method", "reward’s std, last fifth", "std over seeds", "highest KL, nats", "steps left out"]
    return Table(header, rows)


def _drifts(drifts: list[Drift]) -> Table:
    rows = [
        [d.arm.label, _title(d.judge), number(d.reward), number(d.change), f"{d.hacked} of {d.seeds}",
         "reward rises, judge falls" if d.flagged else ""]
        for d in drifts
    ]  # fmt: skip
    header = ["method", "judge", "training reward", "judge’s change", "seeds in which they part", ""]
    return Table(header, rows, text=(0, 1, 5))


def _settings(study: Study) -> Table:
    rows = []
    for arm in arms_of(study, chosen=False):
        last = [
            estimates.over_seeds([curves.last(run, f"val/{name}") for run in arm.runs]) for name in ("reward", "kl")
        ]
        objective = study.objectives.get((arm.method, arm.setting), math.nan)
        cells = [arm.method, arm.setting, ", ".join(str(run.seed) for run in arm.runs), *(number(e.mean) for e in last)]
        rows.append([*cells, number(objective), "chosen" if any(run.chosen and run.about for run in arm.runs) else ""])
    by = " and ".join(f"{beta:g}" for beta in sorted(study.betas))
    chosen_by = f"objective, β = {by}" if by else "objective"
    header = ["method", "setting", "seeds", "validation reward", "KL, nats", chosen_by, ""]
    return Table(header, rows, text=(0, 1, 6))


def _samples(arms: Sequence[Arm], count: int = 3) -> list[dict[str, Any]]:
    """The first test prompts that all methods have, with the completions of each method's first seed."""
    known = [(arm, arm.tested[0].rows) for arm in arms if arm.tested and arm.tested[0].rows]
    shared = [
        p for p in dict.fromkeys(known[0][1].prompts if known else []) if all(p in rows.prompts for _, rows in known)
    ]
    samples = []
    for prompt in shared[:count]:
        entries = []
        for arm, rows in known:
            i = rows.prompts.index(prompt)
            figures = [f"{name.removeprefix('rewards/')} {number(values[i])}" for name, values in rows.figures.items()]
            label = f"{arm.label}, seed {arm.tested[0].seed}"
            entries.append({"label": label, "figures": ", ".join(figures), "completion": rows.completions[i]})
        samples.append({"prompt": prompt, "entries": entries})
    return samples


def _made(study: Study) -> str:
    """All that is known of how the runs were made."""
    known: dict[str, dict[str, None]] = {"seeds": dict.fromkeys(str(run.seed) for run in study.runs)}
    for run in study.runs:
        for name, value in consistency.facts(run).items():
            known.setdefault(name, {})[value] = None
    made = [f"{name} {', '.join(values)}" for name, values in known.items()]
    again = sum(bool(run.about.get("from_step")) for run in study.runs)
    return "; ".join([*made, *([f"{again} of them interrupted and resumed"] if again else [])])
