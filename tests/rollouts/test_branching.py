"""Branching: when, from where, and as many completions of each prompt as without it."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Branching, Distribution, Engine, TransformersEngine, Turns
from grade_lightning.rollouts.branching import same_prompts
from tests.conftest import make_prompts
from tests.rollouts.rolling import make_policy
from tests.rollouts.test_turns import Scripted, Talks

LENGTH = 40


class Told(Engine):
    """Real tokens, whose log-probabilities are told: those of the first turn of a conversation, and of later ones."""

    def __init__(self, first: float, later: float) -> None:
        self.first, self.later, self.rounds = first, later, [0]

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        self.rounds.append(len(prompts))
        said = TransformersEngine().generate(policy, distribution, prompts)
        later = (prompts.ids == 5).any(-1, keepdim=True)  # an answer of the environment is there
        told = torch.where(later, self.later, self.first).float()
        return replace(said, engine_logps=told.expand(said.completion_ids.shape) * said.completion_mask)


def given(counts: list[int]) -> Prompts:
    """Prompts without a 5, each as often as said."""
    prompts = Prompts.of({name: x[: len(counts)] for name, x in make_prompts().items()} | {"columns": {}})
    ids = torch.where(prompts.ids == 5, 6, prompts.ids)
    return replace(prompts, ids=ids).repeat(torch.tensor(counts))


def draw(engine: Turns, prompts: Prompts, seed: int = 0) -> Rollout:
    policy = make_policy()
    torch.manual_seed(seed)
    return engine.generate(policy, Distribution(max_new_tokens=LENGTH), prompts)


def branching(engine: Engine | None = None, **settings: Any) -> Branching:
    return Branching(Talks, max_turns=3, turn_tokens=3, engine=engine, **settings)


def trunk_lengths(rollout: Rollout, rows: range) -> list[int]:
    """Tokens that each completion has in common with the first of its prompt."""
    ids = rollout.completion_ids[rows.start : rows.stop]
    return (ids == ids[0]).long().cumprod(-1).sum(-1).tolist()


def test_everything_begun_at_once_is_what_turns_draw() -> None:
    all_at_once = Branching(Talks, share=1.0, max_turns=3, engine=Scripted())
    one = all_at_once.generate(make_policy(), Distribution(), given([2, 3]))
    two = Turns(Talks, max_turns=3, engine=Scripted()).generate(make_policy(), Distribution(), given([2, 3]))
    for name in ("completion_ids", "completion_mask", "sampled", "turns", "engine_logps"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert one.columns == two.columns


@pytest.mark.parametrize("settings", [{"probability": 0.0}, {"probability": 1.0, "penalty": 0.0}, {}], ids=str)
@pytest.mark.parametrize("counts", [[4, 4], [1, 5], [2, 3]], ids=str)
def test_each_prompt_has_as_many_completions_as_without_it(counts: list[int], settings: dict[str, Any]) -> None:
    """In the order of the prompts, each a whole conversation."""
    prompts = given(counts)
    rollout = draw(branching(**settings), prompts)
    assert torch.equal(rollout.prompt_ids, prompts.ids)
    assert len(rollout.columns["returns"]) == sum(counts) == len(rollout.completion_ids)
    assert rollout.sampled.any(-1).all()
    assert rollout.turns is not None
    told = rollout.turns.masked_fill(~rollout.sampled, -1)
    for row in range(sum(counts)):
        numbers = sorted(set(told[row][rollout.sampled[row]].tolist()))
        assert numbers == list(range(len(numbers)))
    assert rollout.engine_logps is not None
    assert (rollout.engine_logps[rollout.sampled] < 0).all()


def test_a_branch_begins_from_before_a_later_turn() -> None:
    """The first turn and its answer are the trunk's; what the environment heard there is remembered on its own."""
    certain, unsure = Told(-0.1, -0.1), Told(-0.1, -9.0)
    settings: dict[str, Any] = {"share": 0.25, "probability": 0.0001, "weight": 1.0, "penalty": 0.0}
    rollout = draw(branching(unsure, **settings), given([4]), seed=1)
    assert rollout.turns is not None
    trunk = int((rollout.turns[0] == 0).sum())
    assert unsure.rounds[1:3] == [1, 1]  # the trunk alone, until its second turn is drawn
    assert trunk_lengths(rollout, range(4))[1] >= trunk > 0
    assert rollout.columns["returns"] == [3.0] * 4  # 1 and 2 for two turns, and none for the third
    draw(branching(certain, **settings), given([4]), seed=1)
    assert certain.rounds[1:] == [1, 1, 1, 3, 3, 3]  # no branch: the other three are drawn whole


def test_branches_in_a_row_are_punished() -> None:
    """With a penalty of 1 the second turn branches, and the third, of either, does not."""
    free, held = Told(-0.1, -9.0), Told(-0.1, -9.0)
    settings: dict[str, Any] = {"share": 0.1, "probability": 0.9, "weight": 1.0}
    draw(branching(free, penalty=0.0, **settings), given([6]))
    draw(branching(held, penalty=1.0, **settings), given([6]))
    assert free.rounds[1:5] == [1, 1, 2, 3]
    assert held.rounds[1:5] == [1, 1, 2, 1]


def test_the_same_seed_draws_the_same() -> None:
    one, two = (draw(branching(), given([4, 4]), seed=3) for _ in range(2))
    assert torch.equal(one.completion_ids, two.completion_ids)
    assert not torch.equal(one.completion_ids, draw(branching(), given([4, 4]), seed=4).completion_ids)


def test_rows_of_the_same_prompt_stand_together() -> None:
    prompts = given([2, 1, 2])
    assert same_prompts(prompts) == [[0, 1], [2], [3, 4]]
    assert same_prompts(replace(prompts, columns={"label": [0, 1, 1, 2, 2]})) == [[0], [1], [2], [3, 4]]


def test_what_it_cannot_work_with_is_said() -> None:
    class Held(Talks):
        def __init__(self) -> None:
            self.lock = threading.Lock()

    class Silent(Scripted):
        def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
            return replace(super().generate(policy, distribution, prompts), engine_logps=None)

    held = Branching(Held, share=0.1, probability=1.0, penalty=0.0, engine=Scripted())
    with pytest.raises(InputError, match=r"environment Held: it cannot be copied \(.*lock.*\), as Branching does"):
        held.generate(make_policy(), Distribution(), given([2]))
    with pytest.raises(InputError, match="engine Silent: it does not return the probabilities of its tokens"):
        Branching(Talks, engine=Silent()).generate(make_policy(), Distribution(), given([2]))
