"""Training without backpropagation: slopes of the objective along random directions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.sequences import masked_sum
from grade_lightning.functional.zeroth_order import clipped, slope_sums
from grade_lightning.modules import AlignmentModule
from grade_lightning.modules.perturbing import Estimate, moved
from grade_lightning.numerics import forked_generators, seed_generators
from grade_lightning.policies import PolicyLike
from grade_lightning.records import Batching, Experience, Prompts, Rollout, StepOutput, TokenStats
from grade_lightning.rewards import RewardLike
from grade_lightning.rollouts import Sampler
from grade_lightning.strategies import FSDP2


class ZerothOrder(AlignmentModule):
    """Maximise reward − β KL by its values alone: the weights are moved by ±ε along a direction, and both are measured.

    Completions of both sides are drawn with the same noise. Nothing is backpropagated, so any reward will do and no
    activations are kept; directions are seeds. Of several processes each has prompts of its own and all have the same
    direction: a slope and the number of its rows is all that they exchange.

    Args:
        policy: the language model; with LoRA there are fewer directions, and less noise.
        reward: what is maximised, of any kind; the bundled classifier by default.
        judges: further rewards that are logged and never trained on.
        sampler: how completions are drawn.
        beta: coefficient β of the exact KL, in reward per nat.
        epsilon: ε.
        directions: of each step, whose estimates are averaged.
        clip: slopes beyond this many times the median of the latest 64 are cut; none are by default.
        copies: restore the weights from copies, to the bit; without, by moving them back, up to rounding, which saves
            the memory of what is trained.
        optimizer: any torch optimizer by class path; MeZO's is plain gradient descent.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.

    References:
        | MeZO: Fine-Tuning Language Models with Just Forward Passes (Malladi et al., 2023),
          https://arxiv.org/abs/2305.17333
        | QZO: Fine-tuning Quantized Neural Networks with Zeroth-order Optimization (Shang et al., 2025),
          https://arxiv.org/abs/2505.13430 (the clip)
    """

    def __init__(
        self,
        policy: PolicyLike | None = None,
        reward: RewardLike | None = None,
        judges: list[RewardLike] | None = None,
        sampler: Sampler | None = None,
        beta: float = 0.002,
        epsilon: float = 0.01,
        directions: int = 1,
        clip: float | None = None,
        copies: bool = True,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, reward, judges, sampler, beta, optimizer, lr_scheduler)
        check_range("(0, inf)", epsilon=epsilon, clip=clip)
        check_range("[1, inf)", directions=directions)
        self.epsilon = epsilon
        self.directions = directions
        self.clip = clip
        self.copies = copies
        self._sizes = torch.empty(0)  # of the latest slopes

    @property
    def batching(self) -> Batching:
        """Two completions of a prompt for each direction."""
        return Batching("prompts", 2 * self.directions)

    def configure_model(self) -> None:
        """Load policy and rewards.

        Raises:
            InputError: the weights would not be restored.
        """
        super().configure_model()
        half = {p.dtype for p in self._trained()} & {torch.bfloat16, torch.float16}
        if half and not self.copies:
            raise InputError(
                f"--model.copies false: weights in {half.pop()} that are moved and moved back are not what they were; "
                "set it to true, or --model.policy.dtype float32"
            )

    def setup(self, stage: str) -> None:
        """Check the strategy."""
        super().setup(stage)
        if isinstance(self.trainer.strategy, FSDP2):
            raise InputError(
                "--trainer.strategy: ZerothOrder moves whole weights, which fsdp2 spreads over the processes; use ddp"
            )

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]

    def collect(self, batch: dict[str, Any]) -> Experience:
        """Completions of both sides of each direction, with their scores and statistics: (directions, 2, B) rows."""
        prompts, trained, sides = Prompts.of(batch), self._trained(), list[tuple[Experience, TokenStats]]()
        self._seeds = self._common_seeds()
        for seed in self._seeds:
            noise = int(torch.randint(2**62, ()))
            for by in (self.epsilon, -self.epsilon):
                seed_generators(noise)
                with torch.no_grad(), moved(trained, seed, by, self.copies), self.policy.evaluating():
                    rollout = self.draw(prompts)
                    sides.append((Experience(rollout, self.score(rollout)), self.measure(rollout)))
        joined = Experience.join([experience for experience, _ in sides])
        stats = TokenStats.join([stats for _, stats in sides], joined.rollout.completion_ids.shape[1])
        return replace(joined, beta=self.beta, old=stats)

    def _common_seeds(self) -> Sequence[int]:
        """Drawn by the first process."""
        drawn = torch.randint(2**62, (self.directions,))
        own = drawn if self.global_rank == 0 else torch.zeros_like(drawn)
        seeds: list[int] = self.reduce.sum(own.to(self.device)).tolist()
        return seeds

    def loss(self, experience: Experience) -> StepOutput:
        """The mean of −objective over both sides, with the estimate as its gradient."""
        scores, stats, mask = experience.scores.total, experience.old, experience.rollout.sampled
        values = scores - experience.beta * masked_sum(stats.kl, mask)
        plus, minus = values.view(self.directions, 2, -1).unbind(1)
        sums, counts = self.reduce.sum(slope_sums(plus, minus, self.epsilon)).unbind(-1)
        found = sums / counts.clamp(min=1)
        metrics = {"slope": found.abs().mean()}
        slopes = found if self.clip is None or not len(self._sizes) else clipped(found, self.clip * self._bound())
        self._sizes = torch.cat([self._sizes.to(found), found.abs().detach()])[-64:]
        self._weights = [p.view_as(p) for p in self._trained()]
        ascent = Estimate.apply(-slopes / self.directions, self._seeds, *self._weights)  # type: ignore[no-untyped-call]
        return StepOutput(ascent - values.nanmean(), stats, metrics)

    def _bound(self) -> Tensor:
        return self._sizes.nanmedian()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Each process makes the same gradient by itself; none is exchanged, as it would be by `loss.backward()`."""
        for parameter, gradient in zip(self._trained(), torch.autograd.grad(loss, self._weights), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def checked(self, experience: Experience) -> Rollout:
        """Completions of the policy itself; those of a step are of its neighbours.

        A run that goes on draws them anew, and its steps draw what they would have drawn.
        """
        first = len(experience.rollout.ids) // (2 * self.directions)
        rollout = experience.rollout.select(torch.arange(first))
        prompts = Prompts(rollout.prompt_ids, rollout.prompt_mask, rollout.columns)
        with forked_generators(self.device):
            return self.draw(prompts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the sizes of the latest slopes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["grade_lightning"]["slopes"] = self._sizes.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them."""
        super().on_load_checkpoint(checkpoint)
        self._sizes = checkpoint["grade_lightning"]["slopes"]
