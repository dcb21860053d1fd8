"""Rewards of turns: where they arrive, and who is credited with them."""

from typing import Any

import pytest
import torch

from grade_lightning.advantages import GAE
from grade_lightning.errors import InputError
from grade_lightning.kl import KL
from grade_lightning.methods import STPPO, ReinforcePlusPlus, TurnPPO
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.records import Experience, Prompts
from grade_lightning.rewards import TurnRewards, WeightedSum
from grade_lightning.rollouts import Distribution, Turns
from tests.conftest import make_prompts
from tests.modules.seams import Tool, make_turns, two_turns
from tests.rollouts.rolling import make_policy
from tests.rollouts.test_turns import Scripted, Talks

pytestmark = pytest.mark.usefixtures("own_random_state")


class Fragile(Talks):
    """Fails in the first turn where the row says so."""

    def step(self, text: str) -> tuple[list[dict[str, str]], float | None, bool]:
        if self.last == 0:
            raise TimeoutError("no answer")
        return super().step(text)


def test_each_reward_is_at_the_last_token_of_its_turn() -> None:
    """Of one, of three turns (the third without a reward), and of a completion whose environment failed."""
    columns = Prompts.of(make_prompts((3, 2, 3)) | {"columns": {"last": [1, 9, 0]}})
    with pytest.warns(UserWarning, match="TimeoutError"):
        rollout = Turns(Fragile, max_turns=3, engine=Scripted()).generate(make_policy(), Distribution(), columns)
    assert rollout.columns["turn_rewards"] == [[1.0], [1.0, 2.0, 0.0], None]
    scores = TurnRewards().score(rollout)
    assert scores.total.tolist()[:2] == [1.0, 3.0]
    assert scores.total[2].isnan()
    assert scores.per_token is not None
    assert rollout.sampled[1].int().tolist() == [1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert scores.per_token.tolist() == [[0, 1, *[0] * 11], [0, 1, 0, 0, 0, 0, 2, *[0] * 6], [0] * 13]
    half = WeightedSum([TurnRewards()], [0.5]).score(rollout.select(torch.tensor([1, 0])))
    assert half.per_token is not None
    assert half.per_token.tolist()[0] == [0, 0.5, 0, 0, 0, 0, 1, *[0] * 6]


def test_without_an_environment_there_are_none() -> None:
    module = make_turns()
    rollout = module.draw(Prompts.of(make_prompts()))
    rollout.turns = None
    with pytest.raises(InputError, match=r"^reward TurnRewards: no rewards for turns .*--model\.sampler\.engine Turns"):
        TurnRewards()(rollout)


class FirstCounts(Tool):
    """Gives 1, 2, … to the first turns of the completions, in their order, and 5 to each second one."""

    made = 0

    def reset(self, row: dict[str, Any]) -> list[dict[str, str]]:
        type(self).made += 1
        self.number = self.made
        return []

    def step(self, text: str) -> tuple[list[dict[str, str]], float | None, bool]:
        answer, _, over = super().step(text)
        return answer, 5.0 if over else float(self.number), over


def drawn(method: type[PolicyGradientModule], **kwargs: Any) -> tuple[PolicyGradientModule, Experience]:
    """A window of it, with values that are 0."""
    FirstCounts.made = 0
    module = make_turns(method, reward=TurnRewards(), kl=KL(), **kwargs)
    module.sampler = two_turns(FirstCounts)
    return module, module.collect(make_prompts((4, 3, 5)) | {"columns": {}})


@pytest.mark.parametrize("method", [TurnPPO, STPPO])
def test_a_turn_is_not_credited_with_what_was_given_before_it(method: type[PolicyGradientModule]) -> None:
    """What is to come, token by token: both rewards in the first turn, the second's alone in the second."""
    module, seen = drawn(method, lam=1.0)
    gae = module.advantage
    assert isinstance(gae, GAE)
    gae.average = 0.0
    found = gae.returns(seen, module.reduce)  # whatever the value head says
    rollout = seen.rollout
    assert rollout.turns is not None
    for row in range(len(found)):
        for turn, truth in ((0, row + 1 + 5.0), (1, 5.0)):
            own = found[row][rollout.sampled[row] & (rollout.turns[row] == turn)]
            torch.testing.assert_close(own, torch.full_like(own, truth))


def test_a_method_without_values_credits_turns_as_well() -> None:
    """Whitened: the first turns differ, the second ones do not."""
    _, seen = drawn(ReinforcePlusPlus, num_generations=1, minibatches=2)
    assert seen.rollout.turns is not None
    first, second = (
        [seen.advantages[row][seen.sampled[row] & (seen.rollout.turns[row] == turn)].unique() for row in range(3)]
        for turn in (0, 1)
    )
    assert all(len(own) == 1 for own in first + second)
    assert second[0] == second[1] == second[2]
    assert first[0] < first[1] < first[2]
    assert second[2] < first[0]


def test_turn_rewards_are_in_a_checkpoint_in_mid_window() -> None:
    """Columns of plain lists are packed; the scores have their own."""
    module, seen = drawn(TurnPPO)
    again = Experience.unpack(seen.pack(), module.policy.tokenizer)
    assert again.rollout.columns["turn_rewards"] == seen.rollout.columns["turn_rewards"] == [[1, 5], [2, 5], [3, 5]]
    assert torch.equal(again.scores.at_tokens(seen.mask), seen.scores.at_tokens(seen.mask))
