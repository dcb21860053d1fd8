"""The budget by success rate: what is remembered of a prompt, and that nothing is lost on the way to a checkpoint."""

import io
from typing import Any

import pytest
import torch

from grade_lightning.budget import KnapsackBudget
from grade_lightning.distributed import Reduce
from grade_lightning.records import Experience, Prompts, Rollout, Scores
from tests.conftest import make_tokenizer
from tests.test_memory import Two

NAN = float("nan")
PROMPTS = Prompts(torch.tensor([[5], [6], [7]]), torch.ones(3, 1))
KEYS = PROMPTS.keys


def visit(*rewards: list[float]) -> Experience:
    """Completions of the first prompts, with these rewards."""
    counts = torch.tensor([len(row) for row in rewards])
    given = PROMPTS.slice(0, len(rewards)).repeat(counts)
    ids = torch.full((len(given), 1), 4)
    groups = torch.arange(len(rewards)).repeat_interleave(counts)
    mask = ids > 0
    rollout = Rollout(given.ids, given.mask, ids, mask, None, make_tokenizer(), groups=groups)
    return Experience(rollout, Scores(torch.tensor([value for row in rewards for value in row]), {}))


def test_a_prompt_is_known_after_eight_rewards() -> None:
    budget = KnapsackBudget()
    assert torch.tensor(budget.rate(KEYS[0])).isnan()
    budget.observe(visit([1.0, 0.0, 0.4], [1.0] * 8), Reduce())
    assert torch.tensor(budget.rate(KEYS[0])).isnan()
    assert budget.rate(KEYS[1]) == 1
    budget.observe(visit([0.0] * 4 + [0.5, NAN]), Reduce())
    assert budget.rate(KEYS[0]) == 2 / 8


def test_the_rate_is_that_of_the_latest_visit_or_of_the_newest_sixteen() -> None:
    budget = KnapsackBudget()
    budget.observe(visit([1.0] * 20), Reduce())
    assert budget.rate(KEYS[0]) == 1
    budget.observe(visit([0.0] * 4), Reduce())
    assert budget.rate(KEYS[0]) == 12 / 16
    budget.observe(visit([0.0] * 15 + [1.0] * 5), Reduce())
    assert budget.rate(KEYS[0]) == 5 / 20


def test_what_is_allocated() -> None:
    budget = KnapsackBudget(least=3)
    assert budget.allocate(PROMPTS, 24).tolist() == [8, 8, 8]
    budget.observe(visit([0.0] * 8, [1.0] * 8), Reduce())
    assert budget.allocate(PROMPTS, 24).tolist() == [13, 3, 8]


def test_prompts_without_any_reward_stay_unknown() -> None:
    budget = KnapsackBudget()
    budget.observe(visit([NAN] * 9), Reduce())
    assert len(budget.memory) == 0


def test_two_processes_remember_what_one_would() -> None:
    alone, shared = KnapsackBudget(), KnapsackBudget()
    alone.observe(visit([1.0, 0.0] * 4, [0.0] * 8), Reduce())
    other = KnapsackBudget()
    other.observe(visit([1.0, 0.0] * 4, [0.0] * 8), Reduce())
    row = other.memory.get(KEYS[1])
    shared.observe(visit([1.0, 0.0] * 4), Two([(KEYS[1], row)]))
    one, two = alone.state_dict(), shared.state_dict()
    assert torch.equal(one["keys"], two["keys"])
    assert torch.equal(one["values"], two["values"])


def test_it_goes_through_a_checkpoint() -> None:
    budget, again = KnapsackBudget(), KnapsackBudget()
    budget.observe(visit([1.0, 0.0] * 5, [0.0] * 8), Reduce())
    file = io.BytesIO()
    torch.save(budget.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for part in (budget, again):
        part.observe(visit([1.0] * 3), Reduce())
    assert again.rate(KEYS[0]) == budget.rate(KEYS[0]) == pytest.approx(8 / 13)
    assert again.allocate(PROMPTS, 30).tolist() == budget.allocate(PROMPTS, 30).tolist()


@pytest.mark.parametrize("settings", [{}, {"least": 1}])
def test_the_budget_is_spent(settings: dict[str, Any]) -> None:
    budget = KnapsackBudget(**settings)
    budget.observe(visit([1.0, 0.0] * 4, [0.0] * 8), Reduce())
    counts = budget.allocate(PROMPTS, 30)
    assert int(counts.sum()) == 30
    assert int(counts[1]) > int(counts[0])
