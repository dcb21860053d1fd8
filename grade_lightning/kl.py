"""The KL to the reference as an object: its estimator, where it acts, how strongly, and which tokens are charged."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError, check_range
from grade_lightning.functional import divergences, duals, sequences
from grade_lightning.records import Experience
from grade_lightning.stateful import Stateful

Estimator = Literal["k1", "k2", "k3", "full"]
Placement = Literal["reward", "loss", "both"]
Credit = Literal["token", "sequence"]


@dataclass(frozen=True)
class KL:
    """How a policy gradient is held to the reference. Which choices are unbiased: docs/methods/kl.md.

    Args:
        beta: coefficient β; in the reward, reward per nat. 0: no KL in the objective (it is logged all the same).
        estimator: `k1`, `k2`, `k3` of the sampled tokens, or `full`: the exact KL of each position's distribution.
        placement: in the `reward`, without a gradient of its own; in the `loss`, differentiated; or in `both`.
        credit: `token`: in the reward each token is charged with the KL from itself on, in the loss each position with
            its own. `sequence`: in the reward all tokens are charged with the whole sum; in the loss the estimate is of
            the whole sequence, with all of its gradient (`full`: the score term of the KL that follows is added, which
            in `both` is the reward's).
        target: make β adaptive: it moves until the KL is this many nats per sequence.
        horizon: how slowly, in completions.
        rate: make the target a bound instead: β grows by this for each nat beyond it, and shrinks likewise below it, to
            0 at least; it may begin there (dual ascent).
        every: where nothing is trained on the KL (`beta` 0), measure it in every so many optimizer steps alone: the
            others save the reference's pass, and log no KL.

    References:
        | adaptive β: Fine-Tuning Language Models from Human Preferences (Ziegler et al., 2019),
          https://arxiv.org/abs/1909.08593
        | placements: A Comedy of Estimators (Shah et al., 2025), https://arxiv.org/abs/2512.21852
        | the score term: On a few pitfalls in KL divergence gradient estimation for RL (Tang & Munos, 2025),
          https://arxiv.org/abs/2506.09477

    Example:
        >>> KL(0.1).in_reward, KL(0.1).in_loss
        (True, False)
    """

    beta: float = 0.0
    estimator: Estimator = "k1"
    placement: Placement = "reward"
    credit: Credit = "token"
    target: float | None = None
    horizon: int = 10_000
    rate: float | None = None
    every: int = 1

    def __post_init__(self) -> None:
        """Check the numbers and name a choice whose gradient is not the KL's."""
        check_range("[0, inf)", "kl", beta=self.beta)
        check_range("(0, inf)", "kl", target=self.target)
        check_range("[1, inf)", "kl", horizon=self.horizon)
        check_range("(0, inf)", "kl", rate=self.rate)
        check_range("[1, inf)", "kl", every=self.every)
        if self.every > 1 and self.acts:
            raise InputError(f"kl.every = {self.every}: with a kl.beta or kl.rate the KL is needed in every step")
        if self.rate is not None and self.target is None:
            raise InputError("kl.rate: needs a kl.target, which it makes a bound")
        if self.target is not None and not self.acts:
            raise InputError("kl.target: needs a kl.beta above 0 to start from, or a kl.rate")
        if self.fault is not None:
            rank_zero_warn(f"kl: {self.fault}")

    @property
    def acts(self) -> bool:
        """Whether β is above 0, or may come to be."""
        return self.beta > 0 or self.rate is not None

    @property
    def in_reward(self) -> bool:
        """Whether the reward is lowered by it."""
        return self.acts and self.placement != "loss"

    @property
    def in_loss(self) -> bool:
        """Whether the loss has a term of it."""
        return self.acts and self.placement != "reward"

    @property
    def fault(self) -> str | None:
        """What is wrong with this choice, where its gradient does not hold the policy to the reference."""
        if not self.acts:
            return None
        if self.estimator == "k1" and self.placement == "loss":
            return (
                "k1 in the loss has an expected gradient of 0: it adds noise and restrains nothing; "
                "put it in the reward, or use k2 or full"
            )
        if self.estimator != "k1" and self.placement == "reward":
            return (
                f"{self.estimator} in the reward alone leaves out its own gradient, and what is left is far from the "
                "KL's (near the reference it all but vanishes); use k1 there, or placement loss or both"
            )
        return None

    def estimates(self, log_ratio: Tensor, exact: Tensor) -> Tensor:
        """The estimate at each position.

        Args:
            log_ratio: log π − log π_ref of the sampled tokens, (B, T).
            exact: KL of the distributions, (B, T).

        Returns:
            (B, T), nats.
        """
        return exact if self.estimator == "full" else divergences.ESTIMATORS[self.estimator](log_ratio)

    def penalty(self, log_ratio: Tensor, exact: Tensor, mask: Tensor) -> Tensor:
        """What β multiplies in the reward of each token, without a graph; (B, T).

        By `sequence` all of it is at the last token, as a part of the completion's reward.
        """
        log_ratio, exact = (x.detach().masked_fill(~mask, 0) for x in (log_ratio, exact))
        if self.credit == "token":
            return self.estimates(log_ratio, exact)
        whole = self.estimates(log_ratio.sum(-1), exact.sum(-1))
        return torch.where(sequences.last_token(mask), whole.unsqueeze(-1), 0)

    def loss(self, logps: Tensor, log_ratio: Tensor, exact: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        """What β multiplies in the loss.

        Args:
            logps: log π of the sampled tokens, (B, T), with its graph.
            log_ratio: log π − log π_ref, (B, T), with its graph.
            exact: KL of the distributions, (B, T), with its graph if the estimator is `full`.
            mask: tokens that are trained on, (B, T).
            weights: of each token, (B, T), constant within a sequence.

        Returns:
            A scalar.
        """
        log_ratio, exact = (x.masked_fill(~mask, 0) for x in (log_ratio, exact))
        if self.estimator == "full" and self.credit == "sequence" and self.placement == "loss":
            score = divergences.later(exact.detach()) * logps.masked_fill(~mask, 0)
            return (weights * (exact + score)).sum()  # the value is not the KL's; the gradient is
        if self.credit == "token":
            return (weights * self.estimates(log_ratio, exact)).sum()
        return (weights.amax(-1) * self.estimates(log_ratio.sum(-1), exact.sum(-1))).sum()

    def adapted(self, beta: float, kl: float, completions: int) -> float:
        """The next β, after `completions` with a mean KL of `kl` nats per sequence.

        Example:
            >>> round(KL(0.1, target=5.0, horizon=100).adapted(0.1, kl=10.0, completions=10), 4)
            0.102
        """
        if self.target is None or math.isnan(kl):
            return beta
        if self.rate is not None:
            return duals.ascended(beta, kl - self.target, self.rate)
        return duals.scaled(beta, kl / self.target, min(1.0, completions / self.horizon))


class Coefficient(Stateful):
    """β as it is now: fixed, or moved by what the KL was.

    Args:
        kl: the settings.
    """

    def __init__(self, kl: KL) -> None:
        self.kl = kl
        self.beta = kl.beta

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Move β towards the target, where there is one."""
        if self.kl.target is not None:
            kl = sequences.masked_sum(seen.old.kl, seen.rollout.sampled)
            total, count = reduce.sum(torch.stack([kl.sum(), kl.new_tensor(len(kl))])).tolist()
            self.beta = self.kl.adapted(self.beta, total / count, int(count))

    def state_dict(self) -> dict[str, Any]:
        """β, where it moves."""
        return {} if self.kl.target is None else {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume a moving β; a fixed one is what the user set."""
        if self.kl.target is not None:
            self.beta = state.get("beta", self.beta)
