"""Identity preference optimisation."""

from functools import partial
from typing import Any

from grade_lightning.functional import preferences
from grade_lightning.modules.preference import PreferenceModule, of_means


class IPO(PreferenceModule):
    """The margin between the two completions is pulled to 1 / (2β), in nats per token, instead of to infinity.

    Args:
        beta: how strongly the policy is held to its reference.
        **kwargs: those of :class:`~grade_lightning.modules.PreferenceModule`.

    References:
        | A General Theoretical Paradigm to Understand Learning from Human Preferences (Azar et al., 2023),
          https://arxiv.org/abs/2310.12036. The mean over tokens is TRL's, by its account confirmed with the authors.
    """

    def __init__(self, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(pair_loss=of_means(partial(preferences.ipo, beta=beta)), beta=beta, **kwargs)
