"""The gradient at the tokens of a prompt, against autograd through one-hot prompts and the unrolled sampler."""

from typing import Literal

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from grade_lightning.estimators import StraightThrough
from grade_lightning.modules.prompt_gradients import is_text, place_logps, prompt_gains, prompt_logp, readable_tokens
from grade_lightning.modules.slots import columns_of, fill
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout, Scores
from grade_lightning.rewards import ClassifierReward
from grade_lightning.rollouts import Sampler
from tests.conftest import VOCABULARY, make_model, make_prompts, make_tokenizer, mostly_slow
from tests.rewards.making import make_classifier

TOKENS = torch.tensor([7, 12, 3])
NAMES = ["gpt2", "llama", "gemma3"]


def drawn(name: str) -> tuple[Policy, Sampler, Rollout, ClassifierReward]:
    """Completions that end early and do not, of prompts with the tokens in them."""
    policy = Policy.from_model(make_model(name, torch.float64), make_tokenizer())
    policy.requires_grad_(False)
    sampler = Sampler(max_new_tokens=6, temperature=0.9)
    prompts = fill(Prompts.of(make_prompts()), TOKENS.tolist(), make_tokenizer(), None)
    for seed in range(50):
        torch.manual_seed(seed)
        rollout = sampler(policy, prompts)
        if rollout.ended.any() and not rollout.ended.all():
            return policy, sampler, rollout, ClassifierReward.from_classifier(make_classifier())
    raise AssertionError("no rollout of the wanted kind")


def gains(name: str, hops: int | Literal["exact"]) -> tuple[Tensor, Tensor]:
    """Ours, and those of the straight-through sampler unrolled from one-hot prompts, whose tokens it may hold fixed."""
    policy, sampler, rollout, reward = drawn(name)
    scores: Scores = reward.pathwise(rollout)
    found = prompt_gains(policy, sampler.distribution, rollout, scores, TOKENS, hops, StraightThrough())

    places, table = columns_of(rollout, len(TOKENS)), policy.table()
    one_hot = torch.nn.functional.one_hot(rollout.prompt_ids, VOCABULARY).to(table.dtype).requires_grad_()
    inputs, tokens, mask = one_hot @ table, rollout.completion_ids, rollout.completion_mask
    judged, prompt = reward.table()[rollout.prompt_ids], rollout.prompt_ids.shape[1]
    for t in range(tokens.shape[1]):
        logits = policy(inputs, rollout.mask[:, : prompt + t], 1)
        sampled = sampler.distribution.logits(logits, rollout.eos_ids, tokens[:, t : t + 1])[:, 0]
        soft = sampled.softmax(-1)
        hard = torch.nn.functional.one_hot(tokens[:, t], VOCABULARY).to(soft.dtype)
        token = (hard + soft - soft.detach())[:, None]
        inputs = torch.cat([inputs, (token if hops == "exact" else hard[:, None]) @ table], dim=1)
        judged = torch.cat([judged, (token * mask[:, t, None, None]) @ reward.table()], dim=1)
    (gradient,) = torch.autograd.grad(reward.score_embeddings(judged, rollout.mask).mean(), one_hot)
    at = gradient[torch.arange(len(places)).unsqueeze(1), places].sum(0)
    return found, at - at.gather(1, TOKENS.unsqueeze(1))


@pytest.mark.parametrize("hops", [0, "exact"])
@pytest.mark.parametrize("name", mostly_slow(NAMES, "gpt2"))
def test_all_places_at_once_are_autograd_of_one_hot_prompts(name: str, hops: int | Literal["exact"]) -> None:
    """0 hops hold the completion's tokens fixed where they are inputs; exact ones are the unrolled sampler."""
    found, truth = gains(name, hops)
    assert found.shape == (3, VOCABULARY)
    assert truth.norm() > 1e-3
    # transformers computes some parts of other networks in float32
    assert float((found - truth).norm() / truth.norm()) < (1e-10 if name == "gpt2" else 1e-5)


def test_hops_add_what_later_tokens_say() -> None:
    none, exact = gains("gpt2", 0)[0], gains("gpt2", "exact")[0]
    assert float((none - exact).norm() / exact.norm()) > 1e-2


@pytest.mark.parametrize("first", [False, True])
def test_log_probabilities_of_a_place_are_means_over_prompts(first: bool) -> None:
    policy = Policy.from_model(make_model("gpt2", torch.float64), make_tokenizer())
    rows = make_prompts()
    slot = None if first else "w9"
    if not first:
        rows["input_ids"][:, -2] = 9
    given = fill(Prompts.of(rows), TOKENS.tolist(), make_tokenizer(), slot)
    ids = torch.full((3, 1), 5)
    rollout = Rollout(given.ids, given.mask, ids, ids > 0, None, make_tokenizer(), given.columns, [0])
    found = place_logps(policy, rollout, 3)
    logits = policy(policy.embed(given.ids), given.mask, given.ids.shape[1])
    places = columns_of(rollout, 3)
    truth = torch.stack([logits[i, places[i] - 1].log_softmax(-1) for i in range(3)]).mean(0)
    if first:
        assert not found[0].any()
        truth[0] = 0
    torch.testing.assert_close(found, truth.float(), rtol=1e-4, atol=1e-4)
    assert float(prompt_logp(policy, rollout, TOKENS)) == pytest.approx(
        float(truth.gather(1, TOKENS.unsqueeze(1)).mean()), abs=1e-4
    )


def test_readable_tokens_are_neither_special_nor_beyond_the_tokenizer() -> None:
    tokenizer = make_tokenizer()
    found = readable_tokens(tokenizer, VOCABULARY + 2)
    assert found.nonzero().flatten().tolist() == list(range(2, VOCABULARY))


def test_tokens_that_would_be_read_as_others_are_no_text() -> None:
    inner = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert is_text([2, 0], tokenizer)
    assert is_text([1, 0], tokenizer)
    assert not is_text([0, 1], tokenizer)
