"""One run: the same number of completions for all, and what it leaves behind."""

import json
import statistics
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from grade_lightning.errors import InputError
from tests.cli.compare.conftest import Comparison, arguments, plan
from tests.cli.conftest import Shelf, new_shell, scalar

module = import_module("grade_lightning_cli.compare.work")
Workers = import_module("grade_lightning_cli.compare.workers").Workers
state_of = import_module("grade_lightning_cli.compare.progress").state_of
work = module.work


@pytest.mark.parametrize(
    ("metrics", "beta", "objective"),
    [
        ({"reward": 1.0, "kl": 2.0}, 0.25, 0.5),
        ({"reward": 1.0, "kl": float("inf")}, 0.0, 1.0),
        ({"reward": 1.0}, 0.0, 1.0),
        ({"reward": 1.0}, 0.25, None),
        ({"reward": float("inf"), "kl": 2.0}, 0.25, None),
        ({}, 0.0, None),
    ],
)
def test_the_objective(metrics: dict[str, float], beta: float, objective: float | None) -> None:
    assert module._objective(metrics, beta) == objective


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
    assert [json.loads((ran.out / "chosen.json").read_text())[m]["setting"] for m in ran.plan.methods] == [
        "default"
    ] * 2


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


def test_a_run_that_ends_early_is_not_finished(shelf: Shelf, tmp_path: Path) -> None:
    early = arguments(shelf) | {
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
        "trainer.limit_val_batches": 0,
    }
    comparison = Comparison(tmp_path / "out", plan("RLOO", early, seeds=[1]))
    (run,) = comparison.runs()
    with pytest.raises(InputError, match="ended at step 2 of 8; remove what ended it"):
        work(comparison, run)
    assert run.result is None


@pytest.mark.slow
def test_what_diverged_is_not_chosen_and_not_tried_again(shelf: Shelf, tmp_path: Path) -> None:
    grid = {"model.optimizer.lr": [0.001, 1e30]}
    comparison = Comparison(tmp_path / "out", plan("RLOO", arguments(shelf), grid, seeds=[1]))
    good, bad = comparison.runs()
    for run in (good, bad, good):  # its test, once all are there
        work(comparison, run)
    assert (bad.result["objective"], bad.result["validation"]) == (None, {})
    assert "it has diverged" in bad.result["diverged"]
    assert comparison.chosen("RLOO") == good.setting
    assert (good.tested, comparison.complete()) == (True, True)
    workers = Workers(comparison, jobs=1, threads=None, work=print)
    assert state_of(comparison, workers, bad) == "diverged"


@pytest.mark.parametrize("method", ["GradeSTE", "RLOO"])
def test_a_last_step_of_fewer_batches_is_refused(method: str, shelf: Shelf, tmp_path: Path) -> None:
    """It would sample fewer completions than planned, or make fewer steps of them."""
    odd = arguments(shelf) | {"trainer.accumulate_grad_batches": 2, "trainer.limit_train_batches": 3}
    comparison = Comparison(tmp_path / "out", plan(method, odd, seeds=[1]))
    with pytest.raises(InputError, match="an epoch has 3 batches, no multiple of 2: its last step"):
        work(comparison, comparison.runs()[0])


@pytest.mark.parametrize("option", ["enable_checkpointing", "logger"])
def test_what_a_comparison_needs_is_not_turned_off(option: str, shelf: Shelf, tmp_path: Path) -> None:
    comparison = Comparison(tmp_path / "out", plan("RLOO", arguments(shelf) | {f"trainer.{option}": False}, seeds=[1]))
    with pytest.raises(InputError, match=rf"trainer\.{option}: a comparison needs it"):
        work(comparison, comparison.runs()[0])


def test_the_commit_is_that_of_the_library_that_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of another clone that stands first on the path, too."""
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr(module.grade_lightning, "__file__", str(tmp_path / "__init__.py"))
    found = module._commit()
    assert found
    assert head.startswith(found)


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module._commit() is None
