"""Curvature: tokens whose step would move objective or policy too far are not trained on."""

from collections.abc import Callable, Iterable

from torch import Tensor

from grade_lightning.columns import Columns
from grade_lightning.errors import check_range
from grade_lightning.functional.curvature import objective_change, policy_change
from grade_lightning.functional.scores import score_fisher, score_norm
from grade_lightning.numerics import widened
from grade_lightning.records import Experience
from grade_lightning.selection import Selection


class CurvatureMask(Selection, Columns):
    """Tokens of which a gradient step, by the model of the last layer, changes objective and policy only a little.

    Args:
        rate: says the learning rate that the step is going to have.
        objective: the predicted change of the objective lies below this, on both sides of 0.
        policy: the predicted change of the policy lies below this.

    References:
        | CAPO: Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning
          (Melo et al., 2025), https://arxiv.org/abs/2510.00819
    """

    names = ("score_norm", "score_fisher", "hidden_norm")

    def __init__(self, rate: Callable[[], float], objective: float, policy: float) -> None:
        check_range("(0, inf]", max_objective_change=objective, max_policy_change=policy)
        self.rate = rate
        self.objective = objective
        self.policy = policy

    def columns(self, logps: Tensor, tokens: Tensor, hidden: Tensor) -> Iterable[Tensor]:
        """|v|² and vᵀFv of the score v, and |h|² of the hidden state."""
        yield score_norm(logps, tokens)
        yield score_fisher(logps, tokens)
        yield widened(hidden).square().sum(-1)

    def tokens(self, seen: Experience) -> Tensor:
        """Those below both bounds."""
        norms, fishers, hidden = (seen.old.columns[name] for name in self.names)
        rate = self.rate()
        far = objective_change(seen.advantages, norms, fishers, hidden, rate).abs() >= self.objective
        return ~(far | (policy_change(seen.advantages, norms, hidden, rate) >= self.policy))
