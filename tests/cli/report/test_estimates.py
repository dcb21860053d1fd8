"""Test figures, and what they stand for."""

import json
from importlib import import_module

import pytest

from tests.cli.report.conftest import Make, arms, place, row, write_test

differences = import_module("grade_lightning_cli.report.differences")
estimates = import_module("grade_lightning_cli.report.estimates")
page = import_module("grade_lightning_cli.report.page")
absent = import_module("grade_lightning_cli.report.absent").absent


def test_what_stands_for_less_than_the_reward_says_so(make: Make) -> None:
    folder = make()
    for seed, name in ((1, "truth"), (2, "truth"), (3, "perplexity")):
        path = place(folder, seed=seed)
        test = json.loads((path / "test.json").read_text())
        (path / "test.json").write_text(json.dumps({k: v for k, v in test.items() if name not in k}))
        rows = [json.loads(line) for line in (path / "test.jsonl").open()]
        for line in rows:
            line["rewards"].pop(name, None)
        (path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    found = arms(folder)
    table = page.results(found, None)
    cells = dict(zip(table.header, table.rows[1], strict=True))
    assert cells["judge truth"].endswith("[1 seed; prompts]")
    assert cells["perplexity"] == "110 [2 seeds]"
    assert "[" not in cells["reward"] + cells["KL, nats"] + cells["distinct-2"]
    said = absent(found)
    assert "RLOO: rewards/truth was measured on the test in 1 of 3 runs; it is of those." in said
    assert "RLOO: perplexity was measured on the test in 2 of 3 runs; it is of those." in said


def test_runs_without_their_prompts_still_count(make: Make) -> None:
    folder = make()
    (place(folder, seed=2) / "test.jsonl").unlink()
    found = arms(folder)
    reward = estimates.measure(found[1], "reward")
    assert (reward.seeds, reward.covers) == (3, "seeds")
    (pair,) = differences.differences(found, "reward")
    assert (pair.estimate.seeds, pair.why_not) == (2, "two seeds: no test is made")


def test_other_prompts_within_a_method_are_not_crossed(make: Make) -> None:
    folder = make()
    write_test(place(folder, seed=2), [row(f"other {i}", 0.5) for i in range(40)])
    found = arms(folder)[1]
    rewards = [run.test["reward"] for run in found.runs]
    reward = estimates.measure(found, "reward")
    assert (reward.mean, reward.covers) == (pytest.approx(sum(rewards) / 3), "seeds")
    assert "RLOO: its runs' test prompts differ or are not known: its interval covers seeds alone." in absent([found])
