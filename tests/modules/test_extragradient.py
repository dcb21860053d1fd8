"""EGPO: a trial, what it draws, and the step from where the trial began; and the game that it is for."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from grade_lightning.constraints import Constrained, Constraint
from grade_lightning.errors import InputError
from grade_lightning.functional.preferences import online_ipo
from grade_lightning.methods import EGPO
from grade_lightning.records import Rollout
from grade_lightning.rollouts import Sampler
from tests.methods.toy_task import Toy, assert_same, batches, make, trainer, weights
from tests.modules.toys import Watch, constant, flat

pytestmark = pytest.mark.usefixtures("own_random_state")


class Draws(Callback):
    """What each step was trained on, the weights before and after it, and the optimizer's count of steps."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.counts: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before.append(weights(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.rollouts.append(pl_module.last_rollout[0])
        self.after.append(weights(pl_module))
        states = list(trainer.optimizers[0].state.values())
        self.counts.append(int(states[0]["step"]) if states and "step" in states[0] else 0)


def egpo(**kwargs: Any) -> Any:
    return make(EGPO, num_generations=2, sampler=Sampler(4), **kwargs)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_the_second_step_begins_where_the_first_did_and_draws_where_it_ended() -> None:
    module, watch, draws = egpo(optimizer=sgd), Watch(), Draws()
    trainer(callbacks=[watch, draws]).fit(module, batches(2))
    start, trial, end = draws.before[0], draws.after[0], draws.after[1]
    assert_same(draws.before[1], start)
    for name, gradient in watch.gradients[1].items():
        torch.testing.assert_close(end[name], start[name] - 0.1 * gradient)
    assert not torch.equal(flat(watch.gradients[0]), flat(watch.gradients[1]))
    rollout = draws.rollouts[1]
    assert rollout.engine_logps is not None
    for state, close in ((trial, True), (start, False)):
        module.load_state_dict(state, strict=False)  # what is frozen is in none
        with module.policy.evaluating():
            gap = (module.measure(rollout).logps - rollout.engine_logps).abs().max().item()
        assert (gap < 1e-4) is close


def test_the_state_of_the_optimizer_goes_back_and_the_schedule_counts_pairs() -> None:
    """Four steps are two of Adam; both steps of a pair have the same learning rate."""
    module, watch, draws = egpo(lr_scheduler=None), Watch(), Draws()
    trainer(callbacks=[watch, draws]).fit(module, batches(4))
    assert draws.counts == [1, 1, 2, 2]
    assert watch.rates == pytest.approx([1e-2, 1e-2, 5e-3, 5e-3])


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_resumes_after_a_trial(accumulate: int, tmp_path: Path) -> None:
    """With the weights and the optimizer's state of where the trial began: the same bits."""
    whole, settings = egpo(), {"accumulate_grad_batches": accumulate}
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(callbacks=[save], enable_checkpointing=True, **settings).fit(whole, batches(4 * accumulate))
    middle = tmp_path / "step=3.ckpt"
    kept = torch.load(middle, weights_only=True)["grade_lightning"]["start"]
    assert_same(kept["weights"], torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"])
    resumed = egpo(seed=5)
    seed_everything(0, verbose=False)
    trainer(**settings).fit(resumed, batches(4 * accumulate), ckpt_path=middle, weights_only=True)
    assert_same(weights(resumed), weights(whole))


@pytest.mark.slow
def test_accumulation_shares_out_whole_prompts() -> None:
    """Twelve prompts in two halves; all completions of a step come from the same policy."""
    module, draws = egpo(lr_scheduler=constant), Draws()
    trainer(callbacks=[draws], accumulate_grad_batches=2).fit(module, batches(4))
    assert [len(rollout.ids) for rollout in draws.rollouts] == [12] * 4
    assert all(rollout.layout.shape == (6, 2) for rollout in draws.rollouts)
    with pytest.raises(InputError, match=r"12 prompts cannot be divided evenly into 5 parts"):
        trainer(accumulate_grad_batches=5).fit(egpo(), batches(10))


def test_a_reward_that_moves_is_refused() -> None:
    with pytest.raises(InputError, match=r"moves with what is sampled, and EGPO takes half of its steps back"):
        EGPO(reward=Constrained(Toy(), [Constraint(Toy(), at_most=0.1)]))


# ---- rock, paper, scissors ----------------------------------------------------------------------------------------

BEATS = numpy.array([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]])
REFERENCE = numpy.log([0.5, 0.3, 0.2])


def softmax(logits: Any) -> Any:
    odds = numpy.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def updated(logits: Any, opponent: Any, beta: Any, eta: Any) -> Any:
    """One step on the loss with all three completions and the exact wins against an opponent."""
    return (1 - eta * beta) * logits + eta * beta * (REFERENCE + opponent @ BEATS.T / beta)


def test_a_step_of_the_game_is_a_step_on_the_loss() -> None:
    """At half the learning rate η β, up to a constant, which is no part of a softmax."""
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    before = logits.detach().numpy()
    wins = torch.from_numpy(BEATS @ softmax(before))
    loss = online_ipo((logits - torch.from_numpy(REFERENCE))[None], wins[None], beta=0.1).sum()
    (slope,) = torch.autograd.grad(loss, logits)
    difference = before - 0.3 / 2 * slope.numpy() - updated(before, softmax(before), beta=0.1, eta=3.0)
    assert difference == pytest.approx(difference.mean(), abs=1e-12)


def test_rock_paper_scissors() -> None:
    """How far the policy is from the best response to itself: without extragradient it circles where β η is small."""
    beta, eta = numpy.array([[0.1], [0.1], [0.01], [0.001]]), numpy.array([[1], [3], [3], [1]])
    plain = trial = numpy.tile(REFERENCE, (4, 1))
    for _ in range(4000):
        plain = updated(plain, softmax(plain), beta, eta)
        trial = updated(trial, softmax(updated(trial, softmax(trial), beta, eta)), beta, eta)
    ipo, egpo = (
        abs(softmax(x) - softmax(REFERENCE + softmax(x) @ BEATS.T / beta)).sum(-1).tolist() for x in (plain, trial)
    )
    assert max(egpo) < 1e-9
    assert ipo[0] < 1e-9
    assert min(ipo[1:]) > 0.5
