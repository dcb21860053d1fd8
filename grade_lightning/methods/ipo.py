"""Identity preference optimisation."""

from torch import Tensor

from grade_lightning.functional import preferences
from grade_lightning.preference import PreferenceModule


class IPO(PreferenceModule):
    """The margin between the two completions is pulled to 1 / (2β), in nats per token, instead of to infinity.

    Args:
        **kwargs: those of :class:`~grade_lightning.preference.PreferenceModule`.

    References:
        | A General Theoretical Paradigm to Understand Learning from Human Preferences (Azar et al., 2023),
          https://arxiv.org/abs/2310.12036. The mean over tokens is TRL's, by its account confirmed with the authors.
    """

    def pair_loss(self, chosen: Tensor, rejected: Tensor, mask: tuple[Tensor, Tensor]) -> Tensor:
        """Of means over tokens."""
        means = [x.sum(-1) / m.sum(-1) for x, m in zip((chosen, rejected), mask, strict=True)]
        return preferences.ipo(means[0], means[1], self.beta)
