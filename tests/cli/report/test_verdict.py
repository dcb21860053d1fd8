"""What is said of the numbers, and what is not."""

import json
import shutil

from tests.cli.report.conftest import PROMPTS, Make, place, plan, row, verdict, write_test


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


def test_verdict_names_what_was_not_tested(make: Make) -> None:
    folder = make(("GradeSTE", "RLOO", "PPO", "GRPO"))
    for seed in (1, 2, 3):
        write_test(place(folder, "PPO", seed), [row(f"other {i}", 0.1) for i in range(5)])
        for path in place(folder, "GRPO", seed).glob("test*"):
            path.unlink()
    text = verdict(folder)
    assert "It is significantly above RLOO and not tested against PPO (" in text
    assert text.endswith("Of GRPO there is no test result.")


def test_one_method_has_nothing_to_compare_with(make: Make) -> None:
    assert verdict(make(("GradeSTE",))).endswith("(3 seeds); there is nothing to compare it with.")
