"""Damaged and incomplete tests: named, and never a wrong number."""

import json
import math
from importlib import import_module

import numpy as np
import pytest

from tests.cli.report.conftest import PROMPTS, Make, place, read, row, write_test

differences = import_module("grade_lightning_cli.report.differences")
estimates = import_module("grade_lightning_cli.report.estimates")
reading = import_module("grade_lightning_cli.report.reading")


def test_a_line_that_is_cut_off(make: Make) -> None:
    folder = make()
    path = place(folder, seed=2) / "test.jsonl"
    path.write_text(path.read_text()[:-30])
    _, arms, missing = read(folder)
    assert f"{path}: line 40 is broken; its test is left out." in missing
    assert "RLOO: 2 of 3 finished runs count in the test results." in missing
    assert estimates.measure(arms["RLOO"], "reward").seeds == 2
    (difference,) = differences.differences(list(arms.values()), "reward")
    assert (difference.estimate.seeds, difference.why_not) == (2, "two seeds: no test is made")


def test_lines_that_are_missing_are_seen_by_the_mean(make: Make) -> None:
    folder = make()
    path = place(folder, seed=2) / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows.sort(key=lambda line: line["reward"])
    path.write_text("".join(json.dumps(line) + "\n" for line in rows[:20]))
    _, arms, missing = read(folder)
    assert "over its 20 lines" in missing
    assert estimates.measure(arms["RLOO"], "reward").seeds == 2


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
    assert estimates.measure(arms["RLOO"], "reward").left_out == 3
    assert "RLOO: 3 values of reward on the test are null or not finite; left out." in missing
    own = reading.read([folder]).runs[3]
    assert np.nanmean(own.rows.figures["reward"]) == pytest.approx((0.5 + 36 * 0.7) / 37)


def test_without_prompts_the_interval_is_of_seeds(make: Make) -> None:
    folder = make()
    for seed in (1, 2, 3):
        (place(folder, seed=seed) / "test.jsonl").unlink()
    _, arms, missing = read(folder)
    found = estimates.measure(arms["RLOO"], "reward")
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
