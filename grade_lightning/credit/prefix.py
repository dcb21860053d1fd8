"""Credit by what the reward says of beginnings: a baseline for each token."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional.advantages import discounted_returns, gae, off_others
from grade_lightning.functional.sequences import last_token
from grade_lightning.records import Experience, Rollout, Scores
from grade_lightning.rewards import Reward

from .base import Credit, groups_of


class PrefixCredit(Credit):
    """The baseline of a token is what the reward says of the text before it: credit for what its own token did.

    The reward of the beginning of a text is known without a further pass where the reward is a causal network. At
    position t it is V_t, and V_0 that of the prompt. With η the slope of rewards on V_t − V_0 within a prompt,

        A_t = R − η (V_t − V_0), less the mean of the same over the prompt's other completions.

    V_t depends on earlier tokens alone, so the mean of the gradient is that of the method, however badly it predicts.

    Args:
        lam: λ of generalised advantage estimates, of which V_t is the value. Below 1 the value is trusted beyond what
            can be proven: less noise, and a bias.
        decay: of the moving averages, in batches.

    References:
        | Baselines of states: Policy Gradient Methods for Reinforcement Learning with Function Approximation (Sutton et
          al., 1999), https://proceedings.neurips.cc/paper/1999/hash/464d828b85b0bed98e80ade0a5c43b0f-Abstract.html
        | λ: High-Dimensional Continuous Control Using Generalized Advantage Estimation (Schulman et al., 2015),
          https://arxiv.org/abs/1506.02438
        | The reward's own scores of beginnings as the value are ours.
    """

    def __init__(self, lam: float = 1.0, decay: float = 0.98) -> None:
        super().__init__(decay)
        check_range("[0, 1]", "credit", lam=lam)
        self.lam = lam

    def check(self, reward: Reward) -> None:
        """It must score the beginnings of texts."""
        if not reward.reads_prefixes:
            reward.with_prefixes(None)  # type: ignore[arg-type]  # says what to do instead

    def begin(self, reward: Reward, rollout: Rollout, learns: bool) -> Callable[[], Scores]:
        """With the reward of what stands before each token."""
        return partial(reward.with_prefixes, rollout)

    def adjust(self, seen: Experience, advantages: Tensor) -> Tensor:
        """Less what was known before each token."""
        start, values = self._values(seen)
        values, mask = self.slope * values, seen.mask
        at_end = last_token(mask) * (seen.rewards.nan_to_num(nan=0.0).unsqueeze(1) - start)
        known = discounted_returns(at_end, mask) - gae(at_end, values, mask, lam=self.lam)
        return advantages - self.share_of(seen, advantages, known, mask) * off_others(known, mask, groups_of(seen))

    def products(self, seen: Experience) -> Tensor:
        """Over all tokens, rewards and values less those of the prompt's other completions."""
        (_, values), mask, groups = self._values(seen), seen.mask, groups_of(seen)
        rewards = seen.rewards.nan_to_num(nan=0.0).unsqueeze(1).expand_as(values)
        alone = off_others(mask.to(values), mask, groups)  # 1 where no other completion has the position
        r, d = (off_others(x, mask, groups) * (1 - alone) for x in (rewards, values))
        return torch.stack([(d * r).sum(), d.square().sum(), r.square().sum()])

    def _values(self, seen: Experience) -> tuple[Tensor, Tensor]:
        """V_0, (B, 1), and V_t − V_0, (B, T)."""
        assert seen.scores.prefixes is not None
        found = seen.scores.prefixes.nan_to_num(0.0, 0.0, 0.0)
        start = found.gather(1, seen.rollout.sampled.long().argmax(-1, keepdim=True))
        return start, found - start
