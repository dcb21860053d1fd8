"""Turn-PPO: turns by separators, and PPO without them."""

import pytest
import torch

from grade_lightning.functional.ratios import turn_level
from grade_lightning.levels import sequence_level, turns_by
from grade_lightning.methods import PPO, TurnPPO
from tests.modules.toys import build, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


def test_with_a_turn_for_each_token_it_is_ppo_bit_for_bit() -> None:
    settings = {"epochs": 3, "num_generations": 1, "minibatches": 2}
    batches = prompts(8, size=1), prompts(8, size=1, seed=1)
    one = run(build(TurnPPO, **plain(TurnPPO, separator="", mean="tokens", **settings)), *batches)
    two = run(build(PPO, **plain(PPO, **settings)), *batches)
    assert max(step["train/clip_fraction"] for step in two.logged) > 0
    for ours, truth in zip(one.gradients, two.gradients, strict=True):
        assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_turns_end_with_the_separator() -> None:
    """The text of a token has it in it; without any the completion is one turn."""
    seen = build(PPO, **plain(PPO)).collect(prompts(4))
    rollout = seen.rollout
    values = torch.randn(rollout.sampled.shape, dtype=torch.float64)
    words = [[rollout.tokenizer.decode([i]) for i in row] for row in rollout.completion_ids.tolist()]
    ends = torch.tensor([["5" in word for word in row] for row in words])
    assert 5 < (ends & rollout.sampled).sum() < rollout.sampled.sum()
    turns = ends.long().cumsum(-1) - ends.long()
    assert torch.equal(turns_by("5")(values, seen), turn_level(values, rollout.sampled, turns))
    found, truth = turns_by("nowhere")(values, seen), sequence_level(values, seen)
    torch.testing.assert_close(found[rollout.sampled], truth[rollout.sampled])


def test_the_environment_s_turns_come_first() -> None:
    seen = build(PPO, **plain(PPO)).collect(prompts(4))
    seen.rollout.turns = (torch.arange(seen.sampled.shape[1]) // 3).expand(seen.sampled.shape)
    values = torch.randn(seen.sampled.shape, dtype=torch.float64)
    assert torch.equal(turns_by("5")(values, seen), turn_level(values, seen.sampled, seen.rollout.turns))
