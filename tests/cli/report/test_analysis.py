"""What is said of the numbers, and what is not."""

import dataclasses
import json
import math
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from tests.cli.report.conftest import PROMPTS, Make, place, plan, row, write_test

runs = import_module("grade_lightning_cli.report.runs")
analysis = import_module("grade_lightning_cli.report.analysis")
page = import_module("grade_lightning_cli.report.page")


def arms(folder: Path) -> list[Any]:
    found: list[Any] = analysis.arms(runs.read([folder]))
    return found


def verdict(folder: Path) -> str:
    found = arms(folder)
    text: str = analysis.verdict(found, analysis.differences(found, "reward"))
    return text


def test_pairs_are_tested_over_seeds(make: Make) -> None:
    found = arms(make(("GradeSTE", "RLOO", "PPO")))
    pairs = analysis.differences(found, "reward")
    assert [(d.first.label, d.second.label) for d in pairs] == [
        ("GradeSTE", "PPO"), ("GradeSTE", "RLOO"), ("PPO", "RLOO")
    ]  # fmt: skip
    one, two = ([run.test["reward"] for run in arm.runs] for arm in (pairs[0].first, pairs[0].second))
    assert pairs[0].test.p == pytest.approx(stats.ttest_rel(one, two).pvalue)
    assert pairs[0].test.p_flip == 0.25
    assert [d.p for d in pairs] == pytest.approx(sorted(d.p for d in pairs))
    assert pairs[0].p == pytest.approx(3 * pairs[0].test.p)
    # the judge is one minus the reward
    (other, *_) = analysis.differences(found, "rewards/truth")
    assert other.estimate.mean == pytest.approx(-pairs[0].estimate.mean)
    # KL is 5 nats for all
    (objective, *_) = analysis.differences(found, "objective", beta=0.01)
    assert objective.estimate.mean == pytest.approx(pairs[0].estimate.mean)
    assert analysis.measure(found[0], "objective", 0.01).mean == pytest.approx(
        analysis.measure(found[0], "reward").mean - 0.05
    )


def test_verdict_names_what_is_significant(make: Make) -> None:
    text = verdict(make(("GradeSTE", "RLOO", "PPO")))
    assert text.startswith("GradeSTE has the highest mean test reward, 0.8")
    assert "It is significantly above PPO, RLOO (" in text
    assert "not significantly" not in text


def test_verdict_names_what_is_not(make: Make) -> None:
    folder = make(("GradeSTE", "RLOO"))
    for seed, shift in ((1, 0.3), (2, -0.1), (3, -0.1)):  # at a mean above the other's, and far apart
        base = [json.loads(x)["reward"] for x in (place(folder, "GradeSTE", seed) / "test.jsonl").open()]
        write_test(place(folder, "RLOO", seed), [row(p, r + shift) for p, r in zip(PROMPTS, base, strict=True)])
    text = verdict(folder)
    assert text.startswith("RLOO has the highest mean test reward")
    assert "It is not significantly above GradeSTE (" in text


def test_verdict_says_below_where_the_pairs_do(make: Make) -> None:
    """Its mean is higher for a seed that the other has not, and for easy prompts."""
    folder = make(("GradeSTE", "RLOO"))
    base = [json.loads(x)["reward"] for x in (place(folder, "RLOO", 1) / "test.jsonl").open()]
    shutil.copytree(place(folder, "RLOO", 1), place(folder, "RLOO", 4))
    (place(folder, "RLOO", 4) / "run.json").write_text(json.dumps({"method": "RLOO", "seed": 4}))
    write_test(place(folder, "RLOO", 4), [row(p, r + 2) for p, r in zip(PROMPTS, base, strict=True)])
    plan(folder, ("GradeSTE", "RLOO"), (1, 2, 3, 4))
    text = verdict(folder)
    assert text.startswith("RLOO has the highest mean test reward, 1.1")
    assert "(4 seeds). On the seeds and prompts that both have, it is significantly below GradeSTE (" in text


def test_verdict_counts_what_was_left_out(make: Make) -> None:
    folder = make(("GradeSTE", "RLOO"))
    write_test(place(folder, "GradeSTE"), [row(p, 0.9 if i else None) for i, p in enumerate(PROMPTS)])
    assert "(3 seeds, 1 values left out)" in verdict(folder)


def test_what_one_trains_on_is_no_judge_of_it(make: Make) -> None:
    folder = make(("GradeSTE", "RLOO", "PPO"))
    for path in folder.glob("runs/RLOO/default/*/RLOO/version_0"):
        with SummaryWriter(str(path)) as writer:
            writer.add_scalar("rewards/truth", 0.5, 3)
    found = arms(folder)
    assert analysis.judges(found) == ["rewards/truth"]
    assert [analysis.trained_on(arm, "rewards/truth") for arm in found] == [False, False, True]
    (pair,) = analysis.differences(found, "rewards/truth")
    assert (pair.first.label, pair.second.label) == ("GradeSTE", "PPO")
    table = page.results(found, None)
    of = table.header.index("judge truth")
    assert [cells[of] == "trained on" for cells in table.rows] == [False, False, True]


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
    said = analysis.absent(found)
    assert "RLOO: rewards/truth was measured on the test in 1 of 3 runs; it is of those." in said
    assert "RLOO: perplexity was measured on the test in 2 of 3 runs; it is of those." in said


def test_runs_without_their_prompts_still_count(make: Make) -> None:
    folder = make()
    (place(folder, seed=2) / "test.jsonl").unlink()
    found = arms(folder)
    reward = analysis.measure(found[1], "reward")
    assert (reward.seeds, reward.covers) == (3, "seeds")
    (pair,) = analysis.differences(found, "reward")
    assert (pair.estimate.seeds, pair.why_not) == (2, "two seeds: no test is made")


@pytest.mark.parametrize(
    ("start", "best", "levels"),
    [(0.5, 0.9, [0.6, 0.7, 0.8, 0.86]), (0.97, 0.999, [0.977, 0.985, 0.992, 0.996]),
     (1e6, 1e6 + 300, [1000075, 1000150, 1000225, 1000270]), (-216.4, -204.4, [-213, -210, -207, -206]),
     (0.5, 0.5, [])],
)  # fmt: skip
def test_levels_lie_on_the_way(make: Make, start: float, best: float, levels: list[float]) -> None:
    (arm, *_) = arms(make())
    for run in arm.runs:
        run.curves["val/reward"] = runs.Curve(*(np.array([a, b]) for a, b in ((0, 9), (start, best), (0, 1))))
    found = analysis.levels([arm])
    assert found == pytest.approx(levels, rel=1e-3)
    assert all(start < level <= best for level in found)


def test_verdict_names_what_was_not_tested(make: Make) -> None:
    folder = make(("GradeSTE", "RLOO", "PPO", "GRPO"))
    for seed in (1, 2, 3):
        write_test(place(folder, "PPO", seed), [row(f"other {i}", 0.1) for i in range(5)])
        for path in place(folder, "GRPO", seed).glob("test*"):
            path.unlink()
    text = verdict(folder)
    assert "It is significantly above RLOO and not tested against PPO (" in text
    assert text.endswith("Of GRPO there is no test result.")


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
    assert analysis.tasks(arms(folder)) == []
    other = {"class_path": "FunctionReward", "init_args": {"function": "mine.f"}}
    source = {"class_path": "LocalFiles", "init_args": {"train": "a.csv"}}
    configure(logs[-1], {"batch_size": 8, "source": source, "num_workers": 0}, other, {"max_new_tokens": 6})
    assert analysis.tasks(arms(folder)) == [
        "data.batch_size (4, 8)",
        "data.source (LocalFiles, None)",
        "model.reward (FunctionReward, None)",
        "model.sampler (None, given)",
    ]


@pytest.mark.parametrize(("seeds", "why"), [(1, "one seed: no test is possible"), (2, "two seeds: no test is made")])
def test_few_seeds_have_no_test(make: Make, seeds: int, why: str) -> None:
    folder = make(seeds=seeds)
    (difference,) = analysis.differences(arms(folder), "reward")
    assert difference.test is None
    assert math.isnan(difference.p)
    assert not difference.significant
    assert difference.estimate.covers == ("prompts" if seeds == 1 else "seeds and prompts")
    assert verdict(folder).endswith(f"Whether that is more than chance cannot be said ({why}).")


def test_other_prompts_are_not_paired(make: Make) -> None:
    folder = make()
    for seed in (1, 2, 3):
        write_test(place(folder, seed=seed), [row(f"other {i}", 0.1 * i) for i in range(5)])
    found = arms(folder)
    (difference,) = analysis.differences(found, "reward")
    assert (difference.estimate, difference.test) == (None, None)
    assert "the prompts differ" in verdict(folder)
    assert analysis.measure(found[1], "reward").covers == "seeds and prompts"


def test_other_prompts_within_a_method_are_not_crossed(make: Make) -> None:
    folder = make()
    write_test(place(folder, seed=2), [row(f"other {i}", 0.5) for i in range(40)])
    found = arms(folder)[1]
    rewards = [run.test["reward"] for run in found.runs]
    reward = analysis.measure(found, "reward")
    assert (reward.mean, reward.covers) == (pytest.approx(sum(rewards) / 3), "seeds")
    assert "RLOO: its runs' test prompts differ or are not known: its interval covers seeds alone." in analysis.absent(
        [found]
    )


def test_one_method_has_nothing_to_compare_with(make: Make) -> None:
    assert verdict(make(("GradeSTE",))).endswith("(3 seeds); there is nothing to compare it with.")


@pytest.mark.parametrize(
    ("lost", "judges"),
    [("nothing", ["rewards/truth"]), ("test.jsonl", ["rewards/truth"]), ("*/version_0/events*", [])],
)
def test_a_part_of_the_training_reward_is_no_judge(make: Make, lost: str, judges: list[str]) -> None:
    """It is logged in training; without logs nothing is known of it, and none is named."""
    folder = make()
    for path in folder.glob(f"runs/*/*/*/{lost}"):
        path.unlink()
    assert analysis.judges(arms(folder)) == judges


def test_an_interval_that_reaches_zero_is_not_significant(make: Make) -> None:
    (difference,) = analysis.differences(arms(make()), "reward")
    assert difference.significant
    assert not difference._replace(estimate=difference.estimate._replace(half_width=1.0)).significant
    assert not difference._replace(p=0.06).significant


def test_hacking_is_flagged(make: Make) -> None:
    drift = next(analysis.drifts(arms(make())))
    assert drift.flagged
    assert drift.change == pytest.approx(-drift.reward)
    assert (drift.hacked, drift.seeds) == (3, 3)
    assert not drift._replace(change=0.1).flagged
    assert not drift._replace(reward=-0.1).flagged


def test_costs_are_those_logged(make: Make) -> None:
    (run, *_) = arms(make())[0].runs
    curve = run.curves["val/reward"]
    assert analysis.position(run, curve, "train/sampled_tokens").tolist() == [0, 5000, 10000, 15000]
    assert analysis.position(run, curve, "train/reward_calls").tolist() == [0, 800, 1600, 2400]
    assert analysis.position(run, curve, "train/never") is None


def test_costs_between_and_beyond_the_logs(make: Make) -> None:
    grade, _ = found = arms(make())
    (run, *_) = grade.runs
    run.curves["val/reward"] = curve = runs.Curve(*([np.array([0.0, 6.0, 15.0, 22.0])] * 3))
    logged = np.array([4.0, 9.0, 14.0])
    run.curves["train/sampled_tokens"] = runs.Curve(logged, 100 * (logged + 1), logged)
    places = analysis.position(run, curve, "train/sampled_tokens")
    assert places[:3].tolist() == [0.0, 700.0, 1500.0]  # the last carries the number of steps
    assert math.isnan(places[3])
    assert "GradeSTE: sampled tokens were not logged up to the last validation; it is not drawn against them." in (
        analysis.absent(found)
    )
    assert analysis.reached(grade, 20.0, "train/sampled_tokens") == "not reached by 2 of 3 seeds"
    alone = dataclasses.replace(grade, runs=[run])
    assert analysis.reached(alone, 20.0, "train/sampled_tokens") == "not known"
    assert analysis.band(alone, "val/reward", "train/sampled_tokens").x.tolist() == [0.0, 700.0, 1500.0]
    run.about["spent"] = {"sampled_tokens": 2300}
    assert analysis.position(run, curve, "train/sampled_tokens")[3] == 2300


def test_reached_is_never_extrapolated(make: Make) -> None:
    grade, rloo = arms(make())
    assert analysis.reached(grade, 0.44, "steps") == "0"
    assert analysis.reached(grade, 0.5, "steps") == "49"
    assert analysis.reached(grade, 0.5, "train/sampled_tokens") == "5,000"
    assert analysis.reached(rloo, 0.9, "steps") == "not reached"
    ends = sorted(run.curves["val/reward"].values[-1] for run in rloo.runs)
    assert analysis.reached(rloo, ends[1], "steps") == "149 (2 of 3 seeds)"
    assert analysis.reached(rloo, 0.5, "train/never") == "not known"
    assert analysis.levels([grade, rloo]) == sorted(analysis.levels([grade, rloo]))


def test_gap_is_over_seeds(make: Make) -> None:
    (grade, _) = arms(make())
    train, val = analysis.gaps(grade)
    expected = [run.curves["val/reward"].values[-1] - run.test["reward"] for run in grade.runs]
    assert val.mean == pytest.approx(sum(expected) / 3)
    assert val.covers == train.covers == "seeds"
    assert train.mean < val.mean  # the training reward is of the steps before


def test_the_gap_is_of_the_steps_since_the_validation_before(make: Make) -> None:
    (run, *others), arm = (found := arms(make())[0]).runs, found
    steps, rewards = np.array([1.0, 3.0, 5.0, 7.0]), np.array([0.1, 0.2, 0.3, np.nan])
    run.curves["train/reward"] = runs.Curve(steps, rewards, steps)
    at = np.array([0.0, 3.0, 6.0, 9.0])
    run.curves["val/reward"] = runs.Curve(at, np.array([0.0, 0.05, 0.1, 0.2]), at)
    gap = analysis.gap(run)
    assert gap.steps.tolist() == [
        3.0,
        6.0,
    ]  # nothing was trained before the first, nor is known of the last
    assert gap.values == pytest.approx([0.15 - 0.05, 0.3 - 0.1])
    for other in others:
        del other.curves["val/reward"]
    assert analysis.gap_band(arm).mean == pytest.approx(gap.values)
    del run.curves["train/reward"]
    assert analysis.gap_band(arm) is None


def test_a_curve_is_drawn_by_means_of_neighbours() -> None:
    x = np.arange(100.0)
    band = analysis.Band(x, 2 * x, x, 3 * x)
    few = analysis.coarse(band, 4)
    assert few.x.tolist() == [12.0, 37.0, 62.0, 87.0]
    assert few.mean.tolist() == (2 * few.x).tolist()
    assert analysis.coarse(band, 1000).high.tolist() == band.high.tolist()


def test_how_steady_a_method_was(make: Make) -> None:
    arm = arms(make())[0]
    found = analysis.steadiness(arm)
    ends = [run.curves["val/reward"].values[-1] for run in arm.runs]
    assert found.between == pytest.approx(np.std(ends, ddof=1))
    assert found.within == pytest.approx(
        np.mean([np.std(run.curves["train/reward"].values[-6:], ddof=1) for run in arm.runs])  # of 30 logs
    )
    assert found.highest_kl == max(run.curves["train/kl"].values.max() for run in arm.runs)
    assert found.skipped == 6.0
    for run in arm.runs:
        run.curves.clear()
    assert all(math.isnan(x) for x in analysis.steadiness(arm))


def test_mixed_versions_are_named(make: Make) -> None:
    folder = make()
    assert analysis.mixed(runs.read([folder])) == []
    path = place(folder) / "run.json"
    about = json.loads(path.read_text())
    about |= {"commit": None, "versions": about["versions"] | {"torch": "2.6.0"}}
    path.write_text(json.dumps(about))
    assert analysis.mixed(runs.read([folder])) == ["commit (abc123, unknown)", "torch (2.13.0, 2.6.0)"]


def test_the_probe_goes_before_the_passive_figures(make: Make) -> None:
    folder = make()
    assert analysis.noise_kind(arms(folder)) == "grad"
    with SummaryWriter(str(place(folder) / "RLOO" / "version_0")) as writer:
        writer.add_scalar("probe/relative_std", 2.0, 50)
    assert analysis.noise_kind(arms(folder)) == "probe"
