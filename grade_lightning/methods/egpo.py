"""Extragradient preference optimisation."""

from typing import Any

from grade_lightning.modules import ExtragradientModule


class EGPO(ExtragradientModule):
    """OnlineIPO with extragradient steps: each update uses the gradient at the point that a trial step leads to.

    Where preferences are intransitive, plain updates circle around the equilibrium; these end in it.

    Args:
        **kwargs: those of :class:`~grade_lightning.modules.PairwiseModule`.

    References:
        | Extragradient Preference Optimization (EGPO): Beyond Last-Iterate Convergence for Nash Learning from Human
          Feedback (Zhou et al., 2025), https://arxiv.org/abs/2503.08942
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
