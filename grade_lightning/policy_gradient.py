"""What all policy gradients share: a window of completions, several optimizer steps on it, and one loss line."""

from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import pad

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional import advantages, policy, sequences
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.module import AlignmentModule, Experience, Measured, StepOutput, wide_numbers
from grade_lightning.policies import Policy
from grade_lightning.rewards import Reward, Scores
from grade_lightning.rollouts import Rollout, Sampler
from grade_lightning.rows import repeat_prompts


@dataclass
class PolicyExperience(Experience):
    """Completions, their measurements when they were sampled, and their advantages."""

    totals: Totals
    """What the means of this step's loss are taken over."""
    old: Measured | None = None
    advantages: Tensor | None = None
    """(B, T)"""
    returns: Tensor | None = None
    """(B, T): what a value head is to predict."""
    uniform_groups: Tensor | None = None
    """Share of the window's groups in which all rewards are equal."""

    def select(self, rows: Tensor, totals: Totals) -> "PolicyExperience":
        """Some of the completions, as long as the longest of them."""
        rollout = self.rollout.select(rows)
        columns = slice(rollout.completion_ids.shape[1])
        return PolicyExperience(
            rollout,
            self.scores.select(rows),
            totals,
            self.old.map(lambda x: x[rows, columns]) if self.old is not None else None,
            self.advantages[rows, columns] if self.advantages is not None else None,
            self.returns[rows, columns] if self.returns is not None else None,
            self.uniform_groups,
        )

    @property
    def mask(self) -> Tensor:
        """(B, T): tokens of completions that have a reward."""
        return self.rollout.completion_mask & ~self.scores.total.isnan().unsqueeze(1)


class PolicyGradientModule(AlignmentModule):
    """Raises the probability of completions by their advantage.

    A *window* is what is sampled at once: `batch_size` completions for each micro-batch of each optimizer step. It is
    gone through `epochs` times, in `minibatches` optimizer steps each time (shuffled if there are several), so
    Lightning's automatic optimization, clipping, accumulation and step counting stay as they are: `max_steps` counts
    optimizer steps. A method gives the advantages, the gate, the level and the aggregation.

    Args:
        policy: the language model; the bundled one by default.
        reward: what is maximised, of any kind; the bundled classifier by default.
        judges: further rewards that are logged and never trained on.
        sampler: how completions are drawn.
        kl: the KL to the reference.
        num_generations: completions for each prompt, G; `data.batch_size` counts completions.
        epochs: how often the completions of a window are used.
        minibatches: optimizer steps in each epoch.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.
    """

    clips: ClassVar[bool] = True
    """Whether the gate cuts ratios off, so that the share of those is worth logging."""
    least_generations: ClassVar[int] = 1
    """Completions of a prompt that the advantages need."""
    decay: float | None = None
    """Of a moving average of the rewards, where a method wants one."""

    def __init__(
        self,
        policy: Policy | None = None,
        reward: Reward | None = None,
        judges: list[Reward] | None = None,
        sampler: Sampler | None = None,
        kl: KL = KL(),
        num_generations: int = 1,
        epochs: int = 1,
        minibatches: int = 1,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, reward, judges, sampler, kl.beta, optimizer, lr_scheduler)
        self.kl = kl
        check_range("[1, inf)", num_generations=num_generations, epochs=epochs, minibatches=minibatches)
        if num_generations < self.least_generations:
            raise InputError(
                f"num_generations = {num_generations}: {type(self).__name__} compares the completions of a prompt with "
                f"each other; give {self.least_generations} or more"
            )
        self.num_generations = num_generations
        self.epochs = epochs
        self.minibatches = minibatches
        self.running: dict[str, float] = {}
        """Running statistics; saved in checkpoints."""
        self._window: PolicyExperience | None = None
        self._plan: list[tuple[Tensor, Totals]] = []
        self._packed: dict[str, Any] | None = None

    def configure_model(self) -> None:
        """Load policy and rewards. LoRA's dropout is switched off: a ratio compares the policy with itself."""
        super().configure_model()
        if not self.policy.dropout:
            for module in self.policy.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

    def on_train_start(self) -> None:
        """Check that windows stay whole."""
        self.check_windows()

    # ---- what a method says -------------------------------------------------------------------------------------

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """Advantage of each completion, from the rewards of its group; both (P, G), NaN where a reward abstains."""
        raise NotImplementedError

    def advantages(self, experience: PolicyExperience) -> Tensor:
        """Advantage of each token, (B, T): of its completion, less the KL that is still to come."""
        penalty = self._kl_rewards(experience)
        rewards = experience.scores.total
        if self.kl.clock == "sequence":
            rewards = rewards + penalty.sum(-1)
            penalty = torch.zeros_like(penalty)
        grouped = self.group_advantages(rewards.unflatten(0, (-1, self.num_generations))).flatten()
        return grouped.unsqueeze(1) + advantages.discounted_returns(penalty, experience.rollout.completion_mask)

    def appraise(self, experience: PolicyExperience) -> PolicyExperience:
        """Add the advantages to an experience that has been measured."""
        return replace(experience, advantages=self.advantages(experience))

    def token_rewards(self, experience: PolicyExperience) -> Tensor:
        """Reward of each token, (B, T): the KL's part of each, and the completion's reward at its last token."""
        end = sequences.last_token(experience.rollout.completion_mask)
        total = experience.scores.total.nan_to_num(nan=0.0).unsqueeze(1)
        return self._kl_rewards(experience) + end * total

    def level(self, values: Tensor, mask: Tensor) -> Tensor:
        """Means over the segment of which a ratio is taken, (B, T); here, each token."""
        return policy.token_level(values, mask)

    @abstractmethod
    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """Coefficient of A ∇log π, (B, T)."""

    @abstractmethod
    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Weight of each token, (B, T)."""

    # ---- a window of completions --------------------------------------------------------------------------------

    @property
    def visits(self) -> int:
        """Training steps on a window: each micro-batch of each optimizer step."""
        return self.epochs * self.minibatches * self._accumulation()

    def rows_per_batch(self, batch_size: int) -> int:
        """Prompts of a window."""
        completions = batch_size * self.minibatches * self._accumulation()
        if completions % self.num_generations or not completions:
            raise InputError(
                f"data.batch_size: {completions} completions are sampled at once, which is no multiple of "
                f"model.num_generations ({self.num_generations}); change one of them"
            )
        return completions // self.num_generations

    def _accumulation(self) -> int:
        return 1 if self._trainer is None else self.trainer.accumulate_grad_batches

    def sample(self, batch: dict[str, Any]) -> tuple[Rollout, Scores]:
        """G completions of each prompt, those of a prompt in a row, with their rewards."""
        rollout = self.sampler(self.policy, **repeat_prompts(batch, self.num_generations))
        return rollout, self._score(rollout)

    def _score(self, rollout: Rollout) -> Scores:
        size = self.num_generations  # a group is scored together
        parts = self._parts(len(rollout.ids) // size)
        rows = [(groups.unsqueeze(1) * size + torch.arange(size)).flatten() for groups in parts]
        return Scores.join([self.score(rollout.select(part)) for part in rows])

    def explore(self, batch: dict[str, Any]) -> PolicyExperience:
        """Sample a window and, if it is going to be used several times, measure it first."""
        rollout, scores = self.sample(batch)
        tokens = self._mean(rollout.completion_mask.sum().float())
        experience = PolicyExperience(rollout, scores, Totals(float(tokens), len(rollout.ids)))
        if self.num_generations > 1:
            differ = advantages.differ(scores.total.unflatten(0, (-1, self.num_generations)))
            experience.uniform_groups = 1 - differ.float().mean()
        if self.visits == 1:
            return experience  # the training pass measures
        with torch.no_grad(), self.policy.evaluating():
            measured = [self.measure(rollout.select(rows)) for rows in self._parts(len(rollout.ids))]
        return self._appraise(experience, _join(measured, rollout.completion_ids.shape[1]))

    def _parts(self, rows: int) -> tuple[Tensor, ...]:
        return torch.arange(rows).chunk(self.visits // self.epochs)

    def _plan_steps(self, mask: Tensor) -> list[tuple[Tensor, Totals]]:
        """Which rows each visit trains on, and what its means are taken over: all rows of its optimizer step.

        Micro-batches of an optimizer step hold completions of similar length, so that little of them is padding.
        """
        accumulation, rows = self._accumulation(), len(mask)
        parts = self.visits // self.epochs
        if rows % parts:
            raise InputError(f"{rows} completions cannot be divided evenly into {parts} parts; change data.batch_size")
        orders = [torch.randperm(rows) if self.minibatches > 1 else torch.arange(rows) for _ in range(self.epochs)]
        lengths = mask.sum(-1).cpu()
        steps = [step for order in orders for step in order.chunk(self.minibatches)]
        if accumulation > 1:
            steps = [step[lengths[step].argsort(stable=True)] for step in steps]
        chunks = [chunk for step in steps for chunk in step.chunk(accumulation)]
        tokens = torch.stack([lengths[chunk].sum() for chunk in chunks]).float().to(mask.device)
        tokens = self._mean(tokens.unflatten(0, (-1, accumulation)).mean(1)).repeat_interleave(accumulation)
        return [(c, Totals(n, rows / parts)) for c, n in zip(chunks, tokens.tolist(), strict=True)]

    def _mean(self, values: Tensor) -> Tensor:
        return values if self._trainer is None else self.trainer.strategy.reduce(values, reduce_op="mean")

    def _total(self, values: Tensor) -> Tensor:
        return values if self._trainer is None else self.trainer.strategy.reduce(values, reduce_op="sum")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the running statistics and, in the middle of a window, the window of each process."""
        super().on_save_checkpoint(checkpoint)
        own = None
        if self._window is not None and self._window.old is not None:  # else its only step failed
            own = _pack(self._window) | {"plan": [(r, *t) for r, t in self._plan]}
        windows = [own]
        if self._trainer is not None and self.trainer.world_size > 1:
            windows = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(windows, own)
        checkpoint["grade_lightning"] |= {"running": dict(self.running), "windows": windows}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on in the middle of the window; with another number of processes or of visits, with a new one."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["grade_lightning"]
        self.running = dict(saved.get("running", {}))
        if self.kl.target is not None:
            self.beta = self.running.get("beta", self.beta)
        windows = saved.get("windows", [None])
        own = windows[self._rank()] if len(windows) == self._processes() else None
        self._packed = own if own is not None and len(own["plan"]) == self.visits else None

    # ---- one training step --------------------------------------------------------------------------------------

    @wide_numbers()
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One micro-batch of the window; the first samples it."""
        self._seed("train", batch_idx)
        visit = batch_idx % self.visits
        if self._packed is not None:
            self._window = _unpack(self._packed, self.policy, self.device)
            self._plan = [(rows, Totals(tokens, count)) for rows, tokens, count in self._packed["plan"]]
            self._packed = None
        if visit == 0 or self._window is None:
            self._window = self.explore(batch)
            self._plan = self._plan_steps(self._window.rollout.completion_mask) if self.visits > 1 else []
        window = self._window
        experience = window if self.visits == 1 else window.select(*self._plan[visit])
        step = self.loss(experience)
        if visit + 1 == self.visits:
            old = step.kl if window.old is None else window.old.kl
            self.after_window(window, sequences.masked_sum(old, window.rollout.completion_mask))
            self._window = None
        return self._finish_step(experience, step)

    def after_window(self, window: PolicyExperience, kl: Tensor) -> None:
        """Move what runs from window to window: an adaptive β, the average of the rewards.

        Args:
            window: what was sampled.
            kl: exact KL of each completion when it was sampled, nats, (B,).
        """
        if self.kl.target is not None:
            completions = len(kl) * self._processes()
            self.beta = self.running["beta"] = self.kl.adapted(self.beta, float(self._mean(kl.mean())), completions)
        if self.decay is not None:
            baseline = torch.tensor(self.running.get("baseline", torch.nan), dtype=torch.float64)
            moved = advantages.ema(baseline, self._mean_reward(window.scores.total).cpu().double(), self.decay)
            if moved.isfinite():
                self.running["baseline"] = float(moved)

    def baseline(self, rewards: Tensor) -> Tensor:
        """Moving average of the rewards of earlier windows; in the first one, the mean of `rewards` themselves."""
        baseline = self.running.get("baseline")
        return self._mean_reward(rewards) if baseline is None else rewards.new_tensor(baseline)

    def _mean_reward(self, rewards: Tensor) -> Tensor:
        """Of all completions that have one, on all processes; NaN if there are none."""
        sums = self._total(torch.stack([rewards.nansum(), (~rewards.isnan()).sum().to(rewards.dtype)]))
        return sums[0] / sums[1]

    def _appraise(self, experience: PolicyExperience, old: Measured) -> PolicyExperience:
        """Add the advantages, from what was measured when the completions were sampled."""
        found = self.appraise(replace(experience, old=old))
        assert found.advantages is not None
        return replace(found, advantages=found.advantages.masked_fill(~found.mask, 0))

    def _kl_rewards(self, experience: PolicyExperience) -> Tensor:
        mask, old = experience.rollout.completion_mask, experience.old
        assert old is not None
        if not self.kl.in_reward:
            return torch.zeros_like(old.logps)
        return -self.beta * self.kl.penalty(old.log_ratio, old.kl, mask)

    def loss(self, experience: Experience) -> StepOutput:
        """The loss line, and the KL's term if it is in the loss."""
        assert isinstance(experience, PolicyExperience)
        exact_graph = self.kl.in_loss and self.kl.estimator == "full"
        now = self.measure(experience.rollout, None if self.kl.in_loss else experience.old, exact_graph)
        if experience.old is None:
            experience = self._appraise(experience, now.map(Tensor.detach))
        assert experience.old is not None
        loss, metrics = self.objective(experience, now)
        old = experience.old
        return StepOutput(loss, now.logps.detach(), old.kl, old.entropy, old.log_ratio, metrics)

    def objective(self, experience: PolicyExperience, now: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and further scalars to log."""
        mask, old = experience.rollout.completion_mask, experience.old
        assert old is not None
        assert experience.advantages is not None
        weights = self.aggregate(mask, experience.totals)
        loss = policy.policy_loss(now.logps, old.logps, experience.advantages, mask, weights, self.gate, self.level)
        if self.kl.in_loss:
            loss = loss + self.beta * self.kl.loss(now.logps, now.log_ratio, now.kl, mask, weights)
        metrics = {"beta": loss.new_tensor(self.beta)}
        if self.clips:
            ratio = policy.importance_ratio(now.logps, old.logps, mask, self.level)
            gated = (self.gate(ratio, experience.advantages) != ratio) & mask & (experience.advantages != 0)
            metrics["clip_fraction"] = gated.sum() / mask.sum()
        if experience.uniform_groups is not None:
            metrics["uniform_groups"] = experience.uniform_groups
        return loss, metrics


def _join(parts: list[Measured], length: int) -> Measured:
    padded = [part.map(lambda x: pad(x, (0, length - x.shape[1]))) for part in parts]
    found = {f.name: [getattr(part, f.name) for part in padded] for f in fields(Measured)}
    whole: dict[str, Any] = {name: None if values[0] is None else torch.cat(values) for name, values in found.items()}
    return Measured(**whole)


_ROLLOUT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "logps")


def _pack(window: PolicyExperience) -> dict[str, Any]:
    """Tensors and names alone, as a checkpoint may hold them; the rows' other columns were for the reward."""
    old = window.old
    return {
        "rollout": {name: getattr(window.rollout, name).cpu() for name in _ROLLOUT},
        "eos_ids": window.rollout.eos_ids,
        "total": window.scores.total.cpu(),
        "parts": {name: x.cpu() for name, x in window.scores.parts.items()},
        "totals": tuple(window.totals),
        "old": {f.name: x.cpu() for f in fields(Measured) if (x := getattr(old, f.name, None)) is not None},
        "advantages": None if window.advantages is None else window.advantages.cpu(),
        "returns": None if window.returns is None else window.returns.cpu(),
        "uniform_groups": None if window.uniform_groups is None else window.uniform_groups.cpu(),
    }


def _unpack(packed: dict[str, Any], policy: Policy, device: torch.device) -> PolicyExperience:
    packed = move_data_to_device(packed, device)
    return PolicyExperience(
        Rollout(**packed["rollout"], tokenizer=policy.tokenizer, eos_ids=packed["eos_ids"]),
        Scores(packed["total"], packed["parts"]),
        Totals(*packed["totals"]),
        Measured(**packed["old"]),
        packed["advantages"],
        packed["returns"],
        packed["uniform_groups"],
    )
