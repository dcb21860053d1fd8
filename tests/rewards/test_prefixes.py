"""Rewards of the beginnings of texts: one pass against the score of each beginning by itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.records import Rollout, Scores
from grade_lightning.rewards import ClassifierReward, GroupNormalizedSum, Reward, SequenceClassifierReward, WeightedSum
from tests.conftest import CONFIGS, VOCABULARY, make_tokenizer
from tests.rewards.making import constant, make_classifier, make_rollout, words_in
from tests.rewards.sequences import CHAT, words, write_classifier


def one_by_one(reward: Reward, rollout: Rollout) -> Tensor:
    """The score of what stands before each token, (B, T), each in a pass of its own."""
    ids, mask = rollout.prompt_ids, rollout.prompt_mask
    prompt = replace(
        rollout,
        prompt_ids=ids[:, :-1],
        prompt_mask=mask[:, :-1],
        completion_ids=ids[:, -1:],
        completion_mask=mask[:, -1:].bool(),
    )
    columns = [reward(prompt)]
    for length in range(1, rollout.completion_ids.shape[1]):
        shorter = rollout.completion_mask & (torch.arange(rollout.completion_ids.shape[1]) < length)
        columns.append(reward(replace(rollout, completion_mask=shorter)))
    return torch.stack(columns, 1)


def check(reward: Reward, rollout: Rollout) -> None:
    found, mask = reward.with_prefixes(rollout), rollout.completion_mask
    assert found.prefixes is not None
    torch.testing.assert_close(found.total, reward(rollout))
    torch.testing.assert_close(found.prefixes[mask], one_by_one(reward, rollout)[mask])
    assert found.prefixes[mask].std() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("output", ["probability", "logit"])
def test_a_mean_over_positions(name: str, output: str) -> None:
    check(ClassifierReward.from_classifier(make_classifier(name), output), make_rollout())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_score_at_the_last_token(kind: str, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, kind, words(), torch.float64)
    reward = SequenceClassifierReward(str(folder), dtype="float64", output="sigmoid", scale=3.0, shift=-1.0)
    reward.load(make_tokenizer(), VOCABULARY)
    check(reward, make_rollout())


def test_a_conversation_is_read_up_to_the_token(tmp_path: Path) -> None:
    """Without what the template writes after it: so the first value is that of the prompt's side of the template."""
    tokenizer = words()
    tokenizer.chat_template = CHAT
    reward = SequenceClassifierReward(str(write_classifier(tmp_path, "llama", tokenizer)))
    reward.load(make_tokenizer(), VOCABULARY)
    talk = [[{"role": "user", "content": "w7 w8"}]] * 3
    rollout = make_rollout(messages=talk)
    found, same = reward.with_prefixes(rollout), rollout.completion_ids.clone()
    same[0, 2:] = 9  # of the first completion
    other = reward.with_prefixes(replace(rollout, completion_ids=same))
    torch.testing.assert_close(found.total, reward(rollout))
    assert found.prefixes is not None
    assert other.prefixes is not None
    torch.testing.assert_close(found.prefixes[0, :3], other.prefixes[0, :3])
    assert (found.prefixes[0, 3] - other.prefixes[0, 3]).abs() > 1e-3


def test_a_network_that_sees_later_tokens_has_none(tmp_path: Path) -> None:
    reward = SequenceClassifierReward(str(write_classifier(tmp_path, "bert", words())))
    reward.load(make_tokenizer(), VOCABULARY)
    assert not reward.reads_prefixes
    with pytest.raises(InputError, match=r"does not score the beginnings of texts.*causal"):
        reward.with_prefixes(make_rollout())


def test_another_vocabulary_has_none(tmp_path: Path) -> None:
    make_classifier(dtype=torch.float32).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    reward = ClassifierReward(str(tmp_path))
    reward.load(words_in([0, 1, 3, 2, 4]), 5)
    assert not reward.reads_prefixes


def test_a_sum_is_that_of_the_parts_that_read_them() -> None:
    rollout, part = make_rollout(), ClassifierReward.from_classifier(make_classifier())
    whole = WeightedSum([part, constant(1.0, 2.0, 3.0)], [0.5, 2.0])
    found, own = whole.with_prefixes(rollout), part.with_prefixes(rollout)
    assert found.prefixes is not None
    assert own.prefixes is not None
    torch.testing.assert_close(found.prefixes, 0.5 * own.prefixes)
    torch.testing.assert_close(found.total, whole(rollout))
    assert not GroupNormalizedSum([part]).reads_prefixes
    alone = WeightedSum([constant(1.0, 2.0, 3.0)])
    with pytest.raises(InputError, match="WeightedSum: does not score the beginnings"):
        alone.with_prefixes(rollout)


def test_scores_keep_them() -> None:
    """Selected, joined with narrower ones, packed and unpacked."""
    one, two = (Scores(torch.zeros(2), {}, prefixes=torch.ones(2, width)) for width in (3, 2))
    joined = Scores.join([one, two])
    assert joined.prefixes is not None
    assert joined.prefixes.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]]
    again = Scores(**joined.select(torch.tensor([3, 0]), 2).pack())
    assert again.prefixes is not None
    assert again.prefixes.tolist() == [[1, 1], [1, 1]]
