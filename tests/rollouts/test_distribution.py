"""The distribution of a token: the same in the training pass as in the sampler."""

from typing import Any

import pytest
import torch

from grade_lightning.records import Rollout
from grade_lightning.rollouts import Distribution
from tests.conftest import VOCABULARY, make_tokenizer
from tests.rollouts.rolling import SETTINGS, logps_of, make_policy, make_sampler, roll


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_training_pass_sees_the_sampled_distribution(settings: dict[str, Any]) -> None:
    policy, distribution = make_policy(), make_sampler(**settings).distribution
    rollout = roll(policy, **settings)
    with torch.no_grad():
        logits = policy(policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], rollout.completion_ids.shape[1])
    logps = distribution.logits(logits, rollout.eos_ids, rollout.completion_ids).log_softmax(-1)
    picked = logps.gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
    keep = rollout.completion_mask
    torch.testing.assert_close(picked[keep], logps_of(rollout)[keep], rtol=1e-4, atol=1e-4)


def test_sampled_tokens_stay_in_the_support() -> None:
    """Another kernel may round a sampled token out of the top-k set; its log-probability must stay finite."""
    logits = torch.tensor([[[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]])
    tokens = torch.tensor([[2, 2]])
    found = Distribution(top_k=2).logits(logits, [0], tokens)
    assert found.tolist() == [[[3.0, 2.0, 1.0], [-torch.inf, 2.0, 3.0]]]


def with_gaps() -> Rollout:
    """Two completions of five tokens, of which some are not the policy's own."""
    generator = torch.Generator().manual_seed(0)
    return Rollout(
        prompt_ids=torch.tensor([[2, 3], [4, 5]]),
        prompt_mask=torch.ones(2, 2, dtype=torch.int64),
        completion_ids=torch.randint(VOCABULARY, (2, 5), generator=generator),
        completion_mask=torch.ones(2, 5, dtype=torch.bool),
        engine_logps=None,
        tokenizer=make_tokenizer(),
        eos_ids=[0, 7],
        sampled=torch.tensor([[True, False, True, True, False], [False, True, True, False, True]]),
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_k": 4}, {"min_new_tokens": 3, "top_p": 0.9}])
def test_sampled_positions_have_the_distribution_of_their_place(settings: dict[str, Any]) -> None:
    """A few rows at a time: an end is masked by its place among the policy's own tokens."""
    rollout, distribution = with_gaps(), Distribution(**settings)
    logits = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(1))
    places = torch.tensor([[0, 1, 1, 2, 3], [0, 0, 1, 2, 2]])
    truth = rollout.take(distribution.logits(logits, rollout.eos_ids, rollout.completion_ids, places))
    whole = rollout.take(distribution.log_distribution(logits))
    for rows in (slice(0, 6), slice(0, 2), slice(2, 6)):
        taken = rollout.take(logits)[rows]
        assert torch.equal(distribution.sampled_logits(rollout, taken, rows), truth[rows])
        sampled, dist = distribution.both(rollout, taken, rows)
        assert torch.equal(sampled, truth[rows].log_softmax(-1))
        assert torch.equal(dist, whole[rows])
    assert distribution.truncates == bool(settings)
    assert bool(truth.isinf().any()) == distribution.truncates
