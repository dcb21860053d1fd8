"""From prompts to the completions that are trained on: allocate, generate, score, select."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch.profiler import record_function

from grade_lightning.credit import Credit
from grade_lightning.errors import InputError
from grade_lightning.functional.advantages import has_spread
from grade_lightning.records import Experience, Prompts, Rollout, Scores
from grade_lightning.rewards import OverlongPenalty
from grade_lightning.selection import Selection

from .alignment import AlignmentModule
from .drawing import draw_and_score


class SelectingModule(AlignmentModule):
    """Several completions of each prompt, of which a selection says how many there are and which are trained on."""

    selection: Selection
    length_penalty: OverlongPenalty | None
    credit: Credit | None
    num_generations: int
    takes_older: ClassVar[bool] = True

    def check_selection(self) -> None:
        """Check that the selection can do with completions of the batch before.

        Raises:
            InputError: it chooses prompts by their completions, which are of other prompts then.
        """
        if self.sampler.one_behind and (
            self.selection.spare or type(self.selection).allocate is not Selection.allocate
        ):
            raise InputError(
                f"sampler.one_behind: {type(self.selection).__name__} chooses prompts by their own completions; leave "
                "one of them out"
            )

    def sample(self, prompts: Prompts) -> Experience:
        """Completions with their scores: those that the selection keeps."""
        wanted = max(1, len(prompts) // (1 + self.selection.spare))
        parts: list[Experience] = []
        used, further = 0, wanted
        while further and used < len(prompts) and len(parts) <= self.selection.spare:
            taken = prompts.slice(used, further)
            parts.append(self._draw_scored(taken))
            used += len(taken)
            seen = Experience.join(parts)
            further = self.selection.resample(seen, wanted)
        kept, step, run_steps = self._kept(seen, wanted), self.global_step, self.total_steps()
        return self._finished(replace(kept, beta=self.beta, step=step, run_steps=run_steps))

    def with_tempered(self, seen: Experience, prompts: Prompts, temperature: float) -> Experience:
        """With completions of some prompts that are drawn at another temperature, marked in `extra["tempered"]`.

        They have the policy's own log-probabilities, as if they had been drawn at the sampler's temperature.

        Args:
            seen: the completions so far.
            prompts: of which to draw; G of each.
            temperature: times the sampler's.
        """
        own = self.sampler.distribution
        groups = torch.arange(len(prompts)).repeat_interleave(self.num_generations)
        given = prompts.repeat(torch.full((len(prompts),), self.num_generations))
        distribution = replace(own, temperature=own.temperature * temperature)
        rollout = self.sampler.draw(self.policy, distribution, given, groups)
        with torch.no_grad(), self.policy.evaluating():
            rollout = replace(rollout, engine_logps=self.measure(rollout).logps)
        other = self._finished(Experience(rollout, self.score(rollout)))
        joined = Experience.join([seen, other])
        marks = torch.arange(len(joined.rollout.ids), device=seen.scores.total.device) >= len(seen.rollout.ids)
        return replace(joined, beta=seen.beta, metrics=seen.metrics, extra={"tempered": marks.to(seen.scores.total)})

    def _kept(self, seen: Experience, wanted: int) -> Experience:
        """The rows that the selection keeps; every process learns of one that keeps none."""
        rows = self.selection.keep(seen, wanted)
        if type(self.selection).keep is Selection.keep:
            return seen
        rows = torch.arange(len(seen.scores.total)) if rows is None else rows
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        if self.reduce.sum(seen.rollout.lengths.new_tensor(not len(rows))):
            raise InputError(
                f"selection {type(self.selection).__name__}: it keeps no completion, so there is nothing to train on; "
                "let keep return one or more rows, on every process"
            )
        return seen.select(rows)

    def _draw_scored(self, prompts: Prompts) -> Experience:
        counts = self.selection.allocate(prompts, self.num_generations * len(prompts))
        scored = math.ceil(len(prompts) / self.batching.parts)  # no more than a step trains on
        return draw_and_score(self.draw, self.begin_scoring, prompts, counts, self.sampler.at_once, scored)

    @record_function("reward")
    def begin_scoring(self, rollout: Rollout) -> Callable[[], Scores]:
        """Begin to score; what is returned waits for the scores."""
        self.meter.count(rollout)
        judged, credit = self.judged(rollout), self.credit
        if credit is None:
            return self.reward.begin(judged)
        begun = credit.begin(self.reward, judged, self._collecting)
        return (lambda: credit.look(begun(), judged, self.policy.table())) if self._collecting else begun

    def _finished(self, seen: Experience) -> Experience:
        """With the length penalty, and the share of groups that say nothing."""
        rollout, scores = seen.rollout, seen.scores
        longest = self.sampler.max_new_tokens
        penalty = None if self.length_penalty is None else self.length_penalty(rollout, longest)
        if penalty is not None:
            scores = scores.plus("overlong", penalty, rollout.sampled)
        metrics = {}
        if self.num_generations > 1:
            differ = has_spread(rollout.layout.table(scores.total))
            metrics["uniform_groups"] = 1 - differ.float().mean()
        return replace(seen, scores=scores, metrics=metrics)
