"""How a sampled token passes its gradient on: objects to choose from in YAML around the pure functions."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import estimators, gumbel


class TokenEstimator(ABC):
    """Maps a token's adjoint to a cotangent on the logits that it was sampled from; linear in the adjoint."""

    @abstractmethod
    def cotangent(
        self, logits: Tensor, tokens: Tensor, adjoint: Tensor, tau: float, generator: torch.Generator | None = None
    ) -> Tensor:
        """Of some positions.

        Args:
            logits: of the sampled distribution, (n, V), float32 or better, no graph; −inf for a masked token.
            tokens: the sampled tokens, (n,).
            adjoint: gradient at the one-hot tokens, (n, V).
            tau: temperature of the relaxation.
            generator: of the noise, if there is any; each hop starts it anew, so that all share the same.

        Returns:
            (n, V).
        """


class StraightThrough(TokenEstimator):
    """The token is treated as its softmax: no further noise. See :func:`~.functional.estimators.straight_through`."""

    def cotangent(
        self, logits: Tensor, tokens: Tensor, adjoint: Tensor, tau: float, generator: torch.Generator | None = None
    ) -> Tensor:
        """Softmax at temperature τ."""
        return estimators.straight_through(logits, adjoint, tau)


class Gumbel(TokenEstimator):
    """Straight-through Gumbel-softmax with noise drawn given the token: GRADE-STE.

    Args:
        draws: noise draws for each token; more than one is Gumbel-Rao. No further sampling is needed.
    """

    def __init__(self, draws: int = 1) -> None:
        check_range("[1, inf)", "estimator", draws=draws)
        self.draws = draws

    def cotangent(
        self, logits: Tensor, tokens: Tensor, adjoint: Tensor, tau: float, generator: torch.Generator | None = None
    ) -> Tensor:
        """Relaxed tokens at the restored noise."""
        relaxed = self.relaxed(logits.log_softmax(-1), tokens, tau, generator)
        return estimators.straight_through_gumbel(relaxed, adjoint, tau)

    def relaxed(self, logps: Tensor, tokens: Tensor, tau: float, generator: torch.Generator | None) -> Tensor:
        """A relaxed token for each draw, (draws, n, V), from log-probabilities."""
        noise = (gumbel.exponential_noise(logps, generator) for _ in range(self.draws))
        return torch.stack(
            [gumbel.relaxed_tokens(gumbel.posterior_scores(logps, tokens, drawn), tau) for drawn in noise]
        )


class ReinMax(TokenEstimator):
    """Second-order straight-through. See :func:`~.functional.estimators.reinmax`."""

    def cotangent(
        self, logits: Tensor, tokens: Tensor, adjoint: Tensor, tau: float, generator: torch.Generator | None = None
    ) -> Tensor:
        """Heun's midpoint at temperature τ."""
        return estimators.reinmax(logits, tokens, adjoint, tau)


class ReinMaxRao(Gumbel):
    """ReinMax, averaged over noise given the token. See :func:`~.functional.estimators.reinmax_rao`.

    Args:
        draws: noise draws for each token.
    """

    def __init__(self, draws: int = 8) -> None:
        super().__init__(draws)

    def cotangent(
        self, logits: Tensor, tokens: Tensor, adjoint: Tensor, tau: float, generator: torch.Generator | None = None
    ) -> Tensor:
        """Relaxed tokens of the midpoint, at noise that is restored there."""
        relaxed = self.relaxed(estimators.midpoint(logits, tokens).log(), tokens, tau, generator)
        return estimators.reinmax_rao(logits, relaxed, adjoint, tau)
