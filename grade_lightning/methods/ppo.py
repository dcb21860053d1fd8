"""Proximal policy optimisation, with a value head."""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import advantages, policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.module import Measured
from grade_lightning.policies import ValueHead
from grade_lightning.policy_gradient import PolicyExperience, PolicyGradientModule
from grade_lightning.rollouts import Rollout


class PPO(PolicyGradientModule):
    """Advantages from a learned value of each position, and a clipped ratio over several epochs.

    Args:
        epsilon: the ratio is clipped to 1 ± ε.
        epsilon_value: a value moves by at most this much from what it was at the time of sampling.
        vf_coef: weight of the value loss.
        gamma: discount.
        lam: λ of the generalised advantage estimates.
        decay: of the moving average of the rewards that is taken off each reward, so that a value of 0 is right at
            first. Without it the first updates would reward ending early.
        trunk: `shared`: the value loss trains the policy's network, too; `detached`: the value head alone.
        epochs: how often the completions of a window are used.
        kl: the KL to the reference.
        **kwargs: those of :class:`~grade_lightning.policy_gradient.PolicyGradientModule`.

    References:
        | Proximal Policy Optimization Algorithms (Schulman et al., 2017), https://arxiv.org/abs/1707.06347
        | The N+ Implementation Details of RLHF with PPO (Huang et al., 2024), https://arxiv.org/abs/2403.17031
    """

    def __init__(
        self,
        epsilon: float = 0.2,
        epsilon_value: float = 0.2,
        vf_coef: float = 0.1,
        gamma: float = 1.0,
        lam: float = 0.95,
        decay: float = 0.9,
        trunk: Literal["shared", "detached"] = "shared",
        epochs: int = 4,
        kl: KL = KL(0.05),
        **kwargs: Any,
    ) -> None:
        super().__init__(epochs=epochs, kl=kl, **kwargs)
        check_range("[0, inf]", epsilon=epsilon, epsilon_value=epsilon_value)
        check_range("[0, inf)", vf_coef=vf_coef)
        check_range("[0, 1]", gamma=gamma, lam=lam, decay=decay)
        self.epsilon = epsilon
        self.epsilon_value = epsilon_value
        self.vf_coef = vf_coef
        self.gamma = gamma
        self.lam = lam
        self.decay = decay
        self.trunk = trunk
        self.value_head: ValueHead | None = None

    def configure_model(self) -> None:
        """Add the value head."""
        super().configure_model()
        self.value_head = self.value_head or ValueHead(self.policy.width)

    def measure(self, rollout: Rollout, known: Measured | None = None, exact_graph: bool = False) -> Measured:
        """As for every policy gradient, with values."""
        assert self.value_head is not None
        inputs, length = self.policy.embed(rollout.ids[:, :-1]), rollout.completion_ids.shape[1]
        hidden = self.policy.hidden(inputs, rollout.mask[:, :-1], length)
        values = self.value_head(hidden.detach() if self.trunk == "detached" else hidden)
        return replace(self._measured(rollout, hidden, known, exact_graph), values=values)

    def appraise(self, experience: PolicyExperience) -> PolicyExperience:
        """Generalised advantage estimates, whitened, and the returns that the values are to predict."""
        assert experience.old is not None
        assert experience.old.values is not None
        mask, values, scores = experience.mask, experience.old.values, experience.scores
        centred = replace(scores, total=scores.total - self.baseline(scores.total))
        rewards = self.token_rewards(replace(experience, scores=centred))
        estimates = advantages.gae(rewards, values, mask, self.gamma, self.lam)
        white = advantages.whiten(estimates, mask, self._total)
        return replace(experience, advantages=white, returns=estimates + values)

    def objective(self, experience: PolicyExperience, now: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss and the clipped loss of the values."""
        loss, metrics = super().objective(experience, now)
        old, values, returns, mask = experience.old, now.values, experience.returns, experience.mask
        assert old is not None
        assert old.values is not None
        assert values is not None
        assert returns is not None
        errors = policy.clipped_value_loss(values, old.values, returns, self.epsilon_value)
        value_loss = (errors * self.aggregate(mask, experience.totals)).sum()
        unexplained, whole = (
            advantages.mean_and_variance(x, mask, self._total)[1] for x in (returns - old.values, returns)
        )
        metrics |= {"value/loss": value_loss.detach(), "value/explained_variance": 1 - unexplained / whole}
        return loss + self.vf_coef * value_loss, metrics

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """PPO's clip."""
        return policy.clipped(ratio, advantages, 1 - self.epsilon, 1 + self.epsilon)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Mean over all tokens."""
        return policy.token_mean(mask, totals)
