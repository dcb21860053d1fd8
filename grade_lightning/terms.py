"""Terms: a method's loss is a sum of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from grade_lightning.advantages import Advantage
from grade_lightning.distributed import Reduce
from grade_lightning.errors import check_range
from grade_lightning.functional import advantages, divergences, losses, ratios
from grade_lightning.functional.aggregation import Normalizers, token_mean
from grade_lightning.functional.sequences import masked_sum
from grade_lightning.gates import Gate
from grade_lightning.kl import KL
from grade_lightning.levels import Level, token_level
from grade_lightning.policies import ValueHead
from grade_lightning.records import Experience, TokenStats
from grade_lightning.stateful import Stateful

Aggregate: TypeAlias = Callable[[Tensor, Normalizers], Any]  # a Tensor; to jsonargparse a jaxtyping one is another type
"""(mask, normalizers) → weight of each token, (B, T)."""
Graphs = Literal["logps", "log_ratio", "entropy", "kl"]
"""Up to which of the token statistics the training pass keeps graphs, in this order."""
GRAPHS: tuple[Graphs, ...] = get_args(Graphs)
"""The same as a tuple."""


def furthest(terms: "Sequence[Term]") -> Graphs:
    """Which graphs several terms need."""
    return max((term.graphs for term in terms), key=GRAPHS.index)


class Term(ABC):
    """One addend of a loss. It may be an `nn.Module` with parameters of its own, or :class:`Stateful`."""

    graphs: Graphs = "logps"
    """What it differentiates. For `kl` the reference is passed through in every training step."""

    @abstractmethod
    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar, and further scalars to log.

        Args:
            seen: what is trained on.
            now: statistics of the training pass, with their graphs.
            reduce: statistics over all processes.
        """


class PolicyLoss(Term):
    """The policy-gradient line: level, gate and aggregation of advantage × ∇log π.

    Args:
        gate: coefficient of each token.
        level: over what a ratio is taken.
        aggregate: weight of each token.
        clips: whether the gate cuts ratios off, so that the share of those is worth logging.
    """

    def __init__(self, gate: Gate, aggregate: Aggregate, level: Level = token_level, clips: bool = True) -> None:
        self.gate, self.level, self.aggregate, self.clips = gate, level, aggregate, clips

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """The line, and the share of tokens that the gate cuts off."""
        mask, old = seen.sampled, seen.old.logps

        def gate(ratio: Tensor, _: Tensor) -> Tensor:
            return self.gate(ratio, seen)

        def level(values: Tensor, _: Tensor) -> Tensor:
            return self.level(values, seen)

        weights = self.aggregate(mask, seen.normalizers)
        loss = losses.policy_loss(now.logps, old, seen.advantages, mask, weights, gate, level)
        if not self.clips:
            return loss, {}
        ratio = ratios.importance_ratio(now.logps, old, mask, level)
        gated = (self.gate(ratio, seen) != ratio) & mask & (seen.advantages != 0)
        return loss, {"clip_fraction": gated.sum() / mask.sum().clamp(min=1)}


class SecondLine(PolicyLoss):
    """The same line for advantages of another kind, which a method leaves in `seen.extra["advantages"]`.

    A gate looks at the sign of an advantage alone, so a weight between the two lines is a factor of their advantages.
    """

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """The line; what is clipped is of the first."""
        loss, _ = super().__call__(replace(seen, advantages=seen.extra["advantages"]), now, reduce)
        return loss, {}


class KLLoss(Term):
    """The KL to the reference, where it is in the loss.

    Args:
        kl: which estimate of it.
        aggregate: weight of each token.
    """

    def __init__(self, kl: KL, aggregate: Aggregate) -> None:
        self.kl, self.aggregate = kl, aggregate
        self.graphs = "kl" if kl.estimator == "full" else "log_ratio"

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """β times the estimate."""
        mask = seen.sampled
        weights = self.aggregate(mask, seen.normalizers)
        return seen.beta * self.kl.loss(now.logps, now.log_ratio, now.kl, mask, weights), {}


class TokenTerm(Term):
    """A sum over tokens, which weigh what they weigh in the method's own line.

    Args:
        aggregate: weight of each token instead.
    """

    name: str
    """Under which it is logged."""

    def __init__(self, aggregate: Aggregate | None = None) -> None:
        self.aggregate = aggregate

    @abstractmethod
    def values(self, seen: Experience, now: TokenStats) -> Tensor:
        """What is lowered at each token, (B, T)."""

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """Their weighted sum, also as a figure."""
        assert self.aggregate is not None
        weights = self.aggregate(seen.sampled, seen.normalizers)
        loss = (weights * self.values(seen, now).masked_fill(~seen.sampled, 0)).sum()
        return loss, {self.name: loss.detach()}


class Proximal(TokenTerm):
    """δ² / 2η, δ = log π − log π_old of a token: holds the policy near the one that sampled, without a clip.

    Beside a line without a ratio (Reinforce, RLOO) it makes (A − δ/η) ∇log π: one round of rewards is good for many
    cheap steps (`epochs`). At the first of them it is 0.

    Args:
        eta: nats that the log-probability of a token may move for each unit of advantage.
        aggregate: weight of each token; the method's by default.

    References:
        | Target-based Surrogates for Stochastic Optimization (Lavington et al., 2023), https://arxiv.org/abs/2302.02607
    """

    name = "proximal"

    def __init__(self, eta: float = 1.0, aggregate: Aggregate | None = None) -> None:
        super().__init__(aggregate)
        check_range("(0, inf]", "Proximal", eta=eta)
        self.eta = eta

    def values(self, seen: Experience, now: TokenStats) -> Tensor:
        """k2 towards the policy that sampled."""
        return divergences.k2(now.logps - seen.old.logps) / self.eta


class EntropyBonus(TokenTerm, Stateful):
    """−c H: raises the entropy of each token's distribution; with a target, as far as that.

    Args:
        coefficient: c, in reward per nat; at first, if there is a target.
        target: nats per token. While the entropy is below it c grows after each window; above it the bonus is off, and
            c shrinks. None: c stays.
        step: by which c grows or shrinks.
        aggregate: weight of each token; the method's by default.

    References:
        | with a target: Skywork Open Reasoner 1 Technical Report (He et al., 2025), https://arxiv.org/abs/2505.22312
    """

    name = "entropy_bonus"
    graphs = "entropy"

    def __init__(
        self,
        coefficient: float = 0.01,
        target: float | None = None,
        step: float = 0.005,
        aggregate: Aggregate | None = None,
    ) -> None:
        super().__init__(aggregate)
        check_range("[0, inf)", "EntropyBonus", coefficient=coefficient, target=target, step=step)
        self.coefficient = coefficient
        self.target = target
        self.step = step
        self.below = True
        """Whether the entropy of the latest window was below the target."""

    def values(self, seen: Experience, now: TokenStats) -> Tensor:
        """−c H."""
        return -(self.coefficient if self.below else 0.0) * now.entropy

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Move c, where there is a target."""
        if self.target is None:
            return
        self.below = mean_entropy(seen, reduce) < self.target
        self.coefficient = max(0.0, self.coefficient + (self.step if self.below else -self.step))

    def state_dict(self) -> dict[str, Any]:
        """c, and whether it counts."""
        return {"coefficient": self.coefficient, "below": self.below}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both; without a target c is what was set."""
        if self.target is not None:
            self.coefficient, self.below = state["coefficient"], state["below"]


def mean_entropy(seen: Experience, reduce: Reduce, mask: Tensor | None = None) -> float:
    """Nats per token of the policy that sampled, over the tokens of all processes that are trained on, or of a mask."""
    mask = seen.sampled if mask is None else mask
    total = masked_sum(seen.old.entropy, mask).sum()
    total, count = reduce.sum(torch.stack([total, mask.sum().to(total.dtype)]))
    return float(total / count.clamp(min=1))


class Critic(nn.Module, Term):
    """A value head on the policy's hidden states, and its loss.

    Args:
        aggregate: weight of each token.
        targets: what it is to predict, (experience, statistics over processes) → (B, T); by default the undiscounted
            reward from each token on.
        epsilon: a value moves by at most this much from what it was at the time of sampling.
        coefficient: weight of the value loss.
        trunk: `shared`: the value loss trains the policy's network, too; `detached`: the value head alone.

    References:
        | The N+ Implementation Details of RLHF with PPO (Huang et al., 2024), https://arxiv.org/abs/2403.17031
    """

    def __init__(
        self,
        aggregate: Aggregate = token_mean,
        targets: Advantage | None = None,
        epsilon: float = 0.2,
        coefficient: float = 0.1,
        trunk: Literal["shared", "detached"] = "shared",
    ) -> None:
        super().__init__()
        check_range("[0, inf]", epsilon_value=epsilon)
        check_range("[0, inf)", vf_coef=coefficient)
        self.targets = targets or _rewards_to_go
        self.aggregate = aggregate
        self.epsilon = epsilon
        self.coefficient = coefficient
        self.trunk = trunk
        self.head: ValueHead | None = None

    def build(self, width: int) -> None:
        """Make the head for hidden states of this width; nothing happens the second time."""
        self.head = self.head or ValueHead(width)

    def values(self, hidden: Tensor) -> Tensor:
        """Values of hidden states; (…, width) → (…)."""
        assert self.head is not None
        found: Tensor = self.head(hidden.detach() if self.trunk == "detached" else hidden)
        return found

    def forward(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped loss, and how much of the returns' variance the values explain."""
        old, returns, mask = seen.old.values, seen.returns, seen.mask
        assert old is not None
        assert now.values is not None
        assert returns is not None
        errors = losses.clipped_value_loss(now.values, old, returns, self.epsilon)
        loss = (errors * self.aggregate(mask, seen.normalizers)).sum()
        unexplained, whole = (advantages.mean_and_variance(x, mask, reduce.sum)[1] for x in (returns - old, returns))
        figures = {"value/loss": loss.detach(), "value/explained_variance": 1 - unexplained / whole}
        return self.coefficient * loss, figures


def _rewards_to_go(seen: Experience, reduce: Reduce) -> Tensor:
    return advantages.discounted_returns(seen.token_rewards(), seen.mask)


class DriftPenalty(Term):
    """½ coefficient · max(0, KL(π_old‖π) − slack)², the KL as the mean of log π_old − log π over sampled tokens.

    It acts from the second step of a window on. The KL is that of all processes; with gradient accumulation it is each
    micro-batch's own.

    Args:
        coefficient: of the squared excess.
        slack: how large the KL may be, nats per token.

    References:
        | DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization (Li et al., 2025),
          https://arxiv.org/abs/2510.04474
    """

    def __init__(self, coefficient: float = 1e3, slack: float = 1e-4) -> None:
        check_range("[0, inf)", coefficient=coefficient, slack=slack)
        self.coefficient = coefficient
        self.slack = slack

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """The excess, as far as its gradient goes, and the KL."""
        weights = token_mean(seen.mask, seen.normalizers)
        drift = (weights * (seen.old.logps - now.logps)).masked_fill(~seen.mask, 0).sum()
        mean = reduce.mean(drift.detach())
        return self.coefficient * (mean - self.slack).clamp(min=0) * drift, {"drift": mean}
