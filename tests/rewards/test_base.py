"""What every reward says of itself."""

from collections.abc import Callable

import pytest

from grade_lightning.errors import InputError
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.rewards import ClassifierReward, Reward, WeightedSum
from tests.rewards.making import constant


@pytest.mark.parametrize(
    "make",
    [
        lambda: constant(1),
        lambda: WeightedSum([constant(1)]),
        lambda: WeightedSum([constant(1), ClassifierReward()]),
        lambda: WeightedSum([ClassifierReward(), constant(1)]),
        lambda: WeightedSum([ClassifierReward(), WeightedSum([ClassifierReward(), constant(1)])]),
    ],
    ids=["alone", "sum", "first", "last", "nested"],
)
def test_grade_says_at_construction_what_to_do_about_a_scalar_reward(make: Callable[[], Reward]) -> None:
    """Before anything is loaded."""
    with pytest.raises(InputError, match=r"reward rule: not differentiable.*ClassifierReward"):
        GradeSTE(Policy("nowhere"), make())
