"""What a plan has and is not there, and plans that are not understood."""

import json

import pytest

from tests.cli.report.conftest import Make, place, plan, read


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


def test_what_only_served_the_choice_is_not_compared(make: Make) -> None:
    """Though it has the chosen setting, and even a test."""
    folder = make()
    plan(folder, ("GradeSTE", "RLOO"), (2, 3), rates=(0.001,), searched=(1,))
    for method in ("GradeSTE", "RLOO"):
        path = place(folder, method) / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"setting": {"lr": 0.001}}))
    study, arms, missing = read(folder)
    assert {label: arm.seeds for label, arm in arms.items()} == {"GradeSTE": [2, 3], "RLOO": [2, 3]}
    assert {run.seed for run in study.runs} == {1, 2, 3}
    assert missing == ""
    (place(folder, seed=1) / "run.json").unlink()
    assert "RLOO: no finished run with seed 1 at lr=0.001, which the plan has." in read(folder)[2]


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
