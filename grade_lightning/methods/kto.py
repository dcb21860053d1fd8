"""Kahneman-Tversky optimisation."""

from functools import partial
from typing import Any

from grade_lightning.errors import check_range
from grade_lightning.functional import preferences
from grade_lightning.modules import UnpairedModule


class KTO(UnpairedModule):
    """A desirable completion gains, another loses, by a value that saturates; no pairs are needed.

    With z₀ = `none` and equal weights it is the unpaired form of APO-zero.

    Args:
        beta: how strongly the policy is held to its reference.
        desirable_weight: λ_D.
        undesirable_weight: λ_U. Where the labels are not balanced, the paper wants λ_D n_D / λ_U n_U from 1 to 4/3.
        **kwargs: those of :class:`~grade_lightning.modules.UnpairedModule`.

    References:
        | KTO: Model Alignment as Prospect Theoretic Optimization (Ethayarajh et al., 2024),
          https://arxiv.org/abs/2402.01306
    """

    def __init__(
        self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, **kwargs: Any
    ) -> None:
        check_range("[0, inf)", desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        loss = partial(
            preferences.kto, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
        )
        super().__init__(row_loss=loss, beta=beta, **kwargs)
