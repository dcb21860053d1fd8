"""What the published code of GRADE did where it is not what its paper says: for reproduction, and for nothing else.

Named by `configs/paper_compat.yaml`; docs/reproduction.md says what came of it. GRADE and GRADE-STE need no method of
their own: theirs are a reward that reads the completion alone, and settings. The faults are those of
https://github.com/LukasNel/gradeste at commit 767fc39, which holds the published logs.
"""

from dataclasses import replace
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import pad

from grade_lightning.functional import divergences, policy, sequences
from grade_lightning.functional.policy import Totals
from grade_lightning.methods import PPO, Reinforce
from grade_lightning.module import AlignmentModule, Measured, StepOutput
from grade_lightning.policies import Policy
from grade_lightning.policy_gradient import PolicyExperience, PolicyGradientModule
from grade_lightning.rewards import ClassifierReward, Scores
from grade_lightning.rollouts import RelaxedRollout, Rollout, Sampler
from grade_lightning.rows import repeat_prompts

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


@torch.no_grad()
def sample_without_context(
    sampler: Sampler,
    policy: Policy,
    input_ids: Tensor,
    attention_mask: Tensor,
    columns: dict[str, list[Any]] | None = None,
) -> Rollout:
    """Sample so that only the first token sees the prompt; each later one sees nothing but the token before it.

    That is what `generate` of transformers before 5.24 does to a model in training mode with gradient checkpointing: it
    drops the key-value cache at every layer and warns once.

    Args:
        sampler: the distribution, and how long.
        policy: the policy.
        input_ids: prompts, (B, P), padded on the left.
        attention_mask: (B, P).
        columns: other columns of the rows.
    """
    mask, seen, eos_ids = attention_mask, input_ids, policy.eos_ids
    tokens, logps = [], []
    with policy.evaluating() as model:
        for step in range(sampler.max_new_tokens):
            width = seen.shape[1]
            places = sequences.position_ids(mask)[:, -width:]
            found = model(input_ids=seen, attention_mask=mask[:, -width:], position_ids=places, use_cache=False)
            dist = sampler.logits(found.logits[:, -1], eos_ids, positions=step).log_softmax(-1)
            seen = dist.exp().multinomial(1)
            tokens.append(seen)
            logps.append(dist.gather(1, seen))
            mask = pad(mask, (0, 1), value=1)
    completion = torch.cat(tokens, dim=1)
    kept = sequences.completion_mask(completion, eos_ids)
    length = int(kept.sum(-1).max())
    return Rollout(
        prompt_ids=input_ids,
        prompt_mask=attention_mask,
        completion_ids=completion.masked_fill(~kept, policy.tokenizer.pad_token_id)[:, :length],
        completion_mask=kept[:, :length],
        logps=torch.cat(logps, dim=1).masked_fill(~kept, 0)[:, :length],
        tokenizer=policy.tokenizer,
        columns=columns or {},
        eos_ids=eos_ids,
    )


class PublishedBaseline(PolicyGradientModule):
    """What the two published baselines have in common: rollouts without context, and a KL that is a mean over tokens.

    Log-probabilities are those of the whole vocabulary, although completions are sampled from a part of it.
    """

    def sample(self, batch: dict[str, Any]) -> tuple[Rollout, Scores]:
        """Completions without context; validation and test sample as they should."""
        rollout = sample_without_context(self.sampler, self.policy, **repeat_prompts(batch, self.num_generations))
        return rollout, self._score(rollout)

    def penalised(self, experience: PolicyExperience) -> Tensor:
        """Reward less β times the mean of log π − log π_ref over the tokens, (B,)."""
        assert experience.old is not None
        mask = experience.rollout.completion_mask
        drift = sequences.masked_sum(experience.old.log_ratio, mask) / mask.sum(-1)
        return experience.scores.total - self.beta * drift

    def _distributions(self, rollout: Rollout, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        whole = self.sampler.log_distribution(logits)
        return whole, whole

    def _check_first_batch(self, rollout: Rollout, step: StepOutput) -> None:
        """It would find the fault."""


class PublishedReinforce(PublishedBaseline, Reinforce):
    """REINFORCE whose advantages are standardised over the batch: with two completions always ±0.707.

    The moving baseline cancels, whatever it is.

    Args:
        **kwargs: those of :class:`~grade_lightning.methods.Reinforce`.
    """

    def advantages(self, experience: PolicyExperience) -> Tensor:
        """The same for all tokens of a completion."""
        rewards = self.penalised(experience)
        standard = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        return standard.unsqueeze(1).expand_as(experience.rollout.completion_mask)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Mean over a completion's tokens, mean over completions."""
        return policy.sequence_mean(mask, totals)


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


class PublishedPPO(PublishedBaseline, PPO):
    """PPO whose advantages run over the batch instead of over the tokens.

    The reward stands in the last column, behind the end of a completion that ended early. So no token but the last of
    the longest completions knows of a reward (its own, and those of the completions below it); the advantages of all
    others are made of values.

    Args:
        entropy_coef: of an entropy bonus, per nat.
        **kwargs: those of :class:`~grade_lightning.methods.PPO`.
    """

    def __init__(self, entropy_coef: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.entropy_coef = entropy_coef

    def appraise(self, experience: PolicyExperience) -> PolicyExperience:
        """Advantages over the batch, less their mean, over their (biased) standard deviation."""
        assert experience.old is not None
        assert experience.old.values is not None
        mask, values = experience.rollout.completion_mask, experience.old.values
        rewards = torch.zeros_like(values)
        rewards[:, -1] = self.penalised(experience)
        estimates = advantages_over_the_batch(rewards, values, mask, self.gamma, self.lam)
        spread, mean = torch.std_mean(estimates[mask], correction=0)
        return replace(experience, advantages=(estimates - mean) / (spread + 1e-8), returns=estimates + values)

    def objective(self, experience: PolicyExperience, now: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """With the entropy bonus."""
        loss, metrics = super().objective(experience, now)
        rollout, mask = experience.rollout, experience.rollout.completion_mask
        logits = self.policy(self.policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], mask.shape[1])
        entropy = sequences.entropy(self.sampler.log_distribution(logits))
        return loss - self.entropy_coef * sequences.masked_sum(entropy, mask).sum() / mask.sum(), metrics

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """PPO's clip, and nothing where the ratio is beyond exp(±2)."""
        return super().gate(ratio, advantages).masked_fill(ratio.log().abs() > 2, 0)


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
        after = own.reference_logits(own.reference_embed(rollout.ids), rollout.mask, length)
        kl = divergences.categorical_kl(of.log_softmax(-1), after.log_softmax(-1))
        pl_module.log("published/kl", sequences.masked_sum(kl, mask).sum() / mask.sum(), batch_size=len(mask))
