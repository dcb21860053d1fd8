"""`grade-report`: one page, figures and tables from finished runs."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from grade_lightning.errors import InputError

MARK = '<meta name="generator" content="grade-report">'


def main(args: Sequence[str] | None = None) -> None:
    """The command; errors of input are one line and status 2."""
    parser = argparse.ArgumentParser("grade-report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER",
                        help="A comparison's folder, or that of a run such as runs/GradeSTE/version_3.")  # fmt: skip
    parser.add_argument("--out", type=Path, help="Where to write; default: FOLDER/report of the first.")
    parser.add_argument(
        "--beta", type=float, help="Show the objective, reward − BETA KL, too; default: that of the comparison."
    )
    parser.add_argument("--reach", type=float, nargs="+", metavar="REWARD",
                        help="Validation rewards whose steps and tokens are shown; default: four.")  # fmt: skip
    given = parser.parse_args(args)
    try:
        print(f"written: {report(given.folders, given.out, given.beta, given.reach)}")
    except (InputError, OSError) as error:
        print(f"grade-report: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def report(
    folders: Sequence[Path], out: Path | None = None, beta: float | None = None, reach: list[float] | None = None
) -> Path:
    """Read the runs and write the report.

    Args:
        folders: comparisons' folders, or single runs'.
        out: folder to write into; default: `report` in the first.
        beta: coefficient of the KL in the objective; default: that of the comparison's plan.
        reach: validation rewards; the page says when each was reached.

    Returns:
        The page.

    Raises:
        InputError: a folder is neither, something else is where the report would be, or the extra is not installed.
    """
    if any(find_spec(name) is None for name in ("jinja2", "matplotlib", "scipy")):
        raise InputError("a report needs more libraries; pip install 'grade-lightning[report]'")
    from . import bands, figures, page
    from .arms import arms as arms_of
    from .reading import read

    out = out or folders[0] / "report"
    _check_free(out)
    study = read(folders)
    if beta is None and len(study.betas) > 1:
        several = ", ".join(f"{one:g}" for one in sorted(study.betas))
        study.missing.append(f"The objective is not shown: the comparisons have different β ({several}); give --beta.")
    elif beta is None:
        beta = next((one for one in study.betas if one > 0), None)
    arms = arms_of(study)
    levels = reach or bands.levels(arms)
    drawn = figures.draw(study, arms, page.measures(arms, beta), beta)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        new = Path(name)
        html = page.render(study, arms, {name: figures.svg(figure) for name, figure in drawn.items()}, beta, levels)
        texts = {
            "report.html": html,
            "results.csv": page.as_csv(arms, beta),
            "results.tex": page.as_latex(page.results(arms, beta), "Test results: mean ± half a 95 % interval."),
        }
        for file, text in texts.items():
            (new / file).write_text(text, encoding="utf-8", errors="backslashreplace")
        for name, figure in drawn.items():
            for kind in ("png", "pdf"):
                figures.save(figure, new / f"{name}.{kind}")
        out.mkdir(exist_ok=True)
        for file in (f"{name}.{kind}" for name in figures.NAMES for kind in ("png", "pdf")):
            (out / file).unlink(missing_ok=True)
        for path in sorted(new.iterdir(), key=lambda path: path.name != "report.html"):  # that says whose folder it is
            os.replace(path, out / path.name)
    return out / "report.html"


def _check_free(out: Path) -> None:
    """Replace a report of ours, and nothing else."""
    if out.is_dir() and not any(out.iterdir()):
        return
    page = out / "report.html"
    if out.exists() and not (page.is_file() and MARK in page.read_text(errors="replace")):
        raise InputError(
            f"{out}: exists and is not a report of grade-report; name another folder with --out, or remove it"
        )
