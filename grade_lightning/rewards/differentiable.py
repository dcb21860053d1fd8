"""Rewards that read token embeddings, so that their gradient reaches the tokens."""

from abc import abstractmethod

import torch
from torch import Tensor

from grade_lightning.functional.replay import Adjoint
from grade_lightning.records import RelaxedRollout, Rollout, Scores

from .base import Reward


class DifferentiableReward(Reward):
    """A reward that reads token embeddings, so that its gradient reaches the tokens."""

    differentiable = True

    @abstractmethod
    def table(self) -> Tensor:
        """Embedding table, (vocabulary of the policy, width)."""

    @abstractmethod
    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Scores, (B,), of embeddings (B, L, width) with attention mask (B, L); differentiable."""

    def place(self, rollout: Rollout, completion: Tensor) -> tuple[Tensor, Tensor]:
        """What is scored: embeddings and attention mask, with the completion's embeddings (B, T, width) where it is."""
        return torch.cat([self.table()[rollout.prompt_ids], completion], dim=1), rollout.mask

    def forward(self, rollout: Rollout) -> Tensor:
        """Scores of the sampled tokens."""
        return self.score_embeddings(*self.place(rollout, self.table()[rollout.completion_ids]))

    def pathwise(self, rollout: Rollout) -> Scores:
        """One forward pass and one backward pass with respect to the completion's embeddings."""
        table = self.table()
        with torch.enable_grad():
            completion = table[rollout.completion_ids].requires_grad_()
            total = self.score_embeddings(*self.place(rollout, completion))
            (gradient,) = torch.autograd.grad(total.sum(), completion)
        total = total.detach()
        gradient = gradient.masked_fill(total.isnan().view(-1, 1, 1), 0)  # a reward that abstains has no gradient
        return Scores(total, {self.name: total}, [Adjoint(gradient, table)])

    def relaxed(self, rollout: RelaxedRollout) -> Scores:
        """Scores of the prompt's tokens and the completion's soft ones."""
        total = self.score_embeddings(*self.place(rollout, rollout.embed(self.table())))
        return Scores(total, {self.name: total})
