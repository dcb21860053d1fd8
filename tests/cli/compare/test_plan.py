"""What may be compared, and what is refused."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from grade_lightning.errors import InputError
from tests.cli.compare.conftest import GRID, plan

beside = import_module("grade_lightning_cli.compare.plan").beside


def test_lists_with_commas() -> None:
    found = plan("GradeSTE, RLOO", seeds="3,1")
    assert found.methods == {"GradeSTE": {}, "RLOO": {}}
    assert found.seeds == [3, 1]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"methods": "RLOO,RLOO"}, "methods: must not be empty, and must not repeat a value"),
        ({"methods": []}, "methods: must not be empty"),
        ({"methods": "../RLOO"}, "cannot be the name of a folder"),
        ({"methods": "RLOO", "seeds": "1,x"}, "seeds = 1,x: give whole numbers"),
        ({"methods": "RLOO", "grid": {"model.tau": []}}, "model.tau: must not be empty"),
        ({"methods": "RLOO", "completions": 0}, "completions = 0"),
        ({"methods": "RLOO", "completions": None}, "completions: say how many"),
        ({"methods": "RLOO", "seeds": [1, -1]}, "seeds = -1: must be 0 or more"),
        ({"methods": "RLOO", "grid_seeds": "4"}, "grid_seeds: there is no grid to search"),
        ({"methods": "RLOO", "grid": GRID, "grid_seeds": "4,4"}, "grid_seeds: must not be empty, and must"),
        ({"methods": "RLOO", "grid": GRID, "grid_seeds": "x"}, "grid_seeds = x: give whole numbers"),
        ({"methods": "RLOO", "grid": GRID, "grid_seeds": [-1]}, "seeds = -1: must be 0 or more"),
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


def test_file_names_are_those_of_the_plans_folder(tmp_path: Path) -> None:
    """Where there is such a file beside the plan; other values, and names that lie elsewhere, stay."""
    for name in ("extra.yaml", "own.jsonl", "RLOO"):
        (tmp_path / name).touch()
    written = {
        "methods": {"RLOO": {"config": "extra.yaml"}},
        "arguments": {
            "config": ["extra.yaml", "no.yaml"],
            "data": {"train": "own.jsonl"},
            "model.x": "RLOO",
        },
        "grid": {"model.policy.path": ["own.jsonl", "some/model"]},
    }
    extra, own = str(tmp_path / "extra.yaml"), str(tmp_path / "own.jsonl")
    assert beside(written, tmp_path) == {
        "methods": {"RLOO": {"config": extra}},
        "arguments": {"config": [extra, "no.yaml"], "data": {"train": own}, "model.x": "RLOO"},
        "grid": {"model.policy.path": [own, "some/model"]},
    }
