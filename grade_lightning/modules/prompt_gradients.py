"""What a frozen model says of the tokens that were put into its prompts: their gradient, and how likely they are."""

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.estimators import TokenEstimator
from grade_lightning.functional.exchanges import exchange_gains
from grade_lightning.functional.replay import Adjoint, replay
from grade_lightning.functional.sequences import token_logps
from grade_lightning.policies import Policy
from grade_lightning.records import Rollout, Scores
from grade_lightning.rollouts import Distribution

from .slots import columns_of


def prompt_gains(
    policy: Policy,
    distribution: Distribution,
    rollout: Rollout,
    scores: Scores,
    tokens: Tensor,
    hops: int | Literal["exact"],
    estimator: TokenEstimator,
) -> Tensor:
    """What each token would gain in each place of the prompt, to first order, in the mean reward; (n, V).

    Args:
        policy: the model.
        distribution: which the completions were sampled from.
        rollout: completions of prompts with the tokens in them.
        scores: of the completions, with adjoints.
        tokens: those that were put in, (n,).
        hops: how often the gradient is carried to earlier tokens of a completion.
        estimator: how a sampled token passes its gradient on.
    """
    length, places = rollout.completion_ids.shape[1], columns_of(rollout, len(tokens))
    inputs, table = policy.embed(rollout.ids[:, :-1]).detach().requires_grad_(), policy.table()
    vocabulary = policy.vocabulary(rollout.take(policy.hidden(inputs, rollout.mask[:, :-1], length)))
    direct = [Adjoint(rollout.take(part.gradient), part.table) for part in scores.adjoints]
    count = length - 1 if hops == "exact" else min(int(hops), length - 1)
    through = distribution.through(estimator, rollout, 1.0)
    found = replay(vocabulary, inputs, table, direct, through, rollout.positions, length, count)
    (gradient,) = torch.autograd.grad(vocabulary.hidden, inputs, vocabulary.pull(found.cotangent))
    rows = torch.arange(len(places), device=places.device).unsqueeze(1)
    return exchange_gains(gradient[rows, places].mean(0), table, tokens)


@torch.no_grad()
def place_logps(policy: Policy, rollout: Rollout, count: int) -> Tensor:
    """Mean log-probabilities, over the prompts, of all tokens in each of `count` places; (n, V).

    In a place that nothing precedes they are 0: the model has no opinion there.
    """
    places = columns_of(rollout, count)
    states = policy.hidden(policy.embed(rollout.prompt_ids), rollout.prompt_mask, rollout.prompt_ids.shape[1])
    found = []
    for place in places.unbind(1):
        before = states[torch.arange(len(states), device=place.device), (place - 1).clamp(min=0)]
        logps = policy.vocabulary(before).at(slice(None)).float().log_softmax(-1)
        first = rollout.prompt_mask.cumsum(-1).gather(1, place.unsqueeze(1)) == 1
        found.append(logps.masked_fill(first, 0.0).mean(0))
    return torch.stack(found)


def prompt_logp(policy: Policy, rollout: Rollout, tokens: Tensor) -> Tensor:
    """Mean log-probability of the tokens that were put into the prompts, in nats per token."""
    return token_logps(place_logps(policy, rollout, len(tokens)), tokens).mean()


def readable_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Tokens that are text by themselves: no special ones, no parts of a character; (size,), bool."""
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[token] for token in range(min(size, len(tokenizer)))])
    whole = [bool(text) and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text for text in texts]
    allowed = [readable and i not in special for i, readable in enumerate(whole)]
    return torch.tensor(allowed + [False] * (size - len(allowed)))


def is_text(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens are those of their text."""
    text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return bool(tokenizer(text, add_special_tokens=False)["input_ids"] == tokens)
