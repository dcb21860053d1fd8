"""Who is a judge of which method, and the order of seeds."""

from importlib import import_module
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.cli.report.conftest import Make, arms, place, write_run

differences = import_module("grade_lightning_cli.report.differences")
page = import_module("grade_lightning_cli.report.page")
reading = import_module("grade_lightning_cli.report.reading")
module = import_module("grade_lightning_cli.report.arms")


def test_what_one_trains_on_is_no_judge_of_it(make: Make) -> None:
    folder = make(("GradeSTE", "RLOO", "PPO"))
    for path in folder.glob("runs/RLOO/default/*/RLOO/version_0"):
        with SummaryWriter(str(path)) as writer:
            writer.add_scalar("rewards/truth", 0.5, 3)
    found = arms(folder)
    assert module.judges(found) == ["rewards/truth"]
    assert [module.trained_on(arm, "rewards/truth") for arm in found] == [False, False, True]
    (pair,) = differences.differences(found, "rewards/truth")
    assert (pair.first.label, pair.second.label) == ("GradeSTE", "PPO")
    table = page.results(found, None)
    of = table.header.index("judge truth")
    assert [cells[of] == "trained on" for cells in table.rows] == [False, False, True]


@pytest.mark.parametrize(
    ("lost", "judges"),
    [("nothing", ["rewards/truth"]), ("test.jsonl", ["rewards/truth"]), ("*/version_0/events*", [])],
)
def test_a_part_of_the_training_reward_is_no_judge(make: Make, lost: str, judges: list[str]) -> None:
    """It is logged in training; without logs nothing is known of it, and none is named."""
    folder = make()
    for path in folder.glob(f"runs/*/*/*/{lost}"):
        path.unlink()
    assert module.judges(arms(folder)) == judges


def test_seeds_come_in_order(tmp_path: Path) -> None:
    for seed in (10, 9, 1):
        write_run(place(tmp_path, seed=seed), "RLOO", seed)
    (arm,) = module.arms(reading.read([tmp_path]))
    assert arm.seeds == [1, 9, 10]
