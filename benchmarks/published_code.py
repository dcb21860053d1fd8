"""What the published code of GRADE did where it is not what its paper says: for reproduction, and for nothing else.

Named by `configs/paper_compat.yaml`, run from the repository's root; docs/reproduction.md says what came of it. GRADE
and GRADE-STE need no method of their own: theirs are a reward that reads the completion alone, and settings. The faults
are those of https://github.com/LukasNel/gradeste at commit 767fc39, which holds the published logs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import pad

from grade_lightning.distributed import Reduce
from grade_lightning.functional import divergences, sequences
from grade_lightning.functional.aggregation import sequence_mean, token_mean
from grade_lightning.functional.gates import clipped, reinforce
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.levels import token_level
from grade_lightning.modules import AlignmentModule, PolicyGradientModule
from grade_lightning.modules.measuring import measure
from grade_lightning.policies import Policy
from grade_lightning.records import Experience, Prompts, RelaxedRollout, Rollout, Scores, TokenStats
from grade_lightning.rewards import ClassifierReward
from grade_lightning.rollouts import Distribution, Engine
from grade_lightning.terms import Critic, Graphs, Term

AnyRollout = TypeVar("AnyRollout", Rollout, RelaxedRollout)


class CompletionReward(ClassifierReward):
    """Reads prompt and completion when it measures, and the completion alone when GRADE is trained on it.

    Args:
        **kwargs: those of :class:`~grade_lightning.rewards.ClassifierReward`.
    """

    def pathwise(self, rollout: Rollout) -> Scores:
        """Scores of the completion alone."""
        return super().pathwise(_alone(rollout))

    def relaxed(self, rollout: RelaxedRollout) -> Scores:
        """Scores of the soft completion alone."""
        return super().relaxed(_alone(rollout))


def _alone(rollout: AnyRollout) -> AnyRollout:
    return replace(rollout, prompt_ids=rollout.prompt_ids[:, :0], prompt_mask=rollout.prompt_mask[:, :0])


class WithoutContext(Engine):
    """Samples so that only the first token sees the prompt; each later one sees nothing but the token before it.

    That is what `generate` of transformers before 5.24 does to a model in training mode with gradient checkpointing: it
    drops the key-value cache at every layer and warns once.
    """

    @torch.no_grad()
    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        """One completion for each prompt."""
        mask, seen, eos_ids = prompts.mask, prompts.ids, policy.eos_ids
        tokens, logps = [], []
        with policy.evaluating() as model:
            for step in range(distribution.max_new_tokens):
                width = seen.shape[1]
                places = sequences.position_ids(mask)[:, -width:]
                found = model(input_ids=seen, attention_mask=mask[:, -width:], position_ids=places, use_cache=False)
                dist = distribution.logits(found.logits[:, -1], eos_ids, positions=step).log_softmax(-1)
                seen = dist.exp().multinomial(1)
                tokens.append(seen)
                logps.append(dist.gather(1, seen))
                mask = pad(mask, (0, 1), value=1)
        completion = torch.cat(tokens, dim=1)
        kept = sequences.completion_mask(completion, eos_ids)
        length = int(kept.sum(-1).max())
        return Rollout(
            prompt_ids=prompts.ids,
            prompt_mask=prompts.mask,
            completion_ids=completion.masked_fill(~kept, policy.tokenizer.pad_token_id)[:, :length],
            completion_mask=kept[:, :length],
            engine_logps=torch.cat(logps, dim=1).masked_fill(~kept, 0)[:, :length],
            tokenizer=policy.tokenizer,
            columns=prompts.columns,
            eos_ids=eos_ids,
        )


def penalised(seen: Experience) -> Tensor:
    """Reward less β times the mean of log π − log π_ref over the tokens, (B,)."""
    mask = seen.rollout.completion_mask
    drift = sequences.masked_sum(seen.old.log_ratio, mask) / mask.sum(-1)
    return seen.scores.total - seen.beta * drift


class PublishedBaseline(PolicyGradientModule):
    """What the two published baselines have in common: rollouts without context; validation and test sample properly.

    Log-probabilities are those of the whole vocabulary, although completions are sampled from a part of it.
    """

    def draw(self, prompts: Prompts, groups: Tensor | None = None) -> Rollout:
        """Completions without context."""
        rollout = WithoutContext().generate(self.policy, self.sampler.distribution, prompts)
        return rollout if groups is None else replace(rollout, groups=groups)

    def measure(self, rollout: Rollout, known: TokenStats | None = None, graphs: Graphs = "log_ratio") -> TokenStats:
        """Of the whole vocabulary."""
        own = self.sampler.distribution
        whole = Distribution(own.max_new_tokens, temperature=own.temperature)
        values = None if self.critic is None else self.critic.values
        return measure(self.policy, whole, rollout, known, graphs, values)

    def check_first_batch(self, rollout: Rollout) -> None:
        """It would find the fault."""


def standardised_over_the_batch(seen: Experience, reduce: Reduce) -> Tensor:
    """The same for all tokens of a completion; with two completions always ±0.707."""
    rewards = penalised(seen)
    standard = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    return standard.unsqueeze(1).expand_as(seen.rollout.completion_mask)


class PublishedReinforce(PublishedBaseline):
    """REINFORCE whose advantages are standardised over the batch. The moving baseline cancels, whatever it is.

    Args:
        kl: the KL to the reference, of which β alone counts.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.
    """

    def __init__(self, kl: KL = KL(0.01), **kwargs: Any) -> None:
        super().__init__(
            advantage=standardised_over_the_batch,
            level=token_level,
            gate=by_advantage(reinforce),
            aggregate=sequence_mean,
            clips=False,
            kl=kl,
            **kwargs,
        )


def advantages_over_the_batch(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates from completion to completion, where they should go from token to token.

    Args:
        rewards: of each token, (B, T).
        values: (B, T); those of padding count, too.
        mask: which tokens are the completion's, (B, T).
        gamma: discount.
        lam: of the estimates.

    Example:
        >>> rewards, mask = torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.ones(2, 2)
        >>> advantages_over_the_batch(rewards, torch.zeros(2, 2), mask, gamma=1.0, lam=0.5)
        tensor([[0.0000, 2.5000],
                [0.0000, 3.0000]])
    """
    estimates, following = torch.zeros_like(values), torch.zeros_like(values[0])
    later = following
    for row in reversed(range(len(rewards))):
        errors = rewards[row] + gamma * following * mask[row] - values[row]
        estimates[row] = later = errors + gamma * lam * mask[row] * later
        following = values[row]
    return estimates


def published_estimates(seen: Experience, gamma: float, lam: float) -> Tensor:
    """Estimates over the batch; the reward stands in the last column, behind the end of a completion that ended early.

    So no token but the last of the longest completions knows of a reward (its own, and those of the completions below
    it); the advantages of all others are made of values.
    """
    assert seen.old.values is not None
    rewards = torch.zeros_like(seen.old.values)
    rewards[:, -1] = penalised(seen)
    return advantages_over_the_batch(rewards, seen.old.values, seen.rollout.completion_mask, gamma, lam)


def published_advantages(seen: Experience, reduce: Reduce, gamma: float, lam: float) -> Tensor:
    """Those estimates, less their mean, over their (biased) standard deviation."""
    estimates = published_estimates(seen, gamma, lam)
    spread, mean = torch.std_mean(estimates[seen.rollout.completion_mask], correction=0)
    return (estimates - mean) / (spread + 1e-8)


def published_returns(seen: Experience, reduce: Reduce, gamma: float, lam: float) -> Tensor:
    """What the values are trained to predict."""
    assert seen.old.values is not None
    return published_estimates(seen, gamma, lam) + seen.old.values


class EntropyBonus(Term):
    """−coefficient × mean entropy of the tokens.

    Args:
        entropy: of each token of a rollout, (B, T), with its graph.
        coefficient: per nat.
    """

    def __init__(self, entropy: Callable[[Rollout], Tensor], coefficient: float) -> None:
        self.entropy, self.coefficient = entropy, coefficient

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """The bonus, and nothing to log."""
        mask = seen.rollout.completion_mask
        entropy = sequences.masked_sum(self.entropy(seen.rollout), mask).sum() / mask.sum()
        return -self.coefficient * entropy, {}


class PublishedPPO(PublishedBaseline):
    """PPO whose advantages run over the batch instead of over the tokens.

    Args:
        epsilon: the ratio is clipped to 1 ± ε; there is no gradient where it is beyond exp(±2).
        epsilon_value: a value moves by at most this much from what it was at the time of sampling.
        vf_coef: weight of the value loss.
        gamma: discount.
        lam: λ of the generalised advantage estimates.
        entropy_coef: of an entropy bonus, per nat.
        epochs: how often the completions of a window are used.
        kl: the KL to the reference, of which β alone counts.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.
    """

    def __init__(
        self,
        epsilon: float = 0.2,
        epsilon_value: float = 0.2,
        vf_coef: float = 0.1,
        gamma: float = 1.0,
        lam: float = 0.95,
        entropy_coef: float = 0.01,
        epochs: int = 4,
        kl: KL = KL(0.05),
        **kwargs: Any,
    ) -> None:
        def gate(ratio: Tensor, seen: Experience) -> Tensor:
            cut: Tensor = clipped(ratio, seen.advantages, 1 - epsilon, 1 + epsilon)
            return cut.masked_fill(ratio.log().abs() > 2, 0)

        def entropy(rollout: Rollout) -> Tensor:
            inputs, length = self.policy.embed(rollout.ids[:, :-1]), rollout.completion_ids.shape[1]
            logits = self.policy(inputs, rollout.mask[:, :-1], length)
            return sequences.entropy(self.sampler.distribution.log_distribution(logits))

        returns = partial(published_returns, gamma=gamma, lam=lam)
        super().__init__(
            advantage=partial(published_advantages, gamma=gamma, lam=lam),
            level=token_level,
            gate=gate,
            aggregate=token_mean,
            clips=True,
            critic=Critic(token_mean, returns, epsilon_value, vf_coef),
            terms=[EntropyBonus(entropy, entropy_coef)],
            epochs=epochs,
            kl=kl,
            **kwargs,
        )


class PublishedKL(Callback):
    """Logs `published/kl`, nats per token: the policy's distribution *of* a token against the reference's *after* it.

    It is far from 0 where policy and reference are one, and nothing that is trained depends on it.
    """

    @torch.no_grad()
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the weights move."""
        assert isinstance(pl_module, AlignmentModule)
        own, (rollout, _, _) = pl_module.policy, pl_module.last_rollout
        mask, length = rollout.completion_mask, rollout.completion_ids.shape[1]
        with own.evaluating():
            of = own(own.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], length)
        after = own.frozen.logits(own.frozen.embed(rollout.ids), rollout.mask, length)
        kl = divergences.categorical_kl(of.log_softmax(-1), after.log_softmax(-1))
        pl_module.log("published/kl", sequences.masked_sum(kl, mask).sum() / mask.sum(), batch_size=len(mask))
