"""Damaged, unfinished and empty runs: named, and never a wrong number."""

import json
import math
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from grade_lightning.errors import InputError
from tests.cli.report.conftest import PROMPTS, Make, log, place, plan, row, write_run, write_test

runs = import_module("grade_lightning_cli.report.runs")
analysis = import_module("grade_lightning_cli.report.analysis")


UNDECIDED = '{"RLOO": {"setting": null, "objectives": {"default": 0.3, "lr=0.001": null}}}'


def read(folder: Path) -> tuple[Any, dict[str, Any], str]:
    """The study, its methods by name, and all that is missing as one text."""
    study = runs.read([folder])
    arms = analysis.arms(study)
    return study, {arm.label: arm for arm in arms}, "\n".join([*study.missing, *analysis.absent(arms, study.planned)])


def event_file(run: Path) -> Path:
    (path,) = run.glob("*/version_0/events.out.tfevents*")
    return path


def test_a_sound_comparison(make: Make) -> None:
    study, arms, missing = read(make())
    assert missing == ""
    assert [len(arm.runs) for arm in arms.values()] == [3, 3]
    assert len(study.runs) == 7  # the setting that was not chosen, too
    assert study.objectives["RLOO", "lr=0.001"] == 0.4
    curve = study.runs[0].curves["val/reward"]
    assert curve.steps.tolist() == [0, 49, 99, 149]
    assert curve.seconds.tolist() == [0, 50, 100, 150]
    reward = analysis.measure(arms["GradeSTE"], "reward")
    tests = [json.loads((run.folder / "test.json").read_text())["reward"] for run in arms["GradeSTE"].runs]
    assert reward.mean == pytest.approx(np.mean(tests))
    assert (reward.seeds, reward.prompts, reward.covers) == (3, 40, "seeds and prompts")


def test_an_unfinished_run_does_not_count(make: Make) -> None:
    folder = make()
    (place(folder, seed=3) / "run.json").unlink()
    _, arms, missing = read(folder)
    assert analysis.measure(arms["RLOO"], "reward").seeds == 2
    assert analysis.measure(arms["GradeSTE"], "reward").seeds == 3
    assert "seed_3/run.json: not there; the run is not finished and is left out." in missing
    assert "RLOO: no finished run with seed 3, which the plan has." in missing


@pytest.mark.parametrize("content", ["", '{"seed": 3', "[]", "\x00", '{"seed": 1}', '{"reward": 0.5}'])
def test_a_broken_run_json_is_no_finished_run(make: Make, content: str) -> None:
    folder = make()
    (place(folder, seed=3) / "run.json").write_text(content)
    _, arms, missing = read(folder)
    assert arms["RLOO"].seeds == [1, 2]
    assert "the run is not finished and is left out" in missing


def test_logs_that_are_cut_off(make: Make) -> None:
    folder = make()
    path = event_file(place(folder, seed=2))
    path.write_bytes(path.read_bytes()[:700])
    _, arms, missing = read(folder)
    assert f"{path}: cut off or damaged after" in missing
    assert "its runs were validated at different steps" in missing
    points = arms["RLOO"].runs[1].curves["val/reward"].values
    assert 0 < len(points) < 4
    band = analysis.band(arms["RLOO"], "val/reward", "steps")
    assert len(band.mean) == len(points)  # no mean over fewer seeds


def test_logs_with_a_bit_turned(make: Make) -> None:
    folder = make()
    path = event_file(place(folder))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "cut off or damaged" in read(folder)[2]


@pytest.mark.parametrize("keep", ["file", "folder"])
def test_logs_that_are_empty(make: Make, keep: str) -> None:
    folder = make()
    path = event_file(place(folder))
    path.write_bytes(b"") if keep == "file" else path.unlink()
    _, arms, missing = read(folder)
    assert ("empty TensorBoard logs" if keep == "file" else "no TensorBoard logs") in missing
    assert "no val/reward in its TensorBoard logs" in missing
    assert "no val/kl in its TensorBoard logs" in missing
    assert "RLOO: where it ended in reward and KL on validation is not known of seed 1." in missing
    assert "RLOO: 2 of 3 runs have a validation curve; the mean is of those." in missing
    others = [run.curves["val/reward"].values for run in arms["RLOO"].runs[1:]]
    assert analysis.band(arms["RLOO"], "val/reward", "steps").mean == pytest.approx(np.mean(others, 0))
    assert analysis.measure(arms["RLOO"], "reward").seeds == 3


def test_a_line_that_is_cut_off(make: Make) -> None:
    folder = make()
    path = place(folder, seed=2) / "test.jsonl"
    path.write_text(path.read_text()[:-30])
    _, arms, missing = read(folder)
    assert f"{path}: line 40 is broken; its test is left out." in missing
    assert "RLOO: 2 of 3 finished runs count in the test results." in missing
    assert analysis.measure(arms["RLOO"], "reward").seeds == 2
    (difference,) = analysis.differences(list(arms.values()), "reward")
    assert (difference.estimate.seeds, difference.why_not) == (2, "two seeds: no test is made")


def test_lines_that_are_missing_are_seen_by_the_mean(make: Make) -> None:
    folder = make()
    path = place(folder, seed=2) / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows.sort(key=lambda line: line["reward"])
    path.write_text("".join(json.dumps(line) + "\n" for line in rows[:20]))
    _, arms, missing = read(folder)
    assert "over its 20 lines" in missing
    assert analysis.measure(arms["RLOO"], "reward").seeds == 2


@pytest.mark.parametrize(
    "content", ["", "{", '{"kl": 1.0}', '{"reward": NaN}', '{"reward": true}', f'{{"reward": 1{"0" * 400}}}']
)
def test_a_broken_test_json(make: Make, content: str) -> None:
    folder = make()
    (place(folder, seed=1) / "test.json").write_text(content)
    _, arms, missing = read(folder)
    assert "test.json" in missing
    assert [run.seed for run in arms["RLOO"].tested] == [2, 3]


def test_rewards_that_are_null_are_counted(make: Make) -> None:
    folder = make()
    rewards: list[float | None] = [0.5, None, math.nan, math.inf, *[0.7] * 36]
    write_test(place(folder), [row(*pair) for pair in zip(PROMPTS, rewards, strict=True)])
    _, arms, missing = read(folder)
    assert analysis.measure(arms["RLOO"], "reward").left_out == 3
    assert "RLOO: 3 values of reward on the test are null or not finite; left out." in missing
    own = runs.read([folder]).runs[3]
    assert np.nanmean(own.rows.figures["reward"]) == pytest.approx((0.5 + 36 * 0.7) / 37)


def test_without_prompts_the_interval_is_of_seeds(make: Make) -> None:
    folder = make()
    for seed in (1, 2, 3):
        (place(folder, seed=seed) / "test.jsonl").unlink()
    _, arms, missing = read(folder)
    found = analysis.measure(arms["RLOO"], "reward")
    assert (found.seeds, found.covers) == (3, "seeds")
    assert "no interval over prompts" in missing


def test_other_ends_of_lines_in_completions(make: Make) -> None:
    folder = make()
    rows = [row(prompt, 0.5, "one\u2028two\x85three\x0bfour\r\nfive") for prompt in PROMPTS]
    write_test(place(folder), rows)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows)
    (place(folder) / "test.jsonl").write_text(text)
    study, _, missing = read(folder)
    assert missing == ""
    assert study.runs[3].rows.completions[0] == "one\u2028two\x85three\x0bfour\r\nfive"


def test_the_last_version_with_a_validation_counts(make: Make) -> None:
    folder = make()
    log(place(folder) / "RLOO" / "version_10", 0.9)  # after version_9, whatever the alphabet says
    log(place(folder) / "RLOO" / "version_9", 0.1)
    with SummaryWriter(str(place(folder) / "RLOO" / "version_11")) as writer:
        writer.add_scalar("test/reward", 0.1, 150)
    study, _, _ = read(folder)
    assert study.runs[3].curves["val/reward"].values[-1] == pytest.approx(1.35)


@pytest.mark.parametrize("folder", ["RLOO/job_17_ab3e5f", "RLOO/version_0", "../seed_2/RLOO/job_17_ab3e5f", 3])
def test_the_run_says_where_its_logs_are(make: Make, folder: Any) -> None:
    study = make()
    for seed in (1, 2):
        log(place(study, seed=seed) / "RLOO" / "job_17_ab3e5f", 0.3 * seed)
    path = place(study) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"folder": folder}))
    found = runs.read([study])
    own = found.runs[3]
    if folder == "RLOO/job_17_ab3e5f":
        assert own.curves["val/reward"].values[-1] == pytest.approx(0.75)
    elif folder == "RLOO/version_0":
        assert 0.6 < own.curves["val/reward"].values[-1] < 0.7
    else:  # never those of another run, or of another start
        assert (own.curves, own.ended) == ({}, False)
        assert f"{path}: its logs are not where it says ({folder})." in found.missing


def test_logs_of_another_start_do_not_stand_in(make: Make) -> None:
    """Those that the run names are empty."""
    folder = make()
    logs = place(folder) / "RLOO"
    (logs / "version_1").mkdir()
    path = place(folder) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"folder": "RLOO/version_1"}))
    study, _, missing = read(folder)
    assert study.runs[3].curves == {}
    assert f"{logs / 'version_1'}: no TensorBoard logs." in missing


def test_one_training_may_say_the_same_in_two_files(make: Make) -> None:
    """Such as the epoch, beside the validation before training and beside the first step."""
    folder = make()
    logs = place(folder) / "RLOO" / "version_0"
    event_file(place(folder)).rename(logs / "events.out.tfevents.2")
    with SummaryWriter(str(logs)) as writer:
        writer.add_scalar("epoch", 0.0, 4, walltime=1000)
        writer.add_scalar("val/kl", float("nan"), 7, walltime=1000)
    (first,) = set(logs.glob("events*")) - {logs / "events.out.tfevents.2"}
    first.rename(logs / "events.out.tfevents.1")
    with SummaryWriter(str(logs)) as writer:
        writer.add_scalar("epoch", 0.0, 4, walltime=2000)
        writer.add_scalar("val/kl", float("nan"), 7, walltime=2000)
    study, _, missing = read(folder)
    assert "another training" not in missing
    assert study.runs[3].curves["val/reward"].steps.tolist() == [0, 49, 99, 149]


def test_two_trainings_in_one_folder(make: Make) -> None:
    folder = make()
    logs = place(folder) / "RLOO" / "version_0"
    event_file(place(folder)).rename(logs / "events.out.tfevents.1")
    log(logs, -0.9, steps=(0, 49, 99, 149, 199))
    study, _, missing = read(folder)
    assert "of another training than the files before it; left out." in missing
    curve = study.runs[3].curves["val/reward"]
    assert curve.steps.tolist() == [0, 49, 99, 149]
    assert 0.6 < curve.values[-1] < 0.7


def test_the_logs_of_a_job(make: Make) -> None:
    folder = make()
    own = place(folder) / "RLOO"
    (own / "version_0").rename(own / "job_17_ab3e5f")
    study, _, missing = read(folder)
    assert missing == ""
    assert len(study.runs[3].curves["val/reward"].values) == 4


def go_on(logs: Path, step: int, time: float, points: list[tuple[int, float, float]]) -> None:
    """Add what a run logged that went on at a step: steps, seconds since then and rewards."""
    before = sorted(logs.iterdir())
    with SummaryWriter(str(logs)) as writer:
        writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)), walltime=time)
        for at, seconds, reward in points:
            writer.add_scalar("val/reward", reward, at, walltime=time + seconds)
    (new,) = set(logs.iterdir()) - set(before)
    new.rename(logs / f"events.out.tfevents.9999999999.{len(before)}")  # in the order of time, however fast it was


def test_a_run_that_went_on_twice(make: Make) -> None:
    """What was dropped does not count, nor any pause."""
    folder = make()
    logs = place(folder) / "RLOO" / "version_0"
    go_on(logs, 100, 5000.0, [(109, 10, 0.2), (149, 50, 0.2)])
    go_on(logs, 110, 9000.0, [(109, 1, 0.9), (149, 50, 0.3)])
    curves = runs.read([folder]).runs[3].curves
    assert curves["val/reward"].steps.tolist() == [0, 49, 99, 109, 149]
    assert curves["val/reward"].values[-2:] == pytest.approx([0.2, 0.3])
    assert curves["val/reward"].seconds[-3:] == pytest.approx([100, 110, 160])
    assert curves["train/reward"].steps[-1] == 99


def test_a_run_that_began_anew_in_its_folder(make: Make) -> None:
    folder = make()
    go_on(place(folder) / "RLOO" / "version_0", 0, 5000.0, [(0, 10, 0.2)])
    ((name, curve),) = runs.read([folder]).runs[3].curves.items()
    assert (name, curve.values, curve.seconds) == ("val/reward", pytest.approx([0.2]), [0])


def test_runs_that_the_plan_has_and_are_not_there(make: Make) -> None:
    folder = make(("GradeSTE", "RLOO", "PPO"))
    plan(folder, ("GradeSTE", "RLOO", "GRPO"), (1, 2, 4), rates=(0.001, 0.01))
    path = place(folder) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"setting": {"lr": 0.001}}))
    study, arms, missing = read(folder)
    assert {label: arm.seeds for label, arm in arms.items()} == {"GradeSTE": [1, 2], "RLOO": [1, 2]}
    assert "RLOO: no finished run with seed 4, which the plan has." in missing
    assert "RLOO: no finished run with seed 1 at lr=0.01, which the plan has." in missing
    assert "GRPO: no setting was chosen or tested." in missing
    assert "GRPO: no finished run with seed 1, 2, 4, which the plan has." in missing
    assert "not in its plan, and left out: GradeSTE/default/seed_3, PPO/default/seed_1," in missing
    assert "which others have" not in missing
    assert study.lost == ["GRPO"]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_plan_that_was_carried_out(make: Make, seed: int) -> None:
    folder = make()
    plan(folder, ("GradeSTE", "RLOO"), (1, 2, 3))
    assert read(folder)[2] == ""
    (place(folder, seed=seed) / "run.json").unlink()
    assert f"RLOO: no finished run with seed {seed}, which the plan has." in read(folder)[2]


@pytest.mark.parametrize(
    "text",
    ["methods: many", "methods: [A]\nseeds: [1]\ngrid: {}", "methods: {A: }\nseeds: [x]\ngrid: {}", "{", "- 1", "\x00",
     "methods: {A: }\nseeds: [1]\ngrid: {lr: 3}", "methods: {}\nseeds: []\ngrid: {}", "at: 2020-99-99",
     "methods: {RLOO: }\ngrid: {}\nseeds: [1, 2"[:-3]],
)  # fmt: skip
def test_a_plan_that_is_not_understood(make: Make, text: str) -> None:
    folder = make()
    (folder / "plan.yaml").write_text(text)
    study, arms, missing = read(folder)
    said = f"{folder / 'plan.yaml'}: not understood; which runs are absent is not known, nor the β of the objective."
    assert (missing, len(arms), len(study.runs), study.betas) == (said, 2, 7, set())
    (place(folder, seed=3) / "run.json").unlink()
    assert "RLOO: no finished run with seed 3, which others have." in read(folder)[2]


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
    text = analysis.verdict(list(arms.values()), [], study.lost)
    assert text.endswith("(3 seeds). Of PPO there is no test result.")


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"RLOO": 3}', UNDECIDED])
def test_without_a_choice_the_tested_settings_count(make: Make, content: str | None) -> None:
    folder = make()
    (folder / "chosen.json").unlink() if content is None else (folder / "chosen.json").write_text(content)
    study, arms, _ = read(folder)
    assert sorted(arms) == ["GradeSTE", "RLOO"]
    assert study.objectives.get(("RLOO", "default")) == (0.3 if content and "0.3" in content else None)
    assert {arm.setting for arm in arms.values()} == {"default"}


def test_values_that_are_not_numbers_are_counted(make: Make) -> None:
    folder = make()
    with SummaryWriter(str(event_file(place(folder)).parent)) as writer:
        writer.add_scalar("val/reward", float("nan"), 120, walltime=1121)
    _, arms, missing = read(folder)
    assert "val/reward is not a number at 1 steps; those are left out." in missing
    assert np.isfinite(analysis.band(arms["RLOO"], "val/reward", "steps").mean).all()


def ending(folder: Path, at: float, logged: float) -> tuple[Any, dict[str, Any], str]:
    """As read() where one run's last validation is said to be other than in its logs, or these end too early."""
    path = place(folder) / "run.json"
    spent = {"sampled_tokens": 15000, "reward_calls": 2400}
    about = json.loads(path.read_text()) | {"validation": {"reward": at}, "spent": spent}
    path.write_text(json.dumps(about))
    (event_file(place(folder)).parent / "config.yaml").write_text(f"trainer: {{max_steps: {logged}}}")
    return read(folder)


def test_where_the_logs_end_is_not_the_end(make: Make) -> None:
    """A log may be cut between two records, where nothing else tells."""
    folder = make()
    true = runs.read([folder]).runs[3].curves["val/reward"].values[-1]
    for at, steps, ended in ((true, 150, True), (true, 149, True), (true + 0.1, 150, False), (true, 151, False)):
        study, arms, missing = ending(folder, float(at), steps)
        run, rloo = study.runs[3], arms["RLOO"]
        assert run.ended == ended
        assert math.isfinite(analysis.last(run, "val/reward")) == ended
        assert ("at step 149, is not that of its end; what the end was is not known." in missing) != ended
        assert analysis.reached(rloo, 9.0, "steps") == ("not reached" if ended else "not reached by 2 of 3 seeds")
        assert analysis.gaps(rloo)[1].seeds == (3 if ended else 2)
        assert next(analysis.drifts([rloo])).seeds == (3 if ended else 2)


def test_what_was_spent_in_the_end_is_not_of_where_the_logs_end(make: Make) -> None:
    folder = make()
    study, _, _ = ending(folder, 7.0, 150)
    run = study.runs[3]
    logged = np.array([4.0, 9.0])
    run.curves["train/sampled_tokens"] = runs.Curve(logged, 100 * (logged + 1), logged)
    assert math.isnan(analysis.position(run, run.curves["val/reward"], "train/sampled_tokens")[-1])


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
    study = runs.read([tmp_path])
    assert study.runs == []
    assert any("no finished run" in line for line in study.missing)


def test_the_same_run_twice(make: Make) -> None:
    folder = make()
    other = shutil.copytree(folder, folder.with_name("copy"))
    study = runs.read([folder, other])
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
    pooled = analysis.arms(runs.read([folder, other]))
    assert {arm.label: arm.seeds for arm in pooled} == {"GradeSTE": [1, 2, 3, 4, 5, 6], "RLOO": [1, 2, 3, 4, 5, 6]}
    (other / "plan.yaml").write_text((other / "plan.yaml").read_text() + "arguments: {model.beta: 0.1}\n")
    (other / "chosen.json").write_text('{"RLOO": {"setting": "default", "objectives": {"default": -9.0}}}')
    study = runs.read([folder, other])
    apart = {arm.label: arm.seeds for arm in analysis.arms(study)}
    assert apart["RLOO (default)"] == [1, 2, 3]
    assert apart["RLOO (default, other)"] == [4, 5, 6]
    assert (study.objectives["RLOO", "default"], study.objectives["RLOO", "default, other"]) == (0.5, -9.0)


def test_a_single_run_is_no_seed_of_a_comparison(make: Make, tmp_path: Path) -> None:
    single = tmp_path / "RLOO" / "version_7"
    log(single, 0.3)
    (single / "config.yaml").write_text("seed_everything: 9\noptimizer: {lr: 0.5}\n")
    labels = [arm.label for arm in analysis.arms(runs.read([make(), single]))]
    assert labels == ["GradeSTE", "RLOO (default)", "RLOO (version_7)"]


def test_single_runs(tmp_path: Path) -> None:
    folders = []
    for i, (seed, rate) in enumerate([(1, 0.1), (2, 0.1), (1, 0.2), (1, 0.3)]):
        folder = tmp_path / str(i) / "GradeSTE" / "version_0"
        log(folder, 0.3)
        (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed, "optimizer": {"lr": rate}}))
        folders.append(folder)
    study = runs.read(folders)
    assert len(study.runs) == 4
    found = analysis.arms(study)
    assert [arm.seeds for arm in found] == [[1, 2], [1], [1]]  # configurations of their own
    assert len({arm.label for arm in found}) == 3
    assert analysis.verdict(found, []) == "No finished run was tested: nothing can be said about the test reward."
    assert any("nothing says whether it finished" in line for line in study.missing)


def test_a_single_run_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(tmp_path / "RLOO" / "version_3", 0.3)
    monkeypatch.chdir(tmp_path / "RLOO" / "version_3")
    (run,) = runs.read([Path(".")]).runs
    assert run.method == "RLOO"


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_neither_a_comparison_nor_a_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="neither a comparison"):
        runs.read([tmp_path / name])


def test_seeds_come_in_order(tmp_path: Path) -> None:
    for seed in (10, 9, 1):
        write_run(place(tmp_path, seed=seed), "RLOO", seed)
    (arm,) = analysis.arms(runs.read([tmp_path]))
    assert arm.seeds == [1, 9, 10]
