"""β by a one-step hypergradient: it moves so that the next step is better for a judge that is not trained on."""

import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from grade_lightning.callbacks.frozen import frozen
from grade_lightning.callbacks.probe import adam_scales, trained
from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.gradient_quality import scaled_cosine
from grade_lightning.functional.replay import Adjoint
from grade_lightning.modules import AlignmentModule
from grade_lightning.numerics import hash_seed
from grade_lightning.records import Rollout, Scores, batch_rows, slice_rows
from grade_lightning.rewards import Reward


class BetaByJudge(Callback):
    r"""Moves β while a run goes on, so that a judge's reward, which is not trained on, grows.

    A step moves the weights by −η P (g_R + β g_KL), with the gradients of the loss and the optimizer's scaling P. So a
    little more β changes the judge's reward J by −η ⟨∇J, P g_KL⟩, and log β is moved along the cosine of the two. Each
    of them is measured on prompts of its own, half of a batch, since the product of two gradients of the same noise is
    not right in the mean.

    Args:
        judge: which of the module's judges, from 0.
        every_n_steps: optimizer steps from one move to the next; each costs about two training steps.
        rate: the largest change of log β in a move.
        lowest: β stays above this.
        highest: β stays below this.

    References:
        | An adaptively inexact first-order method for bilevel optimization (Salehi et al., 2023),
          https://arxiv.org/abs/2308.10098. Departure: the lower problem, reinforcement learning, is not convex and is
          never solved; one step of it is differentiated. The cosine stands in the place of the derivative, whose scale
          is that of the learning rate.
    """

    def __init__(
        self, judge: int = 0, every_n_steps: int = 10, rate: float = 0.1, lowest: float = 1e-6, highest: float = 10.0
    ) -> None:
        check_range("[0, inf)", "beta_by_judge", judge=judge)
        check_range("[1, inf)", "beta_by_judge", every_n_steps=every_n_steps)
        check_range("(0, inf)", "beta_by_judge", rate=rate, lowest=lowest, highest=highest)
        self.judge, self.every_n_steps, self.rate = judge, every_n_steps, rate
        self.lowest, self.highest = lowest, highest
        self.beta: float | None = None
        self._moved = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a β and somebody to judge it.

        Raises:
            InputError: there is not, or the judge is the reward.
        """
        if not isinstance(pl_module, AlignmentModule) or not pl_module.has_gradient or pl_module.beta <= 0:
            raise InputError(f"BetaByJudge: {type(pl_module).__name__} has no β above 0; set one, or leave it out")
        if self.judge >= len(pl_module.judges):
            raise InputError(
                f"BetaByJudge: judge {self.judge} of {len(pl_module.judges)}; add one to --model.judges that was made "
                "of other data than the reward"
            )
        judge, reward = pl_module.judges[self.judge], pl_module.reward
        same = all(getattr(judge, name, None) == getattr(reward, name, None) for name in ("path", "function"))
        if type(judge) is type(reward) and same:
            raise InputError("BetaByJudge: the judge is the reward, so β would fall to 0; name another judge")
        if pl_module.backpropagates_reward and not getattr(judge, "differentiable", False):
            raise InputError(
                f"BetaByJudge: judge {self.judge} is not differentiable, as {type(pl_module).__name__} needs it"
            )
        if self.beta is not None:
            pl_module.coefficient.beta = pl_module.beta = self.beta

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Move β when it is time, before a batch that is new."""
        assert isinstance(pl_module, AlignmentModule)
        begins = batch_idx % math.lcm(trainer.accumulate_grad_batches, pl_module.batching.steps_per_batch) == 0
        if not begins or trainer.global_step // self.every_n_steps <= self._moved:
            return
        self._moved = trainer.global_step // self.every_n_steps
        cosine = self._cosine(trainer, pl_module, batch)
        if math.isfinite(cosine):
            moved = pl_module.beta * math.exp(self.rate * cosine)
            pl_module.coefficient.beta = pl_module.beta = self.beta = min(max(moved, self.lowest), self.highest)
        pl_module.log("beta_by_judge/cosine", cosine)

    def _cosine(self, trainer: Trainer, module: AlignmentModule, batch: Any) -> float:
        """Of the judge's gradient and the KL's; positive where more β is good for the judge."""
        half = batch_rows(batch) // 2
        if half < 1:
            raise InputError("BetaByJudge: a batch of one prompt cannot be halved; raise --data.batch_size")
        named = trained(module, trainer.optimizers[0])
        judge = module.judges[self.judge]
        assert isinstance(judge, Reward)
        found: list[tuple[Tensor | None, ...]] = []
        for part, (reward, beta) in enumerate([(_Nothing(module.policy.anatomy.size), 1.0), (judge, 0.0)]):
            with frozen(trainer, module):
                module.reward, module.beta = reward, beta
                torch.manual_seed(hash_seed(trainer.global_step, trainer.global_rank, part))
                loss = module.draw_loss(slice_rows(batch, part * half, half))
                found.append(torch.autograd.grad(loss, list(named.values()), allow_unused=True))
        scales = adam_scales(trainer.optimizers[0], list(named.values()))
        mean = partial(trainer.strategy.reduce, reduce_op="mean")
        return float(scaled_cosine(found[0], found[1], scales, mean))

    def state_dict(self) -> dict[str, Any]:
        """β, and when it was moved."""
        return {"beta": self.beta, "moved": self._moved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.beta, self._moved = state_dict["beta"], state_dict["moved"]


class _Nothing(Reward):
    """A reward of 0, without a gradient."""

    differentiable = True

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, rollout: Rollout) -> Tensor:
        return torch.zeros(len(rollout.ids), device=rollout.ids.device)

    def pathwise(self, rollout: Rollout) -> Scores:
        nothing = torch.zeros(*rollout.completion_ids.shape, 1, device=rollout.ids.device)
        table = torch.zeros(self.vocabulary, 1, device=rollout.ids.device)
        return Scores(self(rollout), {}, [Adjoint(nothing, table)])
