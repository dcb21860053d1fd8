"""Damaged, unfinished and empty runs: named, and never a wrong number."""

import json
import math
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]

from grade_lightning.errors import InputError
from tests.cli.report.conftest import Make, ending, event_file, log, place, plan, read, write_run

bands = import_module("grade_lightning_cli.report.bands")
curves = import_module("grade_lightning_cli.report.curves")
diagnostics = import_module("grade_lightning_cli.report.diagnostics")
estimates = import_module("grade_lightning_cli.report.estimates")
reading = import_module("grade_lightning_cli.report.reading")
arms_of = import_module("grade_lightning_cli.report.arms").arms
verdict_of = import_module("grade_lightning_cli.report.verdict").verdict
UNDECIDED = '{"RLOO": {"setting": null, "objectives": {"default": 0.3, "lr=0.001": null}}}'


def test_a_sound_comparison(make: Make) -> None:
    study, arms, missing = read(make())
    assert missing == ""
    assert [len(arm.runs) for arm in arms.values()] == [3, 3]
    assert len(study.runs) == 7  # the setting that was not chosen, too
    assert study.objectives["RLOO", "lr=0.001"] == 0.4
    curve = study.runs[0].curves["val/reward"]
    assert curve.steps.tolist() == [0, 49, 99, 149]
    assert curve.seconds.tolist() == [0, 50, 100, 150]
    reward = estimates.measure(arms["GradeSTE"], "reward")
    tests = [json.loads((run.folder / "test.json").read_text())["reward"] for run in arms["GradeSTE"].runs]
    assert reward.mean == pytest.approx(np.mean(tests))
    assert (reward.seeds, reward.prompts, reward.covers) == (3, 40, "seeds and prompts")


def test_an_unfinished_run_does_not_count(make: Make) -> None:
    folder = make()
    (place(folder, seed=3) / "run.json").unlink()
    _, arms, missing = read(folder)
    assert estimates.measure(arms["RLOO"], "reward").seeds == 2
    assert estimates.measure(arms["GradeSTE"], "reward").seeds == 3
    assert "seed_3/run.json: not there; the run is not finished and is left out." in missing
    assert "RLOO: no finished run with seed 3, which the plan has." in missing


@pytest.mark.parametrize("content", ["", '{"seed": 3', "[]", "\x00", '{"seed": 1}', '{"reward": 0.5}'])
def test_a_broken_run_json_is_no_finished_run(make: Make, content: str) -> None:
    folder = make()
    (place(folder, seed=3) / "run.json").write_text(content)
    _, arms, missing = read(folder)
    assert arms["RLOO"].seeds == [1, 2]
    assert "the run is not finished and is left out" in missing


def test_a_method_that_diverged_everywhere(make: Make) -> None:
    folder = make(("GradeSTE", "PPO"))
    chosen = json.loads((folder / "chosen.json").read_text())
    chosen["PPO"] = {"setting": None, "objectives": {"default": None, "lr=0.001": None}}
    (folder / "chosen.json").write_text(json.dumps(chosen))
    for path in folder.glob("runs/PPO/*/*/test.json*"):
        path.unlink()
    study, arms, missing = read(folder)
    assert list(arms) == ["GradeSTE"]
    said = "PPO: no setting was chosen or tested (objectives on validation: default not finite, lr=0.001 not finite)."
    assert said in missing
    text = verdict_of(list(arms.values()), [], study.lost)
    assert text.endswith("(3 seeds). Of PPO there is no test result.")


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"RLOO": 3}', UNDECIDED])
def test_without_a_choice_the_tested_settings_count(make: Make, content: str | None) -> None:
    folder = make()
    (folder / "chosen.json").unlink() if content is None else (folder / "chosen.json").write_text(content)
    study, arms, _ = read(folder)
    assert sorted(arms) == ["GradeSTE", "RLOO"]
    assert study.objectives.get(("RLOO", "default")) == (0.3 if content and "0.3" in content else None)
    assert {arm.setting for arm in arms.values()} == {"default"}


def test_where_the_logs_end_is_not_the_end(make: Make) -> None:
    """A log may be cut between two records, where nothing else tells."""
    folder = make()
    true = reading.read([folder]).runs[3].curves["val/reward"].values[-1]
    for at, steps, ended in ((true, 150, True), (true, 149, True), (true + 0.1, 150, False), (true, 151, False)):
        study, arms, missing = ending(folder, float(at), steps)
        run, rloo = study.runs[3], arms["RLOO"]
        assert run.ended == ended
        assert math.isfinite(curves.last(run, "val/reward")) == ended
        assert ("at step 149, is not that of its end; what the end was is not known." in missing) != ended
        assert bands.reached(rloo, 9.0, "steps") == ("not reached" if ended else "not reached by 2 of 3 seeds")
        assert diagnostics.gaps(rloo)[1].seeds == (3 if ended else 2)
        assert next(diagnostics.drifts([rloo])).seeds == (3 if ended else 2)


def test_a_run_that_diverged_has_no_test(make: Make) -> None:
    folder = make()
    path = place(folder, seed=2) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"diverged": "no probabilities", "validation": {}}))
    _, arms, missing = read(folder)
    assert [run.seed for run in arms["RLOO"].tested] == [1, 3]
    assert f"{path.parent}: diverged; it has no test, and those that have speak of runs that did not." in missing


def test_a_run_of_another_method_is_no_seed_of_it(make: Make) -> None:
    folder = make()
    shutil.rmtree(place(folder, seed=2))
    write_run(place(folder, seed=2), "GradeSTE", 2)
    _, arms, missing = read(folder)
    assert arms["RLOO"].seeds == [1, 3]
    assert "seed_2/run.json: not of RLOO with seed 2; the run is not finished and is left out." in missing


@pytest.mark.parametrize("content", [None, "{"])
def test_without_its_configuration_a_run_s_task_is_not_known(make: Make, content: str | None) -> None:
    folder = make()
    path = event_file(place(folder)).parent / "config.yaml"
    path.unlink() if content is None else path.write_text(content)
    assert read(folder)[2] == f"{path}: cannot be read; whether its task is that of the others is not known."


def test_a_comparison_without_a_finished_run(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("methods: 1\n")
    study = reading.read([tmp_path])
    assert study.runs == []
    assert any("no finished run" in line for line in study.missing)


def test_the_same_run_twice(make: Make) -> None:
    folder = make()
    other = shutil.copytree(folder, folder.with_name("copy"))
    study = reading.read([folder, other])
    assert len(study.runs) == 7
    assert sum("a second run of" in line for line in study.missing) == 7


def test_comparisons_that_were_made_with_something_else_are_apart(make: Make) -> None:
    folder = make()
    other = shutil.copytree(folder, folder.with_name("other"))
    for path in other.glob("runs/*/*/seed_*"):
        seed = int(path.name[-1]) + 3
        (path / "run.json").write_text(json.dumps(json.loads((path / "run.json").read_text()) | {"seed": seed}))
        path.rename(path.with_name(f"seed_{seed}"))
    plan(other, ("GradeSTE", "RLOO"), (4, 5, 6))
    pooled = arms_of(reading.read([folder, other]))
    assert {arm.label: arm.seeds for arm in pooled} == {"GradeSTE": [1, 2, 3, 4, 5, 6], "RLOO": [1, 2, 3, 4, 5, 6]}
    (other / "plan.yaml").write_text((other / "plan.yaml").read_text() + "arguments: {model.beta: 0.1}\n")
    (other / "chosen.json").write_text('{"RLOO": {"setting": "default", "objectives": {"default": -9.0}}}')
    study = reading.read([folder, other])
    apart = {arm.label: arm.seeds for arm in arms_of(study)}
    assert apart["RLOO (default)"] == [1, 2, 3]
    assert apart["RLOO (default, other)"] == [4, 5, 6]
    assert (study.objectives["RLOO", "default"], study.objectives["RLOO", "default, other"]) == (0.5, -9.0)


def test_a_single_run_is_no_seed_of_a_comparison(make: Make, tmp_path: Path) -> None:
    single = tmp_path / "RLOO" / "version_7"
    log(single, 0.3)
    (single / "config.yaml").write_text("seed_everything: 9\noptimizer: {lr: 0.5}\n")
    labels = [arm.label for arm in arms_of(reading.read([make(), single]))]
    assert labels == ["GradeSTE", "RLOO (default)", "RLOO (version_7)"]


def test_single_runs(tmp_path: Path) -> None:
    folders = []
    for i, (seed, rate) in enumerate([(1, 0.1), (2, 0.1), (1, 0.2), (1, 0.3)]):
        folder = tmp_path / str(i) / "GradeSTE" / "version_0"
        log(folder, 0.3)
        (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed, "optimizer": {"lr": rate}}))
        folders.append(folder)
    study = reading.read(folders)
    assert len(study.runs) == 4
    found = arms_of(study)
    assert [arm.seeds for arm in found] == [[1, 2], [1], [1]]  # configurations of their own
    assert len({arm.label for arm in found}) == 3
    assert verdict_of(found, []) == "No finished run was tested: nothing can be said about the test reward."
    assert any("nothing says whether it finished" in line for line in study.missing)


def test_a_single_run_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(tmp_path / "RLOO" / "version_3", 0.3)
    monkeypatch.chdir(tmp_path / "RLOO" / "version_3")
    (run,) = reading.read([Path(".")]).runs
    assert run.method == "RLOO"


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_neither_a_comparison_nor_a_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="neither a comparison"):
        reading.read([tmp_path / name])
