"""Whether an engine samples from the policy that learns: runs of GradeSTE, whatever draws the completions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from grade_lightning.methods import GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Distribution, Engine, Sampler
from tests.methods.toy_task import batches, make, trainer
from tests.rollouts.rolling import logps_of


def learners(policy: Policy, distribution: Distribution, rollout: Rollout) -> Tensor:
    """Log-probabilities of the training pass, (B, T)."""
    length = rollout.completion_ids.shape[1]
    with torch.no_grad(), policy.evaluating():
        logits = policy.logits(policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], length)
    sampled = distribution.both(rollout, rollout.take(logits), slice(None))[0]
    return rollout.put(sampled.gather(-1, rollout.tokens.unsqueeze(-1)).squeeze(-1))


def gap(policy: Policy, distribution: Distribution, rollout: Rollout) -> float:
    """The largest difference between the engine's log-probabilities and the learner's."""
    return float((learners(policy, distribution, rollout) - logps_of(rollout)).abs().max())


class Gaps(Callback):
    """Of each step the difference and the completions."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.drawn: list[Any] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        rollout = pl_module.last_rollout[0]  # the weights have not changed since it was drawn
        self.gaps.append(gap(pl_module.policy, pl_module.sampler.distribution, rollout))
        self.drawn.append(rollout.completion_ids.tolist())


def run(engine: Engine, epochs: int, lora: bool = False, save: Path | None = None, **kwargs: Any) -> Gaps:
    """Epochs of two steps of GradeSTE on a tiny Llama, with a temperature and a least length."""
    seen, sampler = Gaps(), Sampler(6, min_new_tokens=2, temperature=0.9, engine=engine)
    fitting = trainer(callbacks=[seen], max_epochs=epochs)
    fitting.fit(make(GradeSTE, lora, sampler=sampler), batches(2), **kwargs)
    if save is not None:
        fitting.save_checkpoint(save)
    return seen


def assert_agrees_over_a_resume(
    make_engine: Callable[[], Engine], folder: Path, lora: bool = False, updates: int = 4
) -> None:
    """The engine draws from the weights of each step, to rounding, and a resumed run draws what the whole run drew."""
    epochs = updates // 2
    whole = run(make_engine(), epochs, lora)
    first = run(make_engine(), epochs // 2, lora, save=folder / "half.ckpt")
    second = run(make_engine(), epochs, lora, ckpt_path=folder / "half.ckpt")
    assert max(whole.gaps + first.gaps + second.gaps) < 2e-5
    assert first.drawn + second.drawn == whole.drawn
    assert len(whole.drawn) == updates
    assert len({str(drawn) for drawn in whole.drawn[:4]}) == 4  # later the policy knows what to say


def assert_follows_the_distribution(engine: Engine, policy: Policy, prompts: Prompts, size: int = 500) -> None:
    """Counts of two tokens in a row, of a distribution with a handful of outcomes, to 4.5 standard errors."""
    sampler = Sampler(2, min_new_tokens=1, temperature=1.3, top_k=3, top_p=0.95, engine=engine)
    torch.manual_seed(0)
    rollout = sampler(policy, Prompts(prompts.ids[:1], prompts.mask[:1]).repeat(torch.tensor([size])))
    truth = learners(policy, sampler.distribution, rollout).sum(-1).exp()
    outcomes: dict[tuple[int, ...], list[float]] = {}
    for ids, mask, probability in zip(rollout.completion_ids, rollout.completion_mask, truth.tolist(), strict=True):
        outcomes.setdefault(tuple(ids[mask].tolist()), []).append(probability)
    assert 3 <= len(outcomes) <= 9
    assert sum(found[0] for found in outcomes.values()) > 0.98  # none is left out
    for found in outcomes.values():
        error = (found[0] * (1 - found[0]) / size) ** 0.5
        assert abs(len(found) / size - found[0]) < 4.5 * error
