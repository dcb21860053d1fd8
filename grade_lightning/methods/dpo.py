"""Direct preference optimisation."""

from typing import Any

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import preferences
from grade_lightning.preference import PreferenceModule


class DPO(PreferenceModule):
    """The log-odds that the preferred completion wins, as the policy and its reference see it, are raised.

    Args:
        label_smoothing: the probability that a preference is the wrong way round.
        **kwargs: those of :class:`~grade_lightning.preference.PreferenceModule`.

    References:
        | Direct Preference Optimization: Your Language Model is Secretly a Reward Model (Rafailov et al., 2023),
          https://arxiv.org/abs/2305.18290
        | pairs from rollouts: Direct Language Model Alignment from Online AI Feedback (Guo et al., 2024),
          https://arxiv.org/abs/2402.04792
    """

    def __init__(self, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("[0, 0.5]", label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing

    def pair_loss(self, chosen: Tensor, rejected: Tensor, mask: tuple[Tensor, Tensor]) -> Tensor:
        """Of sums over tokens."""
        return preferences.dpo(chosen.sum(-1), rejected.sum(-1), self.beta, self.label_smoothing)
