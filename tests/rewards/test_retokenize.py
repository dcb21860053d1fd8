"""Scores of a reward that has another vocabulary than the policy."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grade_lightning.rewards import ClassifierReward
from grade_lightning.rewards.retokenize import retokenize
from tests.conftest import VOCABULARY, make_tokenizer
from tests.rewards.making import make_classifier, make_rollout, words_in


def test_another_vocabulary_is_scored_by_its_own_tokens(tmp_path: Path) -> None:
    """The same text in the policy's tokens and in others: the same score, with the EOS where it ended by itself."""
    make_classifier(dtype=torch.float32).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    order = [0, 1, *range(VOCABULARY - 1, 1, -1)]
    place = torch.tensor(order).argsort()
    same, rollout = ClassifierReward(str(tmp_path)), make_rollout()
    same.load(make_tokenizer(), VOCABULARY)
    other = replace(
        rollout,
        prompt_ids=place[rollout.prompt_ids],
        completion_ids=place[rollout.completion_ids],
        tokenizer=words_in(order),
    )
    reward = ClassifierReward(str(tmp_path))
    reward.load(words_in(order), VOCABULARY)
    assert rollout.ended.tolist() == [False, True, True]
    assert not torch.equal(other.ids, rollout.ids)
    torch.testing.assert_close(reward(other), same(rollout))


def test_its_own_tokens_beyond_the_context_are_cut_and_said() -> None:
    rollout = make_rollout()
    ids, mask = retokenize(rollout, make_tokenizer())[:2]
    with pytest.warns(UserWarning, match="of 3 texts are longer than its context of 4 tokens"):
        short, kept = retokenize(rollout, make_tokenizer(), room=4)[:2]
    assert torch.equal(short, ids[:, :4])
    assert torch.equal(kept, mask[:, :4])
