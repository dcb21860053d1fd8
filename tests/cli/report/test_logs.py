"""Damaged, empty and several logs: named, and never a wrong number."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from tests.cli.report.conftest import Make, event_file, log, place, read

bands = import_module("grade_lightning_cli.report.bands")
estimates = import_module("grade_lightning_cli.report.estimates")
reading = import_module("grade_lightning_cli.report.reading")


def test_logs_that_are_cut_off(make: Make) -> None:
    folder = make()
    path = event_file(place(folder, seed=2))
    path.write_bytes(path.read_bytes()[:700])
    _, arms, missing = read(folder)
    assert f"{path}: cut off or damaged after" in missing
    assert "its runs were validated at different steps" in missing
    points = arms["RLOO"].runs[1].curves["val/reward"].values
    assert 0 < len(points) < 4
    band = bands.band(arms["RLOO"], "val/reward", "steps")
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
    assert bands.band(arms["RLOO"], "val/reward", "steps").mean == pytest.approx(np.mean(others, 0))
    assert estimates.measure(arms["RLOO"], "reward").seeds == 3


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
    found = reading.read([study])
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
    curves = reading.read([folder]).runs[3].curves
    assert curves["val/reward"].steps.tolist() == [0, 49, 99, 109, 149]
    assert curves["val/reward"].values[-2:] == pytest.approx([0.2, 0.3])
    assert curves["val/reward"].seconds[-3:] == pytest.approx([100, 110, 160])
    assert curves["train/reward"].steps[-1] == 99


def test_a_run_that_began_anew_in_its_folder(make: Make) -> None:
    folder = make()
    go_on(place(folder) / "RLOO" / "version_0", 0, 5000.0, [(0, 10, 0.2)])
    ((name, curve),) = reading.read([folder]).runs[3].curves.items()
    assert (name, curve.values, curve.seconds) == ("val/reward", pytest.approx([0.2]), [0])


def test_values_that_are_not_numbers_are_counted(make: Make) -> None:
    folder = make()
    with SummaryWriter(str(event_file(place(folder)).parent)) as writer:
        writer.add_scalar("val/reward", float("nan"), 120, walltime=1121)
    _, arms, missing = read(folder)
    assert "val/reward is not a number at 1 steps; those are left out." in missing
    assert np.isfinite(bands.band(arms["RLOO"], "val/reward", "steps").mean).all()
