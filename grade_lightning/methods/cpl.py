"""Contrastive preference learning, with a reference (CPL-KL) or without."""

from functools import partial
from typing import Any, Literal

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import preferences
from grade_lightning.modules.preference import PreferenceModule, Side


class CPL(PreferenceModule):
    """Learns from pairs without a reference: the chosen completion should have the higher score, α log π.

    Args:
        alpha: the temperature α of the policy; with a reference, how strongly the policy is held to it.
        contrastive_bias: λ in (0, 1], a factor of the rejected score; below 1 it favours policies that are likely on
            the data. With a reference and 1, without cloning and over sums, this is DPO.
        bc_coeff: weight of behaviour cloning: −log π per token, without which a λ below 1 makes all texts unlikely.
        bc_on: clone the `chosen` completions, or `both`.
        score: S is the `mean` of log π over the completion's tokens, which knows no length, or the `sum`.
        reference_free: S is of log π; else of log π − log π_ref (CPL-KL).
        **kwargs: those of :class:`~grade_lightning.modules.PreferenceModule`.

    References:
        | Contrastive Preference Learning: Learning from Human Feedback without RL (Hejna et al., 2023),
          https://arxiv.org/abs/2310.13639
    """

    def __init__(
        self,
        alpha: float = 1.0,
        contrastive_bias: float = 0.5,
        bc_coeff: float = 0.1,
        bc_on: Literal["chosen", "both"] = "chosen",
        score: Literal["mean", "sum"] = "mean",
        reference_free: bool = True,
        **kwargs: Any,
    ) -> None:
        check_range("(0, inf)", alpha=alpha)
        check_range("(0, 1]", contrastive_bias=contrastive_bias)
        check_range("[0, inf)", bc_coeff=bc_coeff)
        contrast = partial(preferences.cpl, alpha=alpha, bias=contrastive_bias)

        def total(side: Side) -> Tensor:
            stats, mask = side
            values = (stats.log_ratio + stats.ref_logps if reference_free else stats.log_ratio).sum(-1)
            return values / mask.sum(-1) if score == "mean" else values

        def loss(chosen: Side, rejected: Side) -> Tensor:
            cloned = surprise(chosen) if bc_on == "chosen" else (surprise(chosen) + surprise(rejected)) / 2
            return contrast(total(chosen), total(rejected)) + bc_coeff * cloned

        super().__init__(pair_loss=loss, beta=alpha, **kwargs)


def surprise(side: Side) -> Tensor:
    """−log π per token, nats, (b,)."""
    stats, mask = side
    return -(stats.log_ratio + stats.ref_logps).sum(-1) / mask.sum(-1)
