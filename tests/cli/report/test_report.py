"""The page and the files beside it, as a reader gets them."""

import csv
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import load
from tests.cli.report.conftest import PROMPTS, Make, place, row, write_study, write_test

main = import_module("grade_lightning_cli.report.main")
page = import_module("grade_lightning_cli.report.page")
figures = import_module("grade_lightning_cli.report.figures")
reading = import_module("grade_lightning_cli.report.reading")
arms_of = import_module("grade_lightning_cli.report.arms").arms
NASTY = "</p><script>alert('x')</script> <img src=https://evil.example/a.png> {{ 7 * 7 }} & \u202e \ud800"
ODD = "RLOO_#1$^$"  # no formula, either
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Every tag is closed; what is loaded, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loaded: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open += [] if tag in VOID else [tag]
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "style")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with untrusted completions, and its report."""
    folder = write_study(tmp_path_factory.mktemp("study") / "50%_&_more", ("GradeSTE", ODD), 3)
    for path in folder.glob("runs/*/*/*/test.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        prompts = ["<b>prompt</b>", *PROMPTS[1:]]
        write_test(path.parent, [row(p, line["reward"], NASTY) for p, line in zip(prompts, rows, strict=True)])
    command: Any = load("report")
    command([str(folder), "--beta", "0.01"])
    return folder


def test_the_page_is_sound_and_loads_nothing(study: Path) -> None:
    text = (study / "report" / "report.html").read_text()
    seen = Page(text)
    assert len(seen.loaded) == len(figures.NAMES)
    assert all(value.startswith("data:image/svg+xml;base64,") for value in seen.loaded)
    assert not {"script", "link", "iframe", "object"} & seen.tags
    assert not re.search(r"@import|url\(", text)
    assert '<meta name="viewport" content="width=device-width' in text
    assert "@media print" in text
    assert "prefers-color-scheme: dark" in text


def test_completions_are_text(study: Path) -> None:
    text = (study / "report" / "report.html").read_text()
    assert "<script" not in text
    assert "<img src=https" not in text
    assert "&lt;script&gt;alert(" in text
    seen = Page(text).text
    assert NASTY[:60] in seen
    assert "{{ 7 * 7 }}" in seen
    assert "<b>prompt</b>" in seen


def test_every_part_is_there(study: Path) -> None:
    seen = Page((study / "report" / "report.html").read_text()).text
    for heading in ("Test results", "Training reward and judges", "Reward against KL", "Learning curves", "Training",
                    "Noise of the gradient", "Generalisation gap", "Differences", "Settings",
                    "Completions side by side", "What is missing", "How it was made"):  # fmt: skip
        assert heading in seen
    assert "Reward hacking?" in seen
    assert "reward − 0.01 KL" in seen
    assert "Nothing that this report looks for." in seen
    assert "7 runs; seeds 1, 2, 3; commit abc123; hardware 2 cores; threads 1; grade_lightning 0.1.0" in seen
    assert "grade-fit --model GradeSTE" in seen


def test_the_csv_reads_back(study: Path) -> None:
    with (study / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    of = {(line["method"], line["seed"], line["measure"]): line for line in rows}
    test = json.loads((place(study, ODD, 2) / "test.json").read_text())
    assert float(of[ODD, "2", "reward"]["mean"]) == pytest.approx(test["reward"])
    whole = of[ODD, "all", "reward"]
    assert (whole["seeds"], whole["covers"]) == ("3", "seeds and prompts")
    objective = float(of[ODD, "all", "objective"]["mean"])
    assert objective == pytest.approx(float(whole["mean"]) - 0.05)


def test_every_panel_says_what_it_shows(study: Path) -> None:
    found = reading.read([study])
    arms = arms_of(found)
    drawn = figures.draw(found, arms, page.measures(arms, 0.01), 0.01)
    labels = {name: [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes] for name, figure in drawn.items()}
    assert list(labels) == list(figures.NAMES)
    names = ["reward", "objective", "KL, nats", "judge truth"]
    assert labels.pop("test") == [(f"test {name}", "") for name in names]
    assert [label.get_text() for label in drawn["test"].axes[0].get_yticklabels()] == ["GradeSTE", figures._plain(ODD)]
    assert [y for _, y in labels["training"]] == [
        "training reward", "KL, nats per sequence", "gradient norm", "training − validation reward"
    ]  # fmt: skip
    assert all(x and y for panels in labels.values() for x, y in panels)


def test_latex_is_escaped(study: Path) -> None:
    text = (study / "report" / "results.tex").read_text()
    assert r"RLOO\_\#1\$\textasciicircum{}\$ &" in text
    assert r"$\pm$" in text
    body = re.sub(r"^%.*", "", text)
    assert not re.search(r"(?<!\\)[#%_]", body)
    counts = {line.count(" & ") for line in text.splitlines() if line.endswith(r" \\")}
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns
    assert counts == {len(columns[1]) - 1}


def test_latex_of_odd_names() -> None:
    odd = page.Table(["a"], [["&%$#_{}~^\\ τ 你 – ± <"], ["[1] *"]])
    text = page.as_latex(odd, "50 % of _x_")
    cell = r"\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}\textbackslash{} $\tau$ ? -- $\pm$ $<$ \\"
    assert {cell, r"{[}1] {*} \\"} <= set(text.splitlines())  # a bracket after a line's end would be its argument
    assert r"\caption{50 \% of \_x\_}" in text


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.slow
def test_again_gives_the_same_bytes_and_leaves_other_files(study: Path) -> None:
    before = digests(study / "report")
    assert sorted(before) == sorted(
        ["report.html", "results.csv", "results.tex"]
        + [f"{name}.{kind}" for name in figures.NAMES for kind in ("png", "pdf")]
    )
    (study / "report" / "notes.txt").write_text("mine")
    main.report([study])  # β is in the plan
    after = digests(study / "report")
    assert after.pop("notes.txt")
    assert after == before
    assert [path.name for path in study.iterdir() if path.name.startswith("tmp")] == []


@pytest.mark.parametrize("kind", ["file", "folder", "page"])
def test_something_else_is_not_replaced(make: Make, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(("GradeSTE",), seeds=1)
    out = folder / "mine"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / ("report.html" if kind == "page" else "thesis.tex")).write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main.main([str(folder), "--out", str(out)])
    assert stopped.value.code == 2
    assert f"grade-report: error: {out}: exists and is not a report of grade-report" in capsys.readouterr().err
    assert [path.read_text() for path in ([out] if kind == "file" else out.iterdir())] == ["mine"]


def test_a_comparison_of_which_nothing_is_finished(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("methods: <b>\n")
    seen = Page(main.report([tmp_path]).read_text())
    assert "No finished run was tested: nothing can be said" in seen.text
    assert "no finished run in it" in seen.text
    assert "methods: <b>" in seen.text


@pytest.mark.slow
def test_one_seed_is_said_plainly(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "deep"
    text = Page(main.report([make(seeds=1)], out, reach=[0.5, 2.0]).read_text()).text
    assert "one seed: no test is possible" in text
    assert re.search(r"reward 2\s*GradeSTE49not reached", text)
    assert "significant" not in re.sub(r"Significant:|not significant", "", text)
    assert (out / "learning.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_what_was_interrupted_and_what_differs_is_on_the_page(make: Make) -> None:
    folder = make(seeds=2)
    path = place(folder) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_step": 50}))
    for method, size in (("GradeSTE", 4), ("RLOO", 8)):
        (place(folder, method) / method / "version_0" / "config.yaml").write_text(f"data: {{batch_size: {size}}}")
    text = Page(main.report([folder]).read_text()).text
    assert "1 of them interrupted and resumed" in text
    assert "Not the same task: the methods differ in data.batch_size (4, 8)." in text


@pytest.mark.slow
def test_an_objective_of_several_betas_is_not_shown(make: Make, tmp_path: Path) -> None:
    folder = make(("GradeSTE",), seeds=1)
    other = write_study(tmp_path / "other", ("RLOO",), 1)
    (other / "plan.yaml").write_text((other / "plan.yaml").read_text().replace("0.01", "0.2"))
    text = Page(main.report([folder, other]).read_text()).text
    assert "The objective is not shown: the comparisons have different β (0.01, 0.2); give --beta." in text
    assert "The objective is reward" not in text
    assert "The objective is reward − 0.2 KL" in Page(main.report([folder, other], beta=0.2).read_text()).text


def test_without_the_extra(make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(main, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main.main([str(make(("GradeSTE",), seeds=1))])
    assert stopped.value.code == 2
    said = "grade-report: error: a report needs more libraries; pip install 'grade-lightning[report]'\n"
    assert capsys.readouterr().err == said
