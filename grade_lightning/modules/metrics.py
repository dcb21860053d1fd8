"""What is logged of a training step, over all processes, with one synchronisation."""

from collections.abc import Callable

import torch
from torch import Tensor

from grade_lightning.functional import divergences
from grade_lightning.functional.sequences import masked_sum
from grade_lightning.records import Rollout, Scores, StepOutput, TokenStats

Gather = Callable[[Tensor], Tensor]
"""(b, …) → the rows of all processes, one after another."""


class StepMeter:
    """Makes the figures of each step, and counts what was spent: sampled tokens and scored completions.

    The counts are of all processes and are saved in checkpoints: methods are compared at equal ones.
    """

    def __init__(self) -> None:
        self.spent = {"sampled_tokens": torch.tensor(0), "reward_calls": torch.tensor(0)}
        """In training so far."""
        self._uncounted = [0, 0]

    def count(self, rollout: Rollout) -> None:
        """Remember what was sampled and scored."""
        self._uncounted[0] += len(rollout.positions)
        self._uncounted[1] += len(rollout.ids)

    def figures(
        self, rollout: Rollout, scores: Scores, step: StepOutput, beta: float, gather: Gather
    ) -> dict[str, Tensor]:
        """All scalars of a step by their names."""
        mask, stats = rollout.sampled, step.stats
        kl = masked_sum(stats.kl, mask)
        one = kl.new_ones(())
        tokens, rows = mask.sum(), one * len(kl)
        reward, answered = _answered(scores.total)  # indexing those that answered would wait for the device
        mean = reward / answered.clamp(min=1)
        spread = (scores.total - mean).square().nansum()
        terms = {  # of each figure a sum and what it is divided by, over all processes
            "train/loss": (step.loss, one),
            "train/reward": (reward, answered),
            "train/reward_std": (spread, answered),
            **(self._kl(kl, stats, mask) if stats.referenced else {}),
            "train/entropy": (masked_sum(stats.entropy, mask).sum(), tokens),
            "train/response_length": (tokens, rows),
            "train/eos_rate": (rollout.ended.sum(), rows),
            **{name if "/" in name else f"train/{name}": (value, one) for name, value in step.metrics.items()},
            **{f"rewards/{name}": _answered(value) for name, value in scores.parts.items()},
            **{name: (one * count, one) for name, count in zip(self.spent, self._uncounted, strict=True)},
        }
        packed = torch.stack([torch.stack([x.detach().float() for x in pair]) for pair in terms.values()])
        every = gather(packed.unsqueeze(0))  # (processes, figures, 2); one synchronisation for all
        sums, counts = every.sum(0).unbind(1)
        logged, total = dict(zip(terms, sums / counts, strict=True)), dict(zip(terms, sums, strict=True))
        for name, before in self.spent.items():
            self.spent[name] = before.to(sums.device) + total[name].long()
            logged[f"train/{name}"] = self.spent[name].float()
            del logged[name]
        self._uncounted = [0, 0]
        # to the spread within the processes that of their means; squares less a square would lose it to rounding
        rewards, answers = every[:, list(terms).index("train/reward")].unbind(1)
        apart = (answers * (rewards / answers - logged["train/reward"]).square()).nansum() / answers.sum()
        logged["train/reward_std"] = (logged["train/reward_std"] + apart).sqrt()
        price = beta * logged["train/kl"] if stats.referenced else 0.0  # without it nothing is charged
        logged["train/objective"] = logged["train/reward"] - price
        return logged

    def _kl(self, kl: Tensor, stats: TokenStats, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What is said of the distance to the reference."""
        rows = kl.new_tensor(1.0) * len(kl)
        estimates = {
            f"train/kl_{name}": (masked_sum(estimate(stats.log_ratio), mask).sum(), rows)
            for name, estimate in divergences.ESTIMATORS.items()
        }
        return {"train/kl": (kl.sum(), rows), "train/kl_per_token": (kl.sum(), mask.sum()), **estimates}


def _answered(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of those that are not NaN."""
    return values.nansum(), (~values.isnan()).sum()
