"""Frontiers of points that are known; nothing is trained."""

from importlib import import_module

import pytest

frontier = import_module("benchmarks.frontier")


def _test(kl: float, reward: float) -> dict[str, float]:
    return {"kl": kl, "reward": reward}


STRAIGHT = {("A@0.1", 1): _test(2.0, 0.2), ("A@0.01", 1): _test(6.0, 0.6)}
BENT = {("B-b@0.1", 1): _test(3.0, 0.5), ("B-b@1e-2", 1): _test(5.0, 0.9), ("B-b@0.02", 1): _test(4.0, 0.9)}


def test_the_height_is_the_mean_of_the_line_over_the_common_range() -> None:
    found = frontier.points(STRAIGHT | BENT)
    assert list(found) == ["A", "B-b"]
    assert [row["beta"] for row in found["B-b"][1]] == [0.1, 0.02, 0.01]  # by KL
    low, high = frontier.common_range(found)
    assert (low, high) == (3.0, 5.0)
    assert frontier.height(found["A"][1], "reward", low, high) == pytest.approx(0.4)
    assert frontier.height(found["B-b"][1], "reward", low, high) == pytest.approx((0.7 + 0.9) / 2)


def test_families_are_compared_seed_by_seed() -> None:
    more = {(m, seed): t | {"reward": t["reward"] + 0.1 * seed} for (m, _), t in BENT.items() for seed in (1, 2)}
    same = {(m.replace("B-b", "C"), seed): t for (m, seed), t in more.items()}
    lines = frontier.tables(frontier.points(more | same), ["reward"], 3.0, 5.0).splitlines()
    assert lines[-1] == "| B-b − C | 0.000 ± 0.000 | – |"
    assert "| B-b | 0.950 ± 0.635 |" in lines


def test_frontiers_apart_and_names_without_beta_are_refused() -> None:
    apart = frontier.points(STRAIGHT | {("B@1", 1): _test(7.0, 0.1), ("B@2", 1): _test(8.0, 0.1)})
    with pytest.raises(ValueError, match="share no range of KL"):
        frontier.common_range(apart)
    with pytest.raises(ValueError, match="RLOO: name it with its β"):
        frontier.points({("RLOO", 1): _test(1.0, 1.0)})
