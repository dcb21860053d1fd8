"""Blends: what GradeSTE makes of its gradient with what earlier batches say of it."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grade_lightning.advantages import leave_one_out
from grade_lightning.credit import PathwiseCredit, TokenScores
from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.control_variates import score_function
from grade_lightning.functional.mixing import Errors, errors, mix_weight
from grade_lightning.functional.vocabulary import Cotangent, Vocabulary
from grade_lightning.records import Experience, Rollout
from grade_lightning.stateful import Stateful


class Calibrated(Stateful):
    """The reward's gradient times η, the slope of rewards on what its running mean predicts.

    The straight-through gradient is too short where a reward is curved. With one direction w, the average gradient of
    earlier batches, Σ_t δ_t is how much better a completion's tokens are than was to be expected to first order; η says
    how much the reward itself changes with it. β then weighs the same against the reward as in a policy gradient.
    The slope is only an estimate of the missing length: in a laboratory the result was up to a quarter too long. One
    that is not positive, as a few batches may give, would turn the gradient around: η is 1 then.

    Args:
        decay: of the moving averages, in batches.
    """

    min_generations: ClassVar[int] = 1
    """Completions of a prompt that it needs."""

    def __init__(self, decay: float = 0.98) -> None:
        self.credit = PathwiseCredit(decay)
        self.decay = decay

    @property
    def slope(self) -> float:
        """η."""
        return self.credit.slope if self.credit.slope > 0 else 1.0

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Move slope and direction by this batch."""
        self.credit.observe(replace(seen, rewards=seen.scores.total), reduce)

    def held(self, parameters: Iterable[Tensor]) -> Tensor | float:
        """What is added to the gradient of every batch, as the gradient of a sum of value 0."""
        return 0.0

    def figures(self, device: torch.device) -> dict[str, Tensor]:
        """What is logged."""
        return {name: value.to(device) for name, value in self.credit.fitted().items()}

    def state_dict(self) -> dict[str, Any]:
        """That of the credit."""
        return self.credit.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.credit.load_state_dict(state)


class TwoGradients(Calibrated):
    """What blends of GradeSTE's gradient with an unbiased one have.

    The unbiased one is the policy gradient of the same completions with pathwise credit: the others of the prompt are
    the baseline, and the exact KL of later tokens is in it.

    Args:
        every: steps between two looks at both gradients, each of which costs backward passes.
        decay: of the moving averages, in batches.
    """

    min_generations = 2

    def __init__(self, every: int, decay: float) -> None:
        super().__init__(decay)
        check_range("[1, inf)", "blend", every=every)
        self.every = every

    @property
    def weight(self) -> float:
        """λ, the weight of GradeSTE's in the gradient of the batch; that of the unbiased one is 1 − λ."""
        return 1.0

    def due(self, step: int) -> bool:
        """Whether both gradients are looked at in this step."""
        return step % self.every == 0

    def unbiased(
        self,
        seen: Experience,
        scores: TokenScores | None,
        deviations: Sequence[Tensor],
        weights: Tensor,
        reduce: Reduce,
    ) -> Cotangent:
        """The policy gradient with credit, as a cotangent on the logits of what was sampled.

        Args:
            seen: with the penalties of single tokens, −β KL.
            scores: of the tokens; None before there are any.
            deviations: δ of each position, (B, T); none before there are scores.
            weights: of the engine's correction, (n, 1).
            reduce: statistics over processes.
        """
        rollout, rewards, slope = seen.rollout, seen.scores.total, self.credit.slope
        for deviation in deviations:
            rewards = rewards - slope * deviation.sum(-1).to(rewards)
        advantages = leave_one_out(replace(seen, rewards=rewards), reduce).masked_fill(~seen.mask, 0)
        taken = weights * rollout.take(advantages).unsqueeze(1)
        # a completion without others has no advantage, and then nothing is to be given back
        answered = seen.rollout.layout.table(seen.scores.total).isnan().logical_not().sum(-1)
        others = (seen.rollout.layout.spread(answered) > 1).unsqueeze(1)
        share = slope * weights * rollout.take(others * seen.mask).unsqueeze(1)

        def cotangent(logits: Tensor, rows: slice) -> Tensor:
            own = None if scores is None else scores(rows)
            return score_function(logits.softmax(-1), rollout.tokens[rows], taken[rows], own, share[rows])

        return cotangent

    @abstractmethod
    def look_at(
        self, vocabulary: Vocabulary, rollout: Rollout, both: Sequence[Cotangent], parameters: Iterable[Tensor]
    ) -> None:
        """Look at both gradients, GradeSTE's first, at all parameters; :meth:`observe` takes it from here."""


class Mixed(TwoGradients):
    """λ times the calibrated gradient and 1 − λ times an unbiased one: as much bias as pays in noise.

    The unbiased one is the policy gradient of the same completions with pathwise credit: the others of the prompt are
    the baseline, and the exact KL of later tokens is in it. λ makes the expected squared error of the sum smallest,
    as the gradients of parts of the batch say every now and then. With `weight: 0` the whole gradient is unbiased.

    Args:
        weight: λ; by default it is estimated, and 1 before.
        every: steps between two estimates. Each costs a backward pass for each part and both gradients.
        parts: parts of a batch that are compared, of whole prompts.
        decay: of the moving averages, in batches; those of λ, in estimates.
    """

    def __init__(self, weight: float | None = None, every: int = 10, parts: int = 2, decay: float = 0.98) -> None:
        super().__init__(every, decay)
        check_range("[0, 1]", "blend", weight=weight)
        check_range("[2, inf)", "blend", parts=parts)
        self.fixed = weight
        self.parts = parts
        self._errors: Tensor | None = None
        self._found: list[Tensor] = []

    @property
    def weight(self) -> float:
        """λ."""
        if self.fixed is not None:
            return self.fixed
        return 1.0 if self._errors is None else float(mix_weight(Errors(*self._errors)))

    def due(self, step: int) -> bool:
        """Whether λ is to be estimated in this step."""
        return self.fixed is None and super().due(step)

    def look_at(
        self, vocabulary: Vocabulary, rollout: Rollout, both: Sequence[Cotangent], parameters: Iterable[Tensor]
    ) -> None:
        """Compare the gradients of parts of the batch, biased and unbiased.

        Raises:
            InputError: the parameters are spread over processes, or there are too few prompts.
        """
        wanted = _whole(parameters, "set blend.weight")
        prompts = rollout.layout.shape[0]
        if prompts < self.parts:
            raise InputError(
                f"blend Mixed: {prompts} prompts in a batch cannot be split into {self.parts} parts; raise "
                "data.batch_size, or set blend.weight"
            )
        part = rollout.take(
            (rollout.layout.row % self.parts).to(rollout.ids.device).unsqueeze(1).expand_as(rollout.sampled)
        )
        rows = [_gradients(vocabulary, c, part == i, wanted) for c in both for i in range(self.parts)]
        self.compare(torch.stack([torch.stack([_inner(x, y) for y in rows]) for x in rows]))

    def compare(self, products: Tensor) -> None:
        """Keep what the inner products of the parts' gradients say, the biased ones first."""
        n = self.parts
        self._found.append(torch.stack(errors(products[:n, :n], products[:n, n:], products[n:, n:])))

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Also move what λ follows from."""
        super().observe(seen, reduce)
        if not self._found:
            return
        new = reduce.mean(torch.stack(self._found).mean(0)).cpu()
        batches = len(self._found) * reduce.processes
        new[:3] /= batches  # the mean of so many batches is trained on
        self._errors = new if self._errors is None else self.decay * self._errors + (1 - self.decay) * new
        self._found = []

    def figures(self, device: torch.device) -> dict[str, Tensor]:
        """With λ."""
        return super().figures(device) | {"mix_weight": torch.tensor(self.weight, device=device)}

    def state_dict(self) -> dict[str, Any]:
        """With what λ follows from."""
        return super().state_dict() | {"errors": self._errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state)
        self._errors = state["errors"]


class Debiased(TwoGradients):
    """The calibrated gradient, and its bias of earlier batches taken off.

    The difference of the unbiased gradient and the calibrated one is its bias and the noise of both. Its average over
    many batches has little noise, and is added to the gradient of each batch: the bias goes as far as it stays the same
    from batch to batch. It begins at 0, since the average of a few batches is mostly noise. A look costs a backward
    pass; the average takes the memory of a gradient, in checkpoints, too.

    Args:
        every: steps between two looks at the difference.
        decay: of the moving averages, in batches; that of the difference, in looks.
    """

    def __init__(self, every: int = 1, decay: float = 0.98) -> None:
        super().__init__(every, decay)
        self._difference: list[Tensor] = []
        self._new: list[Tensor] = []
        self._batches = 0

    def look_at(
        self, vocabulary: Vocabulary, rollout: Rollout, both: Sequence[Cotangent], parameters: Iterable[Tensor]
    ) -> None:
        """Add this batch's difference, a mean over its completions.

        Raises:
            InputError: the parameters are spread over processes.
        """
        wanted = _whole(parameters, "leave the blend out")
        straight, unbiased = both

        def difference(logits: Tensor, rows: slice) -> Tensor:
            return unbiased(logits, rows) - straight(logits, rows)

        every = torch.ones(len(rollout.positions), dtype=torch.bool, device=rollout.ids.device)
        found = _gradients(vocabulary, difference, every, wanted)
        self._new = self._new or [torch.zeros_like(p, dtype=torch.float32) for p in wanted]
        for total, one in zip(self._new, found, strict=True):
            if one is not None:
                total += one.float() / len(rollout.ids)
        self._batches += 1

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Also move the average by the mean over micro-batches and processes."""
        super().observe(seen, reduce)
        if not self._new:
            return
        new = [reduce.mean(total / self._batches) for total in self._new]
        old = self._difference or [torch.zeros_like(x) for x in new]
        self._difference = [self.decay * x + (1 - self.decay) * y for x, y in zip(old, new, strict=True)]
        self._new, self._batches = [], 0

    def held(self, parameters: Iterable[Tensor]) -> Tensor | float:
        """The average difference, as the gradient of a sum of value 0."""
        if not self._difference:
            return 0.0
        pairs = zip(parameters, self._difference, strict=True)
        return torch.stack([((p - p.detach()) * x.to(p)).sum() for p, x in pairs]).sum()

    def state_dict(self) -> dict[str, Any]:
        """With the average difference."""
        return super().state_dict() | {"difference": self._difference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state)
        self._difference = list(state["difference"])


def _whole(parameters: Iterable[Tensor], instead: str) -> list[Tensor]:
    wanted = list(parameters)
    if any(isinstance(p, DTensor) for p in wanted):
        raise InputError(f"blend: gradients of weights that are sharded cannot be looked at; {instead}")
    return wanted


def _gradients(
    vocabulary: Vocabulary, cotangent: Callable[[Tensor, slice], Tensor], keep: Tensor, parameters: list[Tensor]
) -> list[Tensor | None]:
    """Of some of the positions; no hook of DDP is woken."""

    def own(logits: Tensor, rows: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        return cotangent(logits, rows) * keep[rows].unsqueeze(1), ()

    zero, _ = vocabulary.push(own)
    return list(torch.autograd.grad(zero, parameters, retain_graph=True, allow_unused=True))


def _inner(one: list[Tensor | None], two: list[Tensor | None]) -> Tensor:
    products = [
        (x.double() * y.double()).sum() for x, y in zip(one, two, strict=True) if x is not None and y is not None
    ]
    return torch.stack(products).sum()
