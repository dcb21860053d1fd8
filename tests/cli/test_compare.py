"""A comparison: what is equal, what is chosen, and what is left after an interruption."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from grade_lightning.errors import InputError
from tests.cli.conftest import QUIET, SIZES, Shelf, new_shell, scalar

module = import_module("grade_lightning_cli.compare")  # its name once it is installed
Comparison, compare, plan, work = module.Comparison, module.compare, module.plan, module.work

GRID = {"model.optimizer.lr": [0.001, 0.1]}


def finish(comparison: Any, run: Any, objective: float | None, tested: bool = False) -> None:
    """As if the run had ended."""
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps({"objective": objective, "validation": {"reward": objective}}))
    if tested:
        (run.folder / "test.json").write_text("{}")


def arguments(shelf: Shelf) -> dict[str, Any]:
    """Of tiny runs on the small models."""
    flags = [*shelf.data, *(f for f in QUIET if "max_steps" not in f), *SIZES]
    pairs = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    own = {
        "trainer.log_every_n_steps": 1,
        "model.policy.path": str(shelf.policy),
        "model.sampler.max_new_tokens": 4,
        "data.batch_size": 4,
    }
    return {**pairs, "model.reward": "ClassifierReward", "model.reward.path": str(shelf.reward)} | own


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_lists_with_commas() -> None:
    found = plan("GradeSTE,RLOO", seeds="3,1")
    assert found.methods == {"GradeSTE": {}, "RLOO": {}}
    assert found.seeds == [3, 1]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"methods": "RLOO,RLOO"}, "methods: must hold something, and nothing twice"),
        ({"methods": []}, "methods: must hold something"),
        ({"methods": "../RLOO"}, "cannot be the name of a folder"),
        ({"methods": "RLOO", "seeds": "1,x"}, "seeds = 1,x: give whole numbers"),
        ({"methods": "RLOO", "grid": {"model.tau": []}}, "model.tau: must hold something"),
        ({"methods": "RLOO", "completions": 0}, "completions = 0"),
    ],
)
def test_a_wrong_plan(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan(**wrong)


def test_the_grid_is_all_with_all() -> None:
    found = plan("RLOO", grid=GRID | {"model.sampler.temperature": [1.0, 0.7]})
    assert list(found.settings()) == [f"lr={lr},temperature={t}" for lr in (0.001, 0.1) for t in (1.0, 0.7)]
    assert plan("RLOO").settings() == {"default": {}}
    assert list(plan("RLOO", grid={"model.policy.path": ["a/b"]}).settings()) == ["path=a_b"]


def test_what_a_run_is_given(tmp_path: Path) -> None:
    """What is its own comes after what all share, and the grid's point after that."""
    methods = {"wide": {"model": "GradeSTE", "model.hops": 4, "data.batch_size": 8}}
    shared = {"config": ["a.yaml", "b.yaml"], "data.batch_size": 16, "model.beta": 0.0}
    comparison = Comparison(tmp_path / "out", plan(methods, shared, GRID, seeds=[5]))
    run = comparison.runs()[1]
    assert run.name == "wide/lr=0.1/seed_5"
    assert comparison.run(run.name) == run
    assert comparison.arguments(run)[2:] == [
        "--model=GradeSTE",
        *("--config=a.yaml", "--config=b.yaml", "--data.batch_size=8", "--model.beta=0.0", "--model.hops=4"),
        *("--model.optimizer.lr=0.1", "--seed_everything=5", f"--trainer.default_root_dir={run.folder}"),
    ]


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_the_best_on_validation_is_chosen_when_all_are_there(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path / "out", plan("A,B", grid=GRID, seeds=[1, 2]))
    first, second, *of_b = comparison.runs()
    assert [run.name for run in of_b] == ["B/lr=0.001/seed_1", "B/lr=0.1/seed_1"]
    finish(comparison, first, 0.4)
    assert comparison.chosen("A") is None
    assert comparison.finished(first)
    finish(comparison, second, 0.6)
    assert comparison.chosen("A") == "lr=0.1"
    assert [run.name for run in comparison.runs() if not comparison.finished(run)] == [
        "A/lr=0.1/seed_1",  # its test
        *(run.name for run in of_b),
        "A/lr=0.1/seed_2",
    ]
    assert not comparison.complete()


def test_what_did_not_end_in_a_number_is_not_chosen(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path / "out", plan("A", grid=GRID, seeds=[1]))
    for run, objective in zip(comparison.runs(), (None, -3.0), strict=True):
        finish(comparison, run, objective, tested=True)
    assert comparison.chosen("A") == "lr=0.1"
    assert comparison.complete()
    comparison.note_choices()
    chosen = json.loads((tmp_path / "out/chosen.json").read_text())
    assert chosen == {"A": {"setting": "lr=0.1", "objectives": {"lr=0.001": None, "lr=0.1": -3.0}}}


# ---- going on -------------------------------------------------------------------------------------------------------


def test_methods_and_seeds_may_be_added(tmp_path: Path) -> None:
    Comparison(tmp_path / "out", plan("A", seeds=[1]))
    comparison = Comparison(tmp_path / "out", plan("A,B", seeds=[1, 2]))
    assert len(comparison.runs()) == 4
    assert Comparison(tmp_path / "out", None).runs() == comparison.runs()


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"arguments": {"data.batch_size": 4}}, "arguments"),
        ({"completions": 8}, "completions"),
        ({"methods": {"A": {"model.hops": 1}}}, "methods.A"),
        ({"grid": GRID}, "grid"),
    ],
)
def test_what_is_equal_for_all_may_not_change(other: dict[str, Any], what: str, tmp_path: Path) -> None:
    Comparison(tmp_path / "out", plan("A"))
    before = (tmp_path / "out/plan.yaml").read_text()
    with pytest.raises(InputError, match=f"made with other {what}; give --out another name"):
        Comparison(tmp_path / "out", plan(**{"methods": "A"} | other))
    assert (tmp_path / "out/plan.yaml").read_text() == before


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="exists and holds no comparison"):
        Comparison(tmp_path, plan("A"))
    with pytest.raises(InputError, match="holds no comparison; say what to compare"):
        Comparison(tmp_path, None)


def test_one_process_at_a_run(tmp_path: Path) -> None:
    (run,) = Comparison(tmp_path / "out", plan("A", seeds=[1])).runs()
    with run.claimed() as one:
        command = [sys.executable, "-m", "grade_lightning_cli.compare", f"--out={run.out}", f"--run={run.name}"]
        other = subprocess.run(command, capture_output=True, text=True)
    assert one
    assert (other.returncode, other.stderr.strip()) == (75, f"grade-compare: another process is at {run.name}")
    with run.claimed() as again:
        assert again


# ---- real runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two methods, of which one goes four times through its completions."""
    what = plan({"RLOO": {}, "slow": {"model": "PPO"}}, arguments(shelf), seeds=[1], completions=32, validations=2)
    root = tmp_path_factory.mktemp("compare")
    comparison = Comparison(root / "out", what)
    with new_shell(root, tmp_path_factory.getbasetemp() / "datasets"):
        for run in comparison.runs():
            work(comparison, run)
    return comparison


def test_all_sample_the_same_number(ran: Any) -> None:
    one, two = (run.folder for run in ran.runs())
    for folder, model, steps in ((one, "RLOO", 8), (two, "PPO", 32)):
        assert scalar(folder / model / "version_0", "train/reward_calls")[-1] == 32
        assert json.loads((folder / "run.json").read_text())["spent"]["reward_calls"] == 32
        assert f"--trainer.max_steps={steps}" in json.loads((folder / "run.json").read_text())["arguments"]
        assert len(scalar(folder / model / "version_0", "val/reward")) == 3


def test_the_rows_of_the_test_are_the_test(ran: Any) -> None:
    prompts = []
    for run in ran.runs():
        rows = [json.loads(line) for line in (run.folder / "test.jsonl").read_text().splitlines()]
        figures = json.loads((run.folder / "test.json").read_text())
        for name in ("reward", "kl"):
            assert statistics.mean(row[name] for row in rows) == pytest.approx(figures[name], rel=1e-4)
        assert statistics.mean(row["length"] for row in rows) == pytest.approx(figures["response_length"])
        prompts.append([row["prompt"] for row in rows])
    assert prompts[0] == prompts[1]


def test_a_finished_run_is_not_repeated(ran: Any) -> None:
    before = {path: path.stat().st_mtime_ns for run in ran.runs() for path in run.folder.rglob("*") if path.is_file()}
    for run in ran.runs():
        work(ran, run)
    assert before == {p: p.stat().st_mtime_ns for run in ran.runs() for p in run.folder.rglob("*") if p.is_file()}
    assert ran.complete()


def test_a_number_that_cannot_be_sampled(shelf: Shelf, tmp_path: Path) -> None:
    comparison = Comparison(tmp_path / "out", plan("RLOO", arguments(shelf), seeds=[1], completions=30))
    with pytest.raises(InputError, match="completions = 30: RLOO samples 4 at once; give a multiple"):
        work(comparison, comparison.runs()[0])


def test_a_list_of_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(["--out", str(tmp_path / "out"), "--methods", "GradeSTE,RLOO", "--seeds", "1,2", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"grade-compare --out {tmp_path / 'out'} --run GradeSTE/default/seed_1"
    assert len(lines) == 4


def test_what_stands_behind_the_line_is_for_all(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    compare(["--out", out, "--methods=RLOO", "--arguments.model.beta=1", "--list", "--", "--data.seed", "3", "--a=b=c"])
    assert yaml.safe_load((tmp_path / "out/plan.yaml").read_text())["arguments"] == {
        "model.beta": 1,
        "data.seed": "3",
        "a": "b=c",
    }
    for wrong in (["--data.seed"], ["3", "--data.seed"]):
        with pytest.raises(SystemExit):
            compare(["--out", out, "--methods=RLOO", "--list", "--", *wrong])


@pytest.mark.slow
def test_killed_and_started_again(shelf: Shelf, tmp_path: Path) -> None:
    """By SIGTERM, SIGKILL and a failing method: what was finished is not repeated, the rest is done."""
    what = {
        "methods": {"RLOO": None, "GradeSTE": None, "broken": {"model": "RLOO", "model.num_generations": 3}},
        "arguments": arguments(shelf),
        "seeds": [1, 2],
        "completions": 32,
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(what))
    command = [sys.executable, "-m", "grade_lightning_cli.compare", "--config", "plan.yaml", "--out", "out"]
    first = tmp_path / "out/runs/RLOO/default/seed_1/test.json"

    def start(until: Path | None) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while until is not None and not until.is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        return process

    process = start(until=first)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    stamp = first.stat().st_mtime_ns
    process = start(until=None)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "2 runs failed (broken/default/seed_1, broken/default/seed_2)" in err
    assert "no multiple of model.num_generations" in out
    assert first.stat().st_mtime_ns == stamp
    assert len(list(tmp_path.glob("out/runs/*/default/*/test.json"))) == 4
    assert not any(p.name.endswith(".part") for p in tmp_path.rglob("*"))
    assert os.path.exists(tmp_path / "out/chosen.json")
