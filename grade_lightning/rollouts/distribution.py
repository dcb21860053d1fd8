"""What is sampled: the distribution of a token, in every engine and in every training pass alike."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grade_lightning.estimators import TokenEstimator
from grade_lightning.functional.replay import Cotangent
from grade_lightning.functional.sequences import truncate_logits
from grade_lightning.numerics import widened
from grade_lightning.records import Rollout


@dataclass(frozen=True)
class Distribution:
    """How a policy's logits become the distribution that tokens are drawn from, and how many are drawn.

    Args:
        max_new_tokens: longest completion.
        min_new_tokens: the end-of-sequence token is masked before that many tokens.
        temperature: divides the logits.
        top_k: only the k most likely tokens.
        top_p: only the smallest set of tokens that holds this mass.
        stop: strings that end a completion, as end tokens do.

    Example:
        >>> Distribution(temperature=0.5).logits(torch.tensor([[[1.0, 2.0]]]), eos_ids=[0])
        tensor([[[2., 4.]]])
    """

    max_new_tokens: int = 48
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never sampled."""
        return self.top_k is not None or self.top_p < 1 or self.min_new_tokens > 0

    def tempered(self, values: Tensor) -> Tensor:
        """Divided by the temperature, in float32 or better: logits, or a cotangent on its way to them."""
        values = widened(values)
        return values if self.temperature == 1 else values / self.temperature

    def through(self, estimator: TokenEstimator, rollout: Rollout, tau: float) -> Cotangent:
        """The way of an adjoint through sampled tokens, for :func:`.replay`: with the same noise at each hop.

        Args:
            estimator: how a sampled token passes its gradient on.
            rollout: the tokens.
            tau: temperature of the relaxation.
        """
        seed = int(torch.randint(2**62, ()))

        def token(logits: Tensor, rows: slice, adjoint: Tensor) -> Tensor:
            generator = torch.Generator(logits.device).manual_seed(seed + rows.start)
            sampled = self.sampled_logits(rollout, logits, rows)
            return self.tempered(estimator.cotangent(sampled, rollout.tokens[rows], adjoint, tau, generator))

        return token

    def log_distribution(self, logits: Tensor) -> Tensor:
        """Log-probabilities at the sampling temperature with nothing masked: what KL and entropy are taken of.

        Args:
            logits: (…, V).

        Returns:
            (…, V), float32 or better.
        """
        return self.tempered(logits).log_softmax(-1)

    def logits(
        self, logits: Tensor, eos_ids: list[int], tokens: Tensor | None = None, positions: Tensor | int | None = None
    ) -> Tensor:
        """Logits of the distribution that is sampled, in float32 or better.

        Args:
            logits: the policy's, (…, V).
            eos_ids: end-of-sequence tokens.
            tokens: the tokens that were sampled, (…). They are kept in the support even where rounding, another
                batch or another kernel would put them just outside of the top-k or top-p set.
            positions: which token of its completion, or of its turn, each is, (…); they count along the last dimension
                by default.

        Returns:
            (…, V); −inf outside of the support.
        """
        scaled = self.tempered(logits)
        truncated = scaled
        if self.min_new_tokens > 0 and eos_ids:
            if positions is None:
                positions = torch.arange(logits.shape[-2], device=logits.device)
            early = torch.as_tensor(positions < self.min_new_tokens, device=logits.device).unsqueeze(-1)
            truncated = truncated.clone()
            truncated[..., eos_ids] = truncated[..., eos_ids].masked_fill(early, -torch.inf)
        truncated = truncate_logits(truncated, self.top_k, self.top_p)
        if tokens is not None and truncated is not scaled:
            index = tokens.unsqueeze(-1)
            truncated = truncated.scatter(-1, index, scaled.gather(-1, index))
        return truncated

    def sampled_logits(self, rollout: Rollout, logits: Tensor, rows: slice) -> Tensor:
        """Logits of what was sampled at some of a rollout's sampled positions, (n, V)."""
        return self.logits(logits, rollout.eos_ids, rollout.tokens[rows], rollout.offsets[rows])

    def both(self, rollout: Rollout, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Log-probabilities at some of the sampled positions, each (n, V): as sampled, and without truncation."""
        sampled = self.sampled_logits(rollout, logits, rows).log_softmax(-1)
        return sampled, self.log_distribution(logits) if self.truncates else sampled
