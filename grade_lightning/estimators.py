"""How a sampled token passes its gradient on: objects to choose from in YAML around the pure functions."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.functional import estimators, gumbel


class TokenEstimator(ABC):
    """Chooses the linear map from a token's adjoint to a cotangent on the logits."""

    @abstractmethod
    def linearise(
        self, logps: Tensor, tokens: Tensor, tau: float, generator: torch.Generator | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Draw what noise there is and return the map.

        Args:
            logps: normalised log-probabilities of the sampled distribution, (…, V), float32 or better, no graph.
            tokens: the sampled tokens, (…).
            tau: temperature of the relaxation.
            generator: of the noise; each hop starts it anew, so that all share the same.
        """


class StraightThrough(TokenEstimator):
    """The token is treated as its softmax: no further noise. See :func:`~.functional.estimators.straight_through`."""

    def linearise(
        self, logps: Tensor, tokens: Tensor, tau: float, generator: torch.Generator | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Softmax at temperature τ."""
        return lambda adjoint: estimators.straight_through(logps, adjoint, tau)


class Gumbel(TokenEstimator):
    """Straight-through Gumbel-softmax with noise drawn given the token: GRADE-STE.

    Args:
        draws: noise draws for each token; more than one is Gumbel-Rao. No further sampling is needed.
    """

    def __init__(self, draws: int = 1) -> None:
        if draws < 1:
            raise InputError(f"estimator.draws = {draws}: must be at least 1")
        self.draws = draws

    def linearise(
        self, logps: Tensor, tokens: Tensor, tau: float, generator: torch.Generator | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Relaxed tokens at the restored noise."""
        relaxed = torch.stack(
            [
                gumbel.relaxed_tokens(
                    gumbel.posterior_scores(logps, tokens, gumbel.exponential_noise(logps, generator)), tau
                )
                for _ in range(self.draws)
            ]
        )
        return lambda adjoint: estimators.straight_through_gumbel(relaxed, adjoint, tau)


class ReinMax(TokenEstimator):
    """Second-order straight-through. See :func:`~.functional.estimators.reinmax`."""

    def linearise(
        self, logps: Tensor, tokens: Tensor, tau: float, generator: torch.Generator | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Heun's midpoint at temperature τ."""
        return lambda adjoint: estimators.reinmax(logps, tokens, adjoint, tau)
