"""GradeSTE's gradient with what earlier batches say of it, and how it is mixed with a policy gradient."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grade_lightning.blends import Calibrated, TwoGradients
from grade_lightning.errors import InputError, check_range
from grade_lightning.functional import divergences
from grade_lightning.functional.control_variates import deviation
from grade_lightning.functional.vocabulary import Cotangent, Vocabulary
from grade_lightning.records import Batching, Experience

from .alignment import AlignmentModule


class BlendingModule(AlignmentModule):
    """A module that backpropagates the reward, with a blend and with one or more completions of each prompt."""

    blend: Calibrated | None
    num_generations: int
    _look = False

    def set_blend(self, blend: Calibrated | None, num_generations: int) -> None:
        """Keep both.

        Raises:
            InputError: the blend needs more completions of a prompt.
        """
        check_range("[1, inf)", num_generations=num_generations)
        if blend is not None and num_generations < blend.min_generations:
            raise InputError(
                f"num_generations = {num_generations}: blend {type(blend).__name__} compares the completions of a "
                f"prompt with each other; give {blend.min_generations} or more"
            )
        self.blend = blend
        self.num_generations = num_generations

    @property
    def batching(self) -> Batching:
        """Each batch of the loader is drawn anew."""
        return Batching(generations=self.num_generations)

    def collect(self, batch: dict[str, Any]) -> Experience:
        """Draw completions and score them with adjoints; the blend looks at those that are trained on."""
        prompts = self.prompts(batch)
        counts = torch.full((len(prompts),), self.num_generations)
        rollout = self.draw(prompts.repeat(counts), torch.arange(len(prompts)).repeat_interleave(counts))
        scores, blend = self.score(rollout), self.blend
        if blend is not None and self._collecting:
            blend.credit.look(scores, rollout, self.policy.table())
        self._look = self._collecting and isinstance(blend, TwoGradients) and blend.due(self.global_step)
        return Experience(rollout, scores, self.beta)

    @torch.no_grad()
    def blended(
        self,
        straight: Cotangent,
        source: Cotangent | None,
        vocabulary: Vocabulary,
        reference: Vocabulary,
        seen: Experience,
        weights: Tensor,
    ) -> Cotangent:
        """The reward's gradient at the logits: straight through, or mixed with an unbiased one.

        Args:
            straight: through the tokens.
            source: what of the KL is in there, too.
            vocabulary: the policy's logits, with the graph of the hidden states.
            reference: the reference's.
            seen: completions and scores.
            weights: of the engine's correction at each sampled token, (n, 1).
        """
        blend, rollout, distribution = self.blend, seen.rollout, self.sampler.distribution
        if not isinstance(blend, TwoGradients) or (blend.weight == 1 and not self._look):
            return straight
        scores = blend.credit.scores(rollout)

        def measured(logits: Tensor, rows: slice) -> Iterator[Tensor]:
            sampled, dist = distribution.both(rollout, logits, rows)
            yield divergences.categorical_kl(dist, distribution.log_distribution(reference.at(rows)))
            if scores is not None:
                yield deviation(sampled, rollout.tokens[rows], scores(rows))

        kl, *deviations = map(rollout.put, vocabulary.map(measured))
        seen = replace(seen, penalties=-self.beta * kl)
        at_sampled = blend.unbiased(seen, scores, deviations, weights, self.reduce)

        def unbiased(logits: Tensor, rows: slice) -> Tensor:
            found = distribution.tempered(at_sampled(distribution.sampled_logits(rollout, logits, rows), rows))
            return found if source is None else found + source(logits, rows)

        if self._look:
            self._look = False
            with torch.enable_grad():
                blend.look_at(vocabulary, rollout, (straight, unbiased), self.trained())
        share = blend.weight
        if share == 1:
            return straight
        return lambda logits, rows: share * straight(logits, rows) + (1 - share) * unbiased(logits, rows)

    def trained(self) -> list[Tensor]:
        """The policy's parameters that are."""
        return [p for p in self.policy.parameters() if p.requires_grad]

    def parts(self) -> dict[str, Any]:
        """With the blend."""
        return super().parts() | ({} if self.blend is None else {"blend": self.blend})
