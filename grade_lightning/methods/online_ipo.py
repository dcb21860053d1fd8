"""Online identity preference optimisation."""

from typing import Any

from grade_lightning.modules import PairwiseModule


class OnlineIPO(PairwiseModule):
    """Plays against itself: the policy goes to where it wins against its own completions as often as it loses.

    Args:
        **kwargs: those of :class:`~grade_lightning.modules.PairwiseModule`.

    References:
        | Human Alignment of Large Language Models through Online Preference Optimisation (Calandriello et al., 2024),
          https://arxiv.org/abs/2403.08635
        | the form of the loss: Extragradient Preference Optimization (Zhou et al., 2025),
          https://arxiv.org/abs/2503.08942
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
