"""Runs that are not of the same task or software."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.cli.report.conftest import Make, arms, place

consistency = import_module("grade_lightning_cli.report.consistency")
reading = import_module("grade_lightning_cli.report.reading")


def configure(folder: Path, data: Any, reward: Any = None, sampler: Any = None) -> None:
    init = {"reward": reward, "sampler": sampler, "optimizer": {"lr": folder.name}, "judges": None}
    config = {"seed_everything": 1, "data": data, "model": {"class_path": "any", "init_args": init}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"checkpoint": {"dirpath": str(folder)}}))


def test_other_tasks_are_named(make: Make) -> None:
    folder = make()
    logs = sorted(folder.glob("runs/*/default/*/*/version_0"))
    for path in logs[:-2]:
        configure(path, {"batch_size": 4, "source": None, "num_workers": len(str(path))})
    (logs[-2] / "config.yaml").write_text("[")
    assert consistency.tasks(arms(folder)) == []
    other = {"class_path": "FunctionReward", "init_args": {"function": "mine.f"}}
    source = {"class_path": "LocalFiles", "init_args": {"train": "a.csv"}}
    configure(logs[-1], {"batch_size": 8, "source": source, "num_workers": 0}, other, {"max_new_tokens": 6})
    assert consistency.tasks(arms(folder)) == [
        "data.batch_size (4, 8)",
        "data.source (LocalFiles, None)",
        "model.reward (FunctionReward, None)",
        "model.sampler (None, given)",
    ]


def test_mixed_versions_are_named(make: Make) -> None:
    folder = make()
    assert consistency.mixed(reading.read([folder])) == []
    path = place(folder) / "run.json"
    about = json.loads(path.read_text())
    about |= {"commit": None, "versions": about["versions"] | {"torch": "2.6.0"}}
    path.write_text(json.dumps(about))
    assert consistency.mixed(reading.read([folder])) == ["commit (abc123, unknown)", "torch (2.13.0, 2.6.0)"]
