"""What a run is given, what is chosen, and what may be added."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from grade_lightning.errors import InputError
from tests.cli.compare.conftest import GRID, Comparison, arguments, finish, plan
from tests.cli.conftest import Shelf

config = import_module("grade_lightning_cli.config")


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


def test_seeds_of_the_grid_decide_and_are_not_compared(tmp_path: Path) -> None:
    """The mean over them does; the best single one would choose another. Those that are compared come afterwards."""
    comparison = Comparison(tmp_path / "out", plan("A", grid=GRID, grid_seeds="7,8", seeds=[1, 2]))
    grid = comparison.runs()
    assert [run.name for run in grid] == [f"A/lr={lr}/seed_{seed}" for lr in (0.001, 0.1) for seed in (7, 8)]
    assert comparison.run(grid[0].name) == grid[0]
    for run, objective in zip(grid, (0.6, 0.6, 0.9, 0.1), strict=True):
        assert comparison.chosen("A") is None
        finish(comparison, run, objective)
    assert comparison.chosen("A") == "lr=0.001"
    left = [run for run in comparison.runs() if not comparison.finished(run)]
    assert [run.name for run in left] == ["A/lr=0.001/seed_1", "A/lr=0.001/seed_2"]
    for run in left:
        finish(comparison, run, 0.5)
        assert not comparison.finished(run)
        finish(comparison, run, 0.5, tested=True)
    assert comparison.complete()


def test_a_seed_of_the_grid_without_a_number_spoils_the_point(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path / "out", plan("A", grid=GRID, grid_seeds="7,8", seeds=[1]))
    for run, objective in zip(comparison.runs(), (0.9, None, 0.1, 0.1), strict=True):
        finish(comparison, run, objective)
    assert comparison.chosen("A") == "lr=0.1"


def test_a_plan_from_before_there_were_seeds_of_the_grid(tmp_path: Path) -> None:
    Comparison(tmp_path, plan("A", grid=GRID, seeds=[1, 2]))
    written = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    del written["grid_seeds"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(written))
    assert Comparison(tmp_path, None).plan.searched == [1]


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
        ({"grid_seeds": [9]}, "grid_seeds"),
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
