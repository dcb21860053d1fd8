"""A comparison: what is equal, what is chosen, and what is left after an interruption."""

import errno
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from grade_lightning.errors import InputError
from tests.cli.conftest import QUIET, SIZES, Shelf, new_shell, scalar

module = import_module("grade_lightning_cli.compare")  # its name once it is installed
config = import_module("grade_lightning_cli.config")
Comparison, compare, work = module.Comparison, module.compare, module.work
plan = partial(module.plan, completions=32)

GRID = {"model.optimizer.lr": [0.001, 0.1]}


def finish(comparison: Any, run: Any, objective: float | None, tested: bool = False) -> None:
    """As if the run had ended."""
    run.folder.mkdir(parents=True, exist_ok=True)
    validation = {} if objective is None else {"reward": objective}
    (run.folder / "run.json").write_text(json.dumps({"objective": objective, "validation": validation}))
    if tested:
        (run.folder / "test.json").write_text("{}")


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What the command says when it leaves with status 2: one line."""
    with pytest.raises(SystemExit) as exit:
        compare(args)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


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
    found = plan("GradeSTE, RLOO", seeds="3,1")
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
        ({"methods": "RLOO", "completions": None}, "completions: say how many"),
        ({"methods": "RLOO", "seeds": [1, -1]}, "seeds = -1: must be 0 or more"),
        ({"methods": "RLOO", "grid": {"model.policy.path": ["a/b", "a_b"]}}, "two of its points have the same name"),
        ({"methods": "RLOO", "arguments": {"model": "PPO"}}, "model: the plan itself sets it"),
        ({"methods": "RLOO", "arguments": {"trainer": {"max_steps": 3}}}, "trainer.max_steps: the plan itself"),
        ({"methods": "RLOO", "grid": {"seed_everything": [1, 2]}}, "seed_everything: the plan itself sets it"),
        ({"methods": {"RLOO": {"ckpt_path": "a.ckpt"}}}, "ckpt_path: the plan itself sets it"),
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
    shared: dict[str, Any] = {"config": ["a.yaml", "b.yaml"], "data.batch_size": 16, "trainer.callbacks+": ["A", "B"]}
    for name in shared["config"]:
        Path(name).touch()
    comparison = Comparison(tmp_path / "out", plan(methods, shared, GRID, seeds=[5]))
    run = comparison.runs()[1]
    assert run.name == "wide/lr=0.1/seed_5"
    assert comparison.run(run.name) == run
    assert comparison.arguments(run) == [
        *("--config=a.yaml", "--config=b.yaml", "--model=GradeSTE"),
        *("--trainer.devices=1", "--export.enabled=false", "--data.batch_size=8"),
        *("--trainer.callbacks+=A", "--trainer.callbacks+=B", "--model.hops=4"),
        *("--model.optimizer.lr=0.1", "--seed_everything=5", f"--trainer.default_root_dir={run.folder}"),
    ]


def test_the_plan_goes_before_a_configuration_file(shelf: Shelf, tmp_path: Path) -> None:
    """Such as one that another method's run has saved."""
    Path("saved.yaml").write_text("model: {class_path: GradeSTE, init_args: {hops: 1}}\ntrainer: {devices: 2}\n")
    comparison = Comparison(tmp_path / "out", plan("RLOO", arguments(shelf) | {"config": "saved.yaml"}))
    cli = config.build(comparison.arguments(comparison.runs()[0]))
    assert (type(cli.model).__name__, cli.trainer.world_size) == ("RLOO", 1)


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


@pytest.mark.parametrize("diverged", [None, float("inf")])
def test_what_did_not_end_in_a_number_is_not_chosen(diverged: float | None, tmp_path: Path) -> None:
    comparison = Comparison(tmp_path / "out", plan("A", grid=GRID, seeds=[1]))
    for run, objective in zip(comparison.runs(), (diverged, -3.0), strict=True):
        finish(comparison, run, objective, tested=True)
    assert comparison.chosen("A") == "lr=0.1"
    assert comparison.complete()
    comparison.note_choices()
    chosen = json.loads((tmp_path / "out/chosen.json").read_text())
    assert chosen == {"A": {"setting": "lr=0.1", "objectives": {"lr=0.001": diverged, "lr=0.1": -3.0}}}


def test_a_method_without_a_setting_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = Comparison(tmp_path / "out", plan("A,B", grid=GRID, seeds=[1]))
    for run, objective in zip(comparison.runs(), (None, None, 0.1, 0.2), strict=True):
        finish(comparison, run, objective, tested=True)
    assert "error: A: no setting to choose" in refused(capsys, "--out", str(tmp_path / "out"))


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


# ---- going on -------------------------------------------------------------------------------------------------------


def test_methods_and_seeds_may_be_added(tmp_path: Path) -> None:
    """By another process, too: none takes away what the other has added."""
    first = Comparison(tmp_path / "out", plan("A", seeds=[1]))
    Comparison(tmp_path / "out", plan("A,B", seeds=[1, 2]))
    third = Comparison(tmp_path / "out", plan("C,A", seeds=[1, 3]))
    assert (list(third.plan.methods), third.plan.seeds) == (["A", "B", "C"], [1, 2, 3])
    assert Comparison(tmp_path / "out", None).runs() == third.runs()
    first.note_choices()
    assert list(json.loads((tmp_path / "out/chosen.json").read_text())) == ["A", "B", "C"]
    assert first.runs() == third.runs()


def test_many_begin_at_once(tmp_path: Path) -> None:
    """Each finds an empty folder, or what another has just left there."""
    started = threading.Barrier(8)

    def begin(method: str) -> Any:
        started.wait()
        return Comparison(tmp_path / "out", plan(method))

    (tmp_path / "out").mkdir()
    (tmp_path / "out/plan.yaml.elsewhere.7.part").touch()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(begin, "ABCDEFGH"))
    assert sorted(Comparison(tmp_path / "out", None).plan.methods) == list("ABCDEFGH")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"arguments": {"data.batch_size": 4}}, "arguments"),
        ({"completions": 8}, "completions"),
        ({"methods": {"A": {"model.hops": 1}}}, "methods.A"),
        ({"grid": GRID}, "grid"),
        ({"grid": {"data.seed": [1, 2, 3]}}, "grid"),
        ({"seeds": [2, 1]}, "first seed"),
    ],
)
def test_what_is_equal_for_all_may_not_change(other: dict[str, Any], what: str, tmp_path: Path) -> None:
    Comparison(tmp_path / "out", plan("A", grid={"data.seed": [1, 2]}))
    before = (tmp_path / "out/plan.yaml").read_text()
    with pytest.raises(InputError, match=f"made with other {what}; give --out another name"):
        Comparison(tmp_path / "out", plan(**{"methods": "A", "grid": {"data.seed": [1, 2]}} | other))
    assert (tmp_path / "out/plan.yaml").read_text() == before


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="exists and holds no comparison"):
        Comparison(tmp_path, plan("A"))
    with pytest.raises(InputError, match="holds no comparison; say what to compare"):
        Comparison(tmp_path, None)


@pytest.mark.parametrize("text", ["methods: A,B\ncompletions: 32\n", "a: [", "- 1", "", "methods: {A: }\nsteps: 3\n"])
def test_a_plan_that_is_the_users_own(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    for given in (None, plan("A,B")):
        with pytest.raises(InputError, match=r"plan\.yaml: not a plan that this grade-compare wrote"):
            Comparison(tmp_path, given)
    assert (tmp_path / "plan.yaml").read_text() == text


def test_a_configuration_that_was_edited(tmp_path: Path) -> None:
    own, shared = Path("own.yaml"), Path("shared.yaml")
    what = plan({"A": {"config": "own.yaml"}, "B": {}}, {"config": ["shared.yaml"]})
    shared.touch()
    with pytest.raises(InputError, match=r"config own\.yaml: cannot be read \(No such file"):
        Comparison(tmp_path / "out", what)
    own.touch()
    Comparison(tmp_path / "out", what)
    own.write_text("model: {}\n")
    for given in (what, None):
        with pytest.raises(InputError, match=r"^own\.yaml: has changed since the runs"):
            Comparison(tmp_path / "out", given)
    path = tmp_path / "out/plan.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "files"}))
    assert list(Comparison(tmp_path / "out", None).plan.files) == ["shared.yaml", "own.yaml"]  # from now on


def test_one_process_at_a_run(tmp_path: Path) -> None:
    (run,) = Comparison(tmp_path / "out", plan("A", seeds=[1])).runs()
    with run.claimed() as one:
        command = [sys.executable, "-m", "grade_lightning_cli.compare", f"--out={run.out}", f"--run={run.name}"]
        other = subprocess.run(command, capture_output=True, text=True)
    assert one
    assert (other.returncode, other.stderr.strip()) == (75, f"grade-compare: another process is at {run.name}")
    assert not run.held


def test_no_process_is_started_for_a_run_that_another_is_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = Comparison(tmp_path / "out", plan("A,B,C", seeds=[1]))
    first, second, third = comparison.runs()
    started: list[str] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(command[-1]))
    workers = module.Workers(comparison, jobs=1, threads=None)
    with first.claimed():
        workers.start()
        compare(["--out", str(tmp_path / "out"), "--list"])
    assert started == [f"--run={second.name}"]
    assert workers.elsewhere == {first}
    assert not (first.folder / "log.txt").exists()
    printed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert printed == [second.name, third.name]
    workers.at.clear()
    workers.start()
    assert started[1:] == [f"--run={first.name}"]


def test_a_process_that_leaves_nothing_has_failed(tmp_path: Path) -> None:
    """Though it says that it succeeded; else it would be started again and again."""
    comparison = Comparison(tmp_path / "out", plan("A", seeds=[1]))
    (run,) = comparison.runs()
    workers = module.Workers(comparison, jobs=1, threads=None)
    for status, failed in ((module.ELSEWHERE, set()), (0, {run})):
        workers.at[run] = SimpleNamespace(poll=lambda status=status: status), 0
        workers.collect()
        assert (workers.at, workers.failed) == ({}, failed)


@pytest.mark.parametrize("content", ["", '{"objective": 1', "[]"])
def test_a_result_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    comparison = Comparison(tmp_path / "out", plan("A", seeds=[1]))
    (run,) = comparison.runs()
    finish(comparison, run, 0.5, tested=True)
    assert comparison.complete()
    (run.folder / "test.json").write_text(content)
    assert (run.tested, comparison.complete()) == (False, False)
    (run.folder / "run.json").write_text(content)
    assert run.result is None


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as the system says it: without a name

    comparison = Comparison(tmp_path, plan("A"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*chosen\.json"):
        comparison.note_choices()
    assert {path.name for path in tmp_path.iterdir()} == {"plan.yaml", "lock"}
    trainer = SimpleNamespace(callback_metrics={}, global_step=1, max_steps=2)
    module.Watch(tmp_path / "progress.json").on_train_batch_end(trainer, None)  # goes on


def test_a_run_ends_with_what_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    trainer = SimpleNamespace(callback_metrics={}, global_step=1, max_steps=2)
    for parent, ended in ((None, 0), (os.getppid(), 0), (1 + os.getppid(), 1)):
        if parent is not None:
            monkeypatch.setenv("GRADE_COMPARE_PARENT", str(parent))
        module.Watch(tmp_path / "progress.json").on_train_batch_end(trainer, None)
        assert len(killed) == ended
    assert killed == [(os.getpid(), signal.SIGTERM)]


def test_threads_are_of_the_cores_that_a_job_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    comparison = Comparison(tmp_path / "out", plan("A", seeds=[1]))
    assert module.Workers(comparison, jobs=2, threads=None).threads == 3
    assert module.Workers(comparison, jobs=8, threads=None).threads == 1


def test_signals_end_the_command_unless_they_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    off = {signal.SIGHUP}  # by nohup
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number in off else signal.SIG_DFL)
    module._end_by_signals()
    assert set(handlers) == {signal.SIGINT, signal.SIGTERM}
    with pytest.raises(SystemExit) as ended:
        handlers[signal.SIGINT](signal.SIGINT, None)
    assert ended.value.code == 130


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
    with pytest.raises(InputError, match="ended at step 2 of 8; take away what ended it"):
        work(comparison, run)
    assert run.result is None


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
    workers = module.Workers(comparison, jobs=1, threads=None)
    assert module._state(comparison, workers, bad) == "diverged"


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


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module._commit() is None


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_list_of_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    compare(["--out", out, "--methods", "GradeSTE,RLOO", "--seeds", "1,2", "--completions=32", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"grade-compare --out {tmp_path / 'out'} --run GradeSTE/default/seed_1"
    assert len(lines) == 4


def test_what_stands_behind_the_line_is_for_all(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        Path(name).touch()
    own = ["--out", str(tmp_path / "out"), "--methods=RLOO", "--completions=32", "--arguments.model.beta=1", "--list"]
    compare([*own, "--", "--data.seed", "3", "--a=b=c", "--config", "a.yaml", "--config=b.yaml", "--x+=1", "--x+=2"])
    assert yaml.safe_load((tmp_path / "out/plan.yaml").read_text())["arguments"] == {
        "model.beta": 1,
        "data.seed": "3",
        "a": "b=c",
        "config": ["a.yaml", "b.yaml"],
        "x+": ["1", "2"],
    }


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("-- --data.seed", "one value each"),
        ("-- 3 --data.seed", "one value each"),
        ("-- --data.seed 3 --data.seed=4", "--data.seed stands there twice"),
        ("--seeds 1,2", "seeds: given without methods; give the whole plan"),
        ("--completions 9600 -- --data.seed 3", "completions, arguments: given without methods"),
        ("--run foo", "--run foo: not in the plan; give METHOD/SETTING/seed_N, such as RLOO/default/seed_1"),
        ("--run RLOO/default/seed_x", "not in the plan"),
        ("--run NOPE/default/seed_1", "not in the plan"),
        ("--run RLOO/lr=1/seed_1", "not in the plan"),
        ("--run RLOO/default/seed_3", "not in the plan"),
        ("--jobs 0", "jobs = 0: must be 1 or more"),
        ("--threads 0", "threads = 0: must be 1 or more"),
    ],
)
def test_a_wrong_command(wrong: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Comparison(tmp_path / "out", plan("RLOO", seeds=[1, 2]))
    assert says in refused(capsys, "--out", str(tmp_path / "out"), *wrong.split())
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"plan.yaml", "lock"}


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
