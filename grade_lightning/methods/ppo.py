"""Proximal policy optimisation, with a value head."""

from typing import Any, Literal

from grade_lightning.advantages import GAE
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.terms import Critic


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
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

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
        check_range("[0, inf]", epsilon=epsilon)
        gae = GAE(gamma, lam, decay)
        super().__init__(
            advantage=gae,
            critic=Critic(token_mean, gae.returns, epsilon_value, vf_coef, trunk),
            level=token_level,
            gate=by_advantage(clipped, low=1 - epsilon, high=1 + epsilon),
            aggregate=token_mean,
            clips=True,
            epochs=epochs,
            kl=kl,
            **kwargs,
        )
