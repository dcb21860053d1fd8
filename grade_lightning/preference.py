"""What the methods that learn from preferences share: pairs of completions, from data or from the reward."""

from abc import abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.functional import pad

from grade_lightning.errors import InputError, check_range
from grade_lightning.module import AlignmentModule, Experience, StepOutput
from grade_lightning.policies import Policy
from grade_lightning.rewards import NoReward, Reward
from grade_lightning.rollouts import Rollout, Sampler
from grade_lightning.rows import repeat_prompts


class PreferenceModule(AlignmentModule):
    """Makes the preferred one of two completions likelier than the other, each compared with the reference.

    Args:
        policy: the language model; the bundled one by default.
        reward: ranks the rollouts, and is measured in evaluation; by default the bundled classifier, with pairs from
            data none.
        judges: further rewards that are logged and never trained on.
        sampler: how completions are drawn. Its temperature is that of the log-probabilities, too.
        beta: how strongly the policy is held to its reference.
        pairs: `rollouts`: of each prompt's completions the best and the worst by the reward; `data`: the columns
            `prompt`, `chosen` and `rejected`.
        num_generations: completions for each prompt, for pairs from rollouts.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        reward: Reward | None = None,
        judges: list[Reward] | None = None,
        sampler: Sampler | None = None,
        beta: float = 0.1,
        pairs: Literal["rollouts", "data"] = "rollouts",
        num_generations: int = 4,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if pairs == "data" and reward is None:
            reward = NoReward()
        super().__init__(policy, reward, judges, sampler, beta, optimizer, lr_scheduler)
        check_range("(0, inf)", beta=beta)
        check_range("[2, inf)", num_generations=num_generations)
        self.pairs = pairs
        self.num_generations = num_generations
        self.view = "pairs" if pairs == "data" else "prompts"

    @abstractmethod
    def pair_loss(self, chosen: Tensor, rejected: Tensor, mask: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of each pair, (b,).

        Args:
            chosen: log π − log π_ref of the tokens of the preferred completions, (b, T), 0 outside of them.
            rejected: and of the others.
            mask: which tokens are the completions', each (b, T).
        """

    def rows_per_batch(self, batch_size: int) -> int:
        """Pairs or prompts, of which `batch_size` completions come."""
        each = 2 if self.pairs == "data" else self.num_generations
        if batch_size % each:
            raise InputError(
                f"data.batch_size = {batch_size}: must be a multiple of {each}, the completions of a prompt"
            )
        return batch_size // each

    def explore(self, batch: dict[str, Any]) -> Experience:
        """Pairs: the first half of the rows is preferred to the second, row by row."""
        if self.pairs == "data":
            rollout = pairs_rollout(batch, self.policy)
            return Experience(rollout, self.reward.score(rollout))  # given, not sampled
        rollout = self.sampler(self.policy, **repeat_prompts(batch, self.num_generations))
        scores = self.score(rollout)
        grouped = scores.total.unflatten(0, (-1, self.num_generations))
        best, worst = grouped.nan_to_num(nan=-torch.inf).argmax(-1), grouped.nan_to_num(nan=torch.inf).argmin(-1)
        first = torch.arange(len(grouped), device=best.device) * self.num_generations
        rows = torch.cat([first + best, first + worst])
        return Experience(rollout.select(rows), scores.select(rows))

    def loss(self, experience: Experience) -> StepOutput:
        """Mean loss over the pairs; 0 for those of which neither completion is better."""
        rollout = experience.rollout
        now = self.measure(rollout)
        ratio = now.log_ratio.masked_fill(~rollout.completion_mask, 0)
        chosen, rejected = ratio.chunk(2)
        mask = rollout.completion_mask.chunk(2)
        losses = self.pair_loss(chosen, rejected, (mask[0], mask[1]))
        decided = torch.ones_like(losses, dtype=torch.bool)
        if self.pairs == "rollouts":
            better, worse = experience.scores.total.chunk(2)
            decided = (better > worse) | better.isinf()  # infinite ones must reach the loss, which leaves the step out
        margin = (chosen.sum(-1) - rejected.sum(-1)).detach()
        count = decided.sum().clamp(min=1)
        return StepOutput(
            loss=losses.masked_fill(~decided, 0).mean(),
            logps=now.logps.detach(),
            kl=now.kl.detach(),
            entropy=now.entropy,
            log_ratio=now.log_ratio.detach(),
            metrics={
                "accuracy": ((margin > 0) & decided).sum() / count,
                "margin": margin.masked_fill(~decided, 0).sum() / count,
                "undecided": 1 - decided.float().mean(),
            },
        )


def pairs_rollout(batch: dict[str, Any], policy: Policy) -> Rollout:
    """Completions of the data in the form of a rollout: the chosen ones, then the rejected ones.

    Nobody sampled them here, so their `logps` are NaN.
    """
    longest = max(batch["chosen_ids"].shape[1], batch["rejected_ids"].shape[1])
    ids, masks = (
        torch.cat(
            [pad(x, (0, longest - x.shape[1]), value=value) for x in (batch[f"chosen_{n}"], batch[f"rejected_{n}"])]
        )
        for n, value in (("ids", policy.tokenizer.pad_token_id), ("mask", 0))
    )
    return Rollout(
        prompt_ids=batch["input_ids"].repeat(2, 1),
        prompt_mask=batch["attention_mask"].repeat(2, 1),
        completion_ids=ids,
        completion_mask=masks.bool(),
        logps=torch.full(ids.shape, torch.nan, device=ids.device),
        tokenizer=policy.tokenizer,
        columns={name: values * 2 for name, values in batch["columns"].items()},
        eos_ids=policy.eos_ids,
    )
